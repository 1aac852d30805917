"""Videos with captions to clips: a folder or a table in, shards of frames out, shard by shard, by Ray Data.

    python data_pipelines/ingest_clips.py --source my_videos --output clips-32 --size 32x32 --frames 9 --fps 8

A source is a folder of videos (a.mp4 with a.txt or a.json beside it), or a CSV, TSV, JSONL or Parquet table of paths and captions.
Videos are mp4, webm, mkv, mov, avi, mpg, gif, webp, apng or avif, and with `--frames 1` also png, jpg and other images: they are trained on
beside videos as a source of their own, of one frame. The rules by which they are cut, resampled and dropped are those of
data_pipelines.video_decoding. Fields: `video` (3, F, H, W) uint8, `json` (where a clip is from), `caption`, where any video has one (those
without are dropped then; an autoencoder needs none), and `label`, where all have one (`label_column`). Each output folder,
`<output>/train/clips` and `<output>/heldout/clips`, describes itself. `<output>/ingest_report.json` says how many videos were read, used
and dropped, and for each that was dropped where it lies and why. Videos are decoded in a process of their own
(data_pipelines.decoding_process): one that kills it is dropped like others. A rerun redoes nothing that is finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.accounts import check_max_bad
from data_pipelines.command import Progress, parser, serve
from data_pipelines.decoding_process import decode_apart
from data_pipelines.output_folder import makes_folder, refuse_nested
from data_pipelines.shard_plan import SPLITS, Plan, Shard, Work, contents_of, keyed
from data_pipelines.signatures import Contents, Signatures
from data_pipelines.sources import (
    Entry,
    Source,
    SourceSpec,
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
"""Reasons that are rules of the recipe; all others are faults of the data, which `max_bad` bounds."""


@makes_folder
def run(
    *,
    source: str | Mapping[str, Any],
    output: str,
    size: str | Sequence[int],
    frames: int,
    fps: float,
    max_clips: int = 1,
    loop: bool = False,
    min_motion: float = 0.0,
    heldout: float = 0.125,
    shard_videos: int = 64,
    seed: int = 0,
    max_bad: float = 0.01,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> None:
    """Makes `<output>/train/clips` and `<output>/heldout/clips`.

    Args:
        source: a folder or a table, or a mapping with its columns, see data_pipelines.sources.SourceSpec; `group_key` keeps videos
            together when they are split, `label_column` names their classes.
        size: height and width, such as "32x48".
        frames, fps, max_clips, loop, min_motion: see data_pipelines.video_decoding.
        heldout: share of groups.
        shard_videos: videos whose clips share a shard.
        max_bad: share of videos that may be dropped as unreadable before the job gives up. Other rules drop without a limit.
        workers: processes of Ray Data; 0 decodes in this process; None: one for each CPU of the cluster.
    Raises:
        UserError: nothing to read, a rule that leaves nothing, or too many broken files.
    """
    check_max_bad("ingest_clips", max_bad)
    opened, plan = _plan(
        source, output, size, frames, fps, max_clips, loop, min_motion, heldout, shard_videos, seed, data_root
    )
    if plan.finished():
        return
    spec = opened.spec
    made = plan.make(make_row, workers=workers, progress=progress, licence=spec.licence, attribution=spec.attribution)
    made = made.settle(opened, "ingest_clips", "videos", max_bad, BY_RULE)
    plan.write_report(made, rules=Rules(_size(size), frames, float(fps), max_clips, loop, float(min_motion)).to_json())
    if not made.samples["heldout"]:
        log.warning("ingest_clips: nothing is held out; raise heldout, or give smaller groups")
    for reason, count in sorted((made.account.dropped + made.parts).items()):
        log.warning("ingest_clips: dropped %d: %s", count, reason)


def done(
    *,
    source: str | Mapping[str, Any],
    output: str,
    size: str | Sequence[int],
    frames: int,
    fps: float,
    max_clips: int = 1,
    loop: bool = False,
    min_motion: float = 0.0,
    heldout: float = 0.125,
    shard_videos: int = 64,
    seed: int = 0,
    max_bad: float = 0.01,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether the folders are there, made from these videos by these rules."""
    try:
        _, plan = _plan(
            source, output, size, frames, fps, max_clips, loop, min_motion, heldout, shard_videos, seed, data_root
        )
    except UserError:
        return False  # no source yet: a job before this one makes it
    return plan.finished()


def _plan(
    source: str | Mapping[str, Any],
    output: str,
    size: str | Sequence[int],
    frames: int,
    fps: float,
    max_clips: int,
    loop: bool,
    min_motion: float,
    heldout: float,
    shard_videos: int,
    seed: int,
    data_root: Path,
) -> tuple[Source, Plan]:
    if not 0 <= heldout < 1 or shard_videos < 1:
        raise UserError(
            f"ingest_clips: heldout {heldout:g}, shard_videos {shard_videos}: expected [0, 1) and at least 1"
        )
    rules = Rules(_size(size), frames, float(fps), max_clips, loop, float(min_motion))
    kinds = VIDEO_EXTENSIONS | STILL_EXTENSIONS if frames == 1 else VIDEO_EXTENSIONS
    (opened,) = drop_odd_labels([open_source(SourceSpec.of(source), data_root, kinds, captions="auto")])
    if any(entry.caption for entry in opened.entries):
        opened = require_captions(opened)
    if opened.streams or any(not isinstance(entry.image, Path) for entry in opened.entries):
        raise UserError(f"{opened.spec.path}: clips are read from a folder or a table of paths, not from tars", 3)
    if (place := data_root / opened.spec.path).is_dir():
        refuse_nested(data_root / output, place)
    labels = label_numbers(opened.entries)
    ordered = sorted(opened.entries, key=lambda entry: (keyed(seed, "order", entry.key), entry.key))
    works = {}
    signatures = Signatures(data_root / output, data_root)
    contents = contents_of(ordered, signatures)
    for split in SPLITS:
        chosen = [e for e in ordered if (keyed(seed, "split", e.group) < heldout * 2.0**64) == (split == "heldout")]
        parts = [chosen[i : i + shard_videos] for i in range(0, len(chosen), shard_videos)]
        place = data_root / output / split / "clips"
        works[split] = [
            _work(place / f"shard-{i:06d}.tar", part, contents, labels, rules) for i, part in enumerate(parts)
        ]
    options = {
        "source": opened.spec.to_json(),
        "heldout": heldout,
        "shard_videos": shard_videos,
        "seed": seed,
        **rules.to_json(),
    }
    made = {split: part for split, part in works.items() if part}
    return opened, Plan(data_root / output, "clips", REPORT, made, options, signatures)


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
    """Decodes a work's videos; returns how many there were. The shard appears whole or not at all, then its note."""
    work = Work.of(row)
    rules = Rules(**{**work.rules, "size": tuple(work.rules["size"])})
    height, width = rules.size
    fields = [
        Field("video", "video.npy", "uint8", (3, rules.frames, height, width)),
        Field("json", "json", "json"),
    ]
    captioned = any(caption for _, _, caption, _, _ in work.inputs)  # all videos of the job, or none
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
        raise UserError(f"ingest_clips: size {value!r}: expected height and width, such as 32x48") from None
    return height, width


def main(argv: list[str] | None = None) -> int:
    command = parser("ingest_clips", __doc__ or "")
    add = command.add_argument
    add("--source", required=True, help="folder of videos, or a table (csv, tsv, jsonl, parquet)")
    add("--output", required=True, help="folder below the data root")
    add("--size", required=True, help="height x width, such as 32x48")
    add("--frames", type=int, required=True, help="of a clip; an autoencoder that halves time twice takes 1 + 4k")
    add("--fps", type=float, required=True, help="frames a second, after resampling")
    add("--max-clips", type=int, default=1, help="of one video (default: 1)")
    add("--loop", action="store_true", help="play videos that are too short again from their start")
    add("--min-motion", type=float, default=0.0, help="mean change of a pixel, 0..255, below which a clip is dropped")
    add("--heldout", type=float, default=0.125, help="share of groups that is held out (default: 0.125)")
    add("--shard-videos", type=int, default=64, help="videos whose clips share a shard (default: 64)")
    add("--seed", type=int, default=0)
    add(
        "--max-bad",
        type=float,
        default=0.01,
        help="share of broken videos above which the job gives up (default: 0.01)",
    )
    add("--workers", type=int, help="processes of Ray Data; 0: in this process (default: one a CPU)")
    for name in ("path", "caption", "label"):
        add(f"--{name}-column", default=name, help=f"column of a table, key of JSON (default: {name})")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="names or paths to leave out; may be repeated")
    add("--group-key", help="column or JSON key by which videos stay together when data are split")
    arguments = command.parse_args(argv)
    values = vars(arguments)
    columns = {name: values.pop(name) for name in ("path_column", "caption_column", "label_column", "group_key")}
    values["source"] = {"path": values["source"], **columns, "ignore": values.pop("ignore")}
    return serve(run, "ingest_clips", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
