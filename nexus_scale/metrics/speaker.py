"""Speaker similarity: the cosine of two voices' embeddings by a speaker encoder.

The encoder is the GE2E network of Wan et al. 2018 with the weights that the package resemblyzer carries (Apache-2.0): three LSTM
layers over mel spectra of 1.6 s, averaged over an utterance. The package itself is not imported: it wants a compiler for its voice
detector and 100 MB of libraries for one spectrum. Its voice detector is left out, so silence should be cut before. With the same
samples the embeddings are those of the package.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.metrics.resample import resample
from nexus_scale.processes.mels import slaney_filters

SAMPLE_RATE_HZ = 16000
WINDOW, HOP, MELS = 400, 160, 40
PARTIAL_FRAMES = 160
"""1.6 s, what the network was trained on."""
RATE, COVERAGE = 1.3, 0.75
"""Partial utterances a second, and how much of the last must lie within the wave."""
LOUDNESS_DB = -30.0
INSTALL = "speaker similarity needs resemblyzer's weights; pip install --no-deps resemblyzer==0.1.4"


class SpeakerEncoder(nn.Module):
    """A speaker encoder: waves to embeddings. Make it with `open`."""

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.register_buffer("filters", slaney_filters(SAMPLE_RATE_HZ, WINDOW, MELS).float(), persistent=False)

    @classmethod
    def open(cls, weights: Path | None = None) -> SpeakerEncoder:
        """The encoder with trained weights: a `pretrained.pt` of resemblyzer's, by default that of the installed package.

        Raises:
            UserError: no such file, or one of other tensors.
        """
        if weights is None:
            found = importlib.util.find_spec("resemblyzer")
            if found is None or found.origin is None:
                raise UserError(INSTALL)
            weights = Path(found.origin).parent / "pretrained.pt"
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
            encoder = cls()
            own = encoder.state_dict()
            encoder.load_state_dict({name: state[name] for name in own})
        except (OSError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{weights}: cannot be read as the weights of a speaker encoder ({error}); {INSTALL}", 3
            ) from None
        return encoder.eval().requires_grad_(False)

    def forward(self, mels: Tensor) -> Tensor:
        """Mel spectra (B, frames, 40) to embeddings (B, 256) of unit length, all of them positive."""
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(torch.relu(self.linear(hidden[-1])), dim=1)

    def mels(self, wave: Tensor) -> Tensor:
        """Power spectra of a wave (T,) in mel bands, (T // 160 + 1, 40): not logarithms."""
        window = torch.hann_window(WINDOW, device=wave.device)
        spectrum = torch.stft(wave, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)
        return (self.filters @ spectrum.abs() ** 2).T

    @torch.no_grad()
    def embed(self, wave: Tensor, sample_rate_hz: int) -> Tensor:
        """The embedding (256,) of a wave (T,) or (1, T) in [-1, 1]: the mean over its partial utterances, of unit length.

        Raises:
            ValueError: a wave of silence, which nobody speaks.
        """
        wave = resample(wave.detach().float().reshape(-1), sample_rate_hz, SAMPLE_RATE_HZ)
        wave = _louder(wave)
        starts = _partials(len(wave))
        end = (starts[-1] + PARTIAL_FRAMES) * HOP
        mels = self.mels(F.pad(wave, (0, max(0, end - len(wave)))))
        parts = torch.stack([mels[start : start + PARTIAL_FRAMES] for start in starts])  # (n, 160, 40)
        return F.normalize(self(parts).mean(dim=0), dim=0)


def _louder(wave: Tensor) -> Tensor:
    """The wave raised to LOUDNESS_DB if it is quieter."""
    power = float(wave.double().square().mean()) if len(wave) else 0.0
    if power <= 0:
        raise ValueError("got a wave of silence, expected speech")
    gain = 10 ** (LOUDNESS_DB / 20) / math.sqrt(power)
    return wave * gain if gain > 1 else wave


def _partials(samples: int) -> list[int]:
    """First frame of each partial utterance of a wave; at least one."""
    frames = math.ceil((samples + 1) / HOP)
    step = round(SAMPLE_RATE_HZ / RATE / HOP)
    starts = list(range(0, max(1, frames - PARTIAL_FRAMES + step + 1), step))
    covered = (samples - starts[-1] * HOP) / (PARTIAL_FRAMES * HOP)
    return starts[:-1] if covered < COVERAGE and len(starts) > 1 else starts


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of embeddings (..., 256): some 0.85 to 0.95 within a voice and 0.4 to 0.75 between voices; measure both beside what is
    quoted. The encoder hears loudness: the same clip 40 dB quieter has 0.92 with itself, so bring both to one loudness first."""
    return F.cosine_similarity(a, b, dim=-1)
