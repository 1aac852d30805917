"""SoundStorm: codes of speech from its semantic tokens, level by level, in the voice of a prompt; what reads sentences as such tokens.

Source: Borsos et al. 2023, "SoundStorm: Efficient Parallel Audio Generation", sections 3.2 and 3.3; section 5 for speech from text, whose
first stage is Kharitonov et al. 2023 (SPEAR-TTS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.contracts import Batch, Cond, Draws, Generated, Nets, Request, Rng, UserError
from nexus_scale.objectives.autoregressive import Autoregressive
from nexus_scale.objectives.codec_language import put_before
from nexus_scale.objectives.masked import Masked, Share
from nexus_scale.processes.token_masks import Levels

SEMANTIC = "semantic"
_VOICE = ("codes", "codes_mask", SEMANTIC, f"{SEMANTIC}_mask")


class Soundstorm(Masked):
    """One network to train, as `Masked` has it, told `semantic` (B, T'); and with `reader` a frozen one, `reader(tokens, cond)` as the
    objective `autoregressive` trains it, which makes semantic tokens of phonemes.

    Each token of `semantic` stands for `repeats` frames of codes. A prompt is a voice: its codes and its semantic tokens come before the
    sentence's, and all its levels are known.
    """

    def __init__(
        self,
        *,
        num_codebooks: int = 12,
        codebook_size: int = 1024,
        schedule: str | dict[str, Any] = "cosine",
        levels: Levels = "uniform",
        prompt: Share = 0.99,
        prompt_drop: Share = 0.0,
        prompt_frames: Annotated[int, Field(ge=1, le=100_000)] = 150,
        repeats: Annotated[int, Field(ge=1, le=1000)] = 1,
        num_semantic: Annotated[int, Field(ge=1, le=1 << 15)] = 1024,
        reader: dict[str, Any] | None = None,
        reads_on: bool = False,
        label_smoothing: float = 0.0,
    ):
        """
        Args:
            num_codebooks, codebook_size, schedule, levels, prompt, prompt_drop, label_smoothing: see `Masked`; the paper draws the length
                of the prompt uniformly, up to the whole sample.
            prompt_frames: of a voice, at most, where it speaks; 150 are three seconds at 50 frames a second.
            repeats: frames of codes that a semantic token stands for.
            num_semantic: semantic tokens that there are, which the reader draws.
            reader: how sentences are read: arguments of the sampler `autoregressive`, such as {top_p: 0.9, max_tokens: 250}. None: there is
                no reader; only semantic tokens that are given are spoken.
            reads_on: the reader goes on from the voice's text and tokens, as one can that was trained on pairs (pair_utterances). A voice
                may then be several speakers in turn, and a dialogue goes on. Otherwise it reads the sentence alone.
        """
        super().__init__(
            num_codebooks=num_codebooks, codebook_size=codebook_size, schedule=schedule, levels=levels, prompt=prompt,
            prompt_drop=prompt_drop, conditions=(SEMANTIC,), label_smoothing=label_smoothing,
        )  # fmt: skip
        self.prompt_frames, self.repeats, self.num_semantic = prompt_frames, repeats, num_semantic
        self.reads_on = reads_on
        if prompt_frames < repeats:
            raise UserError(f"objective.prompt_frames: got {prompt_frames}; expected at least repeats, {repeats}")
        self.reading = None
        if reader is not None:
            cls = registry.find("samplers", "autoregressive")
            self.reading = cls(**registry.check_arguments(cls, reader, "objective.reader"))
        self.reads = Autoregressive(
            field=SEMANTIC, num_codebooks=1, codebook_size=num_semantic, pattern="parallel", ends=True,
            conditions=("phonemes",),
        )  # fmt: skip

    @property
    def needs(self) -> Sequence[str]:
        return ("model",) if self.reading is None else ("model", "reader")

    def mismatch(self, nets: Nets, batch: Batch | None) -> str | None:
        """Semantic tokens at another rate than `repeats` says, or than the network is told."""
        told = getattr(nets["model"], "repeats", {SEMANTIC: self.repeats}).get(SEMANTIC, 1)
        if told != self.repeats:
            return (
                f"objective.repeats is {self.repeats}, and networks.model.repeats.{SEMANTIC} {told}: a semantic token stands for as "
                "many frames in both; set them alike"
            )
        names = ("codes_mask", f"{SEMANTIC}_mask")
        if batch is None or any(name not in batch for name in names):
            return None
        frames, tokens = (batch[name].sum(1) for name in names)
        wanted = -(-frames // self.repeats)
        # a pair of utterances rounds up twice; what fills a batch may have been cut
        few, many = tokens < wanted - 1, (tokens > wanted + 1) & (frames < batch["codes_mask"].shape[1])
        wrong = (few | many).nonzero()
        if not len(wrong):
            return None
        row = int(wrong[0])
        return (
            f"a sample has {int(frames[row])} frames of codes and {int(tokens[row])} semantic tokens; with objective.repeats "
            f"{self.repeats} expected {int(wanted[row])}: set repeats, here and in networks.model, to frames of codes for each token, "
            f"or data.tokens.{SEMANTIC} so that it cuts none that data.tokens.codes keeps"
        )

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        if self.reading is None:
            return Draws("codes", takes=frozenset({"sampler", "steps"}), given=("codes", "codes_mask"), walks="masks")
        return Draws(
            "codes",
            takes=frozenset({"prompt", "sampler", "steps", "voice"}),
            conditions=("phonemes",),
            given=_VOICE,
            walks="masks",
            prompt_frames=self.prompt_frames,
            levels=self.num_codebooks,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """A batch's own utterances, told their semantic tokens and their first third, at most `prompt_frames`, and spoken from there."""
        codes, real = self.codes(batch)
        shown = (real.sum(1) // 3).clamp(min=1, max=self.prompt_frames)
        first = codes[:, : self.prompt_frames]
        there = torch.arange(first.shape[1], device=real.device) < shown[:, None]
        given = {**request.given, "codes": first, "codes_mask": there}
        request = replace(request, shape=tuple(codes.shape[1:]), lengths=real.sum(1), given=given, continues=True)
        return self.condition(batch), request

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Codes (B, T, K), 0 after each one's end.

        Args:
            cond: `semantic` (B, T') of the whole samples, whose beginning is given as `Masked.generate` takes it; or `sentence` (B, L) and
                `sentence_mask`, phonemes that are read first, and `phonemes` with `phonemes_mask`, those of the voice before them.
            request: where sentences are read, `given` is the voice: `codes` (B, P, K) and `semantic` (B, P') with their masks; it is no
                part of what comes back.
        """
        if SEMANTIC in cond:
            told = {name: value for name, value in cond.items() if name.startswith(SEMANTIC)}
            return super().generate(nets, told, request, rng)
        tokens, lengths, ended = self._read(nets, cond, request, rng)
        known, frames = self._voice(request)
        semantic = request.given[SEMANTIC]
        joined = put_before(semantic[..., None], frames // self.repeats, tokens[..., None], lengths)
        spoken = lengths * self.repeats  # (B,)
        total = frames + spoken
        there = torch.arange(known.shape[1], device=known.device) < frames[:, None]
        whole = replace(
            request,
            shape=(int(known.shape[1]) + tokens.shape[1] * self.repeats, self.num_codebooks),
            lengths=total,
            given={"codes": known, "codes_mask": there},
        )
        made = super().generate(nets, {SEMANTIC: joined.codes[..., 0]}, whole, rng).samples
        places = torch.arange(tokens.shape[1] * self.repeats, device=made.device)  # (T,)
        index = (frames[:, None] + places).clamp(max=made.shape[1] - 1)[..., None].expand(-1, -1, self.num_codebooks)
        codes = made.gather(1, index) * (places < spoken[:, None])[..., None]
        return Generated(codes, spoken, ended)

    def _voice(self, request: Request) -> tuple[Tensor, Tensor]:
        """The prompt's codes (B, P, K), and how many frames of it each sample has: whole semantic tokens, at most `prompt_frames`."""
        codes = request.given["codes"][:, : self.prompt_frames, : self.num_codebooks]
        frames = request.given["codes_mask"].sum(1).clamp(max=self.prompt_frames) // self.repeats
        tokens = request.given[f"{SEMANTIC}_mask"].sum(1)
        return codes, torch.minimum(frames, tokens) * self.repeats

    def _read(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """Semantic tokens of sentences (B, T'), how many each has, at least one, and whether the reader itself ended it."""
        if self.reading is None:
            raise UserError("objective.reader: this run has no reader; semantic tokens must be given")
        name = "phonemes" if self.reads_on else "sentence"
        text = {"phonemes": cond[name], "phonemes_mask": cond[f"{name}_mask"]}
        given: dict[str, Tensor] = {}
        begun = torch.zeros(len(cond[name]), dtype=torch.int64, device=cond[name].device)
        if self.reads_on:
            given = {key: request.given[key] for key in (SEMANTIC, f"{SEMANTIC}_mask")}
            begun = given[f"{SEMANTIC}_mask"].sum(1)
        asked = Request(sampler=self.reading, given=given, everywhere=request.everywhere)
        made = self.reads.generate({"model": nets["reader"]}, text, asked, rng)
        assert made.lengths is not None, "a reader's samples end"
        assert made.ended is not None, "a reader's samples end"
        tokens = made.samples[..., 0]
        places = begun[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        lengths = (made.lengths - begun).clamp(min=1)
        spoken = tokens.gather(1, places.clamp(max=tokens.shape[1] - 1))[:, : int(lengths.max())]
        return spoken, lengths, made.ended
