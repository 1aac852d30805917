"""FactorisedDiffusion in a file of its own names: NaturalSpeech 3's networks but the codec are not published."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family
from nexus_scale.interop.token_blocks import blocks_of


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; heads are not among it, nor which level is the first that a network draws."""
    drawn, size, hidden = shapes.of("heads.rows")
    return {
        "num_phonemes": shapes.of("phoneme_embed.rows")[0],
        "num_codebooks": shapes.of("embed.table.rows")[0] // (size + 1),
        "codebook_size": size,
        "levels": (0, drawn),
        "hidden_size": hidden,
        "text_depth": shapes.count(r"text_blocks\.(\d+)\."),
        **blocks_of(shapes, "token_blocks"),
    }


OWN = own_format("factorised_diffusion", "NaturalSpeech 3 weights", _args_of, free=("levels", "num_heads", "dropout"))
FAMILY = Family({"original": OWN})
