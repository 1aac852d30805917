"""Flat tensors: every parameter lies in one once, a block is one message, and its memory is there only while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.config.schema import AdamW
from nexus_scale.contracts import Network
from nexus_scale.engine import EngineSettings, NetSpec, build_engine, distributed
from nexus_scale.engine.flat import ALIGN, Flat, grouped, lay_out, runs_of
from tests.distributed import run_ranks
from tests.engine_networks import OddNetwork


class Tied(Network):
    """Three blocks, of which two share a matrix, and a table that is used twice outside of them."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(4, width), nn.ModuleList(), nn.Linear(width, 4)
        for _ in range(3):
            self.layers.append(nn.Sequential(nn.Linear(width, width), nn.Tanh()))
        self.layers[2][0].weight = self.layers[0][0].weight
        for layer in self.layers:
            layer[0].bias.nexus_decay = False

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def laid_out(network: Network, world_size: int, least: int = 0) -> list[Flat]:
    groups = grouped(network.blocks(), least)
    return lay_out(network, groups, world_size, lambda p: getattr(p, "nexus_decay", True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("make", [Tied, OddNetwork])
def test_ranks_hold_every_value_of_every_parameter_once(make: Any, world_size: int) -> None:
    network = make()
    layout = laid_out(network, world_size)
    assert sorted(s.name for flat in layout for s in flat.segments) == sorted(n for n, _ in network.named_parameters())
    assert all(segment.offset % ALIGN == 0 for flat in layout for segment in flat.segments)
    seen = {name: torch.zeros(parameter.numel(), dtype=torch.int32) for name, parameter in network.named_parameters()}
    total = sum(flat.chunk for flat in layout)
    for rank in range(world_size):
        used = torch.zeros(total, dtype=torch.int32)
        tags = torch.full((total,), -1)
        for run, tag in runs_of(layout, rank):
            tags[run] = int(tag)
        assert (tags >= 0).all(), "runs leave nothing out"
        for flat in layout:
            for segment, start, where in flat.held_by(rank):
                seen[segment.name][start : start + where.stop - where.start] += 1
                used[where] += 1
                assert (tags[where] == int(segment.tag)).all()
        assert int(used.max()) <= 1, "two parameters never lie in one place"
        assert {tag for _, tag in runs_of(layout, rank)} == {tag for _, tag in runs_of(layout, 0)}
    assert all((count == 1).all() for count in seen.values())


def test_small_blocks_lie_together_in_their_order() -> None:
    layout = laid_out(Tied(), 2, least=430)  # of 420 parameters each
    assert [{segment.name[:8] for segment in flat.segments} for flat in layout[1:]] == [
        {"layers.0", "layers.1"},
        {"layers.2"},
    ]
    assert len(laid_out(Tied(), 2, least=10**6)) == 2


def test_what_blocks_share_lies_outside_of_them() -> None:
    outside, *blocks = laid_out(Tied(), 2)
    assert [segment.name for segment in outside.segments] == [
        "first.weight", "first.bias", "layers.0.0.weight", "last.weight", "last.bias",
    ]  # fmt: skip
    assert [[segment.name for segment in flat.segments] for flat in blocks] == [
        ["layers.0.0.bias"], ["layers.1.0.weight", "layers.1.0.bias"], ["layers.2.0.bias"],
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ on two ranks

SHARDED = {"whole_numel": 0, "message_numel": 0}
WAYS: dict[str, dict[str, Any]] = {
    "stays": SHARDED,
    "goes": {**SHARDED, "resident_numel": 0},
    "recomputed": {**SHARDED, "resident_numel": 0, "activation_checkpointing": True},
    "together": {"whole_numel": 0, "resident_numel": 0, "message_numel": 430},
    "whole": {},
}


def held(network: nn.Module) -> list[int]:
    """Bytes behind the parameters of each block, and of the layers outside."""
    return [
        sum({s._cdata: s.nbytes() for s in (p.untyped_storage() for p in part.parameters())}.values())
        for part in (network.layers[0][0].bias, network.layers[1], network.layers[2][0].bias, network.first)
        for part in ([part] if isinstance(part, nn.Module) else [nn.ParameterList([part])])
    ]


def counted(way: str) -> dict[str, Any]:
    """Messages of each part of a step, memory after it, and the gradient norm."""
    spec = NetSpec(Tied, AdamW(lr=1e-2, weight_decay=0.1))
    engine: Any = build_engine({"model": spec}, {}, EngineSettings(engine="deepspeed", micro_batch=2, **WAYS[way]))
    network = engine.modules["model"]
    found: dict[str, Any] = {"born": held(network)}
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(engine.rank))
    norms = []
    for step in range(3):
        begun = distributed.begun_collectives()
        with engine.training("model"):
            loss = engine.nets["model"](x).square().mean()
            found["forward"], found["after_forward"] = distributed.begun_collectives() - begun, held(network)
            begun = distributed.begun_collectives()
            engine.backward("model", loss, last=True)
            found["backward"], found["after_backward"] = distributed.begun_collectives() - begun, held(network)
            begun = distributed.begun_collectives()
            norms.append(float(engine.step("model", step)["grad_norm"]))
            found["step"] = distributed.begun_collectives() - begun
    with engine.weights("model"):
        engine.nets["model"](x)
    return {**found, "after_drawing": held(network), "norms": norms}


@dataclass
class Hidden:
    """An output into which torch does not look for tensors."""

    value: Tensor


class Awkward(Network):
    """Blocks that change their input in place and share a buffer, and an output that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.ones(8)
        self.first, self.head, self.layers = nn.Linear(4, 8), nn.Linear(8, 4), nn.ModuleList()
        for _ in range(3):
            self.layers.append(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
            self.layers[-1].register_buffer("table", table)

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Hidden:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) * layer.table
        return Hidden(self.head(x))


def awkward(**settings: Any) -> dict[str, Any]:
    """Gradient norms of two steps; how many buffers there are, and bytes behind parameters after a backward."""
    spec = NetSpec(Awkward, AdamW(lr=1e-2))
    engine: Any = build_engine({"model": spec}, {}, EngineSettings(engine="deepspeed", micro_batch=2, **settings))
    network, x = engine.modules["model"], torch.randn(2, 4, generator=torch.Generator().manual_seed(engine.rank))
    norms, left = [], 0
    for step in range(2):
        with engine.training("model"):
            engine.backward("model", engine.nets["model"](x).value.square().mean(), last=True)
            left = sum(parameter.untyped_storage().nbytes() for parameter in network.parameters())
            norms.append(float(engine.step("model", step)["grad_norm"]))
    return {"norms": norms, "buffers": len({id(layer.table) for layer in network.layers}), "left": left}


def flat_worker(rank: int, world_size: int) -> dict[str, Any]:
    awkwardly = {
        "whole": awkward(),
        "sharded": awkward(whole_numel=0, resident_numel=0, message_numel=0, partition_at_birth=1),
    }
    return {**{way: counted(way) for way in WAYS}, "awkward": awkwardly}


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    both = run_ranks(2, flat_worker)
    assert both[0] == both[1]
    return dict(both[0])


def test_a_block_is_one_message_forward_and_one_backward(counts: dict[str, Any]) -> None:
    messages = {way: [counts[way][part] for part in ("forward", "backward", "step")] for way in WAYS}
    assert messages == {
        "stays": [4, 4, 1],  # three blocks and what is outside: gathered, then reduced; then the norm
        "goes": [4, 4 + 2, 1],  # all blocks but the last are gathered again
        "recomputed": [4, 4 + 2, 1],
        "together": [3, 3 + 1, 1],  # two blocks share a message
        "whole": [0, 1, 1 + 1],  # one flat tensor, gathered after the step
    }


def test_memory_is_there_only_while_a_block_computes(counts: dict[str, Any]) -> None:
    for way in ("stays", "goes", "recomputed", "together"):
        assert counts[way]["born"] == counts[way]["after_backward"] == counts[way]["after_drawing"] == [0, 0, 0, 0]
    assert all(counts["stays"]["after_forward"])
    first, second, last, outside = counts["goes"]["after_forward"]
    assert first == second == 0 and last and outside
    assert all(counts["whole"]["after_backward"])


def test_all_ways_compute_the_same(counts: dict[str, Any]) -> None:
    for way in WAYS:
        assert counts[way]["norms"] == pytest.approx(counts["whole"]["norms"], rel=1e-6)


def test_blocks_may_write_into_their_input_and_networks_may_share_buffers_and_return_any_class(
    counts: dict[str, Any],
) -> None:
    whole, sharded = counts["awkward"]["whole"], counts["awkward"]["sharded"]
    assert sharded["norms"] == pytest.approx(whole["norms"], rel=1e-6)
    assert whole["buffers"] == sharded["buffers"] == 1
    assert sharded["left"] == 0
