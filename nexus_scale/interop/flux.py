"""Flux weights <-> diffusers' FluxTransformer2DModel, and <-> the key names of the original release; to the bit.

Beside names two things differ. diffusers keeps apart what we and the original fuse (q, k, v, and the MLP of single blocks), and
its final modulation gives (scale, shift) where adaLN gives (shift, scale).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.interop.folders import (
    network_folder,
    read_config,
    weight_files,
    why_no_flow,
    write_flow_scheduler,
    write_folder,
    write_tensors,
)
from nexus_scale.interop.layout import Layout, SafetensorsFiles, apart, swapped, to_ours, to_theirs, whole
from nexus_scale.interop.pipelines import Pipeline, TextSlot, null_prompt
from nexus_scale.interop.published import Original, Published
from nexus_scale.models.diffusion.flux import Flux
from nexus_scale.models.layers.text import compose_text

log = logging.getLogger(__name__)

CLASS_NAME = "FluxTransformer2DModel"
ORIGINAL_FILE = "flux1.safetensors"
ORIGINAL_PREFIX = "model.diffusion_model."
PATCH_SIZE, MLP_RATIO, ROPE_THETA = 2, 4.0, 10_000.0  # neither of theirs has another


class Names(NamedTuple):
    """A library's names of our modules: outside the blocks, and inside those of two streams and of one."""

    outside: Mapping[str, str]
    double: Mapping[str, str]
    single: Mapping[str, str]
    double_prefix: str
    single_prefix: str


_DIFFUSERS = Names(
    outside={
        "patch_embed": "x_embedder",
        "text_embed": "context_embedder",
        "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
        "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
        "guide_embed.fc1": "time_text_embed.guidance_embedder.linear_1",
        "guide_embed.fc2": "time_text_embed.guidance_embedder.linear_2",
        "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
        "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
        "final.mod.linear": "norm_out.linear",
        "final.linear": "proj_out",
    },
    double={
        "img_mod.linear": "norm1.linear",
        "txt_mod.linear": "norm1_context.linear",
        "img_proj": "attn.to_out.0",
        "txt_proj": "attn.to_add_out",
        "img_mlp.fc1": "ff.net.0.proj",
        "img_mlp.fc2": "ff.net.2",
        "txt_mlp.fc1": "ff_context.net.0.proj",
        "txt_mlp.fc2": "ff_context.net.2",
        "heads.img_q_norm": "attn.norm_q.weight",
        "heads.img_k_norm": "attn.norm_k.weight",
        "heads.txt_q_norm": "attn.norm_added_q.weight",
        "heads.txt_k_norm": "attn.norm_added_k.weight",
    },
    single={
        "mod.linear": "norm.linear",
        "linear2": "proj_out",
        "heads.joint_q_norm": "attn.norm_q.weight",
        "heads.joint_k_norm": "attn.norm_k.weight",
    },
    double_prefix="transformer_blocks",
    single_prefix="single_transformer_blocks",
)
# our fused projection -> diffusers' parts
_APART = {
    "img_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
_ORIGINAL = Names(
    outside={
        "patch_embed": "img_in",
        "text_embed": "txt_in",
        "time_embed.fc1": "time_in.in_layer",
        "time_embed.fc2": "time_in.out_layer",
        "guide_embed.fc1": "guidance_in.in_layer",
        "guide_embed.fc2": "guidance_in.out_layer",
        "pooled_embed.fc1": "vector_in.in_layer",
        "pooled_embed.fc2": "vector_in.out_layer",
        "final.mod.linear": "final_layer.adaLN_modulation.1",
        "final.linear": "final_layer.linear",
    },
    double={
        "img_mod.linear": "img_mod.lin",
        "txt_mod.linear": "txt_mod.lin",
        "img_qkv": "img_attn.qkv",
        "txt_qkv": "txt_attn.qkv",
        "img_proj": "img_attn.proj",
        "txt_proj": "txt_attn.proj",
        "img_mlp.fc1": "img_mlp.0",
        "img_mlp.fc2": "img_mlp.2",
        "txt_mlp.fc1": "txt_mlp.0",
        "txt_mlp.fc2": "txt_mlp.2",
        "heads.img_q_norm": "img_attn.norm.query_norm.scale",
        "heads.img_k_norm": "img_attn.norm.key_norm.scale",
        "heads.txt_q_norm": "txt_attn.norm.query_norm.scale",
        "heads.txt_k_norm": "txt_attn.norm.key_norm.scale",
    },
    single={
        "mod.linear": "modulation.lin",
        "linear1": "linear1",
        "linear2": "linear2",
        "heads.joint_q_norm": "norm.query_norm.scale",
        "heads.joint_k_norm": "norm.key_norm.scale",
    },
    double_prefix="double_blocks",
    single_prefix="single_blocks",
)


def diffusers_layout(net: Flux) -> Layout:
    """Where each parameter lies in a FluxTransformer2DModel."""
    layout: dict[str, Any] = {}
    for name, p in net.state_dict().items():
        prefix, inner, kind = _place(name, _DIFFUSERS)
        if inner in _APART:
            D = net.hidden_size
            counts = [D, D, D, int(D * net.mlp_ratio)][: len(_APART[inner])]
            layout[name] = apart([f"{prefix}{part}.{kind}" for part in _APART[inner]], counts, p.shape[1:])
        elif inner == "final.mod.linear":
            layout[name] = swapped(f"{_DIFFUSERS.outside[inner]}.{kind}", p.shape)
        else:
            layout[name] = whole(_key(name, _DIFFUSERS), p.shape)
    return layout


def original_layout(net: Flux) -> Layout:
    """Where each parameter lies in a checkpoint of the original release: one to one."""
    return {name: whole(_key(name, _ORIGINAL), p.shape) for name, p in net.state_dict().items()}


# ---------------------------------------------------------------------------------------------- diffusers


def to_diffusers(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and state dict that FluxTransformer2DModel takes.

    Args:
        state: state dict of a Flux.
        model_args: its constructor's arguments (defaults may be left out).
    Returns:
        config (JSON values), state dict. Tensors may share memory with `state`.
    Raises:
        UserError: sizes that diffusers' class cannot express; a state dict of another network.
    """
    net = _checked(state, model_args)
    for name, got, only in (
        ("patch_size", net.patch_size, PATCH_SIZE),
        ("mlp_ratio", net.mlp_ratio, MLP_RATIO),
        ("rope_theta", net.rope_theta, ROPE_THETA),
    ):
        if got != only:
            raise UserError(f"{CLASS_NAME} has {name} {only:g} fixed; got {got:g}: this network cannot be exported")
    config = {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        "patch_size": 1,  # of tokens that its pipeline has packed 2 x 2
        "in_channels": net.latent_channels * PATCH_SIZE**2,
        "out_channels": None,
        "num_layers": net.depth_double,
        "num_single_layers": net.depth_single,
        "attention_head_dim": net.hidden_size // net.num_heads,
        "num_attention_heads": net.num_heads,
        "joint_attention_dim": net.text_dim,
        "pooled_projection_dim": net.pooled_dim,
        "guidance_embeds": net.guidance_embed,
        "axes_dims_rope": list(net.rope_dims),
    }
    return config, to_theirs(diffusers_layout(net), state)


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_diffusers`.

    Returns:
        model_args for `Flux(**model_args)`, and its state dict.
    Raises:
        UserError: a config or weights that are not FLUX's.
    """
    model_args = model_args_of(config)
    net = _network(model_args)
    return model_args, to_ours(diffusers_layout(net), state, _shapes(net), "FLUX weights")


def model_args_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Flux` from diffusers' config.

    Raises:
        UserError: of another class, or with settings that Flux does not have.
    """
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:  # a live model's config does not name its class
        raise UserError(f"config.json is of {config['_class_name']!r}; expected {CLASS_NAME}")
    # what diffusers itself assumes for keys that a config leaves out
    full: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    } | dict(config)
    for name, got, expected in (
        ("patch_size", full["patch_size"], 1),
        ("in_channels", full["in_channels"], full["in_channels"] // PATCH_SIZE**2 * PATCH_SIZE**2),
        # FLUX.1-Fill and -Canny take more channels in than they give; that is another network
        ("out_channels", full["out_channels"] or full["in_channels"], full["in_channels"]),
    ):
        if got != expected:
            raise UserError(f"config.json: {name} is {got!r}; Flux has only {expected!r} here")
    return {
        "latent_channels": full["in_channels"] // PATCH_SIZE**2,
        "patch_size": PATCH_SIZE,
        "hidden_size": full["num_attention_heads"] * full["attention_head_dim"],
        "depth_double": full["num_layers"],
        "depth_single": full["num_single_layers"],
        "num_heads": full["num_attention_heads"],
        "rope_dims": tuple(full["axes_dims_rope"]),
        "text_dim": full["joint_attention_dim"],
        "pooled_dim": full["pooled_projection_dim"],
        "guidance_embed": full["guidance_embeds"],
    }


def export_folder(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    *,
    shift: float | Mapping[str, Any] | None = None,
) -> Path:
    """Writes `config.json` and the weights, which `FluxTransformer2DModel.from_pretrained(folder)` loads.

    Args:
        shift: also writes `scheduler/scheduler_config.json` for FlowMatchEulerDiscreteScheduler with this time shift.
    Returns:
        The folder.
    """
    config, theirs = to_diffusers(state, model_args)
    folder = write_folder(folder, config, theirs)
    if shift is not None:
        net = _network(model_args)
        write_flow_scheduler(folder, shift, (1, net.latent_channels, net.latent_size, net.latent_size))
    return folder


def import_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that diffusers saved: the transformer's own, or a pipeline's with `transformer/` in it.

    Returns:
        model_args, state dict of our Flux.
    Raises:
        UserError: no such folder, not safetensors, or not a FLUX transformer.
    """
    folder = network_folder(folder)
    config = read_config(folder, CLASS_NAME)
    with SafetensorsFiles(weight_files(folder)) as files:
        return from_diffusers(config, files.tensors())


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
    """A state dict under the names of black-forest-labs/flux. Tensors share memory with `state`."""
    return to_theirs(original_layout(_checked(state, model_args)), state)


def from_original(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_original`; keys may begin with `model.diffusion_model.`, as other programs write them.

    Args:
        model_args: of the Flux; read off the tensors' shapes unless given, which tells all but `rope_dims` of heads that are
            not 128 wide.
    Returns:
        model_args, state dict of our Flux.
    Raises:
        UserError: weights that are not FLUX's, or not of these arguments.
    """
    state = {key.removeprefix(ORIGINAL_PREFIX): tensor for key, tensor in state.items()}
    if model_args is None:
        model_args = original_model_args({key: tuple(tensor.shape) for key, tensor in state.items()})
    net = _network(model_args)
    return dict(model_args), to_ours(original_layout(net), state, _shapes(net), "FLUX weights")


def original_model_args(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `Flux` from the shapes of an original checkpoint."""
    needed = (
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
    )
    for key in needed:
        if key not in shapes:
            raise UserError(f"FLUX weights: {key} is missing; the checkpoint is incomplete or of another architecture")
    (hidden, channels), (head_dim,) = shapes[needed[0]], shapes[needed[3]]
    if head_dim != 128:
        raise UserError(
            f"FLUX weights: heads are {head_dim} wide, so rope_dims are not the published ones; give model_args"
        )

    def count(prefix: str) -> int:
        return 1 + max((int(m[1]) for key in shapes if (m := re.match(rf"{prefix}\.(\d+)\.", key))), default=-1)

    return {
        "latent_channels": channels // PATCH_SIZE**2,
        "hidden_size": hidden,
        "depth_double": count(_ORIGINAL.double_prefix),
        "depth_single": count(_ORIGINAL.single_prefix),
        "num_heads": hidden // head_dim,
        "text_dim": shapes[needed[1]][1],
        "pooled_dim": shapes[needed[2]][1],
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
    }


def export_original(state: Mapping[str, Tensor], model_args: Mapping[str, Any], folder: Path | str) -> Path:
    """Writes one safetensors file under the original's names; returns its folder."""
    write_tensors(Path(folder) / ORIGINAL_FILE, to_original(state, model_args))
    return Path(folder)


def import_original(
    file: Path | str, model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a safetensors file of the original release; see `from_original`."""
    with SafetensorsFiles([Path(file)], prefix=ORIGINAL_PREFIX) as files:
        return from_original(files.tensors(), model_args)


# ---------------------------------------------------------------------------------------------- the parts


def _place(name: str, names: Names) -> tuple[str, str, str]:
    """Of our parameter: their block's prefix ('' outside blocks), our module in it, and weight or bias (or our norm's name)."""
    module, kind = name.rsplit(".", 1)
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return "", module, kind
    prefix = names.double_prefix if match[1] == "double" else names.single_prefix
    return f"{prefix}.{match[2]}.", match[3], kind


def _key(name: str, names: Names) -> str:
    """Their name of a parameter that lies there one to one."""
    prefix, inner, kind = _place(name, names)
    table = (
        names.outside if not prefix else names.double if prefix.startswith(f"{names.double_prefix}.") else names.single
    )
    norm = table.get(f"{inner}.{kind}")
    return f"{prefix}{norm}" if norm is not None else f"{prefix}{table[inner]}.{kind}"


def _network(model_args: Mapping[str, Any]) -> Flux:
    with torch.device("meta"):
        return Flux(**model_args)


def _shapes(net: Flux) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in net.state_dict().items()}


def _checked(state: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> Flux:
    """The network of these arguments on the meta device, if `state` is one of its own."""
    net = _network(model_args)
    expected = set(net.state_dict())
    if set(state) != expected:
        missing, extra = sorted(expected - set(state))[:3], sorted(set(state) - expected)[:3]
        raise UserError(f"the Flux state dict does not fit its arguments: missing {missing}, not expected {extra}")
    return net


PUBLISHED = Published(
    CLASS_NAME,
    model_args_of,
    diffusers_layout,
    original=Original(original_layout, original_model_args, ORIGINAL_PREFIX),
)
EXPORTS = {
    "diffusers": export_trained,
    "original": lambda state, model_args, folder, *_: export_original(state, model_args, folder),
}


def _null_of(null: Cond, model_args: Mapping[str, Any]) -> dict[str, Tensor]:
    return null_prompt(*compose_text(null, _network(model_args).text_dim))


PIPELINE = Pipeline(
    "FluxPipeline",
    CLASS_NAME,
    text=(
        TextSlot("text_encoder", "tokenizer", "CLIPTextModel"),
        TextSlot("text_encoder_2", "tokenizer_2", "T5EncoderModel"),
    ),
    trained_on=("T5EncoderModel", "CLIPTextModel"),
    conditions=("text", "pooled_2"),
    shifts=True,
    null_of=_null_of,
    guided="""images = pipeline(
    **prompt, true_cfg_scale=4.0, negative_prompt_embeds=torch.zeros_like(like),
    negative_pooled_prompt_embeds=null["negative_pooled_prompt_embeds"], **options,
).images""",
)
