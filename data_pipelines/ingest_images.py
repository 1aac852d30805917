"""Image data sets from folders, tables and WebDataset tars: `<output>/train/images/` and `<output>/heldout/images/`.

    python data_pipelines/ingest_images.py --source openmoji --output openmoji-32
    python data_pipelines/ingest_images.py --source photos/ --output photos --resolution 256 --resolution 224x288
    python data_pipelines/ingest_images.py --source a.parquet --weight 3 --source b.tar --weight 1 --output mixed

Fields of a sample: `image`, `caption`, `json` (what the source says about it) and `label`, if all samples have one. As soon as one sample
has a caption, all need one. If none has (classes, autoencoders), there is no field `caption`. `--captions required` or `none` overrides
this.

data_pipelines/sources.py describes what a source may hold and how keys are made; data_pipelines/image_decoding.py how images are decoded
(orientation, ICC profiles, 16 bits, transparency on `--background`, first frames). Every item that was read is used, or dropped and listed
in `ingest_report.json` with its place (`table.csv:17`, `a.tar:0001.jpg`) and reason. Hidden files, files of other kinds and what `--ignore`
names are not faults; of everything else at most `--max-bad` may be bad.

Splits: groups of samples that belong together (the skin tones of one OpenMoji emoji; otherwise each sample alone) are held out by a hash
of (seed, group). With labels, the share is exact for each label. Without labels, the split of a group never changes when data are added.

Sizes: an image that has the size of a bucket is not resized. Any other image goes to the bucket of the nearest aspect ratio: it is scaled
to cover the bucket (Lanczos) and cropped evenly on both sides, with `--crop random` at a place that follows from the seed and its key.
Without `resolution` every image keeps its size. `--size-fields` stores what was done, as conditions of a network (SDXL, PixArt-alpha):
`original_size`, `crop_top_left` in the scaled image, `target_size`, (2,) each, vertical before horizontal, and `crop_top_left_mirrored` for
samples that training flips.

Mixing: with weights, sources are interleaved in their proportion until the scarcest one ends; the report says what was left out. Without
weights everything is taken. The order is a function of the seed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipelines.accounts import Account, printable
from data_pipelines.command import Progress
from data_pipelines.fitting import UNDECODABLE, Fitted, fit_image
from data_pipelines.image_decoding import ImageError
from data_pipelines.image_options import Options
from data_pipelines.job import Job, Roots
from data_pipelines.mixing import interleave, split_groups
from data_pipelines.output_folder import refuse_nested
from data_pipelines.shard_plan import keyed
from data_pipelines.signatures import (
    REPORT,
    Contents,
    Signatures,
    changed_options,
    differences,
    read_record,
    refuse_foreign,
    refuse_others,
)
from data_pipelines.sources import (
    Entry,
    Source,
    drop_odd_labels,
    label_numbers,
    open_source,
    require_captions,
    why_unread,
)
from data_pipelines.tars import DAMAGED
from nexus_scale.contracts import SIZES, UserError
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder, remove_others
from nexus_scale.io.durable import atomic_write

log = logging.getLogger(__name__)

MAX_SIZES = 64
"""Most different sizes without `resolution`: more are a mistake and not buckets."""
SIZE_FIELDS = (*SIZES, "crop_top_left_mirrored")
MISSING = "a file that is missing or cannot be read"
BY_WEIGHT = "left out by the weights of the mix"

T = TypeVar("T")
R = TypeVar("R")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/train/images` and `<output>/heldout/images`, and `<output>/ingest_report.json` beside them.

    Raises:
        UserError: nothing to read, a missing column, too many bad samples, or an output folder made with other options. If only the
            contents of the sources changed (an image, a caption, a table), the data are made again.
    """
    data_root, folder = roots.data_root, roots.data_root / options.output
    sources = [data_root / os.path.expanduser(spec.path) for spec in options.specs if spec.path != "openmoji"]
    refuse_nested(
        folder, *(place for place in sources if os.path.isdir(place))
    )  # before listing everything, which might be all of `/`
    opened = [open_source(spec, data_root, captions=options.captions) for spec in options.specs]
    signatures = Signatures(folder, data_root)
    contents = _contents(signatures, opened)
    refuse_foreign(folder, REPORT)
    before = _report(folder)
    if before is not None:
        changed = changed_options(before["options"], options.to_json(), _defaults())
        if not changed and _finished(folder, before):
            if "contents" not in before and _as_listed(before, opened, contents, signatures):
                before["contents"] = contents
                atomic_write(folder / REPORT, json.dumps(before, indent=1, ensure_ascii=False).encode())
            if before.get("contents") == contents:
                signatures.save()
                return
        if any(path.is_file() for path in folder.glob(f"*/*/{MANIFEST_FILE}")):
            refuse_others(folder, before["options"], options.to_json(), _defaults())
            kept = before.get("contents")
            said = differences(kept if isinstance(kept, dict) else {}, contents)
            log.info("%s: %s: made again", folder, said or "not whole")
    _Ingest(options, opened, contents, folder, progress).run()
    signatures.save()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the folders are there, made with these options from these sources."""
    data_root, folder = roots.data_root, roots.data_root / options.output
    before = _report(folder)
    if before is None or not _finished(folder, before):
        return False
    if changed_options(before["options"], options.to_json(), _defaults()):
        return False
    signatures = Signatures(folder, data_root)
    opened = [open_source(spec, data_root, captions=options.captions) for spec in options.specs]
    same = bool(before.get("contents") == _contents(signatures, opened))
    if same:
        signatures.save()
    return same


def _defaults() -> dict[str, Any]:
    """The options where a recipe, or the report of an older version, does not name them."""
    return Options(source="any", output="any").to_json()


def _as_listed(report: Mapping[str, Any], opened: Sequence[Source], contents: Contents, signatures: Signatures) -> bool:
    """Whether the sources still match the report of an older version, which lists names and sizes of images, hashes of tars and tables."""
    try:
        before = {(name, size): hashes for source in report["files"] for name, size, *hashes in source}
        now = {
            (path.name, path.stat().st_size): contents[signatures.name(path)]
            for source in opened
            for path in source.files
        }
    except (KeyError, TypeError, ValueError, OSError):
        return False
    beside = (".txt", ".json", ".cls")
    return all(mark in now and hashes in ([], [now[mark]]) for mark, hashes in before.items()) and all(
        mark in before or mark[0].endswith(beside) for mark in now
    )


def _report(folder: Path) -> dict[str, Any] | None:
    report = read_record(folder / REPORT)
    return report if isinstance(report.get("options"), dict) else None


def _contents(signatures: Signatures, opened: Sequence[Source]) -> dict[str, str]:
    """Hashes of everything that is read: images, the files beside them, tables and the files they name, tars."""
    return signatures.of(file for source in opened for file in source.files)


def _finished(folder: Path, report: Mapping[str, Any]) -> bool:
    try:
        for split, known in report["manifests"].items():
            manifest = Manifest.load(folder / split / "images")
            manifest.verify()
            if manifest.hash != known:
                return False
    except (DataError, KeyError, AttributeError, TypeError):
        return False
    return True


# ------------------------------------------------------------------------------------------------- the job


class MixEntry(NamedTuple):
    """An entry of the mix: the number of its source, its key in the output, its split and label."""

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
    progress: Progress | None
    account: Account = dataclasses.field(default_factory=Account)
    captioned: bool = False
    labels: Mapping[Any, int] | None = None
    enlarged: int = 0
    notes: Counter[str] = dataclasses.field(default_factory=Counter)

    def run(self) -> None:
        # Everything is decided before a pixel is decoded: captions, labels, splits, mix, order.
        self._choose_captions()
        self.account = Account.merged(source.account for source in self.sources)
        self._check_tars()
        self._check_bad()
        self.labels = label_numbers([entry for source in self.sources for entry in source.entries])
        picked, left_out = self._mix(self._splits())
        names = sorted({one.split for one in picked}, reverse=True)
        fields, limit = self._fields(), self.options.samples_per_shard
        writers = {split: _Folder(self.folder / split / "images", fields, limit) for split in names}
        try:
            self._write_samples(picked, writers)
            self.account.check("ingest_images")
            if "train" not in writers or not writers["train"].files:
                raise UserError(f"ingest_images: no sample is left for training: {self.account.said()}.", 3)
            for writer in writers.values():
                writer.commit()
        finally:
            for writer in writers.values():
                writer.close()
        self._write_report(self._finish(writers), left_out)

    def _choose_captions(self) -> None:
        captions = self.options.captions
        self.captioned = captions == "required" or (
            captions == "auto" and any(entry.caption for source in self.sources for entry in source.entries)
        )
        sources = drop_odd_labels(self.sources)
        self.sources = [require_captions(source) for source in sources] if self.captioned else sources
        if not self.captioned:
            log.warning("ingest_images: no sample has a caption: the data have no field `caption`")

    def _splits(self) -> dict[str, str]:
        return split_groups(
            self.sources,
            seed=self.options.seed,
            heldout=self.options.heldout,
            heldout_captions=self.options.least_captions,
            by_label=self.labels is not None,
        )

    def _write_samples(self, picked: Sequence[MixEntry], writers: Mapping[str, _Folder]) -> None:
        """Decoding and resizing run in threads; writing follows the order of the mix."""
        threads = self.options.threads or min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            fitted = _in_order(
                pool, lambda one: (one[0], self._fit(one[0].entry, one[1])), self._read(picked), 4 * threads
            )
            for count, (one, result) in enumerate(fitted, start=1):
                if isinstance(result, _Refused):
                    self.account.drop(one.entry.place, result.reason, detail=result.detail)
                    self._check_bad()
                else:
                    self._write(one, result, writers)
                if self.progress is not None:
                    self.progress(count, len(picked))

    def _write(self, one: MixEntry, result: Fitted, writers: Mapping[str, _Folder]) -> None:
        self.enlarged += result.enlarged
        self.notes.update(result.notes)
        writer = writers[one.split]
        writer.write(one.key, self._sample(one, result, writer.fields), result.bucket)
        self._check_sizes(writers)
        self.account.used += 1

    def _finish(self, writers: Mapping[str, _Folder]) -> dict[str, Manifest]:
        """The manifests of the splits that have samples."""
        licence, attribution = (
            "; ".join(sorted({getattr(source.spec, what) for source in self.sources} - {""}))
            for what in ("licence", "attribution")
        )
        made = {split: writer.finish(licence, attribution) for split, writer in writers.items()}
        return {split: manifest for split, manifest in made.items() if manifest is not None}

    def _mix(self, splits: Mapping[str, str]) -> tuple[list[MixEntry], list[int]]:
        """All samples in order, and how many of each source its weight leaves out."""
        ordered = [
            list(source.entries)
            if source.streams
            else sorted(source.entries, key=lambda entry, n=number: keyed(self.options.seed, "order", n, entry.key))  # type: ignore[misc]
            for number, source in enumerate(self.sources)
        ]
        counts = [len(entries) for entries in ordered]
        taken = self._taken(counts)
        alone = len(self.sources) == 1
        picked = []
        for number, place in interleave(taken):
            entry = ordered[number][place]
            label = None if self.labels is None or entry.label is None else self.labels[entry.label]
            key = entry.key if alone else f"{number}-{entry.key}"
            picked.append(MixEntry(number, entry, key, splits[entry.group], label))
        for entries, take in zip(ordered, taken, strict=True):
            for entry in entries[take:]:
                self.account.drop(entry.place, BY_WEIGHT, harmless=True)
        return picked, [count - take for count, take in zip(counts, taken, strict=True)]

    def _taken(self, counts: Sequence[int]) -> list[int]:
        """How many samples of each source the weights of the mix take."""
        weights = [spec.weight for spec in self.options.specs]
        if any(weight is None for weight in weights):
            return list(counts)
        pairs = [(count, weight) for count, weight in zip(counts, weights, strict=True) if weight]
        rounds = min(count / weight for count, weight in pairs)
        taken = [min(count, math.floor(rounds * weight + 1e-9)) for count, weight in pairs]
        if not all(taken):
            raise UserError(
                f"ingest_images: with weights {weights} of sources of {counts} samples some source gives none; "
                "give it a larger weight.",
                3,
            )
        return taken

    def _read(self, picked: Sequence[MixEntry]) -> Iterator[tuple[MixEntry, bytes | None]]:
        """The bytes of each entry in the order of the mix, in which a stream keeps the order of its list."""
        readers = [
            source.read([one.entry for one in picked if one.source == n]) for n, source in enumerate(self.sources)
        ]
        for one in picked:
            entry, data = next(readers[one.source], (None, None))
            if entry is None or entry.key != one.entry.key:
                raise UserError(
                    f"{self.sources[one.source].spec.path}: changed while it was read; run the job again.", 3
                )
            yield one, data

    def _fit(self, entry: Entry, data: bytes | None) -> Fitted | _Refused:
        if data is None:
            return _Refused(MISSING, why_unread(entry.image) if isinstance(entry.image, Path) else "")
        try:
            at = _random_place(self.options.seed, entry.key) if self.options.crop == "random" else None
            return fit_image(data, self.options.sizes, self.options.format, self.options.colour, at)
        except ImageError as error:
            return _Refused(UNDECODABLE, str(error))

    def _fields(self) -> list[Field]:
        sizes = self.options.sizes
        shape = (*sizes[0], 3) if len(sizes) == 1 else (None, None, 3)
        return [
            Field("image", self.options.format, "uint8", shape),
            *([Field("caption", "txt", "text")] if self.captioned else []),
            Field("json", "json", "json"),
            *([Field("label", "cls", "int64", ())] if self.labels is not None else []),
            *([Field(name, f"{name}.npy", "int64", (2,)) for name in SIZE_FIELDS] if self.options.size_fields else []),
        ]

    def _sample(self, one: MixEntry, result: Fitted, fields: Sequence[Field]) -> dict[str, Any]:
        described = {
            "key": one.entry.key,
            "source": printable(self.options.specs[one.source].path),
            "size": list(result.original),
            **one.entry.extra,
        }
        sample: dict[str, Any] = {
            "image": result.image,
            "caption": one.entry.caption,
            "json": described,
            "label": one.label,
        }
        sizes = result.original, result.corner, result.size, result.mirrored
        sample |= {name: np.array(size, np.int64) for name, size in zip(SIZE_FIELDS, sizes, strict=True)}
        return {field.name: sample[field.name] for field in fields}

    def _check_bad(self) -> None:
        self.account.check_bad("ingest_images", self.options.max_bad)

    def _check_tars(self) -> None:
        """Raises UserError where too large a share of the tars is damaged; how many samples each has lost is unknown."""
        total, damaged = sum(len(source.tars) for source in self.sources), self.account.dropped[DAMAGED]
        if damaged > self.options.max_bad * total:
            said = "; ".join(
                f"{item['place']}: {item['detail']}" for item in self.account.items if item["reason"] == DAMAGED
            )
            raise UserError(
                f"ingest_images: {damaged} of {total} tars are damaged, more than max_bad={self.options.max_bad:g} allows: {said[:1000]}. "
                "Restore them, or set max_bad to 1 to use what can be read.",
                3,
            )

    def _check_sizes(self, writers: Mapping[str, _Folder]) -> None:
        if not self.options.sizes and len(set().union(*(w.buckets for w in writers.values()))) > MAX_SIZES:
            raise UserError(f"ingest_images: got over {MAX_SIZES} sizes of images; give `resolution`, such as 256.", 3)

    def _write_report(self, manifests: Mapping[str, Manifest], left_out: list[int]) -> None:
        dropped, harmless = self.account.dropped, self.account.harmless
        report = {
            "options": self.options.to_json(),
            "contents": self.contents,
            "samples": {split: manifest.samples for split, manifest in manifests.items()},
            "manifests": {split: manifest.hash for split, manifest in manifests.items()},
            "labels": None if self.labels is None else {str(name): number for name, number in self.labels.items()},
            "skipped": {reason: count for reason, count in sorted(dropped.items()) if reason not in harmless},
            "left_out_by_weight": left_out,
            "enlarged": self.enlarged,
            "notes": dict(sorted(self.notes.items())),
            "account": self.account.to_json(),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        # A file name that is not UTF-8 becomes a JSON escape, from which it can be read back.
        atomic_write(self.folder / REPORT, text.encode("utf-8", "backslashreplace"))
        self._log_notes()

    def _log_notes(self) -> None:
        if self.enlarged:
            log.warning("ingest_images: %d images are smaller than their bucket and were enlarged", self.enlarged)
        for note, count in sorted(self.notes.items()):
            log.info("ingest_images: %d images: %s", count, note)
        first: dict[str, str] = {}
        for item in self.account.items:
            first.setdefault(item["reason"], item["place"])
        for reason, count in self.account.dropped.items():
            log.log(
                logging.INFO if reason in self.account.harmless else logging.WARNING,
                "ingest_images: left out %d: %s (such as %s; all are listed in %s)",
                count,
                reason,
                first.get(reason, "others"),
                REPORT,
            )


def _random_place(seed: int, key: str) -> tuple[float, float]:
    """Where an image is cropped, across and down, each in [0, 1)."""
    across, down = (keyed(seed, way, key) / 2.0**64 for way in ("across", "down"))
    return min(across, 1 - 2**-53), min(down, 1 - 2**-53)


class _Refused(NamedTuple):
    """Why an image was dropped, with details."""

    reason: str
    detail: str


class _Folder:
    """Writes a folder of shards with at most `shard_samples` samples each."""

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
        """Finishes the shard that is being written."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.__exit__(None, None, None)

    def close(self) -> None:
        """Discards a shard that is not finished."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            error = RuntimeError("the shard was not finished")
            writer.__exit__(RuntimeError, error, None)

    def finish(self, licence: str, attribution: str) -> Manifest | None:
        """The manifest; None where every sample was dropped."""
        remove_others(self.path, self.files)
        if not self.files:
            return None
        return finish_folder(self.path, files=self.files, licence=licence, attribution=attribution)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`map` with at most `window` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
