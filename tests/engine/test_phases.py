"""A step of several phases: what each is told, and what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Loss, Nets, Objective, Phase, Progress, Rng, SumOverRanks
from nexus_scale.kernels.random import derive_key, philox_normal
from nexus_scale.trainer import Trainer

POSITIONS = torch.arange(3)


class Critics(Objective):
    """Three critic updates on new batches and one of the generator, as WGAN has them."""

    needs, fields = ("model", "critic"), ("x",)

    def __init__(self) -> None:
        self.drawn: list[Any] = []
        self.after: list[tuple[str, int, int]] = []
        self.last: list[tuple[str, bool]] = []

    def stepped(self, trains: str, step: int, last: bool) -> dict[str, Tensor]:
        """In place of an engine's step."""
        self.last.append((trains, last))
        return {}

    def phases(self, step: int) -> Sequence[Phase]:
        return (*[Phase("critic", trains="critic")] * 3, Phase("generator", trains="model"))

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        dropout = torch.rand(3)
        shared = int(torch.randint(10**9, (), generator=rng.shared("level")))
        self.drawn.append((phase, step, rng.normal("z", (4,)), dropout, shared))
        return Loss(torch.zeros(()), {"drawn": torch.tensor(float(batch.draw))})

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> dict[str, Tensor]:
        self.after.append((phase, step, int(torch.randint(10**9, (), generator=rng.shared("level")))))
        return {}


def run(steps: int = 1, progress: Progress | None = None) -> tuple[Critics, dict[str, Any]]:
    objective: Any = Critics()
    progress = progress or Progress()
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"), nets={}, training=lambda trains: nullcontext(),
        backward=lambda trains, total, last: None, step=objective.stepped, update_averages=lambda step: None,
        sum_over_ranks=lambda value: value,
    )  # fmt: skip
    metrics: dict[str, Any] = {}

    def next_batches() -> list[Batch]:
        progress.draws += 1
        return [Batch({"x": torch.zeros(3, 1)}, POSITIONS, POSITIONS, progress.draws - 1)]

    callback: Any = SimpleNamespace(
        before_run=lambda *_: None, after_run=lambda *_: None, after_step=lambda info: None,
        after_reading=lambda info: metrics.update(info.metrics),
    )  # fmt: skip
    Trainer(
        steps=progress.step + steps, seed=5, objective=objective, engine=engine, next_batches=next_batches,
        callbacks=[callback], progress=progress, stage=lambda name: None,
    ).run()  # fmt: skip
    return objective, metrics


def test_phases_of_one_name_draw_anew_and_the_first_as_it_always_did() -> None:
    objective, metrics = run()
    assert [phase for phase, *_ in objective.drawn] == ["critic", "critic", "critic", "generator"]
    for field in (2, 3):  # noise, dropout
        draws = [drawn[field] for drawn in objective.drawn]
        assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert len({drawn[4] for drawn in objective.drawn}) == 4
    for number in (0, 3):
        phase, step, noise, *_ = objective.drawn[number]
        assert torch.equal(noise, philox_normal(derive_key(5, step, phase, "sample", "z"), POSITIONS, (4,)))
    assert metrics["critic/drawn"] == (3.0, 3), "each of them took a batch of its own"
    assert objective.last == [("critic", False), ("critic", False), ("critic", True), ("model", True)]


def test_a_phase_is_told_its_step_and_draws_alike_after_it() -> None:
    objective, _ = run(steps=2)
    assert [step for _, step, *_ in objective.drawn] == [0] * 4 + [1] * 4
    assert objective.after == [(phase, step, shared) for phase, step, _, _, shared in objective.drawn]


def test_what_a_step_draws_does_not_depend_on_where_the_run_began() -> None:
    whole, resumed = run(steps=3)[0], run(steps=1, progress=Progress(step=2, draws=8))[0]
    for one, other in zip(whole.drawn[8:], resumed.drawn, strict=True):
        assert one[:2] == other[:2] and all(torch.equal(a, b) for a, b in zip(one[2:4], other[2:4], strict=True))
