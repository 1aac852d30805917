"""What all commands share: the application, options, how mistakes become messages, how a run's name becomes its folder."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_scale.contracts import SAFE_ENVIRONMENT, Preempted, UserError
from nexus_scale.engine.checkpoint import CheckpointError
from nexus_scale.io.durable import trouble
from nexus_scale.io.terminal import VisibleFormatter, keep_output_open, visible

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train generative models at any scale.",
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value over the recipe, cluster.key=value over the cluster, run=NAME")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the stack trace of an error")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


OfCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="a cluster file, or a name below configs/cluster/, whose device computes (default: the run's own)",
    ),
]


def finite(value: float | None) -> float | None:
    """The value, unless it is nan or infinite, which click's bounds accept."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number")
    return value


SEEDS = 2**63 - 1


def guarded(action: Callable[[], Any], debug: bool = False) -> Any:
    """Calls `action`; a user's mistake becomes a message on stderr and its exit code."""
    keep_output_open()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    os.environ.update(SAFE_ENVIRONMENT)
    try:
        return action()
    except UserError as error:
        if debug:
            raise
        words, code = str(error), error.code
    except CheckpointError as error:
        if debug:
            raise
        words, code = str(error), 5
    except OSError as error:
        known = trouble(error)
        if debug or known is None:
            raise
        words, code = known
    except Preempted as left:
        print(str(left), file=sys.stderr)
        raise SystemExit(75) from None
    print(f"error: {visible(words)}", file=sys.stderr)
    raise SystemExit(code)


def hardware_named(cluster: str | None) -> Any:
    """The hardware of a cluster file, or None (the run's own) without one."""
    if cluster is None:
        return None
    from nexus_scale.config.recipe import load_cluster
    from nexus_scale.engine.hardware import hardware_of

    return hardware_of(load_cluster(cluster))


def place_of(run: str) -> Any:
    """The roots of an existing run or an exported folder, whatever the working directory."""
    from nexus_scale.generate.exported import exported_at
    from nexus_scale.orchestration.cluster import data_root_of_run
    from nexus_scale.run.files import open_run
    from nexus_scale.train import Place

    if (exported := exported_at(path_of(run))) is not None:
        return exported.place
    folder, _, cluster = open_run(path_of(run))
    data_root = data_root_of_run(folder, cluster)
    logging.getLogger(__name__).info("run %s, data in %s", folder.path, data_root)
    return Place(folder, data_root, folder.path.parent)


def path_of(run: str) -> Path:
    """A run's folder, by path or by name."""
    from nexus_scale.config.recipe import Cluster
    from nexus_scale.orchestration.cluster import roots
    from nexus_scale.run.runs import resolve_run

    return Path(run) if Path(run).is_dir() else resolve_run(run, roots(Cluster())[1])
