"""VAE as a model of diffusers whose code the folder carries, as tables; to the bit.

diffusers has no class of its own for it: AutoencoderKL normalises in every block and halves the image step by step, VAE cuts it into
patches and has no norms.
"""

from __future__ import annotations

from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.published import Family
from nexus_scale.processes.latents import LatentStats

EXAMPLE = """import torch
from diffusers import AutoModel

autoencoder = AutoModel.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
size = autoencoder.config.image_size
images = torch.zeros(1, autoencoder.config.image_channels, size, size)  # in [-1, 1]
latents = autoencoder.encode(images).latent_dist.mean
again = autoencoder.decode(latents).sample
"""


def _stages(net: Any) -> list[int]:
    """As many channels as pipelines need to find 2^(n - 1), the pixels that a latent spans."""
    if net.patch_size & (net.patch_size - 1):
        raise UserError(
            f"export: diffusers' pipelines halve images; got vae.patch_size {net.patch_size}, no power of 2"
        )
    return [net.hidden_size] * int(net.patch_size).bit_length()


DIFFUSERS = Format(
    "vae",
    "VAE weights",
    lambda net: {name: name for name in net.state_dict()},
    "PatchAutoencoder",
    config={
        "image_channels": Key(3, "image_channels"),
        "image_size": Key(32, "image_size"),
        "latent_channels": Key(8, "latent_channels"),
        "patch_size": Key(4, "patch_size"),
        "hidden_size": Key(192, "hidden_size"),
        "depth": Key(3, "depth"),
        "block_out_channels": Key(None, _stages),
    },
    loose=("block_out_channels",),
    free=("image_size",),
    constants={"auto_map": {"AutoModel": "patch_autoencoder.PatchAutoencoder"}},
    part="vae",
    carried=("patch_autoencoder.py",),
    example=EXAMPLE,
)


def normalised(latents: LatentStats | None) -> dict[str, Any]:
    """Settings by which a pipeline normalises as a run has learnt; the autoencoder does it itself."""
    mean, std = (None, None) if latents is None else (list(latents.mean), list(latents.std))
    return {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": mean, "latents_std": std}


FAMILY = Family(
    {"diffusers": DIFFUSERS},
    normalised=normalised,
    alone={"scaling_factor": None, "shift_factor": None, "latents_mean": None, "latents_std": None},
)
