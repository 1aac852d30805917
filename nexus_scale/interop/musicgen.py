"""MusicGen's decoder in transformers (MusicgenForConditionalGeneration), as tables; to the bit.

Their folder holds a text encoder and a codec beside it, which are not read here: runs name both under `data.encoders`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nexus_scale.interop.formats import Apart, Format, Key, Row, Stacked, Table
from nexus_scale.interop.published import Family

OTHERS = ("text_encoder.", "audio_encoder.")
"""Parts of their checkpoints that are no decoder."""

_LAYERS = "decoder.model.decoder.layers.#"
_BLOCK: dict[str, Row] = {
    "norm1": f"{_LAYERS}.self_attn_layer_norm",
    "qkv": Apart(tuple(f"{_LAYERS}.self_attn.{part}_proj" for part in "qkv")),
    "proj": f"{_LAYERS}.self_attn.out_proj",
    "norm2": f"{_LAYERS}.final_layer_norm",
    "fc1": f"{_LAYERS}.fc1",
    "fc2": f"{_LAYERS}.fc2",
}
_READING: dict[str, Row] = {
    "norm_text": f"{_LAYERS}.encoder_attn_layer_norm",
    "text_q": f"{_LAYERS}.encoder_attn.q_proj",
    "text_kv": Apart(tuple(f"{_LAYERS}.encoder_attn.{part}_proj" for part in "kv")),
    "text_proj": f"{_LAYERS}.encoder_attn.out_proj",
}


def table(net: Any) -> Table:
    """Of the decoder with the text's projection."""
    blocks = _BLOCK | (_READING if net.reads_text else {})
    return {
        "code_embed.rows": Stacked("decoder.model.decoder.embed_tokens.#.weight"),
        "heads.weight": Stacked("decoder.lm_heads.#.weight"),
        "norm": "decoder.model.decoder.layer_norm",
        **({} if net.text_in is None else {"text_in": "enc_to_dec_proj"}),
        **{f"music_blocks.#.{ours}": theirs for ours, theirs in blocks.items()},
    }


def _text_dim(config: Mapping[str, Any]) -> int:
    """T5 calls it d_model, BERT and its kin hidden_size."""
    stated = config["text_encoder.d_model"]
    return int(config.get("text_encoder.hidden_size", 768) if stated is None else stated)


CONFIG: dict[str, Key] = {
    "decoder.vocab_size": Key(2048, "codebook_size"),
    "decoder.num_codebooks": Key(4, "num_codebooks"),
    "decoder.hidden_size": Key(1024, "hidden_size"),
    "decoder.num_hidden_layers": Key(24, "depth"),
    "decoder.num_attention_heads": Key(16, "num_heads"),
    "decoder.ffn_dim": Key(4096, lambda net: int(net.hidden_size * net.mlp_ratio)),
    "decoder.dropout": Key(0.1, "dropout"),
    "decoder.pad_token_id": Key(2048, lambda net: net.codebook_size),
    "decoder.bos_token_id": Key(2048, lambda net: net.codebook_size),
    "text_encoder.d_model": Key(None, "text_dim"),
}
CONSTANTS: dict[str, Any] = {
    "decoder.activation_function": "gelu",
    "decoder.scale_embedding": False,
    "decoder.layerdrop": 0.0,
    "decoder.attention_dropout": 0.0,
    "decoder.activation_dropout": 0.0,
}
ARGUMENTS = {
    "mlp_ratio": lambda config: config["decoder.ffn_dim"] / config["decoder.hidden_size"],
    "text_dim": _text_dim,
}
FORM = Format(
    "musicgen",
    "MusicGen weights",
    table,
    "MusicgenForConditionalGeneration",
    config=CONFIG,
    constants={**CONSTANTS, "decoder.cross_attention_hidden_size": None},
    arguments=ARGUMENTS,
    loose=("text_encoder.d_model",),
    free=("dropout",),
    others=OTHERS,
    file="model.safetensors",
    part="musicgen",
    model_type="musicgen",
)
FAMILY = Family({"transformers": FORM})
