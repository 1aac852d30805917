"""VALL-E weights <-> those of lifeiteng/vall-e (and of icefall's recipe, which descends from it), in both directions and to the bit.

That implementation holds both transformers in one module. Its first table of the second one has a row for padding more than
there are codes, which nothing looks at; its shared tables are in the state dict once as embedding and once as prediction layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import write_tensors
from nexus_scale.interop.layout import Layout, Rows, apart, whole
from nexus_scale.models.audio.valle_ar import ValleAR
from nexus_scale.models.audio.valle_nar import ValleNAR

WHAT = "VALL-E checkpoint"
_TABLE = "word_embeddings.weight"

# our module in a block -> theirs; of the second transformer the norm's own weights lie in norm1.norm and norm2.norm
_INSIDE = {
    "qkv.weight": "self_attn.in_proj_weight",
    "qkv.bias": "self_attn.in_proj_bias",
    "proj.weight": "self_attn.out_proj.weight",
    "proj.bias": "self_attn.out_proj.bias",
    "fc1.weight": "linear1.weight",
    "fc1.bias": "linear1.bias",
    "fc2.weight": "linear2.weight",
    "fc2.bias": "linear2.bias",
}


def _norm(ours: str, theirs: str, *, staged: bool) -> dict[str, str]:
    if not staged:
        return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    own = {f"{ours}.{kind}": f"{theirs}.norm.{kind}" for kind in ("weight", "bias")}
    return own | {f"{ours}.project.{kind}": f"{theirs}.project_layer.{kind}" for kind in ("weight", "bias")}


def _blocks(prefix: str, depth: int, *, staged: bool) -> dict[str, str]:
    names = _norm("norm", f"{prefix}.norm", staged=staged)
    for i in range(depth):
        ours, theirs = f"token_blocks.{i}.", f"{prefix}.layers.{i}."
        inside = _INSIDE | _norm("norm1", "norm1", staged=staged) | _norm("norm2", "norm2", staged=staged)
        names |= {ours + name: theirs + other for name, other in inside.items()}
    return names


def _ar_names(ar: ValleAR) -> dict[str, str]:
    """Our parameters that are one tensor of theirs."""
    return _blocks("ar_decoder", ar.depth, staged=False) | {
        "phoneme_embed.rows": f"ar_text_embedding.{_TABLE}",
        "code_embed.rows": f"ar_audio_embedding.{_TABLE}",
        "phoneme_places.scale": "ar_text_position.alpha",
        "code_places.scale": "ar_audio_position.alpha",
        "head.weight": "ar_predict_layer.weight",
    }


def _nar_names(nar: ValleNAR) -> dict[str, str]:
    """Our parameters that are one tensor of theirs: all but codes and stages."""
    return _blocks("nar_decoder", nar.depth, staged=True) | {"phoneme_embed.rows": f"nar_text_embedding.{_TABLE}"}


def to_original(ar: ValleAR, nar: ValleNAR) -> dict[str, Tensor]:
    """The state dict that their `VALLE` takes; its positions' constant scales are among it, the unused row is zero."""
    ours = {"ar": ar.state_dict(), "nar": nar.state_dict()}
    theirs: dict[str, Tensor] = {}
    for part, names in (("ar", _ar_names(ar)), ("nar", _nar_names(nar))):
        theirs |= {other: ours[part][name] for name, other in names.items()}
    tables, K = ours["nar"]["codes.rows"].unbind(0), nar.num_codebooks
    for k in range(K):
        padded = torch.cat([tables[0], torch.zeros_like(tables[0][:1])]) if k == 0 else tables[k]
        theirs[f"nar_audio_embeddings.{k}.{_TABLE}"] = padded
    for level in range(1, K):
        theirs[f"nar_predict_layers.{level - 1}.weight"] = tables[nar.codes.output(level)]
        theirs[f"nar_stage_embeddings.{level - 1}.{_TABLE}"] = ours["nar"]["stage_embed.rows"][level - 1 : level]
    for name in ("nar_text_position.alpha", "nar_audio_position.alpha"):
        theirs[name] = torch.ones(1, dtype=tables[0].dtype)
    return theirs


def from_original(state: Mapping[str, Tensor], num_heads: int = 16) -> tuple[ValleAR, ValleNAR]:
    """Both networks, of the sizes that their tensors have, without dropout.

    Args:
        state: state dict of their `VALLE`, without prenets.
        num_heads: which no tensor shows; the paper's unless given.
    Raises:
        UserError: a tensor is missing, one too many, or sizes that do not fit one another.
    """
    sizes = _sizes(state, num_heads)
    with torch.device("meta"):
        ar, nar = ValleAR(**sizes["ar"]), ValleNAR(**sizes["nar"])
    K, first, second = nar.num_codebooks, _ar_names(ar), _nar_names(nar)
    expected = {name: tensor.shape for name, tensor in to_original(ar, nar).items()}
    _check(state, expected)
    ar.load_state_dict({name: state[other] for name, other in first.items()}, assign=True)
    tables: list[Tensor] = [state[f"nar_audio_embeddings.{k}.{_TABLE}"] for k in range(K)]
    outputs = [state[f"nar_predict_layers.{level - 1}.weight"] for level in range(1, K)]
    rows = torch.stack([tables[0][:-1], *tables[1:], *(outputs[-1:] if nar.codes.shared else outputs)])
    stages = torch.cat([state[f"nar_stage_embeddings.{level - 1}.{_TABLE}"] for level in range(1, K)])
    own = {name: state[other] for name, other in second.items()} | {"codes.rows": rows, "stage_embed.rows": stages}
    nar.load_state_dict(own, assign=True)
    return ar, nar


def _count(shapes: Iterable[str], pattern: str) -> int:
    """One more than the highest number in keys of that pattern."""
    return max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1) + 1


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"{WHAT}: {name} is missing; the checkpoint is incomplete or of another architecture")
    return shapes[name]


def ar_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Constructor arguments of the AR that tensors show, by their keys without `ar_`; heads are none of them."""
    vocabulary, hidden = _shape(shapes, "predict_layer.weight")
    return {
        "num_phonemes": _shape(shapes, f"text_embedding.{_TABLE}")[0],
        "codebook_size": vocabulary - 1,
        "hidden_size": hidden,
        "depth": _count(shapes, r"decoder\.layers\.(\d+)\."),
        "begin": _shape(shapes, f"audio_embedding.{_TABLE}")[0] == vocabulary + 1,
    }


def nar_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Constructor arguments of the NAR that tensors show, by their keys without `nar_`; neither heads nor whether tables are shared."""
    K = _count(shapes, r"audio_embeddings\.(\d+)\.")
    if K < 2:
        raise UserError(f"{WHAT}: got {K} tables of codes; expected at least two, of which the NAR predicts one")
    padded, hidden = _shape(shapes, f"audio_embeddings.0.{_TABLE}")
    return {
        "num_phonemes": _shape(shapes, f"text_embedding.{_TABLE}")[0],
        "num_codebooks": K,
        "codebook_size": padded - 1,
        "hidden_size": hidden,
        "depth": _count(shapes, r"decoder\.layers\.(\d+)\."),
    }


def _sizes(state: Mapping[str, Tensor], num_heads: int) -> dict[str, dict[str, Any]]:
    ar, nar = (
        {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
        for prefix in ("ar_", "nar_")
    )
    sizes = {"ar": ar_sizes(ar), "nar": nar_sizes(nar)}
    for own, shapes in ((sizes["ar"], ar), (sizes["nar"], nar)):
        inner, hidden = _shape(shapes, "decoder.layers.0.linear1.weight")
        own |= {"num_heads": num_heads, "dropout": 0.0, "mlp_ratio": inner / hidden}
    sizes["nar"]["num_heads"] = num_heads * sizes["nar"]["hidden_size"] // sizes["ar"]["hidden_size"]
    K = sizes["nar"]["num_codebooks"]
    pairs = [(f"nar_predict_layers.{k - 2}.weight", f"nar_audio_embeddings.{k}.{_TABLE}") for k in range(2, K)]
    # Two codebooks share nothing either way.
    sizes["nar"]["share_embedding"] = all(a not in state or torch.equal(state[a], state[b]) for a, b in pairs)
    return sizes


# ------------------------------------------------------------------------------------------------- layouts


def ar_layout(net: ValleAR) -> Layout:
    """Where each parameter lies, by their keys without `ar_`."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    return {ours: whole(theirs.removeprefix("ar_"), shapes[ours]) for ours, theirs in _ar_names(net).items()}


def nar_layout(net: ValleNAR) -> Layout:
    """Where each parameter lies, by their keys without `nar_`: of a shared table the embedding, of their row for padding nothing."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    layout = {ours: whole(theirs.removeprefix("nar_"), shapes[ours]) for ours, theirs in _nar_names(net).items()}
    K, V, D = net.num_codebooks, net.codebook_size, net.hidden_size
    tables = [Rows(f"audio_embeddings.{k}.{_TABLE}", 0, V, (V + (k == 0), D)) for k in range(K)]
    outputs = [Rows(f"predict_layers.{k}.weight", 0, V, (V, D)) for k in range(K - 2 if net.codes.shared else 0, K - 1)]
    stages = [f"stage_embeddings.{k}.{_TABLE}" for k in range(K - 1)]
    return layout | {"codes.rows": (*tables, *outputs), "stage_embed.rows": apart(stages, [1] * (K - 1), (D,))}


def nar_computed(net: ValleNAR) -> list[str]:
    """Keys of theirs that are no weights of ours: copies of shared tables, and scales that are one."""
    copies = range(net.num_codebooks - 2) if net.codes.shared else ()
    return ["text_position.alpha", "audio_position.alpha", *(f"predict_layers.{k}.weight" for k in copies)]


def export_original(ar: ValleAR, nar: ValleNAR, folder: Path) -> Path:
    """Writes both networks as their `VALLE`'s state dict, `model.safetensors` in `folder`."""
    # Shared tables are in it twice, as in their own files: copies, since safetensors takes no tensor for two.
    write_tensors(folder / "model.safetensors", {name: t.clone() for name, t in to_original(ar, nar).items()})
    return folder


def _check(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    for name, shape in expected.items():
        if name not in state:
            raise UserError(f"{WHAT}: {name} is missing; the checkpoint is incomplete or of another architecture")
        if state[name].shape != shape:
            raise UserError(
                f"{WHAT}: {name} has shape {tuple(state[name].shape)}; the other tensors make it {tuple(shape)}"
            )
    if extra := sorted(set(state) - set(expected)):
        raise UserError(
            f"{WHAT}: {len(extra)} tensors that the networks do not have, among them {extra[0]}; prenets are not supported"
        )
