"""The codec of this folder, for torch and transformers: codes between a spectrogram and an inverse Fourier transform.

from transformers import AutoModel
codec = AutoModel.from_pretrained(folder, trust_remote_code=True)
codes = codec.encode(waves).audio_codes  # waves (B, 1, T) in [-1, 1] at codec.config.sampling_rate -> (B, K, T')
waves = codec.decode(codes).audio_values
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

FLOOR, LOUDEST, USUAL, SPREAD = 1e-3, 100.0, -4.0, 3.0


class SpectralCodecConfig(PretrainedConfig):
    """Sizes: of frames in samples, of channels, blocks and books."""

    model_type = "spectral_codec"

    def __init__(
        self,
        sampling_rate: int = 24000,
        hop: int = 320,
        window: int = 1280,
        hidden_channels: int = 384,
        mlp_channels: int = 1152,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        latent_channels: int = 128,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        centred: bool = False,
        tones: int = 0,
        **more: Any,
    ):
        self.sampling_rate, self.hop, self.window = sampling_rate, hop, window
        self.hidden_channels, self.mlp_channels = hidden_channels, mlp_channels
        self.encoder_depth, self.decoder_depth = encoder_depth, decoder_depth
        self.latent_channels, self.num_codebooks, self.codebook_size = latent_channels, num_codebooks, codebook_size
        self.centred, self.tones = centred, tones
        super().__init__(**more)


@dataclass
class SpectralCodecOutput(ModelOutput):
    """`audio_codes` (B, K, T') whole numbers, `audio_values` (B, 1, T)."""

    audio_codes: Tensor | None = None
    audio_values: Tensor | None = None


class Block(nn.Module):
    """x + scale * mlp(norm(depthwise(x))), (B, C, T)."""

    def __init__(self, channels: int, mlp_channels: int):
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, mlp_channels), nn.Linear(mlp_channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).transpose(1, 2))
        return x + (self.scale * self.down(F.gelu(self.up(h)))).transpose(1, 2)


class Trunk(nn.Module):
    """(B, in_channels, T) -> (B, T, channels)."""

    def __init__(self, in_channels: int, channels: int, mlp_channels: int, depth: int):
        super().__init__()
        self.embed = nn.Conv1d(in_channels, channels, 7, padding=3)
        self.norm_in, self.norm_out = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.blocks = nn.ModuleList(Block(channels, mlp_channels) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_in(self.embed(x).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            h = block(h)
        return self.norm_out(h.transpose(1, 2))


class Encoder(nn.Module):
    """(B, 1, T) -> (B, latent_channels, T') from the log amplitudes of frames."""

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.window, self.hop, self.centred = config.window, config.hop, config.centred
        self.trunk = Trunk(config.window // 2 + 1, config.hidden_channels, config.mlp_channels, config.encoder_depth)
        self.out = nn.Conv1d(config.hidden_channels, config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        margin = (self.window - self.hop) // 2
        padded = F.pad(x[:, 0].float(), (margin, margin + -x.shape[2] % self.hop))
        hann = torch.hann_window(self.window, device=x.device)
        hann = hann / hann.square().sum().sqrt()
        spectrum = torch.stft(padded, self.window, self.hop, window=hann, center=False, return_complex=True)
        log_amplitude = (torch.view_as_real(spectrum).square().sum(-1) + FLOOR**2).log() / 2
        if self.centred:
            log_amplitude = (log_amplitude - USUAL) / SPREAD
        return self.out(self.trunk(log_amplitude).transpose(1, 2))


class Decoder(nn.Module):
    """(B, latent_channels, T') -> (B, 1, hop * T') by amplitudes and phases of frames that overlap, and by sinusoids a semitone apart."""

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.window, self.hop, self.tones, self.rate = config.window, config.hop, config.tones, config.sampling_rate
        self.trunk = Trunk(config.latent_channels, config.hidden_channels, config.mlp_channels, config.decoder_depth)
        self.head = nn.Linear(config.hidden_channels, 2 * (config.window // 2 + 1) + config.tones)

    def forward(self, z: Tensor) -> Tensor:
        drawn, bins = self.head(self.trunk(z)).float().transpose(1, 2), self.window // 2 + 1
        log_amplitude, phase, tones = drawn.split([bins, bins, self.tones], dim=1)
        spectrum = torch.polar(log_amplitude.exp().clamp(max=LOUDEST), phase)
        steps, hann = spectrum.shape[2], torch.hann_window(self.window, device=z.device)[:, None]
        frames = torch.fft.irfft(spectrum, self.window, dim=1) * hann
        frames = frames + self._sinusoids(tones.exp().clamp(max=LOUDEST) / LOUDEST) * hann.square()
        wave = self._added(frames, steps)
        return (wave / self._added(hann.square().expand(1, -1, steps), steps))[:, None]

    def _sinusoids(self, loud: Tensor) -> Tensor:
        """Amplitudes (B, tones, T') of semitones from 55 Hz up -> frames (B, window, T')."""
        semitones = torch.arange(self.tones, dtype=torch.float64, device=loud.device)[:, None]
        radians = 2 * math.pi * 55.0 / self.rate * torch.exp2(semitones / 12)
        begun = radians * torch.arange(loud.shape[2], device=loud.device) * self.hop
        within = radians * torch.arange(self.window, device=loud.device)
        turned = torch.cat([loud * begun.sin().float(), loud * begun.cos().float()], dim=1)
        return torch.cat([within.cos(), within.sin()]).float().T @ turned

    def _added(self, frames: Tensor, steps: int) -> Tensor:
        length, margin = (steps - 1) * self.hop + self.window, (self.window - self.hop) // 2
        whole = F.fold(frames, (1, length), kernel_size=(1, self.window), stride=(1, self.hop))[:, 0, 0]
        return whole[:, margin : length - margin]


class Quantizer(nn.Module):
    """Latents (B, D, T) <-> codes (B, K, T), each book coding what those before it leave."""

    codebooks: Tensor

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        books = torch.zeros(config.num_codebooks, config.codebook_size, config.latent_channels)
        self.register_buffer("codebooks", books)
        # what training goes on with
        self.register_buffer("cluster_sum", books.clone())
        self.register_buffer("cluster_size", torch.zeros(config.num_codebooks, config.codebook_size))
        self.register_buffer("initialised", torch.zeros(1))

    def encode(self, z: Tensor, num_books: int | None) -> Tensor:
        residual, codes = z.to(self.codebooks.dtype).transpose(1, 2), []
        for book in self.codebooks[:num_books]:
            distance = residual.square().sum(-1, keepdim=True) - 2 * residual @ book.T + book.T.square().sum(0)
            codes.append((-distance).max(-1).indices)
            residual = residual - F.embedding(codes[-1], book)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        entries = [F.embedding(code, book) for code, book in zip(codes.unbind(1), self.codebooks, strict=False)]
        return torch.stack(entries).sum(0).transpose(1, 2)


class SpectralCodecModel(PreTrainedModel):
    """See the module's docstring."""

    config_class = SpectralCodecConfig
    base_model_prefix = "codec"
    main_input_name = "input_values"

    def __init__(self, config: SpectralCodecConfig):
        super().__init__(config)
        self.encoder, self.quantizer, self.decoder = Encoder(config), Quantizer(config), Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: all weights are in the folder."""

    def encode(self, input_values: Tensor, num_books: int | None = None) -> SpectralCodecOutput:
        """Waveforms (B, 1, T) -> `audio_codes` (B, K, T'), T' = ceil(T / hop), of the first `num_books` books or of all."""
        return SpectralCodecOutput(audio_codes=self.quantizer.encode(self.encoder(input_values), num_books))

    def decode(self, audio_codes: Tensor) -> SpectralCodecOutput:
        """Codes (B, K, T') of the first K books -> `audio_values` (B, 1, hop * T'), unbounded: clamp to [-1, 1]."""
        return SpectralCodecOutput(audio_values=self.decoder(self.quantizer.decode(audio_codes)))

    def forward(self, input_values: Tensor) -> SpectralCodecOutput:
        """Codes of waveforms, and what is decoded from them."""
        codes = self.encode(input_values).audio_codes
        assert codes is not None
        decoded = self.decode(codes).audio_values
        assert decoded is not None
        return SpectralCodecOutput(audio_codes=codes, audio_values=decoded[..., : input_values.shape[-1]])
