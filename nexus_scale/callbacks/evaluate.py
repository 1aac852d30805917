"""Evaluates what a run draws while it trains: how far from real samples, how varied, and whether it draws what it was trained on.

Samples are always of the same conditions and noise, drawn by all ranks, each its share, and measured in one order: figures are those of one
worker for any number of them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from nexus_scale.callbacks.context import post
from nexus_scale.callbacks.gathering import Drawing, gathered, raise_together
from nexus_scale.callbacks.monitor import Against, files_of
from nexus_scale.contracts import Batch, Callback, Engine, Progress, RunFolder, Stage, StepInfo, UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.io import incidents
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.rows import RowFile, read_rows
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import PAD, make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics.diversity import small
from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.metrics.kernel_distance import kernel_inception_distance
from nexus_scale.metrics.moments import Moments
from nexus_scale.metrics.nearness import Memory, memory_of
from nexus_scale.metrics.neighbours import manifolds
from nexus_scale.processes.pixels import pixels_of

log = logging.getLogger(__name__)

FILE = "evaluation.jsonl"
LEAST = 12
SHOWN = 12
"""Samples that are shown beside their nearest training samples: the nearest of all."""

Figure = Literal["frechet", "kernel", "precision", "recall", "density", "coverage"]
FIGURES: tuple[Figure, ...] = ("frechet", "kernel", "precision", "recall", "density", "coverage")


class Evaluate(Callback):
    """Draws `samples` samples every `every` steps and at the last one; the row of a step goes to evaluation.jsonl, and its figures into the
    metrics as `evaluation/<figure>`, by which `callbacks.checkpoint.keep_best` may keep the best checkpoints.

    Figures against held-out samples are those of `figures`. `nearer_train` and `copied` compare distances to training and to held-out
    samples (`metrics.nearness.Memory`): above `overfits`, and beyond chance, the run is overfitting; above `memorises` it draws what it was
    trained on. Either is an incident and a warning, once until it has passed, with the nearest pairs in samples/nearest_<step>.png.

    Args:
        every: steps between evaluations.
        samples: how many, a few thousand where the features are wide.
        real: a folder of held-out pictures or clips below the data root.
        train: a folder of those that the run is trained on; without it nothing is said of memory.
        classifier: a folder below the data root that the job train_classifier made, in whose features is measured; None: pixels, averaged
            down.
        figures: which.
        real_samples: of each folder at most.
        overfits, memorises: the shares above which warnings are given; 1: none is.
        draw, data_root: what draws, None where the run draws nothing; where the folders lie.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 1000,
        samples: PositiveInt = 2048,
        real: str,
        train: str | None = None,
        classifier: str | None = None,
        figures: tuple[Figure, ...] = FIGURES,
        real_samples: PositiveInt = 10_000,
        overfits: float = 0.65,
        memorises: float = 0.05,
        draw: Drawing | None,
        data_root: Path | None,
        run: RunFolder,
        stage: Stage,
        context: dict[str, float],
    ):
        if samples < LEAST or real_samples < LEAST:
            raise UserError(f"callbacks.evaluate.samples: got {min(samples, real_samples)}; expected {LEAST} at least")
        for name, value in (("overfits", overfits), ("memorises", memorises)):
            if not 0 < value <= 1:
                raise UserError(f"callbacks.evaluate.{name}: got {value:g}; expected a share above 0, of at most 1")
        self.every, self.samples, self.real, self.train, self.classifier = every, samples, real, train, classifier
        self.figures, self.real_samples, self.limits = figures, real_samples, (overfits, memorises)
        self.draw, self.data_root, self.run, self.stage, self.context = draw, data_root, run, stage, context
        self._sight: Sight | None = None
        self._rows: RowFile | None = None
        self._warned = (False, False)

    @classmethod
    def check_files(cls, arguments: Mapping[str, Any], data_root: Path) -> None:
        if (classifier := arguments.get("classifier")) is not None:
            files_of(data_root / classifier)
        for name in ("real", "train"):
            if (folder := arguments.get(name)) is not None:
                shown_in(data_root / folder, f"callbacks.evaluate.{name}")

    def before_run(self, engine: Engine, progress: Progress) -> None:
        if self.draw is None:
            log.info("nothing is evaluated: the run draws no samples")
            return
        wrong: UserError | None = None
        if self._sight is None and self.data_root is not None:
            try:
                self._sight = Sight(self, self.data_root, engine)
            except UserError as error:
                wrong = error
        raise_together(wrong, "callbacks.evaluate")
        if engine.rank == 0:
            self._rows = RowFile(self.run.path / FILE, progress.step)
            self._warned = (False, False)
            for row in read_rows(self.run.path / FILE):
                self._warned = self._over(row)

    def after_step(self, info: StepInfo) -> None:
        if self.draw is None or self._sight is None or (info.step % self.every and info.step != info.steps):
            return
        self.stage("monitor")
        begin = time.perf_counter()
        values = gathered(
            info.engine, self.draw, self.samples, partial(self._sight.of_batch, draw=self.draw), "callbacks.evaluate"
        )
        if values is None or self._rows is None:
            return
        figures = self._sight.figures(values["features"], self.figures)
        memory = self._sight.memory(values["features"])
        if memory is not None:
            figures |= {"nearer_train": memory.nearer_train, "copied": memory.copied}
        row = {"step": info.step, "samples": len(values["features"]), **figures}
        row["evaluate_s"] = round(time.perf_counter() - begin, 3)
        self._rows.append(row)
        post(self.context, info.step, {f"evaluation/{key}": value for key, value in figures.items()})
        if memory is not None:
            self._show(info.step, memory, values["pictures"])
            self._warn(info.step, row)

    def _over(self, row: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether a row says that the run overfits, and that it memorises: above the limit, and by more than three deviations of chance."""
        count = row.get("samples") or 1
        found = []
        for name, usual, limit in zip(("nearer_train", "copied"), (0.5, 0.01), self.limits, strict=True):
            value = row.get(name)
            chance = usual + 3 * (usual * (1 - usual) / count) ** 0.5
            found.append(isinstance(value, int | float) and value > max(limit, chance))
        return found[0], found[1]

    def _warn(self, step: int, row: Mapping[str, Any]) -> None:
        over = self._over(row)
        words = (
            f"the run overfits: at step {step} {row['nearer_train']:.0%} of samples are nearer to a training sample than to a held-out one",
            f"the run memorises: at step {step} {row['copied']:.0%} of samples are nearer to a training sample than 99% of held-out ones",
        )
        for kind, now, before, said in zip(("overfitting", "memorisation"), over, self._warned, words, strict=True):
            if now and not before:
                log.warning("%s; see samples/%s", said, nearest_name(step))
                incidents.note(
                    self.run.path, kind, said, step=step, nearer_train=row["nearer_train"], copied=row["copied"]
                )
        self._warned = over

    def _show(self, step: int, memory: Memory, pictures: Tensor) -> None:
        """The samples that are nearest to training samples, each with its nearest to the right."""
        assert self._sight is not None
        rows = memory.distances.argsort()[:SHOWN]
        beside = self._sight.training_pictures(memory.places[rows].tolist())
        pairs = [
            to_uint8(torch.stack([pictures[row], own])).numpy() for row, own in zip(rows.tolist(), beside, strict=True)
        ]
        samples, training = rows.tolist(), memory.places[rows].tolist()
        distances = memory.distances[rows].tolist()
        captions = [
            words
            for sample, place, distance in zip(samples, training, distances, strict=True)
            for words in (f"sample {sample}", f"training sample {place}, at {distance:.3g}")
        ]
        height, width = (max(one.shape[axis] for pair in pairs for one in pair) for axis in (0, 1))
        told = {
            "step": step, "captions": captions, "columns": 4, "width": width, "height": height, "pad": PAD,
            "samples": samples, "distances": distances, "training": training,
        }  # fmt: skip
        try:
            atomic_write(
                self.run.samples / nearest_name(step),
                encode_image(make_grid([one for pair in pairs for one in pair], 4)),
            )
            atomic_write(self.run.samples / nearest_name(step, "json"), json.dumps(told))
        except OSError as error:  # loses this picture, not the run
            log.error("nearest neighbours of step %d are not written: %s", step, error)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def nearest_name(step: int, ending: str = "png") -> str:
    """The file below samples/ that shows a step's samples beside their nearest training samples."""
    return f"nearest_{step:08d}.{ending}"


def shown_in(folder: Path, where: str) -> tuple[Dataset, str]:
    """The pictures or clips of a folder of shards, and the field that has them.

    Raises:
        UserError: there are none.
    """
    dataset = Dataset.open([Source([folder])])
    field = next((name for name in ("image", "video") if name in dataset.fields), None)
    if field is None or dataset.samples < LEAST:
        raise UserError(
            f"{where}: {folder} has {dataset.samples} samples with {sorted(dataset.fields)}; expected {LEAST} at least, with `image` or "
            "`video`",
            code=3,
        )
    return dataset.only([field]), field


class Sight:
    """Features of what is drawn, and of held-out and training samples; those are of rank 0.

    Raises:
        UserError: a folder is missing, or has nothing to see.
    """

    def __init__(self, asked: Evaluate, data_root: Path, engine: Engine):
        self.asked, self.root, self.engine = asked, data_root, engine
        self.against = None if asked.classifier is None else Against(data_root / asked.classifier, engine.device)
        folders = {"real": asked.real, "train": asked.train}
        self.folders = {
            name: shown_in(data_root / folder, f"callbacks.evaluate.{name}")
            for name, folder in folders.items()
            if folder
        }
        self.known = {name: self._features_of(name) for name in self.folders} if engine.rank == 0 else {}

    def features(self, shown: Tensor) -> Tensor:
        """Of images or clips in [-1, 1], (B, D)."""
        return small(shown).cpu() if self.against is None else self.against.features(shown)

    def _features_of(self, name: str) -> Tensor:
        dataset, field = self.folders[name]
        count = min(self.asked.real_samples, dataset.samples)
        parts = [(batch.positions, self.features(pixels_of(batch, field))) for batch in dataset.fixed(count)]
        return torch.cat([rows for _, rows in parts])[torch.cat([places for places, _ in parts]).argsort()]

    def of_batch(self, batch: Batch, samples: Tensor, draw: Drawing) -> dict[str, Tensor]:
        """What is gathered of a batch: positions, features and the pictures themselves, of clips their middle frames."""
        shown = draw.decoded(samples)
        if shown.ndim not in (4, 5):
            raise UserError(f"callbacks.evaluate: the run draws {tuple(shown.shape[1:])}; expected images or clips")
        features = self.features(shown)
        wide = next(iter(self.known.values())).shape[1] if self.known else features.shape[1]
        if features.shape[1] != wide:
            raise UserError(
                f"callbacks.evaluate.real: samples {tuple(shown.shape[1:])} have {features.shape[1]} features, those of "
                f"{self.asked.real} {wide}; name a folder of samples of their size"
            )
        frames = shown if shown.ndim == 4 else shown[:, :, shown.shape[2] // 2]
        return {"position": batch.positions, "features": features, "pictures": frames.half()}

    def figures(self, drawn: Tensor, names: tuple[str, ...]) -> dict[str, float]:
        """The named figures of features (N, D) against the held-out ones."""
        real, found = self.known["real"], {}
        if not bool(drawn.isfinite().all()):
            return {}
        if "frechet" in names:
            found["frechet"] = frechet_distance(Moments.of(drawn), Moments.of(real))
        if "kernel" in names:
            found["kernel"] = kernel_inception_distance(drawn, real, subset_size=None).mean
        neighbours = manifolds(real, drawn)._asdict()
        return found | {name: neighbours[name] for name in names if name in neighbours}

    def memory(self, drawn: Tensor) -> Memory | None:
        """How near features (N, D) lie to those of training samples; None where their folder is not named."""
        if "train" not in self.known or not bool(drawn.isfinite().all()):
            return None
        return memory_of(drawn, self.known["train"], self.known["real"])

    def training_pictures(self, places: list[int]) -> list[Tensor]:
        """Training samples by their places, (3, H, W) in [-1, 1], of clips their middle frames."""
        dataset, field = self.folders["train"]
        found: dict[int, Tensor] = {}
        for batch in dataset.fixed(min(self.asked.real_samples, dataset.samples)):
            for row in [row for row, place in enumerate(batch.positions.tolist()) if place in places]:
                shown = pixels_of(batch, field)[row]
                found[int(batch.positions[row])] = shown if shown.ndim == 3 else shown[:, shown.shape[1] // 2]
        return [found[place] for place in places]
