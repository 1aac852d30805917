"""MelVocoder by its own names: Vocos's decoder with a transform of our own to both sides; see voicebox.py."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.phone_aligner import trunk_of
from nexus_scale.interop.published import Family


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """Rate, hop and statistics are in no tensor."""
    inner = {name.removeprefix("decoder."): shape for name, shape in shapes.items() if name.startswith("decoder.")}
    return {**trunk_of(Shapes(inner)), "window": shapes.of("decoder.head.weight")[0] - 2}


OWN = own_format(
    "mel_vocoder",
    "weights of a vocoder",
    _args_of,
    free=("sample_rate_hz", "segment_seconds", "hop", "mel_mean", "mel_std"),
)
FAMILY = Family({"original": OWN})
