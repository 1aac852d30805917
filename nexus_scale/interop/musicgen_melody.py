"""MusicGen's melody model in transformers (MusicgenMelodyForConditionalGeneration), as tables; to the bit. See musicgen.py."""

from __future__ import annotations

from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.musicgen import ARGUMENTS, CONFIG, CONSTANTS, OTHERS, table
from nexus_scale.interop.published import Family

FORM = Format(
    "musicgen_melody",
    "MusicGen melody weights",
    lambda net: {**table(net), **({} if net.chroma_in is None else {"chroma_in": "audio_enc_to_dec_proj"})},
    "MusicgenMelodyForConditionalGeneration",
    config={**CONFIG, "num_chroma": Key(12, "chroma_dim"), "chroma_length": Key(235, "chroma_length")},
    constants=CONSTANTS,
    arguments=ARGUMENTS,
    loose=("text_encoder.d_model",),
    free=("dropout",),
    others=OTHERS,
    file="model.safetensors",
    part="musicgen",
    model_type="musicgen_melody",
)
FAMILY = Family({"transformers": FORM})
