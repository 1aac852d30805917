"""UNetControlNet in diffusers (ControlNetModel), as tables; to the bit. Its copy of the way down is the network's in `unet_condition`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nexus_scale.interop.control_nets import from_base, settings_of, table_of
from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.published import Family
from nexus_scale.interop.unet_condition import DIFFUSERS as NETWORK
from nexus_scale.models.diffusion.unet_condition import UNetCondition

_UP = {
    "sample_size", "out_channels", "up_block_types", "dropout", "time_embedding_dim", "time_cond_proj_dim",
    "mid_block_only_cross_attention",
}  # fmt: skip
"""Settings of the network's config that its copy has none of."""
_NOT_THERE = {
    "center_input_sample", "reverse_transformer_layers_per_block", "dual_cross_attention", "resnet_skip_time_act",
    "resnet_out_scale_factor", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act", "conv_in_kernel", "conv_out_kernel",
    "attention_type", "class_embeddings_concat", "cross_attention_norm",
}  # fmt: skip


def _base(config: Mapping[str, Any]) -> Callable[[], UNetCondition]:
    """What makes a network that such a copy fits: its way up mirrors the way down."""
    up = [str(kind).replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    own = {key: config[key] for key in NETWORK.config if key in config}
    whole = {**own, "up_block_types": up, "out_channels": config["in_channels"], "sample_size": None}
    return partial(UNetCondition, **NETWORK.model_args(whole))


DIFFUSERS = Format(
    "unet_control_net",
    "ControlNet weights",
    table_of(
        NETWORK,
        {
            **{
                f"condition_embed.{part}": f"controlnet_cond_embedding.{part}"
                for part in ("conv_in", "blocks.#", "conv_out")
            },
            "down_convs.#": "controlnet_down_blocks.#",
            "middle_conv": "controlnet_mid_block",
        },
    ),
    "ControlNetModel",
    config={
        **settings_of(NETWORK, _UP),
        "conditioning_channels": Key(3, "condition_channels"),
        "conditioning_embedding_out_channels": Key((16, 32, 96, 256), "condition_widths"),
    },
    constants={
        **{name: value for name, value in NETWORK.constants.items() if name not in _NOT_THERE},
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
        "addition_embed_type_num_heads": 64,
    },
    arguments={"base": _base},
    loose=NETWORK.loose,
    free=("base",),
    part="controlnet",
)
FAMILY = Family(
    {"diffusers": DIFFUSERS},
    begins_from={
        "unet_condition": from_base(
            ("latent_size", "dropout", "learn_sigma", "latent_channels", "beside_channels", "linear_projection")
        )
    },
)
