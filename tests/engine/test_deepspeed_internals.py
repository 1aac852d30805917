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

from nexus_scale.config.schema import AdamW
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine import deepspeed_internals as internals
from tests.distributed import run_ranks
from tests.engine_networks import OddNetwork, batch, build, train

MOST = 9
"""Private names; twenty-six once. Before one more is added: is there no public way?"""


def _network(**settings: Any) -> Any:
    """What DeepSpeed has of a network on two ranks."""
    engine: Any = build("deepspeed", 2, **settings)
    return engine, engine._zero["model"]


def _no_compiler_is_asked(rank: int) -> bool:
    import deepspeed.ops

    _network()
    asked: list[str] = []

    class Watched(dict[str, bool]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    deepspeed.ops.__compatible_ops__ = Watched(deepspeed.ops.__compatible_ops__)
    build: Any = import_module("deepspeed.comm.torch").build_shm_op  # `deepspeed.comm.torch` is torch
    return build() is None and asked == ["deepspeed_shm_comm"]


def _slices_are_what_is_gathered(rank: int) -> bool:
    engine, zero = _network(persistence_threshold=0)
    weight = zero.module.a.weight  # 35 values: 18 of one rank, 17 and padding of the other
    held = internals.slice_of(weight)
    held.fill_(float(rank + 1))
    internals.release_gathered(zero.engine)
    with engine._library.zero.GatheredParameters([weight]):
        return len(held) == 18 and weight.flatten().tolist() == [1.0] * 18 + [2.0] * 17


def _a_whole_network_has_no_hooks(rank: int) -> bool:
    _, whole = _network()
    _, sharded = _network(persistence_threshold=0)
    hooked = [any(m._forward_pre_hooks for m in zero.module.children()) for zero in (whole, sharded)]
    return hooked == [False, True]


def _gathered_copies_are_released_or_stay(rank: int) -> bool:
    x, _ = batch(0)
    engine, zero = _network(persistence_threshold=8)  # biases and gains stay gathered, once DeepSpeed has seen a step
    train(engine, 0, 2)
    with engine.weights("model"):
        before = engine.nets["model"](x)
        internals.slice_of(zero.module.b.bias).add_(1.0)
        stale = engine.nets["model"](x)
        internals.release_gathered(zero.engine)
        fresh = engine.nets["model"](x)
    whole, kept = _network()
    train(whole, 0, 1)
    there = all(parameter.numel() == kept.shapes[name].numel() for name, parameter in kept.module.named_parameters())
    return torch.equal(before, stale) and not torch.equal(stale, fresh) and there


def _weights_are_there_in_every_backward(rank: int) -> bool:
    x, _ = batch(0)
    engine, _ = _network(persistence_threshold=0)
    alone: Any = build("replicated", 2)
    found = []
    for one in (engine, alone):
        given = x.clone().requires_grad_()
        y = one.nets["model"](given)
        found.append([torch.autograd.grad(y[:, i].sum(), given, retain_graph=True)[0] for i in range(3)])
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def _masters_are_the_parameters_of_the_optimizer(rank: int) -> bool:
    _, zero = _network()
    outside = [list(group["params"]) for group in zero.optimizer.param_groups]
    with internals.with_masters(zero.engine, zero.optimizer) as optimizer:
        within = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    after = [group["params"] for group in zero.optimizer.param_groups]
    learning = [p for p in zero.module.parameters() if p.requires_grad]
    return (
        sum(p.numel() for p in within) == sum(internals.slice_of(p).numel() for p in learning)
        and set(zero.optimizer.state) == set(within)
        and outside == after == [[] for _ in after]
    )


def _gradients_are_forgotten(rank: int) -> bool:
    from deepspeed.utils import safe_get_local_grad

    engine, zero = _network()
    x, y = batch(0)
    with engine.training("model"):
        engine.backward("model", (engine.nets["model"](x) - y).square().mean(), last=True)
    weight = zero.module.a.weight
    there = float(safe_get_local_grad(weight).abs().sum())
    internals.forget_gradients(zero.engine)
    return there > 0 and float(safe_get_local_grad(weight).abs().sum()) == 0


def _pair(kind: str) -> Any:
    spec = AdamW(lr=1e-2)
    nets = {"a": NetSpec(OddNetwork, spec), "b": NetSpec(OddNetwork, spec)}
    return build_engine(nets, {}, EngineSettings(engine=kind, micro_batch=4, persistence_threshold=0, seed=3))  # type: ignore[arg-type]


def _norms_of_a_pair(engine: Any, backward: Callable[[Any], None]) -> list[float]:
    """Gradient norms of two networks that one loss teaches, each of which it calls twice."""
    x, y = (part.chunk(2)[engine.rank] for part in batch(0))
    with engine.training(("a", "b")):
        total = sum((engine.nets[name](given) - y).square().mean() for name in ("a", "b") for given in (x, 2 * x))
        backward(total)
        said = engine.step(("a", "b"), 0)
    return [said["grad_norm_a"], said["grad_norm_b"]]


def _one_loss_teaches_two_networks(rank: int) -> bool:
    found = [
        _norms_of_a_pair(engine, lambda loss, engine=engine: engine.backward(("a", "b"), loss, last=True))  # type: ignore[misc]
        for engine in (_pair("deepspeed"), _pair("replicated"))
    ]
    return found[0] == pytest.approx(found[1], rel=1e-5)


def _the_second_network_is_finished_once(rank: int) -> bool:
    engine = _pair("deepspeed")
    second, counted = engine._zero["b"].engine, []
    finish = second._backward_epilogue
    second._backward_epilogue = lambda: counted.append(finish())
    x, y = (part.chunk(2)[rank] for part in batch(0))
    with engine.training(("a", "b")):
        total = sum((engine.nets[name](x) - y).square().mean() for name in ("a", "b"))
        engine.backward(("a", "b"), total, last=True)
    return len(counted) == 1


def _without_it_the_second_network_has_no_gradients(rank: int) -> bool:
    engine = _pair("deepspeed")
    with pytest.raises(KeyError):
        _norms_of_a_pair(engine, lambda loss: engine._zero["a"].engine.backward(loss, scale_wrt_gas=False))
    return _one_loss_teaches_two_networks(rank)


EXERCISES: dict[str, Callable[[int], bool]] = {
    "__compatible_ops__": _no_compiler_is_asked,
    "ds_tensor": _slices_are_what_is_gathered,
    "parameter_offload": _a_whole_network_has_no_hooks,
    "_partition_all_parameters": _gathered_copies_are_released_or_stay,
    "applied_pre_backward_ref_cnt": _weights_are_there_in_every_backward,
    "_set_fp32_optimizer_param_groups": _masters_are_the_parameters_of_the_optimizer,
    "grad_partitions_flat_buffer": _gradients_are_forgotten,
    "_running_engine_backward": _the_second_network_is_finished_once,
    "_backward_epilogue": _without_it_the_second_network_has_no_gradients,
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


def bare(**attributes: Any) -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(**attributes))


class _Silent:
    _running_engine_backward = False

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None: ...


MOVED: list[tuple[str, Callable[[], object]]] = [
    ("__compatible_ops__", lambda: internals.forbid_compilers(SimpleNamespace(__getattr__=lambda name: None))),
    ("ds_tensor", lambda: internals.slice_of(torch.zeros(3))),
    ("parameter_offload", lambda: internals.stop_gathering(bare(_partition_all_parameters=None))),
    ("_partition_all_parameters", lambda: internals.stop_gathering(bare(parameter_offload=None))),
    ("_backward_epilogue", lambda: internals.backward([_Silent(), _Silent()], torch.zeros(1))),
    ("_running_engine_backward", lambda: internals.backward([bare(), bare()], torch.zeros(1))),
    ("_set_fp32_optimizer_param_groups", lambda: internals.with_masters(bare(), torch.optim.SGD(nn.Linear(1, 1).parameters())).__enter__()),
    ("grad_partitions_flat_buffer", lambda: internals.forget_gradients(bare())),
]  # fmt: skip


@pytest.mark.parametrize(("name", "use"), MOVED, ids=lambda value: value if isinstance(value, str) else "")
def test_one_that_is_gone_is_named_with_its_reason_and_the_version_to_install(
    name: str, use: Callable[[], object]
) -> None:
    with pytest.raises(
        internals.MovedName, match=rf"'{name}'.*nexus-scale needs it: .*Install deepspeed=={internals.PINNED}"
    ):
        use()
