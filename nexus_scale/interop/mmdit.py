"""MMDiT weights <-> diffusers' SD3Transformer2DModel, and <-> the key names of the original release; to the bit.

The original differs in names alone. diffusers differs in two things beside them. We fuse q, k, v (rows in that order); diffusers
keeps them apart unless fused by hand. And its final modulation, like that of the last block's text stream, gives (scale, shift)
where adaLN gives (shift, scale).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.interop.folders import (
    read_folder,
    why_no_flow,
    write_flow_scheduler,
    write_folder,
    write_tensors,
)
from nexus_scale.interop.layout import Layout, SafetensorsFiles, apart, swapped, to_ours, to_theirs, whole
from nexus_scale.interop.pipelines import Pipeline, TextSlot, null_prompt
from nexus_scale.interop.published import Original, Published
from nexus_scale.models.diffusion.mmdit import MMDiT
from nexus_scale.models.layers.embeddings import sincos_position_2d
from nexus_scale.models.layers.text import compose_text

log = logging.getLogger(__name__)

CLASS_NAME = "SD3Transformer2DModel"
ORIGINAL_FILE = "sd3.safetensors"
ORIGINAL_PREFIX = "model.diffusion_model."

# our module -> diffusers', outside the blocks and inside one; their .weight and .bias go along
_OUTSIDE = {
    "patch_embed": "pos_embed.proj",
    "text_embed": "context_embedder",
    "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
    "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
    "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
    "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
    "final.mod.linear": "norm_out.linear",
    "final.linear": "proj_out",
}
_INSIDE = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_proj": "attn.to_out.0",
    "txt_proj": "attn.to_add_out",
    "img_proj2": "attn2.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
# our norms of queries and keys -> diffusers' modules with a .weight
_NORMS = {
    "heads.img_q_norm": "attn.norm_q",
    "heads.img_k_norm": "attn.norm_k",
    "heads.txt_q_norm": "attn.norm_added_q",
    "heads.txt_k_norm": "attn.norm_added_k",
    "heads2.img_q_norm": "attn2.norm_q",
    "heads2.img_k_norm": "attn2.norm_k",
}
# our fused projection -> diffusers' three, and their fused one
_QKV = {
    "img_qkv": (("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_qkv"),
    "txt_qkv": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_added_qkv"),
    "img_qkv2": (("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.to_qkv"),
}
# our module -> the original's
_ORIGINAL_OUTSIDE = {
    "patch_embed": "x_embedder.proj",
    "text_embed": "context_embedder",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "pooled_embed.fc1": "y_embedder.mlp.0",
    "pooled_embed.fc2": "y_embedder.mlp.2",
    "final.mod.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
_ORIGINAL_INSIDE = {
    "img_mod.linear": "x_block.adaLN_modulation.1",
    "txt_mod.linear": "context_block.adaLN_modulation.1",
    "img_qkv": "x_block.attn.qkv",
    "img_qkv2": "x_block.attn2.qkv",
    "txt_qkv": "context_block.attn.qkv",
    "img_proj": "x_block.attn.proj",
    "img_proj2": "x_block.attn2.proj",
    "txt_proj": "context_block.attn.proj",
    "img_mlp.fc1": "x_block.mlp.fc1",
    "img_mlp.fc2": "x_block.mlp.fc2",
    "txt_mlp.fc1": "context_block.mlp.fc1",
    "txt_mlp.fc2": "context_block.mlp.fc2",
}
_ORIGINAL_NORMS = {
    "heads.img_q_norm": "x_block.attn.ln_q",
    "heads.img_k_norm": "x_block.attn.ln_k",
    "heads.txt_q_norm": "context_block.attn.ln_q",
    "heads.txt_k_norm": "context_block.attn.ln_k",
    "heads2.img_q_norm": "x_block.attn2.ln_q",
    "heads2.img_k_norm": "x_block.attn2.ln_k",
}


def diffusers_layout(net: MMDiT) -> Layout:
    """Where each parameter lies in an SD3Transformer2DModel, beside which it has `pos_embed.pos_embed`, which we compute."""
    layout: dict[str, Any] = {}
    for name, p in net.state_dict().items():
        prefix, inner, kind, swap = _place(name, net.depth)
        if inner in _QKV:
            keys = [f"{prefix}{part}.{kind}" for part in _QKV[inner][0]]
            layout[name] = apart(keys, [net.hidden_size] * 3, p.shape[1:])
        elif swap:
            layout[name] = swapped(_plain_name(prefix, inner, kind), p.shape)
        else:
            layout[name] = whole(
                _plain_name(prefix, inner, kind), _kernel(net) if name == "patch_embed.weight" else p.shape
            )
    return layout


def original_layout(net: MMDiT) -> Layout:
    """Where each parameter lies in a checkpoint of the original release, without its prefix: one to one."""
    layout = {}
    for name, p in net.state_dict().items():
        prefix, inner, kind, _ = _place(name, net.depth)
        if f"{inner}.{kind}" in _ORIGINAL_NORMS:
            key = f"{_ORIGINAL_NORMS[f'{inner}.{kind}']}.weight"
        else:
            key = f"{(_ORIGINAL_INSIDE if prefix else _ORIGINAL_OUTSIDE)[inner]}.{kind}"
        their_prefix = prefix.replace("transformer_blocks.", "joint_blocks.")
        layout[name] = whole(f"{their_prefix}{key}", _kernel(net) if name == "patch_embed.weight" else p.shape)
    return layout


def _kernel(net: MMDiT) -> tuple[int, ...]:
    """Shape of the patch embedding as a convolution."""
    return net.hidden_size, net.latent_channels, net.patch_size, net.patch_size


# ---------------------------------------------------------------------------------------------- diffusers


def to_diffusers(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any], *, fused: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and state dict that SD3Transformer2DModel takes.

    Args:
        state: state dict of an MMDiT.
        model_args: its constructor's arguments (defaults may be left out).
        fused: q, k and v as one matrix, for a model on which `fuse_qkv_projections()` was called.
    Returns:
        config (JSON values), state dict. Tensors may share memory with `state`.
    Raises:
        UserError: sizes that diffusers' class cannot express; a state dict of another network.
    """
    net = _network(model_args)
    _check_names(set(state), set(net.state_dict()), "the MMDiT state dict")
    if net.mlp_ratio != 4.0:
        raise UserError(f"{CLASS_NAME} has mlp_ratio 4 fixed; got {net.mlp_ratio}: this network cannot be exported")

    out: dict[str, Tensor] = {"pos_embed.pos_embed": _position_table(net)}
    for name, tensor in _folded(state, net).items():
        prefix, inner, kind, swap = _place(name, net.depth)
        tensor = _swap_halves(tensor) if swap else tensor
        if inner in _QKV:
            parts, whole = _QKV[inner]
            if fused:
                out[f"{prefix}{whole}.{kind}"] = tensor
            else:
                out |= {f"{prefix}{part}.{kind}": rows for part, rows in zip(parts, tensor.chunk(3), strict=True)}
        else:
            if name == "patch_embed.weight":
                tensor = tensor.unflatten(1, (net.latent_channels, net.patch_size, net.patch_size))
            out[_plain_name(prefix, inner, kind)] = tensor
    return _config(net), out


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_diffusers`; q, k and v may be fused, apart, or both if they agree.

    Returns:
        model_args for `MMDiT(**model_args)`, and its state dict.
    Raises:
        UserError: a config or weights that are not SD3's.
    """
    model_args = model_args_of(config)
    net = _network(model_args)
    left = dict(state)
    _check_position_table(left.pop("pos_embed.pos_embed", None), net)

    def take(key: str) -> Tensor:
        if key not in left:
            raise UserError(f"SD3 weights: {key} is missing; the folder is incomplete or of another architecture")
        return left.pop(key)

    ours: dict[str, Tensor] = {}
    for name, expected in net.state_dict().items():
        prefix, inner, kind, swap = _place(name, net.depth)
        if inner in _QKV:
            parts, whole = _QKV[inner]
            fused = left.pop(f"{prefix}{whole}.{kind}", None)
            apart = None
            if fused is None or f"{prefix}{parts[0]}.{kind}" in left:
                apart = torch.cat([take(f"{prefix}{part}.{kind}") for part in parts])
            if fused is not None and apart is not None and not torch.equal(fused, apart):
                raise UserError(
                    f"SD3 weights: {prefix}{whole} and {', '.join(parts)} differ; remove the stale ones "
                    "(unfuse_qkv_projections() before saving)"
                )
            tensor = fused if apart is None else apart
            assert tensor is not None
        else:
            tensor = take(_plain_name(prefix, inner, kind))
        if name == "patch_embed.weight":
            tensor = tensor.flatten(1)
        if tensor.shape != expected.shape:
            raise UserError(
                f"SD3 weights: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(expected.shape)}"
            )
        ours[name] = _swap_halves(tensor) if swap else tensor
    if left:
        raise UserError(
            f"SD3 weights: {len(left)} tensors that SD3 does not have, among them {min(left)}; not an SD3 transformer"
        )
    return model_args, ours


def export_folder(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    *,
    shift: float | Mapping[str, Any] | None = None,
) -> Path:
    """Writes `config.json` and the weights, which `SD3Transformer2DModel.from_pretrained(folder)` loads.

    Args:
        shift: also writes `scheduler/scheduler_config.json` for FlowMatchEulerDiscreteScheduler with this time shift.
    Returns:
        The folder.
    """
    config, theirs = to_diffusers(state, model_args)
    folder = write_folder(folder, config, theirs)
    if shift is not None:
        size = config["sample_size"]
        write_flow_scheduler(folder, shift, (1, config["in_channels"], size, size))
    return folder


def import_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that diffusers saved: the transformer's own, or a pipeline's with `transformer/` in it.

    Returns:
        model_args, state dict of our MMDiT.
    Raises:
        UserError: no such folder, not safetensors, or not an SD3 transformer.
    """
    return from_diffusers(*read_folder(folder, CLASS_NAME))


def export_trained(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path,
    objective: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> Path:
    """`export_folder` of a run, with the scheduler that draws as its recipe's sampler does; without one, which is said, where diffusers
    has none."""
    if reason := why_no_flow(objective, sample):
        log.warning("%s: written without a scheduler: %s", folder, reason)
        return export_folder(state, model_args, folder)
    return export_folder(state, model_args, folder, shift=sample.get("shift", 1.0))


# ------------------------------------------------------------------------------------- the original release


def to_original(state: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict under the original's names, with its prefix and its table of positions. Tensors may share memory."""
    net = _network(model_args)
    _check_names(set(state), set(net.state_dict()), "the MMDiT state dict")
    theirs = to_theirs(original_layout(net), _folded(state, net)) | {"pos_embed": _position_table(net)}
    return {f"{ORIGINAL_PREFIX}{key}": tensor for key, tensor in theirs.items()}


def from_original(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_original`, with the prefix or without.

    Args:
        model_args: of the MMDiT; read off the tensors' shapes unless given, which tells all but `latent_size` (128 in every
            release) and, without norms of queries and keys, the width of heads (64 in every release).
    Returns:
        model_args, state dict of our MMDiT.
    Raises:
        UserError: weights that are not SD3's, or not of these arguments.
    """
    left = {key.removeprefix(ORIGINAL_PREFIX): tensor for key, tensor in state.items()}
    if model_args is None:
        model_args = original_model_args({key: tuple(tensor.shape) for key, tensor in left.items()})
    net = _network(model_args)
    _check_position_table(left.pop("pos_embed", None), net)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    return dict(model_args), to_ours(original_layout(net), left, shapes, "SD3 weights")


def original_model_args(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `MMDiT` from the shapes of an original checkpoint, keys without their prefix."""
    needed = ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed")
    for key in needed:
        if key not in shapes:
            raise UserError(f"SD3 weights: {key} is missing; the checkpoint is incomplete or of another architecture")
    hidden, channels, patch, _ = shapes[needed[0]]
    head_dim = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]

    def count(rest: str) -> int:
        return sum(re.fullmatch(rf"joint_blocks\.\d+\.{rest}", key) is not None for key in shapes)

    return {
        "latent_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": count(r"x_block\.attn\.qkv\.weight"),
        "num_heads": hidden // head_dim,
        "text_dim": shapes[needed[1]][1],
        "pooled_dim": shapes[needed[2]][1],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        "dual_attention_blocks": count(r"x_block\.attn2\.qkv\.weight"),
        "pos_embed_max_size": math.isqrt(shapes[needed[3]][1]),
    }


def export_original(state: Mapping[str, Tensor], model_args: Mapping[str, Any], folder: Path | str) -> Path:
    """Writes one safetensors file under the original's names; returns its folder."""
    write_tensors(Path(folder) / ORIGINAL_FILE, to_original(state, model_args))
    return Path(folder)


def import_original(
    file: Path | str, model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a safetensors file of the original release, also one that carries the autoencoder and the text encoders."""
    with SafetensorsFiles([Path(file)], prefix=ORIGINAL_PREFIX) as files:
        return from_original(files.tensors(), model_args)


# ---------------------------------------------------------------------------------------------- the parts


def _place(name: str, depth: int) -> tuple[str, str, str, bool]:
    """Of our parameter: diffusers' block prefix ('' outside blocks), its module there, its name in the module, and whether
    its halves are swapped."""
    module, kind = name.rsplit(".", 1)
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return "", module, kind, module == "final.mod.linear"
    block, inner = int(match[1]), match[2]
    return f"transformer_blocks.{block}.", inner, kind, inner == "txt_mod.linear" and block == depth - 1


def _plain_name(prefix: str, inner: str, kind: str) -> str:
    """diffusers' name of a parameter that is converted one to one."""
    if f"{inner}.{kind}" in _NORMS:
        return f"{prefix}{_NORMS[f'{inner}.{kind}']}.weight"
    return f"{prefix}{(_INSIDE if prefix else _OUTSIDE)[inner]}.{kind}"


def _swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) <-> (scale, shift), stacked on dim 0."""
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def _network(model_args: Mapping[str, Any]) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(**model_args)


def _folded(state: Mapping[str, Tensor], net: MMDiT) -> dict[str, Tensor]:
    """The state dict of the same network with the scales of its conditions in the layers that read them: others know no such scales."""
    state = dict(state)
    for name, scale in (("text_embed.weight", net.text_scale), ("pooled_embed.fc1.weight", net.pooled_scale)):
        if scale != 1.0:
            state[name] = state[name] * scale
    return state


def _config(net: MMDiT) -> dict[str, Any]:
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        "sample_size": net.latent_size,
        "patch_size": net.patch_size,
        "in_channels": net.latent_channels,
        "out_channels": net.latent_channels,
        "num_layers": net.depth,
        "attention_head_dim": net.hidden_size // net.num_heads,
        "num_attention_heads": net.num_heads,
        "joint_attention_dim": net.text_dim,
        "caption_projection_dim": net.hidden_size,
        "pooled_projection_dim": net.pooled_dim,
        "pos_embed_max_size": net.pos_embed_max_size,
        "dual_attention_layers": list(range(net.dual_attention_blocks)),
        "qk_norm": net.qk_norm,
    }


def model_args_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MMDiT` from diffusers' config.

    Raises:
        UserError: of another class, or with settings that MMDiT does not have.
    """
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:  # a live model's config does not name its class
        raise UserError(f"config.json is of {config['_class_name']!r}; expected {CLASS_NAME}")
    # what diffusers itself assumes for keys that a config leaves out
    full: dict[str, Any] = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 18,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 96,
        "dual_attention_layers": [],
        "qk_norm": None,
    } | dict(config)
    hidden = full["num_attention_heads"] * full["attention_head_dim"]
    dual = list(full["dual_attention_layers"])
    for name, got, expected in (
        ("caption_projection_dim", full["caption_projection_dim"], hidden),
        ("out_channels", full["out_channels"] or full["in_channels"], full["in_channels"]),
        ("dual_attention_layers", dual, list(range(len(dual)))),
        ("qk_norm", full["qk_norm"], "rms_norm" if full["qk_norm"] else None),
    ):
        if got != expected:
            raise UserError(f"config.json: {name} is {got!r}; MMDiT has only {expected!r} here")
    return {
        "latent_channels": full["in_channels"],
        "latent_size": full["sample_size"],
        "patch_size": full["patch_size"],
        "hidden_size": hidden,
        "depth": full["num_layers"],
        "num_heads": full["num_attention_heads"],
        "text_dim": full["joint_attention_dim"],
        "pooled_dim": full["pooled_projection_dim"],
        "qk_norm": full["qk_norm"],
        "dual_attention_blocks": len(dual),
        "pos_embed_max_size": full["pos_embed_max_size"],
    }


def _position_table(net: MMDiT) -> Tensor:
    """diffusers' buffer, (1, S * S, D): we compute it, they store it."""
    size, base = net.pos_embed_max_size, net.latent_size // net.patch_size
    table = sincos_position_2d(size, size, net.hidden_size, table_size=size, base_size=base, device=torch.device("cpu"))
    return table[None]


def _check_position_table(stored: Tensor | None, net: MMDiT) -> None:
    """A table that is not the sin-cos one (a learned or interpolated one) would be lost in silence."""
    if stored is None:
        return
    expected = _position_table(net)
    # published weights are half precision: the table is rounded to 2^-11 (2^-8 in bf16)
    if stored.shape != expected.shape or (stored.float() - expected).abs().max() > 2**-8:
        raise UserError(
            "SD3 weights: pos_embed is not the sin-cos table of this config; MMDiT cannot hold a learned one"
        )


def _check_names(got: set[str], expected: set[str], what: str) -> None:
    if got != expected:
        missing, extra = sorted(expected - got)[:3], sorted(got - expected)[:3]
        raise UserError(f"{what} does not fit its arguments: missing {missing}, not expected {extra}")


PUBLISHED = Published(
    CLASS_NAME,
    model_args_of,
    diffusers_layout,
    computed=lambda net: ("pos_embed.pos_embed",),
    original=Original(original_layout, original_model_args, ORIGINAL_PREFIX, lambda net: ("pos_embed",)),
)
EXPORTS = {
    "diffusers": export_trained,
    "original": lambda state, model_args, folder, *_: export_original(state, model_args, folder),
}


def _null_of(null: Cond, model_args: Mapping[str, Any]) -> dict[str, Tensor]:
    return null_prompt(*compose_text(null, _network(model_args).text_dim))


PIPELINE = Pipeline(
    "StableDiffusion3Pipeline",
    CLASS_NAME,
    text=(
        TextSlot("text_encoder", "tokenizer", "CLIPTextModelWithProjection"),
        TextSlot("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
        TextSlot("text_encoder_3", "tokenizer_3", "T5EncoderModel"),
    ),
    trained_on=("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),
    conditions=("text", "text_2", "text_3", "pooled", "pooled_2"),
    shifts=True,
    null_of=_null_of,
    guided="""images = pipeline(
    **prompt, guidance_scale=4.0, negative_prompt_embeds=torch.zeros_like(like),
    negative_pooled_prompt_embeds=null["negative_pooled_prompt_embeds"], **options,
).images""",
)
