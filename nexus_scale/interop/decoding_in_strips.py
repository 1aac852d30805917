"""Large images through an AutoencoderKL's decoder in strips of rows, equal to the whole up to the order of floating-point sums.

Tiles that are decoded apart and blended (`AutoencoderKL.enable_tiling`) have norms of their own, and differ from the whole in tone. Here
every norm sees the whole image; only what lies between a norm and the next convolution is computed strip by strip, which is most of the
memory. The middle, with its attention, is small and runs whole.

Structure: diffusers 0.42, models/autoencoders/vae.py `Decoder`, models/resnet.py `ResnetBlock2D`, models/upsampling.py `Upsample2D`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64
"""Rows of a strip."""


def fits(decoder: Any) -> bool:
    """Whether the decoder is built as this module knows it: plain residual blocks, and upsampling by a convolution."""
    blocks = [resnet for block in decoder.up_blocks for resnet in block.resnets]
    ups = [up for block in decoder.up_blocks for up in block.upsamplers or ()]
    return (
        all(type(block).__name__ == "UpDecoderBlock2D" for block in decoder.up_blocks)
        and all(type(b).__name__ == "ResnetBlock2D" and b.time_emb_proj is None for b in blocks)
        and all(b.upsample is b.downsample is None and b.time_embedding_norm != "scale_shift" for b in blocks)
        and all(type(up).__name__ == "Upsample2D" and up.name == "conv" and up.norm is None for up in ups)
        and all(up.interpolate and not up.use_conv_transpose and up.use_conv for up in ups)
        and isinstance(decoder.conv_norm_out, torch.nn.GroupNorm)
    )


def decode_in_strips(vae: Any, z: Tensor, rows: int = ROWS) -> Tensor:
    """What `vae.decode(z).sample` gives: z (B, C, h, w) -> (B, 3, H, W)."""
    decoder = vae.decoder
    x = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    x = decoder.mid_block(decoder.conv_in(x), None)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, rows)
        for up in block.upsamplers or ():
            x = _upsampled(up.conv, x, rows)
    return _norm_silu_conv(decoder.conv_norm_out, decoder.conv_out, x, rows)


def _residual(block: Any, x: Tensor, rows: int) -> Tensor:
    h = _norm_silu_conv(block.norm2, block.conv2, _norm_silu_conv(block.norm1, block.conv1, x, rows), rows)
    return h.add_(x if block.conv_shortcut is None else block.conv_shortcut(x)).div_(block.output_scale_factor)


def _norm_silu_conv(norm: Any, conv: Any, x: Tensor, rows: int) -> Tensor:
    """conv(silu(norm(x))) of x (B, C, H, W), by strips."""
    scale, shift = _affine(norm, x, rows)
    height = x.shape[2]
    out = x.new_empty(x.shape[0], conv.out_channels, height, x.shape[3])
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        first, last = max(begin - 1, 0), min(end + 1, height)  # a row of the neighbours on each side
        strip = F.silu(torch.addcmul(shift, x[:, :, first:last], scale))
        out[:, :, begin:end] = _conv(conv, strip, top=first == begin, bottom=last == end)
    return out


def _upsampled(conv: Any, x: Tensor, rows: int) -> Tensor:
    """conv of each pixel twice in both directions, (B, C, H, W) -> (B, C', 2H, 2W), by strips."""
    height = x.shape[2]
    out = x.new_empty(x.shape[0], conv.out_channels, 2 * height, 2 * x.shape[3])
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        first, last = max(begin - 1, 0), min(end + 1, height)
        strip = F.interpolate(x[:, :, first:last], scale_factor=2.0, mode="nearest")
        strip = strip[:, :, begin > first : strip.shape[2] - (last > end)]  # of a neighbour's two rows, the nearer
        out[:, :, 2 * begin : 2 * end] = _conv(conv, strip, top=first == begin, bottom=last == end)
    return out


def _conv(conv: Any, strip: Tensor, *, top: bool, bottom: bool) -> Tensor:
    """A 3 x 3 convolution with zeros around the image, which a strip has above or below at the image's edges alone."""
    return F.conv2d(F.pad(strip, (1, 1, int(top), int(bottom))), conv.weight, conv.bias)


def _affine(norm: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A group norm of the whole as x * scale + shift, (B, C, 1, 1) each; statistics in float32, strip by strip (Chan et al. 1983)."""
    batch, groups = x.shape[0], norm.num_groups
    mean, squares, count = x.new_zeros(batch, groups, dtype=torch.float32), 0.0, 0
    for strip in x.split(rows, dim=2):
        part = strip.float().unflatten(1, (groups, -1)).flatten(2)
        own_var, own_mean = torch.var_mean(part, dim=2, correction=0)
        n, delta = part.shape[2], own_mean - mean
        squares = squares + own_var * n + delta**2 * (count * n / (count + n))
        mean, count = mean + delta * (n / (count + n)), count + n
    assert isinstance(squares, Tensor)
    rstd = (squares / count + norm.eps).rsqrt().repeat_interleave(x.shape[1] // groups, dim=1)  # (B, C)
    scale = rstd * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(x.shape[1] // groups, dim=1) * scale
    return scale[..., None, None].to(x.dtype), shift[..., None, None].to(x.dtype)
