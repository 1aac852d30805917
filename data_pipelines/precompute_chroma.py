"""Melodies of clips, as pitch classes: a folder of sounds in, a folder of one pitch class a step out, by Ray Data.

    python data_pipelines/precompute_chroma.py --input music-32khz/train/clips --output music-32khz/train/chroma

Field `chroma` (T', 12) float16: of each step of 4,096 samples the loudest pitch class, C first. A rerun makes only what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from data_pipelines.cut_segments import sound_field
from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.conditioners.chroma import CHROMA, ChromaConditioner
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, read_samples
from nexus_scale.data.sounds import decode_wav
from nexus_scale.orchestration.data_jobs import ShardJob


class Options(ShardOptions):
    """Which clips."""

    input: str = option(description="folder of clips, below the data root")
    batch: int = option(32, ge=1, description="clips decoded at once")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The melodies of a folder's clips.

    Raises:
        UserError: no clips there.
    """
    source = Manifest.load(roots.data_root / options.input)
    field = sound_field(source)
    first = next(read_samples(source.folder / source.shards[0].file))
    rate = decode_wav(first.members[field.extension]).sample_rate_hz
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(MelodyEncoder, field, rate),
        encoder={"kind": CHROMA, "fingerprint": ChromaConditioner(rate).fingerprint, "sample_rate_hz": rate},
        settings={"sample_rate_hz": rate},
        batch=options.batch,
    )


class MelodyEncoder:
    """Encodes the clips of a shard to pitch classes; see data_jobs.ShardEncoder."""

    def __init__(self, field: Field, sample_rate_hz: int, device: str):
        self.field, self.conditioner = field, ChromaConditioner(sample_rate_hz)
        self.fingerprint = self.conditioner.fingerprint
        self.fields = [
            Field(name, f"{name}.npy", one.dtype, one.shape) for name, one in self.conditioner.fields.items()
        ]

    def encode(self, samples: Sequence[RawSample]) -> list[Mapping[str, Any]]:
        return [dict(one) for one in self.conditioner.encode([self._wave(sample) for sample in samples])]

    def _wave(self, sample: RawSample) -> torch.Tensor:
        sound = decode_wav(sample.members[self.field.extension])
        if sound.sample_rate_hz != self.conditioner.sample_rate_hz:
            raise DataError(
                f"clip {sample.key!r}: got {sound.sample_rate_hz} Hz, expected {self.conditioner.sample_rate_hz} as in the first clip; "
                "make that folder again with one rate"
            )
        return torch.from_numpy(sound.wave)


JOB = shard_job(__name__, Options, plan)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
