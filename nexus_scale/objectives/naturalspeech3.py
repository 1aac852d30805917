"""Factorised discrete diffusion: durations, then prosody, content and detail of speech, each drawn by masked decoding in the manner of a
prompt of its own, given the attributes before it.

Source: Ju et al. 2024, "NaturalSpeech 3: Zero-Shot Speech Synthesis with Factorized Codec and Diffusion Models", section 4. There is no
public code of it; what the paper leaves open is as in the objective `masked`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Guidance,
    Loss,
    MaskSampler,
    Nets,
    Objective,
    Phase,
    Request,
    Rng,
    Sampler,
    UserError,
)
from nexus_scale.objectives.codec_language import put_before
from nexus_scale.objectives.token_fields import Guided
from nexus_scale.objectives.token_scores import TokenLoss, score_codes
from nexus_scale.processes.alignment import aligned, frames_of
from nexus_scale.processes.guidance import concatenate
from nexus_scale.processes.token_masks import find_masks, hide, hide_each

Share = Annotated[float, Field(ge=0, lt=1)]
DURATION = "duration"


class Shown(NamedTuple):
    """What one of the networks is shown: `codes` (B, T, K), V where one is hidden, `asked` (B, T) bool, and `cond`."""

    codes: Tensor
    asked: Tensor
    cond: dict[str, Tensor]


class Prompt(NamedTuple):
    """How something was said: `codes` (B, P, K) with `there` (B, P) bool; `phonemes` and `phonemes_mask` (B, L), and the place in that text
    of each frame, `phones` (B, P); `durations` (B, L)."""

    codes: Tensor
    there: Tensor
    phonemes: Tensor
    phonemes_mask: Tensor
    phones: Tensor
    durations: Tensor


class NaturalSpeech3(Objective):
    """Networks `duration`, `prosody`, `content` and `detail`, a phase each on the same batch: `net(codes, level, cond) -> logits` of one
    level of codes (`factorised_diffusion`); and `codec`, a frozen factorised codec, which hears prompts and makes what is drawn audible.

    A batch has `codes` (B, T, K) of the codec with `codes_mask`, `phonemes` (B, L) with `phonemes_mask`, `durations` (B, L), how many
    frames each phone is said, and to draw by `timbre` (B, D). An attribute's network is shown all codes of the attributes before it, of
    its own level those that are not hidden; its loss is the mean over samples of the mean over a sample's hidden codes. Draws:
    `level_<attribute>` (shared), and by attribute `times`, `hidden`, `prompt`, `prompted`.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int = 16000,
        prosody_books: int = 1,
        content_books: int = 2,
        detail_books: int = 3,
        codebook_size: int = 1024,
        num_durations: int = 128,
        schedule: str | dict[str, Any] = "cosine",
        prompt: Share = 0.5,
        prompt_drop: Annotated[float, Field(ge=0, le=1)] = 0.15,
        prompt_frames: int = 240,
        label_smoothing: float = 0.0,
    ):
        """
        Args:
            sample_rate_hz: of the codec.
            prosody_books, content_books, detail_books: of the codec, in this order among its codes.
            codebook_size: V.
            num_durations: frames of a phone are 0 to this less 1; longer ones count as the last.
            schedule: what share of codes is hidden at a time, which is drawn uniformly; see `processes.token_masks`.
            prompt: share of each sample, at most, whose beginning is shown with all its codes and not asked for; drawn uniformly.
            prompt_drop: probability that a sample is shown none, so that guidance has something to start from; the paper's 0.15.
            prompt_frames: length of a prompt at most, when drawing.
            label_smoothing: see `TokenLoss`.
        """
        counts = {"prosody_books": prosody_books, "content_books": content_books, "codebook_size": codebook_size}
        for name, value in {**counts, "num_durations": num_durations, "prompt_frames": prompt_frames}.items():
            if value < 1:
                raise UserError(f"objective.{name}: got {value}; expected at least 1")
        if detail_books < 0:
            raise UserError(f"objective.detail_books: got {detail_books}; expected at least 0")
        self.sample_rate_hz, self.codebook_size, self.num_durations = sample_rate_hz, codebook_size, num_durations
        ends = (prosody_books, prosody_books + content_books, prosody_books + content_books + detail_books)
        self.levels = {"prosody": range(ends[0]), "content": range(ends[0], ends[1]), "detail": range(ends[1], ends[2])}
        self.levels = {name: levels for name, levels in self.levels.items() if levels}
        self.num_codebooks, self.prompt_frames = ends[2], prompt_frames
        self.schedule = find_masks(schedule, "objective.schedule")
        self.prompt, self.prompt_drop = prompt, prompt_drop
        self.token_loss = TokenLoss(label_smoothing, 0.0)

    @property
    def needs(self) -> Sequence[str]:
        return (DURATION, *self.levels, "codec")

    @property
    def fields(self) -> Sequence[str]:
        return ("codes", "codes_mask", "phonemes", "phonemes_mask", "durations", "timbre")

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase(DURATION, trains=DURATION), *(Phase(name, trains=name, draws=False) for name in self.levels))

    # -------------------------------------------------------------------------------------- a batch's parts

    def _codes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        codes, real = batch["codes"], batch["codes_mask"]
        if codes.shape[2] != self.num_codebooks:
            raise ValueError(
                f"codes have {codes.shape[2]} codebooks, the objective's attributes {self.num_codebooks}; set prosody_books, "
                "content_books and detail_books to the codec's"
            )
        return codes, real

    def _of_attribute(self, batch: Batch, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor], int]:
        """Tokens (B, T, K) of a network, which are real, what it is told, and how many different tokens there are."""
        cond = {"phonemes": batch["phonemes"], "phonemes_mask": batch["phonemes_mask"]}
        if name == DURATION:
            durations = batch["durations"].clamp(0, self.num_durations - 1)
            return durations[..., None], batch["phonemes_mask"], cond, self.num_durations
        codes, real = self._codes(batch)
        return codes, real, {**cond, "phones": frames_of(batch["durations"], codes.shape[1])}, self.codebook_size

    def _shown(
        self, codes: Tensor, asked: Tensor, prompt: Tensor, level: int, cond: Cond, real: Tensor, size: int
    ) -> Shown:
        """Codes as a network sees them: none of the levels after its own, but for the prompt's; of its own those not asked for."""
        k = torch.arange(codes.shape[2], device=codes.device)
        away = (k > level) & ~prompt[..., None] | (k == level) & asked[..., None]
        return Shown(torch.where(away, size, codes), asked, {**cond, "codes_mask": real, "prompt": prompt})

    def _drawn_prompt(self, name: str, real: Tensor, rng: Rng) -> Tensor:
        shown = (rng.uniform(f"prompt_{name}") * self.prompt * real.sum(1)).long()
        shown = torch.where(rng.uniform(f"prompted_{name}") < self.prompt_drop, 0, shown)
        return torch.arange(real.shape[1], device=real.device) < shown[:, None]

    def _logits(self, nets: Nets, name: str, level: int, shown: Shown, size: int) -> Tensor:
        logits: Tensor = nets[name](shown.codes, level, shown.cond)
        if logits.shape != (*shown.asked.shape, size):
            raise ValueError(
                f"network {name} returned logits {tuple(logits.shape)}; expected {(*shown.asked.shape, size)}: set its codebook_size "
                f"to the objective's {'num_durations' if name == DURATION else 'codebook_size'}"
            )
        return logits

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Cross-entropy in nats a hidden token of the attribute `phase`. Metrics: see `TokenLoss`."""
        codes, real, cond, size = self._of_attribute(batch, phase)
        levels = self.levels.get(phase, range(1))
        level = levels[int(torch.randint(len(levels), (), generator=rng.shared(f"level_{phase}")))]
        prompt = self._drawn_prompt(phase, real, rng)
        share, u = self.schedule.share(rng.uniform(f"times_{phase}")), rng.uniform(f"hidden_{phase}", real.shape[1:])
        asked = hide_each(u, share, real & ~prompt)
        shown = self._shown(codes, asked, prompt, level, cond, real, size)
        return self.token_loss(self._logits(nets, phase, level, shown, size), codes[..., level], asked)

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """All levels without a prompt, as the objective `masked`: of each as many hidden as a uniform draw says.

        Returns:
            `loss`, nats a token, the mean over attributes; `loss_zero`, of one who knows nothing; `loss_<attribute>` and
            `accuracy_<attribute>`, means over levels; each (B,) float32.
        """
        found: dict[str, Tensor] = {}
        for name in (DURATION, *self.levels):
            codes, real, cond, size = self._of_attribute(batch, name)
            scores = []
            for level in self.levels.get(name, range(1)):
                count = (rng.uniform(f"times_{name}_{level}") * real.sum(1)).long() + 1
                asked = hide(rng.uniform(f"hidden_{name}_{level}", real.shape[1:]), count, real)
                shown = self._shown(codes, asked, torch.zeros_like(real), level, cond, real, size)
                scores.append(score_codes(self._logits(nets, name, level, shown, size), codes[..., level], asked))
            found[f"loss_{name}"] = torch.stack([one.loss for one in scores]).mean(0)
            found[f"accuracy_{name}"] = torch.stack([one.accuracy for one in scores]).mean(0)
        loss = torch.stack([found[f"loss_{name}"] for name in (DURATION, *self.levels)]).mean(0)
        zero = (math.log(self.num_durations) + len(self.levels) * math.log(self.codebook_size)) / (1 + len(self.levels))
        return {"loss": loss, "loss_zero": torch.full_like(loss, zero), **found}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws(
            "audio",
            takes=frozenset({"prompt", "sampler", "steps", "guidance", "voice", "prosody", "timbre"}),
            conditions=("phonemes",),
            given=("codes", "codes_mask"),
            walks="masks",
            drops=self.prompt_drop > 0,
            prompt_frames=self.prompt_frames,
            sample_rate_hz=self.sample_rate_hz,
        )

    def misfit(self, sampler: Sampler, guidance: Guidance) -> str | None:
        if guidance.interval or guidance.channels or guidance.rescale or guidance.by:
            return "tokens under guidance other than one scale: give guidance a number"
        return None

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """A batch's own sentences, said after themselves: in their own manner and voice."""
        codes, real = self._codes(batch)
        said = {"phonemes": batch["phonemes"], "phonemes_mask": batch["phonemes_mask"]}
        cond = {
            **said,
            "sentence": batch["phonemes"],
            "sentence_mask": batch["phonemes_mask"],
            "voice": batch["phonemes"],
        }
        cond["voice_mask"] = batch["phonemes_mask"]
        return cond, replace(request, given={"codes": codes, "codes_mask": real, "timbre": batch["timbre"]})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Speech (B, 1, T) in [-1, 1], silent after each one's end.

        Args:
            cond: `sentence` (B, L) and `sentence_mask`, the phonemes to say; `voice` (B, L') and `voice_mask`, those of the prompt; where
                prosody has a prompt of its own, `prosody_voice` and `prosody_voice_mask`, those of it.
            request: `given` are the prompt's `codes` (B, P, K) with `codes_mask`; `timbre` (B, D); where durations and prosody follow
                another prompt, its `prosody_codes` with `prosody_codes_mask`.
        """
        sampler: MaskSampler = self.sampler_of(request)
        said, real = cond["sentence"], cond["sentence_mask"]
        voice = self._prompt(nets, cond, request, "voice", "codes")
        manner = (
            self._prompt(nets, cond, request, "prosody_voice", "prosody_codes")
            if "prosody_codes" in request.given
            else voice
        )
        draw = Drawing(self, nets, sampler, request, rng)
        durations = draw.durations(manner, said, real)
        frames = durations.sum(1).clamp(min=1)
        T = int(frames.max())
        codes = torch.zeros(len(said), T, self.num_codebooks, dtype=torch.int64, device=said.device)
        spoken = Prompt(
            codes, torch.arange(T, device=said.device) < frames[:, None], said, real, frames_of(durations, T), durations
        )
        for name in self.levels:
            spoken = spoken._replace(codes=draw.attribute(name, manner if name == "prosody" else voice, spoken))
        codec: Any = nets["codec"]
        waves: Tensor = codec.decode(spoken.codes, request.given["timbre"].float()).float().clamp(-1, 1)
        lengths = frames * codec.hop
        heard = torch.arange(waves.shape[2], device=waves.device) < lengths[:, None]
        return Generated(waves * heard[:, None], lengths)

    def _prompt(self, nets: Nets, cond: Cond, request: Request, text: str, codes: str) -> Prompt:
        """A prompt, cut to `prompt_frames`, with its phones where the codec hears them."""
        known, there = (request.given[name][:, : self.prompt_frames] for name in (codes, f"{codes}_mask"))
        phonemes, mask = cond[text], cond[f"{text}_mask"]
        heard = nets["codec"].phones(known).float().log_softmax(-1)  # (B, P, phones)
        scores = heard.gather(2, phonemes[:, None].expand(-1, known.shape[1], -1))
        durations = aligned(scores, there, phonemes, mask)
        return Prompt(known, there, phonemes, mask, frames_of(durations, known.shape[1]), durations)


class Drawing:
    """One call's draws of durations and attributes, each network given a prompt before what is said."""

    def __init__(self, of: NaturalSpeech3, nets: Nets, sampler: MaskSampler, request: Request, rng: Rng):
        self.of, self.nets, self.sampler, self.request, self.rng = of, nets, sampler, request, rng

    def durations(self, prompt: Prompt, said: Tensor, real: Tensor) -> Tensor:
        """Frames of each phone of the sentence, (B, L)."""
        size = self.of.num_durations
        known = prompt.durations.clamp(0, size - 1)[..., None]
        text, lengths = prompt.phonemes_mask.sum(1), real.sum(1)
        both = put_before(known, text, torch.zeros_like(said)[..., None], lengths)
        ids = put_before(prompt.phonemes[..., None], text, said[..., None], lengths).codes[..., 0]
        cond = {"phonemes": ids, "phonemes_mask": both.real}
        found = self._drawn(DURATION, both.codes, both.real, both.prompt, cond, range(1), size)
        return _taken(found, text, said.shape[1])[..., 0] * real

    def attribute(self, name: str, prompt: Prompt, spoken: Prompt) -> Tensor:
        """The codes of what is said with this attribute drawn, (B, T, K)."""
        shown, lengths = prompt.there.sum(1), spoken.there.sum(1)
        text, words = prompt.phonemes_mask.sum(1), spoken.phonemes_mask.sum(1)
        both = put_before(prompt.codes, shown, spoken.codes, lengths)
        ids = put_before(prompt.phonemes[..., None], text, spoken.phonemes[..., None], words)
        places = put_before(prompt.phones[..., None], shown, (spoken.phones + text[:, None])[..., None], lengths)
        cond = {"phonemes": ids.codes[..., 0], "phonemes_mask": ids.real, "phones": places.codes[..., 0]}
        size, levels = self.of.codebook_size, self.of.levels[name]
        found = self._drawn(name, both.codes, both.real, both.prompt, cond, levels, size)
        own = _taken(found, shown, spoken.codes.shape[1])
        return torch.where(spoken.there[..., None], own, 0)

    def _drawn(
        self, name: str, codes: Tensor, real: Tensor, prompt: Tensor, cond: Cond, levels: range, size: int
    ) -> Tensor:
        """Codes (B, T, K) with these levels drawn by a network, outside of the prompt."""
        scale, k = self.request.guidance.scale, torch.arange(codes.shape[2], device=codes.device)
        own = {**cond, "codes_mask": real, "prompt": prompt}
        away = {**own, "codes_mask": real & ~prompt, "prompt": torch.zeros_like(prompt)}
        told = Guided(own, None) if scale == 1 else Guided(concatenate(own, away), scale)
        told = Guided(away, None) if scale == 0 else told
        later = (k > levels[-1]) & ~prompt[..., None]

        def logits(shown: Tensor, level: int) -> Tensor:
            hidden = torch.where(later | ((k > level) & ~prompt[..., None]), size, shown)
            found: Tensor = self.nets[name](told.rows(hidden), level, told.cond)
            return told.guided(found)

        open_ = (real & ~prompt)[..., None] & (k >= levels[0]) & (k <= levels[-1])
        return self.sampler.sample(
            logits, codes, open_, mask=size, levels=levels, rng=Named(self.rng, name), progress=self.request.progress
        )


class Named:
    """Random numbers whose names begin with another, so that networks do not share draws."""

    def __init__(self, rng: Rng, name: str):
        self.rng, self.name = rng, name

    @property
    def positions(self) -> Tensor:
        return self.rng.positions

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.rng.normal(f"{self.name}_{name}", shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self.rng.uniform(f"{self.name}_{name}", shape)

    def shared(self, name: str) -> torch.Generator:
        return self.rng.shared(f"{self.name}_{name}")


def _taken(codes: Tensor, first: Tensor, count: int) -> Tensor:
    """`count` frames of codes (B, T, K) from `first` (B,) on; beyond the end, the last."""
    places = first[:, None] + torch.arange(count, device=codes.device)
    places = places.clamp(max=codes.shape[1] - 1)[..., None]
    return codes.gather(1, places.expand(-1, -1, codes.shape[2]))
