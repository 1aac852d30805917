"""Reading and writing of .npy version 1.0: headers of a fixed length, no unpickling.

Every header written here has 128 bytes, so arrays of one shape and dtype have the same length and can be gathered at once.
"""

from __future__ import annotations

import ast
import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nexus_scale.data.manifest import DataError
from nexus_scale.data.manifest_schema import ARRAY_DTYPES

_MAGIC = b"\x93NUMPY\x01\x00"
HEADER_BYTES = 128


class NpyHeader(NamedTuple):
    """The header of a .npy. `data`: where the values start; `name`: that of the dtype (numpy builds it anew each time)."""

    dtype: np.dtype
    shape: tuple[int, ...]
    data: int
    name: str


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The 128 bytes before the values of a C-ordered array."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    room = HEADER_BYTES - len(_MAGIC) - 2
    if len(text) >= room:
        raise DataError(
            f"got an array of shape {shape}, whose .npy header does not fit {HEADER_BYTES} bytes; use fewer axes"
        )
    return _MAGIC + room.to_bytes(2, "little") + text.encode("latin1").ljust(room - 1) + b"\n"


def encode_npy(array: np.ndarray) -> bytes:
    """The array as a .npy file: little-endian, C order."""
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
    return npy_header(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=4096)
def parse_header(start: bytes) -> NpyHeader:
    """Reads the header from the first bytes of a .npy (128 of them, or all of a longer header).

    Cached by content: the arrays of a data set have few different headers.

    Raises:
        DataError: no .npy of version 1.0, in Fortran order, of Python objects, or longer than the bytes given.
    """
    if start[:8] != _MAGIC or len(start) < 10:
        raise DataError(f"got {start[:8]!r}, expected a .npy of format version 1.0")
    end = 10 + int.from_bytes(start[8:10], "little")
    if end > len(start):
        raise DataError(f"got a .npy header of {end} bytes, expected at most {len(start)}")
    try:
        header = ast.literal_eval(start[10:end].decode("latin1").strip())
        dtype, shape, fortran = np.dtype(header["descr"]), header["shape"], header["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise DataError(f"got a .npy header that cannot be read: {error}") from error
    if dtype.name not in ARRAY_DTYPES or dtype.str.startswith(">") or fortran or not isinstance(shape, tuple):
        raise DataError(
            f"got a .npy of {header}, expected C order and one of {', '.join(sorted(ARRAY_DTYPES))}, little-endian"
        )
    if not all(isinstance(axis, int) and 0 <= axis < 1 << 40 for axis in shape) or end % dtype.itemsize:
        raise DataError(
            f"got a .npy of shape {shape} whose values begin at byte {end}, expected whole axes and aligned values"
        )
    return NpyHeader(dtype, shape, end, dtype.name)


def decode_npy(data: bytes) -> np.ndarray:
    """The array of any .npy of numbers. Raises DataError where it is damaged or holds objects."""
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"got a .npy that cannot be read: {error}") from error
