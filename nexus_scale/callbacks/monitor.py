"""Measures what a run draws while it trains: how varied its samples are, how far from real ones, and which modes they reach.

A generator's losses do not say whether its samples are good: a critic's value falls where the generator improves and where the critic
weakens. So samples are drawn, always of the same conditions and noise, by all ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from nexus_scale.callbacks.context import post
from nexus_scale.callbacks.gathering import Drawing, gathered, raise_together
from nexus_scale.contracts import Batch, Callback, Engine, Objective, Progress, RunFolder, Stage, StepInfo, UserError
from nexus_scale.io import incidents
from nexus_scale.io.rows import RowFile, read_rows
from nexus_scale.metrics.classifier import load_classifier
from nexus_scale.metrics.clips import features_of
from nexus_scale.metrics.diversity import diversity, grid_of_modes, mode_coverage, small
from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.processes.pixels import pixels_of

log = logging.getLogger(__name__)

FILE = "monitor.jsonl"
CLASSIFIER, REAL = "classifier.safetensors", "real.safetensors"
"""Files of the folder that train_classifier makes."""


class Modes(BaseModel):
    """A mixture whose modes stand on a grid in the plane, around 0.

    Attributes:
        side: modes in a row, and rows.
        spacing: between neighbours.
        radius: within which a sample belongs to a mode.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    side: int = Field(5, ge=1, le=100)
    spacing: float = Field(2.0, gt=0)
    radius: float = Field(0.15, gt=0)


class Monitor(Callback):
    """Draws `samples` samples every `every` steps and at the last one; the row of a step goes to monitor.jsonl.

    `diversity` is the deviation among samples of one condition (`metrics.diversity`), `diversity_real` that of the data; `frechet` the
    distance to real samples in the features of the classifier, where these are finite; `modes` and `in_modes` how many modes are reached
    and the share of samples in one. The metrics of the step get the same under `monitor/`.

    Diversity that falls below `collapse` of the best that it was, or of the data's where that is less, is a collapse: an incident and a
    warning, once until it has recovered.

    Args:
        every: steps between measurements.
        samples: how many; at least a few times the width of the features for the distance to mean something.
        collapse: the share below which diversity has collapsed; 0: nothing warns.
        classifier: a folder below the data root that the job train_classifier made.
        modes: of data that are such a mixture.
        draw, data_root: what draws, None where the run draws nothing; where the classifier lies.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 500,
        samples: PositiveInt = 512,
        collapse: float = 0.5,
        classifier: str | None = None,
        modes: Modes | None = None,
        objective: Objective,
        draw: Drawing | None,
        data_root: Path | None,
        run: RunFolder,
        stage: Stage,
        context: dict[str, float],
    ):
        if not 0 <= collapse < 1:
            raise UserError(
                f"callbacks.monitor.collapse: got {collapse:g}; expected a share of 0 to below 1, such as 0.5"
            )
        if samples < 2:
            raise UserError(f"callbacks.monitor.samples: got {samples}; expected at least 2, which can differ")
        self.every, self.samples, self.collapse, self.modes = every, samples, collapse, modes
        self.draw, self.run, self.stage, self.context = draw, run, stage, context
        self.objective, self.classifier, self.data_root = objective, classifier, data_root
        self._against: Against | None = None
        self._rows: RowFile | None = None
        self._best, self._collapsed = 0.0, False

    @classmethod
    def check_files(cls, arguments: Mapping[str, Any], data_root: Path) -> None:
        if (classifier := arguments.get("classifier")) is not None:
            files_of(data_root / classifier)

    def before_run(self, engine: Engine, progress: Progress) -> None:
        if self.draw is None:
            log.info("nothing is monitored: the run draws no samples")
            return
        if self.classifier is not None and self.data_root is not None and self._against is None:
            wrong: UserError | None = None
            try:
                self._against = Against(self.data_root / self.classifier, engine.device)
            except UserError as error:
                wrong = error
            raise_together(wrong, "callbacks.monitor")
        if engine.rank == 0:
            self._rows = RowFile(self.run.path / FILE, progress.step)
            self._best, self._collapsed = 0.0, False
            for row in read_rows(self.run.path / FILE):
                self._judged(row)

    def after_step(self, info: StepInfo) -> None:
        if self.draw is None or (info.step % self.every and info.step != info.steps):
            return
        self.stage("monitor")
        begin = time.perf_counter()
        found = self.measure(info.engine, self.draw)
        if found is None or self._rows is None:
            return
        row = {"step": info.step, **found, "monitor_s": round(time.perf_counter() - begin, 3)}
        self._rows.append(row)
        post(self.context, info.step, {f"monitor/{key}": value for key, value in found.items()})
        if self._judged(row):
            words = f"samples have collapsed: at step {info.step} their diversity is {row['diversity']:.3g}, and was {self._best:.3g}"
            log.warning("%s; see %s, and samples/", words, FILE)
            incidents.note(
                self.run.path, "collapse", words, step=info.step, diversity=row["diversity"], best=self._best
            )

    def _judged(self, row: dict[str, Any]) -> bool:
        """Whether samples have collapsed by this row, and had not by the one before."""
        now, real = row.get("diversity"), row.get("diversity_real") or math.inf
        if not isinstance(now, int | float) or not self.collapse:
            return False
        before, self._collapsed = self._collapsed, now < self.collapse * min(self._best, real)
        self._best = max(self._best, now)
        return self._collapsed and not before

    def measure(self, engine: Engine, draw: Drawing) -> dict[str, float] | None:
        """Figures of what the run draws now: on rank 0. A collective.

        Raises:
            UserError: on all ranks, where samples of one cannot be measured.
        """
        values = gathered(engine, draw, self.samples, partial(self._measured, draw=draw), "callbacks.monitor")
        return None if values is None else self._figures(values)

    def _measured(self, batch: Batch, samples: Tensor, draw: Drawing) -> dict[str, Tensor]:
        """What is gathered of a batch.

        Raises:
            UserError: what was asked for does not measure such samples.
        """
        draws = self.objective.draws
        made_of, told = (draws.makes, draws.conditions) if draws else ("", ())
        own = {"position": batch.positions, "drawn": small(samples)}
        if "label" in told:
            own["label"] = batch["label"]
        if (real := batch.fields.get(made_of)) is not None and real.shape == samples.shape:
            own["real"] = small(real if real.is_floating_point() else pixels_of(batch, made_of))
        if self.modes is not None:
            own["points"] = samples.flatten(1)
            if own["points"].shape[1] != 2:
                raise UserError(
                    f"callbacks.monitor.modes: samples have {own['points'].shape[1]} values; expected points in the plane, of 2"
                )
        if self._against is not None:
            own["features"] = self._against.features(draw.decoded(samples))
        return own

    def _figures(self, values: dict[str, Tensor]) -> dict[str, float]:
        groups = values.get("label")
        found = {"diversity": diversity(values["drawn"], groups)}
        if "real" in values:
            found["diversity_real"] = diversity(values["real"], groups)
        if self._against is not None and bool(values["features"].isfinite().all()):
            found["frechet"] = frechet_distance(values["features"], self._against.real)
        if self.modes is not None:
            centres = grid_of_modes(self.modes.side, self.modes.spacing)
            reached, within = mode_coverage(values["points"], centres, self.modes.radius)
            found |= {"modes": float(reached), "in_modes": within}
        return found

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def files_of(folder: Path) -> tuple[Path, Path]:
    """The classifier and the features of real samples that the job train_classifier made.

    Raises:
        UserError: one is missing.
    """
    files = folder / CLASSIFIER, folder / REAL
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(
            f"callbacks.monitor.classifier: no {missing[0]}; make it with the job train_classifier (`prepare:` of the recipe)",
            code=3,
        )
    return files


class Against:
    """A classifier and real samples in its features, of a folder that the job train_classifier made.

    Raises:
        UserError: no such folder, or another one.
    """

    def __init__(self, folder: Path, device: torch.device):
        from safetensors.torch import load_file

        files = files_of(folder)
        self.device, self.classifier = device, load_classifier(files[0]).to(device)
        self.real = load_file(files[1])["features"]

    def features(self, shown: Tensor) -> Tensor:
        """Of images (B, 3, H, W), or of clips, (B, D) on the CPU."""
        size = (3, self.classifier.size, self.classifier.size)
        if shown.ndim < 4 or (shown.shape[1], *shown.shape[-2:]) != size:
            raise UserError(
                f"callbacks.monitor.classifier: it takes images {size}, or clips of them; the run draws {tuple(shown.shape[1:])}: name one "
                "of images of that size, or leave it out"
            )
        return features_of(self.classifier.features, shown.to(self.device)).cpu()
