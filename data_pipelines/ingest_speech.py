"""Recordings with transcripts to clips of speech: a folder or a table in, shards out, shard by shard, by Ray Data.

    python data_pipelines/ingest_speech.py --source my_recordings --output speech --sample-rate-hz 24000
    python data_pipelines/ingest_speech.py --source speech-voices/speech.csv --output speech --sample-rate-hz 16000

A source is a folder of recordings (a.wav or a.flac with a.txt or a.json beside it), or a CSV, TSV, JSONL or Parquet table with columns
`path`, `caption` (the transcript) and, where there are several, `speaker`; with `start` and `end` in seconds a row is a part of a longer
recording. The rules by which clips are cut, resampled and dropped are those of data_pipelines.sound_decoding; a transcript that the
phonemizer cannot read is dropped too. Fields: `audio` (.wav, 16 bits, one channel), `caption`, `label` (the speaker's number, where all
clips have one), `json` (where a clip is from, its seconds, its speaker as `group`). Recordings of one text are all in one split, so that
held-out sentences are new. Each output folder, `<output>/train/clips` and `<output>/heldout/clips`, describes itself, and
`<output>/ingest_report.json` says how many recordings were read, used and dropped, and for each that was dropped where it lies and why.
A rerun redoes nothing that is finished. Recordings are decoded in a process of their own (data_pipelines.decoding_process): one that
kills it is dropped like others.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.accounts import check_max_bad
from data_pipelines.command import Progress, parser, serve
from data_pipelines.decoding_process import decode_apart
from data_pipelines.output_folder import makes_folder, refuse_nested
from data_pipelines.shard_plan import SPLITS, Plan, Shard, Work, contents_of, keyed
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
from data_pipelines.sources import Entry, Source, SourceSpec, label_numbers, open_source
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Field, canonical_json
from nexus_scale.data.sounds import encode_wav
from nexus_scale.interop.phonemes import Phonemizer

log = logging.getLogger(__name__)

REPORT = "ingest_report.json"
UNSPEAKABLE = "a transcript that the phonemizer cannot read"
NO_TIMES = "a row whose start or end is no number of seconds"
BY_RULE = frozenset({BEYOND, CLIPPED, SILENT, TOO_SHORT, TOO_LONG})
"""Reasons that are rules of the recipe; all others are faults of the data, which `max_bad` bounds."""


@makes_folder
def run(
    *,
    source: str | Mapping[str, Any],
    output: str,
    sample_rate_hz: int,
    min_seconds: float = 1.0,
    max_seconds: float = 20.0,
    silence_db: float = -40.0,
    loudness_db: float = -23.0,
    max_clipped: float = 0.001,
    language: str | None = "en-us",
    heldout: float = 0.1,
    shard_clips: int = 128,
    seed: int = 0,
    max_bad: float = 0.01,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> None:
    """Makes `<output>/train/clips` and `<output>/heldout/clips`.

    Args:
        source: a folder or a table, or a mapping with its columns, see data_pipelines.sources.SourceSpec; its labels are the
            speakers (column `speaker`), its `group_key` keeps recordings together when they are split, by default their text.
        sample_rate_hz, min_seconds, max_seconds, silence_db, loudness_db, max_clipped: see data_pipelines.sound_decoding.
        language: that of the transcripts, which must be readable by its phonemizer; None keeps all.
        heldout: share of groups.
        shard_clips: recordings that share a shard.
        max_bad: share of recordings that may be dropped as broken, missing or without a readable transcript before the
            job gives up. Other rules drop without a limit.
        workers: processes of Ray Data; 0 decodes in this process; None: one for each CPU of the cluster.
    Raises:
        UserError: nothing to read, a rule that leaves nothing, or too many broken recordings.
    """
    check_max_bad("ingest_speech", max_bad)
    rules = SoundRules(sample_rate_hz, min_seconds, max_seconds, silence_db, loudness_db, max_clipped)
    opened, plan = _plan(source, output, rules, language, heldout, shard_clips, seed, data_root)
    if plan.finished():
        return
    if language is not None:
        _phonemizer(language)  # what it lacks is said before anything is decoded
    spec = opened.spec
    made = plan.make(make_row, workers=workers, progress=progress, licence=spec.licence, attribution=spec.attribution)
    advice = f" (transcripts are read as {language}: set `language` to theirs)" if language is not None else ""
    made = made.settle(opened, "ingest_speech", "recordings", max_bad, BY_RULE, advice)
    plan.write_report(made, rules=rules.to_json(), language=language, speakers=_speakers(opened.entries))
    if not made.samples["heldout"]:
        log.warning("ingest_speech: nothing is held out; raise heldout, or give more different texts")
    for reason, count in sorted(made.account.dropped.items()):
        log.warning("ingest_speech: dropped %d: %s", count, reason)


def done(
    *,
    source: str | Mapping[str, Any],
    output: str,
    sample_rate_hz: int,
    min_seconds: float = 1.0,
    max_seconds: float = 20.0,
    silence_db: float = -40.0,
    loudness_db: float = -23.0,
    max_clipped: float = 0.001,
    language: str | None = "en-us",
    heldout: float = 0.1,
    shard_clips: int = 128,
    seed: int = 0,
    max_bad: float = 0.01,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether the folders are there, made from these recordings by these rules."""
    rules = SoundRules(sample_rate_hz, min_seconds, max_seconds, silence_db, loudness_db, max_clipped)
    try:
        _, plan = _plan(source, output, rules, language, heldout, shard_clips, seed, data_root)
    except UserError:
        return False  # no source yet: a job before this one makes it
    return plan.finished()


# ------------------------------------------------------------------------------------------------- what is made of what


def _plan(
    source: str | Mapping[str, Any],
    output: str,
    rules: SoundRules,
    language: str | None,
    heldout: float,
    shard_clips: int,
    seed: int,
    data_root: Path,
) -> tuple[Source, Plan]:
    if not 0 <= heldout < 1 or shard_clips < 1:
        raise UserError(
            f"ingest_speech: heldout {heldout:g}, shard_clips {shard_clips}: expected [0, 1) and at least 1"
        )
    values = {"path": source} if isinstance(source, str) else dict(source)
    spec = SourceSpec.of({**values, "label_column": values.get("label_column") or "speaker"})
    opened = open_source(spec, data_root, SOUND_EXTENSIONS, label_default="speaker")
    if opened.streams or any(not isinstance(entry.image, Path) for entry in opened.entries):
        raise UserError(f"{spec.path}: speech is read from a folder or a table of paths, not from tars", 3)
    if (place := data_root / spec.path).is_dir():
        refuse_nested(data_root / output, place)
    labels = label_numbers(opened.entries)

    def order(entry: Entry) -> tuple[int, str, str]:
        # By the recording, so that its parts lie beside each other and it is decoded once; wherever the data root is.
        place = os.path.relpath(str(entry.image), data_root)
        return keyed(seed, "order", place), place, entry.key

    ordered = sorted(opened.entries, key=order)
    works = {}
    signatures = Signatures(data_root / output, data_root)
    contents = contents_of(ordered, signatures)
    for split in SPLITS:
        chosen = [
            entry
            for entry in ordered
            if (keyed(seed, "split", _together(entry, spec)) < heldout * 2.0**64) == (split == "heldout")
        ]
        parts = [chosen[i : i + shard_clips] for i in range(0, len(chosen), shard_clips)]
        place = data_root / output / split / "clips"
        works[split] = [
            _work(place / f"shard-{i:06d}.tar", part, contents, labels, {**rules.to_json(), "language": language})
            for i, part in enumerate(parts)
        ]
    options = {
        "source": spec.to_json(), "heldout": heldout, "shard_clips": shard_clips, "seed": seed, "language": language, **rules.to_json()
    }  # fmt: skip
    made = {split: part for split, part in works.items() if part}
    return opened, Plan(data_root / output, "clips", REPORT, made, options, signatures)


def _together(entry: Entry, spec: SourceSpec) -> str:
    """What keeps recordings in one split: their group, or the words of their text."""
    return entry.group if spec.group_key else " ".join(re.findall(r"\w+", entry.caption.casefold()))


def _work(
    output: Path,
    entries: Sequence[Entry],
    contents: Contents,
    labels: Mapping[Any, int] | None,
    rules: Mapping[str, Any],
) -> Work:
    inputs = []
    for entry in entries:
        extra = dict(entry.extra)
        speaker = "" if entry.label is None else str(entry.label)
        label = None if labels is None else labels[entry.label]
        inputs.append([entry.key, str(entry.image), entry.caption, label, speaker, extra])
    marks = [[one[0], contents[one[1]], *one[2:]] for one in inputs]
    return Work(str(output), canonical_json([marks, dict(rules), VERSION]).decode(), inputs, rules)


def _speakers(entries: Sequence[Entry]) -> dict[str, int]:
    """Number of each speaker by name, as `label` has it."""
    labels = label_numbers(entries)
    return {} if labels is None else {str(name): number for name, number in labels.items()}


# ------------------------------------------------------------------------------------------------- one shard


@functools.lru_cache(maxsize=1)
def _phonemizer(language: str) -> Phonemizer:
    return Phonemizer(language)


def make_row(row: Mapping[str, Any]) -> int:
    """Makes a work's shard; returns how many recordings it is of."""
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
    )  # what was decoded last, since parts of one recording come together
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
    """Its samples, or None, the reason and its details."""
    decoded = decode_apart(answer, path, rules.to_json())
    if decoded.arrays:
        return decoded.arrays[0], "", ""
    return None, decoded.reason or decoded.facts["why"], decoded.details


def _times(extra: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """`start` and `end` of a row in seconds, the whole recording where it has none; nothing where one of them is no number."""
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
        return False  # counted by the caller


def main(argv: list[str] | None = None) -> int:
    command = parser("ingest_speech", __doc__ or "")
    add = command.add_argument
    add("--source", required=True, help="folder of recordings, or a table (csv, tsv, jsonl, parquet)")
    add("--output", required=True, help="folder below the data root")
    add("--sample-rate-hz", type=int, required=True, help="after resampling")
    add("--min-seconds", type=float, default=1.0, help="of a clip (default: 1)")
    add("--max-seconds", type=float, default=20.0, help="of a clip (default: 20)")
    add(
        "--silence-db",
        type=float,
        default=-40.0,
        help="below the clip's loudest: what counts as silence (default: -40)",
    )
    add("--loudness-db", type=float, default=-23.0, help="of speech, relative to full scale (default: -23)")
    add("--max-clipped", type=float, default=0.001, help="share of samples at the rail, above which a clip is dropped")
    add(
        "--language",
        default="en-us",
        help="of the transcripts, by espeak-ng's name (default: en-us); `none`: not checked",
    )
    add("--heldout", type=float, default=0.1, help="share of texts that is held out (default: 0.1)")
    add("--shard-clips", type=int, default=128, help="recordings that share a shard (default: 128)")
    add("--seed", type=int, default=0)
    add(
        "--max-bad",
        type=float,
        default=0.01,
        help="share of broken recordings above which the job gives up (default: 0.01)",
    )
    add("--workers", type=int, help="processes of Ray Data; 0: in this process (default: one a CPU)")
    for name in ("path", "caption"):
        add(f"--{name}-column", default=name, help=f"column of a table, key of JSON (default: {name})")
    add("--label-column", help="column or JSON key of who speaks (default: speaker, where there is one)")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="names or paths to leave out; may be repeated")
    add(
        "--group-key",
        help="column or JSON key by which recordings stay together when data are split (default: their text)",
    )
    arguments = command.parse_args(argv)
    values = vars(arguments)
    columns = {name: values.pop(name) for name in ("path_column", "caption_column", "label_column", "group_key")}
    values["source"] = {"path": values["source"], **columns, "ignore": values.pop("ignore")}
    values["language"] = None if values["language"] == "none" else values["language"]
    return serve(run, "ingest_speech", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
