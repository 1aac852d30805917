"""VALL-E in lifeiteng/vall-e (and in icefall's recipe, which descends from it), as tables; to the bit.

That implementation holds both transformers in one file. Its first table of the second one has a row for padding more than there are
codes, which nothing looks at; its shared tables are in the state dict once as embedding and once as prediction layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import write_tensors
from nexus_scale.interop.formats import Copy, Format, Made, Row, Shapes, Table, own_memory
from nexus_scale.interop.layout import Rows, apart
from nexus_scale.models.audio.valle_ar import ValleAR
from nexus_scale.models.audio.valle_nar import ValleNAR

WHAT = "VALL-E checkpoint"
FILE = "model.safetensors"
_EMBEDDING = "word_embeddings.weight"
_BLOCK = {
    "qkv.weight": "self_attn.in_proj_weight",
    "qkv.bias": "self_attn.in_proj_bias",
    "proj": "self_attn.out_proj",
    "fc1": "linear1",
    "fc2": "linear2",
}


def _blocks(*, staged: bool) -> dict[str, Row]:
    """A transformer's blocks and its last norm. In the second one norms are told the stage: theirs hold their own weights one deeper."""
    norms: dict[str, Row] = {}
    inside = {f"token_blocks.#.{norm}": f"layers.#.{norm}" for norm in ("norm1", "norm2")}
    for ours, theirs in {"norm": "norm", **inside}.items():
        norms[ours] = f"decoder.{theirs}.norm" if staged else f"decoder.{theirs}"
        if staged:
            norms[f"{ours}.project"] = f"decoder.{theirs}.project_layer"
    return norms | {f"token_blocks.#.{ours}": f"decoder.layers.#.{theirs}" for ours, theirs in _BLOCK.items()}


def _ar_table(net: Any) -> Table:
    return _blocks(staged=False) | {
        "phoneme_embed.rows": f"text_embedding.{_EMBEDDING}",
        "code_embed.rows": f"audio_embedding.{_EMBEDDING}",
        "phoneme_places.scale": "text_position.alpha",
        "code_places.scale": "audio_position.alpha",
        "head.weight": "predict_layer.weight",
    }


def _nar_table(net: Any) -> Table:
    K, V, D = net.num_codebooks, net.codebook_size, net.hidden_size
    tables = [Rows(f"audio_embeddings.{k}.{_EMBEDDING}", 0, V, (V + (k == 0), D)) for k in range(K)]
    outputs = [Rows(f"predict_layers.{k}.weight", 0, V, (V, D)) for k in range(K - 2 if net.codes.shared else 0, K - 1)]
    stages = [f"stage_embeddings.{k}.{_EMBEDDING}" for k in range(K - 1)]
    return _blocks(staged=True) | {
        "phoneme_embed.rows": f"text_embedding.{_EMBEDDING}",
        "codes.rows": (*tables, *outputs),
        "stage_embed.rows": apart(stages, [1] * (K - 1), (D,)),
    }


def _nar_beside(net: Any) -> Mapping[str, Copy | Made]:
    """Copies of shared tables, and scales that are one."""
    copies = range(net.num_codebooks - 2) if net.codes.shared else ()
    differs = "a prediction layer differs from the embedding that it shares; set share_embedding: false"
    return {
        **{f"predict_layers.{k}.weight": Copy("codes.rows", differs, net.codes.output(k + 1)) for k in copies},
        **{f"{name}_position.alpha": Made(lambda net: torch.ones(1)) for name in ("text", "audio")},
    }


def _ar_args(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; heads are not among it."""
    vocabulary, hidden = shapes.of("predict_layer.weight")
    return {
        "num_phonemes": shapes.of(f"text_embedding.{_EMBEDDING}")[0],
        "codebook_size": vocabulary - 1,
        "hidden_size": hidden,
        "depth": shapes.count(r"decoder\.layers\.(\d+)\."),
        "begin": shapes.of(f"audio_embedding.{_EMBEDDING}")[0] == vocabulary + 1,
    }


def _nar_args(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; neither heads nor whether tables are shared are among it."""
    K = shapes.count(r"audio_embeddings\.(\d+)\.")
    if K < 2:
        raise UserError(f"{WHAT}: got {K} tables of codes; expected at least two, of which the NAR predicts one")
    padded, hidden = shapes.of(f"audio_embeddings.0.{_EMBEDDING}")
    return {
        "num_phonemes": shapes.of(f"text_embedding.{_EMBEDDING}")[0],
        "num_codebooks": K,
        "codebook_size": padded - 1,
        "hidden_size": hidden,
        "depth": shapes.count(r"decoder\.layers\.(\d+)\."),
    }


AR = Format("valle_ar", WHAT, _ar_table, from_shapes=_ar_args, file=FILE, prefix="ar_")
NAR = Format("valle_nar", WHAT, _nar_table, from_shapes=_nar_args, computed=_nar_beside, file=FILE, prefix="nar_")


def to_original(ar: ValleAR, nar: ValleNAR) -> dict[str, Tensor]:
    """The state dict that their `VALLE` takes."""
    both: dict[str, Tensor] = {}
    for form, net in ((AR, ar), (NAR, nar)):
        both |= form.theirs_of(net, net.state_dict())
    return both


def export_together(networks: Mapping[str, nn.Module], folder: Path) -> Path:
    """Writes both networks of a run as their `VALLE`'s state dict, `model.safetensors` in `folder`.

    Raises:
        UserError: the run has not one of each.
    """
    ar = next((net for net in networks.values() if isinstance(net, ValleAR)), None)
    nar = next((net for net in networks.values() if isinstance(net, ValleNAR)), None)
    if ar is None or nar is None or len(networks) != 2:
        raise UserError(
            f"export: got networks {sorted(networks)}; the published layout holds one valle_ar and one valle_nar"
        )
    write_tensors(folder / FILE, own_memory(to_original(ar, nar)))
    return folder


def from_original(state: Mapping[str, Tensor], num_heads: int = 16) -> tuple[ValleAR, ValleNAR]:
    """Both networks, of the sizes that their tensors have, without dropout.

    Args:
        state: state dict of their `VALLE`, without prenets.
        num_heads: which no tensor shows; the paper's unless given.
    Raises:
        UserError: a tensor is missing, one too many, or sizes that do not fit one another.
    """
    found: list[Any] = []
    for form in (AR, NAR):
        shapes = {
            key.removeprefix(form.prefix): tuple(t.shape) for key, t in state.items() if key.startswith(form.prefix)
        }
        args = form.args_of_shapes(shapes)
        inner, hidden = Shapes(shapes).of("decoder.layers.0.linear1.weight")
        args |= {"dropout": 0.0, "mlp_ratio": inner / hidden, "num_heads": num_heads}
        if form is NAR:
            args["num_heads"] = num_heads * hidden // found[0].hidden_size
            # Two codebooks share nothing either way.
            pairs = [
                (f"nar_predict_layers.{k - 2}.weight", f"nar_audio_embeddings.{k}.{_EMBEDDING}")
                for k in range(2, args["num_codebooks"])
            ]
            args["share_embedding"] = all(a not in state or torch.equal(state[a], state[b]) for a, b in pairs)
        args, ours = form.to_ours(None, state, args)
        net = form.network_of(args)
        net.load_state_dict(ours, assign=True)
        found.append(net)
    return found[0], found[1]
