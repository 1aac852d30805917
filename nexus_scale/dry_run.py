"""`nexus plan` and `--dry-run`: the figures of a recipe on a cluster, without starting it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import dump_yaml
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import visible
from nexus_scale.io.ticker import still
from nexus_scale.main_job import Target, check_data, parameters, resolve
from nexus_scale.orchestration.security import refuse_secrets
from nexus_scale.planner.ceilings import Rate
from nexus_scale.planner.failures import NODE_HOURS_BETWEEN_FAILURES
from nexus_scale.planner.losses import largest_sample
from nexus_scale.planner.plan import Plan, as_json, plan, table
from nexus_scale.planner.plot import plot
from nexus_scale.planner.search import Row, Search, search_table, sources
from nexus_scale.planner.search import as_json as search_json

log = logging.getLogger(__name__)

COUNTING = "counting memory and work on the meta device"
"""What takes longest, for a line every few seconds."""


def describe(target: Target) -> str:
    """The resolved recipe and cluster, parameters, FLOPs, batch arithmetic and memory per rank, as text."""
    recipe, cluster = target.recipe, target.cluster
    if recipe.data.synthetic is not None:
        check_data(target)  # made-up data need no job
    planned = _planned(target)
    counts = parameters(recipe)
    sizes = "\n".join(f"  {name}: {count:,} parameters ({count / 1e9:.2f} B)" for name, count in counts.items())
    return "\n".join(
        [
            "# recipe",
            dump_yaml(recipes.dump(recipe)).rstrip(),
            "# cluster",
            dump_yaml(recipes.dump(cluster)).rstrip(),
            "# networks",
            sizes,
            f"# on {cluster.name}: {_workers(cluster)} x micro-batch {planned.micro_batch} x accumulation {planned.accumulation}",
            table(planned),
            *planned.notes,
            *_missing_here(cluster),
        ]
    )


def estimate(target: Target) -> str:
    """Memory and time as `nexus plan` says them, as text."""
    planned = _planned(target)
    return "\n".join([table(planned), *planned.notes])


def plan_command(arguments: Sequence[str]) -> None:
    """`nexus plan` with its arguments: prints what it finds."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command.command()(_plan)
    command(list(arguments), prog_name="nexus plan", standalone_mode=False)


def _plan(
    recipe: Annotated[str, typer.Argument(help="a recipe: a path, or a name below configs/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value over the recipe, cluster.key=value")] = None,
    cluster: Annotated[str | None, typer.Option(help="a cluster file, or a name below configs/cluster/")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="apply the recipe's `tiny:` block")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="clusters of 1 to 16,384 GPUs of the cluster's kind")
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, max=1e9, help="of a GPU for an hour, for --search (default: no cost)")
    ] = None,
    node_hours: Annotated[
        float | None,
        typer.Option(min=0.01, max=1e9, help="between failures of a node, for --search (default: 6,340, published)"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="a PNG, for the plot of --search")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the stack trace of an error")] = False,
) -> None:
    """Say whether a recipe fits a cluster, how long a step takes and what bounds it; or search clusters of 1 to 16,384 GPUs."""
    refuse_secrets({}, overrides or ())
    if not search and (price, node_hours, output) != (None, None, None):
        raise UserError("--price, --node-hours and --output belong to --search: add it")
    target = resolve(recipe, overrides or (), cluster=cluster, tiny=tiny)
    if search:
        hours = NODE_HOURS_BETWEEN_FAILURES if node_hours is None else Rate(node_hours, "given", "--node-hours")
        print(_searched(target, hours, price, output, as_json_))
        return
    planned = _planned(target)
    if as_json_:
        print(json.dumps(as_json(planned), indent=1))
    else:
        print("\n".join([table(planned), *planned.notes]))


def _planned(target: Target) -> Plan:
    recipe, data_root = target.recipe, target.place.data_root
    with still(COUNTING, log.info):
        return plan(recipe, target.cluster, data_root=data_root, sample=largest_sample(recipe, data_root))


def _searched(target: Target, hours: Rate, price: float | None, output: Path | None, as_object: bool) -> str:
    if output is not None and output.is_dir():
        raise UserError(
            f"--output {visible(str(output))}: got a folder; name a file, such as {visible(str(output))}/plan.png"
        )
    with still(COUNTING, log.info):
        searching = Search(
            target.recipe, target.cluster, node_hours=hours, price=price, data_root=target.place.data_root
        )
        rows = list(searching.rows())
    found = [row for row in rows if isinstance(row, Row)]
    if output is not None and found:
        plot(found, output, f"{target.place.run.path.name} on {searching.ceilings.card}, modelled", price)
    if as_object:
        return json.dumps(search_json(rows, searching), indent=1)
    told = [f"plot in {visible(str(output))}"] if output is not None and found else []
    return "\n".join(["All figures are modelled, from:", sources(searching), "", search_table(rows, price), *told])


def _missing_here(cluster: recipes.Cluster) -> list[str]:
    """What the cluster file asks for and this machine lacks; a dry run may be for other machines."""
    each = cluster.gpus_per_worker * -(-cluster.ranks // cluster.nodes)
    here = torch.cuda.device_count()
    if each <= here:
        return []
    return [
        f"training would end with code 4 on this machine: {cluster.name} asks for {each:g} GPUs per machine, this one has {here}"
    ]


def _workers(cluster: recipes.Cluster) -> str:
    if cluster.sequence_parallel == 1:
        return f"{cluster.ranks} workers"
    return f"{cluster.sharers} groups of {cluster.sequence_parallel} workers that share each sample"
