"""The harness of the fuzz tests finds what it is there to find, and nothing else."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests import fuzz


def numbered(rng: random.Random, folder: Path) -> list[str]:
    (folder / "input.txt").write_text(f"number {rng.random()}")
    return [folder.name]


def act(seed: str) -> int:
    """Each number goes wrong in a way of its own, those from 7 on not at all."""
    match int(seed):
        case 0:
            raise RuntimeError("a mistake of the program's")
        case 1:
            return 1
        case 2:
            while True:
                pass
        case 3:
            time.sleep(60)
        case 4:
            return len(bytearray(8 << 30))
        case 5:
            os.abort()
        case 6:
            print("x" * (2 << 20))
    return 3


def test_the_fuzz_harness_names_each_way_to_go_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BORDERS", {"recipe": 9})
    monkeypatch.setattr(fuzz, "WALL_S", 2.0)
    monkeypatch.delenv("NEXUS_FUZZ", raising=False)
    monkeypatch.setattr(fuzz, "SUMMARIES", [])
    with pytest.raises(AssertionError) as caught:
        fuzz.fuzz("recipe", numbered, tmp_path / "all", act=act)
    words = str(caught.value)
    assert words.startswith("7 of 9 cases of recipe went wrong"), words
    for expected in (
        "SEED=0: a traceback",
        "SEED=1: exit code 1",
        "SEED=2: no end within",
        "SEED=3: no end within",
        "SEED=4: a trace",
    ):
        assert expected in words, words
    assert "input.txt: number 0." in words  # the input, to be read where it happened
    assert (tmp_path / "all" / "0" / "input.txt").exists() and not (tmp_path / "all" / "7").exists()
    [summary] = fuzz.SUMMARIES
    assert (summary.cases, summary.tracebacks, summary.hangs, summary.other) == (9, 2, 2, 3), summary

    monkeypatch.setenv("NEXUS_FUZZ_SEED", "8")
    fuzz.fuzz("recipe", numbered, tmp_path / "one", act=act)
    assert (
        fuzz.SUMMARIES[-1]
        .line()
        .startswith("fuzz, recipe: 1 cases, 0 tracebacks, 0 hangs, 0 other failures, 0 done and 1 refused, ")
    )


def test_fuzz_cases_are_shared_among_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_FUZZ", "20000")
    assert abs(sum(map(fuzz.cases, fuzz.BORDERS)) - 20_000) < len(fuzz.BORDERS)
    assert min(map(fuzz.cases, fuzz.BORDERS)) > 500


def test_a_fuzzed_command_gives_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    assert fuzz.nexus("--help") == 0
    assert fuzz.nexus("brew") == 2
    assert sys.argv is before
