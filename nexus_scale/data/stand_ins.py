"""Stand-ins for encoders of synthetic data, so that a run on synthetic data can draw samples, too, and exercises every part.

They are fixed functions of their input. What is drawn with them only shows that the machinery runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError

SAMPLE_RATE_HZ, HOP = 8000, 80
"""Samples per code of the codec: 100 codes a second, as in real ones."""
BLOCK = 4
"""Pixels of a code's block, down and across."""


def decode_latents(z: Tensor) -> Tensor:
    """Images (B, 3, ...) from latents (B, C, ...): the first three channels, with the last repeated if there are fewer."""
    chosen = torch.arange(3).clamp(max=z.shape[1] - 1)
    return z[:, chosen.to(z.device)].float().clamp(-1, 1)


def encode_latents(x: Tensor, channels: int) -> Tensor:
    """Moments (B, 2C, H, W) of images (B, 3, H, W), almost without deviation: the colours over and over."""
    mean = x[:, torch.arange(channels, device=x.device) % x.shape[1]]
    return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)


class ToneCodec:
    """A codec whose codes are tones: each step of 10 ms has the pitch of its first code. Same interface as `encoders.OwnCodec`. With
    books of 0 codes they are no whole numbers, but loudness itself, as mels are.
    """

    fingerprint = "made up"
    sample_rate_hz, hop = SAMPLE_RATE_HZ, HOP

    def __init__(self, num_codebooks: int, codebook_size: int):
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.codes_dtype = "int16" if codebook_size else "float32"

    def encode(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves (B, 1, T) -> codes (B, T', K): the loudness of each step."""
        steps = torch.nn.functional.pad(wave[:, 0], (0, -wave.shape[2] % HOP)).unflatten(1, (-1, HOP))  # (B, T', hop)
        loud = steps.abs().amax(2).clamp(max=1)
        loud = (loud * (self.codebook_size - 1)).long() if self.codebook_size else loud
        return loud[..., None].expand(-1, -1, self.num_codebooks).contiguous()

    def decode(self, codes: Tensor, timbre: Tensor | None = None) -> Tensor:
        """Codes (B, T', K) -> waves (B, 1, hop * T')."""
        pitch = 100 * 2 ** (4 * codes[..., 0].double() / max(1, self.codebook_size)).clamp(
            max=16
        )  # (B, T') Hz, over four octaves
        turns = (pitch / SAMPLE_RATE_HZ).repeat_interleave(HOP, dim=1).cumsum(1)
        return (0.3 * torch.sin(2 * math.pi * turns)).float()[:, None]


class BlockTokenizer:
    """A tokenizer whose codes are grey: one for each block of pixels of a frame. Same interface as `tokenizers.OwnTokenizer`.

    Args:
        num_codes: of a clip, in as many frames as make them a square each, at least two.
    """

    fingerprint = "made up"

    def __init__(self, num_codes: int, codebook_size: int):
        self.codebook_size = codebook_size
        side = max(s for s in range(1, num_codes + 1) if num_codes % (s * s) == 0 and (num_codes > s * s or s == 1))
        self.frame_codes, self.side = side * side, side
        self.image_size = (BLOCK * side, BLOCK * side)

    def check(self, shape: Sequence[int]) -> None:
        """It takes clips of its size alone."""
        if tuple(shape[2:]) != self.image_size:
            raise UserError(
                f"got clips of {shape[2]} x {shape[3]}; expected {self.image_size[0]} x {self.image_size[1]}"
            )

    def encode(self, x: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1] -> codes (B, F * h * w)."""
        grey = torch.nn.functional.avg_pool3d(x.mean(1, keepdim=True), (1, BLOCK, BLOCK)).flatten(1)
        return ((grey.clamp(-1, 1) + 1) / 2 * (self.codebook_size - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T), or (B, T, 1) -> clips (B, 3, F, H, W)."""
        grey = codes.flatten(1).float() / (self.codebook_size - 1) * 2 - 1
        frames = grey.unflatten(1, (1, -1, self.side, self.side)).expand(-1, 3, -1, -1, -1)
        return frames.repeat_interleave(BLOCK, 3).repeat_interleave(BLOCK, 4)


class LetterPhonemizer:
    """A phonemizer whose phonemes are letters; some share one if there are few. Same interface as `phonemes.Phonemizer`."""

    fingerprint = "made up"
    BEGIN, END, SPACE = 1, 2, 3

    def __init__(self, num_symbols: int):
        self.num_symbols = max(num_symbols, self.SPACE + 1)
        self.table = ("<pad>", "<begin>", "<end>", " ", *(f"<{n}>" for n in range(4, self.num_symbols)))

    def __call__(self, text: str) -> list[int]:
        spoken = [self.SPACE if c.isspace() else self.SPACE + ord(c) % (self.num_symbols - self.SPACE) for c in text]
        return [self.BEGIN, *spoken, self.END]


def codec_of(fields: Mapping[str, Mapping[str, Any]]) -> ToneCodec:
    """The codec of synthetic `codes`."""
    return ToneCodec(int(fields["codes"]["shape"][-1]), int(fields["codes"].get("high", 0)))


def tokenizer_of(fields: Mapping[str, Mapping[str, Any]]) -> BlockTokenizer:
    """The tokenizer of synthetic `video_codes`."""
    return BlockTokenizer(int(fields["video_codes"]["shape"][0]), int(fields["video_codes"]["high"]))


def phonemizer_of(fields: Mapping[str, Mapping[str, Any]]) -> LetterPhonemizer:
    """The phonemizer of synthetic `phonemes`."""
    return LetterPhonemizer(int(fields["phonemes"]["high"]))
