"""MMDiT in diffusers (SD3Transformer2DModel) and in the original release's files, as tables; to the bit.

The original differs in names alone. diffusers differs in two things beside them. We fuse q, k, v (rows in that order); diffusers
keeps them apart unless fused by hand. And its final modulation, like that of the last block's text stream, gives (scale, shift)
where adaLN gives (shift, scale).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nexus_scale.interop.formats import Apart, Format, Key, Made, Patches, Shapes, State, Swapped, Table, fused
from nexus_scale.interop.pipelines import Pipeline, TextSlot, Tuning, composed_null
from nexus_scale.interop.published import Family
from nexus_scale.interop.schedulers import flow_match
from nexus_scale.models.layers.embeddings import sincos_position_2d

BLOCK, THEIRS, ORIGINAL_BLOCK = "joint_blocks.#.", "transformer_blocks.#.", "joint_blocks.#."
_QKV = {
    "img_qkv": (("to_q", "to_k", "to_v"), "attn", "to_qkv"),
    "txt_qkv": (("add_q_proj", "add_k_proj", "add_v_proj"), "attn", "to_added_qkv"),
    "img_qkv2": (("to_q", "to_k", "to_v"), "attn2", "to_qkv"),
}
_BLOCKS: Table = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_proj": "attn.to_out.0",
    "txt_proj": "attn.to_add_out",
    "img_proj2": "attn2.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "heads.img_q_norm": "attn.norm_q.weight",
    "heads.img_k_norm": "attn.norm_k.weight",
    "heads.txt_q_norm": "attn.norm_added_q.weight",
    "heads.txt_k_norm": "attn.norm_added_k.weight",
    "heads2.img_q_norm": "attn2.norm_q.weight",
    "heads2.img_k_norm": "attn2.norm_k.weight",
}
_TABLE: Table = {
    "patch_embed": Patches("pos_embed.proj"),
    "text_embed": "context_embedder",
    "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
    "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
    "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
    "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
    "final.mod.linear": Swapped("norm_out.linear"),
    "final.linear": "proj_out",
    **{f"{BLOCK}{ours}": f"{THEIRS}{theirs}" for ours, theirs in _BLOCKS.items()},
    **{
        f"{BLOCK}{ours}": Apart(tuple(f"{THEIRS}{attn}.{one}" for one in parts), fused=f"{THEIRS}{attn}.{whole}")
        for ours, (parts, attn, whole) in _QKV.items()
    },
}
_ORIGINAL_BLOCKS: Table = {
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
    "heads.img_q_norm": "x_block.attn.ln_q.weight",
    "heads.img_k_norm": "x_block.attn.ln_k.weight",
    "heads.txt_q_norm": "context_block.attn.ln_q.weight",
    "heads.txt_k_norm": "context_block.attn.ln_k.weight",
    "heads2.img_q_norm": "x_block.attn2.ln_q.weight",
    "heads2.img_k_norm": "x_block.attn2.ln_k.weight",
}
_ORIGINAL_TABLE: Table = {
    "patch_embed": Patches("x_embedder.proj"),
    "text_embed": "context_embedder",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "pooled_embed.fc1": "y_embedder.mlp.0",
    "pooled_embed.fc2": "y_embedder.mlp.2",
    "final.mod.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
    **{f"{BLOCK}{ours}": f"{ORIGINAL_BLOCK}{theirs}" for ours, theirs in _ORIGINAL_BLOCKS.items()},
}


def _table(net: Any) -> Table:
    if not hasattr(net, "final"):  # first blocks alone, see `MMDiT.cut`
        return _TABLE
    last = net.depth - 1
    return {**_TABLE, f"joint_blocks.{last}.txt_mod.linear": Swapped(f"transformer_blocks.{last}.norm1_context.linear")}


def _positions(net: Any) -> Tensor:
    """The table of positions, (1, S * S, D): we compute it, they store it."""
    size, base = net.pos_embed_max_size, net.latent_size // net.patch_size
    table = sincos_position_2d(size, size, net.hidden_size, table_size=size, base_size=base, device=torch.device("cpu"))
    return table[None]


def _made(needed: bool) -> Made:
    # Published weights are half precision: the table is rounded to 2^-11 (2^-8 in bf16).
    return Made(_positions, 2**-8, "is not the sin-cos table of this config; MMDiT cannot hold a learned one", needed)


def _scales_folded(state: State, args: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """The scales of conditions in the layers that read them: others know no such scales."""
    folded, plain = dict(state), dict(args)
    for name, scale in (("text_embed.weight", "text_scale"), ("pooled_embed.fc1.weight", "pooled_scale")):
        if (factor := plain.pop(scale, 1.0)) != 1.0:
            folded[name] = folded[name] * factor
    return folded, plain


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """All but `latent_size` (128 in every release) and, without norms of queries and keys, the width of heads (64 in every release)."""
    hidden, channels, patch, _ = shapes.of("x_embedder.proj.weight")
    norm, block = "joint_blocks.0.x_block.attn.ln_q.weight", r"joint_blocks\.(\d+)\.x_block\."
    return {
        "latent_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": shapes.count(rf"{block}attn\.qkv\.weight"),
        "num_heads": hidden // shapes.get(norm, (64,))[0],
        "text_dim": shapes.of("context_embedder.weight")[1],
        "pooled_dim": shapes.of("y_embedder.mlp.0.weight")[1],
        "qk_norm": "rms_norm" if norm in shapes else None,
        "dual_attention_blocks": shapes.count(rf"{block}attn2\.qkv\.weight"),
        "pos_embed_max_size": math.isqrt(shapes.of("pos_embed")[1]),
    }


DIFFUSERS = Format(
    "mmdit",
    "SD3 weights",
    _table,
    "SD3Transformer2DModel",
    config={
        "sample_size": Key(128, "latent_size"),
        "patch_size": Key(2, "patch_size"),
        "in_channels": Key(16, "latent_channels"),
        "out_channels": Key(16, lambda net: net.latent_channels),
        "num_layers": Key(18, "depth"),
        "attention_head_dim": Key(64, lambda net: net.hidden_size // net.num_heads),
        "num_attention_heads": Key(18, "num_heads"),
        "joint_attention_dim": Key(4096, "text_dim"),
        "caption_projection_dim": Key(1152, lambda net: net.hidden_size),
        "pooled_projection_dim": Key(2048, "pooled_dim"),
        "pos_embed_max_size": Key(96, "pos_embed_max_size"),
        "dual_attention_layers": Key([], lambda net: list(range(net.dual_attention_blocks))),
        "qk_norm": Key(None, "qk_norm", (None, "rms_norm")),
    },
    none_means={"out_channels": "in_channels"},
    arguments={
        "hidden_size": lambda config: config["num_attention_heads"] * config["attention_head_dim"],
        "dual_attention_blocks": lambda config: len(config["dual_attention_layers"]),
    },
    fixed={"mlp_ratio": 4.0, "text_scale": 1.0, "pooled_scale": 1.0},
    computed=lambda net: {"pos_embed.pos_embed": _made(needed=False)},
    prepared=_scales_folded,
)
ORIGINAL = Format(
    "mmdit",
    "SD3 weights",
    lambda net: _ORIGINAL_TABLE,
    from_shapes=_args_of,
    fixed={"mlp_ratio": 4.0, "text_scale": 1.0, "pooled_scale": 1.0},
    computed=lambda net: {"pos_embed": _made(needed=True)},
    prepared=_scales_folded,
    file="sd3.safetensors",
    prefix="model.diffusion_model.",
)
FUSED = replace(DIFFUSERS, table=fused(_table))
"""Of a model on which `fuse_qkv_projections()` was called."""


TUNING = Tuning(
    (0, 0, 256),
    ("text", "text_2", "text_3", "pooled", "pooled_2"),
    {"name": "denoising", "times": {"name": "logit_normal", "mean": 0.0, "std": 1.0}, "null": "empty"},
    {"steps": 28, "guidance": 7.0},
)
"""Tokens, steps and scale are the defaults of diffusers' pipeline, times those of its DreamBooth script."""


FAMILY = Family(
    {"diffusers": DIFFUSERS, "original": ORIGINAL},
    tuning=lambda args: TUNING,
    kohya=ORIGINAL.layout,
    pipeline=Pipeline(
        "StableDiffusion3Pipeline",
        text=(
            TextSlot("text_encoder", "tokenizer", "CLIPTextModelWithProjection"),
            TextSlot("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
            TextSlot("text_encoder_3", "tokenizer_3", "T5EncoderModel"),
        ),
        trained_on=("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),
        conditions=("text", "text_2", "text_3", "pooled", "pooled_2"),
        shifts=True,
        scheduler=flow_match,
        null_of=composed_null(DIFFUSERS),
    ),
)
