"""Folders that diffusers saves and loads: their config and their safetensors files. Never code, never pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write, replacing
from nexus_scale.processes.latents import LatentStats

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def parsed_config(folder: Path, class_name: str, name: str = "config.json") -> Any:
    """What `config.json` of the folder holds, of whatever class it is; `class_name` is the one that is wanted.

    Raises:
        UserError: not there, or not JSON.
    """
    file = folder / name
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no {name} there; expected a folder saved by {class_name}.save_pretrained") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """`config.json` of a folder that a class of diffusers saved.

    Raises:
        UserError: not there, not JSON, or of another class than `class_name`.
    """
    config = parsed_config(folder, class_name)
    if not isinstance(config, dict) or config.get("_class_name") != class_name:
        got = config.get("_class_name", "an unnamed class") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{folder / 'config.json'}: is of {got!r}; expected {class_name}")
    return config


def stated_by(config: Mapping[str, Any], folder: Path, channels: int, scale: float) -> LatentStats | None:
    """The normalisation that an autoencoder's config states: `scaling_factor` (`scale` where the key is left out, as diffusers has it),
    `shift_factor`, and `latents_mean` and `latents_std` by channel. None where its scaling_factor is null.

    `invert_scale_latents` (CogVideoX 1.5) is of the first frame that image-to-video is given; the latents themselves are scaled
    as ever.

    Raises:
        UserError: factors that are no numbers, or of other channels.
    """
    factor = config.get("scaling_factor", scale)
    if factor is None:
        return None
    try:
        return LatentStats.stated(
            channels,
            float(factor),
            float(config.get("shift_factor") or 0.0),
            config.get("latents_mean"),
            config.get("latents_std"),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'config.json'}: its normalisation cannot be used: {error}") from None


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


def network_folder(folder: Path | str, part: str = "transformer") -> Path:
    """The folder of the network itself: this one, or its `part` where it is a whole pipeline's."""
    folder = Path(folder)
    inner = folder / part
    whole = (folder / "model_index.json").is_file() or not (folder / "config.json").is_file()
    return inner if whole and (inner / "config.json").is_file() else folder


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, by name.

    Raises:
        UserError: one of them cannot be read.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error})") from None
    return state


def copy_folder(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """A network's folder with the weights of another and this config."""
    files = weight_files(source)
    index = source / f"{DIFFUSERS_WEIGHTS}.index.json"
    for file in [*files, *([index] if files[0].name != DIFFUSERS_WEIGHTS else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    write_json(folder / "config.json", config)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(value, indent=2) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file as diffusers marks its own."""
    with replacing(file) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, {"format": "pt"})


def write_folder(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """A network's folder for diffusers; returns the folder."""
    folder = Path(folder)
    write_tensors(folder / DIFFUSERS_WEIGHTS, tensors)
    write_json(folder / "config.json", config)
    return folder
