"""MMDiTControlNet in diffusers (SD3ControlNetModel), as tables; to the bit. Its copied blocks are the network's in `mmdit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nexus_scale.interop.control_nets import from_base, settings_of, table_of
from nexus_scale.interop.formats import Copy, Format, Key, Made, Patches
from nexus_scale.interop.mmdit import DIFFUSERS as NETWORK
from nexus_scale.interop.published import Family
from nexus_scale.models.diffusion.mmdit import MMDiT


def _base(config: Mapping[str, Any]) -> Callable[[], MMDiT]:
    """What makes a network of one block more, which is none of the copied ones."""
    own = {key: config[key] for key in NETWORK.config if key in config}
    args = NETWORK.model_args({**own, "num_layers": config["num_layers"] + 1, "out_channels": config["in_channels"]})
    return partial(MMDiT, **args)


def _of_twin(made: Copy | Made) -> Copy | Made:
    """What the network computes of itself, of its copy."""
    assert isinstance(made, Made)
    return made._replace(make=lambda net: made.make(net.twin))


DIFFUSERS = Format(
    "mmdit_control_net",
    "SD3 ControlNet weights",
    table_of(NETWORK, {"condition_embed": Patches("pos_embed_input.proj"), "block_projs.#": "controlnet_blocks.#"}),
    "SD3ControlNetModel",
    config={
        **settings_of(NETWORK, ("out_channels",)),
        "extra_conditioning_channels": Key(0, lambda net: net.condition_channels - net.twin.latent_channels),
    },
    constants={"pos_embed_type": "sincos", "use_pos_embed": True, "force_zeros_for_pooled_projection": True},
    arguments={
        "base": _base,
        "depth": lambda config: config["num_layers"],
        "condition_channels": lambda config: config["in_channels"] + config["extra_conditioning_channels"],
    },
    loose=("force_zeros_for_pooled_projection",),
    free=("base",),
    computed=lambda net: {key: _of_twin(made) for key, made in NETWORK.computed(net.twin).items()},
    part="controlnet",
)


FAMILY = Family(
    {"diffusers": DIFFUSERS}, begins_from={"mmdit": from_base(("depth", "latent_size", "text_scale", "pooled_scale"))}
)
