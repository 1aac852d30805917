"""What launch/train*.py share: the `nexus train` command with a recipe that need not be named."""

from __future__ import annotations

import sys

from nexus_scale.cli import app
from nexus_scale.terminal import keep_output_open


def launch(recipe: str | None) -> None:
    """Runs `nexus train` on the command line's arguments; without a recipe among them, on `recipe`."""
    keep_output_open()
    arguments = sys.argv[1:]
    named = [a for a in arguments if not a.startswith("-") and "=" not in a]
    if recipe is not None and not named:
        arguments = [recipe, *arguments]
    app(["train", *arguments], prog_name=sys.argv[0])
