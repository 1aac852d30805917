"""FluxControlNet in diffusers (FluxControlNetModel), as tables; to the bit. Its copied blocks are the network's in `flux`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nexus_scale.interop.control_nets import from_base, settings_of, table_of
from nexus_scale.interop.flux import DIFFUSERS as NETWORK
from nexus_scale.interop.flux import PATCH_SIZE
from nexus_scale.interop.formats import Format
from nexus_scale.interop.published import Family
from nexus_scale.models.diffusion.flux import Flux


def _base(config: Mapping[str, Any]) -> Callable[[], Flux]:
    own = {key: config[key] for key in (*NETWORK.config, *NETWORK.constants) if key in config}
    return partial(Flux, **NETWORK.model_args({**own, "out_channels": None}))


DIFFUSERS = Format(
    "flux_control_net",
    "FLUX ControlNet weights",
    table_of(
        NETWORK,
        {
            "condition_embed": "controlnet_x_embedder",
            "double_projs.#": "controlnet_blocks.#",
            "single_projs.#": "controlnet_single_blocks.#",
        },
    ),
    "FluxControlNetModel",
    config=settings_of(NETWORK, ("out_channels",)),
    # the union of several kinds, and pictures as pixels, are other networks
    constants={**NETWORK.constants, "num_mode": None, "conditioning_embedding_channels": None},
    arguments={
        "base": _base,
        "depth_double": lambda config: config["num_layers"],
        "depth_single": lambda config: config["num_single_layers"],
        "condition_channels": lambda config: config["in_channels"] // PATCH_SIZE**2,
    },
    free=("base",),
    part="controlnet",
)
FAMILY = Family(
    {"diffusers": DIFFUSERS}, begins_from={"flux": from_base(("depth_double", "depth_single", "latent_size"))}
)
