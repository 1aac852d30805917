"""Comparisons with other implementations, side by side in one run."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from typing import Any

from nexus_scale.config.kinds import shown
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.io.ticker import still

log = logging.getLogger(__name__)

BENCHMARKS = ("step", "model", "loader", "start", "recovery", "storm", "checkpoint", "generate", "host", "gpu")

PEERS = {"step": "accelerate", "model": "diffusers", "loader": "webdataset"}
"""The package that a benchmark compares with, where not every installation has it."""


def measure(name: str, **options: Any) -> dict[str, Any]:
    """The result of a benchmark: `ratio`, ours over the peer's, and each peer's figures by name.

    Args:
        options: `rounds`, `minutes`, `compiled`, `tiny` or `output`, where the benchmark has them; None takes its default.
    Raises:
        UserError: an unknown benchmark or option, or the peer is not installed.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench: unknown benchmark {shown(name)}; {nearest(name, list(BENCHMARKS))}")
    peer = PEERS.get(name)
    if peer is not None and importlib.util.find_spec(peer) is None:
        raise UserError(f"bench {name}: compares with {peer}, which is not installed; pip install 'nexus-scale[bench]'")
    module = importlib.import_module(f"nexus_scale.bench.{name}")
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(set(given) - set(inspect.signature(module.run).parameters)):
        raise UserError(f"bench {name}: has no option --{unknown[0]}")
    with still(f"bench {name}", log.info):
        result: dict[str, Any] = module.run(**given)
    return result


def show(result: dict[str, Any], indent: str = "") -> str:
    """A result as indented text. Of `rows`, which --json and the benchmark's own file have whole, it says how many there are."""
    lines = []
    for key, value in result.items():
        if key == "rows":
            lines.append(f"{indent}rows: {len(value)}, whole with --json")
        elif isinstance(value, dict):
            lines += [f"{indent}{key}:", show(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return "\n".join(lines)
