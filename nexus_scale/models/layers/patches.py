"""Images cut into square patches, a token each, and put together again."""

from __future__ import annotations

from torch import Tensor


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, h*p, w*p) -> (B, h*w, C*p*p)."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)
    return x.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(x: Tensor, h: int, w: int, p: int) -> Tensor:
    """(B, h*w, p*p*C) -> (B, C, h*p, w*p): published weights read channels first, and write them last."""
    B, _, values = x.shape
    C = values // p**2
    x = x.reshape(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return x.reshape(B, C, h * p, w * p)
