"""How well a run that draws clips keeps a picture that it is given as their first frame, and whether they then move.

nexus score videopoet_tiny_emoji --settings score_first_frames
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.engine.hardware import Hardware
from nexus_scale.generate.prompts import Progress
from nexus_scale.generate.trained import Trained
from nexus_scale.generate.while_training import captions_of
from nexus_scale.io.durable import atomic_write
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.opening import open_tokenizer
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics.psnr import psnr
from nexus_scale.processes.pixels import pixels_of
from nexus_scale.train import Place

log = logging.getLogger(__name__)

SHOWN = 16


class FirstFramesSettings(BaseModel):
    """The `first_frames:` section of a settings file.

    `clips`: folder of held-out clips, whose first frames are given, with their captions as prompts; `samples`: how many; `guidance`,
    `steps`, `seed`: of drawing, None: the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    clips: str
    samples: int = Field(64, ge=2, le=10**6)
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)


def score_first_frames(place: Place, settings: FirstFramesSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Draws clips from the first frames of held-out clips and their captions.

    Returns:
        In dB, means over samples: `first`, samples' first frames against what was given; `first_rebuilt`, what the tokenizer alone makes
        of it: the best that can be expected; `first_others`, against what other samples were given: chance; `last`, samples' last frames
        against the first that was given, and `last_real`, the clips' own: what moves as much has a figure as low. `changed`: share of
        the given codes that samples do not have, 0 where they are kept. samples, guidance, seconds. Written to the run's
        first_frames.json, with first_frames.png: clips, and what was drawn from their first frames.
    Raises:
        UserError: a run that draws no clips of codes from a picture, or clips that are not as the run's are.
    """
    begun = time.monotonic()
    trained = Trained(place.run, place, hardware=hardware)
    if "image" not in trained.draws.takes or trained.draws.walks == "denoise" or trained.medium.name != "video":
        raise UserError(f"first_frames: recipe {trained.recipe.name} draws no codes of clips from a first frame")
    guidance = trained.guidance(settings.guidance)
    trained.check_steps(settings.steps)
    clips, captions = _held_out(trained, settings)
    device, makes = trained.hardware.device, trained.draws.makes
    tokenizer = open_tokenizer(trained.recipe, trained.dataset, place.runs_root, place.data_root, device)
    codes = tokenizer.encode(clips[:, :, :1])
    log.info("first_frames: drawing %d clips", len(clips))
    drawn = trained.latents(
        trained.conditions(captions), seed=settings.seed, steps=settings.steps, guidance=guidance,
        given={makes: codes}, progress=Progress(len(clips)).of,
    )  # fmt: skip
    made, given = trained.decoded(drawn).cpu(), clips[:, :, 0]
    found: dict[str, Any] = {
        "first": _db(made[:, :, 0], given),
        "first_rebuilt": _db(tokenizer.decode(codes).cpu()[:, :, 0], given),
        "first_others": _db(made[:, :, 0], given.roll(1, 0)),
        "last": _db(made[:, :, -1], given),
        "last_real": _db(clips[:, :, -1], given),
        "changed": float((drawn.cpu()[:, : codes.shape[1]] != codes).float().mean()),
        "samples": len(clips), "guidance": settings.guidance, "seconds": time.monotonic() - begun,
    }  # fmt: skip
    atomic_write(place.run.path / "first_frames.json", json.dumps(found, indent=1))
    strips = zip(to_uint8(clips[:SHOWN]).numpy(), to_uint8(made[:SHOWN]).numpy(), strict=True)
    shown = [strip for beside in strips for strip in beside]
    atomic_write(place.run.path / "first_frames.png", encode_image(make_grid(shown, columns=2)))
    return found


def _held_out(trained: Trained, settings: FirstFramesSettings) -> tuple[Tensor, list[str]]:
    """Clips in [-1, 1], cut to the frames that the run draws, and their captions, spread over the folder."""
    folder = trained.place.data_root / settings.clips
    dataset = Dataset.open([Source([folder], 1.0)])
    if "video" not in dataset.fields:
        raise UserError(f"{folder}: has fields {sorted(dataset.fields)}; first_frames needs clips, `video`", code=3)
    count, shape = min(settings.samples, dataset.samples), trained.decoded_shape
    clips, numbers = [], []
    for batch in dataset.fixed(dataset.samples, rank=0, world_size=1, batch=64):
        clips.append(pixels_of(batch, "video")[:, :, : shape[1]])
        numbers += batch.samples.tolist()
        if tuple(clips[-1].shape[1:]) != shape:
            raise UserError(
                f"first_frames: the run draws {shape}, but {folder} has clips of {tuple(batch['video'].shape[1:])}; name the folder that "
                "the run's data were made from",
                code=3,
            )
    rows = [row * len(numbers) // count for row in range(count)]
    return torch.cat(clips)[rows], captions_of(dataset, [numbers[row] for row in rows])


def _db(x: Tensor, y: Tensor) -> float:
    """Mean over samples, of pictures in [-1, 1]; what was drawn is clamped to that."""
    return float(psnr(x.float().clamp(-1, 1), y).mean())
