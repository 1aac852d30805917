"""The `nexus` command; launch/*.py call the same functions.

Exit codes: 0 done; 2 a mistake in the command, a recipe or a cluster file; 3 data; 4 too few resources; 5 the run folder;
6 the disk; 1 anything else. A user's mistake is one message without a stack trace; `--debug` shows the trace.
"""

from __future__ import annotations

import sys
from typing import Any

from nexus_scale.cli import evaluation, pages, reports, runs, samples, study, training, tuning
from nexus_scale.cli.base import app, guarded, hardware_named, path_of, place_of
from nexus_scale.io.terminal import keep_output_open

_OWN_OPTIONS: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""Of commands whose options a job's own schema declares."""

# In the order of `nexus --help`.
app.command()(training.train)
app.command()(tuning.finetune)
app.command(**_OWN_OPTIONS)(training.plan)
app.add_typer(runs.runs_app, name="runs")
app.command()(samples.sample)
app.command()(samples.samplers)
app.command(**_OWN_OPTIONS)(samples.generate)
app.command()(samples.score)
app.command()(evaluation.evaluate)
app.command()(evaluation.compare)
app.command()(samples.scoreboard)
app.add_typer(study.study_app, name="study")
app.command()(reports.report)
app.command()(pages.board)
app.command()(samples.export)
app.command()(reports.doctor)
app.command()(training.certify)
app.command()(reports.bench)


def launch(recipe: str | None) -> None:
    """Runs `nexus train` with the command line's arguments, for launch/train*.py; `recipe` is the default."""
    keep_output_open()
    arguments = sys.argv[1:]
    named = [a for a in arguments if not a.startswith("-") and "=" not in a]
    if recipe is not None and not named:
        arguments = [recipe, *arguments]
    app(["train", *arguments], prog_name=sys.argv[0])


def main() -> None:
    keep_output_open()
    app()


__all__ = ["app", "guarded", "hardware_named", "launch", "main", "path_of", "place_of"]
