"""FLUX.1: MMDiT blocks with two streams, then blocks in which text and image share one, and rotary positions throughout.

There is no paper of its launch; the architecture is that of the released code and weights.
Source: black-forest-labs/flux, src/flux/model.py and modules/layers.py; Dehghani et al. 2023 (parallel attention and MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.kernels.attention import attention, packed_attention
from nexus_scale.kernels.blocked import branch, gated_add, gated_branch, norm_modulate
from nexus_scale.kernels.rope import rope_frequencies
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import TimestepEmbedder, VectorEmbedder
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.packed import TextLengths, all_real, deinterleave, interleave, pack, text_lengths
from nexus_scale.models.layers.patches import patchify
from nexus_scale.models.layers.text import compose_text
from nexus_scale.models.layers.transformer import MLP, Heads, Modulation

EPS = 1e-6


class Joint(NamedTuple):
    """The joint sequence of a forward, image before text, and how its samples attend.

    Attributes:
        cos, sin: rotary angles of its places, (L + T, E/2), or (S, E/2) where samples lie end to end.
        mask: (B, 1, 1, L + T) bool, True at keys to attend to; None for all.
        lengths: text tokens of each sample where text is packed; None where it is (B, T, D).
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    lengths: TextLengths | None = None

    @property
    def rotation(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, num_img: int) -> Tensor:
        """q, k, v (B, N, L + T, E), packed (1, N, S, E), turned already -> (B, L + T, D), packed (1, S, D)."""
        if self.lengths is None:
            y = attention(q, k, v, mask=self.mask)
        else:
            y = packed_attention(q, k, v, q_lengths=self.lengths.joint, k_lengths=self.lengths.joint)
        return y.transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """A double-stream block: image and text have their own weights, share one attention, then have an MLP each."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float):
        super().__init__()
        self.img_mod = Modulation(hidden_size, 6)
        self.img_qkv = Linear(hidden_size, 3 * hidden_size)
        self.img_proj = Linear(hidden_size, hidden_size)
        self.img_mlp = MLP(hidden_size, mlp_ratio)

        self.txt_mod = Modulation(hidden_size, 6)
        self.txt_qkv = Linear(hidden_size, 3 * hidden_size)
        self.txt_proj = Linear(hidden_size, hidden_size)
        self.txt_mlp = MLP(hidden_size, mlp_ratio)

        self.heads = Heads(num_heads, hidden_size // num_heads, ("img", "txt"), qk_norm=True, eps=EPS)

    def forward(self, img: Tensor, txt: Tensor, silu_c: Tensor, joint: Joint) -> tuple[Tensor, Tensor]:
        """img (B, L, D); txt (B, T, D), or packed (S, 1, D); silu_c (B, D) -> img, txt."""
        num_img, lengths = img.shape[1], joint.lengths

        # modulation
        img_shift, img_scale, img_gate, img_mlp_shift, img_mlp_scale, img_mlp_gate = self.img_mod(silu_c)
        txt_shift, txt_scale, txt_gate, txt_mlp_shift, txt_mlp_scale, txt_mlp_gate = self.txt_mod(silu_c, lengths)

        # joint attention
        img, img_in = branch(img, img_shift, img_scale, EPS)
        txt, txt_in = branch(txt, txt_shift, txt_scale, EPS)
        img_qkv, txt_qkv = self.img_qkv(img_in), self.txt_qkv(txt_in)  # (B, L, 3D); (B, T, 3D) or (S, 1, 3D)
        if lengths is None:
            y = joint.attend(*self.heads(img_qkv, txt_qkv, rotation=joint.rotation), num_img=num_img)  # (B, L + T, D)
            img_y, txt_y = y.split((num_img, txt.shape[1]), dim=1)
        else:
            qkvs = img_qkv, txt_qkv.transpose(0, 1)
            y = joint.attend(*self.heads(*qkvs, lengths=lengths, rotation=joint.rotation), num_img=num_img)
            img_y, txt_y = deinterleave(y[0], num_img, lengths)
            txt_y = txt_y[:, None]

        # image stream
        img, y = gated_branch(img, img_gate, self.img_proj(img_y), img_mlp_shift, img_mlp_scale, EPS)
        img = gated_add(img, img_mlp_gate, self.img_mlp(y))

        # text stream
        txt, y = gated_branch(txt, txt_gate, self.txt_proj(txt_y), txt_mlp_shift, txt_mlp_scale, EPS)
        txt = gated_add(txt, txt_mlp_gate, self.txt_mlp(y))
        return img, txt


class SingleBlock(nn.Module):
    """A single-stream block: attention and MLP in parallel, with one projection in (q, k, v, MLP) and one out."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float):
        super().__init__()
        self.hidden_size, self.inner = hidden_size, int(hidden_size * mlp_ratio)
        self.mod = Modulation(hidden_size, 3)
        self.linear1 = Linear(hidden_size, 3 * hidden_size + self.inner)
        self.linear2 = Linear(hidden_size + self.inner, hidden_size)
        self.heads = Heads(num_heads, hidden_size // num_heads, ("joint",), qk_norm=True, eps=EPS)

    def forward(self, x: Tensor, silu_c: Tensor, joint: Joint, num_img: int) -> Tensor:
        """x (B, L + T, D), or packed (S, 1, D) -> the same shape; num_img is L."""
        each = None if joint.lengths is None else joint.lengths.joint
        shift, scale, gate = self.mod(silu_c, each)
        x, y = branch(x, shift, scale, EPS)
        qkv, mlp = self.linear1(y).split((3 * self.hidden_size, self.inner), dim=-1)
        if each is None:
            y = joint.attend(*self.heads(qkv, rotation=joint.rotation), num_img=num_img)  # (B, L + T, D)
        else:
            q, k, v = self.heads(qkv.transpose(0, 1), rotation=joint.rotation)
            y = joint.attend(q, k, v, num_img=num_img).transpose(0, 1)  # (S, 1, D)
        return gated_add(x, gate, self.linear2(torch.cat((y, F.gelu(mlp, approximate="tanh")), dim=-1)))


class FinalLayer(nn.Module):
    """Modulated norm, then one linear to the values of a patch: (B, L, D) -> (B, L, C * p * p)."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.mod = Modulation(hidden_size, 2)
        self.linear = Linear(hidden_size, out_features)

    def forward(self, img: Tensor, silu_c: Tensor) -> Tensor:
        shift, scale = self.mod(silu_c)
        return self.linear(norm_modulate(img, shift, scale, EPS))


class Flux(Network):
    """FLUX.1 on latents.

    | model   | depth_double | depth_single | guidance_embed | parameters |
    | ------- | ------------ | ------------ | -------------- | ---------- |
    | dev     | 19           | 38           | true           | 11.90 B    |
    | schnell | 19           | 38           | false          | 11.89 B    |

    Args:
        latent_channels: C.
        latent_size: height and width in latent pixels that FLOPs are counted at; any size works.
        patch_size: latent pixels a token spans on each side; 2 in the published models ("packed" latents).
        hidden_size: D.
        depth_double: blocks with two streams.
        depth_single: blocks with one.
        num_heads: N.
        rope_dims: features of a head that turn with (nothing, row, column); their sum is D / N. The first axis is free for
            models with several images; all tokens lie at 0 of it.
        rope_theta: base of the rotary frequencies.
        text_dim: channels of the text encoder's tokens (T5-XXL).
        pooled_dim: channels of the pooled text (CLIP-L).
        guidance_embed: the network is told a guidance scale, `cond["guidance"]`, which it was distilled to obey (dev).
        mlp_ratio: inner width of the MLPs over D.
        attention: what is done about padded text, with the same result: `masked` computes it and attends to none of it;
            `packed` takes it out, so that no layer spends work on it.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        latent_size: int = 128,
        patch_size: int = 2,
        hidden_size: int = 3072,
        depth_double: int = 19,
        depth_single: int = 38,
        num_heads: int = 24,
        rope_dims: tuple[int, int, int] = (16, 56, 56),
        rope_theta: float = 10_000.0,
        text_dim: int = 4096,
        pooled_dim: int = 768,
        guidance_embed: bool = False,
        mlp_ratio: float = 4.0,
        attention: Literal["masked", "packed"] = "masked",
    ):
        super().__init__()
        rope_dims = (rope_dims[0], rope_dims[1], rope_dims[2])
        sizes = {
            "latent_channels": latent_channels,
            "latent_size": latent_size,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth_double": depth_double,
            "num_heads": num_heads,
            "text_dim": text_dim,
            "pooled_dim": pooled_dim,
        }
        _check_sizes(sizes, depth_single, rope_dims, mlp_ratio)
        self.latent_channels, self.latent_size, self.patch_size = latent_channels, latent_size, patch_size
        self.hidden_size, self.depth_double, self.depth_single = hidden_size, depth_double, depth_single
        self.num_heads, self.rope_dims, self.rope_theta = num_heads, rope_dims, rope_theta
        self.text_dim, self.pooled_dim, self.guidance_embed = text_dim, pooled_dim, guidance_embed
        self.mlp_ratio, self.packed = mlp_ratio, attention == "packed"

        self.patch_embed = Linear(latent_channels * patch_size**2, hidden_size)
        self.text_embed = Linear(text_dim, hidden_size)
        self.time_embed = TimestepEmbedder(hidden_size)
        self.pooled_embed = VectorEmbedder(pooled_dim, hidden_size)
        if guidance_embed:
            self.guide_embed = TimestepEmbedder(hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth_double)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth_single)
        )
        self.final = FinalLayer(hidden_size, patch_size**2 * latent_channels)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, residuals: Sequence[Tensor | None] = ()) -> Tensor:
        """
        Args:
            x: noised latents, (B, C, H, W).
            t: time in [0, 1], (B,); 0 is data, 1 is noise.
            cond: `text` (B, T, text_dim), `pooled` (B, pooled_dim), optional `text_mask` (B, T) bool; without a mask
                all tokens are attended to, as in FLUX. With `guidance_embed` also `guidance` (B,), a guidance scale.
            residuals: what is added to the image's tokens (B, h*w, D) behind each block, those of two streams first; see
                `contracts.Adapter`.
        Returns:
            (B, C, H, W) in the dtype of x; trained by rectified flow it is the velocity eps - x0.
        Raises:
            ValueError: latents that the patch size does not divide; text of another width; no guidance where it is needed.
        """
        img, txt, silu_c, joint = self.taken(x, t, cond)
        img = self.transformed(img, txt, silu_c, joint, (lambda number, _: residuals[number]) if residuals else None)

        # back to latents
        p = self.patch_size
        return self.unpatchify(self.final(img, silu_c), x.shape[2] // p, x.shape[3] // p).to(x.dtype)  # (B, C, H, W)

    def taken(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor, Joint]:
        """What the blocks are given of `forward`'s arguments: img (B, h*w, D), txt, silu_c (B, D) and the joint sequence."""
        text, text_mask, pooled = compose_text(cond, self.text_dim)
        self._check_inputs(x, text, pooled, cond)
        p, dtype = self.patch_size, self.patch_embed.weight.dtype
        h, w = x.shape[2] // p, x.shape[3] // p

        # embed
        img = patchify(x.to(dtype), p)  # (B, h*w, C*p*p)
        img = self.patch_embed(img)  # (B, h*w, D)
        device = x.device if self.compiled else None
        lengths = text_lengths(text_mask, h * w, device) if self.packed else None
        num_txt = text.shape[1]
        mask = None
        if lengths is not None and text_mask is not None:
            text = pack(text, text_mask)  # (S, 1, text_dim)
        elif text_mask is not None and (self.compiled or not all_real(text_mask)):
            mask = F.pad(text_mask.bool(), (h * w, 0), value=True)[:, None, None, :]  # (B, 1, 1, h*w + T)
        txt = self.text_embed(text.to(dtype))  # (B, T, D) or (S, 1, D)
        c = self.time_embed(t) + self.pooled_embed(pooled.to(dtype))  # (B, D)
        if self.guidance_embed:
            c = c + self.guide_embed(cond["guidance"])
        silu_c = F.silu(c)
        return img, txt, silu_c, Joint(*self._angles(h, w, num_txt, lengths, x.device), mask, lengths)

    def transformed(
        self,
        img: Tensor,
        txt: Tensor,
        silu_c: Tensor,
        joint: Joint,
        seen: Callable[[int, Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """The image's tokens behind all blocks, (B, h*w, D). `seen(number, img)` is asked for what is to be added behind each."""
        num_img, lengths = img.shape[1], joint.lengths
        for number, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, silu_c, joint)
            if seen is not None and (more := seen(number, img)) is not None:
                img = img + more
        y = self._joined(img, txt if lengths is None else txt[:, 0], lengths)
        for number, block in enumerate(self.single_blocks, start=len(self.double_blocks)):
            y = block(y, silu_c, joint, num_img)
            if seen is not None:
                img, txt = self._parted(y, num_img, lengths)
                if (more := seen(number, img)) is not None:
                    y = self._joined(img + more, txt, lengths)
        return self._parted(y, num_img, lengths)[0]

    @staticmethod
    def _joined(img: Tensor, txt: Tensor, lengths: TextLengths | None) -> Tensor:
        """img (B, L, D) and txt (B, T, D) or (S, D) -> (B, L + T, D), packed (S, 1, D)."""
        return torch.cat((img, txt), dim=1) if lengths is None else interleave(img, txt, lengths)[:, None]

    @staticmethod
    def _parted(y: Tensor, num_img: int, lengths: TextLengths | None) -> tuple[Tensor, Tensor]:
        """The inverse."""
        return (y[:, :num_img], y[:, num_img:]) if lengths is None else deinterleave(y[:, 0], num_img, lengths)

    def cut(self, depth_double: int, depth_single: int) -> None:
        """Leaves so many of the first blocks of each kind, in place; what leads back to latents is gone."""
        self.double_blocks, self.depth_double = self.double_blocks[:depth_double], depth_double
        self.single_blocks, self.depth_single = self.single_blocks[:depth_single], depth_single
        del self.final

    def unpatchify(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h*w, C*p*p) -> (B, C, h*p, w*p): the inverse, where SD3's output has its channels last."""
        p, C = self.patch_size, self.latent_channels
        x = x.reshape(x.shape[0], h, w, C, p, p).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, p, w, p)
        return x.reshape(x.shape[0], C, h * p, w * p)

    def _angles(
        self, h: int, w: int, num_txt: int, lengths: TextLengths | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the joint sequence: image tokens at (0, row, column), text at (0, 0, 0), which is not rotated."""
        row, col = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        places = torch.stack((torch.zeros_like(row), row, col), dim=-1).reshape(h * w, 3)
        cos, sin = rope_frequencies(places, self.rope_dims, self.rope_theta)  # (h*w, E/2)

        def with_text(angles: Tensor, at_zero: float) -> Tensor:
            counts = [num_txt] if lengths is None else lengths
            return torch.cat(
                [part for n in counts for part in (angles, angles.new_full((n, angles.shape[1]), at_zero))]
            )

        return with_text(cos, 1.0), with_text(sin, 0.0)

    def init_weights(self) -> None:
        """adaLN-Zero (Peebles & Xie 2022): every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
            elif isinstance(module, Heads):
                module.init_weights()
        for embedder in (self.time_embed, self.pooled_embed, *([self.guide_embed] if self.guidance_embed else [])):
            init.normal_(embedder.fc1)
            init.normal_(embedder.fc2)
        for module in self.modules():
            if isinstance(module, Modulation):
                init.zero_(module.linear)
        if hasattr(self, "final"):  # see `cut`
            init.zero_(self.final.linear)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs."""
        x = torch.zeros(batch_size, self.latent_channels, self.latent_size, self.latent_size, device=device)
        t = torch.zeros(batch_size, device=device)
        cond = {
            "text": torch.zeros(batch_size, text_tokens, self.text_dim, device=device),
            "pooled": torch.zeros(batch_size, self.pooled_dim, device=device),
        }
        return x, t, cond | ({"guidance": t} if self.guidance_embed else {})

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample at the configured size, image and text together."""
        return (self.latent_size // self.patch_size) ** 2 + text_tokens

    def extra_repr(self) -> str:
        return (
            f"latents {self.latent_channels} x {self.latent_size} x {self.latent_size}, patch_size={self.patch_size}, "
            f"hidden_size={self.hidden_size}, depth_double={self.depth_double}, depth_single={self.depth_single}, "
            f"num_heads={self.num_heads}, rope_dims={self.rope_dims}, text_dim={self.text_dim}, "
            f"pooled_dim={self.pooled_dim}, guidance_embed={self.guidance_embed}, "
            f"attention={'packed' if self.packed else 'masked'}"
        )

    def _check_inputs(self, x: Tensor, text: Tensor, pooled: Tensor, cond: Cond) -> None:
        C, H, W = x.shape[1:]
        p = self.patch_size
        if self.latent_channels != C:
            raise ValueError(
                f"latents have {C} channels, the network takes {self.latent_channels}; set latent_channels"
            )
        if H % p or W % p:
            raise ValueError(f"patch_size {p} does not divide latents of {H} x {W}; crop them to multiples of {p}")
        if text.shape[-1] != self.text_dim:
            raise ValueError(f"text has {text.shape[-1]} channels, the network takes {self.text_dim}; set text_dim")
        if pooled.shape[-1] != self.pooled_dim:
            raise ValueError(
                f"pooled has {pooled.shape[-1]} channels, the network takes {self.pooled_dim}; set pooled_dim"
            )
        if self.guidance_embed and "guidance" not in cond:
            raise ValueError(
                "no `guidance` among the conditions, which guidance_embed needs; set objective.constants: {guidance: 3.5}"
            )


def _check_sizes(sizes: dict[str, int], depth_single: int, rope_dims: tuple[int, int, int], mlp_ratio: float) -> None:
    """Checks that the sizes fit together, before anything is allocated."""
    check_counts("flux", sizes)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    if depth_single < 0:
        raise UserError(f"flux.depth_single: got {depth_single}; it must be at least 0")
    if hidden % heads:
        raise UserError(f"flux.hidden_size: {hidden} is not a multiple of num_heads = {heads}; change one of them")
    if any(dim < 2 or dim % 2 for dim in rope_dims) or sum(rope_dims) != hidden // heads:
        raise UserError(
            f"flux.rope_dims: got {rope_dims}; expected three even numbers whose sum is hidden_size / num_heads = "
            f"{hidden // heads}"
        )
    if sizes["latent_size"] % sizes["patch_size"]:
        raise UserError(
            f"flux.patch_size: {sizes['patch_size']} does not divide latent_size = {sizes['latent_size']}; change one of them"
        )
    if mlp_ratio <= 0:
        raise UserError(f"flux.mlp_ratio: got {mlp_ratio}; it must be above 0 (FLUX: 4)")
