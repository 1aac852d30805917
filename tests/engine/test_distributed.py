"""The ranks of these tests themselves: forked quickly from a process without threads, and as good as started ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.two_processes import starting_ray


def as_they_come(rank: int, world_size: int) -> list[object]:
    threads = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    python = [name for name in threads if name.startswith(Path(sys.executable).name[:6])]
    has = [name in sys.modules for name in ("deepspeed", "torch._inductor.compile_fx", "tests.data.test_loader")]
    return [os.getpid(), len(python), has, os.environ["RANK"], os.environ.get("COLOUR")]


def test_ranks_have_imported_what_costs_time_and_have_an_environment_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLOUR", "blue")
    told = run_ranks(2, as_they_come)
    monkeypatch.delenv("COLOUR")
    told += run_ranks(2, as_they_come)
    assert len({pid for pid, *_ in told} | {os.getpid()}) == 5
    assert [rest[1:] for _, *rest in told] == [
        [[True, True, False], rank, colour] for colour in ("blue", None) for rank in "01"
    ]


def ends(rank: int, world_size: int, how: str) -> int:
    print(f"last words of {rank}", flush=True)
    if rank == 1 and how == "raises":
        raise ValueError("a bug of ours")
    if rank == 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


@pytest.mark.parametrize(("how", "words"), [("raises", "a bug of ours"), ("dies", r"-9\](.|\n)*last words of 1")])
def test_how_a_rank_ended_is_told(how: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_ranks(2, ends, how)


def test_who_starts_ray_is_read_from_the_text_as_from_the_marks(request: pytest.FixtureRequest) -> None:
    by_text, by_mark = set(), set()
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        test = (item.path, item.originalname)
        by_text |= {test} if item.originalname in starting_ray(item.path) else set()
        by_mark |= {test} if item.get_closest_marker("ray") else set()
    assert by_text == by_mark
    whole = [path for path in Path(__file__).parents[1].rglob("test_*.py") if starting_ray(path)]
    assert len(whole) >= 10, "nothing is found any more"
