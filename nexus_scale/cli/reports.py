"""`nexus report`, `doctor` and `bench`."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from nexus_scale.cli.base import (
    Debug,
    Json,
    finite,
    guarded,
    path_of,
)
from nexus_scale.io.terminal import visible


def report(run: Annotated[str, typer.Argument(help="run folder, or the name of a run")], debug: Debug = False) -> None:
    """Rewrite a run's report.html and results.json."""

    def action() -> None:
        from nexus_scale.report.page import write_report
        from nexus_scale.run.files import run_at

        folder = run_at(path_of(run))
        write_report(folder)
        print(visible(str(folder.report)))

    guarded(action, debug)


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what is installed, which kernels are used, and which problems to expect."""
    environment = dict(os.environ)  # the user's, before it is made safe for this process

    def action() -> None:
        from nexus_scale.config.recipe import Cluster
        from nexus_scale.orchestration.cluster import roots
        from nexus_scale.run.doctor import diagnose, table, worst

        findings = diagnose(roots=roots(Cluster()), environ=environment)
        print(json.dumps([vars(f) for f in findings], indent=1, default=str) if as_json else table(findings))
        if worst(findings) == "error":
            raise SystemExit(1)

    guarded(action, debug)


def bench(
    name: Annotated[
        str, typer.Argument(help="gpu, step, host, model, loader, start, checkpoint, generate, recovery or storm")
    ],
    as_json: Json = False,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="interleaved rounds (default: the benchmark's own)"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, max=10_000, callback=finite, help="minutes of a storm (default: 30), or of gpu (7)"),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compiled", help="host: blocks are compiled on all sides", show_default=False)
    ] = None,
    tiny: Annotated[
        bool | None,
        typer.Option(
            "--tiny", help="gpu: in miniature, without a GPU too: every case, and no figure", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="gpu: takes each row as it is measured (default: nexus-bench-gpu.jsonl)")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare this project with its peers, side by side in one run."""

    def action() -> None:
        from nexus_scale.bench import measure, show

        result = measure(name, rounds=rounds, minutes=minutes, compiled=compiled, tiny=tiny, output=output)
        print(json.dumps(result, indent=1) if as_json else show(result))

    guarded(action, debug)
