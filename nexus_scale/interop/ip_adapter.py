"""IpAdapter as the file of the original release and of diffusers' `load_ip_adapter`, as tables; to the bit.

Its attentions are numbered 1, 3, 5, ..., those of the way up before the middle's. An export has the file `ip-adapter.safetensors`:
`pipeline.load_ip_adapter(folder, subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from nexus_scale.contracts import ReadShard, UserError
from nexus_scale.interop.formats import Apart, Format, Shapes, Table
from nexus_scale.interop.published import Family, Readers

_LINEAR: Table = {"image_embed.proj": "image_proj.proj", "image_embed.norm": "image_proj.norm"}
_LAYER = {
    "norm_image": "0.norm1", "norm_queries": "0.norm2", "q": "0.to_q", "kv": "0.to_kv", "proj": "0.to_out", "norm_mlp": "1.0", "fc1": "1.1",
    "fc2": "1.3",
}  # fmt: skip
_RESAMPLER: Table = {
    "image_embed.queries": "image_proj.latents",
    "image_embed.proj_in": "image_proj.proj_in",
    "image_embed.proj_out": "image_proj.proj_out",
    "image_embed.norm": "image_proj.norm_out",
    **{f"image_embed.layers.#.{ours}": f"image_proj.layers.#.{theirs}" for ours, theirs in _LAYER.items()},
}
_ORDER = ("down", "up", "middle")


def _table(net: Any) -> Table:
    """Rows of the attentions, which are numbered as diffusers' U-Net holds them."""
    held = sorted(range(len(net.paths)), key=lambda number: _ORDER.index(net.paths[number].split(".")[1]))
    keys = {number: f"ip_adapter.{2 * place + 1}" for place, number in enumerate(held)}
    rows: Table = {f"readers.{number}.kv": Apart((f"{key}.to_k_ip", f"{key}.to_v_ip")) for number, key in keys.items()}
    return {**(_RESAMPLER if net.resampler_depth else _LINEAR), **rows}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    text_dim = shapes.of("ip_adapter.1.to_k_ip.weight")[1]
    if "image_proj.latents" in shapes:
        _, tokens, width = shapes.of("image_proj.latents")
        return {
            "image_dim": shapes.of("image_proj.proj_in.weight")[1],
            "tokens_of_each": tokens,
            "resampler_depth": shapes.count(r"image_proj\.layers\.(\d+)\.0\.to_q"),
            "resampler_width": width,
            "resampler_heads": shapes.of("image_proj.layers.0.0.to_q.weight")[0] // 64,
        }
    if "image_proj.proj.weight" not in shapes:
        raise UserError(
            "IP-Adapter weights: are of a kind with faces or with all tokens; expected one linear layer, or a resampler (plus)"
        )
    out, image_dim = shapes.of("image_proj.proj.weight")
    return {"image_dim": image_dim, "tokens_of_each": out // text_dim, "resampler_depth": 0}


DIFFUSERS = Format(
    "ip_adapter",
    "IP-Adapter weights",
    _table,
    from_shapes=_args_of,
    file="ip-adapter.safetensors",
)


def _from_base(ours: Any, theirs: Any, read: ReadShard, what: str) -> Readers:
    """Keys and values of the picture begin with those of the text."""
    found: dict[str, Any] = {}
    for number, path in enumerate(ours.paths):
        there, here = theirs.readers().get(path), ours.readers[number].kv.weight
        if there is None or there.kv.weight.shape != here.shape:
            got = None if there is None else tuple(there.kv.weight.shape)
            raise UserError(
                f"{what}: {path}.kv.weight is {got} there and {tuple(here.shape)} in the recipe; name the base's own weights"
            )
        found[f"readers.{number}.kv.weight"] = partial(_read, read, f"{path}.kv.weight")
    return found


def _read(read: ReadShard, name: str, start: int, stop: int) -> Tensor:
    return read(name, start, stop)


FAMILY = Family({"diffusers": DIFFUSERS}, begins_from={"unet_condition": _from_base})
