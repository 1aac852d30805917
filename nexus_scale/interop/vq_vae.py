"""VQVAE as a model of diffusers whose code the folder carries, as tables; to the bit.

diffusers' VQModel has Stable Diffusion's convolutions, with norms and attention; these are the first paper's.
"""

from __future__ import annotations

from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.published import Family

CLASS_NAME = "CodeAutoencoder"
EXAMPLE = """import torch
from diffusers import AutoModel

autoencoder = AutoModel.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
size = autoencoder.config.image_size
images = torch.zeros(1, autoencoder.config.image_channels, size, size)  # in [-1, 1]
codes = autoencoder.encode(images)  # (1, h, w)
again = autoencoder.decode(codes)
"""
SIZES = {
    name: Key(default, name)
    for name, default in (
        ("image_channels", 3), ("image_size", 128), ("hidden_size", 256), ("residual_size", 256), ("depth", 2), ("stages", 2),
    )
}  # fmt: skip
CARRIED = "code_autoencoder.py"
AUTO_MAP = {"AutoModel": f"code_autoencoder.{CLASS_NAME}"}
DIFFUSERS = Format(
    "vq_vae",
    "VQVAE weights",
    lambda net: {name: name for name in net.state_dict()},
    CLASS_NAME,
    config={
        **SIZES,
        "latent_channels": Key(64, "latent_channels"),
        "codebook_size": Key(512, "codebook_size"),
    },
    constants={"auto_map": AUTO_MAP, "levels": None},
    free=("image_size", "codebook_decay", "dead_below", "kmeans_iterations"),
    carried=(CARRIED,),
    example=EXAMPLE,
)
FAMILY = Family({"diffusers": DIFFUSERS})
