"""What a critic sees instead of images, so that few of them last: data and samples are changed at random, alike, and gradients pass.

Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training"; Karras et al. 2020, "Training Generative
Adversarial Networks with Limited Data" (ADA), sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import Rng, UserError
from nexus_scale.kernels.transfer import to_device
from nexus_scale.processes.image_transforms import NORMALS, UNIFORMS, ImageTransforms
from nexus_scale.processes.paths import find_named


class Augmentation:
    """Random changes of images, keyed as all draws are; a subclass has what its constructor takes."""

    adapts: bool = False
    """Whether the critic's answers change it; `after` is called, with what `first` gave."""

    def first(self) -> dict[str, Tensor]:
        """What is remembered from step to step, before the first; an objective keeps it (`contracts.Objective.kept`)."""
        return {}

    def changed(self, x: Tensor, rng: Rng, name: str, kept: Mapping[str, Tensor], step: int) -> Tensor:
        """Images (B, C, H, W), changed. Draws: `name` with what it is of behind it."""
        raise NotImplementedError

    def after(self, kept: Mapping[str, Tensor], signs: Tensor, step: int) -> dict[str, Tensor]:
        """What is remembered after a step.

        Args:
            signs: of the critic's answers to data of the global batch: their sum, and how many, (2,) float64.
        """
        return {}

    def metrics(self, kept: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        return {}


def half_cosine(step: int, steps: int) -> float:
    """From 0 to 1 over so many steps."""
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, step / steps))


# ------------------------------------------------------------------------------------------------- DiffAugment


class DiffAugment(Augmentation):
    """Colour, translation and cutout of every image."""

    def __init__(
        self, *, policy: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation", "cutout")
    ):
        """
        Args:
            policy: the changes, in this order. The paper has all three, and color and cutout for CIFAR-10's BigGAN.
        """
        self.policy = tuple(policy)

    def changed(self, x: Tensor, rng: Rng, name: str, kept: Mapping[str, Tensor], step: int) -> Tensor:
        u = rng.uniform(f"{name}.changes", (7,)).unbind(1)
        for kind in self.policy:
            if kind == "color":
                x = recoloured(x, *u[:3])
            elif kind == "translation":
                x = translated(x, *u[3:5])
            else:
                x = cut_out(x, *u[5:])
        return x


def recoloured(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """x (B, C, H, W), lighter or darker by up to 1/2, with colours between 0 and 2 and a contrast between 1/2 and 3/2 of what they were;
    each from a uniform number in [0, 1), (B,)."""
    brightness, saturation, contrast = (u[:, None, None, None] for u in (brightness, saturation, contrast))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    grey = x.mean((1, 2, 3), keepdim=True)
    return (x - grey) * (contrast + 0.5) + grey


def translated(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """x (B, C, H, W), moved by up to an eighth of its height and width, with zeros where it was."""
    for dim, u in ((2, down), (3, right)):
        length = x.shape[dim]
        most = int(length / 8 + 0.5)
        places = torch.arange(length, device=x.device) + ((2 * most + 1) * u[:, None]).long() - most
        places = (places + 1).clamp(0, length + 1)  # in x with a zero at each end
        shape = [len(x), 1, 1, 1]
        shape[dim] = length
        around = (0, 0, 1, 1) if dim == 2 else (1, 1, 0, 0)
        x = F.pad(x, around).gather(dim, places.view(shape).expand(x.shape))
    return x


def cut_out(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x (B, C, H, W) with zeros in a rectangle of half its height and width, whose middle lies anywhere in it."""
    inside = []
    for length, u in ((x.shape[2], row), (x.shape[3], column)):
        size = int(length / 2 + 0.5)
        first = ((length + 1 - size % 2) * u).long()[:, None] - size // 2
        place = torch.arange(length, device=x.device)
        inside.append((place >= first) & (place < first + size))
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


# ------------------------------------------------------------------------------------------------- ADA

GROUPS = {
    "b": ("xflip", "rotate90", "xint"),
    "g": ("scale", "rotate", "aniso", "xfrac"),
    "c": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "f": ("imgfilter",),
    "n": ("noise",),
    "x": ("cutout",),
}
PROBABILITY, SIGNS = "augment_probability", "augment_signs"


class ADA(Augmentation):
    """Each change of `ImageTransforms` with a probability that all share: one that keeps the critic from overfitting, or as a function of
    the step."""

    def __init__(
        self,
        *,
        changes: str = "bgc",
        shares: Mapping[str, float] | None = None,
        probability: float = 0.0,
        target: float | None = 0.6,
        every: int = 4,
        images: int = 500_000,
        final_probability: float | None = None,
        final_step: int = 1,
    ):
        """
        Args:
            changes: groups of changes: b pixels moved (flips, turns by 90 degrees, whole pixels), g geometry, c colour, f frequency bands,
                n noise, x cutout.
            shares: of single changes by name, as parts of the probability; those of `changes` have 1 otherwise.
            probability: the first, or with neither `target` nor `final_probability` the only one.
            target: of the mean sign of the critic's answers to data: above it the probability rises, below it falls; null: it is given.
            every: steps between two changes of the probability.
            images: so many images move it by 1.
            final_probability: from `final_step` on; until then it rises as half a cosine (R3GAN). Instead of a target.
        """
        names = [name for group in changes for name in GROUPS.get(group, ())]
        known = [field.name for field in fields(ImageTransforms)]
        if unknown := sorted(set(changes) - set(GROUPS)) or sorted(set(shares or {}) - set(known)):
            raise UserError(
                f"augment: got {', '.join(unknown)}; expected changes of {', '.join(GROUPS)}, shares of {', '.join(known)}"
            )
        if target is not None and final_probability is not None:
            raise UserError(
                f"augment: got target {target} and final_probability {final_probability}; expected one of them, the other null"
            )
        if min(every, images, final_step) < 1 or max(probability, final_probability or 0.0, target or 0.0) > 1:
            raise UserError(
                f"augment: got every {every}, images {images}, final_step {final_step}, probability {probability}, target {target}, "
                f"final_probability {final_probability}; expected at least 1 of the first three, at most 1 of the others"
            )
        self.transforms = ImageTransforms(**{**dict.fromkeys(names, 1.0), **(shares or {})})
        self.begin, self.target, self.every, self.images = probability, target, every, images
        self.adapts = target is not None
        self.final_probability, self.final_step = final_probability, final_step

    def first(self) -> dict[str, Tensor]:
        if not self.adapts:
            return {}
        return {PROBABILITY: torch.tensor(self.begin, dtype=torch.float64), SIGNS: torch.zeros(2, dtype=torch.float64)}

    def changed(self, x: Tensor, rng: Rng, name: str, kept: Mapping[str, Tensor], step: int) -> Tensor:
        noise = rng.normal(f"{name}.noise", x.shape[1:]) if self.transforms.noise else torch.zeros_like(x[:1])
        uniform, normal = rng.uniform(f"{name}.changes", (UNIFORMS,)), rng.normal(f"{name}.sizes", (NORMALS,))
        return self.transforms(x, uniform, normal, noise, self._probability(kept, step, x.device))

    def _probability(self, kept: Mapping[str, Tensor], step: int, device: torch.device) -> Tensor | float:
        if self.target is not None:
            return to_device(kept[PROBABILITY], device).float()
        if self.final_probability is None:
            return self.begin
        return self.begin + half_cosine(step, self.final_step) * (self.final_probability - self.begin)

    def after(self, kept: Mapping[str, Tensor], signs: Tensor, step: int) -> dict[str, Tensor]:
        assert self.target is not None, "nothing follows the answers"
        probability, before = (to_device(kept[name], signs.device) for name in (PROBABILITY, SIGNS))
        total = before + torch.where(signs.isfinite().all(), signs, 0.0)
        if (step + 1) % self.every:
            return {PROBABILITY: probability, SIGNS: total}
        way = (total[0] / total[1].clamp(min=1) - self.target).sign()
        moved = (probability + way * total[1] / self.images).clamp(0, 1)
        return {PROBABILITY: moved, SIGNS: torch.zeros_like(total)}

    def metrics(self, kept: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        found = self._probability(kept, step, torch.device("cpu")) if self.target is None else kept[PROBABILITY]
        return {PROBABILITY: torch.as_tensor(found)}


AUGMENTATIONS: dict[str, type[Any]] = {"diffaugment": DiffAugment, "ada": ADA}


def find_augmentation(spec: str | Mapping[str, Any]) -> Augmentation:
    """An augmentation by its name in `AUGMENTATIONS`, or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    found: Augmentation = find_named(AUGMENTATIONS, spec, "augment")
    return found
