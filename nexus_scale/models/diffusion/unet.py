"""UNet: the convolutional denoiser of DDPM and ADM, on pixels or latents, with or without classes.

Source: Ho et al. 2020, "Denoising diffusion probabilistic models"; Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.conv_blocks import PlaceAttention, ResnetBlock
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import VectorEmbedder, sinusoid
from nexus_scale.models.layers.levels import Levels
from nexus_scale.models.layers.linear import Conv2d, Linear
from nexus_scale.models.layers.norms import GroupNorm
from nexus_scale.models.layers.tags import KeepsTags, tag_param

STEPS = 1000


class TimeEmbedding(VectorEmbedder):
    """Time (B,) -> (B, D), by sinusoids of `frequencies` values.

    Args:
        frequency_shift: frequencies are 10000^(-i / (frequencies / 2 - shift)).
        sin_first: sines come before cosines.
        counts_steps: it sees DDPM's step 1000 t - 1, so that t = 0.001 .. 1 are the steps 0 .. 999; else 1000 t.
    """

    def __init__(
        self, frequencies: int, hidden_size: int, *, frequency_shift: int, sin_first: bool, counts_steps: bool
    ):
        super().__init__(frequencies, hidden_size)
        self.frequencies, self.frequency_shift = frequencies, frequency_shift
        self.sin_first, self.counts_steps = sin_first, counts_steps

    def forward(self, t: Tensor, told: Tensor | None = None) -> Tensor:
        """told: (B, frequencies), what is added to the sinusoids (a guidance scale)."""
        # float32 holds t to 6e-5 of a step, which cosines would carry on: to the nearest 1/1024, whole steps are whole
        seen = (t.double() * (STEPS * 1024)).round() / 1024 - 1 if self.counts_steps else t.float() * STEPS
        sinusoids = self.ordered(sinusoid(seen, self.frequencies, shift=self.frequency_shift)).to(self.fc1.weight.dtype)
        return super().forward(sinusoids if told is None else sinusoids + told)

    def ordered(self, sinusoids: Tensor) -> Tensor:
        """Cosines and sines, in the order of this network."""
        return torch.cat(sinusoids.chunk(2, dim=-1)[::-1], dim=-1) if self.sin_first else sinusoids

    def extra_repr(self) -> str:
        return (
            f"frequencies={self.frequencies}, frequency_shift={self.frequency_shift}, sin_first={self.sin_first}, "
            f"counts_steps={self.counts_steps}"
        )


class ClassEmbedding(KeepsTags, nn.Module):
    """Class numbers (B,) -> (B, D); of a class that is dropped, zeros."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        # rows of classes that a batch lacks would decay without learning
        self.table = tag_param(nn.Parameter(torch.empty(num_classes, hidden_size)), decay=False)

    def forward(self, label: Tensor, drop: Tensor | None = None) -> Tensor:
        """label: (B,) integers in 0 .. num_classes - 1. drop: (B,) bool, True where the class is dropped."""
        if label.device.type == "cpu" and label.numel():  # on a GPU the lookup itself would wait for the device
            low, high = int(label.min()), int(label.max())
            if low < 0 or high >= len(self.table):
                raise ValueError(
                    f"labels from {low} to {high}; expected 0 .. {len(self.table) - 1}: set networks.*.num_classes"
                )
        rows = F.embedding(label, self.table)
        return rows if drop is None else rows * ~drop[:, None]

    def init_weights(self) -> None:
        """ADM's: N(0, 1)."""
        nn.init.normal_(self.table)


class Stage(nn.Module):
    """A residual block, and with `head_dim` attention behind it, (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, resnet: ResnetBlock, attention: PlaceAttention | None):
        super().__init__()
        self.resnet, self.attention = resnet, attention

    def forward(self, x: Tensor, silu_c: Tensor, skip: Tensor | None = None) -> Tensor:
        """skip: what joins x on channels, on the way up."""
        x = self.resnet(x if skip is None else torch.cat((x, skip), dim=1), silu_c)
        return x if self.attention is None else self.attention(x)


def check_widths(network: str, widths: Sequence[int], num_groups: int, latent_size: int) -> None:
    """Checks what all U-Nets ask of their channels and sizes.

    Raises:
        UserError: channels that groups do not divide, or an input that levels do not leave a place of.
    """
    if not widths or any(width < 1 or width % num_groups for width in widths) or (widths and widths[0] % 2):
        raise UserError(
            f"{network}.widths: got {list(widths)} with num_groups {num_groups}; expected multiples of it, the first one even"
        )
    if latent_size < 2 ** (len(widths) - 1):
        raise UserError(
            f"{network}.latent_size: got {latent_size} for {len(widths)} levels; it must be at least {2 ** (len(widths) - 1)}"
        )


class UNet(Network):
    """Residual blocks and attention at halving resolutions, with skips between equal ones; conditioned on time, and on a class or none.

    | model         | widths                         | depth | attention at | parameters |
    | ------------- | ------------------------------ | ----- | ------------ | ---------- |
    | DDPM CIFAR-10 | 128 256 256 256                | 2     | 16           | 35.7 M     |
    | DDPM 256      | 128 128 256 256 512 512        | 2     | 16           | 113.7 M    |
    | ADM 64        | 192 384 576 768                | 3     | 32 16 8      | 295.9 M    |
    | ADM 256       | 256 256 512 512 1024 1024      | 2     | 32 16 8      | 553.8 M    |

    Args:
        latent_channels: C; 3 for pixels.
        latent_size: height and width of the configured input; other sizes work.
        widths: channels of each level; each is half as high and wide as the one before.
        depth: stages of a level on the way down; on the way up there is one more.
        attention: levels, counted from 0, whose stages have attention.
        mid_attention: whether the middle has it.
        mid_attention_norm: whether that one has a norm before it.
        head_dim: channels of a head of attention; None: one head of all channels.
        num_classes: classes told apart; 0: it is told none.
        learn_sigma: twice the channels come out: the prediction, then where the variance of a reverse step lies between
            its bounds, in [-1, 1] (`variance: learned` of the objective).
        scale_shift: the embedding scales and shifts what a block's second norm gives, instead of being added before it (ADM).
        resnet_resample: residual blocks change the resolution, instead of a convolution (ADM).
        downsample_padding: of that convolution, see `Downsample`.
        dropout: in residual blocks.
        num_groups, norm_eps: of the norms.
        time_dim: channels of the embedding of time and class; None: four times the first width.
        frequency_shift, sin_first, counts_steps: see `TimeEmbedding`. DDPM's code has 1 and sines first, ADM's 0 and cosines first.
            `counts_steps` is for paths of DDPM's steps; False for continuous times (flow matching, EDM, consistency).
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 3,
        latent_size: int = 32,
        widths: tuple[int, ...] = (128, 256, 256, 256),
        depth: int = 2,
        attention: tuple[int, ...] = (1,),
        mid_attention: bool = True,
        mid_attention_norm: bool = True,
        head_dim: int | None = None,
        num_classes: int = 0,
        learn_sigma: bool = False,
        scale_shift: bool = False,
        resnet_resample: bool = False,
        downsample_padding: Literal[0, 1] = 1,
        dropout: float = 0.0,
        num_groups: int = 32,
        norm_eps: float = 1e-6,
        time_dim: int | None = None,
        frequency_shift: Literal[0, 1] = 0,
        sin_first: bool = False,
        counts_steps: bool = True,
    ):
        super().__init__()
        check_counts(
            "unet",
            {
                "latent_channels": latent_channels,
                "latent_size": latent_size,
                "depth": depth,
                "num_classes": num_classes,
                "num_groups": num_groups,
                "head_dim": 1 if head_dim is None else head_dim,
                "time_dim": 1 if time_dim is None else time_dim,
            },
            {"num_classes": 0},
        )
        check_widths("unet", widths, num_groups, latent_size)
        _check_attention(widths, attention, head_dim, mid_attention)
        if not 0 <= dropout < 1 or norm_eps <= 0:
            raise UserError(f"unet.dropout and unet.norm_eps: got {dropout}, {norm_eps}; expected [0, 1), and above 0")
        self.latent_channels, self.latent_size, self.widths, self.depth = latent_channels, latent_size, widths, depth
        self.mid_attention, self.head_dim = mid_attention, head_dim
        self.attention, self.mid_attention_norm = tuple(attention), mid_attention_norm
        self.num_classes, self.learn_sigma, self.scale_shift = num_classes, learn_sigma, scale_shift
        self.resnet_resample, self.downsample_padding, self.dropout = resnet_resample, downsample_padding, dropout
        self.num_groups, self.norm_eps, self.frequency_shift = num_groups, norm_eps, frequency_shift
        self.time_dim = 4 * widths[0] if time_dim is None else time_dim
        self.sin_first, self.counts_steps = sin_first, counts_steps
        self.out_channels = latent_channels * (2 if learn_sigma else 1)

        self.conv_in = Conv2d(latent_channels, widths[0])
        self.time_embed = TimeEmbedding(
            widths[0], self.time_dim, frequency_shift=frequency_shift, sin_first=sin_first, counts_steps=counts_steps
        )
        self.class_embed = ClassEmbedding(num_classes, self.time_dim) if num_classes else None
        middle = [
            self._stage(widths[-1], widths[-1], mid_attention, mid_attention_norm),
            self._stage(widths[-1], widths[-1], False),
        ]
        self.levels = Levels(
            widths,
            [depth] * len(widths),
            lambda level, in_channels, out: self._stage(in_channels, out, level in attention),
            middle,
            embed_dim=self.time_dim,
            num_groups=num_groups,
            eps=norm_eps,
            dropout=dropout,
            scale_shift=scale_shift,
            resnet_resample=resnet_resample,
            padding=downsample_padding,
        )
        self.norm_out = GroupNorm(widths[0], num_groups, norm_eps)
        self.conv_out = Conv2d(widths[0], self.out_channels)

    def _stage(self, in_channels: int, out_channels: int, attends: bool, norm: bool = True) -> Stage:
        groups, eps = self.num_groups, self.norm_eps
        resnet = ResnetBlock(
            in_channels, out_channels, self.time_dim, num_groups=groups, eps=eps, dropout=self.dropout,
            scale_shift=self.scale_shift,
        )  # fmt: skip
        head_dim = self.head_dim or out_channels
        return Stage(
            resnet, PlaceAttention(out_channels, head_dim, num_groups=groups, eps=eps, norm=norm) if attends else None
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: noised images or latents, (B, C, H, W).
            t: time, (B,); in [0, 1] with `counts_steps`, 0 is data, 1 is noise.
            cond: with `num_classes`, `label` (B,) integers in 0 .. num_classes - 1; optional `drop` (B,) bool, True where it is not told.
        Returns:
            (B, C, H, W), or with `learn_sigma` (B, 2C, H, W), in the dtype of x.
        Raises:
            ValueError: an input of other channels; a label that is no class.
        """
        if x.shape[1] != self.latent_channels:
            raise ValueError(
                f"input has {x.shape[1]} channels, the network takes {self.latent_channels}; set latent_channels"
            )
        c = self.time_embed(t)  # (B, time_dim)
        if self.class_embed is not None:
            c = c + self.class_embed(cond["label"], cond.get("drop"))
        h = x.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        h = self.levels(self.conv_in(h), F.silu(c))  # (B, widths[0], H, W)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)  # (B, C or 2C, H, W)

    def init_weights(self) -> None:
        """DDPM's: residual blocks and attention start as their shortcuts, the output as zero."""
        init_unet(self)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.levels.parts())

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs. No text."""
        x = torch.zeros(batch_size, self.latent_channels, self.latent_size, self.latent_size, device=device)
        label = {"label": torch.zeros(batch_size, dtype=torch.int64, device=device)} if self.num_classes else {}
        return x, torch.zeros(batch_size, device=device), label

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Places of one sample at the configured size."""
        return self.latent_size**2

    def extra_repr(self) -> str:
        return (
            f"inputs {self.latent_channels} x {self.latent_size} x {self.latent_size}, widths={self.widths}, depth={self.depth}, "
            f"attention={self.attention}, head_dim={self.head_dim}, num_classes={self.num_classes}, "
            f"learn_sigma={self.learn_sigma}, scale_shift={self.scale_shift}, resnet_resample={self.resnet_resample}"
        )


def init_unet(net: nn.Module) -> None:
    """Fan-average weights, then what layers do by themselves (norms one, tables, zeros at the end of branches), then `conv_out` zero."""
    for module in net.modules():
        if isinstance(module, Linear | Conv2d):
            init.fan_average_(module)
    for module in net.modules():
        own = getattr(module, "init_weights", None)
        if module is not net and own is not None:
            own()
    conv_out = net.conv_out
    assert isinstance(conv_out, Conv2d)
    init.zero_(conv_out)


def _check_attention(
    widths: Sequence[int], attention: Sequence[int], head_dim: int | None, mid_attention: bool
) -> None:
    wrong = [level for level in attention if not 0 <= level < len(widths)]
    if wrong or len(set(attention)) < len(attention):
        raise UserError(
            f"unet.attention: got {list(attention)}; expected different levels in 0 .. {len(widths) - 1}: the resolution of level i is "
            "latent_size / 2^i"
        )
    heads = [widths[level] for level in attention] + [widths[-1]] * mid_attention
    if head_dim is not None and any(width % head_dim for width in heads):
        raise UserError(f"unet.head_dim: got {head_dim}; it must divide the channels {heads} of levels with attention")
