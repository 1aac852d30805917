"""Semantic tokens: features of clips are grouped by k-means, and the groups kept as a folder.

    python data_pipelines/cluster_features.py --input speech/train/clips --features-folder encoders/hubert_base --layer 9 \\
        --clusters 500 --output speech/units
    python data_pipelines/cluster_features.py --input speech/train/clips --features-name mfcc --every 2 --clusters 200 --output units

Features are the hidden states of a self-supervised encoder in transformers' format (HuBERT, wav2vec 2.0, w2v-BERT, WavLM, data2vec; a local
folder, nothing is downloaded), or of our own: `mfcc` or `log_mel` at 50 frames a second, with mean 0 and variance 1 in each sound.
The clips that are looked at, and the first centres, are drawn by the seed. The folder (centres.safetensors, semantic.json) is what
precompute_semantic and a recipe's data.encoders.semantic take. A rerun makes it again only where clips or options have changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.command import Progress
from data_pipelines.cut_segments import sound_field
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, OneOf, option
from data_pipelines.signatures import RECORD, Record, refuse_foreign
from nexus_scale.conditioners.semantic import CENTRES, SETTINGS, SemanticConditioner, grouped, pooled_features
from nexus_scale.data.fields import read_bytes
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Manifest
from nexus_scale.data.order import shuffled
from nexus_scale.data.reader import read_alone
from nexus_scale.data.shards import read_samples
from nexus_scale.data.sounds import decode_wav
from nexus_scale.interop.speech_features import OWN, Features, open_features

TOGETHER = 32
"""Clips that are read at once."""


class Options(JobOptions):
    """Which features of which clips become how many tokens."""

    input: str = option(description="folder of clips, below the data root")
    features: Annotated[
        Mapping[str, Any], OneOf(folder="folder of an encoder in transformers' format", name=f"{' or '.join(OWN)}")
    ] = option(description="{folder: path of an encoder} or {name: mfcc}")
    layer: int | None = option(None, ge=0, description="of the encoder's hidden states (default: the last)")
    every: int = option(1, ge=1, le=100, description="frames of features that one token stands for")
    clusters: int = option(1024, ge=2, le=1 << 15, description="tokens")
    frames: int = option(200_000, ge=1, description="tokens' features that are grouped, at most")
    rounds: int = option(30, ge=1, le=10_000, description="of k-means, at most")
    seed: int = option(0, ge=0, description="of what is looked at, and of the first centres")
    device: str = option("cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$", description="where the encoder computes")

    def spec(self, source: Manifest) -> dict[str, Any]:
        """As `open_features` takes them; our own are of sounds at the first clip's rate."""
        if "name" not in self.features or self.layer is not None:
            return dict(self.features) | ({} if self.layer is None else {"layer": self.layer})
        first = next(read_samples(source.folder / source.shards[0].file)).members[sound_field(source).extension]
        return {**self.features, "sample_rate_hz": decode_wav(first).sample_rate_hz}


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Writes the folder.

    Raises:
        UserError: no clips or no encoder there, clips at another rate, fewer frames than tokens.
    """
    folder, source = roots.data_root / options.output, Manifest.load(roots.data_root / options.input)
    record = _record(options, roots)
    refuse_foreign(folder, RECORD)
    record.refuse_others(_there(folder))
    if is_made(options, roots):
        return
    (folder / SETTINGS).unlink(missing_ok=True)  # what is being changed must not look finished
    spec = options.spec(source)
    features = open_features(spec, roots.data_root, options.device)
    rows = torch.cat(list(_looked_at(source, features, options, progress)))[: options.frames]
    shift, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    centres = grouped((rows - shift) / scale, options.clusters, rounds=options.rounds, seed=options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    SemanticConditioner(features, options.every, centres, shift, scale).save(folder, spec)
    record.write()


def _looked_at(source: Manifest, features: Features, options: Options, progress: Progress | None) -> Iterator[Tensor]:
    """Features of clips in an order that the seed draws, until there are enough."""
    field, count = sound_field(source), 0
    order = shuffled(options.seed, np.arange(source.samples, dtype=np.int64))
    for begin in range(0, len(order), TOGETHER):
        numbers = order[begin : begin + TOGETHER]
        for number, data in zip(numbers, read_bytes(read_alone(source, field.name, numbers)), strict=True):
            sound = decode_wav(data)
            check_sound(source.index.key(int(number)), sound, features.sample_rate_hz)
            found = pooled_features(features, torch.from_numpy(sound.wave), options.every)
            count += len(found)
            yield found
        if progress is not None:
            progress(min(count, options.frames), options.frames)
        if count >= options.frames:
            return


def check_sound(key: str, sound: Any, sample_rate_hz: int) -> None:
    """Raises DataError where a clip is at another rate than features are of, or has two channels."""
    if sound.sample_rate_hz != sample_rate_hz or sound.wave.shape[0] != 1:
        raise DataError(
            f"clip {key!r}: got {sound.wave.shape[0]} channels at {sound.sample_rate_hz} Hz, the features are of one at {sample_rate_hz}; "
            f"make the clips again with sample_rate_hz: {sample_rate_hz}"
        )


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the folder is there, made from these clips."""
    return _there(roots.data_root / options.output) and _record(options, roots).fits()


def _there(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CENTRES, SETTINGS, RECORD))


def _record(options: Options, roots: Roots) -> Record:
    files = [roots.data_root / options.input / MANIFEST_FILE, *_encoder_files(options, roots.data_root)]
    decides = options.model_dump(exclude={"output", "device"}, mode="json")
    return Record(roots.data_root / options.output, roots.data_root, decides, files)


def _encoder_files(options: Options, root: Path) -> list[Path]:
    folder = root / str(options.features["folder"]) if "folder" in options.features else None
    return [] if folder is None else sorted([folder / "config.json", *folder.glob("*.safetensors")])


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
