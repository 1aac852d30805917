"""Voicebox's duration model alone; see voicebox.py."""

from nexus_scale.interop.formats import own_format
from nexus_scale.interop.published import Family
from nexus_scale.interop.voicebox import trunk_of

OWN = own_format("voicebox_durations", "weights of Voicebox's durations", trunk_of, free=("num_heads", "dropout"))
FAMILY = Family({"original": OWN})
