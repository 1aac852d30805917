"""CogVideoX in diffusers (CogVideoXTransformer3DModel), as tables; to the bit.

We fuse q, k and v (rows in that order), which diffusers keeps apart, and flatten the patches' convolution to a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.interop.formats import Apart, Format, Key, Patches, Table
from nexus_scale.interop.layout import Rows
from nexus_scale.interop.pipelines import Pipeline, TextSlot, Tuning, null_prompt
from nexus_scale.interop.published import Family, begins_alike
from nexus_scale.processes.chains import ScaledLinear
from nexus_scale.processes.paths import find_path

SCHEDULERS = {"ancestral": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
"""Our samplers, and the schedulers that take their steps."""
TEMPORAL_RATIO = 4
"""Frames that a latent frame stands for; diffusers' `sample_frames` counts the former."""

_BLOCKS: Table = {
    "norm1": "norm1.norm",
    "norm1.linear": "norm1.linear",
    "norm2": "norm2.norm",
    "norm2.linear": "norm2.linear",
    "proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    **{f"heads.{which}_{kind}": f"attn1.norm_{which}.{kind}" for which in ("q", "k") for kind in ("weight", "bias")},
}
_TABLE: Table = {
    "patch_embed": Patches("patch_embed.proj"),
    "text_embed": "patch_embed.text_proj",
    "time_embed.fc1": "time_embedding.linear_1",
    "time_embed.fc2": "time_embedding.linear_2",
    "final.norm": "norm_final",
    "final": "norm_out.norm",
    "final.mod": "norm_out.linear",
    "final.linear": "proj_out",
    **{f"joint_blocks.#.{ours}": f"transformer_blocks.#.{theirs}" for ours, theirs in _BLOCKS.items()},
    "joint_blocks.#.qkv": Apart(tuple(f"transformer_blocks.#.attn1.{one}" for one in ("to_q", "to_k", "to_v"))),
}


def scheduler_config(
    objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int] = ()
) -> dict[str, Any]:
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


def _table(net: Any) -> Table:
    if net.place_table is None:
        return _TABLE
    table = (Rows("patch_embed.pos_embedding", 0, 1, (1, *net.place_table.rows.shape)),)
    return {**_TABLE, "place_table.rows": table}


def _positions(config: Mapping[str, Any]) -> str:
    if config["use_learned_positional_embeddings"]:
        return "learned"
    return "rotary" if config["use_rotary_positional_embeddings"] else "sincos"


DIFFUSERS = Format(
    "cogvideox",
    "CogVideoX weights",
    _table,
    "CogVideoXTransformer3DModel",
    config={
        "num_attention_heads": Key(30, "num_heads"),
        "attention_head_dim": Key(64, lambda net: net.hidden_size // net.num_heads),
        "in_channels": Key(16, lambda net: net.latent_channels + net.beside_channels),
        "out_channels": Key(16, "latent_channels"),
        "time_embed_dim": Key(512, "time_dim"),
        "text_embed_dim": Key(4096, "text_dim"),
        "num_layers": Key(30, "depth"),
        "sample_width": Key(90, "latent_width"),
        "sample_height": Key(60, "latent_height"),
        "sample_frames": Key(49, lambda net: (net.latent_frames - 1) * TEMPORAL_RATIO + 1),
        "patch_size": Key(2, "patch_size"),
        "max_text_seq_length": Key(226, "text_tokens"),
        "spatial_interpolation_scale": Key(1.875, "spatial_scale"),
        "temporal_interpolation_scale": Key(1.0, "temporal_scale"),
        "use_rotary_positional_embeddings": Key(False, lambda net: net.positions != "sincos"),
        "use_learned_positional_embeddings": Key(False, lambda net: net.positions == "learned"),
    },
    constants={
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "ofs_embed_dim": None,
        "dropout": 0.0,
        "attention_bias": True,
        "patch_size_t": None,
        "temporal_compression_ratio": TEMPORAL_RATIO,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "patch_bias": True,
    },
    arguments={
        "hidden_size": lambda config: config["num_attention_heads"] * config["attention_head_dim"],
        "latent_frames": lambda config: (config["sample_frames"] - 1) // TEMPORAL_RATIO + 1,
        "beside_channels": lambda config: config["in_channels"] - config["out_channels"],
        "positions": _positions,
    },
    loose=("sample_frames",),
    fixed={"mlp_ratio": 4.0},
)


def _null_of(null: Cond, args: Mapping[str, Any]) -> dict[str, Tensor]:
    return null_prompt(null["text"], null.get("text_mask"), None)


def tuning_of(args: Mapping[str, Any]) -> Tuning:
    """Prompts are padded to as many tokens as the network is for. Steps and scale are the defaults of diffusers' pipeline."""
    name = "first_frame" if args.get("beside_channels") else "denoising"
    learns = {"name": name, "times": "discrete", "null": "empty"}
    return Tuning((int(args["text_tokens"]),), ("text",), learns, {"steps": 50, "guidance": 6.0})


def pipeline_of(args: Mapping[str, Any]) -> Pipeline:
    """diffusers' pipeline for a network of these arguments: image to video where it is given frames."""
    return Pipeline(
        "CogVideoXImageToVideoPipeline" if args.get("beside_channels") else "CogVideoXPipeline",
        text=(TextSlot("text_encoder", "tokenizer", "T5EncoderModel"),),
        trained_on=("T5EncoderModel",),
        conditions=("text",),
        scheduler=scheduler_config,
        null_of=_null_of,
    )


FAMILY = Family(
    {"diffusers": DIFFUSERS},
    tuning=tuning_of,
    pipeline=pipeline_of,
    # image to video with a network of text alone
    begins_from={
        "cogvideox": begins_alike(
            fresh=("place_table.",), may_differ=("beside_channels", "positions"), wider=("patch_embed.weight",)
        )
    },
)
