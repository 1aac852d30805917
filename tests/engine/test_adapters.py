"""Adapters: a frozen base that is sharded, small changes that learn, and checkpoints of the changes alone."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import Engine, Network
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.checkpoint import newest
from nexus_scale.models.adapters.lora import Lora
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.models.diffusion.unet_condition import UNetCondition
from nexus_scale.planner.memory import memory_per_rank
from tests.distributed import run_ranks
from tests.engine_networks import GLOBAL_BATCH, copies, differences, differing, load, save

STEPS, HALF = 4, 2


def base() -> DiT:
    return DiT(latent_channels=2, latent_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)


def given(name: str, start: int, stop: int) -> Tensor:
    """The base's weights, none zero."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return (torch.randn(1 << 14, generator=generator) * 0.2)[start:stop]


def made(kind: str, world_size: int, *, decomposed: bool = False, **settings: Any) -> Engine:
    values = {"steps": STEPS, "seed": 3, "micro_batch": GLOBAL_BATCH // world_size, **settings}
    engine = build_engine(
        {
            "base": NetSpec(base, frozen=True),
            "model": NetSpec(
                lambda: Lora(base=base, rank=3, layers=("qkv", "fc1"), lr_ratio=4.0, decomposed=decomposed), AdamW(lr=1e-2), adapts="base"
            ),
        },
        {"ema": Average(average_of="model", decay=0.9), "target": Average(average_of="model", decay=0.5)},
        EngineSettings(engine=kind, **values),  # type: ignore[arg-type]
        called=("target",),
    )  # fmt: skip
    engine.fill("base", given)
    return engine


def batch(step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    draw = lambda *shape: torch.randn(GLOBAL_BATCH, *shape, generator=generator)  # noqa: E731
    return draw(2, 4, 4), draw().sigmoid(), {"label": torch.arange(GLOBAL_BATCH) % 3}


def train(engine: Engine, first: int, last: int) -> None:
    """The adapted network is to look like the base mirrored, and like its own average."""
    share = GLOBAL_BATCH // engine.world_size
    mine = slice(engine.rank * share, (engine.rank + 1) * share)
    for step in range(first, last):
        x, t, cond = batch(step)
        x, t, cond = x[mine], t[mine], {name: value[mine] for name, value in cond.items()}
        with engine.training("model"):
            with torch.no_grad():
                wanted = -engine.nets["base"](x, t, cond) + engine.nets["target"](x, t, cond)
            loss = (engine.nets["model"](x, t, cond) - wanted).square().mean()
            engine.backward("model", loss, last=True)
        engine.step("model", step)
        engine.update_averages(step)


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"whole_numel": 0},
    "sharded, recomputed": {"whole_numel": 0, "activation_checkpointing": True},
    "decomposed": {"whole_numel": 0, "decomposed": True},
    "bf16, born sharded": {"whole_numel": 0, "precision": "bf16", "partition_at_birth": 1},
}


WIDTH, DEPTH = 256, 4


def wide() -> DiT:
    return DiT(latent_channels=2, latent_size=4, hidden_size=WIDTH, depth=DEPTH, num_heads=2, num_classes=3)


def live_bytes() -> int:
    """Bytes of the memory behind all tensors of this process."""
    gc.collect()
    storages = (one.untyped_storage() for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def held_beside_arithmetic(world_size: int) -> float:
    """What a rank holds between steps of a bf16 base in blocks and its adapter, by what the planner counts."""
    before = live_bytes()
    make = lambda: Lora(base=wide, rank=16)  # noqa: E731
    engine = build_engine(
        {"base": NetSpec(wide, frozen=True), "model": NetSpec(make, AdamW(lr=1e-2), adapts="base")},
        {"ema": Average(average_of="model", decay=0.9)},
        EngineSettings(
            engine="deepspeed",
            steps=STEPS,
            micro_batch=GLOBAL_BATCH // world_size,
            precision="bf16",
            whole_numel=1 << 20,
        ),
    )
    engine.fill("base", lambda name, start, stop: torch.full((stop - start,), 0.01))
    share = GLOBAL_BATCH // world_size
    x, t, cond = batch(0)
    with engine.training("model"):
        answer = engine.nets["model"](x[:share], t[:share], {"label": cond["label"][:share]})
        engine.backward("model", answer.float().square().mean(), last=True)
    del answer, x, t, cond
    engine.step("model", 0)
    engine.update_averages(0)
    base_count, count = (sum(p.numel() for p in one().parameters()) for one in (wide, make))
    parts = memory_per_rank(
        count,
        world_size=world_size,
        averaged=count,
        frozen_parameters=-(-base_count // world_size),
        whole=count,
        gradient_bytes=0.0,
    )
    return (live_bytes() - before) / sum(parts.values())


def worker(rank: int, world_size: int, root: str) -> list[dict[str, Any]]:
    found = [{"held": held_beside_arithmetic(world_size)}]
    for name, settings in WAYS.items():
        folder = Path(root) / name.replace(" ", "_").replace(",", "")
        engine = made("deepspeed", world_size, **settings)
        x, t, cond = batch(9)
        with torch.no_grad():
            equal_at_first = torch.equal(engine.nets["model"](x, t, cond), engine.nets["base"](x, t, cond))
        train(engine, 0, HALF)
        save(engine, folder, HALF)
        train(engine, HALF, STEPS)
        other = made("deepspeed", world_size, **{**settings, "seed": 99})
        load(other, folder)
        train(other, HALF, STEPS)
        save(engine, folder, STEPS)
        kept = newest(folder)
        assert kept is not None
        with torch.no_grad():
            unlike = (engine.nets["model"](x, t, cond) - engine.nets["base"](x, t, cond)).abs().max().item()
        found.append(
            {
                "equal_at_first": equal_at_first,
                "unlike": unlike,
                "resumed": differing(copies(engine), copies(other)),
                "saved": sorted({key.partition("/")[0] for key in kept.names if "/" in key}),
                "layers": sorted({key.rpartition(".")[0] for key in kept.names if key.startswith("model/")}),
            }
        )
    replicated = made("replicated", world_size, activation_checkpointing=True)
    train(replicated, 0, STEPS)
    save(replicated, Path(root) / "replicated", STEPS)
    return found


ATTENTION = ("attn1.qkv", "attn1.proj", "attn2.q", "attn2.kv", "attn2.proj")


class Changes(Network):
    """The parameters of a rank-16 LoRA of Stable Diffusion 1.5's attentions, without their base: what a checkpoint holds of the two."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            adapter = Lora(base=stable_diffusion, layers=ATTENTION, rank=16)
        for number, parameter in enumerate(adapter.parameters()):
            self.register_parameter(str(number), torch.nn.Parameter(torch.empty(parameter.shape)))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)


def stable_diffusion() -> UNetCondition:
    return UNetCondition(latent_size=64, num_heads=8, text_dim=768)


def test_a_checkpoint_of_the_usual_targets_is_under_two_hundredths_of_the_base(tmp_path: Path) -> None:
    """Of attentions' layers; of all linear layers it would be 4 to 10: each value has a master and two moments, 12 bytes beside 2."""
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in stable_diffusion().parameters())
    engine = build_engine({"model": NetSpec(Changes, AdamW(lr=1e-3))}, {}, EngineSettings(engine="local", steps=1))
    begun = time.monotonic()
    save(engine, tmp_path, 1)
    seconds = time.monotonic() - begun
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    print(f"{written / 1e6:.1f} MB in {seconds:.2f} s, of {size / 1e6:.0f} MB: {100 * written / size:.2f} %")
    assert size > 1e9 and 0.01 < written / size < 0.02


ALONE: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"precision": "bf16"}, "decomposed": {"decomposed": True}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    root = tmp_path_factory.mktemp("adapters")
    for name, settings in ALONE.items():
        engine = made("local", 1, **settings)
        train(engine, 0, STEPS)
        save(engine, root / f"alone_{name}", STEPS)
    return root, run_ranks(2, worker, str(root))


@pytest.mark.parametrize("way", [*WAYS, "replicated"])
def test_two_workers_learn_what_one_worker_learns(ranks: tuple[Path, Any], way: str) -> None:
    alone = newest(ranks[0] / f"alone_{next((name for name in ALONE if name in way), 'float32')}")
    together = newest(ranks[0] / way.replace(" ", "_").replace(",", ""))
    assert alone is not None and together is not None
    found = {name: value for name, value in differences(alone, together).items() if not name.endswith("_sq")}
    assert {name: value for name, value in found.items() if value > (0.3 if "bf16" in way else 1e-5)} == {}


def test_two_ranks_hold_a_base_once_and_an_adapters_states(ranks: tuple[Path, Any]) -> None:
    assert all(one[0]["held"] <= 1.1 for one in ranks[1]), [one[0]["held"] for one in ranks[1]]


def test_the_changes_begin_at_nothing_and_are_all_that_is_saved(ranks: tuple[Path, Any]) -> None:
    for one in ranks[1]:
        for found in one[1:]:
            assert found["equal_at_first"] and found["unlike"] > 1e-3
            assert found["resumed"] == [] and found["saved"] == ["ema", "model", "target"]
            assert all(".lora_" in name or ".magnitude" in name for name in found["layers"])
            assert len(found["layers"]) == (15 if any(".magnitude" in name for name in found["layers"]) else 10)
