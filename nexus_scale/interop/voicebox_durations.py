"""Voicebox's duration model alone; see voicebox.py."""

from nexus_scale.interop.formats import Format
from nexus_scale.interop.published import Family
from nexus_scale.interop.voicebox import FILE, own_names, trunk_of

OWN = Format(
    "voicebox_durations", "weights of Voicebox's durations", own_names, from_shapes=trunk_of, free=("num_heads", "dropout"), file=FILE
)  # fmt: skip
FAMILY = Family({"safetensors": OWN})
