"""How long each phoneme lasts: a folder of phonemes and one of mels in, a folder of phonemes with durations out, by Ray Data.

    python data_pipelines/align_phonemes.py --input speech/train/phonemes --sounds speech/train/codes --output speech/train/timed

Field `durations` (L,) int16: frames of each phoneme, which add up to those of the sound. `phonemes` and `caption` are copied, and the
manifest keeps the phonemizer. The sounds are mels (`codes` of precompute_codes with a run of mel_vocoder). Nothing is trained beforehand
and no language is known: one Gaussian for each phoneme, over cepstra and their slopes, learns from alignments that it then makes better,
from evenly spaced ones on. Marks of stress and length have no frame of their own; pauses between words may have none. `--fit-input` and
`--fit-sounds` name the folders that it learns from, for a held-out set those of the training set.

Source: Rabiner 1989, "A Tutorial on Hidden Markov Models" (segmental k-means, section V.B); flat start as HTK's HCompV and HERest have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.conditioners.audio import CODES
from nexus_scale.conditioners.phonemes import PHONEMES
from nexus_scale.data.fields import read_bytes
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.reader import read_alone
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.orchestration.data_jobs import ShardJob
from nexus_scale.processes.alignment import aligned
from nexus_scale.processes.phones import PAUSES, SILENT

DURATIONS = "durations"
CEPSTRA, ROUNDS, AT_ONCE = 16, 10, 64
RARE = 10
"""Frames below which a phoneme keeps the Gaussian of all."""


class Options(ShardOptions):
    """Which phonemes are said in which sounds."""

    input: str = option(description="folder of phonemes, below the data root")
    sounds: str = option(description="folder of the mels of the same samples")
    fit_input: str | None = option(None, description="folder of phonemes to learn from (default: the input)")
    fit_sounds: str | None = option(None, description="folder of their mels (default: the sounds)")
    fit_samples: int = option(400, ge=1, description="how many samples are learned from, at most")
    batch: int = option(AT_ONCE, ge=1, description="samples aligned together")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The durations of a folder's phonemes.

    Raises:
        UserError: no phonemes or no mels there.
    """
    source = Manifest.load(roots.data_root / options.input)
    folders = [options.sounds, options.fit_input or options.input, options.fit_sounds or options.sounds]
    sounds, fit_input, fit_sounds = (Manifest.load(roots.data_root / folder) for folder in folders)
    for manifest in (source, fit_input):
        if PHONEMES not in manifest.fields or manifest.encoder is None:
            raise DataError(
                f"{manifest.folder}: got fields {sorted(manifest.fields)}; expected those of precompute_phonemes"
            )
    for manifest in (sounds, fit_sounds):
        if CODES not in manifest.fields or manifest.fields[CODES].dtype != "float32":
            raise DataError(
                f"{manifest.folder}: got fields {sorted(manifest.fields)}; expected mels of precompute_codes with a run of mel_vocoder"
            )
    assert source.encoder is not None
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(
            Aligner, source.folder, sounds.folder, fit_input.folder, fit_sounds.folder, options.fit_samples,
            str(source.encoder["fingerprint"]),
        ),
        encoder=source.encoder,
        settings={"sounds": sounds.hash, "fit": [fit_input.hash, fit_sounds.hash, options.fit_samples], "aligned": 1},
        batch=options.batch,
    )  # fmt: skip


class Sounds:
    """The mels of a folder by key."""

    def __init__(self, folder: Path):
        self.manifest = Manifest.load(folder)
        self.numbers = {self.manifest.index.key(number): number for number in range(self.manifest.samples)}

    def __call__(self, keys: Sequence[str]) -> list[Tensor]:
        if missing := [key for key in keys if key not in self.numbers]:
            raise DataError(f"{self.manifest.where}: has no sample {missing[0]!r}; give a folder of the same samples")
        numbers = np.array([self.numbers[key] for key in keys], np.int64)
        found = read_bytes(read_alone(self.manifest, CODES, numbers))
        return [torch.from_numpy(decode(self.manifest.fields[CODES].extension, data)).float() for data in found]


class Aligner:
    """Aligns the samples of a shard; see data_jobs.ShardEncoder."""

    def __init__(
        self,
        source: Path,
        sounds: Path,
        fit_input: Path,
        fit_sounds: Path,
        fit_samples: int,
        fingerprint: str,
        device: str,
    ):
        read = Manifest.load(source).fields
        self.sounds, self.fingerprint = Sounds(sounds), fingerprint
        self.phonemes, self.caption = read[PHONEMES], read.get("caption")
        made = Field(DURATIONS, f"{DURATIONS}.npy", "int16", (None,))
        self.fields = [self.phonemes, made, *([self.caption] if self.caption else [])]
        texts = Manifest.load(fit_input)
        few = np.unique(np.linspace(0, texts.samples - 1, min(fit_samples, texts.samples)).round().astype(np.int64))
        said = [
            torch.from_numpy(decode(texts.fields[PHONEMES].extension, data)).long()
            for data in read_bytes(read_alone(texts, PHONEMES, few))
        ]
        heard = Sounds(fit_sounds)([texts.index.key(number) for number in few.tolist()])
        self.voice = Gaussians.learned(said, heard)

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        said = [decode(self.phonemes.extension, sample.members[self.phonemes.extension]) for sample in samples]
        texts = [torch.from_numpy(one).long() for one in said]
        found = self.voice.align(texts, self.sounds([sample.key for sample in samples]))
        out: list[dict[str, Any]] = []
        for sample, own, durations in zip(samples, said, found, strict=True):
            values: dict[str, Any] = {PHONEMES: own, DURATIONS: durations.numpy().astype(np.int16)}
            if self.caption is not None:
                values["caption"] = decode("txt", sample.members[self.caption.extension])
            out.append(values)
        return out


class Gaussians:
    """How each phoneme sounds: mean and variance of its frames, (V, F) each. All pauses sound alike."""

    def __init__(self, mean: Tensor, variance: Tensor):
        self.mean, self.variance = mean, variance

    @classmethod
    def learned(cls, texts: Sequence[Tensor], mels: Sequence[Tensor]) -> Gaussians:
        """From sounds and what is said in them."""
        frames = [features(one) for one in mels]
        every = torch.cat(frames)
        num_symbols = max(int(max(text.max() for text in texts)) + 1, max(PAUSES) + 1)
        overall = cls(every.mean(0).expand(num_symbols, -1), every.var(0).expand(num_symbols, -1))
        found, now = [evenly(text, len(one)) for text, one in zip(texts, mels, strict=True)], overall
        for number in range(ROUNDS):
            now = overall.taught(texts, found, every)
            if number + 1 < ROUNDS:
                found = now.align(texts, mels, frames)
        return now

    def taught(self, texts: Sequence[Tensor], durations: Sequence[Tensor], frames: Tensor) -> Gaussians:
        """The Gaussians of frames (all texts' one after another) that say what the durations tell; rare phonemes keep these."""
        said = torch.cat([text.repeat_interleave(own) for text, own in zip(texts, durations, strict=True)])
        said = torch.where(torch.isin(said, torch.tensor(PAUSES)), PAUSES[0], said)
        count = torch.bincount(said, minlength=len(self.mean)).float()[:, None]
        sums = torch.zeros_like(self.mean).index_add_(0, said, frames)
        squares = torch.zeros_like(self.mean).index_add_(0, said, frames.square())
        mean = sums / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0.05 * self.variance)
        known = count >= RARE
        mean, variance = torch.where(known, mean, self.mean), torch.where(known, variance, self.variance)
        for pause in PAUSES[1:]:
            mean[pause], variance[pause] = mean[PAUSES[0]], variance[PAUSES[0]]
        return Gaussians(mean, variance)

    def align(
        self, texts: Sequence[Tensor], mels: Sequence[Tensor], frames: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The durations of each text's phonemes, (L_i,)."""
        frames = [features(one) for one in mels] if frames is None else frames
        texts = [text.clamp(max=len(self.mean) - 1) for text in texts]
        out: list[Tensor] = []
        for begin in range(0, len(texts), AT_ONCE):
            some, sounds = texts[begin : begin + AT_ONCE], frames[begin : begin + AT_ONCE]
            text, mask = _padded(some)
            sound, real = _padded(sounds)
            found = aligned(self.scores(sound, text), real, text, mask)
            out += [row[: len(one)] for row, one in zip(found, some, strict=True)]
        return out

    def scores(self, frames: Tensor, phonemes: Tensor) -> Tensor:
        """Log-densities of frames (B, T, F) as each of the phonemes (B, L), (B, T, L)."""
        weight = 1 / self.variance
        constant = (self.mean.square() * weight).sum(1) + self.variance.log().sum(1)  # (V,)
        logs = -0.5 * (frames.square() @ weight.T - 2 * frames @ (self.mean * weight).T + constant)  # (B, T, V)
        return logs.gather(2, phonemes[:, None].expand(-1, frames.shape[1], -1))


def features(mels: Tensor) -> Tensor:
    """Cepstra of log-mels (T, M) and their slopes, less their mean over the sound, (T, 2 * CEPSTRA)."""
    bands = mels.shape[1]
    waves = torch.cos(math.pi / bands * (torch.arange(bands) + 0.5)[:, None] * torch.arange(CEPSTRA))  # (M, CEPSTRA)
    cepstra = mels @ waves * math.sqrt(2 / bands)
    cepstra = cepstra - cepstra.mean(0)
    ends = torch.cat([cepstra[:1], cepstra, cepstra[-1:]])
    return torch.cat([cepstra, ends[2:] - ends[:-2]], dim=1)


def evenly(text: Tensor, frames: int) -> Tensor:
    """Durations that share frames out among the sounds of a text, (L,)."""
    sounds = ~torch.isin(text, torch.tensor((*PAUSES, *SILENT)))
    sounds[[0, -1]] = True  # it begins and ends in silence
    ends = (sounds.cumsum(0) * frames) // int(sounds.sum())
    return torch.diff(ends, prepend=ends.new_zeros(1))


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    whole = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return whole, torch.arange(whole.shape[1]) < lengths[:, None]


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
