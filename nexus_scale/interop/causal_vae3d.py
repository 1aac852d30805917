"""CausalVAE3D in diffusers (AutoencoderKLCogVideoX), as tables; to the bit."""

from __future__ import annotations

import re
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Format, Key, Table
from nexus_scale.interop.published import Family
from nexus_scale.processes.latents import LatentStats

CHUNKS = {"chunk_frames": 8, "latent_chunk": 2, "norm_over": "chunk"}
"""How diffusers' class works, which its norms make part of what it computes."""


EXAMPLE = """import torch
from diffusers import AutoencoderKLCogVideoX

autoencoder = AutoencoderKLCogVideoX.from_pretrained(folder, local_files_only=True)
height, width = autoencoder.config.sample_height, autoencoder.config.sample_width
frames = 1 + 2 * autoencoder.config.temporal_compression_ratio
clips = torch.zeros(1, 3, frames, height, width)  # (B, 3, F, H, W) in [-1, 1]
latents = autoencoder.encode(clips).latent_dist.mean
again = autoencoder.decode(latents).sample
"""


def _table(net: Any) -> Table:
    """One to one; the middle is our encoder's last stage and our decoder's first."""
    return {name: _their_name(name, len(net.channels)) for name in net.state_dict()}


def _their_name(name: str, num_stages: int) -> str:
    coder, rest = name.split(".", 1)
    rest = re.sub(r"\b(conv_in|conv_out|conv1|conv2)\.", r"\1.conv.", rest)
    rest = rest.replace("shortcut.", "conv_shortcut.")
    if coder == "decoder":
        rest = re.sub(r"\b(norm\w+)\.(weight|bias)", r"\1.norm_layer.\2", rest)
        rest = rest.replace(".scale.", ".conv_y.conv.").replace(".shift.", ".conv_b.conv.")
    match = re.match(r"stages\.(\d+)\.", rest)
    if match is not None:
        number, resample = (int(match[1]), "downsamplers") if coder == "encoder" else (int(match[1]) - 1, "upsamplers")
        middle = number == (num_stages if coder == "encoder" else -1)
        stage = "mid_block." if middle else f"{'down' if coder == 'encoder' else 'up'}_blocks.{number}."
        rest = stage + rest[match.end() :].replace("resample.", f"{resample}.0.").replace("blocks.", "resnets.", 1)
    return f"{coder}.{rest}"


DIFFUSERS = Format(
    "causal_vae3d",
    "AutoencoderKLCogVideoX weights",
    _table,
    "AutoencoderKLCogVideoX",
    config={
        "in_channels": Key(3, "image_channels"),
        "out_channels": Key(3, lambda net: net.image_channels),
        "block_out_channels": Key((128, 256, 256, 512), "channels"),
        "latent_channels": Key(16, "latent_channels"),
        "layers_per_block": Key(3, "depth"),
        "norm_num_groups": Key(32, "num_groups"),
        "temporal_compression_ratio": Key(4, lambda net: net.temporal_ratio),
        "sample_height": Key(480, lambda net: net.image_size[0]),
        "sample_width": Key(720, lambda net: net.image_size[1]),
        "down_block_types": Key(None, lambda net: ["CogVideoXDownBlock3D"] * len(net.channels)),
        "up_block_types": Key(None, lambda net: ["CogVideoXUpBlock3D"] * len(net.channels)),
    },
    constants={"act_fn": "silu", "norm_eps": 1e-6, "use_quant_conv": False, "use_post_quant_conv": False},
    arguments={
        "image_size": lambda config: (config["sample_height"], config["sample_width"]),
        "temporal_ratio": lambda config: int(config["temporal_compression_ratio"]),
    },
    loose=("down_block_types", "up_block_types"),
    fixed=CHUNKS,
    free=("image_size",),
    part="vae",
    example=EXAMPLE,
)


def normalised(latents: LatentStats | None) -> dict[str, Any]:
    """Settings by which a pipeline normalises as a run has learnt.

    Raises:
        UserError: latents that are scaled channel by channel, or shifted, which diffusers' class does not do.
    """
    if latents is None:
        return {"scaling_factor": 1.0}
    if any(latents.mean) or len(set(latents.std)) > 1:
        raise UserError(
            f"{DIFFUSERS.class_name} has one scaling_factor for all channels and no shift; the latents are normalised as {latents}: make "
            "them with `statistics: whole` (precompute_latents)"
        )
    return {"scaling_factor": 1.0 / latents.std[0]}


FAMILY = Family(
    {"diffusers": DIFFUSERS},
    scale=1.15258426,  # CogVideoX-2B's
    normalised=normalised,
    alone={"scaling_factor": None},
)
