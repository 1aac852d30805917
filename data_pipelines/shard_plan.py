"""Shards made one by one from parts of a source: each appears whole or not at all, none is made twice, and every input is accounted for.

A plan knows all shards before the first is made. A shard is named by its number and records in its `origin` what it is made from and
how. A note with the account of its inputs is written last. The report comes after all shards; it says that the folder is finished.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.accounts import Account, printable
from data_pipelines.command import Progress
from data_pipelines.signatures import Signatures, read_record, refuse_foreign, refuse_others
from data_pipelines.sources import Entry, Source
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Field, Manifest, canonical_json
from nexus_scale.data.shards import ShardWriter, finish_folder, is_finished, remove_others
from nexus_scale.io.durable import atomic_write
from nexus_scale.orchestration.mapped import map_rows

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout")


def keyed(*parts: Any) -> int:
    """A 64-bit hash of the parts: an order or a split that follows from it depends on nothing else."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())


def contents_of(entries: Iterable[Entry], signatures: Signatures) -> dict[str, str]:
    """The hash of each entry's file, by path. When it changes, what is made from the file is made again."""
    paths = {str(entry.image): entry.image for entry in entries if isinstance(entry.image, Path)}
    contents = signatures.of(paths.values())
    return {text: contents[signatures.name(path)] for text, path in paths.items()}


@dataclass(frozen=True)
class Work:
    """One shard to make.

    Attributes:
        output: the tar file.
        origin: its inputs and the rules, see `ShardWriter`.
        inputs: what the shard is made from, JSON values.
        rules: how it is made, JSON values.
    """

    output: str
    origin: str
    inputs: Sequence[Any]
    rules: Mapping[str, Any]

    @property
    def note(self) -> Path:
        """The file with the account of the shard's inputs. It is written last, so its presence says that the shard is finished."""
        return Path(f"{self.output}.note.json")

    @property
    def mark(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.origin.encode())

    def is_made(self) -> bool:
        note = read_record(self.note)
        try:
            Account.of_json(note["account"])
            right = note["origin"] == self.mark and isinstance(note["samples"], int) and isinstance(note["parts"], dict)
        except (KeyError, TypeError, ValueError):
            return False
        return right and (not note["samples"] or is_finished(self.output, self.origin))

    def row(self) -> dict[str, str]:
        """The work as JSON text, to be sent. In ASCII, because file names need not be UTF-8."""
        inputs, rules = (json.dumps(part) for part in (self.inputs, self.rules))
        return {"output": self.output, "origin": self.origin, "inputs": inputs, "rules": rules}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Work:
        return cls(row["output"], row["origin"], json.loads(row["inputs"]), json.loads(row["rules"]))


def works_by_split(
    folder: Path,
    entries: Sequence[Entry],
    work: Callable[[Path, Sequence[Entry]], Work],
    group: Callable[[Entry], str],
    *,
    heldout: float,
    seed: int,
    shard_inputs: int,
) -> dict[str, list[Work]]:
    """The shards of each split that has any, in the order of the entries.

    Args:
        folder: shards go to `<folder>/<split>/clips`.
        work: makes the work of a tar file and its entries.
        group: what keeps entries in one split.
        heldout: share of groups that is held out.
    """
    parts: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        parts["heldout" if keyed(seed, "split", group(entry)) < heldout * 2.0**64 else "train"].append(entry)
    return {
        split: [
            work(folder / split / "clips" / f"shard-{i // shard_inputs:06d}.tar", part[i : i + shard_inputs])
            for i in range(0, len(part), shard_inputs)
        ]
        for split, part in parts.items()
        if part
    }


@dataclass
class Shard:
    """The shard of a work while it is being written, in a `with` block; the file appears with the first sample.

    Attributes:
        account: of the inputs, named by their keys, because their places in the source may change while the shard stays.
        parts: number of parts dropped from inputs of which other parts are used, by reason.
    """

    work: Work
    fields: Sequence[Field]
    account: Account = field(default_factory=Account)
    parts: Counter[str] = field(default_factory=Counter)
    _writer: ShardWriter | None = None

    def __enter__(self) -> Shard:
        Path(self.work.output).parent.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, key: str, sample: Mapping[str, Any], bucket: str | None = None) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self.work.output, self.fields, origin=self.work.origin).__enter__()
        self._writer.write(key, sample, bucket)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
        if kind is None:
            samples = 0 if self._writer is None else self._writer.samples
            note = {
                "origin": self.work.mark,
                "samples": samples,
                "account": self.account.to_json(),
                "parts": dict(sorted(self.parts.items())),
            }
            atomic_write(self.work.note, canonical_json(note))


@dataclass(frozen=True)
class Outcome:
    """What became of a plan: samples by split, the account of its inputs, parts dropped from inputs that are used, and the hashes of the
    manifests by split."""

    samples: Counter[str]
    account: Account
    parts: Counter[str]
    manifests: Mapping[str, str]

    def settle(
        self, opened: Source, job: str, what: str, max_bad: float, harmless: Set[str], advice: str = ""
    ) -> Outcome:
        """The outcome including what was dropped while the source was listed, checked: everything adds up, and enough of it is good.

        Args:
            what: plural noun for the inputs, for messages.
            max_bad: share of inputs that may be bad.
            harmless: reasons that are rules of the recipe.
            advice: further advice for the error message.
        Raises:
            UserError: an input is unaccounted for, too many are bad, or no training sample is made.
        """
        account = Account.merged([opened.account, self.account])
        account.read = opened.account.read  # the shards read the listed inputs once more
        places = {printable(entry.key): entry.place for entry in opened.entries}
        account.items = [{**item, "place": places.get(item["place"], item["place"])} for item in account.items]
        total = opened.account.candidates
        account.harmless |= harmless & set(account.dropped)
        account.check(job)
        if account.bad > max_bad * total:
            raise UserError(
                f"{job}: {account.bad} of {total} {what} are broken, more than max_bad={max_bad:g} allows: {account.said()}. Correct the "
                f"source{advice}, or raise max_bad to leave them out.",
                3,
            )
        if not self.samples["train"]:
            said = "; ".join(f"{count} x {reason}" for reason, count in account.dropped.most_common(5))
            raise UserError(f"{job}: {account.read} {what} give no clip for training: {said}. Change the rules.", 3)
        return replace(self, account=account)


@dataclass(frozen=True)
class Plan:
    """All shards of all splits, before the first is made.

    Attributes:
        folder: shards go to `<folder>/<split>/<part>`.
        report: name of the report in the folder.
        options: everything in the recipe that decides the plan, as JSON.
        signatures: of the files that the plan reads.
    """

    folder: Path
    part: str
    report: str
    works: Mapping[str, Sequence[Work]]
    options: Mapping[str, Any]
    signatures: Signatures

    @property
    def identity(self) -> str:
        return xxhash.xxh3_128_hexdigest(canonical_json([[one.origin for one in part] for part in self.works.values()]))

    @property
    def inputs(self) -> int:
        return sum(len(one.inputs) for part in self.works.values() for one in part)

    def place(self, split: str) -> Path:
        return self.folder / split / self.part

    def finished(self) -> bool:
        """Whether the report belongs to this plan and the folders still match it."""
        try:
            report = read_record(self.folder / self.report)
            if report["identity"] != self.identity:
                return False
            for split, known in report["manifests"].items():
                manifest = Manifest.load(self.place(split))
                manifest.verify()
                if manifest.hash != known:
                    return False
        except (KeyError, TypeError, AttributeError, DataError):
            return False
        self.signatures.save()
        return True

    def _refuse_others(self) -> None:
        """Raises UserError where the folder holds finished data of another recipe. Other contents of the same source are made again."""
        refuse_foreign(self.folder, self.report)
        report = read_record(self.folder / self.report)
        if isinstance(report.get("options"), dict) and any(self.folder.glob(f"*/*/{MANIFEST_FILE}")):
            refuse_others(self.folder, report["options"], self.options)
            log.info("%s: its source changed, or it is incomplete: making again what differs", self.folder)

    def make(
        self,
        function: Callable[[Mapping[str, Any]], int],
        *,
        workers: int | None,
        progress: Progress | None,
        licence: str = "",
        attribution: str = "",
        rates: Mapping[str, float] | None = None,
    ) -> Outcome:
        """Makes the missing shards, then the manifests.

        Args:
            function: makes the shard of a work from its `row` and returns its number of inputs; of a module, so that it can be sent.
            workers: processes of Ray Data; 0 works in this process; None: one for each CPU of the cluster.
            rates: see `finish_folder`.
        Raises:
            UserError: the folder holds finished data of other options.
        """
        self._refuse_others()
        missing = [one for part in self.works.values() for one in part if not one.is_made()]
        ready = self.inputs - sum(len(one.inputs) for one in missing)
        for split in self.works:
            self.place(split).mkdir(parents=True, exist_ok=True)
            (self.place(split) / MANIFEST_FILE).unlink(
                missing_ok=True
            )  # data that are being changed must not look finished
        (self.folder / self.report).unlink(missing_ok=True)
        if progress is not None:
            progress(ready, self.inputs)
        rows = [one.row() for one in missing]
        for done in (
            map(function, rows)
            if workers == 0
            else map_rows(function, rows, folder=self.folder, workers=workers)
            if rows
            else ()
        ):
            ready += done
            if progress is not None:
                progress(ready, self.inputs)
        samples, parts, manifests = Counter[str](), Counter[str](), {}
        account = Account()
        for split, works in self.works.items():
            files = []
            for one in works:
                note = json.loads(one.note.read_text(encoding="utf-8"))
                account.merge(Account.of_json(note["account"]))
                parts.update(note["parts"])
                samples[split] += note["samples"]
                files += [Path(one.output).name] if note["samples"] else []
            remove_others(self.place(split), {Path(one.output).name for one in works})
            if files:
                place = self.place(split)
                made = finish_folder(place, files=files, licence=licence, attribution=attribution, rates=rates)
                manifests[split] = made.hash
        return Outcome(samples, account, parts, manifests)

    def write_report(self, made: Outcome, **more: Any) -> None:
        """Writes the report, which says that the plan is finished."""
        body = {
            "identity": self.identity,
            "options": self.options,
            **made.account.to_json(),
            self.part: dict(made.samples),
            "dropped_parts": dict(sorted(made.parts.items())),
            "manifests": dict(made.manifests),
            **more,
        }
        atomic_write(self.folder / self.report, json.dumps(body, indent=1, ensure_ascii=False).encode())
        self.signatures.save()
