"""Clips of speech from recordings with transcripts: a folder or a table in, shards out, by Ray Data.

    python data_pipelines/ingest_speech.py --source my_recordings --output speech --sample-rate-hz 24000
    python data_pipelines/ingest_speech.py --source speech-voices/speech.csv --output speech --sample-rate-hz 16000

A source is a folder of recordings (a.wav or a.flac with a.txt or a.json beside it), or a CSV, TSV, JSONL or Parquet table with columns
`path`, `caption` (the transcript) and, for several speakers, `speaker`. With `start` and `end` in seconds, a row is a part of a longer
recording. data_pipelines.sound_decoding lists the rules by which recordings are cut, resampled and dropped. A recording whose transcript
the phonemizer cannot read is dropped, too.

Fields: `audio` (.wav, 16 bits, one channel); `caption`; `label` (the speaker's number, if all clips have one); `json` (where a clip is
from, its seconds, its speaker as `group`). Recordings of the same text share a split, so that held-out sentences are new. The output
folders are `<output>/train/clips` and `<output>/heldout/clips`. `<output>/ingest_report.json` says how many recordings were read, used and
dropped, with the place and reason of each that was dropped. A recording that crashes its decoder is dropped like any other
(data_pipelines.decoding_process). A rerun makes only what is missing.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from data_pipelines.clip_options import IngestOptions
from data_pipelines.command import Progress
from data_pipelines.decoding_process import decode_apart
from data_pipelines.job import Job, Roots
from data_pipelines.options import Number, option
from data_pipelines.output_folder import refuse_nested
from data_pipelines.shard_plan import Plan, Shard, Work, contents_of, keyed, works_by_split
from data_pipelines.signatures import Contents, Signatures
from data_pipelines.sound_decoding import (
    BEYOND,
    CLIPPED,
    SILENT,
    SOUND_EXTENSIONS,
    TOO_LONG,
    TOO_SHORT,
    VERSION,
    SoundRules,
    answer,
    clip_of,
)
from data_pipelines.source_spec import SourceFlag, SourceSpec
from data_pipelines.sources import Entry, Source, label_numbers, open_source
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Field, canonical_json
from nexus_scale.data.sounds import encode_wav
from nexus_scale.interop.phonemes import Phonemizer

log = logging.getLogger(__name__)

REPORT = "ingest_report.json"
UNSPEAKABLE = "a transcript that the phonemizer cannot read"
NO_TIMES = "a row whose start or end is no number of seconds"
BY_RULE = frozenset({BEYOND, CLIPPED, SILENT, TOO_SHORT, TOO_LONG})
"""Reasons that follow from the recipe. All others are faults of the data, and `max_bad` bounds them."""


class Options(IngestOptions):
    """Which recordings become clips, and by which rules (see data_pipelines.sound_decoding)."""

    source: Annotated[
        str | Mapping[str, Any],
        SourceFlag("recordings", None, "column or JSON key of who speaks (default: speaker, where there is one)"),
    ] = option(
        description="a folder or a table, or a mapping with its columns, see data_pipelines.sources.SourceSpec; its labels are the "
        "speakers, its `group_key` keeps recordings together when they are split, by default their text"
    )
    sample_rate_hz: int = option(description="after resampling")
    min_seconds: Number = option(1.0, description="of a clip")
    max_seconds: Number = option(20.0, description="of a clip")
    silence_db: Number = option(-40.0, description="what counts as silence, relative to the clip's loudest")
    loudness_db: Number = option(-23.0, description="of speech, relative to full scale")
    max_clipped: Number = option(0.001, description="share of samples at the rail, above which a clip is dropped")
    language: str | None = option(
        "en-us", description="of the transcripts, by espeak-ng's name: its phonemizer must read them; none: not checked"
    )
    heldout: Number = option(0.1, ge=0, lt=1, description="share of texts that is held out")
    shard_clips: int = option(128, ge=1, description="recordings that share a shard")

    @property
    def rules(self) -> SoundRules:
        """How recordings are cut, resampled and dropped."""
        return SoundRules(**{one.name: getattr(self, one.name) for one in fields(SoundRules)})

    @property
    def spec(self) -> SourceSpec:
        """The source; its labels are the speakers."""
        values = {"path": self.source} if isinstance(self.source, str) else dict(self.source)
        return SourceSpec.of({**values, "label_column": values.get("label_column") or "speaker"})

    def check(self) -> None:
        _ = self.spec, self.rules


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/train/clips` and `<output>/heldout/clips`.

    Raises:
        UserError: nothing to read, rules that leave nothing, or too many broken recordings.
    """
    opened, plan = _plan(options, roots)
    if plan.finished():
        return
    language, spec = options.language, opened.spec
    if language is not None:
        _phonemizer(language)  # a missing package is reported before anything is decoded
    made = plan.make(
        make_row, workers=options.workers, progress=progress, licence=spec.licence, attribution=spec.attribution,
        rates={"audio": float(options.rules.sample_rate_hz)},
    )  # fmt: skip
    advice = f" (transcripts are read as {language}: set `language` to theirs)" if language is not None else ""
    made = made.settle(opened, "ingest_speech", "recordings", options.max_bad, BY_RULE, advice)
    plan.write_report(made, rules=options.rules.to_json(), language=language, speakers=_speakers(opened.entries))
    if not made.samples["heldout"]:
        log.warning("ingest_speech: nothing is held out; raise heldout, or give more different texts")
    for reason, count in sorted(made.account.dropped.items()):
        log.warning("ingest_speech: dropped %d: %s", count, reason)


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the folders are there, made from these recordings by these rules."""
    try:
        _, plan = _plan(options, roots)
    except UserError:
        return False  # no source yet: an earlier step of the recipe makes it
    return plan.finished()


# ------------------------------------------------------------------------------------------------- what is made of what


def _plan(options: Options, roots: Roots) -> tuple[Source, Plan]:
    spec, folder = options.spec, roots.data_root / options.output
    opened = open_source(spec, roots.data_root, SOUND_EXTENSIONS, label_default="speaker")
    if opened.streams or any(not isinstance(entry.image, Path) for entry in opened.entries):
        raise UserError(f"{spec.path}: speech is read from a folder or a table of paths, not from tars", 3)
    if (place := roots.data_root / spec.path).is_dir():
        refuse_nested(folder, place)
    labels = label_numbers(opened.entries)

    def order(entry: Entry) -> tuple[int, str, str]:
        # By recording, so that its parts are neighbours and it is decoded once; relative to the data root, which may move.
        place = os.path.relpath(str(entry.image), roots.data_root)
        return keyed(options.seed, "order", place), place, entry.key

    ordered = sorted(opened.entries, key=order)
    signatures = Signatures(folder, roots.data_root)
    contents = contents_of(ordered, signatures)
    rules = {**options.rules.to_json(), "language": options.language}
    works = works_by_split(
        folder,
        ordered,
        lambda tar, entries: _work(tar, entries, contents, labels, rules),
        lambda entry: _together(entry, spec),
        heldout=options.heldout,
        seed=options.seed,
        shard_inputs=options.shard_clips,
    )
    decides = {name: getattr(options, name) for name in ("heldout", "shard_clips", "seed")}
    signed = {"source": spec.to_json(), **decides, **rules}
    return opened, Plan(folder, "clips", REPORT, works, signed, signatures)


def _together(entry: Entry, spec: SourceSpec) -> str:
    """The name of a recording's group for the split: its group, or the words of its text."""
    return entry.group if spec.group_key else " ".join(re.findall(r"\w+", entry.caption.casefold()))


def _work(
    output: Path,
    entries: Sequence[Entry],
    contents: Contents,
    labels: Mapping[Any, int] | None,
    rules: Mapping[str, Any],
) -> Work:
    inputs: list[list[Any]] = []
    for entry in entries:
        extra = dict(entry.extra)
        speaker = "" if entry.label is None else str(entry.label)
        label = None if labels is None else labels[entry.label]
        inputs.append([entry.key, str(entry.image), entry.caption, label, speaker, extra])
    marks = [[one[0], contents[one[1]], *one[2:]] for one in inputs]
    return Work(str(output), canonical_json([marks, dict(rules), VERSION]).decode(), inputs, rules)


def _speakers(entries: Sequence[Entry]) -> dict[str, int]:
    """The number of each speaker in `label`, by name."""
    labels = label_numbers(entries)
    return {} if labels is None else {str(name): number for name, number in labels.items()}


# ------------------------------------------------------------------------------------------------- one shard


@functools.lru_cache(maxsize=1)
def _phonemizer(language: str) -> Phonemizer:
    return Phonemizer(language)


def make_row(row: Mapping[str, Any]) -> int:
    """Makes the shard of a work and returns its number of recordings."""
    work = Work.of(row)
    language = work.rules["language"]
    rules = SoundRules(**{name: value for name, value in work.rules.items() if name != "language"})
    fields = [Field("audio", "wav", "int16", (1, None)), Field("caption", "txt", "text"), Field("json", "json", "json")]
    if all(label is not None for _, _, _, label, _, _ in work.inputs):
        fields.append(Field("label", "cls", "int64", ()))
    last: tuple[str, Any, str, str] = (
        "",
        None,
        "",
        "",
    )  # the last decoded recording: its parts are neighbours
    with Shard(work, fields) as shard:
        for key, path, caption, label, speaker, extra in work.inputs:
            shard.account.read += 1
            if language is not None and not _speakable(caption, language):
                shard.account.drop(key, UNSPEAKABLE)
                continue
            times = _times(extra)
            if times is None:
                shard.account.drop(key, NO_TIMES)
                continue
            if last[0] != path:
                last = (path, *_recording(path, rules))
            if last[1] is None:
                shard.account.drop(key, last[2], detail=last[3])
                continue
            clip, why = clip_of(last[1], rules, *times)
            if clip is None:
                shard.account.drop(key, why)
                continue
            seconds = clip.wave.shape[1] / rules.sample_rate_hz
            said = {**extra, "key": key, "start_seconds": clip.start_seconds, "seconds": seconds, "group": speaker}
            sample = {"audio": encode_wav(clip.wave, rules.sample_rate_hz), "caption": caption, "json": said}
            shard.write(key, sample if label is None else {**sample, "label": label})
            shard.account.used += 1
    return len(work.inputs)


def _recording(path: str, rules: SoundRules) -> tuple[Any, str, str]:
    """The samples of a recording; or None, with the reason and its details."""
    decoded = decode_apart(answer, path, rules.to_json())
    if decoded.arrays:
        return decoded.arrays[0], "", ""
    return None, decoded.reason or decoded.facts["why"], decoded.details


def _times(extra: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """`start` and `end` of a row in seconds, those of the whole recording where they are missing; None where one is not a number."""
    values: list[float | None] = []
    for name in ("start", "end"):
        value = extra.get(name, "")
        if isinstance(value, str) and not value.strip():
            values.append(None)
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if not math.isfinite(number):
            return None
        values.append(number)
    start, end = values
    return (0.0 if start is None else start), end


def _speakable(caption: str, language: str) -> bool:
    phonemizer = _phonemizer(language)
    try:
        return bool(phonemizer(caption))
    except UserError:
        return False  # the caller counts it


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
