"""MANIFEST.json of a checkpoint: its contents, its seal, and the check that the parts are complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash

from nexus_scale import __version__
from nexus_scale.contracts import UserError

FORMAT = 1
MANIFEST = "MANIFEST.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointError(Exception):
    """A save failed, or a checkpoint does not have what was requested."""


class Fenced(CheckpointError):
    """A newer start of the run owns its checkpoints; this process may no longer write and must end."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def make(
    step: int, attempt: str, notes: Sequence[Mapping[str, Any]], state: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """The sealed manifest of the parts in all ranks' notes, in the order of ranks.

    Raises:
        CheckpointError: the parts do not tile every tensor.
    """
    return sealed(
        {
            "format": FORMAT,
            "step": step,
            "world_size": len(notes),
            "attempt": attempt,
            "tensors": tiled(notes),
            "files": {note["file"]: {"bytes": note["bytes"], "xxh3_128": note["xxh3_128"]} for note in notes},
            "state": state,
            "versions": {"nexus_scale": __version__, **versions},
        }
    )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON with its own hash, so that a flipped bit in it is found too."""
    return _canonical({"xxh3_128": xxhash.xxh3_128_hexdigest(_canonical(manifest).encode()), "manifest": manifest})


def unsealed(data: bytes) -> dict[str, Any]:
    """The manifest in these bytes. Raises ValueError unless they are exactly as written."""
    try:
        found = json.loads(data.decode())
    except RecursionError:
        raise ValueError("nested too deep for a manifest") from None
    if not isinstance(found, dict) or set(found) != {"xxh3_128", "manifest"}:
        raise ValueError("not a sealed manifest")
    manifest: dict[str, Any] = found["manifest"]
    if sealed(manifest).encode() != data:
        raise ValueError("the manifest's hash does not match its contents")
    return manifest


def check(where: object, manifest: Mapping[str, Any], step: int, there: Mapping[str, int]) -> None:
    """Checks a checkpoint's list of files against its manifest.

    Args:
        where: of the checkpoint, for messages.
        step: that its folder is named for.
        there: bytes of each file that lies beside the manifest.
    Raises:
        UserError: it is of a format that this version does not read, which is no damage.
        ValueError: says what is wrong.
    """
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{where}: was written in checkpoint format {manifest.get('format')}, this nexus_scale {__version__} reads format {FORMAT}; "
            f"use the version that wrote it ({manifest.get('versions', {}).get('nexus_scale')})",
            code=5,
        )
    if manifest["step"] != step:
        raise ValueError(f"the manifest belongs to step {manifest['step']}")
    listed = manifest["files"]
    if there.keys() != listed.keys():
        raise ValueError(
            f"missing {sorted(listed.keys() - there.keys())}, alien {sorted(there.keys() - listed.keys())}"
        )
    for name, size in there.items():
        if size != listed[name]["bytes"]:
            raise ValueError(f"{name} has {size} bytes, the manifest says {listed[name]['bytes']}")


def tiled(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All ranks' parts by logical tensor, checked to cover each exactly.

    Raises:
        CheckpointError: a gap, an overlap, or two ranks that disagree; names the tensor.
    """
    tensors: dict[str, Any] = {}
    for note in notes:
        for name, part in note["tensors"].items():
            entry = tensors.setdefault(name, {"shape": part["shape"], "dtype": part["dtype"], "pieces": []})
            if (entry["shape"], entry["dtype"]) != (part["shape"], part["dtype"]):
                raise CheckpointError(
                    f"{name}: {note['file']} has {part['dtype']} {part['shape']}, another rank {entry['dtype']} {entry['shape']}"
                )
            entry["pieces"].append([note["file"], part["start"], part["stop"]])
    for name, entry in tensors.items():
        entry["pieces"].sort(key=lambda shard: shard[1])
        reached = 0
        for file, start, stop in entry["pieces"]:
            if start != reached:
                raise CheckpointError(
                    f"{name}: values [{reached}, {start}) are {'missing' if start > reached else 'there twice'} ({file})"
                )
            reached = stop
        if reached != torch.Size(entry["shape"]).numel():
            raise CheckpointError(f"{name}: has {torch.Size(entry['shape']).numel()} values, the ranks wrote {reached}")
    return tensors
