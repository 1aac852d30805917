"""MLPVAE as the weights of pythae's VAE with its default networks, as tables; to the bit. The sigmoid of its decoder is the likelihood's
here."""

from __future__ import annotations

import math
from typing import Any

from nexus_scale.interop.formats import Apart, Format, Shapes, Table
from nexus_scale.interop.published import Family

EXAMPLE = """from pythae.models import VAE, VAEConfig
from safetensors.torch import load_file

weights = load_file(folder / "pythae_vae.safetensors")
latents = len(weights["encoder.embedding.bias"])
# input_dim: (C, H, W) of the images, in [0, 1]; grey ones of 28 x 28 here
autoencoder = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=latents, reconstruction_loss="bce"))
autoencoder.load_state_dict(weights)
"""
HIDDEN = (512,)
"""The layers of pythae's default encoder and decoder."""


def _table(net: Any) -> Table:
    return {
        "encoder.0.linear": "encoder.layers.0.0",
        "to_moments": Apart(("encoder.embedding", "encoder.log_var")),
        "decoder.0.linear": "decoder.layers.0.0",
        "to_values": "decoder.layers.1.0",
    }


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """From shapes alone an image is square, and grey if that makes it square."""
    values, (latents, hidden) = shapes.of("encoder.layers.0.0.weight")[1], shapes.of("encoder.embedding.weight")
    channels = next((c for c in (1, 3) if math.isqrt(values // c) ** 2 * c == values), 1)
    size = {"image_channels": channels, "image_size": math.isqrt(values // channels)}
    return {**size, "latent_size": latents, "hidden_sizes": (hidden,)}


PYTHAE = Format(
    "mlp_vae",
    "pythae VAE weights",
    _table,
    from_shapes=_args_of,
    fixed={"hidden_sizes": HIDDEN, "numbers": 1},
    file="pythae_vae.safetensors",
    example=EXAMPLE,
)
FAMILY = Family({"pythae": PYTHAE})
