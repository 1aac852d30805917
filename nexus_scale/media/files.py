"""Pixels and waveforms as files: png, webp, mp4, wav, flac. The same bits each time."""

from __future__ import annotations

import importlib.util
import io
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from nexus_scale.contracts import UserError
from nexus_scale.data.sounds import encode_wav
from nexus_scale.media.animations import encode_animation


def encode_image(picture: Any, format: str = "png") -> bytes:
    """A picture, (H, W, 3) uint8 or PIL's, as a png or as a webp without loss."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, format, **({"lossless": True} if format == "webp" else {}))
    return buffer.getvalue()


def encode_video(frames: np.ndarray, rate_hz: float, format: str = "webp") -> bytes:
    """Frames (F, H, W, 3) uint8 as an animated webp without loss, or as an mp4 (H.264, yuv420p, which halves the colours' resolution).

    Raises:
        UserError: mp4 without PyAV, or without an H.264 encoder in it.
    """
    if format == "webp":
        return encode_animation(frames, 1 / rate_hz)
    av = _av("mp4")
    buffer = io.BytesIO()
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # yuv420p halves both sides
    with av.open(buffer, "w", format="mp4") as container:
        try:
            stream = container.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(1001))
        except av.FFmpegError as error:
            raise UserError(f"--format mp4: PyAV has no libx264 ({error}); use --format webp") from None
        stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
        stream.options = {"crf": "12", "threads": "1"}
        stream.codec_context.thread_count = 1  # the bits depend on the number of threads
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_audio(wave: np.ndarray, sample_rate_hz: int, format: str = "wav") -> bytes:
    """A waveform (C, T), float32 in [-1, 1], as 16-bit PCM in a wav, or as flac of the same samples.

    Raises:
        UserError: flac without PyAV.
    """
    data = encode_wav(wave, sample_rate_hz)
    if format == "wav":
        return data
    av = _av("flac")
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=sample_rate_hz)
        stream.layout = source.streams.audio[0].layout
        stream.format = "s16"
        for frame in source.decode(audio=0):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _av(format: str) -> Any:
    if importlib.util.find_spec("av") is None:
        raise UserError(f"--format {format}: needs PyAV, which is not installed: pip install 'nexus-scale[video]'")
    import av

    return av
