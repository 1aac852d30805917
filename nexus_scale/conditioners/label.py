"""Classes, by name or number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from nexus_scale.config import registry
from nexus_scale.contracts import CondField, Conditioner, UserError

LOOKED_AT = 1 << 14
"""Samples that are looked at for the names of classes."""


class LabelConditioner(Conditioner):
    """Classes -> `label`, a whole number.

    Args:
        names: numbers of classes by name; empty where they have none.
        num_classes: how many there are; None where nothing says so.
    """

    reads = "label"

    def __init__(self, names: Mapping[str, int], num_classes: int | None = None):
        self.names, self.num_classes = dict(names), num_classes
        self.fields = {"label": CondField((), "int64")}
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(sorted(self.names.items())).encode())

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """The number of each class; raises a UserError that names the nearest where there is no such class."""
        return [{"label": np.asarray(self._number(str(value)), np.int64)} for value in values]

    def _number(self, name: str) -> int:
        highest = None if self.num_classes is None else self.num_classes - 1
        span = "a number" if highest is None else f"a number from 0 to {highest}"
        number = int(name) if name.isdecimal() else self.names.get(name)
        if number is None and not self.names:
            raise UserError(f"no class {name!r}: this run has no class names; give {span}")
        if number is None:
            raise UserError(f"no class {name!r}; {registry.nearest(name, list(self.names))} Or give {span}.")
        if highest is not None and number > highest:
            raise UserError(f"no class {name!r}: give {span}")
        return number


def captioned(dataset: Any) -> bool:
    """Whether all samples of a data set carry captions."""
    sources = dataset.sources
    return bool(sources) and all(any("caption" in manifest.fields for manifest in joined) for joined in sources)


def class_names(dataset: Any) -> dict[str, int]:
    """Numbers of classes by name: the caption that all samples of a class share. Empty where captions say more than that."""
    if not captioned(dataset) or "label" not in dataset.fields:
        return {}
    labels = dataset.only(["label"])
    seen: dict[int, list[int]] = {}
    for batch in labels.fixed(min(labels.samples, LOOKED_AT), batch=1024):
        for label, sample in zip(batch["label"].tolist(), batch.samples.tolist(), strict=True):
            if len(seen.setdefault(label, [])) < 2:
                seen[label].append(sample)
    names: dict[str, int] = {}
    for label, samples in sorted(seen.items()):
        captions = set(dataset.texts("caption", samples))
        if len(captions) > 1:
            return {}
        names[captions.pop()] = label
    return names
