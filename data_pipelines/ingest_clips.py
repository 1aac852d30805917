"""Clips from videos with captions: a folder or a table in, shards of frames out, by Ray Data.

    python data_pipelines/ingest_clips.py --source my_videos --output clips-32 --size 32x32 --frames 9 --fps 8

A source is a folder of videos (a.mp4 with a.txt or a.json beside it), or a CSV, TSV, JSONL or Parquet table of paths and captions. Videos
are mp4, webm, mkv, mov, avi, mpg, gif, webp, apng or avif. With `--frames 1` they may also be png, jpg and other images, to train on
images beside videos as a source of their own. data_pipelines.video_decoding lists the rules by which videos are cut, resampled and
dropped.

Fields: `video` (3, F, H, W) uint8; `json` (where a clip is from); `caption`, if any video has one (those without are then dropped; an
autoencoder needs none); `label`, if all have one (`label_column`). The output folders are `<output>/train/clips` and
`<output>/heldout/clips`. `<output>/ingest_report.json` says how many videos were read, used and dropped, with the place and reason of each
that was dropped. A video that crashes its decoder is dropped like any other (data_pipelines.decoding_process). A rerun makes only what is
missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from data_pipelines.clip_options import IngestOptions
from data_pipelines.command import Progress
from data_pipelines.decoding_process import decode_apart
from data_pipelines.job import Job, Roots
from data_pipelines.options import option
from data_pipelines.output_folder import refuse_nested
from data_pipelines.shard_plan import Plan, Shard, Work, contents_of, keyed, works_by_split
from data_pipelines.signatures import Contents, Signatures
from data_pipelines.source_spec import SourceFlag, SourceSpec
from data_pipelines.sources import (
    Entry,
    Source,
    drop_odd_labels,
    label_numbers,
    open_source,
    require_captions,
)
from data_pipelines.video_decoding import (
    NO_FRAMES,
    STILL,
    STILL_EXTENSIONS,
    TOO_SHORT,
    VERSION,
    VIDEO_EXTENSIONS,
    Rules,
    answer,
    clips_in,
)
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Field, canonical_json

log = logging.getLogger(__name__)

REPORT = "ingest_report.json"
BY_RULE = frozenset({NO_FRAMES, TOO_SHORT, STILL})
"""Reasons that follow from the recipe. All others are faults of the data, and `max_bad` bounds them."""


class Options(IngestOptions):
    """Which videos become clips, and by which rules (see data_pipelines.video_decoding)."""

    source: Annotated[str | Mapping[str, Any], SourceFlag("videos")] = option(
        description="a folder or a table, or a mapping with its columns, see data_pipelines.sources.SourceSpec; `group_key` keeps videos "
        "together when they are split, `label_column` names their classes"
    )
    size: str | Sequence[int] = option(description="height x width, such as 32x48")
    frames: int = option(description="frames of a clip; an autoencoder that halves time twice takes 1 + 4k")
    fps: float = option(description="frames a second, after resampling")
    max_clips: int = option(1, description="clips of one video, at most")
    loop: bool = option(False, description="repeat videos that are too short for a clip")
    min_motion: float = option(0.0, description="mean change of a pixel, 0..255, below which a clip is dropped")
    shard_videos: int = option(64, ge=1, description="videos whose clips share a shard")

    @property
    def rules(self) -> Rules:
        """How videos are cut, resampled and dropped."""
        return Rules(_size(self.size), self.frames, self.fps, self.max_clips, self.loop, self.min_motion)

    def check(self) -> None:
        SourceSpec.of(self.source)
        _ = self.rules


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/train/clips` and `<output>/heldout/clips`.

    Raises:
        UserError: nothing to read, rules that leave nothing, or too many broken files.
    """
    opened, plan = _plan(options, roots)
    if plan.finished():
        return
    spec = opened.spec
    made = plan.make(
        make_row, workers=options.workers, progress=progress, licence=spec.licence, attribution=spec.attribution,
        rates={"video": float(options.fps)},
    )  # fmt: skip
    made = made.settle(opened, "ingest_clips", "videos", options.max_bad, BY_RULE)
    plan.write_report(made, rules=options.rules.to_json())
    if not made.samples["heldout"]:
        log.warning("ingest_clips: nothing is held out; raise heldout, or give smaller groups")
    for reason, count in sorted((made.account.dropped + made.parts).items()):
        log.warning("ingest_clips: dropped %d: %s", count, reason)


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the folders are there, made from these videos by these rules."""
    try:
        _, plan = _plan(options, roots)
    except UserError:
        return False  # no source yet: an earlier step of the recipe makes it
    return plan.finished()


def _plan(options: Options, roots: Roots) -> tuple[Source, Plan]:
    rules, folder = options.rules, roots.data_root / options.output
    opened = _opened(options, roots)
    if (place := roots.data_root / opened.spec.path).is_dir():
        refuse_nested(folder, place)
    labels = label_numbers(opened.entries)
    ordered = sorted(opened.entries, key=lambda entry: (keyed(options.seed, "order", entry.key), entry.key))
    signatures = Signatures(folder, roots.data_root)
    contents = contents_of(ordered, signatures)
    works = works_by_split(
        folder,
        ordered,
        lambda tar, entries: _work(tar, entries, contents, labels, rules),
        lambda entry: entry.group,
        heldout=options.heldout,
        seed=options.seed,
        shard_inputs=options.shard_videos,
    )
    decides = {name: getattr(options, name) for name in ("heldout", "shard_videos", "seed")}
    signed = {"source": opened.spec.to_json(), **decides, **rules.to_json()}
    return opened, Plan(folder, "clips", REPORT, works, signed, signatures)


def _opened(options: Options, roots: Roots) -> Source:
    kinds = VIDEO_EXTENSIONS | STILL_EXTENSIONS if options.frames == 1 else VIDEO_EXTENSIONS
    spec = SourceSpec.of(options.source)
    (opened,) = drop_odd_labels([open_source(spec, roots.data_root, kinds, captions="auto")])
    if any(entry.caption for entry in opened.entries):
        opened = require_captions(opened)
    if opened.streams or any(not isinstance(entry.image, Path) for entry in opened.entries):
        raise UserError(f"{spec.path}: clips are read from a folder or a table of paths, not from tars", 3)
    return opened


def _work(
    output: Path, entries: Sequence[Entry], contents: Contents, labels: Mapping[Any, int] | None, rules: Rules
) -> Work:
    videos = [
        [
            entry.key,
            str(entry.image),
            entry.caption,
            None if labels is None else labels[entry.label],
            json.dumps(dict(entry.extra), ensure_ascii=False, default=str),
        ]
        for entry in entries
    ]
    marks = [[video[0], contents[str(video[1])], *video[2:]] for video in videos]
    return Work(str(output), canonical_json([marks, rules.to_json(), VERSION]).decode(), videos, rules.to_json())


def make_row(row: Mapping[str, Any]) -> int:
    """Makes the shard of a work and returns its number of videos. The shard appears whole or not at all, and then its note."""
    work = Work.of(row)
    rules = Rules(**{**work.rules, "size": tuple(work.rules["size"])})
    height, width = rules.size
    fields = [
        Field("video", "video.npy", "uint8", (3, rules.frames, height, width)),
        Field("json", "json", "json"),
    ]
    captioned = any(caption for _, _, caption, _, _ in work.inputs)  # either all videos of the job have one, or none
    if captioned:
        fields.insert(1, Field("caption", "txt", "text"))
    if all(label is not None for _, _, _, label, _ in work.inputs):
        fields.append(Field("label", "cls", "int64", ()))
    with Shard(work, fields) as shard:
        for key, path, caption, label, described in work.inputs:
            shard.account.read += 1
            extra = json.loads(described)
            decoded = decode_apart(answer, path, work.rules)
            lost = [decoded.reason] if decoded.reason else decoded.facts["dropped"]
            found = [] if decoded.reason else clips_in(decoded.facts, decoded.arrays)
            if found:
                shard.account.used += 1
                shard.parts.update(lost)
            else:
                shard.account.drop(key, lost[0], detail=decoded.details)
            for number, clip in enumerate(found):
                said = {
                    "key": key,
                    "start_seconds": clip.start_seconds,
                    "size": list(clip.original),
                    **({"transfer": clip.transfer} if clip.transfer else {}),
                    **extra,
                }
                sample = {"video": clip.frames.transpose(3, 0, 1, 2).copy(), "json": said}
                if captioned:
                    sample["caption"] = caption
                if label is not None:
                    sample["label"] = label
                shard.write(f"{key}-{number:03d}", sample, f"{rules.frames}x{height}x{width}")
    return len(work.inputs)


def _size(value: str | Sequence[int]) -> tuple[int, int]:
    parts = value.split("x") if isinstance(value, str) else list(value)
    try:
        height, width = (int(part) for part in parts)
    except ValueError:
        raise UserError(f"size {value!r}: expected height and width, such as 32x48") from None
    return height, width


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
