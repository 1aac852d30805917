"""CogVideoX weights <-> diffusers' CogVideoXTransformer3DModel, in both directions and to the bit.

We fuse q, k and v (rows in that order), which diffusers keeps apart, and flatten the patches' convolution to a matrix.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.interop.folders import read_folder, write_folder
from nexus_scale.interop.layout import Layout, apart, to_ours, to_theirs, whole
from nexus_scale.interop.pipelines import Pipeline, TextSlot, null_prompt
from nexus_scale.interop.published import Published
from nexus_scale.models.diffusion.cogvideox import CogVideoX
from nexus_scale.processes.gaussian import ScaledLinear, find_path

log = logging.getLogger(__name__)

CLASS_NAME = "CogVideoXTransformer3DModel"
SCHEDULERS = {"ancestral": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
"""Our samplers, and the schedulers that take their steps."""
TEMPORAL_RATIO = 4
"""Frames that a latent frame stands for; diffusers' `sample_frames` counts the former."""

# our module -> diffusers', outside the blocks and inside one; their .weight and .bias go along
_OUTSIDE = {
    "patch_embed": "patch_embed.proj",
    "text_embed": "patch_embed.text_proj",
    "time_embed.fc1": "time_embedding.linear_1",
    "time_embed.fc2": "time_embedding.linear_2",
    "final.norm": "norm_final",
    "final": "norm_out.norm",
    "final.mod": "norm_out.linear",
    "final.linear": "proj_out",
}
_INSIDE = {
    "norm1": "norm1.norm",
    "norm1.linear": "norm1.linear",
    "norm2": "norm2.norm",
    "norm2.linear": "norm2.linear",
    "heads.q": "attn1.norm_q",
    "heads.k": "attn1.norm_k",
    "proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def diffusers_layout(net: CogVideoX) -> Layout:
    """Where each parameter lies in a CogVideoXTransformer3DModel."""
    layout: dict[str, Any] = {}
    for name, p in net.state_dict().items():
        prefix, inner, kind = _place(name)
        if inner == "qkv":
            layout[name] = apart([f"{prefix}{part}.{kind}" for part in _QKV], [net.hidden_size] * 3, p.shape[1:])
            continue
        kernel = (net.hidden_size, net.latent_channels, net.patch_size, net.patch_size)
        key = f"{prefix}{(_INSIDE if prefix else _OUTSIDE)[inner]}.{kind}"
        layout[name] = whole(key, kernel if name == "patch_embed.weight" else p.shape)
    return layout


def to_diffusers(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and state dict that CogVideoXTransformer3DModel takes.

    Args:
        state: state dict of a CogVideoX.
        model_args: its constructor's arguments (defaults may be left out).
    Returns:
        config (JSON values), state dict. Tensors share memory with `state`.
    Raises:
        UserError: what diffusers' class cannot express; a state dict of another network.
    """
    net = _network(model_args)
    missing, extra = sorted(set(net.state_dict()) - set(state))[:3], sorted(set(state) - set(net.state_dict()))[:3]
    if missing or extra:
        raise UserError(f"the CogVideoX state dict does not fit its arguments: missing {missing}, not expected {extra}")
    if net.mlp_ratio != 4.0:
        raise UserError(f"{CLASS_NAME} has mlp_ratio 4 fixed; got {net.mlp_ratio}: this network cannot be exported")
    return _config(net), to_theirs(diffusers_layout(net), state)


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_diffusers`.

    Returns:
        model_args for `CogVideoX(**model_args)`, and its state dict.
    Raises:
        UserError: a config or weights that are not those of a text-to-video CogVideoX 1.0.
    """
    model_args = _model_args(config)
    net = _network(model_args)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    return model_args, to_ours(diffusers_layout(net), state, shapes, "CogVideoX weights")


def scheduler_config(objective: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler with which diffusers' CogVideoXPipeline takes our sampler's steps, from a recipe's `objective:` and
    `sample:` (ancestral without variance is DDIM).

    Raises:
        UserError: a path, target or sampler that neither of CogVideoX's schedulers has.
    """
    path = find_path(objective.get("path", "rectified_flow"))
    name, spacing = sample.get("name"), sample.get("spacing", "trailing" if sample.get("name") == "dpm" else "linspace")
    if not isinstance(path, ScaledLinear) or objective.get("target") != "v":
        raise UserError(
            f"export: CogVideoX's schedulers walk path scaled_linear with target v; got {path}, {objective.get('target')!r}"
        )
    if name not in SCHEDULERS or (name == "ancestral" and sample.get("variance", "learned") != "none"):
        raise UserError(f"export: sampler {dict(sample)}; expected dpm, or ancestral with variance none (DDIM)")
    return {
        "_class_name": SCHEDULERS[name],
        "num_train_timesteps": path.steps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "snr_shift_scale": path.snr_shift,
        "timestep_spacing": spacing,
    }


def export_folder(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    *,
    scheduler: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `config.json` and the weights, which `CogVideoXTransformer3DModel.from_pretrained(folder)` loads.

    Args:
        scheduler: from `scheduler_config`; goes to `scheduler/scheduler_config.json`.
    Returns:
        The folder.
    """
    config, theirs = to_diffusers(state, model_args)
    return write_folder(folder, config, theirs, scheduler)


def export_trained(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path,
    objective: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> Path:
    """`export_folder` of a run, with the scheduler that takes its sampler's steps; without one, which is said, where diffusers has none.

    Args:
        objective, sample: the recipe's sections.
    """
    try:
        scheduler = scheduler_config(objective, sample)
    except UserError as error:
        log.warning("%s: written without a scheduler: %s", folder, error)
        scheduler = None
    return export_folder(state, model_args, folder, scheduler=scheduler)


def import_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that diffusers saved: the transformer's own, or a pipeline's with `transformer/` in it.

    Returns:
        model_args, state dict of our CogVideoX.
    Raises:
        UserError: no such folder, not safetensors, or not a CogVideoX transformer.
    """
    return from_diffusers(*read_folder(folder, CLASS_NAME))


def _place(name: str) -> tuple[str, str, str]:
    """Of our parameter: diffusers' block prefix ('' outside blocks), our module in it, and weight or bias."""
    match = re.fullmatch(r"(?:joint_blocks\.(\d+)\.)?(.+?)[._](weight|bias)", name)
    assert match is not None, name
    return (f"transformer_blocks.{match[1]}." if match[1] else ""), match[2], match[3]


def _network(model_args: Mapping[str, Any]) -> CogVideoX:
    with torch.device("meta"):
        return CogVideoX(**model_args)


def _config(net: CogVideoX) -> dict[str, Any]:
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        "num_attention_heads": net.num_heads,
        "attention_head_dim": net.hidden_size // net.num_heads,
        "in_channels": net.latent_channels,
        "out_channels": net.latent_channels,
        "time_embed_dim": net.time_dim,
        "text_embed_dim": net.text_dim,
        "num_layers": net.depth,
        "sample_width": net.latent_width,
        "sample_height": net.latent_height,
        "sample_frames": (net.latent_frames - 1) * TEMPORAL_RATIO + 1,
        "patch_size": net.patch_size,
        "temporal_compression_ratio": TEMPORAL_RATIO,
        "max_text_seq_length": net.text_tokens,
        "spatial_interpolation_scale": net.spatial_scale,
        "temporal_interpolation_scale": net.temporal_scale,
        "use_rotary_positional_embeddings": net.positions == "rotary",
    }


def _model_args(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:  # a live model's config does not name its class
        raise UserError(f"config.json is of {config['_class_name']!r}; expected {CLASS_NAME}")
    # what diffusers itself assumes for keys that a config leaves out
    full: dict[str, Any] = {
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": 512,
        "ofs_embed_dim": None,
        "text_embed_dim": 4096,
        "num_layers": 30,
        "dropout": 0.0,
        "attention_bias": True,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "patch_size": 2,
        "patch_size_t": None,
        "temporal_compression_ratio": TEMPORAL_RATIO,
        "max_text_seq_length": 226,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": False,
        "use_learned_positional_embeddings": False,
        "patch_bias": True,
    } | dict(config)
    for name, only in (
        ("out_channels", full["in_channels"]),
        ("flip_sin_to_cos", True),
        ("freq_shift", 0),
        ("ofs_embed_dim", None),
        ("dropout", 0.0),
        ("attention_bias", True),
        ("patch_size_t", None),
        ("temporal_compression_ratio", TEMPORAL_RATIO),
        ("activation_fn", "gelu-approximate"),
        ("timestep_activation_fn", "silu"),
        ("norm_elementwise_affine", True),
        ("norm_eps", 1e-5),
        ("use_learned_positional_embeddings", False),
        ("patch_bias", True),
    ):
        if full[name] != only:
            raise UserError(f"config.json: {name} is {full[name]!r}; CogVideoX has only {only!r} here")
    return {
        "latent_channels": full["in_channels"],
        "latent_frames": (full["sample_frames"] - 1) // TEMPORAL_RATIO + 1,
        "latent_height": full["sample_height"],
        "latent_width": full["sample_width"],
        "patch_size": full["patch_size"],
        "hidden_size": full["num_attention_heads"] * full["attention_head_dim"],
        "depth": full["num_layers"],
        "num_heads": full["num_attention_heads"],
        "text_dim": full["text_embed_dim"],
        "text_tokens": full["max_text_seq_length"],
        "time_dim": full["time_embed_dim"],
        "positions": "rotary" if full["use_rotary_positional_embeddings"] else "sincos",
        "spatial_scale": full["spatial_interpolation_scale"],
        "temporal_scale": full["temporal_interpolation_scale"],
    }


PUBLISHED = Published(CLASS_NAME, _model_args, diffusers_layout)
EXPORTS = {"diffusers": export_trained}


def _null_of(null: Cond, model_args: Mapping[str, Any]) -> dict[str, Tensor]:
    return null_prompt(null["text"], null.get("text_mask"), None)


PIPELINE = Pipeline(
    "CogVideoXPipeline",
    CLASS_NAME,
    text=(TextSlot("text_encoder", "tokenizer", "T5EncoderModel"),),
    trained_on=("T5EncoderModel",),
    conditions=("text",),
    null_of=_null_of,
    guided="""videos = pipeline(
    **prompt, guidance_scale=4.0, negative_prompt_embeds=torch.zeros_like(like), max_sequence_length=like.shape[1], **options,
).frames""",
)
