"""PrefixLM in a file of its own names: the weights of VideoPoet and of SoundStorm's reader are not published."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family
from nexus_scale.interop.token_blocks import blocks_of, told_of


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show. Of streams that have an end, only K (V + 1) is among it, so that they are taken for one."""
    entries, hidden = shapes.of("embed.table.rows")
    logits = shapes.of("head.weight")[0]
    ends = logits == entries
    streams = 1 if ends else entries - logits
    return {
        "num_codebooks": streams,
        "codebook_size": entries // max(1, streams) - 1,
        "ends": ends,
        "hidden_size": hidden,
        **blocks_of(shapes, "token_blocks"),
        **told_of(shapes),
        "num_phonemes": shapes["told.phonemes.rows"][0] if "told.phonemes.rows" in shapes else 0,
    }


OWN = own_format(
    "prefix_lm", "weights of a prefix language model", _args_of, free=("num_heads", "dropout", "pace", "num_tokens")
)
FAMILY = Family({"original": OWN})
