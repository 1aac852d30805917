"""Phonemes of transcripts: a folder with captions in, a folder of symbol ids out, shard by shard, by Ray Data.

    python data_pipelines/precompute_phonemes.py --input speech/train/clips --output speech/train/phonemes

Field `phonemes` (L,) int16, ids of nexus_scale.interop.phonemes.TABLE between its begin and end; `caption` goes along. The manifest has the
table's hash, and the language, as fingerprint of the encoder. A text that cannot be read ends the job by its name, since folders that are
joined have the same samples: ingest_speech leaves such recordings out. A rerun redoes nothing that is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.command import Progress, actor_options, parser, serve
from data_pipelines.output_folder import makes_folder
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.interop.phonemes import Phonemizer
from nexus_scale.orchestration.data_jobs import THREADS, ShardJob, is_done, run_job

PHONEMES = "phonemes"


@makes_folder
def run(
    *,
    input: str,
    output: str,
    language: str = "en-us",
    batch: int = 512,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> Manifest:
    """Makes the folder `output` from the captions in `input`.

    Args:
        language: of the captions, by espeak-ng's name.
        batch: captions that are looked at together.
        workers: see data_jobs.run_job.
    Raises:
        UserError: no captions there, no such language, or a caption that cannot be read.
    """
    job = _job(input, output, language, batch, data_root)
    return run_job(job, workers=workers, threads=THREADS, device="cpu", progress=progress)


def done(
    *,
    input: str,
    output: str,
    language: str = "en-us",
    batch: int = 512,
    workers: int | None = None,
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether `output` was made from this input in this language. A mistake in `language` is raised."""
    try:
        Manifest.load(data_root / input)
    except DataError:
        return False  # a job before this one makes it
    return is_done(_job(input, output, language, batch, data_root))


def _job(input: str, output: str, language: str, batch: int, data_root: Path) -> ShardJob:
    source = Manifest.load(data_root / input)
    caption = source.fields.get("caption")
    if caption is None or caption.kind != "txt":
        raise DataError(f"{source.where}: got fields {sorted(source.fields)}, expected a caption (.txt) among them")
    phonemizer = Phonemizer(language)
    return ShardJob(
        source=source.folder,
        output=data_root / output,
        make=partial(CaptionReader, language, caption),
        encoder={
            "kind": "phonemes",
            "fingerprint": phonemizer.fingerprint,
            "language": language,
            "espeak_ng": phonemizer.version,
            "num_symbols": phonemizer.num_symbols,
            "table": list(phonemizer.table),
        },
        settings={"fields": [PHONEMES, "caption"]},
        batch=batch,
    )


class CaptionReader:
    """Captions of a shard to ids; see data_jobs.ShardEncoder."""

    def __init__(self, language: str, caption: Field, device: str):
        self.phonemizer, self.caption = Phonemizer(language), caption
        self.fingerprint = self.phonemizer.fingerprint
        self.fields = [Field(PHONEMES, f"{PHONEMES}.npy", "int16", (None,)), Field("caption", "txt", "text")]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        out = []
        for sample in samples:
            caption = decode("txt", sample.members[self.caption.extension])
            try:
                ids = self.phonemizer(caption)
            except UserError as error:
                raise DataError(
                    f"sample {sample.key!r}: {error}; leave it out of its folder, as ingest_speech does"
                ) from None
            out.append({PHONEMES: np.array(ids, np.int16), "caption": caption})
        return out


def main(argv: list[str] | None = None) -> int:
    command = parser("precompute_phonemes", __doc__ or "")
    command.add_argument("--input", required=True, help="folder with captions below the data root")
    command.add_argument("--output", required=True, help="folder of phonemes to make")
    command.add_argument("--language", default="en-us", help="espeak-ng's name of it (default: en-us)")
    command.add_argument("--batch", type=int, default=512, help="captions looked at together (default: 512)")
    actor_options(command)
    return serve(run, "precompute_phonemes", command.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
