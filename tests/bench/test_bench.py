"""Benchmarks end to end, at a size that says nothing about speed."""

from __future__ import annotations

import pytest

from nexus_scale.bench import host
from nexus_scale.bench.checkpoint import TARGETS, run
from nexus_scale.contracts import SAFE_ENVIRONMENT


@pytest.mark.slow
def test_checkpoints_are_measured_beside_both_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment of `nexus`, where DeepSpeed's own converter could not read its own files."""
    for name, value in SAFE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    result = run(rounds=1, mebibytes=12)
    assert result["settings"]["bytes"] >= 12 * 2**20
    figures = [*result["ours"].values(), *result["bare"].values(), *result["peers"]["dcp_async_save"].values()]
    assert min(*figures, *result["peers"]["deepspeed"].values(), *(result[name] for name in TARGETS)) > 0


def test_host_time_is_measured_of_sides_that_learn_alike() -> None:
    """One rank and two, every engine and every peer: their losses after the same steps agree, so the same work was timed."""
    result = host.run(rounds=1, steps_per_round=1, size=host.Size(depth=1, width=16))
    assert set(result["two_ranks"]) > {"zero3_sharded", "zero3_as_chosen", "bare", "ddp", "fsdp2"}
    for ranks in ("one_rank", "two_ranks"):
        sides = result[ranks]
        assert min(side["cpu_ms"] for side in sides.values()) > 0
        expected = pytest.approx(sides["bare"]["loss"], rel=1e-4)
        assert {name: side["loss"] for name, side in sides.items()} == dict.fromkeys(sides, expected)
    assert result["ratio"] == result["ratios"]["zero3_over_local"]
