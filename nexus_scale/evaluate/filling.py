"""How well a run draws into pictures: what it draws under masks of held-out pictures, beside what was there, and what it keeps of the rest.

nexus score stable_diffusion_tiny_openmoji_inpainting --settings score_filling
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.engine.hardware import Hardware
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.processes.masks import random_mask
from nexus_scale.train import Place, open_data

log = logging.getLogger(__name__)

MASK = "mask"


class FillingSettings(BaseModel):
    """The `filling:` section of a settings file.

    `samples`: of the validation data; `draws`: of each, whose mean is compared, too; `guidance`, `steps`, `seed`: of drawing, None: the
    recipe's. Masks are the data's where they have some, else random ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(64, ge=2, le=10**6)
    draws: int = Field(4, ge=1, le=100)
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)


def score_filling(place: Place, settings: FillingSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Draws into held-out pictures.

    Returns:
        `error`: root mean squared error under the masks against the pictures, decoded, in [-1, 1]; `error_mean_of_draws`: that of
        the mean of several draws, which alone can be compared with `error_mean`, that of the mean of all pictures at each place;
        `error_others`: of what other pictures have there, chance for a single draw; `changed`: the largest change of latents that were
        not masked, 0 where they are kept to the bit. samples, draws, guidance, seconds. Written to the run's filling.json, with
        filling.png: pictures without what is masked, draws, and the pictures.
    Raises:
        UserError: a run that draws no pictures from noise, or has no validation data; masks that hide everything.
    """
    begun = time.monotonic()
    trained = Trained(place.run, place, hardware=hardware)
    if trained.draws.walks != "denoise" or len(trained.shape) != 3:
        raise UserError(f"filling: recipe {trained.recipe.name} draws no pictures from noise")
    if trained.recipe.data.validation is None and trained.recipe.data.synthetic is None:
        raise UserError(f"filling: recipe {trained.recipe.name} has no validation data")
    trained.require_decoder()
    trained.guidance(settings.guidance)
    trained.check_steps(settings.steps)
    held_out = open_data(trained.recipe, place.data_root, "validation", beside=trained.dataset)
    rows = []
    for batch in held_out.fixed(settings.samples, rank=0, world_size=1, batch=64):
        log.info("filling: %d samples", len(batch))
        rows.append(_filled(trained, batch.on("cpu"), settings))
    there, masks = torch.cat([one[0] for one in rows]), torch.cat([one[2] for one in rows])
    draws = torch.cat([one[1] for one in rows], dim=1)
    parts = ~masks.flatten(1).bool().all(1) & masks.flatten(1).bool().any(
        1
    )  # some of a picture is drawn, and some is given
    if int(parts.sum()) < 2:
        raise UserError("filling: masks hide all of the pictures or nothing; expected some of each, of two pictures")
    there, draws, masks = there[parts], draws[:, parts], masks[parts]
    found: dict[str, Any] = {
        "error": _error(draws[0], there, masks),
        "error_mean_of_draws": _error(draws.mean(0), there, masks),
        "error_mean": _error(there.mean(0, keepdim=True).expand_as(there), there, masks),
        "error_others": _error(there.roll(1, 0), there, masks),
        "changed": max(one[3] for one in rows),
        "samples": len(there), "draws": settings.draws, "guidance": settings.guidance, "seconds": time.monotonic() - begun,
    }  # fmt: skip
    atomic_write(place.run.path / "filling.json", json.dumps(found, indent=1))
    columns = [to_uint8(one[:16]) for one in (there * (1 - masks), draws[0], there)]
    shown = [picture.numpy() for beside in zip(*columns, strict=True) for picture in beside]
    atomic_write(place.run.path / "filling.png", encode_image(make_grid(shown, len(columns))))
    return found


def _filled(trained: Trained, batch: Batch, settings: FillingSettings) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of a batch the pictures (B, 3, H, W), draws (n, B, 3, H, W), masks (B, 1, H, W), and how much of the rest was changed."""
    makes, objective, device = trained.draws.makes, trained.objective, trained.hardware.device
    positions = batch.positions.tolist()
    asked = request_of(trained.recipe, objective, steps=settings.steps, guidance=trained.guidance(settings.guidance))
    cond, request = objective.request_like(batch, asked)
    mask = batch[MASK].float() if MASK in batch else _masks(positions, request.shape, settings.seed)
    request = replace(request, given={makes: batch[makes], MASK: mask}, strength=1.0)
    drawn, changed = [], 0.0
    for number in range(settings.draws):
        seed = settings.seed + number
        made = trained.generate(cond, request, seed=seed, positions=positions).samples
        rng = ProgressRng(seed, 0, "sample", batch.positions, device)
        given = {makes: batch[makes].to(device)}
        x0 = objective.clean(Batch(given, batch.positions, batch.positions), rng)  # type: ignore[attr-defined]  # of denoisers
        outside = (mask < 0.5).to(device)
        changed = max(changed, float(((made - x0) * outside).abs().max()))
        drawn.append(trained.decoded(made).cpu())
    there = trained.decoded(x0).cpu()
    return there, torch.stack(drawn), F.interpolate((mask >= 0.5).float(), there.shape[-2:], mode="nearest"), changed


def _masks(positions: list[int], shape: tuple[int, ...], seed: int) -> Tensor:
    """Random masks at the resolution of samples, (B, 1, h, w): of each by its position."""
    height, width = shape[-2:]
    return torch.stack([random_mask(height, width, np.random.default_rng([seed, place])) for place in positions])


def _error(made: Tensor, there: Tensor, masks: Tensor) -> float:
    squares = (made - there).square() * masks
    return float((squares.sum() / (masks.sum() * there.shape[1])).sqrt())
