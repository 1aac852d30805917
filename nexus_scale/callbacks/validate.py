"""The loss on held-out data under fixed noise, so that its curve does not fluctuate by chance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import PositiveInt

from nexus_scale.callbacks.context import post
from nexus_scale.contracts import Batch, Callback, Engine, Objective, Progress, RunFolder, Stage, StepInfo, UserError
from nexus_scale.io.rows import RowFile
from nexus_scale.kernels.random import ProgressRng


class Validate(Callback):
    """Validates every `every` steps and at the last one.

    The row of a step goes to validation.jsonl: `loss`, `loss_zero` (of a predictor that always answers zero), `ratio` of the two, and
    whatever else the objective names, such as a loss per time. Several sets of weights give `<weights>/loss` and so on beside the
    first one's plain names. The context gets the same under `validation/`.

    Args:
        every: steps between validations.
        samples: how many samples of the validation set; the same ones each time.
        weights: averages, or trained networks, to compute with; None: the recipe's averages, or else the trained weights.
        validation, averages: this rank's batches of a number of samples, as many batches on all ranks; names of the averages.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 1000,
        samples: PositiveInt = 256,
        weights: tuple[str, ...] | None = None,
        objective: Objective,
        validation: Callable[[int], Iterable[Batch]],
        averages: tuple[str, ...] = (),
        seed: int,
        run: RunFolder,
        stage: Stage,
        context: dict[str, float],
    ):
        self.every, self.samples = every, samples
        self.weights = weights or averages or objective.phases(0)[0].networks[:1]
        self.objective, self.validation, self.seed = objective, validation, seed
        self.run, self.stage, self.context = run, stage, context
        self._rows: RowFile | None = None

    def before_run(self, engine: Engine, progress: Progress) -> None:
        if engine.rank == 0:
            self._rows = RowFile(self.run.path / "validation.jsonl", progress.step)

    def after_step(self, info: StepInfo) -> None:
        if info.step % self.every and info.step != info.steps:
            return
        self.stage("validate")
        begin = time.perf_counter()
        row: dict[str, Any] = {"step": info.step, "weights": self.weights[0]}
        for i, name in enumerate(self.weights):
            means = self.measure(info.engine, name)
            row.update({key if i == 0 else f"{name}/{key}": value for key, value in means.items()})
        row["validate_s"] = round(time.perf_counter() - begin, 3)
        if self._rows is not None:
            self._rows.append(row)
        figures = {
            f"validation/{key}": value for key, value in row.items() if isinstance(value, float) and key != "validate_s"
        }
        post(self.context, info.step, figures)

    def measure(self, engine: Engine, weights: str) -> dict[str, float]:
        """Means of the objective's metrics over the validation set, computed with `weights`. A collective."""
        sums: dict[str, torch.Tensor] = {}
        rows: dict[str, list[torch.Tensor]] = {}
        places: list[torch.Tensor] = []
        with engine.weights(weights), torch.no_grad():
            for batch in self.validation(self.samples):
                # Fixed: the key does not include the step.
                rng = ProgressRng(self.seed, 0, "validate", batch.positions, engine.device)
                places.append(batch.positions)
                for name, values in self.objective.validate(engine.nets, batch.on(engine.device), rng).items():
                    values = values.double()
                    if values.ndim > 1:
                        rows.setdefault(name, []).append(values)
                        continue
                    pair = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
                    sums[name] = sums[name] + pair if name in sums else pair
        if not sums:
            raise UserError(
                f"data.validation: has no samples, or no bucket with one sample for each of {engine.world_size} workers; expected at least "
                "that, or leave callbacks.validate out",
                code=3,
            )
        names = sorted(sums)
        totals = torch.stack([sums[name] for name in names])  # (names, 2)
        if engine.world_size > 1:
            from nexus_scale.engine.distributed import sum_over_ranks

            totals = sum_over_ranks(totals)
        means = {name: total / count for name, (total, count) in zip(names, totals.tolist(), strict=True)}
        if means.get("loss_zero"):
            means["ratio"] = means["loss"] / means["loss_zero"]
        if not rows:
            return means
        whole = {name: self._of_all(engine, torch.cat(parts), torch.cat(places)) for name, parts in rows.items()}
        return means | {name: float(value) for name, value in self.objective.figures(whole).items()}

    def _of_all(self, engine: Engine, own: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The rows (N, n) of all ranks' samples, in the order of the validation set. A collective."""
        table = own.new_zeros(self.samples, own.shape[1] + 1)
        table[places.to(own.device)] = torch.cat([own, torch.ones_like(own[:, :1])], dim=1)
        table = engine.sum_over_ranks(table)
        return table[table[:, -1] > 0, :-1]

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None
