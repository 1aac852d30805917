"""Frozen networks: sharded where they are large, in no checkpoint, and gradients flow through them and not into them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import Engine, Network, UserError
from nexus_scale.engine import EngineSettings, NetSpec, build_engine, local
from nexus_scale.engine.checkpoint import newest
from nexus_scale.engine.networks import build_network
from tests.distributed import run_ranks
from tests.engine_networks import GLOBAL_BATCH, OddBlock, batch, copies, differences, differing, load, save

STEPS, HALF = 6, 3


class Teacher(Network):
    """7,430 values, a buffer, and a dropout that must not drop."""

    def __init__(self, width: int = 80):
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, width)
        self.block, self.c = OddBlock(), nn.Linear(width, 7)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.zeros(7))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, y: Tensor) -> Tensor:
        return self.block(self.c(torch.tanh(self.b(self.dropout(torch.tanh(self.a(y))))))) + self.shift

    def halved(self, y: Tensor) -> Tensor:
        return self(y) / 2


class Student(Network):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    def init_weights(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def given(name: str, start: int, stop: int) -> Tensor:
    """The teacher's weights as they come from elsewhere."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return (torch.randn(81 * 81, generator=generator) * 0.3)[start:stop]


ALL = tuple(dict(Teacher().named_parameters()))


def made(kind: str, world_size: int, width: int = 80, all_given: Collection[str] = ALL, **settings: Any) -> Engine:
    values = {"steps": STEPS, "seed": 3, "micro_batch": GLOBAL_BATCH // world_size, **settings}
    optimizer = AdamW(lr=1e-2, betas=(0.9, 0.95), clip_grad_norm=1.0)
    engine = build_engine(
        {
            "model": NetSpec(Student, optimizer),
            "teacher": NetSpec(lambda: Teacher(width), frozen=True, given=lambda: all_given),
        },
        {"ema": Average(average_of="model", decay=0.9)},
        EngineSettings(engine=kind, **values),  # type: ignore[arg-type]
    )
    if width == 80:
        engine.fill("teacher", given)
    return engine


def train(engine: Engine, first: int, last: int, recomputed: bool = False) -> None:
    """The student's outputs are to look like the data to the teacher: its gradient comes through the teacher alone."""
    share = GLOBAL_BATCH // engine.world_size
    mine = slice(engine.rank * share, (engine.rank + 1) * share)
    for step in range(first, last):
        x, y = (part[mine] for part in batch(step))
        with engine.training("model"):
            made, seen = engine.nets["model"](x), engine.nets["teacher"](y)
            assert not seen.requires_grad
            loss = (engine.nets["teacher"](made) - seen).square().mean() + engine.nets["teacher"].halved(
                made
            ).square().mean()
            engine.backward("model", loss, last=True)
        engine.step("model", step)
        engine.update_averages(step)
        assert all(parameter.grad is None for parameter in engine.modules["teacher"].parameters())  # type: ignore[attr-defined]


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"whole_numel": 0},
    "sharded, released after forward": {"whole_numel": 0, "resident_numel": 0},
    "born sharded": {"whole_numel": 0, "partition_at_birth": 1},
    "in host memory": {"whole_numel": 0, "offload": "cpu"},
    "bf16": {"whole_numel": 0, "precision": "bf16"},
    "bf16, born sharded": {"whole_numel": 0, "precision": "bf16", "partition_at_birth": 1},
    "bf16, whole": {"precision": "bf16"},
}


def worker(rank: int, world_size: int, root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in WAYS.items():
        folder = Path(root) / name.replace(" ", "_").replace(",", "")
        engine = made("deepspeed", world_size, **settings)
        train(engine, 0, HALF)
        save(engine, folder, HALF)
        train(engine, HALF, STEPS)
        other = made("deepspeed", world_size, **{**settings, "seed": 99})
        load(other, folder)
        train(other, HALF, STEPS)
        teacher = dict(engine.parameters("teacher"))
        save(engine, folder, STEPS)
        kept = newest(folder)
        assert kept is not None
        found[name] = {
            "resumed": differing(copies(engine), copies(other)),
            "held": held_by(engine.modules["teacher"]),  # type: ignore[attr-defined]
            "same": all(
                torch.allclose(value.flatten(), given(key, 0, value.numel()), atol=4e-3 if "bf16" in name else 0.0)
                for key, value in teacher.items()
            ),
            "saved": sorted({key.partition("/")[0] for key in kept.names if "/" in key}),
        }
    nothing = {"model": NetSpec(Student, AdamW(lr=1e-2)), "twice": NetSpec(Twice, frozen=True)}
    engine = build_engine(nothing, {}, EngineSettings(engine="deepspeed", micro_batch=4, steps=1))
    assert engine.nets["twice"](torch.ones(2)).tolist() == [2.0, 2.0], "one without parameters"
    replicated = made("replicated", world_size)
    train(replicated, 0, STEPS)
    save(replicated, Path(root) / "replicated", STEPS)
    with pytest.raises(UserError, match=r"network 'teacher': .*networks\.teacher\.engine: replicated"):
        penalised(made("deepspeed", world_size, whole_numel=0))
    return found


@pytest.mark.parametrize("missing", [(), ("c.bias",)], ids=["all", "all but one"])
def test_what_is_given_gets_no_first_values_and_what_is_not_has_its_own(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_network("teacher", NetSpec(lambda: Teacher(81), frozen=True), seed=3)
    read = lambda name, start, stop: {name: given(name, start, stop) for name in ALL if name not in missing}[name]  # noqa: E731
    build_again = local.build_network
    built: list[str] = []
    monkeypatch.setattr(local, "build_network", lambda name, *rest: built.append(name) or build_again(name, *rest))
    for precision in ("float32", "bf16"):
        engine = made(
            "local", 1, 81, [name for name in ALL if name not in missing], partition_at_birth=1, precision=precision
        )
        assert engine.modules["teacher"].shift.tolist() == [0.0] * 7  # type: ignore[attr-defined]
        engine.fill("teacher", read)
        for name, value in engine.parameters("teacher"):
            expected = dict(first.named_parameters())[name] if name in missing else given(name, 0, value.numel())
            torch.testing.assert_close(value.flatten(), expected.flatten(), atol=4e-3, rtol=4e-3)
    assert built.count("teacher") == (2 if missing else 0)


def held_by(network: nn.Module) -> int:
    """Bytes of memory behind a network's parameters."""
    storages = {parameter.untyped_storage()._cdata: parameter.untyped_storage() for parameter in network.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def penalised(engine: Engine) -> None:
    x = batch(0)[1].requires_grad_()
    (gradient,) = torch.autograd.grad(engine.nets["teacher"](x).sum(), x, create_graph=True)
    gradient.square().sum().backward()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("frozen")
    torch.set_num_threads(1)
    for precision in ("float32", "bf16"):
        engine = made("local", 1, precision=precision)
        train(engine, 0, STEPS)
        save(engine, root / f"alone_{precision}", STEPS)
    return root, run_ranks(2, worker, str(root))


@pytest.mark.parametrize("way", [*WAYS, "replicated"])
def test_two_workers_learn_through_one_what_one_worker_learns(
    ranks: tuple[Path, list[dict[str, Any]]], way: str
) -> None:
    alone = newest(ranks[0] / f"alone_{'bf16' if 'bf16' in way else 'float32'}")
    together = newest(ranks[0] / way.replace(" ", "_").replace(",", ""))
    assert alone is not None and together is not None
    bound = 0.2 if "bf16" in way else 1e-5
    found = {name: value for name, value in differences(alone, together).items() if not name.endswith("_sq")}
    assert {name: value for name, value in found.items() if value > bound} == {}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_in_no_checkpoint_and_a_resumed_run_has_the_same_bits(
    ranks: tuple[Path, list[dict[str, Any]]], way: str
) -> None:
    for found in ranks[1]:
        assert found[way]["saved"] == ["ema", "model"]
        assert found[way]["resumed"] == [] and found[way]["same"]


def test_a_large_one_lies_whole_on_no_rank(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    least = 4 * sum(parameter.numel() for parameter in Teacher().parameters())
    for found in ranks[1]:
        assert found["whole"]["held"] >= least
        assert found["sharded"]["held"] == found["born sharded"]["held"] == 0


def test_a_checkpoint_is_as_small_with_a_large_teacher_as_with_a_small_one(tmp_path: Path) -> None:
    sizes = []
    for width in (8, 800):
        engine = made("local", 1, width)
        save(engine, tmp_path / str(width), 1)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(width)).rglob("*.safetensors")))
        numel = sum(parameter.numel() for parameter in engine.modules["teacher"].parameters())  # type: ignore[attr-defined]
    assert numel * 4 > 2_000_000 and sizes[0] == sizes[1] < 10_000
