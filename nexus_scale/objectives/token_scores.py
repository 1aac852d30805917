"""How right predicted tokens are: cross-entropy over those that count, with label smoothing and a z-loss where a recipe asks for them.

Source: Szegedy et al. 2016 (label smoothing); Chowdhery et al. 2022, "PaLM", section 5 (z-loss).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import Loss, UserError

TOP = 10
"""A token counts as nearly right if it is among this many likeliest, as in the public implementations."""


class Scored(NamedTuple):
    """Means over each sample's real codes, (B,) float32: nats, and shares of codes found first and among the first ten."""

    loss: Tensor
    accuracy: Tensor
    top: Tensor


def score_codes(logits: Tensor, targets: Tensor, real: Tensor) -> Scored:
    """Cross-entropy in float32, over the real codes of each sample.

    Args:
        logits: (B, T, V).
        targets: (B, T) integers; where not real anything.
        real: (B, T) bool, with at least one True in each row.
    """
    logits, targets = logits.float(), torch.where(real, targets, 0)
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T)
    with torch.no_grad():
        own = logits.gather(2, targets[..., None])
        rank = (logits > own).sum(2)  # (B, T)

    return Scored(mean_of(nats, real), mean_of((rank < 1).float(), real), mean_of((rank < TOP).float(), real))


def mean_of(values: Tensor, real: Tensor) -> Tensor:
    """The mean over each row's real places, (B, T) -> (B,)."""
    return torch.where(real, values, 0.0).sum(1) / real.sum(1)


class TokenLoss:
    """What is minimised for predicted tokens: cross-entropy, to which a recipe may add label smoothing and a z-loss."""

    def __init__(self, label_smoothing: float, z_loss: float):
        """
        Args:
            label_smoothing: share of the target that is spread over all tokens alike.
            z_loss: weight of log(sum(exp(logits)))^2, which keeps logits near their normalised values; PaLM has 1e-4.
        Raises:
            UserError: smoothing outside of [0, 1).
        """
        if not 0 <= label_smoothing < 1:
            raise UserError(f"objective.label_smoothing: got {label_smoothing}; expected a share in [0, 1)")
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def __call__(self, logits: Tensor, targets: Tensor, real: Tensor) -> Loss:
        """See `score_codes`. The mean over samples of the mean over a sample's real codes: a long one weighs no more than a short one.

        Metrics: `loss`, in nats and without what is added to it, `accuracy`, `top10`; `z`, the mean of log(sum(exp(logits)))^2, where it
        counts.
        """
        scored = score_codes(logits, targets, real)
        total, added = scored.loss.mean(), {}
        if self.label_smoothing:
            spread = mean_of(-logits.float().log_softmax(2).mean(2), real).mean()
            total = (1 - self.label_smoothing) * total + self.label_smoothing * spread
        if self.z_loss:
            z = mean_of(logits.float().logsumexp(2).square(), real).mean()
            total, added = total + self.z_loss * z, {"z": z.detach()}
        nats = scored.loss.detach().mean()
        return Loss(total, {"loss": nats, "accuracy": scored.accuracy.mean(), "top10": scored.top.mean(), **added})


def with_end(codes: Tensor, real: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Codes with the token `end` after each sample's last, and which of them count.

    Args:
        codes: (B, T).
        real: (B, T) bool, a prefix of each row.
    Returns:
        (B, T + 1) each.
    """
    lengths = real.sum(1)
    places = torch.arange(codes.shape[1] + 1, device=real.device)
    ended = torch.where(places == lengths[:, None], end, F.pad(codes, (0, 1)))
    return ended, places <= lengths[:, None]
