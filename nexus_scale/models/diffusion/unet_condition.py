"""UNetCondition: latent diffusion's U-Net, whose stages attend to a text; Stable Diffusion 1, 2 and XL, their inpainting and LCM kinds.

Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models"; Podell et al. 2023, "SDXL"; Luo et al. 2023
(LCM: the guidance scale as an input).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import SIZES, Cond, Network, UserError
from nexus_scale.models.diffusion.unet import ClassEmbedding, TimeEmbedding, check_widths
from nexus_scale.models.layers import init
from nexus_scale.models.layers.conv_blocks import ResnetBlock
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import VectorEmbedder, sinusoid
from nexus_scale.models.layers.levels import Levels
from nexus_scale.models.layers.linear import Conv2d, Linear
from nexus_scale.models.layers.norms import AffineNorm, GroupNorm
from nexus_scale.models.layers.packed import text_keys
from nexus_scale.models.layers.place_transformer import CrossAttention, Image, PlaceTransformer
from nexus_scale.models.layers.text import compose_text

GUIDANCE_SCALE = 1000.0


def guidance_sinusoids(scale: Tensor, dim: int) -> Tensor:
    """LCM's embedding of w = scale - 1, (B,) -> (B, dim) float32: sines, then cosines, of 1000 w.

    `scale` counts as samplers do: 1 is no guidance. Source: Luo et al. 2023, in the order of their code.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000.0) / (half - 1)))
    angles = ((scale.float() - 1) * GUIDANCE_SCALE)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class TextStage(nn.Module):
    """A residual block, and at levels with attention a transformer behind it, (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, resnet: ResnetBlock, attention: PlaceTransformer | None):
        super().__init__()
        self.resnet, self.attention = resnet, attention

    def forward(
        self,
        x: Tensor,
        silu_c: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        image: Image | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            silu_c: (B, time_dim).
            text: (B, T, text_dim). mask: (B, 1, 1, T) bool, True at tokens to attend to; None for all.
            image: what is told beside the text.
            skip: what joins x on channels, on the way up.
        """
        x = self.resnet(x if skip is None else torch.cat((x, skip), dim=1), silu_c)
        return x if self.attention is None else self.attention(x, text, mask, image)

    def blocks(self) -> Sequence[nn.Module]:
        """Itself, or where its transformer is deep the residual block and each layer: SDXL's stages of ten have 330 M parameters."""
        if self.attention is None or len(self.attention.layers) == 1:
            return [self]
        return [self.resnet, *self.attention.layers]


class UNetCondition(Network):
    """Residual blocks and transformers at halving resolutions, with skips between equal ones; conditioned on time and a text.

    | model   | widths            | num_heads  | transformer_depth | text_dim | parameters |
    | ------- | ----------------- | ---------- | ----------------- | -------- | ---------- |
    | SD 1.5  | 320 640 1280 1280 | 8 everywhere | 1               | 768      | 859.5 M    |
    | SD 2.1  | 320 640 1280 1280 | 5 10 20 20 | 1                 | 1024     | 865.9 M    |
    | SDXL    | 320 640 1280      | 5 10 20    | 0 2 10            | 2048     | 2567.5 M   |

    Args:
        latent_channels: C.
        latent_size: height and width of the configured input; other sizes work, odd ones too.
        beside_channels: channels of the input behind the noised latents, which are given and not drawn: the mask and the masked image's
            latents of inpainting (5), an image to be edited (4).
        widths: channels of each level; each is half as high and wide as the one before.
        depth: stages of each level on the way down, one number for all or one for each; on the way up there is one more.
        transformer_depth: layers of a stage's transformer, one number for all levels or one for each; 0: a level without.
        num_heads: heads of attention, one number for all levels or one for each. diffusers' configs call it `attention_head_dim`.
        text_dim: width of the text.
        text_features: width of the text as it is given, which a linear map brings to `text_dim`; 0: it has that width.
        only_cross: levels, counted from 0, whose layers read the text in both attentions.
        middle: whether there is a transformer between two residual blocks at the lowest resolution, one residual block, or nothing.
        middle_depth: layers of that transformer; None: as many as the last level's.
        pooled_dim: width of the pooled text (SDXL); 0: it is told none, and no sizes.
        sizes: conditions of numbers beside it, (B, n) each: the image's own size, the corner of its crop, and the size of the crop.
        num_sizes, size_frequencies: numbers in all of them, and values of each one's sinusoids.
        guidance_dim: values of the embedding of a guidance scale, `cond["guidance"]`, which it was distilled to obey (LCM); 0: none.
        num_classes: classes told apart; 0: it is told none. The upscaler of Stable Diffusion is told its image's noise level this way.
        learn_sigma: twice the channels come out, see `UNet`.
        linear_projection: how diffusers stores the maps around a transformer, as matrices or as 1 x 1 convolutions; the same is computed.
        upcast_attention: a mark of Stable Diffusion 2.1, whose scores overflow in float16. Fused kernels keep scores in float32 in any
            precision, and so it changes nothing; exports carry it.
        scale_shift, downsample_padding, dropout, num_groups, norm_eps, time_dim, frequency_shift, sin_first, counts_steps: see `UNet`.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        latent_size: int = 64,
        beside_channels: int = 0,
        widths: tuple[int, ...] = (320, 640, 1280, 1280),
        depth: int | tuple[int, ...] = 2,
        transformer_depth: int | tuple[int, ...] = (1, 1, 1, 0),
        num_heads: int | tuple[int, ...] = 8,
        text_dim: int = 768,
        text_features: int = 0,
        only_cross: tuple[int, ...] = (),
        middle: Literal["transformer", "resnet", "none"] = "transformer",
        middle_depth: int | None = 1,
        pooled_dim: int = 0,
        sizes: tuple[str, ...] = SIZES,
        num_sizes: int = 6,
        size_frequencies: int = 256,
        guidance_dim: int = 0,
        num_classes: int = 0,
        learn_sigma: bool = False,
        linear_projection: bool = False,
        upcast_attention: bool = False,
        scale_shift: bool = False,
        downsample_padding: Literal[0, 1] = 1,
        dropout: float = 0.0,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        time_dim: int | None = None,
        frequency_shift: Literal[0, 1] = 0,
        sin_first: bool = False,
        counts_steps: bool = True,
    ):
        super().__init__()
        name = "unet_condition"
        counts = {
            "latent_channels": latent_channels, "latent_size": latent_size, "text_dim": text_dim, "num_groups": num_groups,
            "time_dim": 1 if time_dim is None else time_dim, "size_frequencies": size_frequencies,
            "middle_depth": 1 if middle_depth is None else middle_depth, "beside_channels": beside_channels,
            "text_features": text_features, "pooled_dim": pooled_dim, "num_sizes": num_sizes, "guidance_dim": guidance_dim,
            "num_classes": num_classes,
        }  # fmt: skip
        optional = ("beside_channels", "text_features", "pooled_dim", "guidance_dim", "num_classes")
        check_counts(name, counts, dict.fromkeys(optional, 0))
        check_widths(name, widths, num_groups, latent_size)
        depths, layers, heads = (
            _by_level(argument, value, len(widths), least)
            for argument, value, least in (
                ("depth", depth, 1), ("transformer_depth", transformer_depth, 0), ("num_heads", num_heads, 1),
            )
        )  # fmt: skip
        _check_heads(widths, layers, heads, middle)
        if any(not 0 <= level < len(widths) or not layers[level] for level in only_cross):
            raise UserError(f"{name}.only_cross: got {list(only_cross)}; expected levels with a transformer")
        if pooled_dim and (not sizes or num_sizes % len(sizes)):
            raise UserError(f"{name}.sizes: got {list(sizes)} for {num_sizes} numbers; they must divide them evenly")
        if guidance_dim % 2 or guidance_dim == 2 or size_frequencies % 2:
            raise UserError(
                f"{name}.guidance_dim and {name}.size_frequencies: got {guidance_dim}, {size_frequencies}; expected even numbers, "
                "the first 0 or at least 4"
            )
        if not 0 <= dropout < 1 or norm_eps <= 0:
            raise UserError(
                f"{name}.dropout and {name}.norm_eps: got {dropout}, {norm_eps}; expected [0, 1), and above 0"
            )
        self.latent_channels, self.latent_size, self.widths = latent_channels, latent_size, tuple(widths)
        self.beside_channels, self.depth, self.transformer_depth = beside_channels, depths, layers
        self.num_heads, self.text_dim, self.text_features, self.only_cross = heads, text_dim, text_features, only_cross
        self.middle, self.pooled_dim, self.sizes, self.num_sizes = middle, pooled_dim, sizes, num_sizes
        self.middle_depth = max(layers[-1], 1) if middle_depth is None else middle_depth
        self.size_frequencies, self.guidance_dim, self.num_classes = size_frequencies, guidance_dim, num_classes
        self.learn_sigma, self.linear_projection = learn_sigma, linear_projection
        self.upcast_attention, self.scale_shift, self.downsample_padding = (
            upcast_attention,
            scale_shift,
            downsample_padding,
        )
        self.dropout, self.num_groups, self.norm_eps, self.frequency_shift = (
            dropout,
            num_groups,
            norm_eps,
            frequency_shift,
        )
        self.time_dim = 4 * widths[0] if time_dim is None else time_dim
        self.sin_first, self.counts_steps = sin_first, counts_steps
        self.out_channels = latent_channels * (2 if learn_sigma else 1)

        self.conv_in = Conv2d(latent_channels + beside_channels, widths[0])
        self.time_embed = TimeEmbedding(
            widths[0], self.time_dim, frequency_shift=frequency_shift, sin_first=sin_first, counts_steps=counts_steps
        )
        self.guide_embed = Linear(guidance_dim, widths[0], bias=False) if guidance_dim else None
        self.class_embed = ClassEmbedding(num_classes, self.time_dim) if num_classes else None
        told = pooled_dim + num_sizes * size_frequencies
        self.pooled_embed = VectorEmbedder(told, self.time_dim) if pooled_dim else None
        self.text_embed = Linear(text_features, text_dim) if text_features else None
        self.levels = Levels(
            widths,
            depths,
            lambda level, in_channels, out: self._stage(level, in_channels, out, layers[level]),
            self._middle(widths[-1]),
            embed_dim=self.time_dim,
            num_groups=num_groups,
            eps=norm_eps,
            dropout=dropout,
            scale_shift=scale_shift,
            resnet_resample=False,
            padding=downsample_padding,
        )
        self.norm_out = GroupNorm(widths[0], num_groups, norm_eps)
        self.conv_out = Conv2d(widths[0], self.out_channels)

    def _stage(
        self, level: int, in_channels: int, out_channels: int, layers: int, only_cross: bool | None = None
    ) -> TextStage:
        resnet = ResnetBlock(
            in_channels, out_channels, self.time_dim, num_groups=self.num_groups, eps=self.norm_eps, dropout=self.dropout,
            scale_shift=self.scale_shift,
        )  # fmt: skip
        if not layers:
            return TextStage(resnet, None)
        only_cross = level in self.only_cross if only_cross is None else only_cross
        transformer = PlaceTransformer(
            out_channels, self.text_dim, num_heads=self.num_heads[level], depth=layers, num_groups=self.num_groups,
            only_cross=only_cross,
        )  # fmt: skip
        return TextStage(resnet, transformer)

    def _middle(self, width: int) -> list[TextStage]:
        """diffusers' middle never reads the text alone, whatever `only_cross` says of the last level."""
        last = len(self.widths) - 1
        if self.middle == "transformer":
            return [
                self._stage(last, width, width, self.middle_depth, only_cross=False),
                self._stage(last, width, width, 0),
            ]
        return [self._stage(last, width, width, 0)] if self.middle == "resnet" else []

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        residuals: Sequence[Tensor | None] = (),
        image: Image | None = None,
    ) -> Tensor:
        """
        Args:
            x: noised latents, (B, C, H, W), with `beside_channels` more behind them on channels.
            t: time, (B,); in [0, 1] with `counts_steps`, 0 is data, 1 is noise.
            cond: `text` (B, T, text_dim), optional `text_mask` (B, T) bool; without a mask all tokens are attended to, as in the
                released models. For the two encoders of SDXL, and its `pooled`, see `compose_text`. Then what the arguments ask for:
                `sizes`, `guidance` (B,), `label` (B,) with optional `drop`.
            residuals: what is added to what each place on the way down hands to its counterpart, in that order, and last to what the
                middle gives; none: nothing. See `contracts.Adapter`.
            image: a picture's tokens (B, n, text_dim) that adapters of the attentions to the text read beside it, and how much of them
                counts, (B, 1, 1, 1).
        Returns:
            (B, C, H, W), or with `learn_sigma` (B, 2C, H, W), in the dtype of x.
        Raises:
            ValueError: an input or a text of other channels; a condition that is missing.
        """
        h, told = self.taken(x, t, cond)
        context = (*told, image)
        h, kept = self.levels.descend(h, *context)
        if residuals:
            *kept, h = [a if b is None else a + b for a, b in zip((*kept, h), residuals, strict=True)]
        h = self.levels.ascend(h, kept, *context)  # (B, widths[0], H, W)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)  # (B, C or 2C, H, W)

    def taken(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        """What the levels are given of `forward`'s arguments: x (B, widths[0], H, W); SiLU of what is embedded, the text, its mask."""
        dtype = self.conv_in.weight.dtype
        if x.shape[1] != self.conv_in.in_channels:
            raise ValueError(
                f"input has {x.shape[1]} channels; the network takes {self.latent_channels} and {self.beside_channels} beside them: set "
                "latent_channels and beside_channels"
            )
        text, mask, pooled = self._text(cond)
        c = self._embedded(t, cond, pooled)  # (B, time_dim)
        if self.text_embed is not None:
            text = self.text_embed(text.to(dtype))
        h = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return self.conv_in(h), (F.silu(c), text.to(dtype), mask)

    def readers(self) -> dict[str, CrossAttention]:
        """The attentions to the text, by their paths, in the order in which they compute."""
        found = {path: part for path, part in self.named_modules() if isinstance(part, CrossAttention)}
        return {path: part for path, part in found.items() if path.endswith("attn2")}

    def cut(self) -> None:
        """Leaves the way down and the middle, in place; what leads up is gone."""
        self.levels.up = nn.ModuleList()
        del self.norm_out, self.conv_out

    def _text(self, cond: Cond) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Text, which tokens to attend to (B, 1, 1, T), and the pooled text."""
        width = self.text_features or self.text_dim
        pooled = None
        if self.pooled_dim:
            text, mask, pooled = compose_text(cond, width)
        else:
            text, mask = self._told(cond, "text"), cond.get("text_mask")
        if text.shape[-1] != width:
            raise ValueError(f"text of {text.shape[-1]} channels; the network takes {width}: set text_dim")
        return text, text_keys(mask, self.compiled), pooled

    def _embedded(self, t: Tensor, cond: Cond, pooled: Tensor | None) -> Tensor:
        """The embedding of time, guidance scale, class, pooled text and sizes, (B, time_dim)."""
        dtype = self.conv_in.weight.dtype
        told = None
        if self.guide_embed is not None:
            told = self.guide_embed(guidance_sinusoids(self._told(cond, "guidance"), self.guidance_dim).to(dtype))
        c = self.time_embed(t, told)
        if self.class_embed is not None:
            c = c + self.class_embed(self._told(cond, "label"), cond.get("drop"))
        if self.pooled_embed is not None and pooled is not None:
            c = c + self.pooled_embed(torch.cat((pooled.to(dtype), self._sizes(cond).to(dtype)), dim=-1))
        return c

    def _sizes(self, cond: Cond) -> Tensor:
        """Sinusoids of all numbers, (B, num_sizes * size_frequencies) float32."""
        numbers = torch.cat([self._told(cond, name).flatten(1).float() for name in self.sizes], dim=1)
        told = self.time_embed.ordered(sinusoid(numbers.flatten(), self.size_frequencies, shift=self.frequency_shift))
        return told.unflatten(0, numbers.shape).flatten(1)

    @staticmethod
    def _told(cond: Cond, name: str) -> Tensor:
        if name not in cond:
            raise ValueError(f"no {name!r} among the conditions {sorted(cond)}; add it to objective.conditions")
        return cond[name]

    def init_weights(self) -> None:
        """Latent diffusion's: uniform as torch's layers are, and branches and the output start as zero."""
        for module in self.modules():
            if isinstance(module, Linear | Conv2d):
                init.uniform_(module)
        for module in self.modules():
            if isinstance(module, AffineNorm | GroupNorm | ResnetBlock | PlaceTransformer | ClassEmbedding):
                module.init_weights()
        if self.guide_embed is not None:  # a student begins with the answers of its teacher
            init.zero_(self.guide_embed)
        if hasattr(self, "conv_out"):  # see `cut`
            init.zero_(self.conv_out)

    def blocks(self) -> Sequence[nn.Module]:
        return [
            block
            for part in self.levels.parts()
            for block in (part.blocks() if isinstance(part, TextStage) else [part])
        ]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        side = self.latent_size
        cond = {"text": zeros(text_tokens, self.text_features or self.text_dim)}
        if self.pooled_dim:
            cond["pooled"] = zeros(self.pooled_dim)
            cond |= {name: zeros(self.num_sizes // len(self.sizes)) for name in self.sizes}
        if self.guidance_dim:
            cond["guidance"] = zeros()
        if self.num_classes:
            cond["label"] = zeros(dtype=torch.int64)
        return zeros(self.latent_channels + self.beside_channels, side, side), zeros(), cond

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Places of one sample at the configured size, and its text tokens."""
        return self.latent_size**2 + text_tokens

    def extra_repr(self) -> str:
        return (
            f"latents {self.latent_channels} x {self.latent_size} x {self.latent_size}, beside_channels={self.beside_channels}, "
            f"widths={self.widths}, depth={self.depth}, transformer_depth={self.transformer_depth}, num_heads={self.num_heads}, "
            f"text_dim={self.text_dim}, pooled_dim={self.pooled_dim}, guidance_dim={self.guidance_dim}"
        )


def _by_level(argument: str, value: int | Sequence[int], levels: int, least: int) -> tuple[int, ...]:
    """One number for each level."""
    numbers = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(numbers) != levels or any(number < least for number in numbers):
        raise UserError(
            f"unet_condition.{argument}: got {value} for {levels} levels; expected a number of at least {least}, or one for each level"
        )
    return numbers


def _check_heads(widths: Sequence[int], layers: Sequence[int], heads: Sequence[int], middle: str) -> None:
    for level, width in enumerate(widths):
        attends = layers[level] or (level == len(widths) - 1 and middle == "transformer")
        if attends and width % heads[level]:
            raise UserError(
                f"unet_condition.num_heads: got {heads[level]} at level {level}; it must divide its {width} channels"
            )
