"""Videos with captions to clips: a folder or a table in, shards of frames out, shard by shard, by Ray Data.

    python data_pipelines/ingest_clips.py --source my_videos --output clips-32 --size 32x32 --frames 9 --fps 8

A source is a folder of videos (a.mp4 with a.txt or a.json beside it), or a CSV, TSV, JSONL or Parquet table of paths and captions.
Videos are mp4, webm, mkv, mov, avi, gif or webp, and with `--frames 1` also png and jpg: images are trained on beside videos as a source
of their own, of one frame. The rules by which they are cut, resampled and dropped are those of
data_pipelines.video_decoding. Fields: `video` (3, F, H, W) uint8, `caption`, `json` (where a clip is from) and, where all videos have
one (`label_column`), `label`. Each output folder, `<output>/train/clips` and `<output>/heldout/clips`, describes itself, and
`<output>/clips.json` counts what was dropped, by reason.
A rerun redoes nothing that is finished.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.command import Progress, parser, serve
from data_pipelines.sources import Entry, Source, SourceSpec, label_numbers, open_source
from data_pipelines.video_decoding import STILL_FORMATS, VIDEO_EXTENSIONS, Rules, clips_of
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Field, Manifest, canonical_json
from nexus_scale.data.shards import ShardWriter, finish_folder, is_finished
from nexus_scale.durable import write_whole
from nexus_scale.orchestration.mapped import map_rows

log = logging.getLogger(__name__)

REPORT = "clips.json"
MISSING = "a file that is missing or cannot be read"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Task:
    """One shard to make. `origin`: its videos and the rules; `videos`: (key, path, caption, label, what else is known)."""

    output: str
    origin: str
    videos: tuple[tuple[str, str, str, int | None, str], ...]
    rules: Rules

    @property
    def note(self) -> Path:
        """What became of the shard's videos: written last, so that it says that they are done."""
        return Path(f"{self.output}.note.json")


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
    plan = _plan(source, output, size, frames, fps, max_clips, loop, min_motion, heldout, shard_videos, seed, data_root)
    if plan.finished():
        return
    plan.make(max_bad, workers, progress)


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
        plan = _plan(
            source, output, size, frames, fps, max_clips, loop, min_motion, heldout, shard_videos, seed, data_root
        )
    except UserError:
        return False  # no source yet: a job before this one makes it
    return plan.finished()


@dataclass(frozen=True)
class Plan:
    """All shards of all splits, and what is known of their source before a frame is decoded."""

    folder: Path
    source: Source
    tasks: Mapping[str, Sequence[Task]]
    rules: Rules
    identity: str

    def clips(self, split: str) -> Path:
        return self.folder / split / "clips"

    def finished(self) -> bool:
        try:
            report = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
            if report["identity"] != self.identity:
                return False
            for split, known in report["manifests"].items():
                manifest = Manifest.load(self.clips(split))
                manifest.verify()
                if manifest.hash != known:
                    return False
        except (OSError, ValueError, KeyError, DataError):
            return False
        return True

    def make(self, max_bad: float, workers: int | None, progress: Progress | None) -> None:
        """Missing shards, then manifests, then the report."""
        missing = [task for tasks in self.tasks.values() for task in tasks if not _is_made(task)]
        total = sum(len(task.videos) for tasks in self.tasks.values() for task in tasks)
        ready = total - sum(len(task.videos) for task in missing)
        for split in self.tasks:
            self.clips(split).mkdir(parents=True, exist_ok=True)
            (self.clips(split) / MANIFEST_FILE).unlink(missing_ok=True)  # what is being changed must not look finished
        if progress is not None:
            progress(ready, total)
        for videos in (_in_process if workers == 0 else _on_ray)(missing, workers) if missing else ():
            ready += videos
            if progress is not None:
                progress(ready, total)

        dropped, clips, manifests = Counter(self.source.bad), Counter[str](), {}
        for split, tasks in self.tasks.items():
            files = []
            for task in tasks:
                note = json.loads(task.note.read_text(encoding="utf-8"))
                dropped.update(note["dropped"])
                clips[split] += note["clips"]
                files += [Path(task.output).name] if note["clips"] else []
            _remove_others(self.clips(split), {Path(task.output).name for task in tasks})
            if files:
                spec = self.source.spec
                manifest = finish_folder(
                    self.clips(split), files=files, licence=spec.licence, attribution=spec.attribution
                )
                manifests[split] = manifest.hash
        self._check(dropped, clips, total, max_bad)
        report = {
            "identity": self.identity,
            "rules": self.rules.to_json(),
            "videos": total,
            "clips": dict(clips),
            "dropped": dict(sorted(dropped.items())),
            "manifests": manifests,
        }
        write_whole(self.folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())
        if not clips["heldout"]:
            log.warning("ingest_clips: nothing is held out; raise heldout, or give smaller groups")
        for reason, count in sorted(dropped.items()):
            log.warning("ingest_clips: dropped %d: %s", count, reason)

    def _check(self, dropped: Counter[str], clips: Counter[str], total: int, max_bad: float) -> None:
        from data_pipelines.video_decoding import UNREADABLE

        said = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common(5))
        broken = dropped[UNREADABLE] + dropped[MISSING]
        if broken > max_bad * total:
            raise UserError(
                f"ingest_clips: {broken} of {total} videos are broken, more than max_bad={max_bad:g} allows: {said}. Correct the "
                "source, or raise max_bad to leave them out.",
                3,
            )
        if not clips["train"]:
            raise UserError(f"ingest_clips: {total} videos give no clip for training: {said}. Change the rules.", 3)


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
) -> Plan:
    if not 0 <= heldout < 1 or shard_videos < 1:
        raise UserError(
            f"ingest_clips: heldout {heldout:g}, shard_videos {shard_videos}: expected [0, 1) and at least 1"
        )
    rules = Rules(_size(size), frames, float(fps), max_clips, loop, float(min_motion))
    kinds = VIDEO_EXTENSIONS | set(STILL_FORMATS) if frames == 1 else VIDEO_EXTENSIONS
    opened = open_source(SourceSpec.of(source), data_root, kinds)
    if opened.streams or any(not isinstance(entry.image, Path) for entry in opened.entries):
        raise UserError(f"{opened.spec.path}: clips are read from a folder or a table of paths, not from tars", 3)
    folder, labels = data_root / output, label_numbers(opened.entries)
    ordered = sorted(opened.entries, key=lambda entry: (_hash(seed, "order", entry.key), entry.key))
    tasks = {}
    for split in SPLITS:
        chosen = [e for e in ordered if (_hash(seed, "split", e.group) < heldout * 2.0**64) == (split == "heldout")]
        parts = [chosen[i : i + shard_videos] for i in range(0, len(chosen), shard_videos)]
        if parts:
            tasks[split] = [
                _task(folder / split / "clips" / f"shard-{i:06d}.tar", part, labels, rules)
                for i, part in enumerate(parts)
            ]
    identity = xxhash.xxh3_128_hexdigest(canonical_json([[task.origin for task in part] for part in tasks.values()]))
    return Plan(folder, opened, tasks, rules, identity)


def _task(output: Path, entries: Sequence[Entry], labels: Mapping[Any, int] | None, rules: Rules) -> Task:
    videos = tuple(
        (
            entry.key,
            str(entry.image),
            entry.caption,
            None if labels is None else labels[entry.label],
            json.dumps(dict(entry.extra), ensure_ascii=False, default=str),
        )
        for entry in entries
    )
    marks = [[key, _mark(Path(path)), caption, label, extra] for key, path, caption, label, extra in videos]
    return Task(str(output), canonical_json([marks, rules.to_json()]).decode(), videos, rules)


def _mark(path: Path) -> list[int]:
    """Size and time of a file: another one shows that its clips must be cut again. Nothing where it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _is_made(task: Task) -> bool:
    try:
        note = json.loads(task.note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if note.get("origin") != xxhash.xxh3_128_hexdigest(task.origin.encode()):
        return False
    return not note["clips"] or is_finished(Path(task.output), task.origin)


def make_shard(task: Task) -> int:
    """Decodes a shard's videos; returns how many there were. The shard appears whole or not at all, then its note."""
    dropped: Counter[str] = Counter()
    height, width = task.rules.size
    fields = [
        Field("video", "video.npy", "uint8", (3, task.rules.frames, height, width)),
        Field("caption", "txt", "text"),
        Field("json", "json", "json"),
    ]
    if all(label is not None for _, _, _, label, _ in task.videos):
        fields.append(Field("label", "cls", "int64", ()))
    output = Path(task.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    writer: ShardWriter | None = None
    clips = 0
    try:
        for key, path, caption, label, extra in task.videos:
            try:
                data = Path(path).read_bytes()
            except OSError:
                dropped[MISSING] += 1
                continue
            found, lost = clips_of(data, Path(path).suffix.lower().lstrip("."), task.rules)
            dropped.update(lost)
            for number, clip in enumerate(found):
                writer = writer or ShardWriter(output, fields, origin=task.origin).__enter__()
                said = {
                    "key": key,
                    "start_seconds": clip.start_seconds,
                    "size": list(clip.original),
                    **json.loads(extra),
                }
                sample = {"video": clip.frames.transpose(3, 0, 1, 2).copy(), "caption": caption, "json": said}
                if label is not None:
                    sample["label"] = label
                writer.write(f"{key}-{number:03d}", sample, f"{task.rules.frames}x{height}x{width}")
                clips += 1
    except BaseException as error:
        if writer is not None:
            writer.__exit__(type(error), error, None)
        raise
    if writer is not None:
        writer.__exit__(None, None, None)
    note = {
        "origin": xxhash.xxh3_128_hexdigest(task.origin.encode()),
        "clips": clips,
        "dropped": dict(sorted(dropped.items())),
    }
    write_whole(task.note, canonical_json(note))
    return len(task.videos)


def _remove_others(folder: Path, names: set[str]) -> None:
    """Shards of an earlier plan that had more of them."""
    for path in folder.glob("shard-*.tar*"):
        if path.name.removesuffix(".json").removesuffix(".note") not in names:
            path.unlink()


# ------------------------------------------------------------------------------------------------- who does it


def _in_process(tasks: Sequence[Task], workers: int | None) -> Iterator[int]:
    yield from map(make_shard, tasks)


def make_row(row: Mapping[str, Any]) -> int:
    """`make_shard` of a task that came as JSON."""
    rules = json.loads(row["rules"])
    videos = tuple((key, path, caption, label, extra) for key, path, caption, label, extra in json.loads(row["videos"]))
    return make_shard(Task(row["output"], row["origin"], videos, Rules(**{**rules, "size": tuple(rules["size"])})))


def _on_ray(tasks: Sequence[Task], workers: int | None) -> Iterator[int]:
    rows = [
        {
            "output": task.output,
            "origin": task.origin,
            "videos": json.dumps(task.videos),
            "rules": json.dumps(task.rules.to_json()),
        }
        for task in tasks
    ]
    yield from map_rows(make_row, rows, workers=workers)


def _hash(*parts: Any) -> int:
    """64 bits that depend on the parts alone."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())


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
    add("--group-key", help="column or JSON key by which videos stay together when data are split")
    arguments = command.parse_args(argv)
    values = vars(arguments)
    columns = {name: values.pop(name) for name in ("path_column", "caption_column", "label_column", "group_key")}
    values["source"] = {"path": values["source"], **columns}
    return serve(run, "ingest_clips", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
