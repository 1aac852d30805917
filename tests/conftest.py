"""What every test runs under: no network, no telemetry, one thread, and a reason where a test is skipped."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    if hasattr(
        config, "workerinput"
    ):  # in a worker of pytest-xdist: what starts Ray takes the longest, and begins first
        items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    if torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("device"):
                item.add_marker(pytest.mark.gpu)
        return
    reason = f"needs a CUDA device; torch {torch.__version__} sees none here"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    fuzz = sys.modules.get("tests.fuzz")
    for summary in fuzz.SUMMARIES if fuzz else ():
        terminalreporter.write_line(summary.line())


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe's three steps in this process, trained once for all tests that hold another training against it."""
    from tests.config.test_every_recipe import run_once

    @functools.cache
    def trained(name: str) -> Path:
        root = tmp_path_factory.mktemp("whole") / "run"
        run_once(name, root)
        return root

    return trained


# ------------------------------------------------------------------------------------------- pytest -n 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.two_processes import RayApart

    return RayApart(config, log)
