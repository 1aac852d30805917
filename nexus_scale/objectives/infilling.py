"""Sound that is filled in: a flow over mels that is told the mels around a gap and the phone of each frame.

Source: Le et al. 2023, "Voicebox: Text-Guided Multilingual Universal Speech Generation at Scale", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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
    Phase,
    Request,
    Rng,
    SumOverRanks,
    UserError,
)
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.alignment import aligned, frames_of
from nexus_scale.processes.infilling import Spans
from nexus_scale.processes.paths import find_named

MODEL, DURATIONS, ALIGNER = "model", "durations", "aligner"
GAP = "gap"
"""Condition: frames that are to be filled in, (B, T) bool. Their errors alone count."""
LONGEST = 60.0
"""Times that a symbol may be as long as the mean over its text, so that an untrained network draws no hour of sound."""


class Infilling(Denoising):
    """As `Denoising` on mels (`codes` of a vocoder, (B, T, M)), of which spans are hidden. Three networks learn from the same batches:

    `model(x_t, t, cond)`: the flow, told `phones` (B, T), `context` (B, M, T), the mels with zeros in the gap, and `frame_mask`; its error
    in the gap is what is learned. Phones and context are dropped together.
    `durations(known, hidden, cond)`: logarithms of one plus each phone's frames, of which spans are hidden; its mean absolute error there.
    `aligner(mels)`: which phone each frame says, by cross-entropy; it aligns the recordings that drawing is given.

    Draws, by name: those of `Denoising`, `gap`, `gap_durations`.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, Any] = "conditional_ot",
        target: str = "velocity",
        times: str | Mapping[str, Any] = "uniform",
        weight: str | Mapping[str, Any] = "constant",
        distance: str | Mapping[str, Any] = "squared",
        condition_drop: float = 0.2,
        gap: Mapping[str, float] | None = None,
        gap_durations: Mapping[str, float] | None = None,
        prompt_frames: int = 300,
    ):
        """
        Args:
            path, target, times, weight, distance: see `Denoising`; the path has the paper's sigma_min, 1e-5, where it is `conditional_ot`.
            condition_drop: probability that a sample is told neither phones nor context.
            gap: of frames, {least: 0.7, most: 1.0, whole: 0.3}; see `processes.infilling.Spans`.
            gap_durations: of phones, {least: 0.1, most: 1.0, whole: 0.2}.
            prompt_frames: length of the held-out voices that are chosen to draw with, about.
        """
        if path == "conditional_ot":
            path = {"name": path, "sigma_min": 1e-5}
        super().__init__(
            path=path, target=target, times=times, weight=weight, distance=distance, condition_drop=condition_drop,
            conditions=("phones", "context"),
        )  # fmt: skip
        self.input = "codes"  # type: ignore[assignment]
        self.gap = _spans(gap, {"least": 0.7, "most": 1.0, "whole": 0.3}, "gap")
        self.gap_durations = _spans(gap_durations, {"least": 0.1, "most": 1.0, "whole": 0.2}, "gap_durations")
        self.prompt_frames = prompt_frames

    @property
    def needs(self) -> Sequence[str]:
        return (MODEL, DURATIONS, ALIGNER)

    @property
    def fields(self) -> Sequence[str]:
        return ("codes", "codes_mask", "phonemes", "phonemes_mask", "durations")

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase("main", trains=MODEL),
            Phase(DURATIONS, trains=DURATIONS, draws=False),
            Phase(ALIGNER, trains=ALIGNER, draws=False),
        )

    # -------------------------------------------------------------------------------------- a batch's parts

    def clean(self, batch: Batch, rng: Rng, flip: bool = False) -> Tensor:
        mels = batch["codes"]
        if not mels.is_floating_point():
            raise UserError(
                "objective infilling: field codes has whole numbers; expected mels: make them by precompute_codes with a mel_vocoder",
                3,
            )
        return (mels * batch["codes_mask"][..., None]).transpose(1, 2).float()  # (B, M, T)

    def told_of(self, batch: Batch, rng: Rng, train: bool) -> dict[str, Tensor]:
        """Each frame's phone, and the mels outside of a gap."""
        real = batch["codes_mask"]
        return self.around(
            self.clean(batch, rng), real, self._phones(batch, real.shape[1]), self.gap.draw(rng, GAP, real)
        )

    @staticmethod
    def around(mels: Tensor, real: Tensor, phones: Tensor, gap: Tensor) -> dict[str, Tensor]:
        """The network's conditions: mels (B, M, T) with zeros in the gap (B, T)."""
        context = mels * (real & ~gap)[:, None].to(mels.dtype)
        return {"phones": phones, "context": context, "frame_mask": real, GAP: gap}

    @staticmethod
    def _phones(batch: Batch, num_frames: int) -> Tensor:
        durations = batch["durations"] * batch["phonemes_mask"]
        return batch["phonemes"].gather(1, frames_of(durations, num_frames))  # (B, T)

    def condition(self, batch: Batch | Cond) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("phones", "context", "frame_mask", GAP) if name in batch}

    def counted(self, cond: Cond) -> Tensor | None:
        return cond[GAP]

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Phase `main`: `Denoising`'s, in the gap. `durations`: mean absolute error of the hidden logarithms. `aligner`: nats a frame, and
        `accuracy`."""
        if phase == DURATIONS:
            error = self._duration_error(nets, batch, rng).mean()
            return Loss(error, {"loss": error.detach()})
        if phase == ALIGNER:
            loss, accuracy = (each.mean() for each in self._alignment_error(nets, batch))
            return Loss(loss, {"loss": loss.detach(), "accuracy": accuracy.detach()})
        return super().loss(phase, nets, batch, rng, step)

    def _duration_error(self, nets: Nets, batch: Batch, rng: Rng) -> Tensor:
        real = batch["phonemes_mask"]
        hidden = self.gap_durations.draw(rng, "gap_durations", real)  # (B, L)
        logs = (batch["durations"] * real).float().log1p()
        found = nets[DURATIONS](logs, hidden, {"phonemes": batch["phonemes"], "phonemes_mask": real}).float()
        return ((found - logs).abs() * hidden).sum(1) / hidden.sum(1)

    def _alignment_error(self, nets: Nets, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of each sample's frames, (B,) each."""
        real = batch["codes_mask"]
        phones = self._phones(batch, real.shape[1])
        logits = nets[ALIGNER](batch["codes"].float() * real[..., None]).float()
        nats = F.cross_entropy(logits.transpose(1, 2), phones, reduction="none")  # (B, T)
        right = (logits.argmax(2) == phones).float()
        return tuple((each * real).sum(1) / real.sum(1) for each in (nats, right))  # type: ignore[return-value]

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        return super().after_phase(phase, nets, sum_over_ranks, rng, step) if phase == "main" else {}

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`Denoising`'s, of fixed gaps; `durations` and `alignment`, the other networks' errors; and `accuracy` of the alignment."""
        nats, accuracy = self._alignment_error(nets, batch)
        return {
            **super().validate(nets, batch, rng),
            "durations": self._duration_error(nets, batch, rng),
            "alignment": nats,
            "accuracy": accuracy,
        }

    def likelihood(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        raise UserError("objective infilling knows no likelihood: its samples are clips of many lengths")

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws(
            "codes",
            takes=frozenset({"prompt", "sampler", "steps", "guidance", "voice", "edit"}),
            conditions=("phonemes",),
            given=("codes", "codes_mask"),
            walks="denoise",
            drops=self.condition_drop.drops,
            prompt_frames=self.prompt_frames,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """A batch's own utterances with their own timing, told their first third, and spoken from there."""
        real = batch["codes_mask"]
        after = torch.arange(real.shape[1], device=real.device) >= (real.sum(1) // 3).clamp(min=1)[:, None]
        text = {name: batch[name] for name in ("phonemes", "phonemes_mask")}
        given = {name: batch[name] for name in ("codes", "codes_mask", "durations")} | {GAP: after & real}
        return text, replace(request, shape=tuple(batch["codes"].shape[1:]), given=given, continues=True)

    @torch.no_grad()
    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Mels (B, T, M). Frames that are kept are the given ones, to the bit.

        Args:
            cond: `phonemes` (B, L) of all that the samples say, with `phonemes_mask`; of speech in a voice, those of the voice's recording
                and then those of the `sentence` (B, L') with `sentence_mask`.
            request: `given` are mels `codes` (B, P, M) with `codes_mask`. With `gap` (B, P) they are the samples themselves, of which the
                gap is spoken anew, by their own timing: `durations` (B, L), or what the aligner finds. With `said` (B, L'') and
                `said_mask`, what the mels say, phonemes that differ from it are spoken anew, and the gap follows. Without either they
                are a voice, and the sentence has the network's timing, or that of a recording of it: mels `like` (B, P', M) with
                `like_mask`.
        """
        given = request.given
        mels, real = given["codes"].float(), given["codes_mask"]
        if GAP in given:
            text, mask = cond["phonemes"], cond["phonemes_mask"]
            durations = given["durations"] if "durations" in given else self.align(nets, mels, real, text, mask)
            phones = text.gather(1, frames_of(durations * mask, mels.shape[1]))
            return self._filled(nets, mels, real, phones, given[GAP], request, rng)
        if "said" in given:
            return self._edited(nets, cond, mels, real, request, rng)
        return self._spoken(nets, cond, mels, real, request, rng)

    def align(self, nets: Nets, mels: Tensor, real: Tensor, phonemes: Tensor, mask: Tensor) -> Tensor:
        """The durations (B, L) of phonemes in a recording, by the aligner."""
        logits = nets[ALIGNER](mels * real[..., None].to(mels.dtype)).float()
        scores = logits.log_softmax(2).gather(2, phonemes[:, None].expand(-1, mels.shape[1], -1))  # (B, T, L)
        return aligned(scores, real, phonemes, mask)

    def timed(self, nets: Nets, phonemes: Tensor, mask: Tensor, known: Tensor, hidden: Tensor) -> Tensor:
        """Durations (B, L): those that are `known`, and for the `hidden` ones what the network says, in whole frames."""
        logs = nets[DURATIONS](known.float().log1p(), hidden, {"phonemes": phonemes, "phonemes_mask": mask}).float()
        found = logs.expm1().clamp(min=0, max=LONGEST).round().long()
        return torch.where(hidden, found, known) * mask

    def _spoken(self, nets: Nets, cond: Cond, mels: Tensor, real: Tensor, request: Request, rng: Rng) -> Generated:
        """A sentence in a voice: what follows the voice's recording."""
        text, mask = cond["phonemes"], cond["phonemes_mask"]
        places = torch.arange(text.shape[1], device=text.device)
        of_voice = places <= (mask.sum(1) - cond["sentence_mask"].sum(1))[:, None]  # with the pause between the two
        known = self.align(nets, mels, real, text * of_voice, of_voice)
        new, shown = mask & ~of_voice, real.sum(1)
        if "like" in request.given:  # said with the timing of another recording
            timing = self.align(
                nets, request.given["like"].float(), request.given["like_mask"], cond["sentence"], cond["sentence_mask"]
            )
            known = known * of_voice + _moved(timing * cond["sentence_mask"], of_voice.sum(1) - 1, text.shape[1]) * new
            durations = _at_least_one(known, new)
        else:
            durations = _at_least_one(self.timed(nets, text, mask, known * of_voice, new), new)
        total = durations.sum(1)
        longest = int(total.max())
        frames = torch.arange(longest, device=text.device)
        whole, inside = frames < total[:, None], frames < shown[:, None]
        before = F.pad(mels, (0, 0, 0, max(0, longest - mels.shape[1])))[:, :longest]
        phones = text.gather(1, frames_of(durations, longest))
        made = self._filled(nets, before, whole, phones, whole & ~inside, request, rng)
        if request.continues:
            return made
        spoken = total - shown
        source = (shown[:, None] + torch.arange(int(spoken.max()), device=text.device)).clamp(max=longest - 1)
        rows = made.samples.gather(1, source[..., None].expand(-1, -1, mels.shape[2]))
        here = torch.arange(rows.shape[1], device=text.device) < spoken[:, None]
        return Generated(rows * here[..., None], spoken)

    def _edited(self, nets: Nets, cond: Cond, mels: Tensor, real: Tensor, request: Request, rng: Rng) -> Generated:
        """A recording that says something else: what both texts begin and end with stays as it is."""
        said, said_mask = request.given["said"], request.given["said_mask"]
        was = self.align(nets, mels, real, said, said_mask)
        rows = [
            self._edit(nets, *one)
            for one in zip(
                _rows(cond["phonemes"], cond["phonemes_mask"]), _rows(said, said_mask), _rows(was, said_mask), _rows(mels, real),
                strict=True,
            )
        ]  # fmt: skip
        frames, gaps, phones = (
            torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True)
        )
        lengths = torch.tensor([len(row[1]) for row in rows], device=mels.device)
        whole = torch.arange(frames.shape[1], device=mels.device) < lengths[:, None]
        return self._filled(nets, frames, whole, phones, gaps & whole, request, rng)

    def _edit(self, nets: Nets, text: Tensor, said: Tensor, was: Tensor, mels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one recording: mels (T, M) with room for what is new, the gap (T,), and each frame's phone (T,)."""
        first, last = _common(text, said)
        new = len(text) - first - last
        known = torch.cat([was[:first], was.new_zeros(new), was[len(said) - last :]])
        hidden = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        hidden[first : first + new] = True
        every = torch.ones_like(hidden)
        durations = self.timed(nets, text[None], every[None], known[None], hidden[None])[0]
        begins, ends = int(was[:first].sum()), int(was[len(said) - last :].sum())
        between = int(durations[hidden].sum())
        room = mels.new_zeros(between, mels.shape[1])
        frames = torch.cat([mels[:begins], room, mels[len(mels) - ends :]])
        gap = torch.zeros(len(frames), dtype=torch.bool, device=mels.device)
        gap[begins : begins + between] = True
        return frames, gap, text[frames_of(durations[None], len(frames))[0]]

    def _filled(
        self, nets: Nets, mels: Tensor, real: Tensor, phones: Tensor, gap: Tensor, request: Request, rng: Rng
    ) -> Generated:
        """Mels (B, T, M) whose gap (B, T) is drawn, and whose other frames stay."""
        told = self.around(mels.transpose(1, 2), real, phones, gap)
        sampler, noise = self.sampler_of(request), rng.normal("noise", (mels.shape[2], mels.shape[1]))
        null = self.null_condition(told)
        x0 = self._walked(nets, sampler, request.guidance, told, null, noise, rng, request.progress)
        drawn = torch.where(gap[..., None], x0.transpose(1, 2), mels)
        return Generated(torch.where(real[..., None], drawn, 0.0), real.sum(1))


def _spans(given: Mapping[str, float] | None, usual: Mapping[str, float], name: str) -> Spans:
    found: Spans = find_named({"spans": Spans}, {"name": "spans", **usual, **(given or {})}, f"objective.{name}")
    return found


def _rows(values: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[real] for row, real in zip(values, mask, strict=True)]


def _common(a: Tensor, b: Tensor) -> tuple[int, int]:
    """How many symbols two texts begin with in common, and end with behind these."""
    shortest = min(len(a), len(b))
    same = (a[:shortest] == b[:shortest]).long()
    first = int(same.cumprod(0).sum())
    rest = shortest - first
    if not rest:
        return first, 0
    last = int((a[len(a) - rest :] == b[len(b) - rest :]).flip(0).long().cumprod(0).sum())
    return first, last


def _moved(values: Tensor, by: Tensor, length: int) -> Tensor:
    """Rows (B, L') in rows of `length`, each `by` (B,) places further back; what lies beyond is cut."""
    source = torch.arange(length, device=values.device) - by[:, None]
    inside = (source >= 0) & (source < values.shape[1])
    return values.gather(1, source.clamp(0, values.shape[1] - 1)) * inside


def _at_least_one(durations: Tensor, hidden: Tensor) -> Tensor:
    """Durations of which each text's hidden ones add up to a frame or more: the first gets it."""
    none = hidden & (hidden.cumsum(1) == 1) & ((durations * hidden).sum(1) == 0)[:, None]
    return durations + none
