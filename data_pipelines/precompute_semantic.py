"""Semantic tokens of clips: a folder of sounds in, a folder of tokens out, by Ray Data.

    python data_pipelines/precompute_semantic.py --input speech/train/clips --semantic speech/units --output speech/train/semantic

Field `semantic` (T',) int16: of each stretch of a clip which group of cluster_features it belongs to. The manifest holds the fingerprint of
the groups and their features. A rerun makes only what is missing; other groups make everything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipelines.cluster_features import check_sound
from data_pipelines.cut_segments import sound_field
from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import EncoderOptions, shard_job
from nexus_scale.conditioners.semantic import SEMANTIC, SemanticConditioner
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import RawSample
from nexus_scale.data.sounds import decode_wav
from nexus_scale.orchestration.data_jobs import ShardJob


class Options(EncoderOptions):
    """Which clips become which tokens."""

    input: str = option(description="folder of clips, below the data root")
    semantic: str = option(description="folder of cluster_features, below the data root")
    batch: int = option(32, ge=1, description="clips decoded at once")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The semantic tokens of a folder's clips.

    Raises:
        UserError: no clips there, or no groups.
    """
    source = Manifest.load(roots.data_root / options.input)
    made = SemanticConditioner.open({"folder": options.semantic}, roots.data_root)
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(SoundReader, options.semantic, roots.data_root, sound_field(source)),
        encoder={
            "kind": SEMANTIC,
            "fingerprint": made.fingerprint,
            "sample_rate_hz": made.sample_rate_hz,
            "hop": made.hop,
            "num_tokens": made.num_tokens,
        },
        settings={"fields": [SEMANTIC]},
        batch=options.batch,
    )


class SoundReader:
    """Reads the clips of a shard as semantic tokens; see data_jobs.ShardEncoder."""

    def __init__(self, semantic: str, data_root: Path, sound: Field, device: str):
        self.conditioner, self.sound = SemanticConditioner.open({"folder": semantic}, data_root, device), sound
        self.fingerprint = self.conditioner.fingerprint
        self.fields = [
            Field(name, f"{name}.npy", one.dtype, one.shape) for name, one in self.conditioner.fields.items()
        ]

    def encode(self, samples: Sequence[RawSample]) -> list[Mapping[str, Any]]:
        return [dict(one) for one in self.conditioner.encode([self._wave(sample) for sample in samples])]

    def _wave(self, sample: RawSample) -> torch.Tensor:
        sound = decode_wav(sample.members[self.sound.extension])
        check_sound(sample.key, sound, self.conditioner.sample_rate_hz)
        return torch.from_numpy(sound.wave)


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
