"""What image-to-image translation minimises: the answers of critics that judge patches, and distances of images.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3; Zhu et al. 2017, "Unpaired
Image-to-Image Translation using Cycle-Consistent Adversarial Networks", section 4.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nexus_scale.objectives.critic_losses import critic_loss, generator_loss

PatchLosses = Literal["logistic", "least_squares"]
SOURCE, IMAGE = "source", "image"
"""The batch fields: what is translated, and what becomes of it."""


def judged(losses: PatchLosses, real: Tensor, fake: Tensor) -> Tensor:
    """A critic's loss from its logits of patches; half of the sum of both, as the papers slow it down."""
    return _scale(losses) * 0.5 * critic_loss(losses, real.float(), fake.float()).mean()


def fooled(losses: PatchLosses, fake: Tensor) -> Tensor:
    """The generator's loss from the critic's logits of patches."""
    return _scale(losses) * generator_loss(losses, fake.float()).mean()


def _scale(losses: PatchLosses) -> float:
    return 2.0 if losses == "least_squares" else 1.0  # `critic_losses` halves squares, these papers do not


def distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean absolute difference of each sample's values, (B,)."""
    return (x.float() - y.float()).abs().flatten(1).mean(1)
