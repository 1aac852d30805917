"""DiT in diffusers (DiTTransformer2DModel), as tables; to the bit.

Two things differ beside names. diffusers keeps an embedder of time and class in every block (749.8 M parameters at XL/2
instead of 674.8 M), all equal unless someone trained that class: they become one on import and copies on export. And we
fuse q, k, v (rows in that order), which diffusers keeps apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Apart, Copy, Format, Key, Made, Patches, State, Table
from nexus_scale.interop.pipelines import Pipeline
from nexus_scale.interop.published import Family, begins_alike
from nexus_scale.interop.schedulers import chain
from nexus_scale.processes.chains import DDPMLinear
from nexus_scale.processes.paths import find_path

PIPELINE_CLASSES = 1000
"""diffusers' DiTPipeline takes row 1000 of the label table for no class, whatever the number of classes."""

_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_REPEATED = {
    "time_embed.fc1.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "time_embed.fc1.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "time_embed.fc2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "time_embed.fc2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "label_embed.table": "norm1.emb.class_embedder.embedding_table.weight",
}
"""Of the embedder that each block repeats; the table takes it from the first."""
_TABLE: Table = {
    "patch_embed": Patches("pos_embed.proj"),
    "final.mod.linear": "proj_out_1",
    "final.linear": "proj_out_2",
    **{ours: f"transformer_blocks.0.{theirs}" for ours, theirs in _REPEATED.items()},
    "dit_blocks.#.mod.linear": "transformer_blocks.#.norm1.linear",
    "dit_blocks.#.qkv": Apart(tuple(f"transformer_blocks.#.{one}" for one in _QKV)),
    "dit_blocks.#.proj": "transformer_blocks.#.attn1.to_out.0",
    "dit_blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "dit_blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def _copies(net: Any) -> Mapping[str, Copy | Made]:
    return {
        f"transformer_blocks.{i}.{theirs}": Copy(
            ours,
            f"{theirs} of block {i} differs from that of block 0; DiT has one embedder for all blocks, so weights trained as "
            "DiTTransformer2DModel cannot be held",
        )
        for ours, theirs in _REPEATED.items()
        for i in range(1, net.depth)
    }


def widened(state: State, args: Mapping[str, Any], classes: int = PIPELINE_CLASSES) -> tuple[State, dict[str, Any]]:
    """The same network with a label table of at least `classes` classes and the one for none, which fills the new rows."""
    table = state["label_embed.table"]
    more = max(0, classes - (len(table) - 1))
    rows = torch.cat((table, table[-1:].expand(more, -1)))
    return {**state, "label_embed.table": rows}, {**args, "num_classes": len(rows) - 1}


def scheduler_config(
    objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int] = ()
) -> dict[str, Any]:
    """The DDIMScheduler that walks this model in diffusers' DiTPipeline, from the recipe's `objective:` and `sample:`; where samples are
    clipped and no variance is drawn, what `schedulers.chain` finds.

    Raises:
        UserError: diffusers has none: DiT counts DDPM's linear steps, and other paths have other schedulers.
    """
    path, target = find_path(objective.get("path", "rectified_flow")), objective.get("target", "velocity")
    if not isinstance(path, DDPMLinear) or path.snr_shift != 1 or target not in _PREDICTIONS:
        raise UserError(
            "diffusers' DiTPipeline walks DDPM's linear steps (path: ddpm_linear with target eps, v or x0); "
            f"this recipe has path {path} and target {target}"
        )
    if sample.get("variance") == "none" and sample.get("clip"):
        return chain({**objective, "variance": "fixed"}, sample)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": path.steps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": "linear",
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "prediction_type": _PREDICTIONS[target],
        "timestep_spacing": sample.get("spacing", "linspace"),
        "clip_sample": bool(sample.get("clip", False)),
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }


DIFFUSERS = Format(
    "dit",
    "DiT weights",
    lambda net: _TABLE,
    "DiTTransformer2DModel",
    config={
        "num_attention_heads": Key(16, "num_heads"),
        "attention_head_dim": Key(72, lambda net: net.hidden_size // net.num_heads),
        "in_channels": Key(4, "latent_channels"),
        "out_channels": Key(None, lambda net: net.out_channels),
        "num_layers": Key(28, "depth"),
        "sample_size": Key(32, "latent_size"),
        "patch_size": Key(2, "patch_size"),
        "num_embeds_ada_norm": Key(1000, "num_classes"),
        "norm_eps": Key(1e-5, "mlp_norm_eps"),
    },
    constants={
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    none_means={"out_channels": "in_channels"},
    arguments={
        "hidden_size": lambda config: config["num_attention_heads"] * config["attention_head_dim"],
        "learn_sigma": lambda config: config["out_channels"] == 2 * config["in_channels"],
    },
    fixed={"mlp_ratio": 4.0, "frequency_shift": 1, "numbers": ()},
    # some versions store the table of positions, and some leave it out
    computed=lambda net: {**_copies(net), "pos_embed.pos_embed": Made(lambda net: torch.empty(0), written=False)},
)
FAMILY = Family(
    {"diffusers": DIFFUSERS},
    pipeline=Pipeline("DiTPipeline", scheduler=scheduler_config, prepared=widened),
    begins_from={"dit": begins_alike(fresh=("number_embeds.",), may_differ=("numbers",))},
)
