"""What the loader gives: batches, random numbers, and what a network is conditioned on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Cond = Mapping[str, Tensor]
"""What a network is conditioned on, by name: `text` (B, L, D), `text_mask` (B, L) bool with True at real
tokens, `pooled` (B, D), `label` (B,), `guidance` (B,). A name that a network does not know is ignored."""

SIZES = ("original_size", "crop_top_left", "target_size")
"""Conditions (B, 2), vertical before horizontal, in pixels: the size of the image that a sample was made of, where in it, scaled to cover
the sample, the sample's corner lies, and the sample's own size. They are never dropped (SDXL, PixArt-alpha). Of a sample that is flipped
left to right the corner is `crop_top_left_mirrored`."""


# ----------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        fields: tensors by field name, each (B, ...), of one resolution or length; numbers as the shards store them.
        positions: place of each sample in the *global* batch, (B,) int64 on the CPU, in 0..global_batch-1.
            Randomness is keyed by it, so it does not depend on the number of workers or the micro-batch size.
        samples: number of each sample in its manifest, (B,) int64 on the CPU: the ledger of what was seen.
        draw: how many global batches were drawn before this one.
        bucket: name of the resolution or length bucket that all ranks share in this global batch.
        stored: the types that fields had before `on` widened them: bytes of pixels and class numbers are both int64 after it.
    """

    fields: Mapping[str, Tensor]
    positions: Tensor
    samples: Tensor
    draw: int = 0
    bucket: str = ""
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __len__(self) -> int:
        return len(self.positions)

    def on(self, device: torch.device | str) -> Batch:
        """The batch to compute with: fields on the device, floating ones as float32 and integers as int64.

        They are widened on the device, not while reading: half as many bytes are gathered, prefetched and copied. From pinned memory the
        copies run beside host and device. Of masks the host keeps the values (`on_host`).
        """
        return replace(
            self,
            fields={name: _placed(value, device) for name, value in self.fields.items()},
            stored={name: self.dtype(name) for name in self.fields},
        )

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a field is stored, whatever it was widened to."""
        return self.stored.get(name, self.fields[name].dtype)


def _placed(value: Tensor, device: torch.device | str) -> Tensor:
    there = value.to(device, non_blocking=True)
    if value.dtype == torch.bool:
        return keep_on_host(there, value)
    return there.to(torch.float32 if value.is_floating_point() else torch.int64)


# Masks: how much of a text is padding decides shapes and kernels, which the host must know. It does, since data come from it.


def keep_on_host(there: Tensor, here: Tensor) -> Tensor:
    """`there`, whose values the host keeps in `here`: `on_host` finds them without waiting for the device."""
    if there is not here and there.device.type != "cpu":
        there.nexus_on_host = here  # type: ignore[attr-defined]
    return there


def on_host(value: Tensor) -> Tensor:
    """The values of a tensor on the host. Where nobody kept them there, this waits for the device."""
    kept: Tensor = getattr(value, "nexus_on_host", value)
    return kept.cpu()


def on_both(compute: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """`compute(*given)`, of which the host keeps the values if it keeps those of all that is given: it computes them as well."""
    result = compute(*given)
    kept = [getattr(value, "nexus_on_host", None) for value in given]
    if result.device.type == "cpu" or any(value is None for value in kept):
        return result
    return keep_on_host(result, compute(*kept))


class Rng(Protocol):
    """Random numbers as a function of progress: (seed, step, phase and its occurrence in the step, position in the global batch, name)."""

    @property
    def positions(self) -> Tensor:
        """Place of each sample in the global batch, (B,) int64 on the CPU."""
        ...

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, (B, *shape) float32 on the device of the batch, one row per sample."""
        ...

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape) float32, one row per sample."""
        ...

    def shared(self, name: str) -> torch.Generator:
        """A CPU generator equal on all ranks, keyed (seed, step, phase, name): for draws that decide which layers run."""
        ...


# ----------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class CondField:
    """One tensor of a condition: the `shape` of one value's, None first where its length varies, and its `dtype` as it is stored,
    by numpy's name."""

    shape: tuple[int | None, ...]
    dtype: str

    @property
    def varies(self) -> bool:
        return bool(self.shape) and self.shape[0] is None


class Conditioner(ABC):
    """Raw values of one kind -> named tensors. Precompute jobs, the loader, prompts, negative prompts and validation all ask it.

    Attributes:
        reads: what a raw value is: `text`, `label`, `image`, `audio`.
        fields: what it makes of a value, by name.
        fingerprint: of all that decides the numbers; data carry it, and a run refuses data of another one.
    """

    reads: str
    fields: Mapping[str, CondField]
    fingerprint: str

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> Sequence[Mapping[str, np.ndarray]]:
        """The fields of each value, in order, as they are stored.

        Raises:
            UserError: a value that it cannot read; names it.
        """

    def cut(self, values: Sequence[Any], lengths: Mapping[str, int | None]) -> dict[str, tuple[int, int]]:
        """By field, where some are: how many values are longer than what batches of these `lengths` read of them, and how long that is."""
        return {}
