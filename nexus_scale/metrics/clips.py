"""Metrics of clips: from image models per frame, and by the change from one frame to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Extract = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> features (B, D)."""


def frames_of(clips: Tensor, count: int) -> Tensor:
    """`count` frames of each clip, evenly from the first to the last: (N, C, F, H, W) -> (N * count, C, H, W), a clip's side by side."""
    chosen = torch.linspace(0, clips.shape[2] - 1, min(count, clips.shape[2]), device=clips.device).round().long()
    return clips[:, :, chosen].transpose(1, 2).flatten(0, 1)


class OverFrames(nn.Module):
    """An image classifier as a classifier of clips: the mean of its answers over the frames, (B, 3, F, H, W) -> (B, num_classes)."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(frames_of(clips, clips.shape[2])).unflatten(0, (len(clips), -1)).mean(1)


@torch.no_grad()
def features_of(extract: Extract, samples: Tensor, batch: int = 64) -> Tensor:
    """Features of images (N, 3, H, W), or of clips (N, 3, F, H, W), in [-1, 1].

    A clip's are the mean of its frames' features, and beside it the mean size of their change from a frame to the next: clips of the
    same pictures that stand still, or jump, differ in the second half.

    Returns:
        (N, D); of clips (N, 2D).
    """
    if samples.ndim == 4:
        return torch.cat([extract(part) for part in samples.split(batch)])
    rows = []
    for part in samples.split(max(1, batch // samples.shape[2])):
        frames = extract(frames_of(part, part.shape[2])).unflatten(0, (len(part), -1))  # (b, F, D)
        change = frames.diff(dim=1).abs().mean(1) if frames.shape[1] > 1 else torch.zeros_like(frames[:, 0])
        rows.append(torch.cat([frames.mean(1), change], dim=1))
    return torch.cat(rows)


class Consistency(NamedTuple):
    """How alike the frames of each clip are, (N,) float64 each.

    `following`: the mean cosine of a frame's features with the one before's; `first`: the mean of that and of its cosine with the first
    frame's, which a slow drift lowers. 1: all alike, so read both beside the real clips': what stands still is perfect.
    """

    following: Tensor
    first: Tensor


@torch.no_grad()
def frame_consistency(extract: Extract, clips: Tensor, batch: int = 64) -> Consistency:
    """Temporal consistency of clips (N, 3, F, H, W) in [-1, 1], by the features of their frames: CLIP's or DINO's.

    Source: Huang et al. 2024, "VBench": background consistency takes CLIP's features, subject consistency DINO's, and both take `first`.

    Raises:
        ValueError: clips of one frame.
    """
    _check_frames(clips)
    rows = [extract(part).double().cpu() for part in frames_of(clips, clips.shape[2]).split(batch)]
    frames = F.normalize(torch.cat(rows), dim=1).unflatten(0, (len(clips), -1))  # (N, F, D)
    following = (frames[:, 1:] * frames[:, :-1]).sum(2).clamp_min(0)
    first = (frames[:, 1:] * frames[:, :1]).sum(2).clamp_min(0)
    return Consistency(following.mean(1), ((following + first) / 2).mean(1))


def frame_change(clips: Tensor) -> Tensor:
    """Mean absolute change of a pixel from a frame to the next, of clips (N, C, F, H, W) in [-1, 1]: (N,) float64, 0 to 2.

    Nothing is warped, so motion counts as flicker does: 0 is a still, and what real clips have is the figure to come near. VBench's
    temporal flickering is 1 - change / 2, of clips that should stand still.

    Raises:
        ValueError: clips of one frame.
    """
    _check_frames(clips)
    return clips.double().diff(dim=2).abs().flatten(1).mean(1)


def _check_frames(clips: Tensor) -> None:
    if clips.ndim != 5 or clips.shape[2] < 2:
        raise ValueError(f"got clips {tuple(clips.shape)}; expected (N, C, F, H, W) of at least 2 frames")
