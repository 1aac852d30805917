"""FSQVAE as a model of diffusers whose code the folder carries, as tables; to the bit."""

from __future__ import annotations

from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.published import Family
from nexus_scale.interop.vq_vae import AUTO_MAP, CARRIED, CLASS_NAME, EXAMPLE, SIZES

DIFFUSERS = Format(
    "fsq_vae",
    "FSQVAE weights",
    lambda net: {name: name for name in net.state_dict()},
    CLASS_NAME,
    config={
        **SIZES,
        "levels": Key((8, 5, 5, 5), "levels"),
        "latent_channels": Key(4, lambda net: len(net.levels)),
    },
    constants={"auto_map": AUTO_MAP},
    free=("image_size",),
    carried=(CARRIED,),
    example=EXAMPLE,
)
FAMILY = Family({"diffusers": DIFFUSERS})
