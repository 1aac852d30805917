"""The data set of a recipe's split: its sources, and what is drawn beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus_scale.config.schema import Source as SourceSection
from nexus_scale.config.schema import Split
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.stores import placed


def open_split(split: Split, data_root: Path, **settings: Any) -> Dataset:
    """The split's data set; `settings` are those of `Dataset.open`.

    Raises:
        DataError: see `Dataset.open` and `Dataset.beside`.
    """
    dataset = Dataset.open(_sources(split.sources, data_root), **settings)
    bad = {"bad": settings["bad"]} if "bad" in settings else {}
    return dataset.beside(
        {name: Dataset.open(_sources(some, data_root), **bad) for name, some in split.unpaired.items()}
    )


def _sources(sections: Sequence[SourceSection], data_root: Path) -> list[Source]:
    return [
        Source(
            [placed(data_root, folder) for folder in one.folders],
            one.weight,
            one.balance,
            {name: placed(data_root, folder) for name, folder in one.named.items()},
        )
        for one in sections
    ]
