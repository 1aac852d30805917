"""What draws a run in its current state while it trains, by all ranks, and how ranks bring their samples together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nexus_scale.callbacks.samples import Sample
from nexus_scale.conditioners.label import captioned
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import Batch, Engine, Generated, Objective, Request
from nexus_scale.engine import distributed
from nexus_scale.generate.drawing import request_of
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media import Medium
from nexus_scale.media.audio import cut
from nexus_scale.media.pictures import STRIP, to_uint8


class Drawing:
    """Draws a run in its current state, with its first average. Every rank draws an equal part, so that all run the same number of
    forwards.

    Args:
        held_out: whose conditions samples have, in a fixed order.
    """

    def __init__(self, recipe: Recipe, objective: Objective, held_out: Any, shows: Shows):
        self.objective, self.held_out, self.shows, self.seed = objective, held_out, shows, recipe.seed
        self.average = next(iter(recipe.averages()), next(iter(recipe.trained())))
        self.bases = {name: adapter.adapts for name, adapter in recipe.adapters().items()}
        self.asked = replace(request_of(recipe, objective), everywhere=lambda done: not distributed.any_rank(not done))

    def __call__(self, engine: Engine, count: int, beside: bool = False) -> list[Sample] | None:
        """What the sample callback shows: on rank 0. A collective.

        Args:
            beside: pictures that bases draw of the same noise without their adapters stand to the left.
        """
        found = self._gathered(engine, count, {})
        if beside and isinstance(self.shows, Pictures):
            left = self._gathered(engine, count, self.bases)
            found = {place: (number, torch.cat([left[place][1], one], dim=1)) for place, (number, one) in found.items()}
        if engine.rank:
            return None
        ordered = [found[place] for place in sorted(found)]
        captions = captions_of(self.held_out, [number for number, _ in ordered])
        return [self.shows.shown(caption, drawn) for caption, (_, drawn) in zip(captions, ordered, strict=True)]

    def _gathered(self, engine: Engine, count: int, others: Mapping[str, str]) -> dict[int, tuple[int, Tensor]]:
        """By place in the fixed order: the sample's number, and what was drawn, on rank 0. A collective.

        Args:
            others: networks that compute in the place of some, by name.
        """
        found: dict[int, tuple[int, Tensor]] = {}
        for batch, request, made in self._drawn(engine, count, others=others):
            drawn = distributed.gather(self.shows.one_shape(request, made))
            places, numbers = distributed.gather(batch.positions), distributed.gather(batch.samples)
            if drawn is not None and places is not None and numbers is not None:
                found |= dict(zip(places.tolist(), zip(numbers.tolist(), drawn, strict=True), strict=True))
        return found

    def own(self, engine: Engine, count: int, anew: bool = False) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's samples in model space, with the batches whose conditions they have; the last of a batch is drawn by several ranks
        where they do not divide it. A collective.

        Args:
            anew: a family that rebuilds what it is given draws from its latents instead, where it has some.
        """
        for batch, _, made in self._drawn(engine, count, anew):
            yield batch, made.samples

    def decoded(self, samples: Tensor) -> Tensor:
        """Samples of one shape as one sees or hears them, (B, ...)."""
        return torch.stack(self.shows.medium.decode(samples))

    def _drawn(
        self, engine: Engine, count: int, anew: bool = False, others: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[tuple[Batch, Request, Generated]]:
        world, rank, objective = engine.world_size, engine.rank, self.objective
        anew = anew and objective.draws is not None and objective.draws.latent is not None
        nets = (
            {**engine.nets, **{name: engine.nets[other] for name, other in others.items()}} if others else engine.nets
        )
        with engine.weights(self.average):
            for whole in self.held_out.fixed(min(count, self.held_out.samples), batch=AT_ONCE * world):
                each = -(-len(whole) // world)
                own = torch.arange(rank * each, (rank + 1) * each).clamp(max=len(whole) - 1)
                batch = rows_of(whole, own).on(engine.device)
                rng = ProgressRng(self.seed, 0, "draw", batch.positions, engine.device)
                cond, request = objective.request_like(batch, self.asked)
                request = replace(request, given={}) if anew else request
                yield batch, request, objective.generate(nets, cond, request, rng)


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some of a batch's samples, (n,) places in it."""
    fields = {name: value[rows] for name, value in batch.fields.items()}
    return replace(batch, fields=fields, positions=batch.positions[rows], samples=batch.samples[rows])


AT_ONCE = 64
"""Samples that a rank draws together, at most."""


class Pictures:
    """Images (B, H, W, 3) uint8, strips of frames for clips; what was rebuilt or translated stands below what was given.

    Args:
        fields: that may have been given.
    """

    def __init__(self, fields: Sequence[str], medium: Medium):
        self.fields, self.medium = fields, medium

    def one_shape(self, request: Request, made: Generated) -> Tensor:
        """The tensor that ranks gather: one shape on all of them."""
        given = next((request.given[field] for field in self.fields if field in request.given), None)
        if given is not None:
            return to_uint8(torch.cat([given, made.samples], dim=-2))
        if made.lengths is None:
            return torch.cat([to_uint8(one[None]) for one in self.medium.decode(made.samples)])
        clips = self.medium.decode(made.samples, lengths=made.lengths.tolist())
        width = STRIP * clips[0].shape[-1]  # all strips are as wide as the longest may be
        strips = [to_uint8(one[None]) for one in clips]
        return torch.cat([torch.nn.functional.pad(one, (0, 0, 0, width - one.shape[2]), value=255) for one in strips])

    def shown(self, caption: str, drawn: Tensor) -> Sample:
        return Sample(caption, drawn.cpu().numpy())


class Sounds:
    """Waveforms (B, C, T), or codes of a codec (B, T, K) with each one's end marked."""

    def __init__(self, medium: Medium):
        self.medium = medium

    def one_shape(self, request: Request, made: Generated) -> Tensor:
        if made.lengths is None:
            return made.samples
        codes = made.samples
        real = torch.arange(codes.shape[1], device=codes.device) < made.lengths[:, None]
        return cut(codes, real)

    def shown(self, caption: str, drawn: Tensor) -> Sample:
        (wave,) = self.medium.decode(drawn[None])
        assert self.medium.rate_hz is not None
        mono = wave.mean(0).float().clamp(-1, 1).cpu().numpy()
        return Sample(caption, self.medium.picture(wave), mono, int(self.medium.rate_hz))


class Dots:
    """Points (B, D)."""

    def __init__(self, medium: Medium):
        self.medium = medium

    def one_shape(self, request: Request, made: Generated) -> Tensor:
        return made.samples

    def shown(self, caption: str, drawn: Tensor) -> Sample:
        return Sample(caption, self.medium.picture(drawn))


Shows = Pictures | Sounds | Dots
"""How what one draws is gathered and shown."""


def captions_of(dataset: Any, samples: Sequence[int]) -> list[str]:
    """Captions of samples where the data carry them, else their keys."""
    captions: list[str] = dataset.texts("caption", samples) if captioned(dataset) else dataset.keys(samples)
    return captions
