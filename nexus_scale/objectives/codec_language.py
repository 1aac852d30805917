"""Neural codec language modelling: codes of speech as a language, the first codebook token by token, the others level by level.

Source: Wang et al. 2023, "Neural Codec Language Models are Zero-Shot Text to Speech Synthesizers" (VALL-E), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Loss,
    Nets,
    Objective,
    Phase,
    Request,
    Rng,
    TokenSampler,
    UserError,
)
from nexus_scale.objectives.token_scores import Scored, score_codes, with_end


class Prompted(NamedTuple):
    """A sequence whose first frames are an acoustic prompt: `codes` (B, T, K), `real` and `prompt` (B, T) bool."""

    codes: Tensor
    real: Tensor
    prompt: Tensor


class CodecLanguage(Objective):
    """Two networks and two phases on the same batches.

    `ar`: `ar(codes, cond) -> logits` of codebook 0 and its end, and for sampling `prefill` and `extend`. `nar`: `nar(codes, level,
    cond) -> logits` of codebook `level`; the level is drawn once a step, equal on all ranks. Either loss is the mean over samples of
    the mean over a sample's codes: a long utterance weighs no more than a short one, and padding nothing.

    Draws: `level` (shared), `prompt`.
    """

    def __init__(
        self,
        *,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        prompt: Literal["prefix", "segment"] = "prefix",
        prompt_frames: int = 225,
    ):
        """
        Args:
            num_codebooks: K.
            codebook_size: V.
            prompt: what the second network is shown of the voice: the first quarter to half of the utterance itself (`prefix`,
                prefix mode 1 of the public implementations, but drawn for each sample), or a random quarter of it put before
                it (`segment`, the paper's, their mode 2).
            prompt_frames: length of the prompt at most; 225 are three seconds at 75 codes a second.
        """
        for name, value, least in (
            ("num_codebooks", num_codebooks, 2),
            ("codebook_size", codebook_size, 1),
            ("prompt_frames", prompt_frames, 1),
        ):
            if value < least:
                raise UserError(f"objective.{name}: got {value}; expected at least {least}")
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.prompt, self.prompt_frames = prompt, prompt_frames

    @property
    def needs(self) -> Sequence[str]:
        return ("ar", "nar")

    @property
    def fields(self) -> Sequence[str]:
        return ("codes", "codes_mask", "phonemes", "phonemes_mask")

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("ar", trains="ar"), Phase("nar", trains="nar", draws=False))

    # -------------------------------------------------------------------------------------- a batch's parts

    @staticmethod
    def condition(batch: Batch) -> dict[str, Tensor]:
        """The text: `phonemes` (B, L) and `phonemes_mask`."""
        return {"phonemes": batch["phonemes"], "phonemes_mask": batch["phonemes_mask"]}

    def _codes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        codes, real = batch["codes"], batch["codes_mask"]
        if codes.shape[2] < self.num_codebooks:
            raise ValueError(
                f"codes have {codes.shape[2]} codebooks, objective.num_codebooks is {self.num_codebooks}; make them with a codec "
                "that has as many, or set objective and networks to theirs"
            )
        return codes[..., : self.num_codebooks], real

    def _first(self, nets: Nets, batch: Batch) -> Scored:
        """Scores of codebook 0, predicted from each code's predecessors, and of the end after the last code."""
        codes, real = self._codes(batch)
        T = real.shape[1]
        targets, wanted = with_end(codes[..., 0], real, self.codebook_size)  # (B, T + 1) each
        logits = nets["ar"](codes[..., 0], self.condition(batch))
        if logits.shape[1:] not in ((T, self.codebook_size + 1), (T + 1, self.codebook_size + 1)):
            raise ValueError(
                f"network ar returned {tuple(logits.shape)} for {T} frames; expected {self.codebook_size + 1} logits at each: set "
                "networks.ar.codebook_size to objective.codebook_size"
            )
        unseen = T + 1 - logits.shape[1]  # without a begin token nothing predicts the first code
        return score_codes(logits, targets[:, unseen:], wanted[:, unseen:])

    def _level(self, nets: Nets, batch: Batch, prompted: Prompted, level: int) -> Scored:
        """Scores of codebook `level`, at frames outside the prompt."""
        cond = self.condition(batch) | {"codes_mask": prompted.real, "prompt": prompted.prompt}
        logits = nets["nar"](prompted.codes, level, cond)
        if logits.shape[2] != self.codebook_size:
            raise ValueError(
                f"network nar returned {logits.shape[2]} logits, objective.codebook_size is {self.codebook_size}; set them to match"
            )
        return score_codes(logits, prompted.codes[..., level], prompted.real & ~prompted.prompt)

    def prompted(self, batch: Batch, rng: Rng) -> Prompted:
        """The second network's input, with prompts from the batch's own utterances."""
        (codes, real), u = self._codes(batch), rng.uniform("prompt")
        lengths, T = real.sum(1), real.shape[1]
        if self.prompt == "prefix":
            shown = ((0.25 + 0.25 * u) * lengths).long().clamp(max=self.prompt_frames)
            return Prompted(codes, real, torch.arange(T, device=real.device) < shown[:, None])
        shown = (lengths // 4).clamp(max=self.prompt_frames)  # (B,)
        start = (u * (lengths - shown + 1)).long()
        longest = min(T // 4, self.prompt_frames)
        segments = _rows(codes, start[:, None] + torch.arange(longest, device=real.device))
        return put_before(segments, shown, codes, lengths)

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Cross-entropy of codebook 0 (phase `ar`), or of one random level (phase `nar`), in nats per code.

        Metrics: `loss`, `accuracy`, `top10`.
        """
        if phase == "ar":
            scored = self._first(nets, batch)
        else:
            level = int(torch.randint(1, self.num_codebooks, (), generator=rng.shared("level")))
            scored = self._level(nets, batch, self.prompted(batch, rng), level)
        total = scored.loss.mean()
        return Loss(total, {"loss": total.detach(), "accuracy": scored.accuracy.mean(), "top10": scored.top.mean()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """All codebooks, with fixed prompts.

        Returns:
            `loss`, nats a code, the mean over codebooks; `loss_zero`, of one who knows nothing (all tokens alike); `accuracy`; and
            `loss_book<k>`; each (B,) float32.
        """
        prompted = self.prompted(batch, rng)
        books = [self._first(nets, batch)]
        books += [self._level(nets, batch, prompted, level) for level in range(1, self.num_codebooks)]
        losses = torch.stack([book.loss for book in books])  # (K, B)
        zero = (math.log(self.codebook_size + 1) + (self.num_codebooks - 1) * math.log(self.codebook_size)) / len(books)
        return {
            "loss": losses.mean(0),
            "loss_zero": torch.full_like(losses[0], zero),
            "accuracy": torch.stack([book.accuracy for book in books]).mean(0),
            **{f"loss_book{k}": loss for k, loss in enumerate(losses)},
        }

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws(
            "codes",
            takes=frozenset({"prompt", "sampler", "voice", "length"}),
            conditions=("phonemes",),
            given=("codes", "codes_mask"),
            walks="logits",
            prompt_frames=self.prompt_frames,
            levels=self.num_codebooks,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """A batch's own utterances, told their text and their first third, at most `prompt_frames`, and spoken from there: the paper's
        VALL-E-continual."""
        codes, real = self._codes(batch)
        shown = (real.sum(1) // 3).clamp(min=1, max=self.prompt_frames)
        first = codes[:, : self.prompt_frames]  # (B, P, K)
        text = self.condition(batch)
        cond = text | {"sentence": text["phonemes"], "sentence_mask": text["phonemes_mask"]}
        mask = torch.arange(first.shape[1], device=real.device) < shown[:, None]
        return cond, replace(request, given={"codes": first, "codes_mask": mask}, continues=True)

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Codes of a sentence in the voice of an acoustic prompt, (B, T, K), 0 after each one's length; where the prompt is the
        sentence's own beginning (`request.continues`), they begin with it.

        Args:
            cond: `phonemes` (B, L) of the prompt and, after it, of the sentence, with `phonemes_mask`; `sentence` (B, L') and
                `sentence_mask`, those of the sentence alone.
            request: `given` are the prompt's `codes` (B, P, K) with `codes_mask`; the sampler is for the first codebook, of the others the
                likeliest codes are taken. With `known`, the first codebooks of samples whose beginning the prompt is, the second network
                draws the rest.
        """
        prompt, shown = request.given["codes"][..., : self.num_codebooks], request.given["codes_mask"].sum(1)
        done = 0

        def passed(steps: int) -> None:
            nonlocal done
            done += 1
            request.progress(done, steps)

        if request.known is None:
            tokens, lengths, ended = self._tokens(nets, cond, request, prompt, shown, rng, passed)
        else:
            if request.lengths is None or not request.continues:
                raise UserError(
                    "codes of the first levels are known of samples of known lengths, which the prompt begins"
                )
            lengths, ended = request.lengths.to(shown) - shown, torch.ones_like(shown, dtype=torch.bool)
            places = torch.arange(int(lengths.max()), device=shown.device)
            tokens = _rows(request.known.to(prompt), shown[:, None] + places)
        last = partial(passed, done + self.num_codebooks - tokens.shape[2])
        codes = self._levels(nets, cond, prompt, shown, tokens, lengths, last)
        if request.continues:
            return Generated(codes, shown + lengths, ended)
        places = torch.arange(tokens.shape[1], device=codes.device)
        spoken = _rows(codes, shown[:, None] + places)
        return Generated(spoken * (places < lengths[:, None])[..., None], lengths, ended)

    def _tokens(
        self,
        nets: Nets,
        cond: Cond,
        request: Request,
        known: Tensor,
        shown: Tensor,
        rng: Rng,
        passed: Callable[[int], None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the first codebook (B, T, 1), how many each row has (B,), and whether the network itself ended it (B,)."""
        sampler: TokenSampler = self.sampler_of(request)
        text = {name: cond[name] for name in ("phonemes", "phonemes_mask")}
        cache: Any = None

        def logits(tokens: Tensor | None) -> Tensor:
            nonlocal cache
            if tokens is not None:
                following: Tensor = nets["ar"].extend(tokens, cache)
                return following
            first, cache = nets["ar"].prefill(known[..., 0], shown, text, sampler.steps)
            return first

        def finished(here: bool) -> bool:
            passed(sampler.steps + self.num_codebooks - 1)
            return request.everywhere(here)

        tokens, lengths, ended = sampler.sample(logits, end=self.codebook_size, rng=rng, finished=finished)
        return tokens[..., None], lengths, ended

    def _levels(
        self,
        nets: Nets,
        cond: Cond,
        known: Tensor,
        shown: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        passed: Callable[[], None],
    ) -> Tensor:
        """The prompt, then all codebooks of the generated speech, (B, P + T, K), 0 after the end, from its first ones (B, T, k)."""
        begun = tokens.shape[2]
        spoken = F.pad(tokens, (0, self.num_codebooks - begun))  # (B, T, K)
        codes, real, prompt = put_before(known, shown, spoken, lengths)
        text = {name: cond[name] for name in ("phonemes", "phonemes_mask")}
        if self.prompt == "segment":  # in training the segment comes without its words
            text = {"phonemes": cond["sentence"], "phonemes_mask": cond["sentence_mask"]}
        for level in range(begun, self.num_codebooks):
            found = nets["nar"](codes, level, text | {"codes_mask": real, "prompt": prompt}).argmax(2)  # (B, P + T)
            codes[..., level] = torch.where(prompt, codes[..., level], found)
            passed()
        return torch.where(real[..., None], codes, 0)


def _rows(codes: Tensor, places: Tensor) -> Tensor:
    """Frames of codes (B, T, K) at positions (B, T'); beyond the end, the last frame: (B, T', K)."""
    places = places.clamp(max=codes.shape[1] - 1)[..., None]
    return codes.gather(1, places.expand(-1, -1, codes.shape[2]))


def put_before(first: Tensor, first_lengths: Tensor, then: Tensor, then_lengths: Tensor) -> Prompted:
    """Each prompt directly before its sequence, without padding between: (B, P, K) and (B, T, K) -> (B, P + T, K)."""
    P, T = first.shape[1], then.shape[1]
    places = torch.arange(P + T, device=then.device)
    prompt = places < first_lengths[:, None]  # (B, P + T)
    # Of the padded prompts and sequences side by side: the prompt's frames, then from P on the sequence's.
    source = torch.where(prompt, places, P + places - first_lengths[:, None])
    real = places < (first_lengths + then_lengths)[:, None]
    codes = _rows(torch.cat([first, then], dim=1), source)
    return Prompted(torch.where(real[..., None], codes, 0), real, prompt)
