"""Next-token prediction over one or several streams of tokens: each step from all before it, and from what is given.

Source: Copet et al. 2023 (MusicGen), sections 2.2 and 2.3, for several streams; Kondratyuk et al. 2023 (VideoPoet), section 3.2, for a
prefix that is seen both ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

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
    Nets,
    Phase,
    Request,
    Rng,
    TokenSampler,
    UserError,
    Word,
)
from nexus_scale.objectives.token_fields import Guided, TokenObjective
from nexus_scale.objectives.token_scores import TokenLoss, score_codes, with_end
from nexus_scale.processes.codebooks import find_pattern


class Read(NamedTuple):
    """A batch as the network reads it: `tokens` (B, S, K), the begin first; `targets` (B, S, K), what follows each step; `wanted`
    (B, S, K) bool, which of them count; `prefix` (B, S) bool, the steps that are given, None where none are."""

    tokens: Tensor
    targets: Tensor
    wanted: Tensor
    prefix: Tensor | None


class Autoregressive(TokenObjective):
    """One network, `model(tokens, cond) -> logits`: tokens (B, S, K) below V, and V where a stream has none at a step (the begin, and gaps
    of the pattern); logits (B, S, K, V) of the step after each, with `ends` of V + 1 tokens. With `prefix`, `cond["prefix"]` (B, S) marks
    the first steps that are given, which may see one another both ways.

    To draw, `prefill(tokens, cond, capacity) -> (logits (B, K, V) of the next step, memory)` and `extend(tokens (B, K), memory) -> logits`.

    The loss is the mean over samples of the mean over a sample's codes, of all streams alike. Draws: `drop`, `prefix`.
    """

    def __init__(
        self,
        *,
        field: str = "codes",
        num_codebooks: int = 4,
        codebook_size: int = 2048,
        pattern: str | dict[str, Any] = "delay",
        ends: bool = False,
        prefix: float = 0.0,
        conditions: tuple[str, ...] = (),
        condition_drop: float | dict[str, Annotated[float, Field(ge=0, le=1)]] = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        """
        Args:
            field: the batch's codes, (B, T, K), or (B, T) of one stream; `<field>_mask` goes along.
            num_codebooks: K, the streams; of codes that have more, the first.
            codebook_size: V.
            pattern: in which order codes are predicted, see `processes.codebooks`.
            ends: a token V ends each sample, of one stream; without it samples are as long as they are asked for.
            prefix: share of each sample, at most, that is given to the network and not predicted, as long in each as is drawn; 0: none.
            conditions: what the network is told, batch fields; `<name>_mask` goes along.
            condition_drop: probability that a sample loses all of them, so that guidance has something to start from; by name, each is lost
                independently.
            label_smoothing, z_loss: see `TokenLoss`.
        """
        super().__init__(
            field, num_codebooks, codebook_size, conditions, condition_drop, TokenLoss(label_smoothing, z_loss)
        )
        if not 0 <= prefix < 1:
            raise UserError(f"objective.prefix: got {prefix}; expected a share in [0, 1)")
        self.pattern = find_pattern(pattern, num_codebooks)
        if ends and num_codebooks > 1:
            raise UserError(f"objective.ends: got {num_codebooks} codebooks; a token ends samples of one stream alone")
        if prefix and self.pattern.needs_length:
            raise UserError("objective.prefix: with pattern coarse_to_fine no prefix has all codes of its frames")
        self.ends, self.prefix = ends, prefix

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    # -------------------------------------------------------------------------------------- a batch's parts

    def read(self, batch: Batch, given: Tensor | None = None) -> Read:
        """The batch as the network reads it.

        Args:
            given: frames of each sample that are its prefix, (B,); None: no sample has any.
        """
        codes, real = self.codes(batch)
        whole = real
        if self.ends:
            ended, whole = with_end(codes[..., 0], real, self.codebook_size)
            codes = ended[..., None]
        made = self.pattern.apply(codes, self.codebook_size, whole)
        tokens, targets, wanted = made.tokens[:, :-1], made.tokens[:, 1:], made.filled[:, 1:]
        if given is None:
            return Read(tokens, targets, wanted, None)
        shown = torch.arange(codes.shape[1], device=given.device) < given[:, None]  # (B, T)
        known = self.pattern.apply(shown[..., None].expand_as(codes), False, whole).tokens  # (B, S + 1, K) bool
        # the begin, and the steps before the first that is not all given
        prefix = (known | ~made.filled).all(2).cumprod(1).bool()
        return Read(tokens, targets, wanted & ~known[:, 1:], prefix[:, :-1])

    def _logits(self, nets: Nets, read: Read, cond: Cond) -> Tensor:
        told = dict(cond) if read.prefix is None else {**cond, "prefix": read.prefix}
        logits: Tensor = nets["model"](read.tokens, told)
        expected = (*read.tokens.shape, self.codebook_size + int(self.ends))
        if logits.shape != expected:
            raise ValueError(
                f"network model returned logits {tuple(logits.shape)}; expected {tuple(expected)}: set its num_codebooks, codebook_size "
                "and ends to the objective's"
            )
        return logits

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Cross-entropy in nats a code. Metrics: see `TokenLoss`."""
        given = None
        if self.prefix:
            given = (rng.uniform("prefix") * self.prefix * self.codes(batch)[1].sum(1)).long()
        read = self.read(batch, given)
        logits = self._logits(nets, read, self.condition_drop(self.condition(batch), rng))
        return self.token_loss(logits.flatten(1, 2), read.targets.flatten(1, 2), read.wanted.flatten(1, 2))

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """Under the batch's own conditions, and without a prefix.

        Returns:
            `loss`, nats a code; `loss_zero`, of one who knows nothing; `accuracy`; of several streams `loss_book<k>`; each (B,) float32.
        """
        none = torch.zeros(len(batch), dtype=torch.int64, device=batch[self.field].device)
        read = self.read(batch, none if self.prefix else None)
        logits = self._logits(nets, read, self.condition(batch))
        books = [
            score_codes(logits[:, :, k], read.targets[..., k], read.wanted[..., k]) for k in range(logits.shape[2])
        ]
        losses = torch.stack([book.loss for book in books])  # (K, B)
        each = {f"loss_book{k}": loss for k, loss in enumerate(losses)} if len(books) > 1 else {}
        return {
            "loss": losses.mean(0),
            "loss_zero": torch.full_like(losses[0], math.log(logits.shape[3])),
            "accuracy": torch.stack([book.accuracy for book in books]).mean(0),
            **each,
        }

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        takes: set[Word] = {"sampler", "length", *(("begin",) if self.field == "codes" else ())}
        if self.conditions:
            takes |= {"prompt", "guidance", "negative"}
        if "chroma" in self.conditions:
            takes.add("melody")
        return Draws(
            self.field,
            takes=frozenset(takes),
            conditions=self.conditions,
            walks="logits",
            drops=self.condition_drop.drops,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        return self.condition(batch), request

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Codes (B, T, K): as many frames as the sampler has steps, or as are asked for.

        Args:
            cond: the conditions.
            request: `given` may have the beginning's codes under `field`, (B, P, K), with their mask; the samples go on from it and begin
                with it. `lengths` (B,): frames of each sample, which then share `shape[0]`.
        """
        sampler: TokenSampler = self.sampler_of(request)
        canvas = self._canvas(request, rng, sampler.steps)
        end = self.codebook_size if self.ends else None
        walk = Walk(nets["model"], canvas, self.told(cond, request), end=end, both_ways=self.prefix > 0)

        def finished(here: bool) -> bool:
            request.progress(walk.placed + 1, len(walk.numbers))
            return request.everywhere(here)

        drawn = sampler.sample(walk.logits, end=end, rng=rng, finished=finished, steps=walk.numbers)
        walk.finish(drawn.tokens)
        lengths = walk.begun - 1 + drawn.lengths if self.ends else canvas.lengths
        codes = self.pattern.revert(canvas.tokens, canvas.num_frames, lengths)
        if self.ends:
            return Generated(codes, lengths, drawn.ended)
        return Generated(codes, None if request.lengths is None else lengths)

    def _canvas(self, request: Request, rng: Rng, steps: int) -> Canvas:
        """The sequence that is to be drawn, with what is given of it."""
        B, device = len(rng.positions), rng.uniform("begin").device
        known, shown = self.given(request, B, device)
        T = request.shape[0] if request.lengths is not None else known.shape[1] + steps
        lengths = torch.full((B,), T, device=device) if request.lengths is None else request.lengths.to(device)
        real = torch.arange(T, device=device) < lengths[:, None]
        codes, given = F.pad(known, (0, 0, 0, T - known.shape[1])), F.pad(shown, (0, T - shown.shape[1]))
        made = self.pattern.apply(codes, self.codebook_size, real)
        there = self.pattern.apply(given[..., None].expand_as(codes), False, real).tokens
        return Canvas(made.tokens, made.filled & ~there, lengths, T)


class Canvas(NamedTuple):
    """A sequence that is being drawn: `tokens` (B, S, K), changed in place, `open` (B, S, K) bool, where codes are to be drawn, `lengths`
    (B,) and `num_frames` of its codes."""

    tokens: Tensor
    open: Tensor
    lengths: Tensor
    num_frames: int


class Walk:
    """Asks a network for one step of a canvas after the other, and puts into it what is drawn."""

    def __init__(self, net: Any, canvas: Canvas, told: Guided, *, end: int | None, both_ways: bool):
        self.net, self.canvas, self.told, self.end, self.both_ways = net, canvas, told, end, both_ways
        open_steps = canvas.open.any(2).any(0).cpu()  # (S,)
        if not bool(open_steps.any()):
            raise UserError("all of each sample is given: nothing is left to be drawn")
        self.begun = int(open_steps.int().argmax())  # steps before it are known in all rows
        self.numbers = range(self.begun - 1, len(open_steps) - 1)  # of the steps that are drawn, the begin not counted
        self.placed, self.memory = 0, None

    def logits(self, drawn: Tensor | None) -> Tensor:
        """(B, K, V) of the next step, given what was drawn for the one before, (B, K)."""
        if drawn is None:
            tokens, cond = self.told.rows(self.canvas.tokens[:, : self.begun]), self.told.cond
            if self.both_ways:
                cond = {**cond, "prefix": torch.ones_like(tokens[..., 0], dtype=torch.bool)}
            found, self.memory = self.net.prefill(tokens, cond, len(self.numbers))
        else:
            found = self.net.extend(self.told.rows(self._put(drawn)), self.memory)
        found = self.told.guided(found)
        return self._not_ended(found)

    def finish(self, drawn: Tensor) -> None:
        """Puts the last step in place, if there is one that no other followed: of all that was drawn, (B, n, K)."""
        if drawn.shape[1] > self.placed:
            self._put(drawn[:, -1])

    def _put(self, drawn: Tensor) -> Tensor:
        """The next step as it then is, (B, K): what was drawn, and what is known or empty."""
        step = self.begun + self.placed
        self.canvas.tokens[:, step] = torch.where(self.canvas.open[:, step], drawn, self.canvas.tokens[:, step])
        self.placed += 1
        return self.canvas.tokens[:, step]

    def _not_ended(self, logits: Tensor) -> Tensor:
        """Nothing ends a row where its code is known."""
        if self.end is None:
            return logits
        known = ~self.canvas.open[:, self.begun + self.placed]  # (B, K)
        return torch.where(known[..., None], F.pad(logits[..., :-1], (0, 1), value=-math.inf), logits)
