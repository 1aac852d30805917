"""Packs a batch's text without padding: the real tokens of all samples end to end, in S rows.

`lengths` is the number of real text tokens of each sample, S their sum. Images of a batch are of one size and need no
packing. Everything here is slices and concatenations, in compiled code gathers with a gradient of their own: sums in a fixed order on
every device, where the gradient of an indexed gather is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_scale.contracts import on_host
from nexus_scale.kernels.lengths import Lengths, Rearranged, Repeated
from nexus_scale.kernels.transfer import to_device


class TextLengths(Lengths):
    """Real text tokens of each sample, beside images of `num_img` tokens.

    Attributes:
        joint, images: tokens of each sample's image and text together, and of its image.
        order, inverse: in compiled code, which of all image tokens, followed by all text tokens, lies at each place of the joint
            sequence, and the other way round, (B * num_img + S,) int64.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, tokens: Sequence[int], longest: int, num_img: int, device: torch.device | None = None):
        super().__init__(tokens, longest, device)
        self.joint = Lengths([num_img + own for own in tokens], num_img + longest, device)
        self.images = Lengths([num_img] * len(tokens), num_img, device)
        if device is not None:
            each = torch.tensor(self.tokens)
            before = (each.cumsum(0) - each).repeat_interleave(num_img)  # text tokens before each image token
            after = (torch.arange(len(each)) + 1).repeat_interleave(
                each
            ) * num_img  # image tokens before each text token
            inverse = torch.cat([torch.arange(len(before)) + before, torch.arange(len(after)) + after])
            self.order, self.inverse = to_device(inverse.argsort(), device), to_device(inverse, device)

    def open_tensors(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Packed streams (S, 1, D), of text or of both, and tables of the joint places, (S, ...)."""
        text, joint = sum(self.tokens), sum(self.joint.tokens)
        streams = [x for x in given if x.dim() == 3 and x.shape[1] == 1 and x.shape[0] in (text, joint)]
        tables = [x for x in given if x.dim() == 2 and x.shape[0] == joint]
        return [self.rows, self.joint.rows, self.order, self.inverse, *streams, *tables]


def text_lengths(mask: Tensor | None, num_img: int, device: torch.device | None = None) -> TextLengths | None:
    """Real tokens of each sample from a mask (B, T); None if nothing is padded (or, in a rehearsal on the meta device, unknown).

    Args:
        num_img: image tokens of a sample.
        device: of compiled blocks. For these all lengths are alike: there is no other code where nothing is padded.
    """
    if mask is None or mask.is_meta:
        return None
    lengths = on_host(mask).sum(1).tolist()
    if device is None and min(lengths) == mask.shape[1]:
        return None
    return TextLengths(lengths, mask.shape[1], num_img, device)


def all_real(mask: Tensor | None) -> bool:
    """Whether a mask leaves nothing out; also in a rehearsal on the meta device, where it is unknown."""
    return mask is None or mask.is_meta or bool(on_host(mask).all())


def text_keys(mask: Tensor | None, always: bool) -> Tensor | None:
    """Which tokens of a text to attend to, (B, 1, 1, T) bool, by its mask (B, T); None where none is padding, since attention without a
    mask has faster kernels; not with `always`, which a compiled network needs: one graph for all texts."""
    if mask is None or (all_real(mask) and not always):
        return None
    return mask.bool()[:, None, None, :]


def pack(text: Tensor, mask: Tensor) -> Tensor:
    """Text (B, T, D) and its mask (B, T) -> its real tokens (S, 1, D): a "sample" each, so that what is modulated per sample
    is modulated per token."""
    places = on_host(mask).bool().flatten().nonzero()[:, 0]  # (S,)
    return text.flatten(0, 1)[to_device(places, text.device)][:, None]


def repeat_rows(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """A row for each of its sample's tokens: (B, D) -> (S, D)."""
    if torch.compiler.is_compiling() and isinstance(lengths, Lengths):
        y: Tensor = Repeated.apply(x, lengths.rows)
        return y
    return torch.cat([row.expand(length, -1) for row, length in zip(x, lengths, strict=True)])


def interleave(img: Tensor, txt: Tensor, lengths: Sequence[int]) -> Tensor:
    """Image tokens (B, L, ...) and packed text (S, ...) -> one sequence, sample after sample, (B * L + S, ...)."""
    if torch.compiler.is_compiling() and isinstance(lengths, TextLengths):
        joint: Tensor = Rearranged.apply(torch.cat((img.flatten(0, 1), txt)), lengths.order, lengths.inverse)
        return joint
    return torch.cat([part for pair in zip(img, txt.split(list(lengths)), strict=True) for part in pair])


def deinterleave(joint: Tensor, num_img: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The inverse: image tokens (B, L, ...) with L = num_img, and packed text (S, ...)."""
    if torch.compiler.is_compiling() and isinstance(lengths, TextLengths):
        apart: Tensor = Rearranged.apply(joint, lengths.inverse, lengths.order)
        images = lengths.images.rows.shape[0]
        return apart[:images].unflatten(0, (-1, num_img)), apart[images:]
    parts = joint.split([length for pair in ((num_img, own) for own in lengths) for length in pair])
    return torch.stack(parts[0::2]), torch.cat(parts[1::2])
