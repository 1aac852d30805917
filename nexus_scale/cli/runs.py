"""`nexus runs`: list them; follow, stop or delete one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_scale.cli.base import (
    Debug,
    Json,
    finite,
    guarded,
)
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import has_reader, visible

runs_app = typer.Typer(help="List runs; follow, stop or delete one.", invoke_without_command=True)

Root = Annotated[Path | None, typer.Option(help="folder of the runs (default: NEXUS_RUNS_ROOT or ./runs)")]
Name = Annotated[str, typer.Argument(help="name of a run")]


@runs_app.callback()
def runs(context: typer.Context, root: Root = None, as_json: Json = False, debug: Debug = False) -> None:
    """List runs; follow, stop or delete one."""
    if context.invoked_subcommand is None:
        list_runs(root, as_json, debug)


@runs_app.command("list")
def list_runs(root: Root = None, as_json: Json = False, debug: Debug = False) -> None:
    """List all runs with their state, step, last loss and last incident."""

    def action() -> None:
        from nexus_scale.run.runs import runs_below

        found = runs_below(root_of(root))
        if as_json:
            print(json.dumps([vars(summary) for summary in found], indent=1))
        elif not found:
            print(f"no runs in {visible(str(root_of(root)))}")
        else:
            _print_runs(found)

    guarded(action, debug)


@runs_app.command("follow")
def follow_run(
    name: Name,
    root: Root = None,
    lines: Annotated[int, typer.Option(min=0, max=10**9, help="earlier lines to print first")] = 20,
    debug: Debug = False,
) -> None:
    """Follow a run's log and incidents until it ends."""

    def action() -> None:
        from nexus_scale.run.runs import follow, summary_of

        run = _run(name, root)
        for line in follow(run, lines=lines):
            print(visible(line), flush=True)
            if not has_reader():
                return
        summary = summary_of(run)
        print(visible(f"{summary.name}: {summary.state} after step {summary.step} of {summary.steps}"), file=sys.stderr)

    guarded(action, debug)


@runs_app.command("stop")
def stop_run(
    name: Name,
    root: Root = None,
    deadline: Annotated[
        float, typer.Option(min=0, max=30 * 86400, callback=finite, help="seconds to wait for the run to stop")
    ] = 300.0,
    debug: Debug = False,
) -> None:
    """Ask a run to save and stop, and wait until it has."""

    def action() -> None:
        from nexus_scale.run.runs import stop

        summary = stop(_run(name, root), deadline_s=deadline)
        print(visible(f"{summary.name}: {summary.state} after step {summary.step} of {summary.steps}"))
        if summary.state != "done":
            print(visible(f"resume it with: nexus train {summary.path}"))

    guarded(action, debug)


@runs_app.command("delete")
def delete_run(
    name: Name,
    root: Root = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete without asking")] = False,
    debug: Debug = False,
) -> None:
    """Delete a run's folder with all its checkpoints, after asking for confirmation."""

    def action() -> None:
        from nexus_scale.run.runs import deletable, delete, summary_of_damaged

        where = root_of(root)
        path = Path(name) if Path(name).is_absolute() else where / name
        summary = summary_of_damaged(deletable(path, where))
        shown = visible(str(path), keep="")
        question = f"delete {shown} ({summary.state}, step {summary.step} of {summary.steps}) with all its checkpoints?"
        try:
            agreed = yes or typer.confirm(question)
        except typer.Abort:
            raise UserError(
                "nothing was deleted because the question was not answered; use --yes to delete without asking"
            ) from None
        if not agreed:
            print("nothing deleted")
            return
        delete(path, where)
        print(f"deleted {shown}")

    guarded(action, debug)


def root_of(given: Path | None) -> Path:
    """The folder of the runs: the one given, or the default."""
    from nexus_scale.config.recipe import Cluster
    from nexus_scale.orchestration.cluster import roots

    return given.resolve() if given is not None else roots(Cluster())[1]


def _run(name: str, root: Path | None) -> Any:
    from nexus_scale.run.files import open_run
    from nexus_scale.run.runs import resolve_run

    return open_run(resolve_run(name, root_of(root)))[0]


def _print_runs(found: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "loss", "seen", "last incident"):
        table.add_column(title, justify="right" if title in ("step", "loss", "seen") else "left")
    for run in found:
        state = run.state if run.doing is None else f"{run.state}: {run.doing}"
        incident = f"{run.incident['kind']}: {run.incident['message']}" if run.incident else ""
        table.add_row(
            escape(visible(run.name, keep="")), escape(visible(state, keep="")), f"{run.step}/{run.steps}",
            "" if run.loss is None else f"{run.loss:.4f}", "" if run.age_s is None else f"{_span(run.age_s)} ago",
            escape(visible(incident, keep="")),
        )  # fmt: skip
    Console().print(table)


def _span(seconds: float) -> str:
    for size, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {letter}"
    return f"{seconds:.0f} s"
