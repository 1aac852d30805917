"""`nexus study`: people choose between samples of two systems, side by side and blind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nexus_scale.cli.base import SEEDS, Debug, Json, OfCluster, finite, guarded, hardware_named, place_of
from nexus_scale.cli.pages import Host, Names, Port, TokenFile
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import visible

study_app = typer.Typer(
    no_args_is_help=True, help="Ask people which samples are better: side by side, blind, in a browser."
)

Folder = Annotated[Path, typer.Argument(help="a study's folder")]


@study_app.command("new")
def new(
    systems: Annotated[
        list[str],
        typer.Argument(
            help="two or more: runs, exports, or folders of samples paired by name; NAME=FOLDER to name one",
            metavar="A B",
        ),
    ],
    output: Annotated[Path, typer.Option(help="the study's folder, which is not there yet")],
    prompts: Annotated[
        Path | None, typer.Option(help="text file with one prompt per line: drawn by runs, shown with samples")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="preference, following, aesthetics, or your own as NAME='WORDS?'; may be given several times"
        ),
    ] = None,
    ties: Annotated[bool, typer.Option("--ties/--no-ties", help="whether people may see no difference")] = True,
    judgements: Annotated[int, typer.Option(min=1, max=10_000, help="answers wanted of each pair")] = 3,
    per_rater: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="pairs that one person judges at most")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            help="degraded (a spoilt copy must lose), repeat (a pair again, sides swapped) or none (default: degraded)"
        ),
    ] = None,
    check_every: Annotated[int, typer.Option(min=2, max=1000, help="one check among so many pairs")] = 10,
    check_passed: Annotated[
        float,
        typer.Option(min=0, max=1, callback=finite, help="people count who pass at least this part of their checks"),
    ] = 0.75,
    count: Annotated[int | None, typer.Option(min=1, max=1000, help="runs: samples per prompt")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="runs: sampler steps (default: the recipe's)")
    ] = None,
    size: Annotated[str | None, typer.Option(help="runs: HEIGHTxWIDTH in pixels")] = None,
    length: Annotated[
        float | None,
        typer.Option(min=0, max=100_000, callback=finite, help="runs: frames of a clip, or seconds of sound"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="of the noise, the same for all systems")] = 0,
    cluster: OfCluster = None,
    debug: Debug = False,
) -> None:
    """Make a study of two systems or more. Runs draw with the same prompts and seeds; for other settings give folders of `nexus sample`."""

    def action() -> None:
        from nexus_scale.config.recipe import prompts_of
        from nexus_scale.study.new import Wanted, new_study, systems_of

        checks = check or ["degraded"]
        if (
            set(checks) - {"degraded", "repeat", "none"}
            or ("none" in checks and len(checks) > 1)
            or len(set(checks)) < len(checks)
        ):
            raise UserError(f"--check {' '.join(checks)}: expected degraded, repeat, both, or none alone")
        made = new_study(
            systems_of(systems, place_of), output,
            Wanted(
                prompts=prompts_of(prompts) if prompts else (), questions=question or (), ties=ties, judgements=judgements,
                per_rater=per_rater, checks=() if checks == ["none"] else checks, every=check_every, passed=check_passed, seed=seed,
                hardware=hardware_named(cluster),
                wishes={"per_prompt": count, "steps": steps, "size": size, "length": length},
            ),
        )  # fmt: skip
        print(
            visible(
                f"study in {output}: {len(made.pairs)} pairs, {judgements} answers wanted of each; nexus study serve {output}"
            )
        )

    guarded(action, debug)


@study_app.command("serve")
def serve(
    study: Folder,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    name: Names = None,
    debug: Debug = False,
) -> None:
    """Show a study to people in their browsers, until Ctrl-C. Answers are kept at once; people go on where they stopped."""

    def action() -> None:
        from nexus_scale.study.answers import Answers
        from nexus_scale.study.folder import Study
        from nexus_scale.study.server import study_application
        from nexus_scale.web.access import access_to
        from nexus_scale.web.server import serve as served

        access = access_to(host, port, token_file, name or ())
        opened = Study(study)
        Answers(opened).close()  # what is wrong with them is said before anyone comes
        served(
            study_application(opened, access), access, lambda address: print(visible(f"study at {address}"), flush=True)
        )

    guarded(action, debug)


@study_app.command("report")
def report(study: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Score the systems by the answers so far: scores with intervals, agreement, who beats whom. Writes report.html and report.json."""

    def action() -> None:
        from nexus_scale.study.folder import Study
        from nexus_scale.study.report import text, write_report

        found = write_report(Study(study))
        print(json.dumps(found, indent=1) if as_json else visible(text(found)))

    guarded(action, debug)
