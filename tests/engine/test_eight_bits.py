"""A frozen base in 8 bits: half the memory of bf16, what it computes and what an adapter over it learns up to rounding, and refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.schema import AdamW
from nexus_scale.contracts import Engine, UserError
from nexus_scale.engine import EngineSettings, NetSpec, build_engine, eight_bits
from nexus_scale.models.adapters.lora import Lora
from nexus_scale.planner.memory import memory_per_rank
from tests.engine.test_adapters import batch, given, live_bytes, wide


def made(bits: int | None, precision: str = "float32", **settings: Any) -> Engine:
    engine = build_engine(
        {
            "base": NetSpec(wide, frozen=True, bits=bits),
            "model": NetSpec(lambda: Lora(base=wide, rank=4, **settings), AdamW(lr=1e-2), adapts="base"),
        },
        {},
        EngineSettings(engine="local", steps=4, precision=precision, activation_checkpointing=True),  # type: ignore[arg-type]
    )
    engine.fill("base", lambda name, start, stop: given(name, 0, 1 << 14).repeat(-(-stop // (1 << 14)))[start:stop] / 4)
    return engine


def trained(engine: Engine) -> tuple[Tensor, list[float]]:
    """The first answer, and the losses of four steps towards its opposite."""
    x, t, cond = batch(0)
    losses = []
    with torch.no_grad():
        first = engine.nets["base"](x, t, cond)
    for step in range(4):
        with engine.training("model"):
            loss = (engine.nets["model"](x, t, cond) + first).square().mean()
            engine.backward("model", loss, last=True)
        engine.step("model", step)
        losses.append(float(loss.detach()))
    return first, losses


@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
def test_a_base_in_eight_bits_computes_and_is_learnt_on_as_a_whole_one(decomposed: bool) -> None:
    pytest.importorskip("torchao")
    (whole, losses), (eight, there) = (trained(made(bits, decomposed=decomposed)) for bits in (None, 8))
    assert 1e-5 < float((whole - eight).norm() / whole.norm()) < 0.03
    assert there[-1] < 0.9 * there[0]
    for one, other in zip(losses, there, strict=True):
        assert other == pytest.approx(one, rel=0.05)


def test_a_rank_holds_what_the_planner_counts() -> None:
    pytest.importorskip("torchao")
    before = live_bytes()
    engine = made(8, "bf16")
    held = live_bytes() - before
    count, own = (sum(p.numel() for p in engine.modules[name].parameters()) for name in ("base", "model"))  # type: ignore[attr-defined]
    small = sum(layer.weight.numel() for layer in eight_bits.layers_of(wide()).values())
    assert small > 0.9 * count
    parts = memory_per_rank(
        own, world_size=1, zero_stage=0, frozen_parameters=count, eight_bits=small, gradient_bytes=0.0
    )
    assert parts["frozen"] == pytest.approx(small + 2 * (count - small))
    assert held <= 1.1 * sum(parts.values()) < 0.75 * 2 * count


def test_where_it_cannot_be_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"networks\.base\.bits: 8 on 2 ranks, over which ZeRO-3 shards weights"):
        eight_bits.check({"other": None, "base": 8}, 2, sharding=True)
    eight_bits.check({"base": None}, 2, sharding=True)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        UserError, match=r"needs torchao, which is not installed; pip install 'nexus-scale\[eight-bits\]'"
    ):
        eight_bits.check({"base": 8}, 1, sharding=True)
