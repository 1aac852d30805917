"""Magvit2: MAGVIT-v2's tokenizer of video, 4 x 8 x 8 smaller in time, height and width, each place one code of 2^18.

Nothing looks ahead in time, so that an image is a clip of one frame; with norms that span each frame alone, the codes of a clip's first
frame are those of the image.

Source: Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2), section 3.2 and appendix A;
layers as in TencentARC/SEED-Voken, Open_MAGVIT2's video model, whose outputs these are with `norm_over: chunk`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.lookup_free import LookupFreeQuantizer
from nexus_scale.models.vae.causal_vae3d import EPS, CausalConv3d, GroupNorm, NormOver, PointConv3d, ResidualBlock


class Tokenized(NamedTuple):
    """x_hat: like x; codes: (B, f, h, w) int64; sure, used, commitment: (B,), see `layers.lookup_free.LookedUp`."""

    x_hat: Tensor
    codes: Tensor
    sure: Tensor
    used: Tensor
    commitment: Tensor


class DepthToSpace(nn.Module):
    """Twice the height and width, with `time` twice the frames but for the video's first: channels become places."""

    def __init__(self, channels: int, *, time: bool, shares: bool):
        super().__init__()
        self.shares = shares
        self.block = (2 if time else 1, 2, 2)
        self.conv = CausalConv3d(channels, channels * 4 * self.block[0], zeros=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, f, h, w) -> (B, C, F, 2h, 2w), F = f, or with `time` 2f - 1."""
        t, s, _ = self.block
        if t > 1 and x.shape[2] == 1:
            y, t = self._of_image(x), 1
        else:
            y, _ = self.conv(x)
        y = y.unflatten(1, (t, s, s, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)  # (B, C, f, t, h, s, w, s)
        y = y.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return torch.cat([y[:, :, :1], y[:, :, 2:]], dim=2) if t > 1 else y

    def _of_image(self, x: Tensor) -> Tensor:
        """The first of the two frames, which is all that is kept of an image; where `shares`, the second learns what it learns."""
        assert self.conv.bias is not None
        (weight, other), (bias, beside) = self.conv.weight[:, :, -1].chunk(2), self.conv.bias.chunk(2)
        if self.shares:
            weight, bias = weight + (other - other.detach()), bias + (beside - beside.detach())
        return self.conv.alone(x, weight, bias)


class AdaptiveNorm(nn.Module):
    """Group norm, scaled and shifted by the spread and the mean of the latents: of the whole clip, or of those of each frame."""

    def __init__(self, channels: int, num_groups: int, over: NormOver, latent_channels: int):
        super().__init__()
        self.num_groups, self.over = num_groups, over
        self.scale = Linear(latent_channels, channels)
        self.shift = Linear(latent_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B, C, F, H, W), z (B, latent_channels, f, h, w)."""
        B, _, frames = x.shape[:3]
        each = (
            z.float().flatten(2)[:, :, None] if self.over == "chunk" else z.float().flatten(3)
        )  # (B, D, 1 or f, places)
        scale = self.scale((each.var(3) + EPS).sqrt().transpose(1, 2).to(x.dtype))  # (B, 1 or f, C)
        shift = self.shift(each.mean(3).transpose(1, 2).to(x.dtype))
        if self.over == "chunk":
            y = F.group_norm(x, self.num_groups, eps=EPS)
        else:
            y = F.group_norm(x.transpose(1, 2).flatten(0, 1), self.num_groups, eps=EPS)
            y = y.unflatten(0, (B, frames)).transpose(1, 2)
            scale, shift = (_of_frames(value, frames) for value in (scale, shift))
        return torch.addcmul(_placed(shift), y, _placed(scale))


def _of_frames(values: Tensor, frames: int) -> Tensor:
    """What each latent frame has, for each frame that comes of it: (B, f, C) -> (B, F, C). The first stands for itself."""
    latent = values.shape[1]
    return (
        values
        if latent == frames
        else torch.cat([values[:, :1], values[:, 1:].repeat_interleave((frames - 1) // (latent - 1), dim=1)], dim=1)
    )


def _placed(values: Tensor) -> Tensor:
    """(B, F, C) -> (B, C, F, 1, 1)."""
    return values.transpose(1, 2)[..., None, None]


class Magvit2(Network):
    """Clips (B, image_channels, F, H, W) in [-1, 1] <-> codes (B, f, h, w) of 0 .. 2^bits - 1; F = 1 + r k for f = 1 + k, where r is
    `temporal_ratio`.

    Args:
        image_channels: channels of a frame.
        num_frames, image_size: frames, height and width that FLOPs are counted for, and of which `decode` makes clips of codes in a row;
            others work.
        bits: of a code.
        channels: of each stage, from full resolution down; each but the last halves height and width.
        depth: residual blocks of a stage, and of the middle.
        temporal_ratio: r, a power of two: the last of the halvings halve time, too.
        num_groups: of the group norms.
        norm_over: what their statistics span: all frames (`chunk`), or each frame alone (`frame`), so that images and first frames have
            the same codes.
        temperature: of softened codes, see `LookupFreeQuantizer`.
        inflates: begins as a network of images that sees each frame alone, and what images teach holds for all frames: for training on
            images first (`objective.image_steps`).
    Raises:
        UserError: sizes that do not fit one another.
    """

    serves_as = "tokenizer"

    def __init__(
        self,
        *,
        image_channels: int = 3,
        num_frames: int = 17,
        image_size: tuple[int, int] = (128, 128),
        bits: int = 18,
        channels: tuple[int, ...] = (128, 256, 256, 512),
        depth: int = 4,
        temporal_ratio: int = 4,
        num_groups: int = 32,
        norm_over: NormOver = "frame",
        temperature: float = 0.01,
        inflates: bool = False,
    ):
        super().__init__()
        if len(image_size) != 2 or not channels:
            raise UserError(f"magvit2: got image_size {image_size} and channels {channels}; expected 2 and at least 1")
        counts = {
            "image_channels": image_channels,
            "num_frames": num_frames,
            "image_size": min(image_size),
            "bits": bits,
        }
        check_counts("magvit2", {**counts, "channels": min(channels), "depth": depth, "num_groups": num_groups})
        if any(width % num_groups for width in channels):
            raise UserError(f"magvit2.num_groups: {num_groups} does not divide channels {channels}; change one")
        halvings, last = temporal_ratio.bit_length() - 1, len(channels) - 1
        if temporal_ratio != 2**halvings or not 0 <= halvings <= last:
            raise UserError(
                f"magvit2.temporal_ratio: got {temporal_ratio}; expected a power of two of at most {2**last}"
            )
        self.image_channels, self.num_frames, self.bits = image_channels, num_frames, bits
        self.image_size = (image_size[0], image_size[1])
        self.channels, self.depth, self.temporal_ratio = tuple(channels), depth, temporal_ratio
        self.num_groups, self.norm_over, self.downsampling = num_groups, norm_over, 2**last
        self.inflates = inflates
        try:
            self.check_sizes(num_frames, *self.image_size)
        except UserError as error:
            raise UserError(f"magvit2: num_frames {num_frames}, image_size {self.image_size}: {error}") from None

        def blocks(first: int, rest: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResidualBlock(first if i == 0 else rest, rest, num_groups, norm_over, None, bias=False, zeros=True)
                for i in range(depth)
            )

        self.quantizer = LookupFreeQuantizer(bits=bits, temperature=temperature)
        self.enc_in = CausalConv3d(image_channels, channels[0], bias=False, zeros=True)
        self.enc_stages = nn.ModuleList(
            blocks(before, own) for before, own in zip((channels[0], *channels), channels, strict=False)
        )
        strides = [(2 if i >= last - halvings else 1, 2, 2) for i in range(last)]
        self.down = nn.ModuleList(
            CausalConv3d(own, own, stride=stride, zeros=True) for own, stride in zip(channels, strides, strict=False)
        )
        self.enc_middle = blocks(channels[-1], channels[-1])
        self.enc_norm = GroupNorm(channels[-1], num_groups, norm_over)
        self.to_latents = PointConv3d(channels[-1], bits)

        widths = channels[::-1]
        self.dec_in = CausalConv3d(bits, widths[0], zeros=True)
        self.dec_middle = blocks(widths[0], widths[0])
        self.adapt = nn.ModuleList(AdaptiveNorm(w, num_groups, norm_over, bits) for w in (widths[0], *widths[:-1]))
        self.dec_stages = nn.ModuleList(
            blocks(before, own) for before, own in zip((widths[0], *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            DepthToSpace(own, time=stride[0] > 1, shares=inflates)
            for own, stride in zip(widths, strides[::-1], strict=False)
        )
        self.dec_norm = GroupNorm(widths[-1], num_groups, norm_over)
        self.dec_out = CausalConv3d(widths[-1], image_channels, zeros=True)

    @property
    def codebook_size(self) -> int:
        """How many codes there are."""
        return self.quantizer.codebook_size

    def code_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(f, h, w) of a clip."""
        return 1 + (frames - 1) // self.temporal_ratio, height // self.downsampling, width // self.downsampling

    def forward(self, x: Tensor) -> Tokenized:
        """
        Args:
            x: clips in [-1, 1], (B, image_channels, F, H, W).
        Raises:
            ValueError, UserError: other channels; frames or a size that the stages do not halve.
        """
        found = self.quantizer(self.latents(x))
        return Tokenized(self.pixels(found.latents), found.codes, found.sure, found.used, found.commitment)

    def encode(self, x: Tensor) -> Tensor:
        """Clips -> codes (B, f, h, w) int64."""
        return self.quantizer.encode(self.latents(x))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, f, h, w), or (B, f * h * w) of clips of `image_size` -> clips, unbounded: clamp to [-1, 1] for pixels."""
        if codes.ndim == 2:
            codes = codes.unflatten(1, (-1, *self.code_shape(1, *self.image_size)[1:]))
        return self.pixels(self.quantizer.decode(codes))

    def latents(self, x: Tensor) -> Tensor:
        """Clips -> what is quantised, (B, bits, f, h, w)."""
        if x.ndim != 5 or x.shape[1] != self.image_channels:
            raise ValueError(
                f"videos of shape {tuple(x.shape)}; expected (B, {self.image_channels}, F, H, W): images have one frame"
            )
        self.check_sizes(*x.shape[2:])
        h, _ = self.enc_in(x.to(self.enc_in.weight.dtype))
        for number, stage in enumerate(self.enc_stages):
            h = _through(stage, h)
            if number < len(self.down):
                h, _ = self.down[number](h)
        h = _through(self.enc_middle, h)
        return self.to_latents(F.silu(self.enc_norm.normed(h)))

    def pixels(self, z: Tensor) -> Tensor:
        """Quantised latents (B, bits, f, h, w) -> clips."""
        z = z.to(self.dec_in.weight.dtype)
        h, _ = self.dec_in(z)
        h = _through(self.dec_middle, h)
        for number, stage in enumerate(self.dec_stages):
            h = _through(stage, self.adapt[number](h, z))
            h = self.up[number](h) if number < len(self.up) else h
        y, _ = self.dec_out(F.silu(self.dec_norm.normed(h)))
        return y

    def init_weights(self) -> None:
        """torch's defaults of convolutions and norms, as in the public code; but adaptive norms begin as plain ones."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                init.uniform_(module)
            elif isinstance(module, GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, AdaptiveNorm):
                for linear, bias in ((module.scale, 1.0), (module.shift, 0.0)):
                    nn.init.zeros_(linear.weight)
                    nn.init.constant_(linear.bias, bias)
        if self.inflates:
            self._inflate()

    @torch.no_grad()
    def _inflate(self) -> None:
        """Kernels of the present alone, as wide as those of images are; both frames that a latent becomes are alike.

        Source: Yu et al. 2023 (MAGVIT), section 4.1, inflation of an image network, of which the causal one keeps the last frame.
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
                module.weight.mul_(module.kernel_size[0] ** 0.5)
        for up in self.up:
            assert isinstance(up, DepthToSpace)
            assert up.conv.bias is not None
            if up.block[0] > 1:
                for value in (up.conv.weight, up.conv.bias):
                    first, second = value.chunk(2)
                    second.copy_(first)

    def blocks(self) -> Sequence[nn.Module]:
        groups = (*self.enc_stages, self.enc_middle, self.dec_middle, *self.dec_stages)
        return [block for group in groups for block in group]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        """Arguments of `forward` at the configured size, on any device, meta too; `text_tokens` has no meaning here."""
        return (torch.zeros(batch_size, self.image_channels, self.num_frames, *self.image_size, device=device),)

    def check_sizes(self, frames: int, height: int, width: int) -> None:
        """Raises a UserError, with what to change, for a clip that the network does not accept."""
        r, s = self.temporal_ratio, self.downsampling
        if frames < 1 or (frames - 1) % r:
            below = 1 + (max(frames, 1) - 1) // r * r
            raise UserError(
                f"a video of {frames} frames: the tokenizer takes 1 + {r}k frames, the first of which stands for itself; cut it to {below} "
                f"or pad it to {below + r}"
            )
        if height % s or width % s:
            raise UserError(f"frames of {height} x {width}: crop or resize them to multiples of {s} pixels")

    def extra_repr(self) -> str:
        shape = self.code_shape(self.num_frames, *self.image_size)
        return f"videos {self.image_channels} x {self.num_frames} x {self.image_size} <-> codes {shape} of {self.bits} bits"


def _through(stage: nn.Module, x: Tensor) -> Tensor:
    for block in stage.children():
        x, _ = block(x, x, True, None)
    return x
