"""How far samples follow the pictures that they are told: edges are compared with those that were given, image prompts with the samples.

nexus score control_net_tiny_openmoji --settings score_edges
nexus score ip_adapter_tiny_openmoji --settings score_image_prompts
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
from nexus_scale.conditioners.image_prompt import IMAGE_PROMPT, ImagePromptConditioner
from nexus_scale.contracts import Batch, Cond, UserError
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.sources import held_out
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics.edges import overlap
from nexus_scale.metrics.nearness import nearer
from nexus_scale.train import Place

log = logging.getLogger(__name__)

SAMPLES, BASE, DECODED, GIVEN = "", "_base", "_decoded", "given"
"""Ends of figures' names: of the run's samples, of its base's, and of the data themselves, decoded; and what the samples were given."""


class FollowingSettings(BaseModel):
    """The `following:` section of a settings file.

    `samples`: of the validation data, whose conditions are given; `alone`: the picture alone is given, without prompts, which may give
    away much of it; `within`: pixels by which a mark may be away; `guidance`, `steps`, `seed`: of drawing, None: the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(128, ge=2, le=10**6)
    alone: bool = False
    within: int = Field(0, ge=0, le=64)
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)


def score_following(place: Place, settings: FollowingSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Draws under held-out conditions, and compares the samples with them.

    Returns:
        Of a run that follows pictures, `overlap`: intersection over union of marks (values above 1/2) in what was given and in what is made
        of the samples as the data's were; with `_others` of what other samples were given: chance. Of a run with image prompts, `nearer`:
        how often a sample is nearer to its prompt than to another one, 1/2 by chance, in the features of the run's image encoder, and
        `nearer_pixels`. Each with `_base`, of samples of the network that an adapter adapts, and `_decoded`, of the data's own latents,
        decoded: the best that can be expected. samples, guidance, seconds. Written to the run's following.json, with following.png: what
        was given, samples, the base's, and the data.
    Raises:
        UserError: a run that is told no picture; pictures that were not made by precompute_controls.
    """
    begun = time.monotonic()
    trained = Trained(place.run, place, hardware=hardware)
    names = pictures_among(trained.draws.conditions, trained.dataset)
    if len(names) != 1:
        raise UserError(f"following: recipe {trained.recipe.name} is told pictures {names}; expected one")
    trained.require_decoder()
    trained.guidance(settings.guidance)
    trained.check_steps(settings.steps)
    parts: dict[str, list[Tensor]] = {}
    for batch in held_out(trained, "following").fixed(settings.samples, rank=0, world_size=1, batch=64):
        log.info("following: %d samples", len(batch))
        for name, value in _drawn(trained, batch, names[0], settings).items():
            parts.setdefault(name, []).append(value)
    made = {name: torch.cat(values) for name, values in parts.items()}
    given = made.pop(GIVEN)
    found = (
        _nearness(trained, given, made)
        if names[0] == IMAGE_PROMPT
        else _overlaps(trained, names[0], given, made, settings.within)
    )
    found |= {"samples": len(given), "guidance": settings.guidance, "seconds": time.monotonic() - begun}
    atomic_write(place.run.path / "following.json", json.dumps(found, indent=1))
    rows = [to_uint8(pictures[:16]) for pictures in (*([given] if given.ndim == 4 else []), *made.values())]
    shown = [picture.numpy() for beside in zip(*rows, strict=True) for picture in beside]
    atomic_write(place.run.path / "following.png", encode_image(make_grid(shown, len(rows))))
    return found


def _drawn(trained: Trained, batch: Batch, name: str, settings: FollowingSettings) -> dict[str, Tensor]:
    """Samples under a batch's conditions in [-1, 1], (B, 3, H, W), of the run and of its base; the data; and what was given."""
    guidance = trained.guidance(settings.guidance)
    asked = request_of(trained.recipe, trained.objective, steps=settings.steps, guidance=guidance)
    cond, request = trained.objective.request_like(batch.on("cpu"), asked)
    if settings.alone:
        cond = {**trained.objective.unconditional(cond), name: cond[name]}

    def draw(cond: Cond) -> Tensor:
        made = trained.generate(cond, request, seed=settings.seed, positions=batch.positions.tolist())
        return trained.decoded(made.samples).cpu()

    found = {GIVEN: cond[name].float(), SAMPLES: draw(cond)}
    if bases := {role: trained.nets[entry.adapts] for role, entry in trained.recipe.adapters().items()}:
        own = dict(trained.nets)
        trained.nets |= bases
        found[BASE] = draw(cond)
        trained.nets |= own
    if trained.draws.makes in batch:
        device = trained.hardware.device
        rng = ProgressRng(settings.seed, 0, "following", batch.positions, device)
        latents = trained.objective.clean(batch.on(device), rng)  # type: ignore[attr-defined]  # of denoisers, which alone are told pictures
        found[DECODED] = trained.decoded(latents).cpu()
    return found


def _overlaps(trained: Trained, name: str, given: Tensor, made: Mapping[str, Tensor], within: int) -> dict[str, Any]:
    encoder, marks = trained.dataset.encoders.get(name, {}), given.mean(1) > 0
    found: dict[str, Any] = {}
    for end, pictures in made.items():
        again = [made_as(encoder, one, f"following: {name}") for one in to_uint8(pictures).permute(0, 3, 1, 2)]
        own = torch.stack(again).float().mean(1) > 127.5
        found[f"overlap{end}"] = float(overlap(own, marks, within).mean())
        if end == SAMPLES:
            found["overlap_others"] = float(overlap(own, marks.roll(1, 0), within).mean())
    return found


def _nearness(trained: Trained, given: Tensor, made: Mapping[str, Tensor]) -> dict[str, Any]:
    spec = trained.recipe.data.encoders.get(IMAGE_PROMPT)
    if not isinstance(spec, Mapping):
        raise UserError(f"following: recipe {trained.recipe.name} names no data.encoders.{IMAGE_PROMPT}")
    conditioner = ImagePromptConditioner(spec, trained.place.data_root, str(trained.hardware.device))

    def embedded(pictures: Tensor) -> Tensor:
        read = conditioner.encode(list(to_uint8(pictures).permute(0, 3, 1, 2)))
        return _pooled(torch.stack([torch.from_numpy(one[IMAGE_PROMPT]).float() for one in read]))

    found: dict[str, Any] = {}
    for end, pictures in made.items():
        found[f"nearer{end}"] = nearer(embedded(pictures), _pooled(given))
        if DECODED in made and end != DECODED:
            found[f"nearer_pixels{end}"] = nearer(pictures.flatten(1), made[DECODED].flatten(1))
    return found


def _pooled(states: Tensor) -> Tensor:
    return states.mean(1) if states.ndim == 3 else states
