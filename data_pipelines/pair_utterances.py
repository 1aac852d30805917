"""Each utterance after another of the same speaker: so a model learns to go on in the voice of a prompt that says something else.

    python data_pipelines/pair_utterances.py --input speech/train/codes --speakers speech/train/codes \\
        --output speech/train/paired/codes --bounds 150 250 350
    python data_pipelines/pair_utterances.py --input speech/train/phonemes --speakers speech/train/codes \\
        --output speech/train/paired/phonemes

Field `codes` (T1 + T2, K) or `phonemes` (L1 + L2 - 1,), a space in place of the inner end and begin; captions joined by a slash, and the
speaker's label. Which utterance follows which is a function of keys, labels and shards alone, so that folders of codes and of phonemes
that were made from the same clips stay joined. With `--turns 2` each follows two others. An utterance whose speaker has no other in
its shard stays alone. Encoders go along: what is paired is still of the codec, or of the phonemizer, that made it.

Source: Wang et al. 2023 (VALL-E), section 4.3: at inference the prompt's phonemes and codes precede the sentence's; its training
utterances are long enough for that, short ones are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines.command import Progress, actor_options, parser, serve
from data_pipelines.output_folder import makes_folder
from nexus_scale.contracts import UserError
from nexus_scale.data.buckets import assign_length, check_bounds
from nexus_scale.data.fields import read_numbers
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.reader import read_alone
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.generate.speech import after
from nexus_scale.interop.phonemes import TABLE
from nexus_scale.orchestration.data_jobs import Row, ShardJob, is_done, run_job

FIELDS = ("codes", "phonemes")
WHOLE_SHARD = 1 << 30
"""Samples at once: an utterance's partner is anywhere in its shard."""


@makes_folder
def run(
    *,
    input: str,
    output: str,
    speakers: str,
    bounds: Sequence[int] | None = None,
    turns: int = 1,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> Manifest:
    """Makes the folder `output` from the codes or the phonemes in `input`.

    Args:
        speakers: folder of the same samples whose `label` is the speaker: the clips, or the codes.
        bounds: length buckets of the pairs, in frames or phonemes; None: no buckets. Of two folders that are joined, one has them.
        turns: how many others each utterance follows, in samples of their own.
        workers: see data_jobs.run_job.
    Raises:
        UserError: no codes or phonemes there, speakers of other samples, a pair longer than the last bound.
    """
    job = _job(input, output, speakers, bounds, turns, data_root)
    return run_job(job, workers=workers, device="cpu", progress=progress)


def done(
    *,
    input: str,
    output: str,
    speakers: str,
    bounds: Sequence[int] | None = None,
    turns: int = 1,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether `output` was made from this input and these speakers."""
    try:
        return is_done(_job(input, output, speakers, bounds, turns, data_root))
    except UserError:
        return False  # no input yet: a job before this one makes it


def _job(input: str, output: str, speakers: str, bounds: Sequence[int] | None, turns: int, data_root: Path) -> ShardJob:
    if turns < 1:
        raise UserError(f"pair_utterances: turns {turns}; expected at least 1")
    source, told = Manifest.load(data_root / input), Manifest.load(data_root / speakers)
    field = next((source.fields[name] for name in FIELDS if name in source.fields), None)
    if field is None or source.encoder is None:
        raise DataError(
            f"{source.folder}: got fields {sorted(source.fields)}, expected `codes` or `phonemes` that an encoder made; give a "
            "folder of precompute_codes or precompute_phonemes"
        )
    if "label" not in told.fields:
        raise DataError(f"{told.folder}: has no `label`; give a folder whose label is the speaker")
    checked = None if bounds is None else check_bounds(bounds)
    return ShardJob(
        source=source.folder,
        output=data_root / output,
        make=partial(
            Pairing,
            field,
            source.fields.get("caption"),
            told.folder,
            str(source.encoder["fingerprint"]),
            checked,
            turns,
        ),
        encoder=source.encoder,
        settings={"speakers": told.hash, "bounds": checked, "turns": turns, "paired": 1},
        batch=WHOLE_SHARD,
    )


class Pairing:
    """Utterances of a shard to pairs; see data_jobs.ShardEncoder."""

    def __init__(
        self,
        field: Field,
        caption: Field | None,
        speakers: Path,
        fingerprint: str,
        bounds: Sequence[int] | None,
        turns: int,
        device: str,
    ):
        told = Manifest.load(speakers)
        numbers = np.arange(told.samples, dtype=np.int64)
        labels = read_numbers(told.fields["label"], read_alone(told, "label", numbers), None).tolist()
        self.speaker = {told.index.key(number): label for number, label in enumerate(labels)}
        self.field, self.fingerprint, self.bounds, self.turns = field, fingerprint, bounds, turns
        self.caption = caption
        self.fields = [field, Field("label", "cls", "int64", ()), *([caption] if caption else [])]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        """Of each utterance its pairs, which `place` writes."""
        own = {sample.key: self._one(sample) for sample in samples}
        return [{"pairs": list(self._pairs(key, own))} for key in own]

    def place(self, key: str, values: Mapping[str, Any]) -> Iterable[Row]:
        for turn, pair in enumerate(values["pairs"]):
            bucket = None
            if self.bounds is not None:
                bucket = assign_length(self.field.name, len(pair[self.field.name]), self.bounds).name
            yield Row(f"{key}-{turn}", pair, bucket)

    def _one(self, sample: RawSample) -> dict[str, Any]:
        if sample.key not in self.speaker:
            raise DataError(f"{sample.key}: no such sample among the speakers; give a folder of the same samples")
        values = {
            self.field.name: decode(self.field.extension, sample.members[self.field.extension]),
            "label": self.speaker[sample.key],
        }
        return values | ({"caption": sample.members[self.caption.extension].decode()} if self.caption else {})

    def _pairs(self, key: str, own: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
        """The utterance after those that are next to it on its speaker's ring, in the order of their keys' hashes."""
        ring = sorted(
            (other for other in own if self.speaker[other] == self.speaker[key]),
            key=lambda other: (xxhash.xxh3_64_intdigest(other.encode()), other),
        )
        then, place = own[key], ring.index(key)
        for turn in range(1, self.turns + 1):
            first = own[ring[(place + turn) % len(ring)]]
            if first is then:
                yield dict(then)
                continue
            pair = {**then, self.field.name: self._joined(first, then)}
            yield pair | ({"caption": f"{first['caption']} / {then['caption']}"} if self.caption else {})

    def _joined(self, first: Mapping[str, Any], then: Mapping[str, Any]) -> np.ndarray:
        a, b = first[self.field.name], then[self.field.name]
        if self.field.name == "codes":
            return np.concatenate([a, b])
        return np.array(after(a.tolist(), b.tolist(), TABLE.index(" ")), a.dtype)


def main(argv: list[str] | None = None) -> int:
    command = parser("pair_utterances", __doc__ or "")
    command.add_argument("--input", required=True, help="folder of codes or phonemes below the data root")
    command.add_argument("--output", required=True, help="folder of pairs to make")
    command.add_argument("--speakers", required=True, help="folder of the same samples with the speaker as label")
    command.add_argument("--bounds", type=int, nargs="+", help="length buckets of the pairs (default: none)")
    command.add_argument("--turns", type=int, default=1, help="others that each utterance follows (default: 1)")
    actor_options(command)
    return serve(run, "pair_utterances", command.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
