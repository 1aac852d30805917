"""Predicting hidden tokens: of one level of codes some are hidden, and the network is asked for them, given the levels before.

Source: Chang et al. 2022 (MaskGIT), section 3.1; Borsos et al. 2023 (SoundStorm), section 3.2, for levels; the prompt and how often a level
is trained are as in MaskGCT's code (Wang et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Loss,
    MaskSampler,
    Nets,
    Phase,
    Request,
    Rng,
    UserError,
    Word,
)
from nexus_scale.objectives.token_fields import TokenObjective
from nexus_scale.objectives.token_scores import TokenLoss, score_codes
from nexus_scale.processes.token_masks import Levels, find_masks, hide, hide_each, level_weights

Share = Annotated[float, Field(ge=0, le=1)]


class Hidden(NamedTuple):
    """What the network is shown: `codes` (B, T, K), V where one is hidden; `asked` (B, T) bool, the hidden ones of the level; `prompt`
    (B, T) bool, frames of which all levels are shown."""

    codes: Tensor
    asked: Tensor
    prompt: Tensor


class Masked(TokenObjective):
    """One network, `model(codes, level, cond) -> logits` (B, T, V) of codebook `level`: codes (B, T, K) of the levels before it, of its own
    those that are not hidden, and V for all others. `cond` has `codes_mask` and `prompt` (B, T) bool besides.

    The level is drawn once a step, equal on all ranks. The loss is the mean over samples of the mean over a sample's hidden codes.
    Draws: `level` (shared), `times`, `hidden`, `prompt`, `prompted`, `drop`.
    """

    def __init__(
        self,
        *,
        field: str = "codes",
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        schedule: str | dict[str, Any] = "cosine",
        hides: Literal["each", "count"] = "each",
        levels: Levels = "uniform",
        first_level: int = 0,
        prompt: Share = 0.0,
        prompt_drop: Share = 0.0,
        conditions: tuple[str, ...] = (),
        condition_drop: float | dict[str, Annotated[float, Field(ge=0, le=1)]] = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        """
        Args:
            field: the batch's codes, (B, T, K), or (B, T) of one level; `<field>_mask` goes along.
            num_codebooks: K, the levels; of codes that have more, the first.
            codebook_size: V.
            schedule: what share of the level is hidden at a time, which is drawn uniformly; see `processes.token_masks`.
            hides: each code by itself with that probability, at least one (SoundStorm, MaskGCT), or that share of them, rounded up
                (MaskGIT).
            levels: how often each level is trained: alike, coarse ones more often, or as often as a weight for each says, see
                `level_weights`.
            first_level: levels before it are always given.
            prompt: share of each sample, at most, whose first frames are shown with all their levels and not asked for; drawn uniformly.
            prompt_drop: probability that a sample is shown none.
            conditions: what the network is told, batch fields; `<name>_mask` goes along.
            condition_drop: probability that a sample loses all of them, so that guidance has something to start from; by name, each is lost
                independently.
            label_smoothing, z_loss: see `TokenLoss`.
        """
        super().__init__(
            field, num_codebooks, codebook_size, conditions, condition_drop, TokenLoss(label_smoothing, z_loss)
        )
        if not 0 <= first_level < num_codebooks:
            raise UserError(f"objective.first_level: got {first_level}; expected 0 to {num_codebooks - 1}")
        for name, share, most in (("prompt", prompt, "below 1"), ("prompt_drop", prompt_drop, "at most 1")):
            if not 0 <= share <= 1 or (name == "prompt" and share == 1):
                raise UserError(f"objective.{name}: got {share}; expected a share of at least 0 and {most}")
        self.schedule, self.hides = find_masks(schedule, "objective.schedule"), hides
        self.first_level, self.level_weights = first_level, level_weights(levels, num_codebooks, first_level)
        self.prompt, self.prompt_drop = prompt, prompt_drop

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    # -------------------------------------------------------------------------------------- a batch's parts

    def hidden(self, codes: Tensor, asked: Tensor, prompt: Tensor, level: int) -> Hidden:
        """Codes (B, T, K) as they are shown: without the levels after `level`, and of it without those that are `asked` for."""
        k = torch.arange(codes.shape[2], device=codes.device)
        away = (k > level) & ~prompt[..., None] | (k == level) & asked[..., None]
        return Hidden(torch.where(away, self.codebook_size, codes), asked, prompt)

    def _drawn_prompt(self, real: Tensor, rng: Rng) -> Tensor:
        """(B, T) bool, of each sample's first frames."""
        if not self.prompt:
            return torch.zeros_like(real)
        shown = (rng.uniform("prompt") * self.prompt * real.sum(1)).long()
        shown = torch.where(rng.uniform("prompted") < self.prompt_drop, 0, shown)
        return torch.arange(real.shape[1], device=real.device) < shown[:, None]

    def _drawn(self, batch: Batch, rng: Rng, level: int) -> Hidden:
        """What a step of training shows of a batch."""
        codes, real = self.codes(batch)
        prompt = self._drawn_prompt(real, rng)
        may, u = real & ~prompt, rng.uniform("hidden", real.shape[1:])
        share = self.schedule.share(rng.uniform("times"))
        if self.hides == "each":
            return self.hidden(codes, hide_each(u, share, may), prompt, level)
        return self.hidden(codes, hide(u, (share * may.sum(1)).ceil().clamp(min=1), may), prompt, level)

    def _logits(self, nets: Nets, shown: Hidden, level: int, cond: Cond, real: Tensor) -> Tensor:
        logits: Tensor = nets["model"](shown.codes, level, {**cond, "codes_mask": real, "prompt": shown.prompt})
        expected = (*real.shape, self.codebook_size)
        if logits.shape != expected:
            raise ValueError(
                f"network model returned logits {tuple(logits.shape)}; expected {tuple(expected)}: set its codebook_size to the "
                "objective's"
            )
        return logits

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Cross-entropy in nats a hidden code. Metrics: see `TokenLoss`."""
        level = int(torch.multinomial(self.level_weights, 1, generator=rng.shared("level")))
        shown = self._drawn(batch, rng, level)
        (codes, real), cond = self.codes(batch), self.condition_drop(self.condition(batch), rng)
        logits = self._logits(nets, shown, level, cond, real)
        return self.token_loss(logits, codes[..., level], shown.asked)

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """All levels, without a prompt, of each as many codes hidden as a uniform draw says: the mean over draws is what all codes cost
        that become known one by one in random order, level after level, and no less than the entropy of the data.

        Source: Uria et al. 2014, "A Deep and Tractable Density Estimator", equation 8.
        Returns:
            `loss`, nats a code, the mean over levels; `loss_zero`, of one who knows nothing; `accuracy`; of several levels `loss_book<k>`;
            each (B,) float32.
        """
        (codes, real), cond = self.codes(batch), self.condition(batch)
        books = []
        for level in range(self.first_level, self.num_codebooks):
            count = (rng.uniform(f"times_{level}") * real.sum(1)).long() + 1
            asked = hide(rng.uniform(f"hidden_{level}", real.shape[1:]), count, real)
            shown = self.hidden(codes, asked, torch.zeros_like(real), level)
            books.append(score_codes(self._logits(nets, shown, level, cond, real), codes[..., level], asked))
        losses = torch.stack([book.loss for book in books])  # (K, B)
        each = {f"loss_book{self.first_level + k}": loss for k, loss in enumerate(losses)} if len(books) > 1 else {}
        return {
            "loss": losses.mean(0),
            "loss_zero": torch.full_like(losses[0], math.log(self.codebook_size)),
            "accuracy": torch.stack([book.accuracy for book in books]).mean(0),
            **each,
        }

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        takes: set[Word] = {"sampler", "steps"}
        if self.conditions:
            takes |= {"prompt", "guidance", "negative"}
        return Draws(
            self.field,
            takes=frozenset(takes),
            conditions=self.conditions,
            given=(self.field,) if self.first_level else (),
            walks="masks",
            drops=self.condition_drop.drops,
            levels=self.num_codebooks,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """Samples of a batch's lengths, told its conditions; where levels are always given, the batch's own."""
        codes, real = self.codes(batch)
        mask = f"{self.field}_mask"
        request = replace(request, shape=tuple(codes.shape[1:]), lengths=real.sum(1) if mask in batch else None)
        if self.first_level:
            request = replace(request, given={**request.given, self.field: codes, mask: real})
        return self.condition(batch), request

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Codes (B, T, K) of `request.shape`, 0 after each one's end.

        Args:
            cond: the conditions.
            request: `given` may have codes under `field`, (B, P, K), with their mask: with levels that are always given (`first_level`)
                those of all frames, otherwise the beginning, which comes back; `known`, levels of all frames; `lengths` (B,).
        """
        sampler: MaskSampler = self.sampler_of(request)
        T, B, device = request.shape[0], len(rng.positions), rng.uniform("begin").device
        known, there = self.given(request, B, device)
        codes, there = F.pad(known, (0, 0, 0, T - known.shape[1])), F.pad(there, (0, T - there.shape[1]))
        lengths = torch.full((B,), T, device=device) if request.lengths is None else request.lengths.to(device)
        real = torch.arange(T, device=device) < lengths[:, None]
        prompt = torch.zeros_like(there) if self.first_level else there
        first = self.first_level
        if request.known is not None:
            first = max(first, request.known.shape[2])
            codes = torch.cat([request.known.to(codes), codes[..., request.known.shape[2] :]], dim=2)
        open_ = (real & ~prompt)[..., None].expand_as(codes)
        open_ = open_ & (torch.arange(self.num_codebooks, device=device) >= first)
        told = self.told(cond, request)
        beside = {"codes_mask": told.rows(real), "prompt": told.rows(prompt)}

        def logits(codes: Tensor, level: int) -> Tensor:
            found: Tensor = nets["model"](told.rows(codes), level, {**told.cond, **beside})
            return told.guided(found)

        levels = range(first, self.num_codebooks)
        made = sampler.sample(
            logits, codes, open_, mask=self.codebook_size, levels=levels, rng=rng, progress=request.progress
        )
        return Generated(torch.where(real[..., None], made, 0), None if request.lengths is None else lengths)
