"""Phonemes of transcripts: a folder with captions in, a folder of symbol ids out, by Ray Data.

    python data_pipelines/precompute_phonemes.py --input speech/train/clips --output speech/train/phonemes

Field `phonemes` (L,) int16: ids of nexus_scale.interop.phonemes.TABLE between its begin and end symbols. `caption` is copied. The
fingerprint of the encoder in the manifest is the hash of the table and the language. A text that cannot be read ends the job with its name,
because folders that are joined need the same samples; ingest_speech leaves such recordings out. A rerun makes only what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.conditioners.phonemes import PHONEMES, PhonemeConditioner
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.interop.phonemes import Phonemizer
from nexus_scale.orchestration.data_jobs import ShardJob


class Options(ShardOptions):
    """Which captions are read, and how."""

    input: str = option(description="folder with captions, below the data root")
    language: str = option("en-us", description="of the captions, by espeak-ng's name")
    batch: int = option(512, ge=1, description="captions looked at together")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The phonemes of a folder's captions.

    Raises:
        UserError: no captions there, or no such language.
    """
    source = Manifest.load(roots.data_root / options.input)
    caption = source.fields.get("caption")
    if caption is None or caption.kind != "txt":
        raise DataError(f"{source.where}: got fields {sorted(source.fields)}, expected a caption (.txt) among them")
    phonemizer = Phonemizer(options.language)
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(CaptionReader, options.language, caption),
        encoder={
            "kind": "phonemes",
            "fingerprint": phonemizer.fingerprint,
            "language": options.language,
            "espeak_ng": phonemizer.version,
            "num_symbols": phonemizer.num_symbols,
            "table": list(phonemizer.table),
        },
        settings={"fields": [PHONEMES, "caption"]},
        batch=options.batch,
    )


class CaptionReader:
    """Reads the captions of a shard as phonemes; see data_jobs.ShardEncoder."""

    def __init__(self, language: str, caption: Field, device: str):
        self.conditioner, self.caption = PhonemeConditioner.open(language), caption
        self.fingerprint = self.conditioner.fingerprint
        made = [Field(name, f"{name}.npy", one.dtype, one.shape) for name, one in self.conditioner.fields.items()]
        self.fields = [*made, Field("caption", "txt", "text")]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        out = []
        for sample in samples:
            caption = decode("txt", sample.members[self.caption.extension])
            try:
                [made] = self.conditioner.encode([caption])
            except UserError as error:
                raise DataError(
                    f"sample {sample.key!r}: {error}; leave it out of its folder, as ingest_speech does"
                ) from None
            out.append({**made, "caption": caption})
        return out


JOB = shard_job(__name__, Options, plan)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
