"""`nexus train`, `plan` and `certify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nexus_scale.cli.base import (
    SEEDS,
    Debug,
    Json,
    Overrides,
    guarded,
)
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import visible


def train(
    target: Annotated[
        str, typer.Argument(help="a recipe (a path, or a name below configs/), or a run folder to resume")
    ],
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="a cluster file, or a name below configs/cluster/")] = None,
    run: Annotated[str | None, typer.Option(help="name of the run (default: the recipe's name)")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the resolved recipe, parameters, FLOPs and memory per rank, and stop"),
    ] = False,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="apply the recipe's `tiny:` block; the run is NAME_tiny unless --run names it"),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="a key of the recipe or cluster that may change when a run resumes; may be repeated"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a recipe, or resume a run. Missing data are prepared first."""

    def action() -> None:
        from nexus_scale import main_job
        from nexus_scale.orchestration.security import refuse_secrets

        refuse_secrets({}, overrides or ())  # before any of it is written into a run folder
        if dry_run:
            from nexus_scale.dry_run import describe

            print(describe(main_job.resolve(target, overrides or (), cluster=cluster, run=run, tiny=tiny)))
            return
        if allow_change:
            from nexus_scale.run.runs import change_run

            resolved = main_job.resolve(target, overrides or (), cluster=cluster, run=run, tiny=tiny)
            change_run(resolved.place.run, resolved.recipe, resolved.cluster, allow_change)
        main_job.main(target, overrides or (), cluster=cluster, run=run, tiny=tiny)

    guarded(action, debug)


def plan(context: typer.Context) -> None:
    """Say whether a recipe fits a cluster, how long a step takes and what bounds it; or search clusters of 1 to 16,384 GPUs."""
    from nexus_scale.dry_run import plan_command

    guarded(lambda: plan_command(context.args), "--debug" in context.args)


def certify(
    recipe: Annotated[str, typer.Argument(help="a recipe: a path, or a name below configs/")],
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="a cluster file, or a name below configs/cluster/")] = None,
    kills: Annotated[int, typer.Option(min=0, max=100_000, help="how often the twin is killed")] = 20,
    workers: Annotated[
        str, typer.Option(help="numbers of workers; the first is that of the reference and the twin")
    ] = "2,1,4",
    steps: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="steps of each run (default: two per kill, at least 60)")
    ] = None,
    every: Annotated[int, typer.Option(min=1, max=10**9, help="steps between checkpoints")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="seed of the kills")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="apply the recipe's `tiny:` block")] = False,
    left_out: Annotated[
        str | None,
        typer.Option(
            "--leave-out",
            help="resume once without one of masters, moments, ema, optimizer_steps, buffers, objective or draws; the proof must then fail",
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="also check that leaving out any of these is detected")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="a new folder for the certificate and its runs")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove that no training is lost on this cluster: kill and rescale a twin of a reference run, and compare every step."""

    def action() -> None:
        from nexus_scale import certify as proof
        from nexus_scale.orchestration.security import refuse_secrets

        refuse_secrets({}, overrides or ())
        certificate, folder = proof.certify(
            recipe, overrides or (), cluster=cluster, kills=kills, workers=_numbers(workers), steps=steps, every=every, seed=seed,
            tiny=tiny, folder=output, left_out=left_out, controls=controls, quiet=as_json,
        )  # fmt: skip
        print(json.dumps(proof.as_json(certificate), indent=1) if as_json else proof.summary(certificate))
        print(visible(f"certificate in {folder}/certificate.html"), file=sys.stderr)
        if not certificate.passed:
            raise SystemExit(1)

    guarded(action, debug)


MAX_WORKERS = 10_000


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if (
        not all(part.isascii() and part.isdigit() and 1 <= int(part[:6]) <= MAX_WORKERS for part in parts)
        or len(parts) > 100
    ):
        raise UserError(f"--workers {text[:100]!r}: expected numbers, like 2,1,4, each from 1 to {MAX_WORKERS:,}")
    return [int(part) for part in parts]
