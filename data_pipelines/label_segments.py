"""Segments of speech with what is said in each step of a codec: folders of clips and of phonemes in, shards of arrays out, by Ray Data.

    python data_pipelines/label_segments.py --input speech/train/clips --phonemes speech/train/timed --output speech/train/labelled \\
        --hop 256 --segment-seconds 1

Fields `audio` (1, T) float16 in [-1, 1]; `phones` (T / hop,) int16, the symbol that is said in each step; `pitch` (T / hop, 2) float16, the
logarithm of the pitch less the clip's mean and 1 where there is one (Praat's, by praat-parselmouth); `label`, the speaker. `phonemes` is a
folder of align_phonemes of the same clips, whose frames are the codec's steps. A clip is cut into consecutive segments; the last
one ends where the clip ends, but for less than a step, and overlaps the one before. Clips shorter than a segment are left out. A rerun
makes only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines.align_phonemes import DURATIONS
from data_pipelines.cut_segments import AUDIO, sound_field
from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.conditioners.phonemes import PHONEMES
from nexus_scale.data.fields import read_bytes
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.reader import read_alone
from nexus_scale.data.shards import RawSample, decode, read_samples
from nexus_scale.data.sounds import decode_wav
from nexus_scale.interop.pitch import check_pitch, pitch_of, relative_pitch
from nexus_scale.orchestration.data_jobs import Row, ShardJob

PHONES, PITCH, LABEL = "phones", "pitch", "label"


class Options(ShardOptions):
    """Which clips, and how they are cut."""

    input: str = option(description="folder of clips with speakers, below the data root")
    phonemes: str = option(description="folder of phonemes with durations of the same clips")
    hop: int = option(200, ge=1, description="samples of a step of the codec")
    segment_seconds: float = option(1.0, gt=0, le=3600, description="length of a segment, cut down to whole steps")
    batch: int = option(64, ge=1, description="clips looked at together")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The labelled segments of a folder's clips.

    Raises:
        UserError: no clips with speakers there, no durations, or no praat-parselmouth.
    """
    source, spoken = (Manifest.load(roots.data_root / folder) for folder in (options.input, options.phonemes))
    check_pitch()
    sound = sound_field(source)
    if LABEL not in source.fields:
        raise DataError(f"{source.where}: has no {LABEL!r}; give clips whose source says who speaks")
    if DURATIONS not in spoken.fields:
        raise DataError(f"{spoken.where}: has no {DURATIONS!r}; give a folder of align_phonemes")
    first = next(read_samples(source.folder / source.shards[0].file))
    rate = decode_wav(first.members[sound.extension]).sample_rate_hz
    steps = int(options.segment_seconds * rate / options.hop)
    if not steps:
        raise DataError(
            f"segment_seconds {options.segment_seconds:g} is shorter than a step of {options.hop} samples at {rate} Hz"
        )
    settings = {"hop": options.hop, "steps": steps, "sample_rate_hz": rate, "phonemes": spoken.hash}
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(SegmentLabeller, sound, spoken.folder, options.hop, steps, rate),
        encoder={
            "kind": "labelled segments",
            "fingerprint": SegmentLabeller.fingerprint_of(options.hop, steps, rate),
            **settings,
        },
        settings=settings,
        batch=options.batch,
        rates={AUDIO: float(rate)},
    )


class SegmentLabeller:
    """Labels the clips of a shard; see data_jobs.ShardEncoder and data_jobs.Placing."""

    def __init__(self, sound: Field, phonemes: Path, hop: int, steps: int, sample_rate_hz: int, device: str):
        self.sound, self.hop, self.steps, self.sample_rate_hz = sound, hop, steps, sample_rate_hz
        self.spoken = Manifest.load(phonemes)
        self.places = {self.spoken.index.key(number): number for number in range(self.spoken.samples)}
        self.fingerprint = self.fingerprint_of(hop, steps, sample_rate_hz)
        self.fields = [
            Field(AUDIO, f"{AUDIO}.npy", "float16", (1, steps * hop)),
            Field(PHONES, f"{PHONES}.npy", "int16", (steps,)),
            Field(PITCH, f"{PITCH}.npy", "float16", (steps, 2)),
            Field(LABEL, "cls", "int64", ()),
        ]

    @staticmethod
    def fingerprint_of(hop: int, steps: int, sample_rate_hz: int) -> str:
        return xxhash.xxh3_128_hexdigest(f"labelled segments of {steps} steps of {hop} at {sample_rate_hz} Hz".encode())

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        """The whole clips with their labels, which `place` cuts."""
        missing = [sample.key for sample in samples if sample.key not in self.places]
        if missing:
            raise DataError(f"clip {missing[0]!r}: no such sample among the phonemes; make them of the same clips")
        numbers = np.array([self.places[sample.key] for sample in samples], np.int64)
        ids, counts = (self._read(name, numbers) for name in (PHONEMES, DURATIONS))
        return [self._labelled(*each) for each in zip(samples, ids, counts, strict=True)]

    def _read(self, name: str, numbers: np.ndarray) -> list[np.ndarray]:
        field = self.spoken.fields[name]
        return [decode(field.extension, data) for data in read_bytes(read_alone(self.spoken, name, numbers))]

    def _labelled(self, sample: RawSample, ids: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
        sound = decode_wav(sample.members[self.sound.extension])
        if sound.sample_rate_hz != self.sample_rate_hz or sound.wave.shape[0] != 1:
            raise DataError(
                f"clip {sample.key!r}: got {sound.wave.shape[0]} channels at {sound.sample_rate_hz} Hz, expected one at "
                f"{self.sample_rate_hz}"
            )
        phones, frames = np.repeat(ids, counts), -(-sound.wave.shape[1] // self.hop)
        if len(phones) != frames:
            raise DataError(
                f"clip {sample.key!r}: has {frames} steps of {self.hop} samples, its durations add up to {len(phones)}; align "
                f"phonemes to mels of hop {self.hop}"
            )
        pitch = relative_pitch(pitch_of(sound.wave[0], self.sample_rate_hz, self.hop))
        label = decode("cls", sample.members["cls"])
        return {AUDIO: sound.wave.astype(np.float16), PHONES: phones, PITCH: pitch.astype(np.float16), LABEL: label}

    def place(self, key: str, values: Mapping[str, Any]) -> Iterable[Row]:
        whole, n = values[AUDIO].shape[1] // self.hop, self.steps
        starts = [n * k for k in range(whole // n)]
        if starts and whole % n:
            starts.append(whole - n)
        for number, start in enumerate(starts):
            audio = values[AUDIO][:, start * self.hop : (start + n) * self.hop]
            cut = {name: values[name][start : start + n] for name in (PHONES, PITCH)}
            yield Row(f"{key}-{number:03d}", {AUDIO: audio, **cut, LABEL: values[LABEL]})


JOB = shard_job(__name__, Options, plan)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
