"""What R3GAN's own code computes: `python -m tests.golden.r3gan FOLDER`, where FOLDER holds `R3GAN`, `training`, `torch_utils` and `dnnlib`
of github.com/brownvc/R3GAN. It needs pkg_resources, of an older setuptools.

Writes r3gan.npz beside this file: images of a generator, a critic's answers to them, both losses with R1 and R2, and the gradients of all
parameters; and parameter counts at the published sizes. Weights are functions of their names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".npz")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"noise": 5, "widths": (6, 4, 4), "depths": (1, 2, 1), "groups": (3, 2, 4), "classes": 0},
    "classes": {"noise": 3, "widths": (4, 6), "depths": (2, 1), "groups": (2, 3), "classes": 4},
}
SIZES = {  # train.py's presets: channels and groups of stages whose depth is 2, classes
    "cifar10": ((768,) * 4, (96,) * 4, 0),
    "ffhq256": ((768, 768, 768, 768, 384, 192, 96), (96, 96, 96, 96, 48, 24, 12), 0),
    "imagenet64": ((1536,) * 5, (96,) * 5, 1000),
}
BATCH, GAMMA = 3, 0.7


def drawn(name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Normal numbers that their name decides, float32, small where there are many."""
    numbers = np.random.Generator(np.random.PCG64(crc32(name.encode()))).standard_normal(tuple(shape))
    return torch.from_numpy(numbers / max(1.0, np.prod(shape[1:])) ** 0.5).float()


def labels(classes: int) -> Tensor | None:
    return torch.arange(BATCH) % classes if classes else None


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    from R3GAN.Networks import Discriminator, Generator  # type: ignore[import-not-found]
    from R3GAN.Trainer import AdversarialTraining  # type: ignore[import-not-found]

    found: dict[str, Tensor] = {}
    for name, case in CASES.items():
        classes, widths = case["classes"], list(case["widths"])
        common: dict[str, Any] = {
            "CardinalityPerStage": list(case["groups"]),
            "BlocksPerStage": list(case["depths"]),
            "ExpansionFactor": 2,
        }
        # Theirs takes the stages of the critic from the images down.
        turned = {key: value[::-1] if isinstance(value, list) else value for key, value in common.items()}
        of_classes = {"ConditionDimension": classes} if classes else {}
        generator = Generator(
            case["noise"], widths, **common, **of_classes, ConditionEmbeddingDimension=case["noise"] if classes else 0
        )
        critic = Discriminator(
            widths[::-1], **turned, **of_classes, ConditionEmbeddingDimension=widths[0] if classes else 0
        )
        for prefix, network in (("g", generator), ("d", critic)):
            for key, value in network.named_parameters():
                value.data = drawn(f"{prefix}.{key}", value.shape)
        size = 4 * 2 ** (len(widths) - 1)
        z, real = drawn("z", (BATCH, case["noise"])), drawn("x", (BATCH, 3, size, size)) * size
        label = labels(classes)
        y = None if label is None else torch.nn.functional.one_hot(label, classes).float()
        found[f"{name}/image"] = generator(z, y)
        found[f"{name}/answer"] = critic(real, y)
        training = AdversarialTraining(generator, critic)
        loss, _ = training.AccumulateGeneratorGradients(z, real, y)
        found[f"{name}/g/loss"] = loss
        found |= {f"{name}/g/{key}": value.grad.clone() for key, value in generator.named_parameters()}
        critic.zero_grad()
        loss, _, r1, r2 = training.AccumulateDiscriminatorGradients(z, real, y, GAMMA)
        found |= {f"{name}/d/loss": loss, f"{name}/d/r1": r1, f"{name}/d/r2": r2}
        found |= {f"{name}/d/{key}": value.grad.clone() for key, value in critic.named_parameters()}
    for name, (widths_of, groups_of, classes) in SIZES.items():
        with torch.device("meta"):
            groups, depths = list(groups_of), [2] * len(widths_of)
            of_classes = {"ConditionDimension": classes} if classes else {}
            embedded = {"ConditionEmbeddingDimension": 64} if classes else {}
            g = Generator(64, list(widths_of), groups, depths, 2, **of_classes, **embedded)
            embedded = {"ConditionEmbeddingDimension": widths_of[0]} if classes else {}
            d = Discriminator(list(widths_of[::-1]), groups[::-1], depths, 2, **of_classes, **embedded)
        found[f"{name}/parameters"] = torch.tensor([sum(p.numel() for p in network.parameters()) for network in (g, d)])
    np.savez_compressed(FILE, **{name: value.detach().numpy() for name, value in found.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
