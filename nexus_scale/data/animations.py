"""Clips as animated WebP, without loss, each frame by itself: libwebp's own encoder merges frames that look alike, and a clip would
have fewer frames than were drawn.

Source: Google's WebP Container Specification, "Extended File Format".
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

LARGEST = 1 << 14
"""Pixels that a side of a WebP image has at most, less one."""


def encode_animation(frames: np.ndarray, frame_seconds: float) -> bytes:
    """Frames (F, H, W, 3) uint8 as an animated WebP that repeats for ever.

    Args:
        frame_seconds: for which each frame is shown.
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
