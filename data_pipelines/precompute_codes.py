"""Codec codes of clips: a folder of sounds in, a folder of codes out, by Ray Data.

    python data_pipelines/precompute_codes.py --input speech/train/clips --output speech/train/codes --codec-run codec_tiny \\
        --bounds 100 150 200

Field `codes` (T, K) int16: for each of T frames the codes of the K books of a residual quantiser; or of a vocoder's run float32, for each
frame its K log-mels. `label` is copied if the clips have one.
With bounds, samples are in length buckets (`codes<=150`), to which batches are padded. The codec is a run of ours (averaged weights of its
newest checkpoint) or a folder of transformers' EncodecModel. The manifest holds its fingerprint. A clip has as many frames as it takes to
cover it. A rerun makes only what is missing; another codec makes everything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from data_pipelines.cut_segments import sound_field
from data_pipelines.job import Roots
from data_pipelines.options import OneOf, option
from data_pipelines.shard_jobs import EncoderOptions, shard_job
from nexus_scale.conditioners.audio import CODES, CodeConditioner
from nexus_scale.data.buckets import assign_length, check_bounds
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.data.sounds import decode_wav
from nexus_scale.interop import encoders
from nexus_scale.orchestration.data_jobs import Row, ShardJob


class Options(EncoderOptions):
    """Which clips are encoded by which codec."""

    input: str = option(description="folder of clips, below the data root")
    codec: Annotated[
        Mapping[str, Any], OneOf(run="name of a codec's run", folder="folder of transformers' EncodecModel")
    ] = option(description="{run: name} or {folder: path of an EncodecModel}")
    bounds: Sequence[int] | None = option(
        None, description="of the length buckets, in frames, ascending (default: one bucket)"
    )
    batch: int = option(
        32, ge=1, description="clips looked at together; those of one number of frames are encoded at once"
    )

    def check(self) -> None:
        if self.bounds is not None:
            check_bounds(self.bounds)


def plan(options: Options, roots: Roots) -> ShardJob:
    """The codes of a folder's clips.

    Raises:
        UserError: no clips there, or no such codec.
    """
    limits = None if options.bounds is None else check_bounds(options.bounds)
    source = Manifest.load(roots.data_root / options.input)
    sound = sound_field(source)
    codec = encoders.open_codec(options.codec, roots.runs_root, roots.data_root)
    label = source.fields.get("label")
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(ClipEncoder, dict(options.codec), roots.runs_root, roots.data_root, sound, label, limits),
        encoder={
            "kind": "codec",
            "fingerprint": codec.fingerprint,
            "sample_rate_hz": codec.sample_rate_hz,
            "hop": codec.hop,
            "num_codebooks": codec.num_codebooks,
            "codebook_size": codec.codebook_size,
        },
        settings={"fields": [CODES, "label"], "bounds": None if limits is None else list(limits)},
        batch=options.batch,
        rates={CODES: float(codec.sample_rate_hz)},
    )


class ClipEncoder:
    """Encodes the clips of a shard to codes; see data_jobs.ShardEncoder and data_jobs.Placing."""

    def __init__(
        self,
        codec: Mapping[str, Any],
        runs_root: Path,
        data_root: Path,
        sound: Field,
        label: Field | None,
        bounds: tuple[int, ...] | None,
        device: str,
    ):
        self.codec = encoders.open_codec(codec, runs_root, data_root, device=device)
        self.conditioner = CodeConditioner(self.codec)
        self.sound, self.label, self.bounds = sound, label, bounds
        self.fingerprint = self.conditioner.fingerprint
        made = [Field(name, f"{name}.npy", one.dtype, one.shape) for name, one in self.conditioner.fields.items()]
        self.fields = [*made, *([label] if label else [])]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        waves = [self._wave(sample) for sample in samples]
        values: list[dict[str, Any]] = [dict(made) for made in self.conditioner.encode(waves)]
        if self.label:
            for value, sample in zip(values, samples, strict=True):
                value["label"] = decode("cls", sample.members[self.label.extension])
        return values

    def _wave(self, sample: RawSample) -> torch.Tensor:
        sound = decode_wav(sample.members[self.sound.extension])
        if sound.sample_rate_hz != self.codec.sample_rate_hz or sound.wave.shape[0] != 1:
            raise DataError(
                f"clip {sample.key!r}: got {sound.wave.shape[0]} channels at {sound.sample_rate_hz} Hz, the codec takes one at "
                f"{self.codec.sample_rate_hz}; make the clips again with sample_rate_hz: {self.codec.sample_rate_hz}"
            )
        return torch.from_numpy(sound.wave)

    def place(self, key: str, values: Mapping[str, Any]) -> Iterable[Row]:
        bucket = None
        if self.bounds is not None:
            try:
                bucket = assign_length(CODES, len(values[CODES]), self.bounds).name
            except DataError as error:
                raise DataError(f"clip {key!r}: {error}") from None
        return [Row(key, values, bucket)]


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
