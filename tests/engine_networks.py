"""A network with everything that is awkward to shard, and steps on it, for the tests of all engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.config.schema import AdamW, Average, Schedule
from nexus_scale.contracts import Engine, Network
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.checkpoint import Checkpoint, CheckpointStore, newest
from nexus_scale.models.layers.linear import Linear

GLOBAL_BATCH = 8


class OddBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(7, 7)
        self.gain = nn.Parameter(torch.empty(7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.linear(x))


class OddNetwork(Network):
    """Numels 35, 7, 49, 21 and 3 (odd), 1 (less than two ranks), one parameter frozen, one used in every other step,
    one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Linear(5, 7)
        self.block = OddBlock()
        self.b = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.empty(1))
        self.scale.nexus_decay = False
        self.fixed = nn.Parameter(torch.empty(3), requires_grad=False)
        self.sometimes = nn.Parameter(torch.empty(3))
        self.sometimes.nexus_lr_multiplier = 0.5
        self.register_buffer("seen", torch.zeros(5))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def blocks(self) -> Sequence[nn.Module]:
        return [self.block]

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.lerp_(x.mean(0).float(), 0.1)
        y = self.b(self.block(self.a(x))) * self.scale + self.fixed
        return y + self.sometimes if extra else y

    def twice(self, x: Tensor) -> Tensor:
        """A method other than forward, with parameters of the root."""
        return 2 * self.b(self.block(self.a(x))) * self.scale


def build(kind: str, world_size: int = 1, accumulation: int = 1, **settings: Any) -> Engine:
    spec = AdamW(
        lr=3e-2,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip_grad_norm=0.5,
        schedule=Schedule(name="cosine", warmup_steps=2, final_ratio=0.1),
    )
    values: dict[str, Any] = {
        "steps": 12,
        "seed": 3,
        "micro_batch": GLOBAL_BATCH // world_size // accumulation,
        **settings,
    }
    return build_engine(
        {"model": NetSpec(OddNetwork, spec), "teacher": NetSpec(OddNetwork, frozen=True)},
        {"ema": Average(average_of="model", decay=0.9)},
        EngineSettings(engine=kind, accumulation=accumulation, **values),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 5, generator=generator), torch.randn(GLOBAL_BATCH, 3, generator=generator)


POISONS = ("loss", "gradient", "input")
"""Ways to be not finite: a loss whose gradients look sound, a gradient of a sound loss, a sample."""


def train(engine: Engine, first: int, last: int, accumulation: int = 1, poison: str = "") -> list[dict[str, float]]:
    """Steps [first, last) on the engine's share of each global batch; `poison` is one of POISONS, for this rank."""
    said = []
    share = GLOBAL_BATCH // engine.world_size
    for step in range(first, last):
        x, y = (part[engine.rank * share : (engine.rank + 1) * share].chunk(accumulation) for part in batch(step))
        with engine.training("model"):
            for i in range(accumulation):
                given = x[i] * float("nan") if poison == "input" else x[i]
                loss = (engine.nets["model"](given, extra=step % 2 == 0) - y[i]).float().square().mean()
                if poison == "loss":
                    loss = loss + float("inf")
                elif poison == "gradient":
                    loss.register_hook(lambda gradient: gradient * float("inf"))
                engine.backward("model", loss / accumulation, last=i + 1 == accumulation)
            said.append({key: float(value) for key, value in engine.step("model", step).items()})
        engine.update_averages(step)
    return said


def copies(engine: Engine) -> dict[str, Tensor]:
    return {name: shard.local.clone() for name, shard in engine.shards().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of pieces that are not equal to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def save(engine: Engine, root: Path, step: int, attempt: str = "test") -> None:
    store = CheckpointStore(root, rank=engine.rank, world_size=engine.world_size, attempt=attempt)
    store.save(step, engine.shards(), {"progress": step})
    store.wait()


def load(engine: Engine, root: Path) -> Checkpoint:
    checkpoint = newest(root)
    assert checkpoint is not None
    engine.load_shards(checkpoint.read)
    return checkpoint


def differences(one: Checkpoint, other: Checkpoint) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest value."""
    assert one.names == other.names
    found = {}
    for name in one.names:
        a, b = one.tensor(name).double(), other.tensor(name).double()
        found[name] = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    return found
