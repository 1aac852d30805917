"""One rank's file of a checkpoint: plain safetensors, written and hashed in one pass, read by byte ranges.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length of the header, the header as
JSON `{name: {dtype, shape, data_offsets: [start, stop]}}` padded with spaces, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
HEADER_LIMIT_BYTES = 512 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    memory: Any = tensor.view(torch.uint8).numpy()
    return memoryview(memory)


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, int]], note: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """Header of a file of flat tensors, given as (dtype, numel) by name.

    Returns:
        The header's bytes with its length before it; (start, stop) of each tensor among the data bytes; the number of
        data bytes.
    """
    # Wide types first: every tensor is then aligned to its item, as the format's own writer does.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(note)}
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for name in order:
        dtype, numel = tensors[name]
        stop = offset + numel * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": [numel], "data_offsets": [offset, stop]}
        places[name] = (offset, stop)
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places, offset


def write_file(
    path: Path, header: bytes, data: memoryview, halfway: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Writes header and data, and forces them to disk.

    Args:
        halfway: called once, when about half of the data is written.
    Returns:
        Bytes written; their XXH3-128, hexadecimal.
    """
    digest = xxhash.xxh3_128()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for part in (memoryview(header), data):
            for start in range(0, len(part), CHUNK_BYTES):
                if part is data and start == len(data) // 2 // CHUNK_BYTES * CHUNK_BYTES:
                    halfway()
                chunk = part[start : start + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(handle, chunk) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return len(header) + len(data), digest.hexdigest()


def hash_file(path: Path) -> tuple[int, str]:
    """Bytes and XXH3-128 of a file, through one buffer."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    total = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            total += count
    return total, digest.hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """A file whose bytes were verified. `places`: dtype and byte range in the file of each flat tensor."""

    path: Path
    places: Mapping[str, tuple[torch.dtype, int, int]]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Reads the header.

        Raises:
            ValueError: the header is no safetensors header, or points outside the file.
        """
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if size < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
                raise ValueError(f"{path}: no safetensors header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length))
        places = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                if not 0 <= start <= stop <= size - 8 - length:
                    raise ValueError(f"{path}: {name} lies outside the file")
                places[name] = (DTYPES[entry["dtype"]], 8 + length + start, 8 + length + stop)
        return cls(path, places)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a flat tensor, by reading those bytes alone."""
        dtype, begin, end = self.places[name]
        assert out.dtype == dtype, (out.dtype, dtype)
        assert out.is_contiguous(), out.stride()
        offset = begin + start * dtype.itemsize
        view = bytes_of(out)
        if offset + len(view) > end:
            raise ValueError(f"{self.path}: {name} has no elements [{start}, {start + out.numel()})")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.path}: ended inside {name}")
                view = view[count:]
