"""Segments of one length for training a codec: a folder of clips in, shards of float16 arrays out, by Ray Data.

    python data_pipelines/cut_segments.py --input speech/train/clips --output speech/train/segments --segment-seconds 1

Field `audio` (C, T) float16 in [-1, 1], at the sample rate of the clips. A clip is cut into consecutive segments; the last one ends where
the clip ends and overlaps the one before. Clips shorter than a segment are left out and listed in `<output>/ingest_report.json`. A rerun
makes only what is missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from data_pipelines.accounts import Account
from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, read_samples
from nexus_scale.data.sounds import decode_wav
from nexus_scale.io.durable import atomic_write
from nexus_scale.orchestration.data_jobs import Row, ShardJob

log = logging.getLogger(__name__)

AUDIO = "audio"
REPORT = "ingest_report.json"
TOO_SHORT = "a clip shorter than a segment"


class Options(ShardOptions):
    """How long segments are."""

    input: str = option(description="folder of clips, below the data root")
    segment_seconds: float = option(gt=0, le=3600, description="length of a segment")
    batch: int = option(64, ge=1, description="clips decoded at once")


def report(options: Options, roots: Roots, made: Manifest) -> None:
    """Writes the account of the clips into the folder."""
    account = _account(Manifest.load(roots.data_root / options.input), made)
    atomic_write(made.folder / REPORT, json.dumps(account.to_json(), indent=1, ensure_ascii=False))
    if left := account.dropped[TOO_SHORT]:
        log.warning("cut_segments: %d clips are shorter than %g s and were left out", left, options.segment_seconds)


def _account(source: Manifest, made: Manifest) -> Account:
    used = {made.index.key(sample).rsplit("-", 1)[0] for sample in range(made.samples)}
    account = Account(read=source.samples, used=len(used))
    for key in map(source.index.key, range(source.samples)):
        if key not in used:
            account.drop(key, TOO_SHORT, harmless=True)
    account.check("cut_segments")
    return account


def sound_field(source: Manifest) -> Field:
    """The sound field of a folder of clips. Raises DataError where it has none."""
    field = next((field for field in source.fields.values() if field.is_sound), None)
    if field is None:
        raise DataError(
            f"{source.where}: got fields {sorted(source.fields)}, expected a sound (.wav); give a folder of ingest_speech"
        )
    return field


def plan(options: Options, roots: Roots) -> ShardJob:
    """The segments of a folder's clips.

    Raises:
        UserError: no clips there.
    """
    source = Manifest.load(roots.data_root / options.input)
    field = sound_field(source)
    first = decode_wav(_first(source).members[field.extension])
    length = round(options.segment_seconds * first.sample_rate_hz)
    shape = (first.wave.shape[0], length)
    settings = {"segment": length, "sample_rate_hz": first.sample_rate_hz}
    fingerprint = SegmentCutter.fingerprint_of(shape, first.sample_rate_hz)
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(SegmentCutter, field, shape, first.sample_rate_hz),
        encoder={"kind": "segments", "fingerprint": fingerprint, **settings},
        settings=settings,
        batch=options.batch,
        rates={AUDIO: float(first.sample_rate_hz)},
    )


def _first(source: Manifest) -> RawSample:
    return next(read_samples(source.folder / source.shards[0].file))


class SegmentCutter:
    """Cuts the clips of a shard into segments; see data_jobs.ShardEncoder and data_jobs.Placing."""

    def __init__(self, field: Field, shape: tuple[int, int], sample_rate_hz: int, device: str):
        self.field, self.shape, self.sample_rate_hz = field, shape, sample_rate_hz
        self.fingerprint = self.fingerprint_of(shape, sample_rate_hz)
        self.fields = [Field(AUDIO, f"{AUDIO}.npy", "float16", shape)]

    @staticmethod
    def fingerprint_of(shape: tuple[int, int], sample_rate_hz: int) -> str:
        return xxhash.xxh3_128_hexdigest(f"segments of {shape} at {sample_rate_hz} Hz".encode())

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        """The whole clips, which `place` cuts."""
        out = []
        for sample in samples:
            sound = decode_wav(sample.members[self.field.extension])
            if sound.sample_rate_hz != self.sample_rate_hz or sound.wave.shape[0] != self.shape[0]:
                raise DataError(
                    f"clip {sample.key!r}: got {sound.wave.shape[0]} channels at {sound.sample_rate_hz} Hz, expected {self.shape[0]} at "
                    f"{self.sample_rate_hz} as in the first clip; make that folder again with one rate"
                )
            out.append({AUDIO: sound.wave.astype(np.float16)})
        return out

    def place(self, key: str, values: Mapping[str, Any]) -> Iterable[Row]:
        wave, length = values[AUDIO], self.shape[1]
        whole = wave.shape[1] // length
        starts = [length * k for k in range(whole)]
        if whole and wave.shape[1] % length:
            starts.append(wave.shape[1] - length)
        for number, start in enumerate(starts):
            yield Row(f"{key}-{number:03d}", {AUDIO: wave[:, start : start + length]})


JOB = shard_job(__name__, Options, plan, after=report)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
