"""Flux in diffusers (FluxTransformer2DModel) and in the original release's files, as tables; to the bit.

Beside names two things differ. diffusers keeps apart what we and the original fuse (q, k, v, and the MLP of single blocks), and
its final modulation gives (scale, shift) where adaLN gives (shift, scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Apart, Format, Key, Shapes, Swapped, Table
from nexus_scale.interop.pipelines import Pipeline, TextSlot, Tuning, composed_null
from nexus_scale.interop.published import Family
from nexus_scale.interop.schedulers import flow_match

PATCH_SIZE = 2
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE: Table = {
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
}
_SINGLE: Table = {
    "mod.linear": "norm.linear",
    "linear2": "proj_out",
    "heads.joint_q_norm": "attn.norm_q.weight",
    "heads.joint_k_norm": "attn.norm_k.weight",
}
_TABLE: Table = {
    "patch_embed": "x_embedder",
    "text_embed": "context_embedder",
    "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
    "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
    "guide_embed.fc1": "time_text_embed.guidance_embedder.linear_1",
    "guide_embed.fc2": "time_text_embed.guidance_embedder.linear_2",
    "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
    "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
    "final.mod.linear": Swapped("norm_out.linear"),
    "final.linear": "proj_out",
    **{f"double_blocks.#.{ours}": f"transformer_blocks.#.{theirs}" for ours, theirs in _DOUBLE.items()},
    **{f"single_blocks.#.{ours}": f"single_transformer_blocks.#.{theirs}" for ours, theirs in _SINGLE.items()},
    "double_blocks.#.img_qkv": Apart(tuple(f"transformer_blocks.#.{one}" for one in _QKV)),
    "double_blocks.#.txt_qkv": Apart(tuple(f"transformer_blocks.#.{one}" for one in _ADDED)),
    "single_blocks.#.linear1": Apart(
        tuple(f"single_transformer_blocks.#.{one}" for one in (*_QKV, "proj_mlp")), rows="hidden_size"
    ),
}
_ORIGINAL_DOUBLE: Table = {
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
}
_ORIGINAL_SINGLE: Table = {
    "mod.linear": "modulation.lin",
    "linear1": "linear1",
    "linear2": "linear2",
    "heads.joint_q_norm": "norm.query_norm.scale",
    "heads.joint_k_norm": "norm.key_norm.scale",
}
_ORIGINAL_TABLE: Table = {
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
    **{f"double_blocks.#.{ours}": f"double_blocks.#.{theirs}" for ours, theirs in _ORIGINAL_DOUBLE.items()},
    **{f"single_blocks.#.{ours}": f"single_blocks.#.{theirs}" for ours, theirs in _ORIGINAL_SINGLE.items()},
}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """All but `rope_dims` of heads that are not 128 wide, which are refused."""
    hidden, channels = shapes.of("img_in.weight")
    text, pooled = shapes.of("txt_in.weight")[1], shapes.of("vector_in.in_layer.weight")[1]
    (head_dim,) = shapes.of("double_blocks.0.img_attn.norm.query_norm.scale")
    if head_dim != 128:
        raise UserError(
            f"FLUX weights: heads are {head_dim} wide, so rope_dims are not the published ones; give model_args"
        )
    return {
        "latent_channels": channels // PATCH_SIZE**2,
        "hidden_size": hidden,
        "depth_double": shapes.count(r"double_blocks\.(\d+)\."),
        "depth_single": shapes.count(r"single_blocks\.(\d+)\."),
        "num_heads": hidden // head_dim,
        "text_dim": text,
        "pooled_dim": pooled,
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
    }


# Neither of theirs has another patch, width of the MLP or base of the rotary frequencies.
_FIXED = {"patch_size": PATCH_SIZE, "mlp_ratio": 4.0, "rope_theta": 10_000.0}
DIFFUSERS = Format(
    "flux",
    "FLUX weights",
    lambda net: _TABLE,
    "FluxTransformer2DModel",
    config={
        # of tokens that its pipeline has packed 2 x 2
        "in_channels": Key(64, lambda net: net.latent_channels * PATCH_SIZE**2),
        # FLUX.1-Fill and -Canny take more channels in than they give; that is another network
        "out_channels": Key(None, lambda net: net.latent_channels * PATCH_SIZE**2),
        "num_layers": Key(19, "depth_double"),
        "num_single_layers": Key(38, "depth_single"),
        "attention_head_dim": Key(128, lambda net: net.hidden_size // net.num_heads),
        "num_attention_heads": Key(24, "num_heads"),
        "joint_attention_dim": Key(4096, "text_dim"),
        "pooled_projection_dim": Key(768, "pooled_dim"),
        "guidance_embeds": Key(False, "guidance_embed"),
        "axes_dims_rope": Key([16, 56, 56], "rope_dims"),
    },
    constants={"patch_size": 1},
    none_means={"out_channels": "in_channels"},
    arguments={
        "latent_channels": lambda config: config["in_channels"] // PATCH_SIZE**2,
        "patch_size": lambda config: PATCH_SIZE,
        "hidden_size": lambda config: config["num_attention_heads"] * config["attention_head_dim"],
    },
    fixed=_FIXED,
)
ORIGINAL = Format(
    "flux",
    "FLUX weights",
    lambda net: _ORIGINAL_TABLE,
    from_shapes=_args_of,
    fixed=_FIXED,
    file="flux1.safetensors",
    prefix="model.diffusion_model.",
)


def tuning_of(args: Mapping[str, Any]) -> Tuning:
    """Of dev, which is told the guidance scale that it obeys, and of schnell. Tokens, steps and scales are the defaults of diffusers'
    pipeline, times those of the recipe flux/dev."""
    told = {"constants": {"guidance": 3.5}} if args.get("guidance_embed") else {}
    times = {"name": "logit_normal", "mean": 0.0, "std": 1.0}
    return Tuning(
        (512, 0),
        ("text", "pooled_2"),
        {"name": "denoising", "times": times, "null": "empty", **told},
        {"steps": 28 if told else 4, "guidance": 1.0, "spacing": "trailing"},
        latent_size=128,
    )


FAMILY = Family(
    {"diffusers": DIFFUSERS, "original": ORIGINAL},
    tuning=tuning_of,
    kohya=ORIGINAL.layout,
    pipeline=Pipeline(
        "FluxPipeline",
        text=(
            TextSlot("text_encoder", "tokenizer", "CLIPTextModel"),
            TextSlot("text_encoder_2", "tokenizer_2", "T5EncoderModel"),
        ),
        trained_on=("T5EncoderModel", "CLIPTextModel"),
        conditions=("text", "pooled_2"),
        shifts=True,
        scheduler=flow_match,
        null_of=composed_null(DIFFUSERS),
        guidance="true_cfg_scale",
    ),
)
