"""How far samples follow the pictures that they are told: what is made of the samples is compared with what they were given.

nexus score control_net_tiny_openmoji --settings score_edges
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.conditioners.conditions import pictures_among
from nexus_scale.conditioners.control import made_as
from nexus_scale.contracts import Batch, Cond, UserError
from nexus_scale.engine.hardware import Hardware
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics.edges import overlap
from nexus_scale.train import Place, open_data

log = logging.getLogger(__name__)


class FollowingSettings(BaseModel):
    """The `following:` section of a settings file.

    `samples`: of the validation data, whose conditions are given; `within`: pixels by which a mark may be away; `guidance`, `steps`,
    `seed`: of drawing, None: the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(128, ge=2, le=10**6)
    within: int = Field(0, ge=0, le=64)
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)


def score_following(place: Place, settings: FollowingSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Draws held-out conditions, makes of the samples what the conditions were made of pictures as, and compares.

    Returns:
        `overlap`, the mean intersection over union of marks (values above 1/2) in both; `overlap_base`, of samples of the network that
        an adapter adapts, where the run has one; `overlap_decoded`, of the data's own latents, decoded: the best that can be expected;
        `overlap_others`, of samples and the conditions of other samples: chance; samples, seconds. Written to the run's following.json,
        with following.png: conditions, samples, and the base's samples.
    Raises:
        UserError: a run that is told no picture, or one that was not made by precompute_controls.
    """
    begun = time.monotonic()
    trained = Trained(place.run, place, hardware=hardware)
    names = pictures_among(trained.draws.conditions, trained.dataset)
    if len(names) != 1:
        raise UserError(f"following: recipe {trained.recipe.name} is told pictures {names}; expected one")
    trained.require_decoder()
    trained.guidance(settings.guidance)
    trained.check_steps(settings.steps)
    bases = {role: entry.adapts for role, entry in trained.recipe.adapters().items()}
    parts: dict[str, list[Tensor]] = {}
    for batch in _validation(trained, place).fixed(settings.samples, rank=0, world_size=1, batch=64):
        for name, value in _drawn(trained, batch, settings, bases).items():
            parts.setdefault(name, []).append(value)
    made = {name: torch.cat(values) for name, values in parts.items()}
    given = made.pop("given")
    found: dict[str, Any] = {}
    for name, pictures in made.items():
        marks = _marks(trained, names[0], pictures)
        found[name] = float(overlap(marks, given, settings.within).mean())
        if name == "overlap":
            found["overlap_others"] = float(overlap(marks, given.roll(1, 0), settings.within).mean())
    found |= {"samples": len(given), "guidance": settings.guidance, "seconds": time.monotonic() - begun}
    atomic_write(place.run.path / "following.json", json.dumps(found, indent=1))
    rows = [
        to_uint8(given[:16, None].float().expand(-1, 3, -1, -1) * 2 - 1),
        *(to_uint8(made[name][:16]) for name in made),
    ]
    shown = [picture for pictures in zip(*rows, strict=True) for picture in pictures]
    atomic_write(place.run.path / "following.png", encode_image(make_grid([one.numpy() for one in shown], len(rows))))
    return found


def _validation(trained: Trained, place: Place) -> Any:
    if trained.recipe.data.validation is None and trained.recipe.data.synthetic is None:
        raise UserError(f"following: recipe {trained.recipe.name} has no validation data")
    return open_data(trained.recipe, place.data_root, "validation", beside=trained.dataset)


def _drawn(trained: Trained, batch: Batch, settings: FollowingSettings, bases: Mapping[str, str]) -> dict[str, Tensor]:
    """Samples under a batch's conditions in [-1, 1], (B, 3, H, W), of the run and of its base, and the marks that are given, (B, H, W)."""
    guidance = trained.guidance(settings.guidance)
    asked = request_of(trained.recipe, trained.objective, steps=settings.steps, guidance=guidance)
    cond, request = trained.objective.request_like(batch.on("cpu"), asked)

    def draw(cond: Cond) -> Tensor:
        made = trained.generate(cond, request, seed=settings.seed, positions=batch.positions.tolist())
        return trained.decoded(made.samples).cpu()

    name = pictures_among(trained.draws.conditions, trained.dataset)[0]
    log.info("following: %d samples", len(batch))
    found = {"given": cond[name].mean(1) > 0, "overlap": draw(cond)}
    own = dict(trained.nets)
    if bases:
        trained.nets |= {role: trained.nets[base] for role, base in bases.items()}
        found["overlap_base"] = draw(cond)
        trained.nets |= own
    if trained.draws.makes in batch:
        device = trained.hardware.device
        rng = ProgressRng(settings.seed, 0, "following", batch.positions, device)
        latents = trained.objective.clean(batch.on(device), rng)  # type: ignore[attr-defined]  # of denoisers, which alone follow pictures
        found["overlap_decoded"] = trained.decoded(latents).cpu()
    return found


def _marks(trained: Trained, name: str, pictures: Tensor) -> Tensor:
    """What is made of pictures in [-1, 1], as the data's conditions were: (B, H, W) bool."""
    encoder = trained.dataset.encoders.get(name, {})
    made = [made_as(encoder, one, f"following: {name}") for one in to_uint8(pictures).permute(0, 3, 1, 2)]
    return torch.stack(made).float().mean(1) > 127.5
