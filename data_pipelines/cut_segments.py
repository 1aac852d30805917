"""Segments of one length for training a codec: a folder of clips in, shards of float16 arrays out, shard by shard, by Ray Data.

    python data_pipelines/cut_segments.py --input speech/train/clips --output speech/train/segments --segment-seconds 1

Field `audio` (C, T) float16 in [-1, 1], by the clips' sample rate. A clip is cut into segments, one behind the other; the last one ends
where the clip ends, and overlaps the one before. Clips shorter than a segment are left out, and named in `<output>/ingest_report.json`. A
rerun redoes nothing that is finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines.accounts import Account
from data_pipelines.command import Progress, actor_options, parser, serve
from data_pipelines.output_folder import makes_folder
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, read_samples
from nexus_scale.data.sounds import decode_wav
from nexus_scale.io.durable import atomic_write
from nexus_scale.orchestration.data_jobs import THREADS, Row, ShardJob, is_done, run_job

log = logging.getLogger(__name__)

AUDIO = "audio"
REPORT = "ingest_report.json"
TOO_SHORT = "a clip shorter than a segment"


@makes_folder
def run(
    *,
    input: str,
    output: str,
    segment_seconds: float,
    batch: int = 64,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> Manifest:
    """Makes the folder `output` from the clips in `input`.

    Args:
        batch: clips that are decoded at once.
        workers: see data_jobs.run_job.
    Raises:
        UserError: no clips there, of different sample rates, or none that is as long as a segment.
    """
    job = _job(input, output, segment_seconds, batch, data_root)
    made = run_job(job, workers=workers, threads=THREADS, device="cpu", progress=progress)
    account = _account(Manifest.load(data_root / input), made)
    atomic_write(made.folder / REPORT, json.dumps(account.to_json(), indent=1, ensure_ascii=False))
    if left := account.dropped[TOO_SHORT]:
        log.warning("cut_segments: %d clips are shorter than %g s and were left out", left, segment_seconds)
    return made


def _account(source: Manifest, made: Manifest) -> Account:
    used = {made.index.key(sample).rsplit("-", 1)[0] for sample in range(made.samples)}
    account = Account(read=source.samples, used=len(used))
    for key in map(source.index.key, range(source.samples)):
        if key not in used:
            account.drop(key, TOO_SHORT, harmless=True)
    account.check("cut_segments")
    return account


def done(
    *,
    input: str,
    output: str,
    segment_seconds: float,
    batch: int = 64,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether `output` was made from this input with segments of this length."""
    try:
        return is_done(_job(input, output, segment_seconds, batch, data_root))
    except DataError:
        return False  # no clips yet: a job before this one makes them


def sound_field(source: Manifest) -> Field:
    """The clips' field of sound. Raises DataError where a folder has none."""
    field = next((field for field in source.fields.values() if field.is_sound), None)
    if field is None:
        raise DataError(
            f"{source.where}: got fields {sorted(source.fields)}, expected a sound (.wav); give a folder of ingest_speech"
        )
    return field


def _job(input: str, output: str, segment_seconds: float, batch: int, data_root: Path) -> ShardJob:
    if not 0 < segment_seconds <= 3600:
        raise UserError(f"cut_segments: segment_seconds {segment_seconds:g}: expected up to an hour")
    source = Manifest.load(data_root / input)
    field = sound_field(source)
    first = decode_wav(_first(source).members[field.extension])
    length = round(segment_seconds * first.sample_rate_hz)
    shape = (first.wave.shape[0], length)
    settings = {"segment": length, "sample_rate_hz": first.sample_rate_hz}
    return ShardJob(
        source=source.folder,
        output=data_root / output,
        make=partial(SegmentCutter, field, shape, first.sample_rate_hz),
        encoder={
            "kind": "segments",
            "fingerprint": SegmentCutter.fingerprint_of(shape, first.sample_rate_hz),
            **settings,
        },
        settings=settings,
        batch=batch,
    )


def _first(source: Manifest) -> RawSample:
    return next(read_samples(source.folder / source.shards[0].file))


class SegmentCutter:
    """Clips of a shard to segments; see data_jobs.ShardEncoder and data_jobs.Placing."""

    def __init__(self, field: Field, shape: tuple[int, int], sample_rate_hz: int, device: str):
        self.field, self.shape, self.sample_rate_hz = field, shape, sample_rate_hz
        self.fingerprint = self.fingerprint_of(shape, sample_rate_hz)
        self.fields = [Field(AUDIO, f"{AUDIO}.npy", "float16", shape)]

    @staticmethod
    def fingerprint_of(shape: tuple[int, int], sample_rate_hz: int) -> str:
        return xxhash.xxh3_128_hexdigest(f"segments of {shape} at {sample_rate_hz} Hz".encode())

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        """The whole clips; `place` cuts them."""
        out = []
        for sample in samples:
            sound = decode_wav(sample.members[self.field.extension])
            if sound.sample_rate_hz != self.sample_rate_hz or sound.wave.shape[0] != self.shape[0]:
                raise DataError(
                    f"clip {sample.key!r}: got {sound.wave.shape[0]} channels at {sound.sample_rate_hz} Hz, expected {self.shape[0]} at "
                    f"{self.sample_rate_hz} as in the first clip; make the folder again with one rate"
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


def main(argv: list[str] | None = None) -> int:
    command = parser("cut_segments", __doc__ or "")
    command.add_argument("--input", required=True, help="folder of clips below the data root")
    command.add_argument("--output", required=True, help="folder of segments to make")
    command.add_argument("--segment-seconds", type=float, required=True, help="length of a segment")
    command.add_argument("--batch", type=int, default=64, help="clips decoded at once (default: 64)")
    actor_options(command)
    return serve(run, "cut_segments", command.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
