"""FACodec in Amphion's ns3_codec, as a table; to the bit.

The published `ns3_facodec_encoder.bin` and `ns3_facodec_decoder.bin` are two state dicts. Written into one safetensors file, the names of
the first after `encoder.` and of the second after `decoder.`, they are read as they are; an export is such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nexus_scale.interop.formats import Copy, Format, Made, Row, Shapes, State, Table
from nexus_scale.interop.published import Family
from nexus_scale.models.audio.snake import low_pass
from nexus_scale.models.layers.tokens import sinusoidal_places

_NORMED = {"gain": "weight_g", "direction": "weight_v", "bias": "bias"}
_HEADS = {
    "f0": "f0_predictor",
    "phones": "phone_predictor",
    "timbre": "x_timbre_predictor.1",
    "prosody_phones": "prosody_phone_predictor.1",
    "content_f0": "content_f0_predictor.1",
    "detail_f0": "res_f0_predictor.1",
    "detail_phones": "res_phone_predictor.1",
}
"""Those behind a reversed gradient come second, after the reversal."""
_PLACES = 5000
"""Rows of their table of sinusoids, of which one is looked at."""


def _normed(ours: str, theirs: str) -> dict[str, Row]:
    return {f"{ours}.{name}": f"{theirs}.{other}" for name, other in _NORMED.items()}


def _snake(ours: str, theirs: str) -> dict[str, Row]:
    return {f"{ours}.frequency": f"{theirs}.act.alpha", f"{ours}.size": f"{theirs}.act.beta"}


def _unit(ours: str, theirs: str) -> dict[str, Row]:
    return {
        **_snake(f"{ours}.snake1", f"{theirs}.block.0"),
        **_normed(f"{ours}.conv1", f"{theirs}.block.1"),
        **_snake(f"{ours}.snake2", f"{theirs}.block.2"),
        **_normed(f"{ours}.conv2", f"{theirs}.block.3"),
    }


def _coder(ours: str, theirs: str, stages: int, *, up: bool) -> dict[str, Row]:
    """Theirs are numbered through: the first convolution, stages, an activation and the last convolution; stages have the units first,
    or where they go up last."""
    rows = _normed(f"{ours}.conv_in", f"{theirs}.0")
    for stage in range(stages):
        inner, own = f"{theirs}.{stage + 1}.block", f"{ours}.stages.{stage}"
        for unit in range(3):
            rows |= _unit(f"{own}.units.{unit}", f"{inner}.{unit + 2 * up}")
        rows |= _snake(f"{own}.snake", f"{inner}.{0 if up else 3}")
        rows |= _normed(f"{own}.resample", f"{inner}.{1 if up else 4}")
    rows |= _snake(f"{ours}.snake", f"{theirs}.{stages + 1}")
    return rows | _normed(f"{ours}.conv_out", f"{theirs}.{stages + 2}")


def _head(name: str, answers: int) -> dict[str, Row]:
    ours, theirs = f"heads.{name}", f"decoder.{_HEADS[name]}"
    rows: dict[str, Row] = {}
    for unit in range(3):
        rows |= _unit(f"{ours}.units.{unit}", f"{theirs}.model.{unit}")
    rows |= _snake(f"{ours}.snake", f"{theirs}.model.3")
    return rows | {f"{ours}.answers.{k}": f"{theirs}.heads.{k}" for k in range(answers)}


_TIMBRE: dict[str, Row] = {
    "timbre.layers.#.norm1": "decoder.timbre_encoder.layers.#.ln_1",
    "timbre.layers.#.norm2": "decoder.timbre_encoder.layers.#.ln_2",
    "timbre.layers.#.qkv.weight": "decoder.timbre_encoder.layers.#.self_attn.in_proj_weight",
    "timbre.layers.#.qkv.bias": "decoder.timbre_encoder.layers.#.self_attn.in_proj_bias",
    "timbre.layers.#.proj": "decoder.timbre_encoder.layers.#.self_attn.out_proj",
    "timbre.layers.#.conv": "decoder.timbre_encoder.layers.#.ffn.ffn_1",
    "timbre.layers.#.out": "decoder.timbre_encoder.layers.#.ffn.ffn_2",
    "timbre.norm": "decoder.timbre_encoder.last_ln",
    "style": "decoder.timbre_linear",
}


def _table(net: Any) -> Table:
    stages = len(net.strides)
    rows = _coder("encoder", "encoder.block", stages, up=False) | _coder("decoder", "decoder.model", stages, up=True)
    for attribute, books in enumerate(net.quantizers):
        for k in range(len(books.books)):
            ours, theirs = f"quantizers.{attribute}.books.{k}", f"decoder.quantizer.{attribute}.layers.{k}"
            rows |= _normed(f"{ours}.project_in", f"{theirs}.in_proj") | _normed(
                f"{ours}.project_out", f"{theirs}.out_proj"
            )
            rows |= {f"{ours}.entries": f"{theirs}._codebook.weight"}
    for name in net.asked:
        rows |= _head(name, 2 if name.endswith("f0") else 1)
    return rows | _TIMBRE


@cache
def _filters(rows: tuple[str, ...]) -> Mapping[str, Copy | Made]:
    taps = Made(lambda net: low_pass().view(1, 1, -1), tolerance=1e-5, differs="is another filter than ours")
    found: dict[str, Copy | Made] = {}
    for name in (row.removesuffix(".act.alpha") for row in rows if row.endswith(".act.alpha")):
        found |= {f"{name}.upsample.filter": taps, f"{name}.downsample.lowpass.filter": taps}
    return found


def _places(net: Any) -> Tensor:
    return sinusoidal_places(torch.arange(_PLACES), net.attributes.latent_channels)[:, None]


def _beside(net: Any) -> Mapping[str, Copy | Made]:
    """The filters of every activation, and a table of sinusoids."""
    rows = tuple(row for row in _table(net).values() if isinstance(row, str))
    return {**_filters(rows), "decoder.timbre_encoder.position_emb.pe": Made(_places)}


def _without_speaker(state: State, args: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """Theirs asks the timbre nothing."""
    kept = {name: value for name, value in state.items() if not name.startswith("heads.speaker.")}
    return kept, {**args, "speaker_head": False}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; heads of attention are not among it."""
    stages = shapes.count(r"encoder\.block\.(\d+)\.block\.4\.")
    kernels = [shapes.of(f"encoder.block.{stage + 1}.block.4.weight_v")[2] for stage in range(stages)]
    books = [shapes.count(rf"decoder\.quantizer\.{attribute}\.layers\.(\d+)\.") for attribute in range(3)]
    size, dim = shapes.of("decoder.quantizer.0.layers.0._codebook.weight")
    asked = {name: f"decoder.{theirs}.heads.0.weight" for name, theirs in _HEADS.items()}
    args: dict[str, Any] = {
        "strides": tuple(kernel // 2 for kernel in kernels),
        "base_channels": shapes.of("encoder.block.0.weight_v")[0],
        "decoder_channels": shapes.of("decoder.model.0.weight_v")[0],
        "latent_channels": shapes.of("decoder.model.0.weight_v")[1],
        **dict(zip(("prosody_books", "content_books", "detail_books"), books, strict=True)),
        "codebook_size": size,
        "codebook_dim": dim,
        "timbre_depth": shapes.count(r"decoder\.timbre_encoder\.layers\.(\d+)\."),
        "timbre_mlp_channels": shapes.of("decoder.timbre_encoder.layers.0.ffn.ffn_2.weight")[1],
        "num_phones": shapes.of(asked["phones"])[0],
        "reversed_from": tuple(name for name in list(_HEADS)[2:] if asked[name] in shapes),
    }
    return {**args, "num_speakers": shapes[asked["timbre"]][0]} if asked["timbre"] in shapes else args


AMPHION = Format(
    "facodec",
    "FACodec weights",
    _table,
    from_shapes=_args_of,
    fixed={"speaker_head": False},
    prepared=_without_speaker,
    computed=_beside,
    file="model.safetensors",
)
FAMILY = Family({"amphion": AMPHION})
