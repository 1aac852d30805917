"""Pairs of utterances of one speaker: a model trained on them learns to continue in the voice of a prompt that says something else.

    python data_pipelines/pair_utterances.py --input speech/train/codes --speakers speech/train/codes \\
        --output speech/train/paired/codes --bounds 150 250 350
    python data_pipelines/pair_utterances.py --input speech/train/phonemes --speakers speech/train/codes \\
        --output speech/train/paired/phonemes

Field `codes` (T1 + T2, K), `semantic` (T1 + T2,), or `phonemes` (L1 + L2 - 1,) with a space in place of the inner end and begin; the two
captions joined by a slash; the speaker's label. Which utterance follows which depends on keys, labels and shards alone, so folders of
codes, phonemes and semantic tokens made from the same clips can still be joined. With `--turns 2` each utterance follows two others. An
utterance whose speaker has no other in its shard stays alone. The manifest keeps the codec or phonemizer that made the input.

Source: Wang et al. 2023 (VALL-E), section 4.3: at inference the prompt's phonemes and codes come before those of the sentence. The
training utterances there are long enough to learn this from; short ones are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.data.buckets import assign_length, check_bounds
from nexus_scale.data.fields import read_numbers
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.reader import read_alone
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.generate.speech import after
from nexus_scale.interop.phonemes import TABLE
from nexus_scale.orchestration.data_jobs import Row, ShardJob

FIELDS = ("codes", "phonemes", "semantic")
WHOLE_SHARD = 1 << 30
"""Samples in a batch: the partner of an utterance may be anywhere in its shard."""


class Options(ShardOptions):
    """Which utterances follow which."""

    input: str = option(description="folder of codes, phonemes or semantic tokens, below the data root")
    speakers: str = option(
        description="folder of the same samples whose `label` is the speaker: the clips, or the codes"
    )
    bounds: Sequence[int] | None = option(
        None,
        description="length buckets of the pairs, in frames or phonemes (default: none); of two folders that are joined, one has them",
    )
    turns: int = option(1, ge=1, description="others that each utterance follows, in samples of their own")

    def check(self) -> None:
        if self.bounds is not None:
            check_bounds(self.bounds)


def plan(options: Options, roots: Roots) -> ShardJob:
    """The pairs of a folder's utterances.

    Raises:
        UserError: no codes or phonemes there, or speakers without labels.
    """
    source, told = (Manifest.load(roots.data_root / folder) for folder in (options.input, options.speakers))
    field = next((source.fields[name] for name in FIELDS if name in source.fields), None)
    if field is None or source.encoder is None:
        raise DataError(
            f"{source.folder}: got fields {sorted(source.fields)}, expected `codes`, `phonemes` or `semantic` that an encoder made; give a "
            "folder of precompute_codes, precompute_phonemes or precompute_semantic"
        )
    if "label" not in told.fields:
        raise DataError(f"{told.folder}: has no `label`; give a folder whose label is the speaker")
    checked = None if options.bounds is None else check_bounds(options.bounds)
    caption, fingerprint = source.fields.get("caption"), str(source.encoder["fingerprint"])
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(Pairing, field, caption, told.folder, fingerprint, checked, options.turns),
        encoder=source.encoder,
        settings={"speakers": told.hash, "bounds": checked, "turns": options.turns, "paired": 1},
        batch=WHOLE_SHARD,
        rates={name: rate for name, rate in source.rates.items() if name == field.name},
    )


class Pairing:
    """Pairs the utterances of a shard; see data_jobs.ShardEncoder."""

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
        """The pairs of an utterance with its neighbours on its speaker's ring, which is in the order of the hashes of the keys."""
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
        if self.field.name == "phonemes":
            return np.array(after(a.tolist(), b.tolist(), TABLE.index(" ")), a.dtype)
        return np.concatenate([a, b])


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
