"""CausalVAE3D: CogVideoX's video autoencoder, 4 x 8 x 8 smaller in time, height and width.

Nothing looks ahead in time: convolutions are padded with the past alone, and the first frame stands for itself, so that an
image is a video of one frame. A long video goes through chunk by chunk; each convolution keeps the last frames that it saw,
and nothing is seen twice or left out at a border.

Source: Yang et al. 2024 (CogVideoX), section 2.1; Yu et al. 2023 (MAGVIT-v2), causal convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.tags import KeepsTags, tag_param

# clamp from latent diffusion's code: exp(logvar) stays finite for any encoder output
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
# initial posterior std 0.14: at std 1 the decoder would first have to learn to ignore the noise
LOGVAR_INIT = -4.0
EPS = 1e-6
NormOver = Literal["chunk", "frame"]


class Chunk:
    """One chunk of a video in the network, and the state left by the previous chunk.

    Attributes:
        first: its first frame is the video's own first, which stands for itself.
        tails: by module, the last frames that its convolutions saw, with their graph.

    A chunk reads the tails of the one before and writes its own. Modules are given the ones and return the others, so that a block
    computes the same when it is computed again (activation checkpointing), and is one piece for a compiler.
    """

    def __init__(self, first: bool, before: Chunk | None = None):
        self.first, self.before = first, before
        self.tails: dict[nn.Module, Any] = {}

    def past(self, module: nn.Module) -> Any:
        """The tails of the chunk before; None at the start of a video."""
        return None if self.before is None else self.before.tails[module]


class CausalConv3d(KeepsTags, nn.Conv3d):
    """A convolution that is causal in time: it spans `kernel_size` frames, and with `stride` 1 it keeps frames, height and width.

    Args:
        zeros: nothing stands before a video; without it, its first frame, repeated.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
        zeros: bool = False,
    ):
        side = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=(0, side, side), bias=bias)
        self.zeros = zeros
        tag_param(self.weight, decay=True)
        if self.bias is not None:
            tag_param(self.bias, decay=False)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, C, F, H, W) -> (B, C', F, H, W), and the last frames of x, for the next chunk.

        Args:
            past: the frames before x, (B, C, kernel_size - 1, H, W); None at the start of a video.
        """
        frames = self.kernel_size[0] - 1
        if past is None and self.zeros and x.shape[2] == 1:
            return self.alone(x, self.weight[:, :, -1], self.bias), F.pad(x, (0, 0, 0, 0, frames - 1, 0))
        if past is None:
            past = x[:, :, :1].expand(-1, -1, frames, -1, -1)
            past = torch.zeros_like(past) if self.zeros else past
        x = torch.cat((past, x), dim=2)  # (B, C, frames + F, H, W)
        return super().forward(x), x[:, :, -frames:].clone()  # a view would hold all of x

    def alone(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """An image, (B, C, 1, H, W), that nothing stands before: in two dimensions, at a third of the work."""
        return F.conv2d(x[:, :, 0], weight, bias, self.stride[1:], self.padding[1:])[:, :, None]

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class PointConv3d(CausalConv3d):
    """A linear map of each place by itself, (B, C, F, H, W) -> (B, C', F, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return nn.Conv3d.forward(self, x)


class FrameConv(KeepsTags, nn.Conv2d):
    """A convolution of each frame by itself, (B, C, F, H, W) -> (B, C, F, H', W')."""

    def __init__(self, channels: int, *, stride: int, padding: int):
        super().__init__(channels, channels, 3, stride=stride, padding=padding)
        tag_param(self.weight, decay=True)
        assert self.bias is not None
        tag_param(self.bias, decay=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        y = super().forward(x.transpose(1, 2).flatten(0, 1))  # (B * F, C, H', W')
        return y.unflatten(0, (-1, frames)).transpose(1, 2)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class GroupNorm(KeepsTags, nn.Module):
    """Group norm whose statistics span a chunk's frames (as in the released weights), or each frame alone."""

    def __init__(self, channels: int, num_groups: int, over: NormOver):
        super().__init__()
        self.num_groups, self.over = num_groups, over
        self.weight = tag_param(nn.Parameter(torch.ones(channels)), decay=False)
        self.bias = tag_param(nn.Parameter(torch.zeros(channels)), decay=False)

    def forward(self, x: Tensor, z: Tensor, first: bool) -> Tensor:
        """x (B, C, F, H, W); the other arguments are for `SpatialNorm`, which replaces this norm in the decoder."""
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        if self.over == "chunk":
            return F.group_norm(x, self.num_groups, self.weight, self.bias, EPS)
        frames = x.shape[2]
        y = F.group_norm(x.transpose(1, 2).flatten(0, 1), self.num_groups, self.weight, self.bias, EPS)
        return y.unflatten(0, (-1, frames)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, num_groups={self.num_groups}, over={self.over}"


class SpatialNorm(GroupNorm):
    """Group norm, scaled and shifted at each position by the latents there (Zheng et al. 2022, MoVQ)."""

    def __init__(self, channels: int, num_groups: int, over: NormOver, latent_channels: int):
        super().__init__(channels, num_groups, over)
        self.scale = PointConv3d(latent_channels, channels)
        self.shift = PointConv3d(latent_channels, channels)

    def forward(self, x: Tensor, z: Tensor, first: bool) -> Tensor:
        """x (B, C, F, H, W), z (B, latent_channels, f, h, w): latents are enlarged to the frames they encode."""
        # a 1 x 1 x 1 convolution commutes with the nearest-neighbour enlargement, and is cheaper before it
        scale, shift = (_enlarge(conv(z), x.shape[2:], first) for conv in (self.scale, self.shift))
        return torch.addcmul(shift, self.normed(x), scale)


def _enlarge(z: Tensor, size: Sequence[int], first: bool) -> Tensor:
    """Nearest neighbours, (B, C, f, h, w) -> (B, C, *size); the video's first frame stays one frame."""
    if not first or size[0] == 1:
        return F.interpolate(z, size=tuple(size))
    parts = [F.interpolate(z[:, :, :1], size=(1, *size[1:])), F.interpolate(z[:, :, 1:], size=(size[0] - 1, *size[1:]))]
    return torch.cat(parts, dim=2)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), in the decoder with norms that see the latents. `bias`, `zeros`: of the convolutions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        over: NormOver,
        latent_channels: int | None,
        *,
        bias: bool = True,
        zeros: bool = False,
    ):
        super().__init__()

        def norm(channels: int) -> GroupNorm:
            if latent_channels is None:
                return GroupNorm(channels, num_groups, over)
            return SpatialNorm(channels, num_groups, over, latent_channels)

        self.norm1, self.norm2 = norm(in_channels), norm(out_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, bias=bias, zeros=zeros)
        self.conv2 = CausalConv3d(out_channels, out_channels, bias=bias, zeros=zeros)
        self.shortcut = PointConv3d(in_channels, out_channels, bias=bias) if in_channels != out_channels else None

    def forward(
        self, x: Tensor, z: Tensor, first: bool, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, C, F, H, W), z (B, latent_channels, f, h, w) -> (B, C', F, H, W), and the tails of both convolutions.

        Args:
            first: the first frame is the video's.
            past: the tails of the chunk before; None at the start of a video.
        """
        past1, past2 = (None, None) if past is None else past
        y, tail1 = self.conv1(F.silu(self.norm1(x, z, first)), past1)
        y, tail2 = self.conv2(F.silu(self.norm2(y, z, first)), past2)
        return y + (x if self.shortcut is None else self.shortcut(x)), (tail1, tail2)


class Downsample(nn.Module):
    """Half the height and width; with `time` pairs of frames become their mean, but for the video's first."""

    def __init__(self, channels: int, *, time: bool):
        super().__init__()
        self.time = time
        self.conv = FrameConv(channels, stride=2, padding=0)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        if self.time:
            alone, pairs = x.split((1, x.shape[2] - 1), dim=2) if chunk.first else (x[:, :, :0], x)
            x = torch.cat((alone, pairs.unflatten(2, (-1, 2)).mean(3)), dim=2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # as in latent diffusion's code: padded right and below


class Upsample(nn.Module):
    """Twice the height and width; with `time` twice the frames, but for the video's first."""

    def __init__(self, channels: int, *, time: bool):
        super().__init__()
        self.time = time
        self.conv = FrameConv(channels, stride=1, padding=1)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        _, _, f, h, w = x.shape
        frames = (2 * f - 1 if chunk.first else 2 * f) if self.time else f
        size = (frames, 2 * h, 2 * w)
        return self.conv(_enlarge(x, size, chunk.first and self.time))


class Stage(nn.Module):
    """Residual blocks at one resolution, then the way to the next one."""

    def __init__(self, blocks: Sequence[ResidualBlock], resample: Downsample | Upsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(self, x: Tensor, z: Tensor, chunk: Chunk) -> Tensor:
        for block in self.blocks:
            x, chunk.tails[block] = block(x, z, chunk.first, chunk.past(block))
        return x if self.resample is None else self.resample(x, chunk)


class Coder(nn.Module):
    """Encoder or decoder: a convolution in, stages, norm, a convolution out."""

    def __init__(self, conv_in: CausalConv3d, stages: Sequence[Stage], norm_out: GroupNorm, conv_out: CausalConv3d):
        super().__init__()
        self.conv_in, self.stages, self.norm_out, self.conv_out = conv_in, nn.ModuleList(stages), norm_out, conv_out

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        h, chunk.tails[self.conv_in] = self.conv_in(x, chunk.past(self.conv_in))
        for stage in self.stages:
            h = stage(h, x, chunk)
        h = F.silu(self.norm_out(h, x, chunk.first))
        y, chunk.tails[self.conv_out] = self.conv_out(h, chunk.past(self.conv_out))
        return y


class CausalVAE3D(Network):
    """Gaussian autoencoder, (B, image_channels, F, H, W) <-> (B, latent_channels, f, H / s, W / s).

    F is 1 + r * k frames for f = 1 + k (the first stands for itself), or r * 2k for f = 2k, with r = temporal_ratio; s is 2 for
    each stage but the last.

    Args:
        image_channels: channels of a frame, with values in [-1, 1].
        num_frames, image_size: frames, height and width that `latent_shape` speaks of; others work.
        latent_channels: C of the latents.
        channels: of each stage, from full resolution down.
        depth: residual blocks of an encoder's stage; the decoder's have one more.
        temporal_ratio: r, a power of two: the first stages halve time, too.
        num_groups: of the group norms.
        norm_over: what their statistics span. `chunk`: all frames of a chunk, as in CogVideoX's weights, where the chunk is part
            of what the network computes; `frame`: each frame alone, so that chunks of any size give the same.
        chunk_frames: frames that are encoded at once (the first chunk has one more); their latents are decoded two at once in
            CogVideoX, with 8 and 4 frames to a latent: `latent_chunk`.
        latent_chunk: latent frames that are decoded at once (the first chunk has one more).
    Raises:
        UserError: sizes that do not fit one another.
    """

    serves_as = "autoencoder"

    def __init__(
        self,
        *,
        image_channels: int = 3,
        num_frames: int = 49,
        image_size: tuple[int, int] = (480, 720),
        latent_channels: int = 16,
        channels: tuple[int, ...] = (128, 256, 256, 512),
        depth: int = 3,
        temporal_ratio: int = 4,
        num_groups: int = 32,
        norm_over: NormOver = "chunk",
        chunk_frames: int = 8,
        latent_chunk: int = 2,
    ):
        super().__init__()
        if len(image_size) != 2 or not channels:
            raise UserError(
                f"causal_vae3d: got image_size {image_size} and channels {channels}; expected 2 and at least 1"
            )
        check_counts(
            "causal_vae3d",
            {
                "image_channels": image_channels,
                "num_frames": num_frames,
                "image_size": min(image_size),
                "latent_channels": latent_channels,
                "channels": min(channels),
                "depth": depth,
                "num_groups": num_groups,
                "latent_chunk": latent_chunk,
            },
        )
        if any(width % num_groups for width in channels):
            raise UserError(f"causal_vae3d.num_groups: {num_groups} does not divide channels {channels}; change one")
        halvings = temporal_ratio.bit_length() - 1
        if temporal_ratio != 2**halvings or not 0 <= halvings < len(channels):
            raise UserError(
                f"causal_vae3d.temporal_ratio: got {temporal_ratio}; expected a power of two of at most {2 ** (len(channels) - 1)}"
            )
        if chunk_frames < 1 or chunk_frames % temporal_ratio:
            raise UserError(
                f"causal_vae3d.chunk_frames: got {chunk_frames}; expected a multiple of temporal_ratio = {temporal_ratio}"
            )
        self.image_channels, self.num_frames = image_channels, num_frames
        self.image_size = (image_size[0], image_size[1])
        self.latent_channels, self.channels, self.depth = latent_channels, tuple(channels), depth
        self.temporal_ratio, self.num_groups, self.norm_over = temporal_ratio, num_groups, norm_over
        self.chunk_frames, self.latent_chunk = chunk_frames, latent_chunk
        self.downsampling = 2 ** (len(channels) - 1)
        self.check_sizes(num_frames, *self.image_size)

        last = len(channels) - 1

        def blocks(first: int, rest: int, count: int, z: int | None) -> list[ResidualBlock]:
            return [ResidualBlock(first if i == 0 else rest, rest, num_groups, norm_over, z) for i in range(count)]

        down = [
            Stage(
                blocks(channels[max(i - 1, 0)], channels[i], depth, None),
                Downsample(channels[i], time=i < halvings) if i < last else None,
            )
            for i in range(last + 1)
        ]
        middle = Stage(blocks(channels[-1], channels[-1], 2, None), None)
        self.encoder = Coder(
            CausalConv3d(image_channels, channels[0]),
            [*down, middle],
            GroupNorm(channels[-1], num_groups, norm_over),
            CausalConv3d(channels[-1], 2 * latent_channels),
        )
        widths = channels[::-1]
        up = [
            Stage(
                blocks(widths[max(i - 1, 0)], widths[i], depth + 1, latent_channels),
                Upsample(widths[i], time=i < halvings) if i < last else None,
            )
            for i in range(last + 1)
        ]
        middle = Stage(blocks(widths[0], widths[0], 2, latent_channels), None)
        self.decoder = Coder(
            CausalConv3d(latent_channels, widths[0]),
            [middle, *up],
            SpatialNorm(widths[-1], num_groups, norm_over, latent_channels),
            CausalConv3d(widths[-1], image_channels),
        )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, f, h, w) of the latents of a video of `num_frames` and `image_size`."""
        height, width = self.image_size
        frames = self.latent_frames(self.num_frames)
        return self.latent_channels, frames, height // self.downsampling, width // self.downsampling

    def latent_frames(self, frames: int) -> int:
        """f of a video of F frames."""
        return (frames + self.temporal_ratio - 1) // self.temporal_ratio

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: videos in [-1, 1], (B, image_channels, F, H, W).
            eps: standard normal, (B, C, f, h, w); None decodes the mean.
        Returns:
            x_hat like x; mean and logvar of the posterior, (B, C, f, h, w) each.
        """
        mean, logvar = self.encode(x).chunk(2, dim=1)  # (B, C, f, h, w) each
        logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)
        z = mean if eps is None else torch.addcmul(mean, torch.exp(0.5 * logvar), eps.to(mean.dtype))
        return self.decode(z, frames=x.shape[2]), mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """Posterior moments of x: mean and log-variance on channels, (B, 2C, f, h, w); chunk by chunk.

        Raises:
            UserError: a number of frames or a size that the network cannot take.
            ValueError: another number of channels.
        """
        if x.ndim != 5 or x.shape[1] != self.image_channels:
            raise ValueError(
                f"videos of shape {tuple(x.shape)}; expected (B, {self.image_channels}, F, H, W): images have one frame"
            )
        self.check_sizes(*x.shape[2:])
        chunks = _chunks(x, self.chunk_frames)
        return torch.cat(list(self.encode_chunks(chunks, first=self._begins_alone(x.shape[2]))), dim=2)

    def encode_chunks(self, videos: Iterator[Tensor], *, first: bool = True) -> Iterator[Tensor]:
        """As `encode`, of a video that comes in pieces (B, image_channels, F, H, W), such as from a decoder: nothing is held but
        a piece and two frames for each convolution.

        Args:
            videos: pieces, each of a multiple of `temporal_ratio` frames, the first of one more where `first`.
        Yields:
            moments of each, (B, 2C, f, h, w).
        """
        return self._stream(self.encoder, videos, first)

    def decode(self, z: Tensor, *, frames: int | None = None) -> Tensor:
        """z (B, C, f, h, w) -> (B, image_channels, F, H, W), unbounded: clamp to [-1, 1] for pixels; chunk by chunk.

        Args:
            frames: F, what the latents were encoded from. Two latent frames are of 5 frames or of 8, which the latents do not show.
                None: as `num_frames` has it, 1 + r * (f - 1) unless the network is for multiples of 2r. (diffusers takes an even f
                for r * f, and gives 8 frames for the latents of 5.)
        Raises:
            ValueError: another number of channels, or latents of another number of frames.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(f"latents of shape {tuple(z.shape)}; expected (B, {self.latent_channels}, f, h, w)")
        if frames is not None:
            self._check_frames(frames)
            if self.latent_frames(frames) != z.shape[2]:
                raise ValueError(
                    f"latents of {z.shape[2]} frames; a video of {frames} frames has {self.latent_frames(frames)}"
                )
        chunks = _chunks(z, self.latent_chunk)
        first = self._begins_alone(self.num_frames if frames is None else frames)
        return torch.cat(list(self.decode_chunks(chunks, first=first)), dim=2)

    def decode_chunks(self, latents: Iterator[Tensor], *, first: bool = True) -> Iterator[Tensor]:
        """As `decode`, piece by piece, (B, C, f, h, w) each; `first`: the first latent frame is one video frame."""
        return self._stream(self.decoder, latents, first)

    def _stream(self, coder: Coder, shards: Iterator[Tensor], first: bool) -> Iterator[Tensor]:
        chunk: Chunk | None = None
        for shard in shards:
            chunk = Chunk(first and chunk is None, chunk)
            yield coder(shard.to(coder.conv_in.weight.dtype), chunk)
            chunk.before = chunk.before if torch.is_grad_enabled() else None

    def init_weights(self) -> None:
        """Convolutions Kaiming normal for SiLU's near kin, norms one, the second convolution of a residual block zero; the posterior
        begins with std exp(LOGVAR_INIT / 2) whatever the video."""
        for module in self.modules():
            if isinstance(module, CausalConv3d | FrameConv):
                nn.init.kaiming_normal_(module.weight.flatten(1), nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SpatialNorm):
                # scale one and shift zero for any latents: a plain group norm at the start
                for conv, bias in ((module.scale, 1.0), (module.shift, 0.0)):
                    nn.init.zeros_(conv.weight)
                    assert conv.bias is not None
                    nn.init.constant_(conv.bias, bias)
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
        out = self.encoder.conv_out
        assert out.bias is not None
        with torch.no_grad():
            out.weight[self.latent_channels :] = 0
            out.bias[self.latent_channels :] = LOGVAR_INIT

    def blocks(self) -> Sequence[nn.Module]:
        return [block for coder in (self.encoder, self.decoder) for stage in coder.stages for block in stage.blocks]  # type: ignore[union-attr]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Arguments of `forward` at the configured size, on any device, meta too; `text_tokens` has no meaning here."""
        x = torch.zeros(batch_size, self.image_channels, self.num_frames, *self.image_size, device=device)
        return x, torch.zeros(batch_size, *self.latent_shape, device=device)

    def extra_repr(self) -> str:
        return (
            f"videos {self.image_channels} x {self.num_frames} x {self.image_size} <-> latents {self.latent_shape}, "
            f"norm_over={self.norm_over}, chunk_frames={self.chunk_frames}, latent_chunk={self.latent_chunk}"
        )

    def check_sizes(self, frames: int, height: int, width: int) -> None:
        """Raises a UserError, with what to change, for a video that the network does not accept."""
        self._check_frames(frames)
        self._check_size(height, width)

    def _begins_alone(self, frames: int) -> bool:
        return frames % self.temporal_ratio == 1 or self.temporal_ratio == 1

    def _check_frames(self, frames: int) -> None:
        r = self.temporal_ratio
        if frames < 1 or (frames % r != 1 and frames % (2 * r) and r > 1):
            below = 1 + (frames - 1) // r * r
            raise UserError(
                f"a video of {frames} frames: the autoencoder takes 1 + {r}k frames, the first of which stands for itself, or "
                f"{2 * r}k; cut it to {max(below, 1)} or pad it to {max(below, 1) + r}"
            )

    def _check_size(self, height: int, width: int) -> None:
        s = self.downsampling
        if height % s or width % s:
            raise UserError(f"frames of {height} x {width}: crop or resize them to multiples of {s} pixels")


def _chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """Chunks of `size` frames; the remainder joins the first, as in CogVideoX."""
    frames = x.shape[2]
    begin = size + frames % size if frames >= size else frames
    return iter([x[:, :, :begin], *x[:, :, begin:].split(size, dim=2)] if frames > begin else [x])
