"""CausalVAE3D weights <-> diffusers' AutoencoderKLCogVideoX, in both directions and to the bit."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import copy_folder, read_config, read_folder, write_folder
from nexus_scale.interop.layout import Layout, to_ours, to_theirs, whole
from nexus_scale.interop.published import Published
from nexus_scale.models.vae.causal_vae3d import CausalVAE3D
from nexus_scale.processes.latents import LatentStats

log = logging.getLogger(__name__)

CLASS_NAME = "AutoencoderKLCogVideoX"
SCALE = 1.15258426
"""`scaling_factor` of a config that leaves it out: CogVideoX-2B's."""
CHUNKS = {"chunk_frames": 8, "latent_chunk": 2, "norm_over": "chunk"}
"""How diffusers' class works, which its norms make part of what it computes."""


def diffusers_layout(net: CausalVAE3D) -> Layout:
    """Where each parameter lies in an AutoencoderKLCogVideoX: one to one."""
    return {name: whole(_their_name(name, len(net.channels)), p.shape) for name, p in net.state_dict().items()}


def to_diffusers(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any], *, scaling_factor: float | None = SCALE
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and state dict that AutoencoderKLCogVideoX takes.

    Args:
        state: state dict of a CausalVAE3D.
        model_args: its constructor's arguments (defaults may be left out).
        scaling_factor: one over the latents' standard deviation, for pipelines; CogVideoX-2B's unless given, None where it is not known.
    Raises:
        UserError: what diffusers' class cannot express; a state dict of another network.
    """
    net = _network(model_args)
    missing, extra = sorted(set(net.state_dict()) - set(state))[:3], sorted(set(state) - set(net.state_dict()))[:3]
    if missing or extra:
        raise UserError(
            f"the CausalVAE3D state dict does not fit its arguments: missing {missing}, not expected {extra}"
        )
    for name, only in CHUNKS.items():
        if getattr(net, name) != only:
            raise UserError(
                f"{CLASS_NAME} has {name} {only!r} fixed; got {getattr(net, name)!r}: it cannot be exported"
            )
    return _config(net, scaling_factor), to_theirs(diffusers_layout(net), state)


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_diffusers`.

    Returns:
        model_args for `CausalVAE3D(**model_args)`, and its state dict.
    Raises:
        UserError: a config or weights that are not CogVideoX's.
    """
    model_args = _model_args(config)
    net = _network(model_args)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    return model_args, to_ours(diffusers_layout(net), state, shapes, f"{CLASS_NAME} weights")


def export_folder(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    *,
    scaling_factor: float | None = SCALE,
) -> Path:
    """Writes `config.json` and the weights, which `AutoencoderKLCogVideoX.from_pretrained(folder)` loads."""
    return write_folder(folder, *to_diffusers(state, model_args, scaling_factor=scaling_factor))


def export_autoencoder(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any], folder: Path, latents: LatentStats | None
) -> Path:
    """`export_folder` of a run, with one over the deviation of its latents as the scaling factor.

    Raises:
        UserError: latents that are scaled channel by channel, or shifted, which diffusers' class does not do.
    """
    return export_folder(state, model_args, folder, scaling_factor=_factor(latents))


def export_trained(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path,
    objective: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> Path:
    """`export_folder` of the autoencoder's own run. How its latents are normalised is not known there: scaling_factor is null, so that
    data made by it have their own statistics."""
    log.info(
        "%s: scaling_factor is null: it is of the latents of some data; the export of a run that was trained on them has it",
        folder,
    )
    return export_folder(state, model_args, folder, scaling_factor=None)


def export_normalised(source: Path, folder: Path, stats: LatentStats | None, stated: LatentStats | None) -> None:
    """A copy of the autoencoder in `source`, with the factor by which a run has learnt its latents. Raises as `export_autoencoder`."""
    config = read_config(source, CLASS_NAME)
    if stats is not None and stats == stated and not any(stats.mean) and len(set(stats.std)) == 1:
        copy_folder(source, folder, config)
        return
    copy_folder(source, folder, config | {"scaling_factor": _factor(stats), "latents_mean": None, "latents_std": None})


def _factor(latents: LatentStats | None) -> float:
    if latents is None:
        return 1.0
    if any(latents.mean) or len(set(latents.std)) > 1:
        raise UserError(
            f"{CLASS_NAME} has one scaling_factor for all channels and no shift; the latents are normalised as {latents}: make them with "
            "`statistics: whole` (precompute_latents)"
        )
    return 1.0 / latents.std[0]


def import_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that diffusers saved: the autoencoder's own, or a pipeline's with `vae/` in it.

    Returns:
        model_args, state dict of our CausalVAE3D.
    Raises:
        UserError: no such folder, not safetensors, or another autoencoder.
    """
    return from_diffusers(*read_folder(folder, CLASS_NAME, "vae"))


def _their_name(name: str, num_stages: int) -> str:
    """Of one of our parameters, diffusers' name: the middle is our encoder's last stage and our decoder's first."""
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


def _network(model_args: Mapping[str, Any]) -> CausalVAE3D:
    with torch.device("meta"):
        return CausalVAE3D(**model_args)


def _config(net: CausalVAE3D, scaling_factor: float | None) -> dict[str, Any]:
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        "in_channels": net.image_channels,
        "out_channels": net.image_channels,
        "down_block_types": ["CogVideoXDownBlock3D"] * len(net.channels),
        "up_block_types": ["CogVideoXUpBlock3D"] * len(net.channels),
        "block_out_channels": list(net.channels),
        "latent_channels": net.latent_channels,
        "layers_per_block": net.depth,
        "norm_num_groups": net.num_groups,
        "temporal_compression_ratio": net.temporal_ratio,
        "sample_height": net.image_size[0],
        "sample_width": net.image_size[1],
        "scaling_factor": scaling_factor,
    }


def _model_args(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:  # a live model's config does not name its class
        raise UserError(f"config.json is of {config['_class_name']!r}; expected {CLASS_NAME}")
    # what diffusers itself assumes for keys that a config leaves out
    full: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 512),
        "latent_channels": 16,
        "layers_per_block": 3,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "temporal_compression_ratio": 4,
        "sample_height": 480,
        "sample_width": 720,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    } | dict(config)
    for name, only in (
        ("out_channels", full["in_channels"]),
        ("act_fn", "silu"),
        ("norm_eps", 1e-6),
        ("use_quant_conv", False),
        ("use_post_quant_conv", False),
    ):
        if full[name] != only:
            raise UserError(f"config.json: {name} is {full[name]!r}; CausalVAE3D has only {only!r} here")
    return {
        "image_channels": full["in_channels"],
        "image_size": (full["sample_height"], full["sample_width"]),
        "latent_channels": full["latent_channels"],
        "channels": tuple(full["block_out_channels"]),
        "depth": full["layers_per_block"],
        "temporal_ratio": int(full["temporal_compression_ratio"]),
        "num_groups": full["norm_num_groups"],
    }


def _sizes_that_count(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that its weights were trained with; frames of any size do."""
    return {name: value for name, value in _model_args(config).items() if name != "image_size"} | CHUNKS


PUBLISHED = Published(CLASS_NAME, _sizes_that_count, diffusers_layout, part="vae")
EXPORTS = {"diffusers": export_trained}
