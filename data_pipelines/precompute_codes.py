"""Codec codes of clips: a folder of sounds in, a folder of codes out, shard by shard, by Ray Data.

    python data_pipelines/precompute_codes.py --input speech/train/clips --output speech/train/codes --codec-run codec_tiny \\
        --bounds 100 150 200

Field `codes` (T, K) int16: of each of T frames, the codes of the K books of a residual quantiser; `label` goes along where the clips have
one. With bounds, samples are in length buckets (`codes<=150`), which batches are padded to. The codec is a run of ours (averaged weights of
its newest checkpoint) or a folder of transformers' EncodecModel; its fingerprint is in the manifest. A clip has as many frames as it takes
to cover it. A rerun redoes nothing that is finished; another codec makes all of it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_pipelines.command import Progress, actor_options, parser, serve
from data_pipelines.cut_segments import sound_field
from data_pipelines.output_folder import makes_folder
from nexus_scale.contracts import UserError
from nexus_scale.data.buckets import assign_length, check_bounds
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.data.sounds import decode_wav
from nexus_scale.interop import encoders
from nexus_scale.orchestration.data_jobs import THREADS, Row, ShardJob, is_done, run_job

CODES = "codes"


@makes_folder
def run(
    *,
    input: str,
    output: str,
    codec: Mapping[str, Any],
    bounds: Sequence[int] | None = None,
    batch: int = 32,
    workers: int | None = None,
    threads: int = THREADS,
    device: str = "auto",
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> Manifest:
    """Makes the folder `output` from the clips in `input`.

    Args:
        codec: {run: name} or {folder: path of an EncodecModel}.
        bounds: of the length buckets, in frames, ascending; None: all samples in one.
        batch: clips that are looked at together; those of one number of frames are encoded at once.
        workers, threads, device: see data_jobs.run_job.
    Raises:
        UserError: no clips there, no such codec, clips of another sample rate, or a clip longer than the last bound.
    """
    job = _job(input, output, codec, bounds, batch, data_root, runs_root)
    return run_job(job, workers=workers, threads=threads, device=device, progress=progress)


def done(
    *,
    input: str,
    output: str,
    codec: Mapping[str, Any],
    bounds: Sequence[int] | None = None,
    batch: int = 32,
    workers: int | None = None,
    threads: int = THREADS,
    device: str = "auto",
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether `output` was made from this input by this codec."""
    try:
        return is_done(_job(input, output, codec, bounds, batch, data_root, runs_root))
    except UserError:
        return False  # no clips or no codec yet: a job before this one makes it


def _job(
    input: str,
    output: str,
    codec: Mapping[str, Any],
    bounds: Sequence[int] | None,
    batch: int,
    data_root: Path,
    runs_root: Path,
) -> ShardJob:
    limits = None if bounds is None else check_bounds(bounds)
    source = Manifest.load(data_root / input)
    sound = sound_field(source)
    opened = encoders.open_codec(codec, runs_root, data_root)
    return ShardJob(
        source=source.folder,
        output=data_root / output,
        make=partial(ClipEncoder, dict(codec), runs_root, data_root, sound, source.fields.get("label"), limits),
        encoder={
            "kind": "codec",
            "fingerprint": opened.fingerprint,
            "sample_rate_hz": opened.sample_rate_hz,
            "hop": opened.hop,
            "num_codebooks": opened.num_codebooks,
            "codebook_size": opened.codebook_size,
        },
        settings={"fields": [CODES, "label"], "bounds": None if limits is None else list(limits)},
        batch=batch,
    )


class ClipEncoder:
    """Clips of a shard to codes; see data_jobs.ShardEncoder and data_jobs.Placing."""

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
        self.sound, self.label, self.bounds = sound, label, bounds
        self.fingerprint = self.codec.fingerprint
        if self.codec.codebook_size > 1 << 15:
            raise DataError(
                f"codec: got books of {self.codec.codebook_size} codes, expected at most {1 << 15}, since int16 holds them"
            )
        codes = Field(CODES, f"{CODES}.npy", "int16", (None, self.codec.num_codebooks))
        self.fields = [codes, *([label] if label else [])]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        waves = [self._wave(sample) for sample in samples]
        frames = [-(-wave.shape[1] // self.codec.hop) for wave in waves]
        values: list[dict[str, Any]] = [{} for _ in samples]
        # Silence fills the last frame and no more: codes of a clip do not depend on its company.
        for count in sorted(set(frames)):
            rows = [row for row, own in enumerate(frames) if own == count]
            length = count * self.codec.hop
            batch = torch.stack([F.pad(waves[row], (0, length - waves[row].shape[1])) for row in rows])  # (n, 1, T)
            codes = self.codec.encode(batch, torch.full((len(rows),), length))  # (n, T', K)
            for row, code in zip(rows, codes[:, :count].cpu().numpy().astype(np.int16), strict=True):
                values[row][CODES] = code
        if self.label:
            for row, sample in zip(values, samples, strict=True):
                row["label"] = decode("cls", sample.members[self.label.extension])
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


def main(argv: list[str] | None = None) -> int:
    command = parser("precompute_codes", __doc__ or "")
    command.add_argument("--input", required=True, help="folder of clips below the data root")
    command.add_argument("--output", required=True, help="folder of codes to make")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--codec-run", help="name of a codec's run")
    which.add_argument("--codec-folder", help="folder of transformers' EncodecModel")
    command.add_argument("--bounds", type=int, nargs="+", help="of the length buckets, in frames (default: one bucket)")
    command.add_argument("--batch", type=int, default=32, help="clips looked at together (default: 32)")
    actor_options(command, threads=THREADS)
    arguments = command.parse_args(argv)
    values = vars(arguments)
    run_name, folder = values.pop("codec_run"), values.pop("codec_folder")
    values["codec"] = {"run": run_name} if run_name else {"folder": folder}
    return serve(run, "precompute_codes", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
