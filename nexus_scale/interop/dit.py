"""DiT weights <-> diffusers' DiTTransformer2DModel, in both directions and to the bit.

Two things differ beside names. diffusers keeps an embedder of time and class in every block (749.8 M parameters at XL/2
instead of 674.8 M), all equal unless someone trained that class: they become one on import and copies on export. And we
fuse q, k, v (rows in that order), which diffusers keeps apart.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import read_folder, write_folder
from nexus_scale.interop.layout import Layout, SafetensorsFiles, apart, to_ours, to_theirs, whole
from nexus_scale.interop.pipelines import Pipeline
from nexus_scale.interop.published import Published
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.processes.gaussian import DDPMLinear, find_path

log = logging.getLogger(__name__)

CLASS_NAME = "DiTTransformer2DModel"
PIPELINE_CLASSES = 1000
"""diffusers' DiTPipeline takes row 1000 of the label table for no class, whatever the number of classes."""

# our module -> diffusers', outside the blocks, inside one, and of the embedder that each block repeats
_OUTSIDE = {"patch_embed": "pos_embed.proj", "final.mod.linear": "proj_out_1", "final.linear": "proj_out_2"}
_INSIDE = {
    "mod.linear": "norm1.linear",
    "proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_REPEATED = {
    "time_embed.fc1.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "time_embed.fc1.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "time_embed.fc2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "time_embed.fc2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "label_embed.table": "norm1.emb.class_embedder.embedding_table.weight",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def diffusers_layout(net: DiT) -> Layout:
    """Where each parameter lies in a DiTTransformer2DModel; of the embedder that each block repeats, in the first block's."""
    layout: dict[str, Any] = {}
    for name, p in net.state_dict().items():
        if name in _REPEATED:
            layout[name] = whole(_repeated(name, 0), p.shape)
            continue
        prefix, inner, kind = _place(name)
        if inner == "qkv":
            layout[name] = apart([f"{prefix}{part}.{kind}" for part in _QKV], [net.hidden_size] * 3, p.shape[1:])
            continue
        kernel = (net.hidden_size, net.latent_channels, net.patch_size, net.patch_size)
        key = f"{prefix}{(_INSIDE if prefix else _OUTSIDE)[inner]}.{kind}"
        layout[name] = whole(key, kernel if name == "patch_embed.weight" else p.shape)
    return layout


def computed(net: DiT) -> list[str]:
    """Keys beside the layout: the table of positions, which some versions store, and what blocks repeat of the first."""
    return ["pos_embed.pos_embed", *(_repeated(name, i) for name in _REPEATED for i in range(1, net.depth))]


def _repeated(name: str, block: int) -> str:
    return f"transformer_blocks.{block}.{_REPEATED[name]}"


def to_diffusers(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any], *, num_classes: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and state dict that DiTTransformer2DModel takes.

    Args:
        state: state dict of a DiT.
        model_args: its constructor's arguments (defaults may be left out).
        num_classes: widens the label table to so many classes and the one for none, which fills the new rows.
    Returns:
        config (JSON values), state dict. Tensors share memory with one another and with `state`.
    Raises:
        UserError: what diffusers' class cannot express; a state dict of another network.
    """
    net = _network(model_args)
    missing, extra = sorted(set(net.state_dict()) - set(state))[:3], sorted(set(state) - set(net.state_dict()))[:3]
    if missing or extra:
        raise UserError(f"the DiT state dict does not fit its arguments: missing {missing}, not expected {extra}")
    for name, got, only in (("mlp_ratio", net.mlp_ratio, 4.0), ("frequency_shift", net.frequency_shift, 1)):
        if got != only:
            raise UserError(f"{CLASS_NAME} has {name} {only} fixed; got {got}: this network cannot be exported")
    classes = net.num_classes if num_classes is None else num_classes
    if classes < net.num_classes:
        raise UserError(f"export: got num_classes {classes}; the network has {net.num_classes}")

    out = to_theirs(diffusers_layout(net), state)
    for name in _REPEATED:
        tensor = state[name]
        if name == "label_embed.table" and classes > net.num_classes:
            tensor = torch.cat((tensor, tensor[-1:].expand(classes - net.num_classes, -1)))
        out |= {_repeated(name, i): tensor for i in range(net.depth)}
    return _config(net, classes), out


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_diffusers`.

    Returns:
        model_args for `DiT(**model_args)`, and its state dict.
    Raises:
        UserError: a config or weights that are not DiT's; embedders that differ between blocks.
    """
    model_args = _model_args(config)
    net = _network(model_args)
    for name in _REPEATED:
        for i in range(1, net.depth):
            one, other = state.get(_repeated(name, 0)), state.get(_repeated(name, i))
            if one is not None and other is not None and not torch.equal(one, other):
                raise UserError(f"DiT weights: {_differs(name, i)}")
    kept = {key: tensor for key, tensor in state.items() if key not in computed(net)}
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    return model_args, to_ours(diffusers_layout(net), kept, shapes, "DiT weights")


def check_copies(net: DiT, files: SafetensorsFiles, what: str) -> None:
    """That blocks have one embedder, tensor by tensor.

    Raises:
        UserError: they were trained apart.
    """
    for name in _REPEATED:
        size = net.get_parameter(name).numel()
        first = files.values(_repeated(name, 0), 0, size)
        for i in range(1, net.depth):
            if not torch.equal(first, files.values(_repeated(name, i), 0, size)):
                raise UserError(f"{what}: {_differs(name, i)}")


def _differs(name: str, block: int) -> str:
    return (
        f"{_REPEATED[name]} of block {block} differs from that of block 0; DiT has one embedder for all blocks, so weights trained "
        f"as {CLASS_NAME} cannot be held"
    )


def scheduler_config(objective: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """The DDIMScheduler that walks this model in diffusers' DiTPipeline, from the recipe's `objective:` and `sample:`.

    Returns:
        Its config; None where diffusers has none: DiT counts DDPM's linear steps, and other paths have other schedulers.
    """
    path, target = find_path(objective.get("path", "rectified_flow")), objective.get("target", "velocity")
    if not isinstance(path, DDPMLinear) or target not in _PREDICTIONS:
        return None
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": path.steps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": "linear",
        "prediction_type": _PREDICTIONS[target],
        "timestep_spacing": sample.get("spacing", "linspace"),
        "clip_sample": bool(sample.get("clip", False)),
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }


def export_folder(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    *,
    scheduler: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> Path:
    """Writes `config.json` and the weights, which `DiTTransformer2DModel.from_pretrained(folder)` loads.

    Args:
        scheduler: also written, to `scheduler/scheduler_config.json`; see `scheduler_config`.
        num_classes: see `to_diffusers`; PIPELINE_CLASSES makes guidance work in DiTPipeline.
    Returns:
        The folder.
    """
    config, theirs = to_diffusers(state, model_args, num_classes=num_classes)
    # safetensors refuses shared memory: each block's embedder is a copy of its own
    return write_folder(folder, config, {name: t.clone() for name, t in theirs.items()}, scheduler)


def export_trained(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    objective: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> Path:
    """`export_folder` of a run, for DiTPipeline: with its scheduler, and the row for no class where the pipeline looks for it.

    Args:
        objective, sample: arguments of the recipe's sections.
    """
    scheduler = scheduler_config(objective, sample)
    if scheduler is None:
        log.warning(
            "%s: written without a scheduler: diffusers' DiTPipeline walks DDPM's linear steps (path: ddpm_linear with target "
            "eps, v or x0); this recipe has path %s and target %s",
            folder,
            objective.get("path", "rectified_flow"),
            objective.get("target", "velocity"),
        )
    classes = _network(model_args).num_classes
    return export_folder(state, model_args, folder, scheduler=scheduler, num_classes=max(classes, PIPELINE_CLASSES))


def import_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that diffusers saved: the transformer's own, or a pipeline's with `transformer/` in it.

    Returns:
        model_args, state dict of our DiT.
    Raises:
        UserError: no such folder, not safetensors, or not a DiT.
    """
    return from_diffusers(*read_folder(folder, CLASS_NAME))


def _place(name: str) -> tuple[str, str, str]:
    """Of our parameter: diffusers' block prefix ('' outside blocks), our module in the block, its name in the module."""
    module, kind = name.rsplit(".", 1)
    match = re.fullmatch(r"dit_blocks\.(\d+)\.(.+)", module)
    return ("", module, kind) if match is None else (f"transformer_blocks.{match[1]}.", match[2], kind)


def _network(model_args: Mapping[str, Any]) -> DiT:
    with torch.device("meta"):
        return DiT(**model_args)


def _config(net: DiT, num_classes: int) -> dict[str, Any]:
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        "num_attention_heads": net.num_heads,
        "attention_head_dim": net.hidden_size // net.num_heads,
        "in_channels": net.latent_channels,
        "out_channels": net.out_channels,
        "num_layers": net.depth,
        "attention_bias": True,
        "sample_size": net.latent_size,
        "patch_size": net.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": net.mlp_norm_eps,
    }


def _model_args(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:  # a live model's config does not name its class
        raise UserError(f"config.json is of {config['_class_name']!r}; expected {CLASS_NAME}")
    # what diffusers itself assumes for keys that a config leaves out
    full: dict[str, Any] = {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": None,
        "num_layers": 28,
        "attention_bias": True,
        "sample_size": 32,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
    } | dict(config)
    channels, out_channels = full["in_channels"], full["out_channels"] or full["in_channels"]
    for name, got, valid in (
        ("out_channels", out_channels, (channels, 2 * channels)),
        ("attention_bias", full["attention_bias"], (True,)),
        ("activation_fn", full["activation_fn"], ("gelu-approximate",)),
        ("norm_type", full["norm_type"], ("ada_norm_zero",)),
        ("norm_elementwise_affine", full["norm_elementwise_affine"], (False,)),
    ):
        if got not in valid:
            raise UserError(f"config.json: {name} is {got!r}; DiT has only {' or '.join(map(repr, valid))} here")
    return {
        "latent_channels": channels,
        "latent_size": full["sample_size"],
        "patch_size": full["patch_size"],
        "hidden_size": full["num_attention_heads"] * full["attention_head_dim"],
        "depth": full["num_layers"],
        "num_heads": full["num_attention_heads"],
        "num_classes": full["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
        "mlp_norm_eps": full["norm_eps"],
    }


PUBLISHED = Published(CLASS_NAME, _model_args, diffusers_layout, computed, check_copies)
EXPORTS = {"diffusers": export_trained}
PIPELINE = Pipeline("DiTPipeline", CLASS_NAME)
