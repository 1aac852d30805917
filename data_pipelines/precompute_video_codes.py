"""Codes of clips: a folder of clips in, a folder of a tokenizer's codes out, by Ray Data.

    python data_pipelines/precompute_video_codes.py --input clips-32/train/clips --output clips-32/train/video_codes \\
        --tokenizer-run magvit2_tiny_clips --masks --outlines

Field `video_codes` (T,): one code for each place, frame by frame and row by row. `--masks` adds `masked_video_codes`, those of the clip
without what a random mask covers, the same in all frames: boxes, wide strokes, or everything around a box. `--outlines` adds
`outline_video_codes`, those of its outlines, `--low` `low_video_codes`, those of the clip at half the height and width. `--frames 9` codes
the first nine frames of each clip alone. `label` is copied if the clips have one. The tokenizer is a run of ours (averaged weights of its
newest checkpoint), whose fingerprint the manifest holds. A rerun makes only what is missing; another tokenizer makes everything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_pipelines.job import Roots
from data_pipelines.options import OneOf, option
from data_pipelines.shard_jobs import EncoderOptions, shard_job
from nexus_scale.conditioners.clips import LOW, MASKED, OUTLINES, VIDEO_CODES, ClipConditioner
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.interop.tokenizers import open_tokenizer
from nexus_scale.orchestration.data_jobs import ShardJob
from nexus_scale.processes.masks import clip_mask

VIDEO = "video"
"""The field of clips that ingest_clips makes."""


class Options(EncoderOptions):
    """Which clips are encoded by which tokenizer."""

    input: str = option(description="folder of clips, below the data root")
    tokenizer: Annotated[Mapping[str, Any], OneOf(run="name of a tokenizer's run")] = option(
        description="{run: name} of a tokenizer"
    )
    batch: int = option(32, ge=1, description="clips encoded at once")
    masks: bool = option(False, description="also codes of each clip without what a random mask covers")
    outlines: bool = option(False, description="also codes of each clip's outlines")
    low: bool = option(False, description="also codes of each clip at half the height and width")
    frames: int = option(0, ge=0, description="the first frames of each clip, which alone are coded; 0: all")
    seed: int = option(0, ge=0, description="of the masks")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The codes of a folder's clips.

    Raises:
        UserError: no clips there, no such tokenizer, or clips whose size it does not take.
    """
    source = Manifest.load(roots.data_root / options.input)
    video = source.fields.get(VIDEO)
    if video is None or video.shape is None:
        raise DataError(
            f"{source.folder}: got fields {sorted(source.fields)}, expected {VIDEO}; give a folder of clips"
        )
    tokenizer = open_tokenizer(options.tokenizer, roots.runs_root, roots.data_root)
    channels, frames, height, width = (side or 1 for side in video.shape)
    if options.frames > frames:
        raise UserError(
            f"precompute_video_codes.frames: got {options.frames}; the clips of {options.input} have {frames}"
        )
    frames = options.frames or frames
    tokenizer.check((channels, frames, height, width))
    if options.low:
        tokenizer.network.check_sizes(frames, height // 2, width // 2)
    label = source.fields.get("label")
    views = {MASKED: options.masks, OUTLINES: options.outlines, LOW: options.low}
    names = [VIDEO_CODES, *(name for name, wanted in views.items() if wanted)]
    rate = source.rates.get(VIDEO)
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(
            ClipEncoder,
            dict(options.tokenizer),
            roots.runs_root,
            roots.data_root,
            video,
            frames,
            label,
            names,
            options.seed,
        ),
        encoder={
            "kind": "tokenizer",
            "fingerprint": tokenizer.fingerprint,
            "codebook_size": tokenizer.codebook_size,
            "frame_codes": tokenizer.frame_codes,
        },
        settings={
            "fields": [*names, "label"],
            **({"masks": options.seed} if options.masks else {}),
            **({"frames": options.frames} if options.frames else {}),
        },
        batch=options.batch,
        rates={} if rate is None else dict.fromkeys(names, rate),
    )


class ClipEncoder:
    """Encodes the clips of a shard to codes; see data_jobs.ShardEncoder."""

    def __init__(
        self,
        tokenizer: Mapping[str, Any],
        runs_root: Path,
        data_root: Path,
        video: Field,
        frames: int,
        label: Field | None,
        names: Sequence[str],
        seed: int,
        device: str,
    ):
        opened = open_tokenizer(tokenizer, runs_root, data_root, device)
        self.conditioner = ClipConditioner(opened)
        self.video, self.frames, self.label, self.names, self.seed = video, frames, label, names, seed
        self.fingerprint = self.conditioner.fingerprint
        assert video.shape is not None
        height, width = (side or 1 for side in video.shape[2:])
        self.size = height, width
        half = {LOW: 2}
        counts = {
            name: int(np.prod(opened.network.code_shape(frames, height // (s := half.get(name, 1)), width // s)))
            for name in names
        }
        made = [Field(name, f"{name}.npy", self.conditioner.dtype, (counts[name],)) for name in names]
        self.fields = [*made, *([label] if label else [])]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        decoded = [torch.from_numpy(decode(self.video.extension, s.members[self.video.extension])) for s in samples]
        clips = [clip[:, : self.frames] for clip in decoded]
        masks = torch.stack([self._mask(sample.key) for sample in samples]) if MASKED in self.names else None
        wanted = {"outlined": OUTLINES in self.names, "low": LOW in self.names}
        values: list[dict[str, Any]] = list(self.conditioner.encode_more(clips, masks, **wanted))
        if self.label:
            for value, sample in zip(values, samples, strict=True):
                value["label"] = decode(self.label.extension, sample.members[self.label.extension])
        return values

    def _mask(self, key: str) -> Tensor:
        """(1, H, W); depends on the seed and on the sample's key."""
        return clip_mask(*self.size, np.random.default_rng([self.seed, xxhash.xxh3_64_intdigest(key.encode())]))


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
