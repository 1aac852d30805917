"""PixArt-alpha: DiT with cross-attention to the tokens of a caption, and one modulation for all blocks (adaLN-single).

Source: Chen et al. 2023, "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis"; sizes
and aspect ratios as conditions as in the released 1024-pixel model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.blocked import branch, gated_add, norm_modulate
from nexus_scale.models.diffusion.dit import EPS, FREQUENCIES, StepEmbedder
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import VectorEmbedder, sinusoid, stretched_position_2d
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.packed import text_keys
from nexus_scale.models.layers.patches import patchify, unpatchify
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.transformer import MLP, Heads, Modulation

LATENT_SIZE_512 = 64
"""Latents of 512-pixel images: positions of larger ones are squeezed into the same range."""


class CaptionEmbedder(nn.Module):
    """Tokens of a caption (B, T, text_dim) -> (B, T, D): linear, tanh-approximated GELU, linear."""

    def __init__(self, text_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = Linear(text_dim, hidden_size)
        self.fc2 = Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(text), approximate="tanh"))


class SizeEmbedder(VectorEmbedder):
    """Each of n numbers by itself, (B, n) -> (B, n * D / 3), through sinusoids."""

    def __init__(self, hidden_size: int):
        super().__init__(FREQUENCIES, hidden_size // 3)

    def forward(self, numbers: Tensor) -> Tensor:
        sinusoids = sinusoid(numbers.flatten(), FREQUENCIES).to(self.fc1.weight.dtype)  # (B * n, FREQUENCIES)
        return super().forward(sinusoids).view(len(numbers), -1)


class CrossAttention(nn.Module):
    """x (B, L, D) attends to the real tokens of a text (B, T, D): (B, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size, 2 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (B, 1, 1, T) bool, True at real tokens; None for all."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, L, E)
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, T, E) each
        return self.proj(attention(q, k, v, mask=mask).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class PixArtBlock(KeepsTags, nn.Module):
    """Self-attention, cross-attention, an MLP (figure 4 of the paper); the modulation is shared, and `table` (6, D) is added to it."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float):
        super().__init__()
        self.table = tag_param(nn.Parameter(torch.empty(6, hidden_size)), decay=False)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.heads = Heads(num_heads, hidden_size // num_heads, ("img",), qk_norm=False)
        self.proj = Linear(hidden_size, hidden_size)
        self.cross = CrossAttention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, mod: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, L, D). mod: (B, 6, D), of all blocks. text: (B, T, D). mask: (B, 1, 1, T) bool, True at real tokens, or None."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (mod + self.table).unbind(1)  # (B, D) each
        x, y = branch(x, shift, scale, EPS)
        y = attention(*self.heads(self.qkv(y))).transpose(1, 2).flatten(2)  # of (B, N, L, E) -> (B, L, D)
        x = gated_add(x, gate, self.proj(y))
        x = x + self.cross(x, text, mask)
        x, y = branch(x, mlp_shift, mlp_scale, EPS)
        return gated_add(x, mlp_gate, self.mlp(y))


class FinalLayer(KeepsTags, nn.Module):
    """Norm modulated by the embedded time plus `table` (2, D), then one linear to the values of a patch: (B, L, D) -> (B, L, p * p * C)."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.table = tag_param(nn.Parameter(torch.empty(2, hidden_size)), decay=False)
        self.linear = Linear(hidden_size, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = (c[:, None] + self.table).unbind(1)  # (B, D) each
        return self.linear(norm_modulate(x, shift, scale, EPS))


class PixArt(Network):
    """Text-to-image transformer on latents: PixArt-alpha has 610.9 M parameters at 256 and 512 pixels, and 611.3 M with the sizes and
    aspect ratios of its 1024-pixel model.

    Args:
        latent_channels: C.
        latent_size: height and width of the latents of square images; others work, and each of their axes spans the same positions.
        patch_size: latent pixels a token spans on each side.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        text_dim: channels of the caption's tokens (T5-XXL: 4096).
        learn_sigma: twice the channels come out: the prediction, then where the variance of a reverse step lies between its
            bounds (`variance: learned` of the objective).
        micro_conditions: the network is told the size of the original image and the aspect ratio of what it draws.
        interpolation_scale: positions are divided by it; by itself latent_size / 64, at least 1, so that larger images keep the range
            that 512-pixel ones were trained on.
        mlp_ratio: inner width of the MLPs over D.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        latent_size: int = 64,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        text_dim: int = 4096,
        learn_sigma: bool = True,
        micro_conditions: bool = False,
        interpolation_scale: float | None = None,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        sizes = {
            "latent_channels": latent_channels,
            "latent_size": latent_size,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "text_dim": text_dim,
        }
        check_counts("pixart", sizes)
        _check_sizes(sizes, micro_conditions)
        if interpolation_scale is None:
            interpolation_scale = max(latent_size // LATENT_SIZE_512, 1)
        if mlp_ratio <= 0 or interpolation_scale <= 0:
            raise UserError(
                f"pixart: got mlp_ratio {mlp_ratio}, interpolation_scale {interpolation_scale}; both must be above 0"
            )
        self.latent_channels, self.latent_size, self.patch_size = latent_channels, latent_size, patch_size
        self.hidden_size, self.depth, self.num_heads, self.text_dim = hidden_size, depth, num_heads, text_dim
        self.learn_sigma, self.micro_conditions = learn_sigma, micro_conditions
        self.interpolation_scale, self.mlp_ratio = interpolation_scale, mlp_ratio
        self.out_channels = latent_channels * (2 if learn_sigma else 1)

        self.patch_embed = Linear(latent_channels * patch_size**2, hidden_size)
        self.text_embed = CaptionEmbedder(text_dim, hidden_size)
        self.time_embed = StepEmbedder(hidden_size, 0)
        if micro_conditions:
            self.size_embed, self.aspect_embed = SizeEmbedder(hidden_size), SizeEmbedder(hidden_size)
        self.mod = Modulation(hidden_size, 6)
        self.pixart_blocks = nn.ModuleList(
            PixArtBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.final = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: noised latents, (B, C, H, W).
            t: time in [0, 1], (B,); 0 is data, 1 is noise.
            cond: `text` (B, T, text_dim); optional `text_mask` (B, T) bool, True at real tokens, at least one a sample; with
                `micro_conditions` `original_size` and `target_size` (B, 2), height and width in pixels.
        Returns:
            (B, C, H, W), or with `learn_sigma` (B, 2C, H, W), in the dtype of x.
        Raises:
            ValueError: latents of other channels, or that the patch size does not divide; text of another width; sizes missing.
        """
        self._check_inputs(x, cond)
        p, dtype = self.patch_size, self.patch_embed.weight.dtype
        h, w = x.shape[2] // p, x.shape[3] // p

        # embed
        span = self.latent_size // p / self.interpolation_scale
        place = stretched_position_2d(h, w, self.hidden_size, span=span, device=x.device)  # (h*w, D)
        tokens = self.patch_embed(patchify(x.to(dtype), p)) + place.to(dtype)  # (B, h*w, D)
        text = self.text_embed(cond["text"].to(dtype))  # (B, T, D)
        mask = text_keys(cond.get("text_mask"), self.compiled)
        c = self.time_embed(t)  # (B, D)
        if self.micro_conditions:
            c = c + self._sizes(cond)
        mod = torch.stack(self.mod(F.silu(c)), dim=1)  # (B, 6, D)

        # transform
        for block in self.pixart_blocks:
            tokens = block(tokens, mod, text, mask)

        # back to latents
        return unpatchify(self.final(tokens, c), h, w, p).to(x.dtype)  # (B, C or 2C, H, W)

    def _sizes(self, cond: Cond) -> Tensor:
        """Height, width and aspect ratio (height over width), a third of the channels each, (B, D)."""
        target = cond["target_size"].float()
        aspect = target[:, :1] / target[:, 1:].clamp(min=1)  # (B, 1)
        return torch.cat((self.size_embed(cond["original_size"]), self.aspect_embed(aspect)), dim=1)

    def init_weights(self) -> None:
        """The released code's: modulation and embedders N(0, 0.02^2), tables N(0, 1 / D); cross-attention and output begin at zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
            elif isinstance(module, PixArtBlock | FinalLayer):
                nn.init.normal_(module.table, std=self.hidden_size**-0.5)
        for module in self.modules():
            if isinstance(module, VectorEmbedder | CaptionEmbedder):
                init.normal_(module.fc1)
                init.normal_(module.fc2)
            elif isinstance(module, CrossAttention):
                init.zero_(module.proj)
        init.normal_(self.mod.linear)
        init.zero_(self.final.linear)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.pixart_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs."""
        x = torch.zeros(batch_size, self.latent_channels, self.latent_size, self.latent_size, device=device)
        cond = {"text": torch.zeros(batch_size, text_tokens, self.text_dim, device=device)}
        if self.micro_conditions:
            sizes = torch.ones(batch_size, 2, dtype=torch.int64, device=device)
            cond |= {"original_size": sizes, "target_size": sizes}
        return x, torch.zeros(batch_size, device=device), cond

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample at the configured size; the text's are keys alone."""
        return (self.latent_size // self.patch_size) ** 2

    def extra_repr(self) -> str:
        return (
            f"latents {self.latent_channels} x {self.latent_size} x {self.latent_size}, patch_size={self.patch_size}, "
            f"hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}, text_dim={self.text_dim}, "
            f"learn_sigma={self.learn_sigma}, micro_conditions={self.micro_conditions}, "
            f"interpolation_scale={self.interpolation_scale}"
        )

    def _check_inputs(self, x: Tensor, cond: Cond) -> None:
        C, H, W = x.shape[1:]
        p = self.patch_size
        if self.latent_channels != C:
            raise ValueError(f"input has {C} channels, the network takes {self.latent_channels}; set latent_channels")
        if H % p or W % p:
            raise ValueError(f"patch_size {p} does not divide latents of {H} x {W}; crop them to multiples of {p}")
        if (got := cond["text"].shape[-1]) != self.text_dim:
            raise ValueError(f"text has {got} channels, the network takes {self.text_dim}; set text_dim")
        missing = {"original_size", "target_size"} - set(cond) if self.micro_conditions else set()
        if missing:
            raise ValueError(
                f"micro_conditions need {' and '.join(sorted(missing))}; add them to objective.conditions, or set micro_conditions: false"
            )


def _check_sizes(sizes: Mapping[str, int], micro_conditions: bool) -> None:
    hidden, heads, latent, patch = (sizes[name] for name in ("hidden_size", "num_heads", "latent_size", "patch_size"))
    if latent % patch:
        raise UserError(f"pixart.patch_size: {patch} does not divide latent_size {latent}; set one to fit the other")
    if hidden % heads or hidden % 4:
        raise UserError(
            f"pixart.hidden_size: got {hidden} with num_heads {heads}; it must be a multiple of num_heads, and of 4 for the sin-cos "
            "positions"
        )
    if micro_conditions and hidden % 3:
        raise UserError(
            f"pixart.hidden_size: got {hidden}; with micro_conditions height, width and aspect ratio have a third each: choose a "
            "multiple of 12"
        )
