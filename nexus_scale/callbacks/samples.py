"""Draws samples during training, always from the same conditions and noise, so that they show the model learning."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from nexus_scale.callbacks.context import post
from nexus_scale.contracts import Callback, RunFolder, Stage, StepInfo
from nexus_scale.data.sounds import encode_wav
from nexus_scale.io.durable import atomic_write
from nexus_scale.media.grid import PAD, columns_of, make_grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sample: its caption, a picture (H, W, 3) uint8 of it, and of sound the waveform (T,) float32 in [-1, 1]."""

    caption: str
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    sample_rate_hz: int = 0


class Samples(Callback):
    """Draws every `every` steps and at the last one, into `samples/step_<step>.png` and a `.json` of the same name.

    The JSON tells `step`, `captions`, and how the picture is laid out (`columns`, `width`, `height` of an image, `pad`).
    Sound goes to `samples/step_<step>_<number>.wav`. File names come from steps and numbers alone, never from captions.

    Args:
        every: steps between drawings.
        count: how many samples.
        beside: of adapted networks: what their bases draw of the same noise stands to the left of each picture.
        draw: `draw(engine, count)`, a collective; rank 0 gets the samples. None where the run has nothing to draw, which has been said.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 1000,
        count: PositiveInt = 24,
        beside: bool = False,
        draw: Callable[..., Sequence[Sample] | None] | None,
        run: RunFolder,
        stage: Stage,
        context: dict[str, float],
    ):
        self.every, self.count, self.beside = every, count, {"beside": True} if beside else {}
        self.draw, self.run, self.stage, self.context = draw, run, stage, context

    def after_step(self, info: StepInfo) -> None:
        if self.draw is None or (info.step % self.every and info.step != info.steps):
            return
        self.stage("samples")
        begin = time.perf_counter()
        drawn = self.draw(info.engine, self.count, **self.beside)
        if drawn:
            try:
                self.write(info.step, drawn)
            except OSError as error:  # loses these samples, not the run
                log.error("samples of step %d are not written: %s", info.step, error)
        post(self.context, info.step, {"samples_s": time.perf_counter() - begin})

    def write(self, step: int, drawn: Sequence[Sample]) -> None:
        """Writes one step's samples, each file atomically."""
        name = f"step_{step:08d}"
        described: dict[str, Any] = {"step": step, "captions": [sample.caption for sample in drawn]}
        images = [sample.image for sample in drawn if sample.image is not None]
        sounds = [(sample.audio, sample.sample_rate_hz) for sample in drawn if sample.audio is not None]
        if images:
            height, width = (max(image.shape[i] for image in images) for i in (0, 1))
            described |= {"columns": columns_of(len(images)), "width": width, "height": height, "pad": PAD}
            buffer = io.BytesIO()
            make_grid(images, described["columns"]).save(buffer, "png", optimize=True)
            atomic_write(self.run.samples / f"{name}.png", buffer.getvalue())
        if sounds:
            described["audio"] = [f"{name}_{i:02d}.wav" for i in range(len(sounds))]
            for file, (audio, sample_rate_hz) in zip(described["audio"], sounds, strict=True):
                atomic_write(self.run.samples / file, encode_wav(audio[None], sample_rate_hz))
        atomic_write(self.run.samples / f"{name}.json", json.dumps(described).encode())
        listed = described.get("audio", ())
        for path in self.run.samples.glob(f"{name}_*.wav"):
            if path.name not in listed:  # left by an earlier drawing of this step with more samples
                path.unlink(missing_ok=True)
