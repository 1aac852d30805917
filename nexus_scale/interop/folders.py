"""Reading a folder that diffusers saved: its config and its safetensors files. Never code, never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """`config.json` of the folder.

    Raises:
        UserError: not there, not JSON, or of another class than `class_name`.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no config.json there; expected a folder saved by {class_name}.save_pretrained"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("_class_name") != class_name:
        got = config.get("_class_name", "an unnamed class") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{file}: is of {got!r}; expected {class_name}")
    return config


def weight_files(folder: Path, name: str = DIFFUSERS_WEIGHTS) -> list[Path]:
    """The safetensors file of that name, or the shards that its index lists, sorted.

    Raises:
        UserError: none there, or an index that points outside the folder or to a file that is missing.
    """
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        raise UserError(
            f"{folder}: no {name}; only safetensors are read (save_pretrained(..., safe_serialization=True))"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors shards ({error!r})") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: {shard!r} is not a safetensors file of this folder")
        if not (folder / shard).is_file():
            raise UserError(f"{folder}: {shard} is missing, which {index.name} lists; copy the folder again")
    return [folder / shard for shard in shards]
