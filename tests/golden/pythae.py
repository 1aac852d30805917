"""What pythae 0.1.2 computes: `PYTHONPATH=FOLDER python -m tests.golden.pythae`, where FOLDER holds pythae and vector_quantize_pytorch
(`pip install --no-deps --target FOLDER pythae==0.1.2 vector-quantize-pytorch==1.32.0 einops`).

Writes pythae.npz beside this file: losses of VAE, beta-VAE and its capacity, with gradients as their products with given vectors; a step of
VQ-VAE's codebook that follows by moving averages; and finite scalar quantisation by lucidrains' code. Weights, pixels and noise are drawn
from numpy's PCG64 by the name of what they are.
"""

from __future__ import annotations

import importlib
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".npz")
BATCH = 3
SHAPES = {"grey": ((1, 5, 5), 3), "coloured": ((3, 4, 4), 7)}
"""Shape of an image, and how many latents."""
MODELS: dict[str, dict[str, Any]] = {
    "VAE": {}, "BetaVAE": {"beta": 4.0}, "DisentangledBetaVAE": {"beta": 10.0, "C": 5.0, "warmup_epoch": 3},
}  # fmt: skip
EPOCH = 2
"""Of the capacity's growth: two quarters of C."""
CASES = [(model, loss, shape) for model in MODELS for loss in ("bce", "mse") for shape in SHAPES]
BOOK, ENTRIES, PLACES = (7, 4), 7, (2, 4, 3, 5)
DECAY, COMMITMENT = 0.9, 0.25
LEVELS = ((8, 5, 5, 5), (7, 3), (4, 6, 5))
PROJECTIONS = 3


def drawn(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Standard normal numbers by name, float32."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(scale * generator.standard_normal(tuple(shape))).float()


def pixels(name: str, shape: Sequence[int]) -> Tensor:
    """Images in [0, 1]."""
    return drawn(f"{name} pixels", (BATCH, *shape)).sigmoid()


def projected(gradients: dict[str, Tensor]) -> np.ndarray:
    """Products of each gradient with given vectors, in the order of names, (names, PROJECTIONS) float64."""
    return np.stack([
        (drawn(f"{name} onto", (PROJECTIONS, value.numel())).double() @ value.flatten().double()).numpy()
        for name, value in sorted(gradients.items())
    ])  # fmt: skip


def main() -> None:
    found = {name: value for case in CASES for name, value in of_model(*case).items()}
    np.savez_compressed(FILE, **found, **of_codebook(), **of_levels())


def of_model(model: str, loss: str, shape: str) -> dict[str, np.ndarray]:
    from pythae import models
    from pythae.models.base.base_utils import ModelOutput

    image, latents = SHAPES[shape]
    config = getattr(models, f"{model}Config")(
        input_dim=image, latent_dim=latents, reconstruction_loss=loss, **MODELS[model]
    )
    net = getattr(models, model)(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, 0.1))
    with mock.patch("torch.randn_like", lambda like: drawn(f"{shape} noise", like.shape)):
        out = net(ModelOutput(data=pixels(shape, image)), epoch=EPOCH)
    out.loss.backward()
    key = f"{model}_{loss}_{shape}"
    values = torch.stack([out.loss, out.recon_loss, out.reg_loss]).detach().numpy()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {f"{key}_losses": values, f"{key}_gradients": projected(gradients)}


def of_codebook() -> dict[str, np.ndarray]:
    from pythae.models.vq_vae.vq_vae_config import VQVAEConfig
    from pythae.models.vq_vae.vq_vae_utils import QuantizerEMA

    config = VQVAEConfig(num_embeddings=ENTRIES, decay=DECAY, commitment_loss_factor=COMMITMENT)
    config.embedding_dim = BOOK[1]
    quantizer = QuantizerEMA(config)
    book, size = drawn("book", BOOK), drawn("sizes", (ENTRIES,)).abs() + 1
    quantizer.embeddings.copy_(book)
    quantizer.cluster_size.copy_(size)
    quantizer.ema_embed.copy_(book * size[:, None])
    z = drawn("places", PLACES).requires_grad_()
    out = quantizer(z.permute(0, 2, 3, 1))
    (out.quantized_vector * drawn("onto places", PLACES)).sum().add(out.loss).backward()
    values = {"latents": out.quantized_vector, "codes": out.quantized_indices[:, 0], "loss": out.loss}
    values |= {"gradient": z.grad, "after": quantizer.embeddings}
    return {f"vq_{name}": value.detach().numpy() for name, value in values.items()}


def of_levels() -> dict[str, np.ndarray]:
    place = next(
        Path(folder) / "vector_quantize_pytorch"
        for folder in sys.path
        if Path(folder, "vector_quantize_pytorch").is_dir()
    )
    package = types.ModuleType("vector_quantize_pytorch")
    package.__path__ = [str(place)]
    # the file alone: the package imports what FSQ does not need, as the file does with einx
    sys.modules.update({"vector_quantize_pytorch": package, "einx": types.ModuleType("einx")})
    module = importlib.import_module("vector_quantize_pytorch.finite_scalar_quantization")
    found = {}
    for levels in LEVELS:
        z = drawn(f"fsq {levels}", (2, len(levels), 3, 5), 2.0).requires_grad_()
        out, codes = module.FSQ(list(levels))(z)
        (out * drawn(f"fsq {levels} onto", out.shape)).sum().backward()
        key = "fsq_" + "_".join(map(str, levels))
        found |= {
            f"{key}_latents": out.detach().numpy(),
            f"{key}_codes": codes.numpy(),
            f"{key}_gradient": z.grad.numpy(),
        }
    return found


if __name__ == "__main__":
    main()
