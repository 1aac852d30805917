"""Benchmarks end to end, at a size that says nothing about speed."""

from __future__ import annotations

import pytest

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
