"""DiT: a transformer on patches of latents, conditioned on time and class by adaptive layer norm (adaLN-Zero).

Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.blocked import branch, gated_add, gated_branch, norm_modulate
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import TimestepEmbedder, VectorEmbedder, sincos_position_2d, sinusoid
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.patches import patchify, unpatchify
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.transformer import MLP, Heads, Modulation

EPS = 1e-6
STEPS = 1000
FREQUENCIES = 256


class StepEmbedder(VectorEmbedder):
    """t in [0, 1], (B,) -> (B, D), through DiT's step 1000 t - 1: the steps 0 .. 999 of its papers are t = 0.001 .. 1."""

    def __init__(self, hidden_size: int, frequency_shift: int):
        super().__init__(FREQUENCIES, hidden_size)
        self.frequency_shift = frequency_shift

    def forward(self, t: Tensor) -> Tensor:
        # float32 holds t to 6e-5 of a step, which cosines would carry on: to the nearest 1/1024, whole steps are whole
        step = (t.double() * (STEPS * 1024)).round() / 1024 - 1  # (B,)
        sinusoids = sinusoid(step, FREQUENCIES, shift=self.frequency_shift)  # (B, FREQUENCIES)
        return super().forward(sinusoids.to(self.fc1.weight.dtype))

    def extra_repr(self) -> str:
        return f"frequencies={FREQUENCIES}, frequency_shift={self.frequency_shift}"


class LabelEmbedder(KeepsTags, nn.Module):
    """Class numbers (B,) -> (B, D); row `num_classes` means no class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.num_classes = num_classes
        # rows of classes that a batch lacks would decay without learning
        self.table = tag_param(nn.Parameter(torch.empty(num_classes + 1, hidden_size)), decay=False)

    def forward(self, label: Tensor, drop: Tensor | None = None) -> Tensor:
        """label: (B,) integers in 0 .. num_classes. drop: (B,) bool, True where the class is dropped."""
        if label.device.type == "cpu" and label.numel():  # on a GPU the lookup itself would wait for the device
            low, high = int(label.min()), int(label.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"labels from {low} to {high}; expected 0 .. {self.num_classes - 1}: set networks.*.num_classes"
                )
        if drop is not None:
            label = torch.where(drop, self.num_classes, label)
        return F.embedding(label, self.table)

    def init_weights(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"


class DiTBlock(nn.Module):
    """Self-attention and an MLP, each modulated before and gated after (figure 3 of the paper, adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float, mlp_norm_eps: float):
        super().__init__()
        self.mlp_norm_eps = mlp_norm_eps
        self.mod = Modulation(hidden_size, 6)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.heads = Heads(num_heads, hidden_size // num_heads, ("img",), qk_norm=False)
        self.proj = Linear(hidden_size, hidden_size)
        self.mlp = MLP(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        """x: (B, L, D). silu_c: (B, D), silu of the conditioning."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.mod(silu_c)  # (B, D) each
        x, y = branch(x, shift, scale, EPS)
        y = attention(*self.heads(self.qkv(y))).transpose(1, 2).flatten(2)  # of (B, N, L, E) -> (B, L, D)
        x, y = gated_branch(x, gate, self.proj(y), mlp_shift, mlp_scale, self.mlp_norm_eps)
        return gated_add(x, mlp_gate, self.mlp(y))


class FinalLayer(nn.Module):
    """Modulated norm, then one linear to the values of a patch: (B, L, D) -> (B, L, p * p * C)."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.mod = Modulation(hidden_size, 2)
        self.linear = Linear(hidden_size, out_features)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        shift, scale = self.mod(silu_c)
        return self.linear(norm_modulate(x, shift, scale, EPS))


class DiT(Network):
    """Diffusion transformer on latents or pixels, conditioned on a class.

    | model  | depth | hidden_size | num_heads | parameters at patch 2 | Gflops at patch 2, 4, 8 (256 pixels) |
    | ------ | ----- | ----------- | --------- | --------------------- | ------------------------------------ |
    | DiT-S  | 12    | 384         | 6         | 32.9 M                | 6.06, 1.41, 0.36                     |
    | DiT-B  | 12    | 768         | 12        | 130.3 M               | 23.01, 5.56, 1.42                    |
    | DiT-L  | 24    | 1024        | 16        | 457.8 M               | 80.71, 19.70, 5.01                   |
    | DiT-XL | 28    | 1152        | 16        | 674.8 M               | 118.64, 29.05, 7.39                  |

    The paper counts a multiplication with its addition as one operation; `flops.py` and the dry run count two.

    Args:
        latent_channels: C; 3 for pixels.
        latent_size: height and width that the position scale refers to; other sizes work.
        patch_size: latent pixels a token spans on each side.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        num_classes: classes told apart; one more row of their table stands for none.
        numbers: conditions that are one number for each sample, which the network is told beside time: `guidance` of a latent consistency
            model, `span` of an average velocity. They are embedded as times are, and count for nothing at first.
        learn_sigma: twice the channels come out: the prediction, then where the variance of a reverse step lies between
            its bounds, in [-1, 1] (`variance: learned` of the objective).
        mlp_ratio: inner width of the MLPs over D.
        frequency_shift: sinusoids of time have frequencies 10000^(-i / (128 - shift)): 1 in diffusers' class, whose folders
            we read and write; 0 in the paper's own code. Either trains alike, but weights of one are wrong in the other.
        mlp_norm_eps: of the norm before the MLP; diffusers' folders may have 1e-5.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        latent_size: int = 32,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        numbers: tuple[str, ...] = (),
        learn_sigma: bool = True,
        mlp_ratio: float = 4.0,
        frequency_shift: int = 1,
        mlp_norm_eps: float = EPS,
    ):
        super().__init__()
        check_counts(
            "dit",
            {
                "latent_channels": latent_channels,
                "latent_size": latent_size,
                "patch_size": patch_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "num_classes": num_classes,
            },
        )
        if latent_size % patch_size:
            raise UserError(
                f"dit.patch_size: {patch_size} does not divide latent_size {latent_size}; set one to fit the other"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(
                f"dit.hidden_size: got {hidden_size} with num_heads {num_heads}; it must be a multiple of num_heads, and of "
                "4 for the sin-cos positions"
            )
        if mlp_ratio <= 0 or mlp_norm_eps <= 0:
            raise UserError(
                f"dit.mlp_ratio and dit.mlp_norm_eps: got {mlp_ratio}, {mlp_norm_eps}; they must be above 0"
            )
        if frequency_shift not in (0, 1):
            raise UserError(f"dit.frequency_shift: got {frequency_shift}; it is 1 (diffusers) or 0 (the paper's code)")
        self.latent_channels, self.latent_size, self.patch_size = latent_channels, latent_size, patch_size
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.learn_sigma, self.mlp_ratio = num_classes, learn_sigma, mlp_ratio
        self.numbers = tuple(numbers)
        self.frequency_shift, self.mlp_norm_eps = frequency_shift, mlp_norm_eps
        self.out_channels = latent_channels * (2 if learn_sigma else 1)

        self.patch_embed = Linear(latent_channels * patch_size**2, hidden_size)
        self.time_embed = StepEmbedder(hidden_size, frequency_shift)
        self.label_embed = LabelEmbedder(num_classes, hidden_size)
        self.number_embeds = nn.ModuleDict({name: TimestepEmbedder(hidden_size, FREQUENCIES) for name in numbers})
        self.dit_blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, mlp_norm_eps=mlp_norm_eps) for _ in range(depth)
        )
        self.final = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: noised latents, (B, C, H, W).
            t: time in [0, 1], (B,); 0 is data, 1 is noise.
            cond: `label` (B,) integers in 0 .. num_classes - 1; optional `drop` (B,) bool, True where it is not told; `numbers` (B,) each.
        Returns:
            (B, C, H, W), or with `learn_sigma` (B, 2C, H, W), in the dtype of x.
        Raises:
            ValueError: latents of other channels, or that the patch size does not divide; a label that is no class; a number missing.
        """
        C, H, W = x.shape[1:]
        p = self.patch_size
        if self.latent_channels != C:
            raise ValueError(f"input has {C} channels, the network takes {self.latent_channels}; set latent_channels")
        if H % p or W % p:
            raise ValueError(f"patch_size {p} does not divide an input of {H} x {W}; crop it to multiples of {p}")
        h, w = H // p, W // p
        dtype = self.patch_embed.weight.dtype

        # embed; a larger input spans the same scale more finely
        place = sincos_position_2d(  # (h*w, D)
            h, w, self.hidden_size, table_size=max(h, w), base_size=self.latent_size // p, device=x.device
        )
        tokens = self.patch_embed(patchify(x.to(dtype), p)) + place.to(dtype)  # (B, h*w, D)
        c = self.time_embed(t) + self.label_embed(cond["label"], cond.get("drop"))  # (B, D)
        for name, embed in self.number_embeds.items():
            if name not in cond:
                raise ValueError(f"no {name!r} among the conditions, of which the network was told by `numbers`")
            c = c + embed(cond[name])
        silu_c = F.silu(c)

        # transform
        for block in self.dit_blocks:
            tokens = block(tokens, silu_c)

        # back to latents
        return unpatchify(self.final(tokens, silu_c), h, w, p).to(x.dtype)  # (B, C or 2C, H, W)

    def init_weights(self) -> None:
        """adaLN-Zero: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
        self.label_embed.init_weights()
        init.normal_(self.time_embed.fc1)
        init.normal_(self.time_embed.fc2)
        for embed in self.number_embeds.values():
            assert isinstance(embed, TimestepEmbedder)
            init.normal_(embed.fc1)
            init.zero_(embed.fc2)
        for module in self.modules():
            if isinstance(module, Modulation):
                init.zero_(module.linear)
        init.zero_(self.final.linear)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.dit_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs. No text."""
        x = torch.zeros(batch_size, self.latent_channels, self.latent_size, self.latent_size, device=device)
        t = torch.zeros(batch_size, device=device)
        return (
            x,
            t,
            {"label": torch.zeros(batch_size, dtype=torch.int64, device=device), **dict.fromkeys(self.numbers, t)},
        )

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample at the configured size."""
        return (self.latent_size // self.patch_size) ** 2

    def extra_repr(self) -> str:
        return (
            f"latents {self.latent_channels} x {self.latent_size} x {self.latent_size}, patch_size={self.patch_size}, "
            f"hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}, "
            f"num_classes={self.num_classes}, learn_sigma={self.learn_sigma}"
        )
