"""UNetControlNet in diffusers (ControlNetModel), as tables; to the bit. Its copy of the way down is the network's in `unet_condition`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from nexus_scale.contracts import ReadShard
from nexus_scale.interop.formats import Format, Key, Table
from nexus_scale.interop.published import Family, Readers, begins_alike
from nexus_scale.interop.unet_condition import DIFFUSERS as NETWORK
from nexus_scale.models.diffusion.unet_condition import UNetCondition

TWIN = "twin."
_UP = {"sample_size", "out_channels", "up_block_types", "dropout", "time_embedding_dim", "time_cond_proj_dim"}
_UP |= {"mid_block_only_cross_attention"}
"""Settings of the network's config that its copy has none of."""
_NOT_THERE = {
    "center_input_sample", "reverse_transformer_layers_per_block", "dual_cross_attention", "resnet_skip_time_act",
    "resnet_out_scale_factor", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act", "conv_in_kernel", "conv_out_kernel",
    "attention_type", "class_embeddings_concat", "cross_attention_norm",
}  # fmt: skip


def _table(net: Any) -> Table:
    own = {
        **{
            f"condition_embed.{part}": f"controlnet_cond_embedding.{part}"
            for part in ("conv_in", "blocks.#", "conv_out")
        },
        "down_convs.#": "controlnet_down_blocks.#",
        "middle_conv": "controlnet_mid_block",
    }
    return {**{f"{TWIN}{ours}": row for ours, row in NETWORK.table(net.twin).items()}, **own}


def _of_twin(key: Key) -> Callable[[Any], Any]:
    return lambda net: getattr(net.twin, key.ours) if isinstance(key.ours, str) else key.ours(net.twin)


def _base(config: Mapping[str, Any]) -> Callable[[], UNetCondition]:
    """What makes a network that such a copy fits: its way up mirrors the way down."""
    up = [str(kind).replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    own = {key: config[key] for key in NETWORK.config if key in config}
    whole = {**own, "up_block_types": up, "out_channels": config["in_channels"], "sample_size": None}
    return partial(UNetCondition, **NETWORK.model_args(whole))


DIFFUSERS = Format(
    "unet_control_net",
    "ControlNet weights",
    _table,
    "ControlNetModel",
    config={
        **{name: Key(key.default, _of_twin(key), key.valid) for name, key in NETWORK.config.items() if name not in _UP},
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


def _from_base(ours: Any, theirs: Any, read: ReadShard, what: str) -> Readers:
    """It begins with the weights of the network that it copies."""
    may_differ = ("latent_size", "dropout", "learn_sigma", "latent_channels", "beside_channels", "linear_projection")
    copied: Mapping[str, Callable[[int, int], Tensor]] = begins_alike(may_differ=may_differ)(
        ours.twin, theirs, read, what
    )
    return {f"{TWIN}{name}": reads for name, reads in copied.items()}


FAMILY = Family({"diffusers": DIFFUSERS}, begins_from={"unet_condition": _from_base})
