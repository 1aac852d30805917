"""Packs a batch's text without padding: the real tokens of all samples end to end, in S rows.

`lengths` is the number of real text tokens of each sample, S their sum. Images of a batch are of one size and need no
packing. Everything here is slices and concatenations: their gradients are sums in a fixed order on every device, where
those of an indexed gather are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_scale.contracts import on_host
from nexus_scale.kernels.transfer import to_device

Lengths = tuple[int, ...]


def text_lengths(mask: Tensor | None) -> Lengths | None:
    """Real tokens of each sample from a mask (B, T); None if nothing is padded (or, in a rehearsal on the meta device, unknown)."""
    if mask is None or mask.is_meta:
        return None
    lengths = tuple(on_host(mask).sum(1).tolist())
    return None if min(lengths) == mask.shape[1] else lengths


def all_real(mask: Tensor | None) -> bool:
    """Whether a mask leaves nothing out; also in a rehearsal on the meta device, where it is unknown."""
    return mask is None or mask.is_meta or bool(on_host(mask).all())


def pack(text: Tensor, mask: Tensor) -> Tensor:
    """Text (B, T, D) and its mask (B, T) -> its real tokens (S, 1, D): a "sample" each, so that what is modulated per sample
    is modulated per token."""
    places = on_host(mask).bool().flatten().nonzero()[:, 0]  # (S,)
    return text.flatten(0, 1)[to_device(places, text.device)][:, None]


def repeat_rows(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """A row for each of its sample's tokens: (B, D) -> (S, D)."""
    return torch.cat([row.expand(length, -1) for row, length in zip(x, lengths, strict=True)])


def interleave(img: Tensor, txt: Tensor, lengths: Sequence[int]) -> Tensor:
    """Image tokens (B, L, ...) and packed text (S, ...) -> one sequence, sample after sample, (B * L + S, ...)."""
    return torch.cat([part for pair in zip(img, txt.split(list(lengths)), strict=True) for part in pair])


def deinterleave(joint: Tensor, num_img: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The inverse: image tokens (B, L, ...) with L = num_img, and packed text (S, ...)."""
    parts = joint.split([length for pair in ((num_img, own) for own in lengths) for length in pair])
    return torch.stack(parts[0::2]), torch.cat(parts[1::2])
