"""What every test runs under: no network, no telemetry, one thread, and a reason where a test is skipped."""

from __future__ import annotations

import os

# Before torch, Ray or the Hub's client are imported, in this process and in those that tests start.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WDS_SECURE="1",
    RAY_USAGE_STATS_ENABLED="0",
)
for undoing in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION", "RAY_ADDRESS"):
    os.environ.pop(undoing, None)

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        _share_out(items)
    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA device; torch {torch.__version__} sees none here"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _share_out(items: list[pytest.Item]) -> None:
    """Among the workers of `pytest -n 2 --dist loadgroup`: all that starts Ray to one of them, the longest way and so the first; the
    others file by file, for the sake of their fixtures."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
