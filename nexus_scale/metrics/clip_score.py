"""Metrics of CLIP's embeddings: whether images follow their prompts, and whether people would like them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics.moments import checked

PUBLISHED_HEADS = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth)"
)


def clip_scores(images: Tensor, texts: Tensor, scale: float = 100.0) -> Tensor:
    """scale * max(cos, 0) of each image (N, D) with its own text (N, D), (N,) float64; the score of a set is their mean.

    Source: Hessel et al. 2021, "CLIPScore", with a scale of 2.5; torchmetrics and most papers since report 100. Name the CLIP beside it.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    if images.shape != texts.shape:
        raise ValueError(f"got images {tuple(images.shape)} and texts {tuple(texts.shape)}; expected the same")
    images, texts = checked(images).double(), checked(texts).double()
    return scale * F.cosine_similarity(images, texts.to(images), dim=1, eps=1e-12).clamp_min(0)


class AestheticHead:
    """LAION's aesthetic predictor: linear layers, without activations between, on CLIP ViT-L/14 embeddings of unit length.

    Source: Schuhmann 2022, "improved-aesthetic-predictor"; the older one of "aesthetic-predictor" is a single layer.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers

    @classmethod
    def open(cls, file: Path) -> AestheticHead:
        """The head in a file of its weights, `torch.save(state_dict)`, read as weights alone.

        Raises:
            UserError: not there, or other weights; says where they are published.
        """
        if not file.is_file():
            raise UserError(
                f"{file}: not there; expected the weights of LAION's aesthetic predictor, published at {PUBLISHED_HEADS}",
                3,
            )
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            names = sorted(
                (n for n in state if n.endswith("weight")), key=lambda n: [int(d) for d in re.findall(r"\d+", n)]
            )
            layers = [(state[n].double(), state[n.removesuffix("weight") + "bias"].double()) for n in names]
            widths = [layer.shape[1] for layer, _ in layers] + [1]
            if not layers or any(layer.shape[0] != out for (layer, _), out in zip(layers, widths[1:], strict=True)):
                raise ValueError(f"layers of {[tuple(layer.shape) for layer, _ in layers]}")
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError, IndexError, TypeError, EOFError) as error:
            raise UserError(
                f"{file}: not the weights of an aesthetic predictor ({error}); see {PUBLISHED_HEADS}", 3
            ) from None
        return cls(layers)

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) -> scores (N,) float64, some 1 to 10.

        Raises:
            ValueError: another width, or values that are not finite.
        """
        x = F.normalize(checked(images, self.layers[0][0].shape[1]).double(), dim=1)
        for weight, bias in self.layers:
            x = F.linear(x, weight.to(x), bias.to(x))
        return x[:, 0]
