"""Comparisons with other implementations, side by side in one run."""

from __future__ import annotations

import importlib
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.registry import nearest

BENCHMARKS = ("step", "model", "loader", "start", "recovery")


def measure(name: str, rounds: int | None = None) -> dict[str, Any]:
    """Runs a benchmark: one object with `ratio`, ours over the peer's, and each peer's figures by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench: no {name!r}; {nearest(name, list(BENCHMARKS))}")
    module = importlib.import_module(f"nexus_scale.bench.{name}")
    result: dict[str, Any] = module.run() if rounds is None else module.run(rounds=rounds)
    return result


def show(result: dict[str, Any], indent: str = "") -> str:
    """A result as indented lines, for reading."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", show(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return "\n".join(lines)
