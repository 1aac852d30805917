"""ClipText in transformers (CLIPTextModel, CLIPTextModelWithProjection), as tables; to the bit.

Newer versions of transformers leave `text_model.` out of the names of the class without projection; both are read.
"""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Apart, Format, Key, Row, Table
from nexus_scale.interop.published import Family

_LAYER = "text_model.encoder.layers.#"
_BLOCK: dict[str, Row] = {
    "norm1": f"{_LAYER}.layer_norm1",
    "qkv": Apart(tuple(f"{_LAYER}.self_attn.{part}_proj" for part in "qkv")),
    "proj": f"{_LAYER}.self_attn.out_proj",
    "norm2": f"{_LAYER}.layer_norm2",
    "fc1": f"{_LAYER}.mlp.fc1",
    "fc2": f"{_LAYER}.mlp.fc2",
}


def _table(net: Any) -> Table:
    return {
        "token_embed.rows": "text_model.embeddings.token_embedding.weight",
        "place_embed.rows": "text_model.embeddings.position_embedding.weight",
        "norm": "text_model.final_layer_norm",
        **({} if net.project is None else {"project": "text_projection"}),
        **{f"text_blocks.#.{ours}": theirs for ours, theirs in _BLOCK.items()},
    }


PROJECTED = "CLIPTextModelWithProjection"

TRANSFORMERS = Format(
    "clip_text",
    "CLIP's text weights",
    _table,
    "CLIPTextModel",
    config={
        "architectures": Key(["CLIPTextModel"], lambda net: [PROJECTED if net.projection_dim else "CLIPTextModel"]),
        "vocab_size": Key(49_408, "num_tokens"),
        "max_position_embeddings": Key(77, "max_tokens"),
        "hidden_size": Key(512, "hidden_size"),
        "num_hidden_layers": Key(12, "depth"),
        "num_attention_heads": Key(8, "num_heads"),
        "intermediate_size": Key(2048, "mlp_width"),
        "hidden_act": Key("quick_gelu", "activation", ("quick_gelu", "gelu")),
        "projection_dim": Key(512, lambda net: net.projection_dim or 512),
        "eos_token_id": Key(49_407, "eos_token"),
    },
    constants={"layer_norm_eps": 1e-5, "attention_dropout": 0.0},
    arguments={
        "projection_dim": lambda config: config["projection_dim"] if config["architectures"] == [PROJECTED] else 0
    },
    loose=("projection_dim",),
    free=("states",),
    # to the names without `text_model.`, and from those to the ones with it
    old_names={
        "text_model.": "",
        "embeddings.": "text_model.embeddings.",
        "encoder.": "text_model.encoder.",
        "final_layer_norm.": "text_model.final_layer_norm.",
    },
    others=("text_model.embeddings.position_ids",),
    file="model.safetensors",
    part="text_encoder",
    model_type="clip_text_model",
)
FAMILY = Family({"transformers": TRANSFORMERS})
