"""MusicGen's decoder in transformers (MusicgenForConditionalGeneration), as tables; to the bit.

Their folder holds a text encoder and a codec beside it, which are not read here: runs name both under `data.encoders`. An export has them
where transformers has a class for both.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_scale.interop.folders import parsed_config, read_tensors, write_json, write_tensors
from nexus_scale.interop.formats import Apart, Format, Key, Row, Stacked, Table, own_memory
from nexus_scale.interop.published import Beside, Family, family

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
    "decoder.audio_channels": Key(1, "audio_channels"),
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
EXAMPLE = """from transformers import AutoTokenizer, MusicgenForConditionalGeneration

model = MusicgenForConditionalGeneration.from_pretrained(folder, local_files_only=True)
words = AutoTokenizer.from_pretrained(folder, local_files_only=True)(["a slow waltz"], padding=True, return_tensors="pt")
waves = model.generate(**words, do_sample=True, guidance_scale=3.0, top_k=250, max_new_tokens=503)  # (B, C, T)
"""


def whole(folder: Path, beside: Beside) -> str:
    """Puts a text encoder and an EncodecModel beside the decoder in its folder, with the tokenizer and what `generate` begins with."""
    from nexus_scale.interop.encoders import TOKENIZER_FILES, config_and_weights

    if len(beside.texts) != 1:
        return f"the run has {len(beside.texts)} text encoders, and transformers' class one"
    if beside.codec is None or beside.codec.family != "codec":
        has = "none" if beside.codec is None else f"a {beside.codec.family}"
        return f"the run's codec is {has}, and transformers' class has an EncodecModel"
    form, codec = family("codec").formats["transformers"], beside.codec
    sounds, coding = form.to_theirs(codec.network.state_dict(), codec.arguments)
    reads, reading = config_and_weights(beside.texts[0])
    tensors = read_tensors([folder / FORM.file])
    for prefix, weights in zip(OTHERS, (reading, coding), strict=True):
        tensors |= {f"{prefix}{name}": weight for name, weight in weights.items()}
    config = parsed_config(folder, FORM.class_name)
    begin = config["decoder"]["bos_token_id"]
    tokens = dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), begin)
    write_tensors(folder / FORM.file, own_memory(tensors))
    write_json(folder / "config.json", {**config, "text_encoder": reads, "audio_encoder": sounds})
    write_json(
        folder / "generation_config.json",
        {**tokens, "do_sample": True, "guidance_scale": 3.0, "top_k": 250, "max_length": 1500},
    )
    for name, values in form.beside(sounds).items():
        write_json(folder / name, values)
    for name in TOKENIZER_FILES:
        if (source := beside.texts[0].tokenizer / name).is_file():
            shutil.copyfile(source, folder / name)
    return ""


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
    example=EXAMPLE,
)
FAMILY = Family({"transformers": FORM}, whole={"transformers": whole})
