"""Images beside a sample: of the same one under a name of their own, or of another set, with which it has nothing to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from nexus_scale.config.schema import Source, Split
from nexus_scale.contracts import Progress
from nexus_scale.data.dataset import Dataset
from nexus_scale.data.errors import DataError
from nexus_scale.data.loader import Loader
from nexus_scale.data.manifest import Field
from nexus_scale.data.reader import DatasetReader
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.splits import open_split

BATCH = 6


def write(folder: Path, count: int, shade: int, size: int = 4) -> None:
    """Images whose first pixel tells the set and the number, in two shards."""
    fields = [Field("image", "png", "uint8", (size, size, 3))]
    for shard, numbers in enumerate(np.array_split(np.arange(count), 2)):
        with ShardWriter(folder / f"shard-{shard}.tar", fields) as writer:
            for number in numbers.tolist():
                pixels = np.zeros((size, size, 3), np.uint8)
                pixels[0, 0] = (shade, number, 0)
                writer.write(f"{number:03d}", {"image": pixels}, bucket=f"{size}x{size}")
    finish_folder(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unpaired")
    for name, count, shade in (("photos", 10, 1), ("sketches", 10, 2), ("horses", 7, 3)):
        write(root / name, count, shade)
    write(root / "large", 10, 4, size=8)
    return root


def opened(root: Path, **changed: Any) -> Dataset:
    return open_split(Split(**{"sources": [{"folders": ["photos"]}], **changed}), root)


def first_pixels(images: Tensor) -> list[tuple[int, int]]:
    """The set and the number of each image."""
    return [(round(r), round(g)) for r, g in ((images[:, :2, 0, 0].float() + 1) * 127.5).tolist()]


def read(dataset: Dataset, draws: int, rank: int = 0, world_size: int = 1, micro: int = BATCH) -> list[dict[str, Any]]:
    loader = Loader(
        dataset,
        seed=3,
        global_batch=BATCH,
        micro_batch=micro,
        rank=rank,
        world_size=world_size,
        progress=Progress(),
        prefetch=0,
    )
    found = []
    for _ in range(draws):
        for batch in loader.next_batches():
            images = {name: first_pixels(value) for name, value in batch.fields.items()}
            found += [
                {"place": int(place), "draw": batch.draw, **{name: values[row] for name, values in images.items()}}
                for row, place in enumerate(batch.positions)
            ]
    loader.close()
    return found


def test_a_folder_of_the_same_samples_is_called_as_the_recipe_says(root: Path) -> None:
    dataset = opened(root, sources=[{"folders": ["photos"], "named": {"source": "sketches"}}])
    assert dataset.fields == {"image": (3, 4, 4), "source": (3, 4, 4)}
    assert all(
        one["image"] == (1, n) and one["source"] == (2, n) for one in read(dataset, 5) for n in [one["image"][1]]
    )
    assert list(dataset.only(["source"]).fields) == ["source"]
    batch = next(iter(dataset.fixed(4)))
    assert [n for _, n in first_pixels(batch["image"])] == [n for _, n in first_pixels(batch["source"])]
    assert dataset.hash != opened(root).hash


def test_images_of_another_set_come_in_an_order_of_their_own(root: Path) -> None:
    """Each as often as the others, with no tie to the sample beside it; and the same on two workers and in micro-batches."""
    dataset = opened(root, unpaired={"source": [{"folders": ["horses"]}]})
    found = read(dataset, 35)
    assert Counter(one["image"] for one in found) == {(1, n): 21 for n in range(10)}
    assert Counter(one["source"] for one in found) == {(3, n): 30 for n in range(7)}
    together = Counter((one["image"], one["source"]) for one in found)
    assert len(together) > 60, "most of the 70 pairs"
    halves = [one for rank in range(2) for one in read(dataset, 35, rank, 2, micro=1)]
    assert sorted(halves, key=lambda one: (one["draw"], one["place"])) == found
    assert [one["image"] for one in read(opened(root), 35)] == [one["image"] for one in found]
    fixed = [first_pixels(batch["source"]) for batch in dataset.fixed(10, batch=5)]
    assert fixed == [first_pixels(batch["source"]) for batch in dataset.fixed(10, batch=5)]
    assert dataset.hash not in (opened(root).hash, opened(root, unpaired={"other": [{"folders": ["horses"]}]}).hash)
    assert dataset.only(["image"]).hash == opened(root).hash and list(dataset.only(["source"]).fields) == ["source"]


def test_shards_of_both_sets_are_announced_before_they_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are read now and next, so that remote ones come meanwhile."""
    dataset = opened(root, unpaired={"source": [{"folders": ["horses"]}]})
    order, told = dataset.order(3, BATCH), list[tuple[Any, int]]()
    monkeypatch.setattr(DatasetReader, "fetch", lambda reader, windows: told.append((reader, len(tuple(windows)))))
    reader = dataset.reader()
    reader.fetch(order.batch(0).windows)
    reader.read(order.batch(0), np.arange(BATCH))
    reader.close()
    assert [count for _, count in told] == [1, 2] and told[0][0] is not told[1][0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"unpaired": {"image": [{"folders": ["horses"]}]}}, "'image' is a field of"),
        ({"unpaired": {"source": [{"folders": ["large"]}]}}, "expected one size"),
        ({"sources": [{"folders": ["photos"], "named": {"image": "sketches"}}]}, "another name"),
        ({"sources": [{"folders": ["photos"], "named": {"source": "horses"}}]}, "different samples"),
        ({"sources": [{"folders": ["photos"], "named": {"a": "sketches"}}, {"folders": ["photos"]}]}, "same `named`"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed: dict[str, Any], words: str, root: Path) -> None:
    with pytest.raises(DataError, match=words):
        opened(root, **changed)


def test_recipes_without_them_are_written_as_before() -> None:
    assert Split(sources=[Source(folders=["a"])]).model_dump() == {
        "sources": [{"folders": ["a"], "weight": 1.0, "balance": 0.0}]
    }
