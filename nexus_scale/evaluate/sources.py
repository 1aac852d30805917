"""What is evaluated, and what it is held against: pictures, clips or sounds of a run, an export, a folder of shards or of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.conditioners.label import captioned
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset
from nexus_scale.data.dataset import Source as Sources
from nexus_scale.data.fields import read_bytes
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Manifest
from nexus_scale.data.order import fixed_order
from nexus_scale.data.reader import read_alone
from nexus_scale.data.sounds import decode_wav
from nexus_scale.generate.given import pictures_of, prompt_beside
from nexus_scale.generate.prompts import GRID, record_of
from nexus_scale.generate.trained import Trained
from nexus_scale.processes.pixels import pixels_of, to_unit_range
from nexus_scale.train import open_data

FIELDS = ("image", "video")
AT_ONCE = 64
"""Samples that are read together."""


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order, as many as `captions`.

    Attributes:
        name: what they are, for people; `fingerprint` of what decides their bits.
        captions, labels: of each sample; None where nothing says them.
        read: yields places (b,) among the samples, and these in [-1, 1], (b, 3, H, W) or (b, 3, F, H, W).
    """

    name: str
    fingerprint: str
    count: int
    read: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None

    @property
    def described(self) -> dict[str, object]:
        """For the result: what to check that two evaluations share."""
        return {"fingerprint": self.fingerprint, "samples": self.count}


def folder_source(folder: Path, count: int | None = None) -> Source:
    """Samples of a folder of shards, or of the picture files in a folder, at most `count` of them.

    Raises:
        UserError: no such folder, or it has no pictures or clips.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected shards, or pictures (PNG, JPEG, WebP)", code=3)
    return _shards(folder, count) if (folder / MANIFEST_FILE).exists() else _files(folder, count)


def _shards(folder: Path, count: int | None) -> Source:
    dataset = Dataset.open([Sources([folder])])
    field = next((name for name in FIELDS if name in dataset.fields), None)
    if field is None:
        raise UserError(f"{folder}: has fields {sorted(dataset.fields)}; expected `image` or `video`", code=3)
    wanted = min(count or dataset.samples, dataset.samples)
    numbers = fixed_order([len(stock.bucket) for stock in dataset.stocks], wanted)[1].tolist()
    shown = dataset.only([field])

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in shown.fixed(wanted, batch=AT_ONCE):
            yield batch.positions, pixels_of(batch, field)

    labels: list[int] | None = None
    if "label" in dataset.fields:
        said = ((batch.positions, batch["label"]) for batch in dataset.only(["label"]).fixed(wanted))
        found = {
            place: label for places, some in said for place, label in zip(places.tolist(), some.tolist(), strict=True)
        }
        labels = [found[place] for place in range(wanted)]
    fingerprint = Manifest.load(folder).hash
    captions = dataset.texts("caption", numbers) if captioned(dataset) else None
    return Source(str(folder), fingerprint, wanted, read, captions, labels)


def _files(folder: Path, count: int | None) -> Source:
    paths = [path for path in pictures_of(folder) if path.name != GRID][:count]
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(path.read_bytes())

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for place, path in enumerate(paths):
            try:
                pixels = torch.from_numpy(decode_image(path.read_bytes())).permute(2, 0, 1)
            except DataError as error:
                raise UserError(f"{path}: {error}", code=3) from None
            yield torch.tensor([place]), to_unit_range(pixels[None], torch.uint8, "image")

    return Source(str(folder), digest.hexdigest(), len(paths), read)


Waves = list[tuple[Tensor, int]]
"""Sounds (T,), each with its rate."""


def recordings_of(clips: Manifest, count: int, asked_by: str) -> tuple[list[str], Waves]:
    """Captions and recordings, `count` or all there are, spread over the folder.

    Raises:
        UserError: it has no recordings or captions.
    """
    for field in ("audio", "caption"):
        if field not in clips.fields:
            raise UserError(
                f"{asked_by}: {clips.where} has no {field!r}; give a folder of recordings with captions", code=3
            )
    count = min(count, clips.samples)
    numbers = np.arange(count, dtype=np.int64) * clips.samples // max(count, 1)
    captions = [data.decode() for data in read_bytes(read_alone(clips, "caption", numbers))]
    sounds = [decode_wav(data) for data in read_bytes(read_alone(clips, "audio", numbers))]
    return captions, [(torch.from_numpy(sound.wave).mean(0), sound.sample_rate_hz) for sound in sounds]


def sounds_of(folder: Path) -> tuple[list[str], Waves]:
    """Captions and sounds of the .wav files in a folder, in the order of their names: `NAME.txt` beside each, or the prompts that
    `nexus sample` was given.

    Raises:
        UserError: fewer than two, a file that is no sound, or one of which nothing says what it was made of.
    """
    paths = sorted(folder.glob("*.wav"))
    if len(paths) < 2:
        raise UserError(f"{folder}: has {len(paths)} .wav files; expected two at least", code=3)
    record = record_of(folder).get("prompts")
    captions = [prompt_beside(path.stem, [folder], [record]) for path in paths]
    if not all(captions):
        bare = paths[captions.index("")]
        raise UserError(
            f"{bare}: nothing says what it is; expected its words in {bare.with_suffix('.txt').name}", code=3
        )
    waves = []
    for path in paths:
        try:
            sound = decode_wav(path.read_bytes())
        except (DataError, OSError) as error:
            raise UserError(f"{path}: {error}", code=3) from None
        waves.append((torch.from_numpy(sound.wave).mean(0), sound.sample_rate_hz))
    return captions, waves


def held_out(trained: Trained, asked_by: str) -> Any:
    """A run's validation data.

    Raises:
        UserError: its recipe has none.
    """
    if trained.recipe.data.validation is None and trained.recipe.data.synthetic is None:
        raise UserError(f"{asked_by}: recipe {trained.recipe.name} has no validation data")
    return open_data(trained.recipe, trained.place.data_root, "validation", beside=trained.dataset)


def halves_of(source: Source) -> tuple[Source, Source]:
    """A source's even and odd samples."""

    def part(first: int) -> Source:
        def read() -> Iterator[tuple[Tensor, Tensor]]:
            for places, samples in source.read():
                own = places % 2 == first
                if bool(own.any()):
                    yield places[own] // 2, samples[own]

        return Source(
            f"{source.name} ({first}::2)", f"{source.fingerprint}-{first}", (source.count + 1 - first) // 2, read
        )

    return part(0), part(1)


def noise_source(shape: Sequence[int], count: int, seed: int) -> Source:
    """Uniform noise of a sample's shape: what a useless model draws."""

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, count, AT_ONCE):
            places = torch.arange(begin, min(begin + AT_ONCE, count))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + begin)
            yield places, torch.rand((len(places), *shape), generator=generator) * 2 - 1

    return Source("noise", f"noise-{tuple(shape)}-{seed}", count, read)
