"""Clips of speech from recordings: wav, flac, mp3 and whatever else PyAV reads.

The rules, in order. A dropped clip is counted under the rule that dropped it:

1. A file that cannot be opened or decoded, has no sound, or is shorter than it declares (data_pipelines.cut_files) is dropped.
   Of several audio streams the first that can be decoded is taken.
2. It is resampled to `sample_rate_hz`, and its channels are averaged to one. Where they cancel each other (the mean has less than
   CANCELLED of the power that unrelated channels would leave), the loudest channel is taken instead.
3. Where its row has `start` and `end` (seconds), that part is taken. A part beyond the end of the file is dropped.
4. A clip with more than `max_clipped` of its samples at the rail (three or more in a row at its largest value, near full scale) is
   dropped: it was recorded too loudly, and the distortion cannot be undone.
5. Silence before and after the speech is cut except for MARGIN_S. Silence is what lies `silence_db` below the loudest tenth of a second.
   A clip whose loudest tenth of a second is below SILENT_DB is dropped.
6. A clip shorter than `min_seconds` or longer than `max_seconds` is dropped: a transcript cannot be cut with it.
7. The clip is scaled to `loudness_db` (root mean square outside of pauses, relative to full scale), or as close as its peaks allow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines.cut_files import is_cut
from nexus_scale.contracts import UserError

SOUND_EXTENSIONS = frozenset(
    {
        *(
            "wav",
            "wave",
            "w64",
            "rf64",
            "flac",
            "mp3",
            "ogg",
            "oga",
            "opus",
            "spx",
            "m4a",
            "m4b",
            "aac",
            "aiff",
            "aif",
            "aifc",
        ),
        *("wma", "mka", "weba", "caf", "au", "amr", "ac3", "wv", "ape", "tta"),
    }
)
LONGEST_S = 6 * 3600.0
"""Most seconds of one file: a few bytes can claim to be days of sound."""
RATES_HZ = (1000, 768_000)
"""Lowest sample rate of a file: below it, a few bytes claim to be hours."""
CANCELLED = 0.1
"""Share of the power that the mean of unrelated channels has. Opposed channels leave none; a silent or a louder one leaves far more."""
VERSION = 2
"""Version of these rules: clips made by other rules are made again."""
FRAME_S = 0.01
LOUDEST_S = 0.1
MARGIN_S = 0.1
SILENT_DB = -55.0
COUNTED = frozenset({"flac"})
"""FFmpeg's names of containers that declare a number of samples instead of bytes."""
RAIL, RUN = 0.985, 3
PEAK = 0.98

UNREADABLE = "a recording that cannot be decoded"
CUT = "a file that ends before it says"
NO_SOUND = "a file without sound"
BEYOND = "a part that lies beyond the end of its recording"
CLIPPED = "a clip that was recorded too loudly"
SILENT = "a clip without speech"
TOO_SHORT = "a clip that is too short"
TOO_LONG = "a clip that is too long"


@dataclass(frozen=True)
class SoundRules:
    """The rules of the module, with their numbers. Decibels are relative to full scale, `silence_db` to the loudest part of the clip."""

    sample_rate_hz: int
    min_seconds: float = 1.0
    max_seconds: float = 20.0
    silence_db: float = -40.0
    loudness_db: float = -23.0
    max_clipped: float = 0.001

    def __post_init__(self) -> None:
        if not 4000 <= self.sample_rate_hz <= 192_000 or not 0 < self.min_seconds < self.max_seconds <= LONGEST_S:
            raise UserError(
                f"sample_rate_hz {self.sample_rate_hz}, min_seconds {self.min_seconds:g}, max_seconds {self.max_seconds:g}: "
                "expected 4000 to 192000 Hz, and a shortest clip that is shorter than the longest"
            )
        if not -90 <= self.silence_db < 0 or not -60 <= self.loudness_db < 0 or not 0 <= self.max_clipped <= 1:
            raise UserError(
                f"silence_db {self.silence_db:g}, loudness_db {self.loudness_db:g}, max_clipped {self.max_clipped:g}: "
                "expected -90 to 0, -60 to 0 and a share in [0, 1]"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Clip:
    """`wave` (1, T) float32 in [-1, 1]; `start_seconds` within its recording."""

    wave: np.ndarray
    start_seconds: float


class CutError(ValueError):
    """A file has fewer samples than it declares."""


class Mixdown(NamedTuple):
    """The mean of the channels or one of them, `wave` (T,) float32; the power of each channel and of `wave`, summed over time."""

    wave: np.ndarray
    powers: np.ndarray
    power: float

    @property
    def cancelled(self) -> bool:
        unrelated = float(self.powers.sum()) / len(self.powers) ** 2
        return len(self.powers) > 1 and self.power < CANCELLED * unrelated


def decoded(file: BinaryIO, sample_rate_hz: int) -> np.ndarray | None:
    """The samples (T,) float32 of a file, as one channel and resampled; None where it has no sound.

    Raises:
        ValueError, OSError, ArithmeticError, av.error.FFmpegError: it cannot be decoded.
    """
    mix = _mixed(file, sample_rate_hz, None)
    if mix is not None and mix.cancelled:
        mix = _mixed(file, sample_rate_hz, int(mix.powers.argmax()))
    return None if mix is None else mix.wave


def _mixed(file: BinaryIO, sample_rate_hz: int, channel: int | None) -> Mixdown | None:
    """The mean of the channels, or one of them."""
    parts, powers, power = [], np.zeros(0), 0.0
    length = 0
    for block in blocks_of(file, sample_rate_hz):  # (channels, T)
        if len(powers) != len(block):
            if len(powers):
                raise ValueError(f"{len(powers)} channels become {len(block)}")
            powers = np.zeros(len(block))
        mean = block.mean(axis=0)
        if channel is None:
            powers += np.square(block, dtype=np.float64).sum(axis=1)
            power += float(np.square(mean, dtype=np.float64).sum())
        parts.append(mean if channel is None else block[channel].copy())
        length += len(mean)
        if length > LONGEST_S * sample_rate_hz:
            raise ValueError(f"more than {LONGEST_S:g} s of sound")
    if not length:
        return None
    wave = np.concatenate(parts)
    if not np.isfinite(wave).all():
        raise ValueError("samples that are not finite")
    return Mixdown(wave, powers, power)


def blocks_of(file: BinaryIO, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Resampled parts of a file, (channels, T) float32."""
    av = _pyav()
    file.seek(0)
    with av.open(file, mode="r", options={"protocol_whitelist": "pipe"}) as container:
        # A stream without a decoder has no codec_context.
        stream = next((one for one in container.streams.audio if one.codec_context is not None), None)
        if stream is None:
            if container.streams.audio:
                raise ValueError("no decoder for this kind of sound")
            return
        stream.codec_context.thread_count = 1
        # Channels are not mixed here, because FFmpeg's mix of two is 3 dB louder than either. They stay interleaved, because PyAV reads
        # beyond its eight pointers where more than seven channels have a plane each.
        resampler = av.AudioResampler(format="flt", rate=sample_rate_hz)
        decoded_samples, rate = 0, 0
        for frame in container.decode(stream):
            rate = frame.sample_rate
            if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
                raise ValueError(f"{rate} samples a second")
            decoded_samples += frame.samples
            frame.pts = None  # gaps between packets are not filled
            yield from map(_apart, resampler.resample(frame))
        if decoded_samples:
            yield from map(_apart, resampler.resample(None))
        declared = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if container.format.name in COUNTED and rate and decoded_samples / rate < declared - FRAME_S:
            raise CutError(f"{decoded_samples / rate:g} of {declared:g} s")


def _apart(frame: Any) -> np.ndarray:
    return np.asarray(frame.to_ndarray()).reshape(-1, frame.layout.nb_channels).T


def recording_of(data: bytes | BinaryIO, rules: SoundRules) -> tuple[np.ndarray | None, str]:
    """The samples of a file (T,), or None and the reason."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        if is_cut(file):
            return None, CUT
        wave = decoded(file, rules.sample_rate_hz)
    except CutError:
        return None, CUT
    except _errors() as error:
        if isinstance(error, UserError):
            raise
        return None, UNREADABLE
    return (wave, "") if wave is not None else (None, NO_SOUND)


def answer(file: BinaryIO, name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """`recording_of` as a decoder of data_pipelines.decoding_process; `arguments` are the rules."""
    wave, why = recording_of(file, SoundRules(**arguments))
    return {"why": why}, [] if wave is None else [wave]


def clip_of(
    recording: np.ndarray, rules: SoundRules, start: float = 0.0, end: float | None = None
) -> tuple[Clip | None, str]:
    """The clip of a recording (T,) from `start` to `end` seconds, by rules 3 to 7; or None and the rule that dropped it."""
    rate = rules.sample_rate_hz
    first, last = round(start * rate), len(recording) if end is None else round(end * rate)
    if not 0 <= first < last <= len(recording) + round(MARGIN_S * rate):  # the stated end may be slightly late
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
    """Share of samples in runs of at least RUN at the clip's largest value, where that is near full scale."""
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
    """The errors that broken files raise, and no others: a bug of ours must not pass for a broken file."""
    broken = (OSError, ValueError, EOFError, ArithmeticError)
    try:
        import av
    except ImportError:
        return broken
    return (*broken, av.error.FFmpegError)
