"""The outlines of images and clips: where brightness changes, and none of its colours. What a drawing in another style keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = (0.299, 0.587, 0.114)
"""Of red, green and blue in brightness: ITU-R BT.601."""


def outlines(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) or clips (B, 3, F, H, W) in [-1, 1] -> like x, grey: -1 where nothing changes, 1 at the sharpest edges.

    Twice the length of Sobel's gradient of brightness, which is 1 at an edge from black to white, cut at 1.
    """
    frames = x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)
    brightness = (frames * frames.new_tensor(WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True)
    across = frames.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    slopes = F.conv2d(F.pad(brightness, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None])
    found = (2 * torch.linalg.vector_norm(slopes, dim=1, keepdim=True)).clamp(max=1) * 2 - 1
    grey = found.expand_as(frames)
    return grey if x.ndim == 4 else grey.unflatten(0, (len(x), -1)).transpose(1, 2)
