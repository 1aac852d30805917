"""`nexus evaluate` and `compare`: how good samples are, and which of two runs is better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_scale.cli.base import Debug, Json, OfCluster, guarded, hardware_named, path_of, place_of
from nexus_scale.io.terminal import visible


def evaluate(
    what: Annotated[str, typer.Argument(help="a run, an exported folder, or a folder of pictures or shards")],
    suite: Annotated[str, typer.Option(help="what to measure: a file, or a name below configs/suites")] = "emoji",
    step: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="an earlier checkpoint that the run has kept")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="an average of the run (default: its first)")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of the result (default: evaluations/ in the run, or beside the folder)")
    ] = None,
    cluster: OfCluster = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what a run draws, or a folder holds, by a suite: figures with intervals, between what is real and what is noise."""

    def action() -> None:
        from nexus_scale.config.recipe import Cluster
        from nexus_scale.evaluate import evaluation, findings
        from nexus_scale.orchestration.cluster import roots

        path = path_of(what)
        place = place_of(what) if evaluation.is_drawn_by(path) else None
        found, folder = evaluation.evaluate(
            path, place, suite, roots(Cluster())[0], step=step, weights=weights, output=output,
            hardware=hardware_named(cluster),
        )  # fmt: skip
        print(findings.as_json(found) if as_json else visible(f"{found.table()}\nwritten: {folder}"))

    guarded(action, debug)


def compare(
    what: Annotated[list[str], typer.Argument(help="two or more: runs that were evaluated, or folders of evaluations")],
    suite: Annotated[str | None, typer.Option(help="which suite of runs that have several")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare evaluations with the first of them: each difference with its interval, corrected for the number of figures."""

    def action() -> None:
        from nexus_scale.evaluate import comparison

        found = comparison.compare(
            [comparison.folder_of(Path(one) if Path(one).is_dir() else path_of(one), suite) for one in what]
        )
        print(comparison.as_json(found) if as_json else visible(comparison.table(found)))

    guarded(action, debug)
