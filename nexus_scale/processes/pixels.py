"""Converts stored pixels (bytes 0..255) to [-1, 1], in one place for training, encoding and scoring."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Rng, UserError


def pixels_of(batch: Batch, name: str) -> Tensor:
    """Images or clips of a batch in [-1, 1], (B, C, ...) float32.

    Raises:
        UserError: see `to_unit_range`.
    """
    return to_unit_range(batch[name], batch.dtype(name), name)


def mirrored(x: Tensor, rng: Rng, name: str = "mirror") -> Tensor:
    """Images or clips (B, C, ..., W), each flipped left to right with probability 1/2; those drawn under one name flip together."""
    return torch.where((rng.uniform(name) < 0.5).view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def to_unit_range(values: Tensor, stored: torch.dtype, name: str) -> Tensor:
    """Bytes 0..255 as -1..1, float32; floats are assumed to be in [-1, 1] and kept.

    Args:
        values: any shape; bytes may have been widened to another integer type.
        stored: the type of the field in its shards.
    Raises:
        UserError: other integers, whose range is not known.
    """
    if stored.is_floating_point:
        return values.float()
    if stored == torch.uint8:
        return values.float() / 127.5 - 1
    raise UserError(
        f"field {name}: got {str(stored).removeprefix('torch.')}, expected pixels as uint8 in 0..255, or as floats in [-1, 1]; "
        "store them in one of these forms",
        3,
    )


def were_bytes(values: Tensor) -> bool:
    """Whether values in [-1, 1] are bytes that were scaled to it: all lie on one of the 256."""
    places = (values + 1) * 127.5
    return bool(((places - places.round()).abs() < 1e-2).all())
