"""ConvVAE as a model of diffusers whose code the folder carries, as tables; to the bit. No published class has a vector of latents."""

from __future__ import annotations

from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.published import Family

EXAMPLE = """import torch
from diffusers import AutoModel

autoencoder = AutoModel.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
size = autoencoder.config.image_size
images = torch.zeros(1, autoencoder.config.image_channels, size, size)  # in [-1, 1]
latents = autoencoder.encode(images).latent_dist.mean  # (1, latent_size)
again = autoencoder.decode(latents).sample
"""
DIFFUSERS = Format(
    "conv_vae",
    "ConvVAE weights",
    lambda net: {name: name for name in net.state_dict()},
    "ConvAutoencoder",
    config={
        "image_channels": Key(1, "image_channels"),
        "image_size": Key(64, "image_size"),
        "latent_size": Key(10, "latent_size"),
        "channels": Key((32, 32, 32, 32), "channels"),
        "hidden_sizes": Key((256, 256), "hidden_sizes"),
        "numbers": Key(1, "numbers"),
    },
    constants={"auto_map": {"AutoModel": "conv_vae.ConvAutoencoder"}},
    carried=("conv_vae.py",),
    example=EXAMPLE,
)
FAMILY = Family({"diffusers": DIFFUSERS})
