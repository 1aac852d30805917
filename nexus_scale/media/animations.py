"""Clips as lossless animated WebP with every frame of its own. libwebp's animation encoder merges equal frames, so that a clip would have
fewer frames than were drawn.

Source: Google's WebP Container Specification, "Extended File Format".
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

LARGEST = 1 << 14
"""Largest side of a WebP image in pixels, less one."""


def encode_animation(frames: np.ndarray, frame_seconds: float) -> bytes:
    """An animated WebP of frames (F, H, W, 3) uint8 that repeats for ever.

    Args:
        frame_seconds: how long each frame is shown.
    Raises:
        ValueError: no frame, or frames larger than WebP's.
    """
    if not len(frames) or max(frames.shape[1:3]) >= LARGEST:
        raise ValueError(f"frames of {frames.shape}; expected at least one, and sides below {LARGEST} pixels")
    height, width = frames.shape[1:3]
    size = _24(width - 1) + _24(height - 1)
    duration = _24(round(1000 * frame_seconds))
    chunks = [_chunk(b"VP8X", b"\x02\0\0\0" + size), _chunk(b"ANIM", struct.pack("<IH", 0, 0))]
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "webp", lossless=True)
        picture = buffer.getvalue()[12:]  # after RIFF, its length, WEBP
        assert picture[:4] == b"VP8L", picture[:4]
        # at the canvas's corner, shown for `duration`, not blended with the frame before
        chunks.append(_chunk(b"ANMF", _24(0) + _24(0) + size + duration + b"\x02" + picture))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _24(number: int) -> bytes:
    return number.to_bytes(3, "little")


def _chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
