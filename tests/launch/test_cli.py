"""The `nexus` command's own part: what it refuses, what it passes on, and its exit codes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nexus_scale.cli import app

TINY = ["train", "mmdit/tiny_openmoji", "--tiny", "cluster.workers=0", "callbacks.samples=null"]


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEXUS_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("NEXUS_DATA_ROOT", str(tmp_path / "data"))
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = handlers  # the command sets up its own


def nexus(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_every_command_shows_its_options() -> None:
    commands = (
        "train",
        "finetune",
        "sample",
        "samplers",
        "score",
        "report",
        "export",
        "doctor",
        "bench",
        "certify",
        "runs",
        "study",
        "board",
    )
    assert all(command in nexus("--help").output for command in commands)
    for command in commands:
        assert nexus(command, "--help").exit_code == 0, command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "2,many"], "expected numbers, like 2,1,4"),
        (["--workers", "3"], "does not divide"),
        (["--leave-out", "everything"], "masters, moments, ema, optimizer_steps, buffers, objective, draws"),
        (["--steps", "3"], "--steps 3"),
        (["callbacks.metrics.wandb.api_key=7f3a"], "api_key"),
    ],
)
def test_certify_refuses_before_anything_starts(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = nexus("certify", "mmdit/tiny_openmoji", "--tiny", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_goes_on_with_a_changed_key_where_it_is_named(tmp_path: Path) -> None:
    assert nexus(*TINY, "steps=2").exit_code == 0
    refused = nexus(*TINY, "steps=3", "optimizer.lr=0.5")
    assert refused.exit_code == 5 and "optimizer.lr: 0.002 -> 0.5" in refused.stderr
    assert nexus(*TINY, "steps=3", "optimizer.lr=0.5", "--allow-change", "seed").exit_code == 5
    changed = nexus(*TINY, "steps=3", "optimizer.lr=0.5", "--allow-change", "seed", "--allow-change", "optimizer.lr")
    assert changed.exit_code == 0, changed.stderr
    (run,) = json.loads(nexus("runs", "--json").stdout)
    assert (run["name"], run["state"], run["step"]) == ("mmdit_tiny_openmoji_tiny", "done", 3)
    (note,) = (tmp_path / "runs" / run["name"] / "changes.jsonl").read_text().splitlines()
    assert json.loads(note)["changed"] == ["optimizer.lr: 0.002 -> 0.5"]


def test_a_change_of_a_run_that_is_not_there_makes_none(tmp_path: Path) -> None:
    assert nexus(*TINY, "--allow-change", "seed").exit_code == 5
    assert not (tmp_path / "runs").exists()


def test_the_doctor_looks_at_the_users_environment_and_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDS_SECURE", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    told = nexus("doctor", "--json")
    found = {finding["what"]: finding for finding in json.loads(told.stdout)}
    assert found["WDS_SECURE"]["level"] == "note", "the command makes its own process safe; that says nothing of others"
    assert found["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]["level"] == "error" and told.exit_code == 1
    places = [finding["detail"] for finding in json.loads(told.stdout) if finding["what"] == "disk"]
    assert len(places) == 2 and all(str(tmp_path) in place for place in places)
