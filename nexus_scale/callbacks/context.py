"""The figures that the callbacks of a run contribute to the row of a step."""

from __future__ import annotations

from collections.abc import Mapping


def post(context: dict[str, float], step: int, figures: Mapping[str, float]) -> None:
    """Adds `figures` to the row of `step`, whether its writer comes before or after this callback."""
    context.update(figures)
    context["step"] = step
