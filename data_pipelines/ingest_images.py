"""Images with captions from anywhere into data folders of ours: `<output>/<split>/images/` for train and heldout.

    python data_pipelines/ingest_images.py --source openmoji --output openmoji-32
    python data_pipelines/ingest_images.py --source photos/ --output photos --resolution 256 --resolution 224x288
    python data_pipelines/ingest_images.py --source a.parquet --weight 3 --source b.tar --weight 1 --output mixed

Fields of a sample: `image`, `caption`, `json` (what its source says about it) and, where all sources have one, `label`.

Splits: groups of samples that belong together (OpenMoji's skin tones of one emoji; otherwise each sample by itself) are
held out by a hash of (seed, group). With labels, the share is exact for each label; without, a group's split never
changes when data are added.

Sizes: an image that has the size of a bucket is not resized. Any other goes to the bucket of the nearest aspect ratio:
it is scaled to cover it (Lanczos) and its overhang is cut evenly on both sides. Without `resolution` each size is kept.

Mixing: with weights, sources are interleaved in their proportion and the scarcest one ends the mix; what is left out is
reported. Without weights everything is taken. The order is a function of the seed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from data_pipelines.command import Progress, parser, serve
from data_pipelines.fitting import FORMATS, Fitted, Size, fit
from data_pipelines.output_folder import makes_folder, refuse_nested
from data_pipelines.signatures import Contents, Signatures, changed_options, differences, refuse_others
from data_pipelines.sources import Entry, Source, SourceSpec, label_numbers, open_source
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder, remove_others
from nexus_scale.durable import write_whole

log = logging.getLogger(__name__)

REPORT = "ingest_report.json"
MAX_SIZES = 64
"""Without `resolution`: more sizes than this are no buckets but a mistake."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Options:
    """What decides the bits of the output."""

    sources: tuple[SourceSpec, ...]
    resolutions: tuple[Size, ...]
    heldout: float
    heldout_captions: int
    shard_samples: int
    seed: int
    max_bad: float
    format: str

    def to_json(self) -> dict[str, Any]:
        values = {**vars(self), "sources": [vars(spec) for spec in self.sources]}
        return json.loads(json.dumps(values))  # tuples become lists, as when it is read back


def options_of(
    *,
    source: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    sources: Sequence[str | Mapping[str, Any]] | None = None,
    resolution: int | str | Sequence[Any] | None = None,
    resolutions: Sequence[Any] | None = None,
    heldout: float = 0.125,
    heldout_captions: int | None = None,
    shard_samples: int | None = None,
    seed: int = 0,
    max_bad: float = 0.01,
    format: str = "png",
) -> Options:
    """Checks the options of `run`.

    Raises:
        UserError: names the option.
    """
    if (source is None) == (sources is None):
        raise UserError("ingest_images: give `source` (one) or `sources` (several to mix).")
    given: Any = source if sources is None else sources
    specs = tuple(SourceSpec.of(each) for each in ([given] if isinstance(given, str | Mapping) else given))
    if not specs:
        raise UserError("ingest_images: sources is empty; expected at least one.")
    if len({spec.weight is None for spec in specs}) == 2:
        raise UserError("ingest_images: some sources have a weight and some have none; give all of them one, or none.")
    openmoji = any(spec.path == "openmoji" for spec in specs)
    if not 0.0 <= heldout <= 0.5:
        raise UserError(f"ingest_images: heldout is {heldout}, expected a share from 0 to 0.5.")
    if not 0.0 <= max_bad < 1.0:
        raise UserError(f"ingest_images: max_bad is {max_bad}, expected a share from 0 to below 1.")
    if format not in FORMATS:
        raise UserError(f"ingest_images: format is {format!r}, expected one of {', '.join(FORMATS)}.")
    shard_samples = shard_samples if shard_samples is not None else (256 if openmoji else 1024)
    if shard_samples < 1:
        raise UserError(f"ingest_images: shard_samples is {shard_samples}, expected at least 1.")
    sizes = resolutions if resolutions is not None else resolution
    if resolution is not None and resolutions is not None:
        raise UserError("ingest_images: give `resolution` or `resolutions`, not both.")
    # The quickstart draws 42 samples of each of OpenMoji's six groups, two of each held-out prompt. With 42 prompts held out, a third
    # of the 131 foods would be missing from training.
    captions = heldout_captions if heldout_captions is not None else (21 if openmoji and heldout > 0 else 0)
    return Options(specs, _sizes(sizes), float(heldout), captions, shard_samples, seed, float(max_bad), format)


@makes_folder
def run(
    *,
    output: str,
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
    threads: int | None = None,
    **options: Any,
) -> None:
    """Makes `<output>/train/images` and `<output>/heldout/images`, and `<output>/ingest_report.json` beside them.

    Args:
        output: folder below `data_root`.
        options: source or sources (see sources.SourceSpec); resolution: a size (256), or [height, width], or a list of
            these; heldout: share of groups; heldout_captions: at least so many different captions of each label;
            shard_samples; seed; max_bad: share of samples that may be bad before the job gives up (1 %); format: png
            (lossless), webp (lossless where encoded here) or jpg; an image that has the format and a bucket's size is
            stored as it is.
        threads: that decode and resize; the output does not depend on it.
    Raises:
        UserError: nothing to read, a missing column, too many bad samples, or an output folder of other options. Where the same
            options meet other contents (an image, a caption, a table that was edited), the data are made again.
    """
    chosen = options_of(**options)
    folder = data_root / output
    opened = [open_source(spec, data_root) for spec in chosen.sources]
    places = [data_root / spec.path for spec in chosen.sources if spec.path != "openmoji"]
    refuse_nested(folder, *(place for place in places if place.is_dir()))
    signatures = Signatures(folder, data_root)
    contents = _contents(signatures, opened)
    before = _report(folder)
    if before is not None:
        if _same(before, chosen, contents) and _finished(folder, before):
            signatures.save()
            return
        if any(path.is_file() for path in folder.glob(f"*/images/{MANIFEST_FILE}")):
            refuse_others(folder, before["options"], chosen.to_json())
            log.info("%s: %s: made again", folder, differences(before.get("contents", {}), contents) or "not whole")
    _Ingest(chosen, opened, contents, folder, threads or min(8, os.cpu_count() or 1), progress).run()
    signatures.save()


def done(*, output: str, data_root: Path, runs_root: Path, threads: int | None = None, **options: Any) -> bool:
    """Whether the folders are there, made with these options from these sources."""
    chosen = options_of(**options)
    before = _report(data_root / output)
    if before is None or not _finished(data_root / output, before):
        return False
    if changed_options(before["options"], chosen.to_json()):
        return False
    signatures = Signatures(data_root / output, data_root)
    same = _same(before, chosen, _contents(signatures, [open_source(spec, data_root) for spec in chosen.sources]))
    if same:
        signatures.save()
    return same


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and isinstance(report.get("options"), dict) else None


def _contents(signatures: Signatures, opened: Sequence[Source]) -> dict[str, str]:
    """Of everything that is read: images, captions beside them, tables and what they name, tars."""
    return signatures.of(file for source in opened for file in source.files)


def _same(before: Mapping[str, Any], options: Options, contents: Contents) -> bool:
    return not changed_options(before["options"], options.to_json()) and before.get("contents") == contents


def _finished(folder: Path, report: Mapping[str, Any]) -> bool:
    try:
        return all(
            Manifest.load(folder / split / "images").hash == hash_ for split, hash_ in report["manifests"].items()
        )
    except (DataError, KeyError):
        return False


# ------------------------------------------------------------------------------------------------- the job


class Picked(NamedTuple):
    """An entry of the mix: which source it is of, its key in the output, its split and label."""

    source: int
    entry: Entry
    key: str
    split: str
    label: int | None


@dataclass
class _Ingest:
    options: Options
    sources: Sequence[Source]
    contents: Contents
    folder: Path
    threads: int
    progress: Progress | None

    def run(self) -> None:
        # Everything is decided before a pixel is decoded: labels, splits, mix, order.
        labels = label_numbers([entry for source in self.sources for entry in source.entries])
        splits = _split(self.sources, self.options, labels is not None)
        picked, left_out = self._mix(labels, splits)
        total = len(picked) + sum(sum(source.bad.values()) for source in self.sources)
        bad: Counter[str] = Counter()
        for source in self.sources:
            bad.update(source.bad)
        self._check(bad, total)

        # Decoding and resizing run in threads, writing follows the order of the mix.
        names = sorted({one.split for one in picked}, reverse=True)
        fields = self._fields(labels is not None)
        writers = {
            split: _Folder(self.folder / split / "images", fields, self.options.shard_samples) for split in names
        }
        enlarged = 0
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                fitted = _in_order(pool, lambda one: (one[0], self._fit(one[1])), self._read(picked), 4 * self.threads)
                for count, (one, result) in enumerate(fitted, start=1):
                    if isinstance(result, str):
                        bad[result] += 1
                        self._check(bad, total)
                    else:
                        enlarged += result.enlarged
                        writers[one.split].write(one.key, self._sample(one, result), result.bucket)
                        self._check_sizes(writers)
                    if self.progress is not None:
                        self.progress(count, len(picked))
            for writer in writers.values():
                writer.commit()
        finally:
            for writer in writers.values():
                writer.close()
        licence, attribution = (
            "; ".join(sorted({getattr(s.spec, what) for s in self.sources} - {""}))
            for what in ("licence", "attribution")
        )
        manifests = {split: writer.finish(licence, attribution) for split, writer in writers.items()}
        self._write_report(manifests, labels, bad, left_out, enlarged)

    def _mix(self, labels: Mapping[Any, int] | None, splits: Mapping[str, str]) -> tuple[list[Picked], list[int]]:
        """The order of all samples, and how many of each source its weight leaves out."""
        ordered = [
            list(source.entries)
            if source.streams
            else sorted(source.entries, key=lambda entry, n=number: _hash(self.options.seed, "order", n, entry.key))  # type: ignore[misc]
            for number, source in enumerate(self.sources)
        ]
        counts = [len(entries) for entries in ordered]
        weights = [spec.weight for spec in self.options.sources]
        taken = list(counts)
        if all(weight is not None for weight in weights):
            rounds = min(count / weight for count, weight in zip(counts, weights, strict=True) if weight)
            taken = [
                min(count, math.floor(rounds * weight + 1e-9))
                for count, weight in zip(counts, weights, strict=True)
                if weight
            ]
            if not all(taken):
                raise UserError(
                    f"ingest_images: with weights {weights} of sources of {counts} samples some source gives none; "
                    "give it a larger weight.",
                    3,
                )
        alone = len(self.sources) == 1
        picked = []
        for number, place in _interleave(taken):
            entry = ordered[number][place]
            label = None if labels is None or entry.label is None else labels[entry.label]
            key = entry.key if alone else f"{number}-{entry.key}"
            picked.append(Picked(number, entry, key, splits[entry.group], label))
        return picked, [count - take for count, take in zip(counts, taken, strict=True)]

    def _read(self, picked: Sequence[Picked]) -> Iterator[tuple[Picked, bytes | None]]:
        """Bytes in the order of the mix, which for a stream is that in which it was listed."""
        readers = [
            source.read([one.entry for one in picked if one.source == n]) for n, source in enumerate(self.sources)
        ]
        for one in picked:
            entry, data = next(readers[one.source])
            if entry.key != one.entry.key:
                raise UserError(
                    f"{self.sources[one.source].spec.path}: it changed while it was read; run the job again.", 3
                )
            yield one, data

    def _fit(self, data: bytes | None) -> Fitted | str:
        return (
            "a file that is missing or cannot be read"
            if data is None
            else fit(data, self.options.resolutions, self.options.format)
        )

    def _fields(self, has_labels: bool) -> list[Field]:
        sizes = self.options.resolutions
        shape = (*sizes[0], 3) if len(sizes) == 1 else (None, None, 3)
        fields = [
            Field("image", self.options.format, "uint8", shape),
            Field("caption", "txt", "text"),
            Field("json", "json", "json"),
        ]
        return [*fields, Field("label", "cls", "int64", ())] if has_labels else fields

    def _sample(self, one: Picked, result: Fitted) -> dict[str, Any]:
        described = {
            "key": one.entry.key,
            "source": self.options.sources[one.source].path,
            "size": list(result.original),
            **one.entry.extra,
        }
        sample = {"image": result.image, "caption": one.entry.caption, "json": described}
        return sample if one.label is None else {**sample, "label": one.label}

    def _check(self, bad: Counter[str], total: int) -> None:
        count = sum(bad.values())
        if count > self.options.max_bad * total:
            reasons = "; ".join(f"{number} x {reason}" for reason, number in bad.most_common(5))
            raise UserError(
                f"ingest_images: {count} of {total} samples are bad, more than max_bad={self.options.max_bad:g} allows: "
                f"{reasons}. Correct the source, or raise max_bad to leave them out.",
                3,
            )

    def _check_sizes(self, writers: Mapping[str, _Folder]) -> None:
        if not self.options.resolutions and len(set().union(*(w.buckets for w in writers.values()))) > MAX_SIZES:
            raise UserError(f"ingest_images: got over {MAX_SIZES} sizes of images; give `resolution`, such as 256.", 3)

    def _write_report(
        self,
        manifests: Mapping[str, Manifest],
        labels: Mapping[Any, int] | None,
        bad: Counter[str],
        left_out: list[int],
        enlarged: int,
    ) -> None:
        report = {
            "options": self.options.to_json(),
            "contents": self.contents,
            "samples": {split: manifest.samples for split, manifest in manifests.items()},
            "manifests": {split: manifest.hash for split, manifest in manifests.items()},
            "labels": None if labels is None else {str(name): number for name, number in labels.items()},
            "skipped": dict(sorted(bad.items())),
            "left_out_by_weight": left_out,
            "enlarged": enlarged,
        }
        write_whole(self.folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())
        if enlarged:
            log.warning("ingest_images: %d images are smaller than their bucket and were enlarged", enlarged)
        for reason, count in bad.items():
            log.warning("ingest_images: left out %d samples: %s", count, reason)


class _Folder:
    """Shards of at most so many samples, in one folder."""

    def __init__(self, path: Path, fields: Sequence[Field], shard_samples: int):
        self.path, self.fields, self.shard_samples = path, fields, shard_samples
        self.files: list[str] = []
        self.buckets: set[str] = set()
        self._writer: ShardWriter | None = None
        (path / MANIFEST_FILE).unlink(missing_ok=True)

    def write(self, key: str, sample: Mapping[str, Any], bucket: str) -> None:
        if self._writer is None:
            self.files.append(f"shard-{len(self.files):06d}.tar")
            self._writer = ShardWriter(self.path / self.files[-1], self.fields).__enter__()
        self._writer.write(key, sample, bucket)
        self.buckets.add(bucket)
        if self._writer.samples == self.shard_samples:
            self.commit()

    def commit(self) -> None:
        """Gives the shard that is being written its name."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.__exit__(None, None, None)

    def close(self) -> None:
        """Drops a shard that was begun and not finished."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            error = RuntimeError("the shard was not finished")
            writer.__exit__(RuntimeError, error, None)

    def finish(self, licence: str, attribution: str) -> Manifest:
        remove_others(self.path, self.files)
        return finish_folder(self.path, files=self.files, licence=licence, attribution=attribution)


# ------------------------------------------------------------------------------------------------- splits and order


def _hash(*parts: Any) -> int:
    """64 bits that depend on the parts alone."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())


def _split(sources: Sequence[Source], options: Options, by_label: bool) -> dict[str, str]:
    """`train` or `heldout` for each group. A group that several sources share is one group.

    Raises:
        UserError: there are too few groups of a label to hold `heldout_captions` of them out.
    """
    strata: dict[Any, dict[str, set[str]]] = defaultdict(dict)
    home: dict[str, Any] = {}
    for source in sources:
        for entry in source.entries:
            # A group whose members differ in label follows its first: it is not cut.
            stratum = home.setdefault(entry.group, entry.label if by_label else None)
            strata[stratum].setdefault(entry.group, set()).add(entry.caption)
    splits = dict.fromkeys(home, "train")
    for label, groups in strata.items():
        draws = {group: _hash(options.seed, "split", group) for group in groups}
        ranked = sorted(groups, key=lambda group, draws=draws: (draws[group], group))  # type: ignore[misc]
        below = sum(draw < options.heldout * 2.0**64 for draw in draws.values())
        wanted = round(options.heldout * len(ranked)) if by_label else below
        captions: set[str] = set()
        for place, group in enumerate(ranked):
            if place >= wanted and len(captions) >= options.heldout_captions:
                break
            if place >= wanted and 2 * place >= len(ranked):
                raise UserError(
                    f"ingest_images: holding {options.heldout_captions} captions of label {label!r} out would take more "
                    f"than half of its {len(ranked)} groups; lower heldout_captions.",
                    3,
                )
            splits[group] = "heldout"
            captions |= groups[group]
    if options.heldout > 0 and "heldout" not in splits.values():
        log.warning(
            "ingest_images: %d groups are too few to hold %g of them out",
            len(splits),
            options.heldout,
        )
    if "train" not in splits.values():
        raise UserError(
            f"ingest_images: all {len(splits)} groups would be held out; lower heldout ({options.heldout}).", 3
        )
    return splits


def _interleave(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(source, place in it): at every point each source has given its share, to within one sample."""
    given = [0] * len(counts)
    for _ in range(sum(counts)):
        # The source that is furthest behind its share comes next; exact in integers.
        number = min(
            (n for n, count in enumerate(counts) if given[n] < count), key=lambda n: ((given[n] + 0.5) / counts[n], n)
        )
        yield number, given[number]
        given[number] += 1


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`map` with at most `window` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sizes(value: Any) -> tuple[Size, ...]:
    """256, "256x384", [256, 384], or a list of these."""
    if value is None:
        return ()
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and not (len(value) == 2 and all(isinstance(v, int) for v in value))
    ):
        return tuple(dict.fromkeys(size for each in value for size in _sizes(each)))
    if isinstance(value, str):
        value = [int(part) if part.isdigit() else part for part in value.split("x")]
    size = (value, value) if isinstance(value, int) else tuple(value) if len(value) == 2 else tuple(value) * 2
    if len(size) != 2 or not all(isinstance(side, int) and 1 <= side <= 8192 for side in size):
        raise UserError(
            f"ingest_images: resolution {value!r}: expected a size such as 256, or height and width such as [256, 384]."
        )
    return (size,)


def main(argv: list[str] | None = None) -> int:
    command = parser("ingest_images", __doc__ or "")
    add = command.add_argument
    add(
        "--source",
        action="append",
        required=True,
        help="openmoji, a folder, a table (csv, tsv, jsonl, parquet), a tar or a pattern; may be repeated",
    )
    add(
        "--weight",
        action="append",
        type=float,
        help="share of the source in the mix; as often as --source, in its order",
    )
    add("--output", required=True, help="folder below the data root")
    add("--resolution", action="append", help="256, or 256x384 (height x width); may be repeated")
    add("--heldout", type=float, default=0.125, help="share of groups that is held out (default: 0.125)")
    add("--heldout-captions", type=int, help="held out of each label, at least (default: 42 for openmoji, else 0)")
    add("--shard-samples", type=int, help="samples in a shard (default: 256 for openmoji, else 1024)")
    add("--seed", type=int, default=0)
    add("--max-bad", type=float, default=0.01, help="share of bad samples above which the job gives up (default: 0.01)")
    add("--format", choices=sorted(FORMATS), default="png", help="how images are stored (default: png)")
    add("--threads", type=int, help="threads that decode and resize (default: up to 8)")
    for name in ("path", "caption", "label"):
        add(f"--{name}-column", default=name, help=f"column of a table, key of JSON (default: {name})")
    add("--group-key", help="column or JSON key by which samples stay together when data are split")
    arguments = command.parse_args(argv)
    values = vars(arguments)
    weights = values.pop("weight") or [None] * len(values["source"])
    if len(weights) != len(values["source"]):
        command.error(f"got {len(weights)} --weight for {len(values['source'])} --source")
    columns = {name: values.pop(name) for name in ("path_column", "caption_column", "label_column", "group_key")}
    values["sources"] = [
        {"path": path, "weight": weight, **columns} for path, weight in zip(values.pop("source"), weights, strict=True)
    ]
    return serve(run, "ingest_images", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
