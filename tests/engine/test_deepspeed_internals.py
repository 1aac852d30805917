"""Every private name of DeepSpeed that the engine uses does what it is used for: an upgrade that moves one fails here, by name."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nexus_scale.engine import deepspeed_internals as internals
from tests.distributed import run_ranks
from tests.engine_networks import build

MOST = 2
"""Private names; twenty-six once. Before one more is added: is there no public way?"""


def _no_compiler_is_asked(rank: int) -> bool:
    import deepspeed.ops

    build("deepspeed", 2)
    asked: list[str] = []

    class Watched(dict[str, bool]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    deepspeed.ops.__compatible_ops__ = Watched(deepspeed.ops.__compatible_ops__)
    build_op: Any = import_module("deepspeed.comm.torch").build_shm_op  # `deepspeed.comm.torch` is torch
    return build_op() is None and asked == ["deepspeed_shm_comm"]


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.arange(5.0), requires_grad=False)


def _a_slice_that_has_moved_is_what_deepspeed_gathers(rank: int) -> bool:
    engine: Any = build("deepspeed", 2)
    library = engine._library
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with library.zero.Init(config_dict_or_path=config):
        parameter = _Flat().flat
    elsewhere = torch.full((8,), -1.0)
    internals.move_slice(parameter, elsewhere[2:5])  # three values of one rank, two and padding of the other
    moved = elsewhere[2:5].tolist()[: 3 - rank] == [[0.0, 1.0, 2.0], [3.0, 4.0]][rank]
    elsewhere[2:5].add_(10.0)
    with library.zero.GatheredParameters([parameter]):
        gathered = parameter.tolist() == [10.0, 11.0, 12.0, 13.0, 14.0]
    with library.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.zero_()
    return (
        moved
        and gathered
        and elsewhere[:2].tolist() == [-1.0, -1.0]
        and float(elsewhere[2 : 5 - rank].abs().sum()) == 0
    )


EXERCISES: dict[str, Callable[[int], bool]] = {
    "__compatible_ops__": _no_compiler_is_asked,
    "ds_tensor": _a_slice_that_has_moved_is_what_deepspeed_gathers,
}


def exercise(rank: int, world_size: int, name: str) -> str:
    try:
        return "" if EXERCISES[name](rank) else "it has another meaning"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def exercise_all(rank: int, world_size: int) -> dict[str, str]:
    return {name: exercise(rank, world_size, name) for name in EXERCISES}


@pytest.fixture(scope="module")
def exercised() -> list[dict[str, str]]:
    return run_ranks(2, exercise_all)


@pytest.mark.parametrize("name", internals.NAMES)
def test_it_does_what_it_is_used_for(name: str, exercised: list[dict[str, str]]) -> None:
    assert [found[name] for found in exercised] == ["", ""], (
        f"deepspeed {version('deepspeed')}: {name}: {internals.NAMES[name]}"
    )


def test_there_are_no_more_of_them() -> None:
    assert set(internals.NAMES) == set(EXERCISES)
    assert len(internals.NAMES) <= MOST


def test_the_pin_is_exact() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert [line for line in project["dependencies"] if line.startswith("deepspeed")] == [
        f"deepspeed=={internals.PINNED}"
    ]
    assert version("deepspeed") == internals.PINNED


MOVED: list[tuple[str, Callable[[], object]]] = [
    ("__compatible_ops__", lambda: internals.forbid_compilers(SimpleNamespace(__getattr__=lambda name: None))),
    ("ds_tensor", lambda: internals.move_slice(torch.zeros(3), torch.zeros(3))),
]


@pytest.mark.parametrize(("name", "use"), MOVED, ids=lambda value: value if isinstance(value, str) else "")
def test_one_that_is_gone_is_named_with_its_reason_and_the_version_to_install(
    name: str, use: Callable[[], object]
) -> None:
    with pytest.raises(
        internals.MovedName, match=rf"'{name}'.*nexus-scale needs it: .*Install deepspeed=={internals.PINNED}"
    ):
        use()
