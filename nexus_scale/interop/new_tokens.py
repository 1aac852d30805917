"""New tokens as files of textual inversion: what diffusers' `load_textual_inversion` and AUTOMATIC1111's programs read and write.

One tensor called like its token, (D,) or (n, D); of two text encoders (Stable Diffusion XL) `clip_l` and `clip_g`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import ReadShard, UserError
from nexus_scale.interop.clip_text import TRANSFORMERS
from nexus_scale.interop.folders import network_folder, read_tensors, weight_files, write_tensors
from nexus_scale.interop.layout import opened_files, reader
from nexus_scale.interop.published import Family

FILE, OLD_FILE = "learned_embeds.safetensors", "learned_embeds.bin"
OF_TWO = ("clip_l", "clip_g")
"""Names in a file for two text encoders."""


def embeddings_in(path: Path, width: int) -> Tensor:
    """The embeddings of such a file, or of a folder with one, (n, width) float32.

    Raises:
        UserError: no such file, or none of this width.
    """
    file = next((path / name for name in (FILE, OLD_FILE) if (path / name).is_file()), path)
    if not file.is_file():
        raise UserError(f"{path}: no such file, and no folder with {FILE}")
    held: Mapping[str, Any] = read_tensors([file]) if file.suffix == ".safetensors" else _unpickled(file)
    inner = held.get("string_to_param", held)  # AUTOMATIC1111's
    tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    fitting = [value for value in tensors.values() if value.ndim in (1, 2) and value.shape[-1] == width]
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items()) or "no tensors"
        raise UserError(f"{file}: has {shapes}; expected one tensor of embeddings of {width} numbers")
    return fitting[0].detach().float().reshape(-1, width)


def _unpickled(file: Path) -> Mapping[str, Any]:
    """What `torch.save` wrote, read as weights alone: no code of it runs."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader's own among them
        raise UserError(f"{file}: not a readable file of torch's tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(held, Mapping):
        raise UserError(f"{file}: holds {type(held).__name__}; expected embeddings by name")
    return held


def _reader(kind: str, path: Path, net: Any) -> ReadShard:
    """The first embeddings: those of a file, or of a token of the encoder whose folder it is."""
    count, width = net.rows.shape
    if kind == "transformers":
        rows = _row(path, net).expand(count, width)
    elif kind == "diffusers":
        rows = embeddings_in(path, width)
    else:
        raise UserError(f"init_from {path}: format {kind} of new tokens; expected diffusers, a file, or transformers")
    if len(rows) != count:
        raise UserError(f"{path}: has {len(rows)} tokens; the recipe has {count}: set count and new_tokens to it")
    return lambda name, start, stop: {"table.rows": rows}[name].flatten()[start:stop]


def _row(path: Path, net: Any) -> Tensor:
    """The embedding of the token that new ones begin as, (D,)."""
    base, width = net.base, net.rows.shape[1]
    number = net.begins_as
    if number is None or number >= base.num_tokens:
        raise UserError(
            f"init_from {path}: new tokens that begin_as {number}; expected a token below {base.num_tokens}"
        )
    files = weight_files(network_folder(path, TRANSFORMERS.part), TRANSFORMERS.file)
    with opened_files(files, renamed=TRANSFORMERS.old_names, ignored=TRANSFORMERS.others) as tensors:
        read = reader(TRANSFORMERS.layout(base), tensors, f"init_from {path}")
        return read("token_embed.rows", number * width, (number + 1) * width)


def write(folder: Path, adapters: Mapping[str, Any], texts: Sequence[Any]) -> Path:
    """Writes what a run's adapters have learnt, by the parts of the pipeline.

    Args:
        texts: the run's text encoders (`encoders.TextEncoderFolder`), whose `new_tokens` say what tokens are called.
    Raises:
        UserError: no word for the tokens, or several, of which a file has one.
    """
    words = [dict(one.new_tokens) for one in texts if one.new_tokens]
    counts = [net.count for net in adapters.values()]
    if not words or any(list(one.values()) != [count] for one, count in zip(words, counts, strict=False)):
        raise UserError(
            f"new tokens {words} for {counts} embeddings; expected one word of as many tokens in data.encoders.text (new_tokens)"
        )
    rows = [net.rows.detach().float() for _, net in sorted(adapters.items())]
    names = [next(iter(words[0]))] if len(rows) == 1 else OF_TWO
    write_tensors(
        folder / FILE,
        {name: one[0].clone() if len(one) == 1 else one.clone() for name, one in zip(names, rows, strict=True)},
    )
    return folder / FILE


FAMILY = Family(reads=_reader, writes=write)
