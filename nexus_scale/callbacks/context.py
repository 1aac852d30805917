"""Where the callbacks of a run leave their figures for the row of a step."""

from __future__ import annotations

from collections.abc import Mapping


def post(context: dict[str, float], step: int, figures: Mapping[str, float]) -> None:
    """Leaves `figures` for the row of `step`, whether the callback that writes it comes earlier or later in that step."""
    context.update(figures)
    context["step"] = step
