"""From model space to what a person sees or hears: images, video, audio, points.

One class each (`image.Image`, `video.Video`, `audio.Audio`, `points.Points`) with one Protocol, `Medium`. `opening.open_medium` makes the
one that a run's data ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from nexus_scale.contracts import UserError


class Undecodable(UserError):
    """A run's samples cannot be shown: the recipe names nothing that decodes them."""


class Medium(Protocol):
    """Decodes samples of model space, shows them as pictures and writes them to files.

    Attributes:
        name: image, video, audio or point.
        formats: the files that it writes, the default first.
        shard_formats: those that a shard of samples may hold, the default first.
        rate_hz: frames or samples of sound a second; None of images, and of clips whose data do not say.
    """

    name: str
    formats: Sequence[str]
    shard_formats: Sequence[str]
    rate_hz: float | None

    def decode(
        self, samples: Tensor, lengths: Sequence[int] | None = None, before: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """Each sample as it is seen or heard, float32 in [-1, 1] on the device that it came from or the decoder's.

        Args:
            samples: model space, (B, ...).
            lengths: how much of each is real, along the time axis; None: all of it.
            before: of codes, those that each goes on from (P, K): they are decoded before it and cut off.
        Returns:
            images (3, H, W), clips (3, F, H, W), waveforms (C, T) or points (D,), whose values are those that a file holds.
        """
        ...

    def picture(self, shown: Tensor) -> np.ndarray:
        """One decoded sample as a picture (H, W, 3) uint8: the image, a strip of frames, a spectrogram."""
        ...

    def file(self, shown: Tensor, format: str | None = None) -> bytes:
        """One decoded sample as a file; `format` is one of `formats`, the first unless given.

        Raises:
            UserError: another format, or one whose package is not installed.
        """
        ...


def check_format(medium: Medium, format: str | None, option: str = "--format") -> str:
    """The format to write, the medium's own where none is asked for.

    Raises:
        UserError: the medium is not written in that format.
    """
    if format is None:
        return medium.formats[0]
    if format not in medium.formats:
        kinds = " or ".join(medium.formats)
        raise UserError(f"{option} {format!r}: {medium.name} is written as {kinds}")
    return format
