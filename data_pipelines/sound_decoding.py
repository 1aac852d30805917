"""Recordings to clips of speech: wav, flac, mp3 and what else PyAV reads.

The rules, in order; what a rule drops is named by it:

1. A file that cannot be opened or decoded, or has no sound, is dropped.
2. It is resampled to `sample_rate_hz`; its channels become one, their mean.
3. Where its row has `start` and `end` (seconds), that part is taken; a part beyond the end of the file is dropped.
4. A clip of which more than `max_clipped` of the samples stand at the rail (three or more in a row at its largest value, near full scale)
   is dropped: it was recorded too loudly, and is distorted for good.
5. Silence before and after the speech is cut but for MARGIN_S: what lies `silence_db` below the loudest tenth of a second. A clip whose
   loudest tenth of a second is below SILENT_DB is dropped.
6. A clip shorter than `min_seconds` or longer than `max_seconds` is dropped: a transcript cannot be cut with it.
7. It is brought to `loudness_db` (root mean square of what is no pause, relative to full scale), or as near as its peaks allow.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nexus_scale.contracts import UserError

SOUND_EXTENSIONS = frozenset({"wav", "flac", "mp3", "ogg", "opus", "m4a", "aiff", "aif"})
LONGEST_S = 6 * 3600.0
"""Seconds of one file at most: a few bytes can claim to be days of sound."""
FRAME_S = 0.01
LOUDEST_S = 0.1
MARGIN_S = 0.1
SILENT_DB = -55.0
RAIL, RUN = 0.985, 3
PEAK = 0.98

UNREADABLE = "a recording that cannot be decoded"
NO_SOUND = "a file without sound"
BEYOND = "a part that lies beyond the end of its recording"
CLIPPED = "a clip that was recorded too loudly"
SILENT = "a clip without speech"
TOO_SHORT = "a clip that is too short"
TOO_LONG = "a clip that is too long"


@dataclass(frozen=True)
class SoundRules:
    """See the module. Decibels are relative to full scale, `silence_db` to the clip's own loudest."""

    sample_rate_hz: int
    min_seconds: float = 1.0
    max_seconds: float = 20.0
    silence_db: float = -40.0
    loudness_db: float = -23.0
    max_clipped: float = 0.001

    def __post_init__(self) -> None:
        if not 4000 <= self.sample_rate_hz <= 192_000 or not 0 < self.min_seconds < self.max_seconds <= LONGEST_S:
            raise UserError(
                f"ingest_speech: sample_rate_hz {self.sample_rate_hz}, min_seconds {self.min_seconds:g}, max_seconds {self.max_seconds:g}: "
                "expected 4000 to 192000 Hz, and a shortest clip that is shorter than the longest"
            )
        if not -90 <= self.silence_db < 0 or not -60 <= self.loudness_db < 0 or not 0 <= self.max_clipped <= 1:
            raise UserError(
                f"ingest_speech: silence_db {self.silence_db:g}, loudness_db {self.loudness_db:g}, max_clipped {self.max_clipped:g}: "
                "expected -90 to 0, -60 to 0 and a share in [0, 1]"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Clip:
    """`wave` (1, T) float32 in [-1, 1]; `start_seconds` in its recording."""

    wave: np.ndarray
    start_seconds: float


def decoded(data: bytes, sample_rate_hz: int) -> np.ndarray | None:
    """Samples (T,) float32 of a file, mixed to one channel and resampled; None where it has no sound.

    Raises:
        ValueError, OSError, av.error.FFmpegError: it cannot be decoded.
    """
    av = _pyav()
    parts = []
    with av.open(io.BytesIO(data), mode="r", options={"protocol_whitelist": "pipe"}) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        # The channels stay apart here: FFmpeg's own mix of two is 3 dB louder than either.
        resampler = av.AudioResampler(format="fltp", rate=sample_rate_hz)
        length = 0
        for frame in container.decode(stream):
            frame.pts = None  # gaps between packets are not filled: what is there is taken
            for out in resampler.resample(frame):
                parts.append(out.to_ndarray().mean(axis=0))
                length += len(parts[-1])
            if length > LONGEST_S * sample_rate_hz:
                raise ValueError(f"more than {LONGEST_S:g} s of sound")
        parts += [out.to_ndarray().mean(axis=0) for out in resampler.resample(None)]
    wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not np.isfinite(wave).all():
        raise ValueError("samples that are not finite")
    return wave if len(wave) else None


def recording_of(data: bytes, rules: SoundRules) -> tuple[np.ndarray | None, str]:
    """The samples of a file (T,), or None and why."""
    try:
        wave = decoded(data, rules.sample_rate_hz)
    except _errors() as error:
        if isinstance(error, UserError):
            raise
        return None, UNREADABLE
    return (wave, "") if wave is not None else (None, NO_SOUND)


def clip_of(
    recording: np.ndarray, rules: SoundRules, start: float = 0.0, end: float | None = None
) -> tuple[Clip | None, str]:
    """A clip of a recording (T,), from `start` to `end` in seconds, by the rules 3 to 7; or None and the rule that dropped it."""
    rate = rules.sample_rate_hz
    first, last = round(start * rate), len(recording) if end is None else round(end * rate)
    if not 0 <= first < last <= len(recording) + round(MARGIN_S * rate):  # a part may end a little late
        return None, BEYOND
    wave = recording[first:last]
    if _clipped(wave) > rules.max_clipped:
        return None, CLIPPED
    powers = _powers(wave, round(FRAME_S * rate))
    loudest = float(np.convolve(powers, np.ones(_span(powers)) / _span(powers), "valid").max()) if len(powers) else 0.0
    if loudest < 10 ** (SILENT_DB / 10):
        return None, SILENT
    spoken = np.flatnonzero(powers >= loudest * 10 ** (rules.silence_db / 10))
    frame, margin = round(FRAME_S * rate), round(MARGIN_S * rate)
    begin = max(0, int(spoken[0]) * frame - margin)
    wave = wave[begin : (int(spoken[-1]) + 1) * frame + margin]
    if len(wave) < rules.min_seconds * rate:
        return None, TOO_SHORT
    if len(wave) > rules.max_seconds * rate:
        return None, TOO_LONG
    gain = 10 ** (rules.loudness_db / 20) / float(np.sqrt(powers[spoken].mean()))
    gain = min(gain, PEAK / float(np.abs(wave).max()))
    return Clip((wave * np.float32(gain))[None].astype(np.float32), start + begin / rate), ""


def _powers(wave: np.ndarray, frame: int) -> np.ndarray:
    """Mean square of each whole frame, (frames,) float64."""
    whole = wave[: len(wave) // frame * frame].astype(np.float64).reshape(-1, frame)
    return (whole**2).mean(axis=1)


def _span(powers: np.ndarray) -> int:
    return max(1, min(len(powers), round(LOUDEST_S / FRAME_S)))


def _clipped(wave: np.ndarray) -> float:
    """Share of samples in runs of RUN or more at the largest value of the clip, where that is near full scale."""
    height = np.abs(wave)
    top = float(height.max())
    if top < RAIL:
        return 0.0
    at_rail = np.concatenate([[False], height >= top * 0.999, [False]])
    edges = np.flatnonzero(np.diff(at_rail.astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return float(lengths[lengths >= RUN].sum()) / len(wave)


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("decoding recordings needs PyAV; pip install 'nexus-scale[speech]'") from None
    av.logging.set_level(av.logging.PANIC)
    return av


def _errors() -> tuple[type[BaseException], ...]:
    """What broken files raise, and no more: a mistake of ours is not counted as theirs."""
    broken = (OSError, ValueError, EOFError)
    try:
        import av
    except ImportError:
        return broken
    return (*broken, av.error.FFmpegError)
