"""MMDiT: two streams, image and text, with their own weights and one joint attention.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (Stable Diffusion
3); dual attention as in the released SD3.5-medium.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.kernels.attention import attention, packed_attention
from nexus_scale.kernels.blocked import branch, gated_add, gated_branch, norm_modulate
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import TimestepEmbedder, VectorEmbedder, sincos_position_2d
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.packed import TextLengths, all_real, deinterleave, pack, text_lengths
from nexus_scale.models.layers.patches import patchify, unpatchify
from nexus_scale.models.layers.text import compose_text
from nexus_scale.models.layers.transformer import MLP, Heads, Modulation

EPS = 1e-6

Told = tuple[Tensor, Tensor | None, TextLengths | None]
"""silu_c, mask and lengths of `MMDiTBlock.forward`."""


class MMDiTBlock(nn.Module):
    """Joint attention and two MLPs, modulated by adaLN-Zero (figure 2b of the paper).

    Args:
        dual_attention: the image stream also attends to itself alone, from the same normalised input (SD3.5-medium).
        last: the text stream ends here: it gives keys and values and is not updated.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, mlp_ratio: float, qk_norm: bool, dual_attention: bool, last: bool
    ):
        super().__init__()
        self.dual_attention, self.last = dual_attention, last
        head_dim = hidden_size // num_heads

        self.img_mod = Modulation(hidden_size, 9 if dual_attention else 6)
        self.img_qkv = Linear(hidden_size, 3 * hidden_size)
        self.img_proj = Linear(hidden_size, hidden_size)
        self.img_mlp = MLP(hidden_size, mlp_ratio)
        if dual_attention:
            self.img_qkv2 = Linear(hidden_size, 3 * hidden_size)
            self.heads2 = Heads(num_heads, head_dim, ("img",), qk_norm=qk_norm, eps=EPS)
            self.img_proj2 = Linear(hidden_size, hidden_size)

        self.txt_mod = Modulation(hidden_size, 2 if last else 6)
        # the last block's text queries have no effect; they are kept because SD3's weights have them
        self.txt_qkv = Linear(hidden_size, 3 * hidden_size)
        if not last:
            self.txt_proj = Linear(hidden_size, hidden_size)
            self.txt_mlp = MLP(hidden_size, mlp_ratio)

        self.heads = Heads(num_heads, head_dim, ("img", "txt"), qk_norm=qk_norm, num_q=1 if last else 2, eps=EPS)

    def forward(
        self, img: Tensor, txt: Tensor, silu_c: Tensor, mask: Tensor | None = None, lengths: TextLengths | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            img: (B, L, D). txt: (B, T, D), or packed (S, 1, D). silu_c: (B, D), silu of the conditioning.
            mask: (B, 1, 1, L + T) bool, True at keys to attend to; None for all.
            lengths: text tokens of each sample where txt is packed.
        Returns:
            img, txt; the last block returns txt as it came.
        """
        # modulation
        img_shift, img_scale, img_gate, mlp_shift, mlp_scale, mlp_gate, *second = self.img_mod(silu_c)  # (B, D) each
        txt_shift, txt_scale, *txt_rest = self.txt_mod(silu_c, lengths)  # (B, D) each, packed (S, D)
        img, img_in = branch(img, img_shift, img_scale, EPS)
        txt, txt_in = branch(txt, txt_shift, txt_scale, EPS)
        if self.dual_attention:
            shift2, scale2, gate2 = second
            img, img_in2 = branch(img, shift2, scale2, EPS)

        # joint attention: each stream has its own projections, all tokens attend to all
        img_qkv, txt_qkv = self.img_qkv(img_in), self.txt_qkv(txt_in)
        if lengths is None:
            q, k, v = self.heads(img_qkv, txt_qkv)  # (B, N, L + T, E)
            y = attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)  # (B, L + T, D)
            img_y, txt_y = (y, txt) if self.last else y.split((img.shape[1], txt.shape[1]), dim=1)
        else:
            img_y, txt_y = self._packed(img_qkv, txt_qkv, lengths)

        # image stream
        y, gate = self.img_proj(img_y), img_gate
        if self.dual_attention:
            img = gated_add(img, gate, y)
            y = attention(*self.heads2(self.img_qkv2(img_in2))).transpose(1, 2).flatten(2)  # (B, L, D)
            y, gate = self.img_proj2(y), gate2
        img, y = gated_branch(img, gate, y, mlp_shift, mlp_scale, EPS)
        img = gated_add(img, mlp_gate, self.img_mlp(y))

        # text stream
        if not self.last:
            txt_gate, mlp_shift, mlp_scale, mlp_gate = txt_rest
            txt, y = gated_branch(txt, txt_gate, self.txt_proj(txt_y), mlp_shift, mlp_scale, EPS)
            txt = gated_add(txt, mlp_gate, self.txt_mlp(y))
        return img, txt

    def _packed(self, img_qkv: Tensor, txt_qkv: Tensor, lengths: TextLengths) -> tuple[Tensor, Tensor]:
        """Joint attention of img (B, L, 3D) and packed txt (S, 1, 3D) -> (B, L, D), (S, 1, D); the latter empty in the last
        block."""
        B, L, _ = img_qkv.shape
        q, k, v = self.heads(img_qkv, txt_qkv.transpose(0, 1), lengths=lengths)  # (1, N, B * L + S, E)
        y = packed_attention(q, k, v, q_lengths=lengths.images if self.last else lengths.joint, k_lengths=lengths.joint)
        y = y.transpose(1, 2).flatten(2)[0]  # (B * L + S, D)
        if self.last:
            return y.unflatten(0, (B, L)), y[:0, None]
        img, txt = deinterleave(y, L, lengths)
        return img, txt[:, None]

    def extra_repr(self) -> str:
        return f"dual_attention={self.dual_attention}, last={self.last}"


class FinalLayer(nn.Module):
    """Modulated norm, then one linear to the values of a patch: (B, L, D) -> (B, L, p * p * C)."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.mod = Modulation(hidden_size, 2)
        self.linear = Linear(hidden_size, out_features)

    def forward(self, img: Tensor, silu_c: Tensor) -> Tensor:
        shift, scale = self.mod(silu_c)
        return self.linear(norm_modulate(img, shift, scale, EPS))


class MMDiT(Network):
    """Multimodal diffusion transformer on latents.

    | model         | depth | dual_attention_blocks | qk_norm  | pos_embed_max_size | parameters |
    | ------------- | ----- | --------------------- | -------- | ------------------ | ---------- |
    | SD3-medium    | 24    | 0                     | None     | 192                | 2.03 B     |
    | SD3.5-medium  | 24    | 13                    | rms_norm | 384                | 2.24 B     |
    | SD3.5-large   | 38    | 0                     | rms_norm | 192                | 8.06 B     |

    Args:
        latent_channels: C.
        latent_size: height and width in latent pixels that the position scale refers to; other sizes work.
        patch_size: latent pixels a token spans on each side.
        hidden_size: D; 64 * depth unless given (the paper's one-parameter family).
        depth: number of blocks.
        num_heads: N; depth unless given.
        text_dim: channels of the text encoder's tokens.
        pooled_dim: channels of the pooled text.
        qk_norm: RMS norm of queries and keys per head.
        dual_attention_blocks: how many of the first blocks attend to the image alone as well.
        pos_embed_max_size: largest height and width in tokens.
        mlp_ratio: inner width of the MLPs over D.
        text_scale, pooled_scale: factors that bring an encoder's embeddings to a size near 1 per channel. Adam's steps do not
            know the size of an input: sentence embeddings of unit norm, 0.05 per channel, are hardly heard at first (quickstart:
            56 % of samples of the prompted group without, 63 % with).
        attention: what is done about padded text, with the same result: `masked` computes it and attends to none of it;
            `packed` takes it out, so that neither attention nor the text's layers spend work on it.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        latent_size: int = 128,
        patch_size: int = 2,
        hidden_size: int | None = None,
        depth: int = 24,
        num_heads: int | None = None,
        text_dim: int = 4096,
        pooled_dim: int = 2048,
        qk_norm: Literal["rms_norm"] | None = None,
        dual_attention_blocks: int = 0,
        pos_embed_max_size: int = 192,
        mlp_ratio: float = 4.0,
        text_scale: float = 1.0,
        pooled_scale: float = 1.0,
        attention: Literal["masked", "packed"] = "masked",
    ):
        super().__init__()
        hidden_size = 64 * depth if hidden_size is None else hidden_size
        num_heads = depth if num_heads is None else num_heads
        _check_sizes(
            {
                "latent_channels": latent_channels,
                "latent_size": latent_size,
                "patch_size": patch_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "text_dim": text_dim,
                "pooled_dim": pooled_dim,
                "pos_embed_max_size": pos_embed_max_size,
            }
        )
        if mlp_ratio <= 0:
            raise UserError(f"mmdit.mlp_ratio: got {mlp_ratio}; it must be above 0 (SD3: 4)")
        if not (text_scale > 0 and pooled_scale > 0):
            raise UserError(f"mmdit: got text_scale {text_scale}, pooled_scale {pooled_scale}; both must be above 0")
        if not 0 <= dual_attention_blocks <= depth:
            raise UserError(
                f"mmdit.dual_attention_blocks: got {dual_attention_blocks}; it must lie in 0..depth = {depth}"
            )
        self.latent_channels, self.latent_size, self.patch_size = latent_channels, latent_size, patch_size
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.text_dim, self.pooled_dim, self.qk_norm = text_dim, pooled_dim, qk_norm
        self.dual_attention_blocks, self.pos_embed_max_size, self.mlp_ratio = (
            dual_attention_blocks,
            pos_embed_max_size,
            mlp_ratio,
        )
        self.text_scale, self.pooled_scale = text_scale, pooled_scale
        self.packed = attention == "packed"

        self.patch_embed = Linear(latent_channels * patch_size**2, hidden_size)
        self.text_embed = Linear(text_dim, hidden_size)
        self.time_embed = TimestepEmbedder(hidden_size)
        self.pooled_embed = VectorEmbedder(pooled_dim, hidden_size)
        self.joint_blocks = nn.ModuleList(
            MMDiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm is not None,
                dual_attention=i < dual_attention_blocks,
                last=i == depth - 1,
            )
            for i in range(depth)
        )
        self.final = FinalLayer(hidden_size, patch_size**2 * latent_channels)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, residuals: Sequence[Tensor | None] = ()) -> Tensor:
        """
        Args:
            x: noised latents, (B, C, H, W).
            t: time in [0, 1], (B,); 0 is data, 1 is noise.
            cond: `text` (B, T, text_dim), `pooled` (B, pooled_dim), optional `text_mask` (B, T) bool; without a mask
                all tokens are attended to, as in SD3. For several encoders see `compose_text`.
            residuals: what is added to the image's stream (B, h*w, D) behind each block but the last; see `contracts.Adapter`.
        Returns:
            (B, C, H, W) in the dtype of x; trained by rectified flow it is the velocity eps - x0.
        Raises:
            ValueError: latents that the patch size does not divide, or larger than the position table; text of another
                width.
        """
        img, txt, told = self.taken(x, t, cond)
        for number, block in enumerate(self.joint_blocks):
            img, txt = block(img, txt, *told)
            if number < len(residuals) and (residual := residuals[number]) is not None:
                img = img + residual

        # back to latents
        p = self.patch_size
        return unpatchify(self.final(img, told[0]), x.shape[2] // p, x.shape[3] // p, p).to(x.dtype)  # (B, C, H, W)

    def taken(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Told]:
        """What the blocks are given of `forward`'s arguments: img (B, h*w, D), txt, and what they are told beside."""
        text, text_mask, pooled = compose_text(cond, self.text_dim)
        self._check_inputs(x, text, pooled)
        if self.text_scale != 1.0 or self.pooled_scale != 1.0:
            text, pooled = text * self.text_scale, pooled * self.pooled_scale
        p, dtype = self.patch_size, self.patch_embed.weight.dtype
        h, w = x.shape[2] // p, x.shape[3] // p

        # embed
        img = patchify(x.to(dtype), p)  # (B, h*w, C*p*p)
        place = sincos_position_2d(  # (h*w, D)
            h,
            w,
            self.hidden_size,
            table_size=self.pos_embed_max_size,
            base_size=self.latent_size // self.patch_size,
            device=x.device,
        )
        img = self.patch_embed(img) + place.to(dtype)  # (B, h*w, D)
        device = x.device if self.compiled else None
        lengths = text_lengths(text_mask, h * w, device) if self.packed else None
        if lengths is not None and text_mask is not None:
            text, text_mask = pack(text, text_mask), None  # (S, 1, text_dim)
        txt = self.text_embed(text.to(dtype))  # (B, T, D) or (S, 1, D)
        c = self.time_embed(t) + self.pooled_embed(pooled.to(dtype))  # (B, D)
        silu_c = F.silu(c)

        mask = self.key_mask(text_mask, h * w, always=self.compiled)  # (B, 1, 1, h*w + T) or None
        return img, txt, (silu_c, mask, lengths)

    def cut(self, depth: int) -> None:
        """Leaves so many of the first blocks, in place; what leads back to latents is gone."""
        self.joint_blocks, self.depth = self.joint_blocks[:depth], depth
        del self.final

    @staticmethod
    def key_mask(text_mask: Tensor | None, num_img: int, always: bool = False) -> Tensor | None:
        """Which keys to attend to: all of the image, the real ones of the text, (B, 1, 1, num_img + T) bool.

        None where nothing is padded, since attention without a mask has faster kernels; not with `always`.
        """
        if text_mask is None or (all_real(text_mask) and not always):
            return None
        return F.pad(text_mask.bool(), (num_img, 0), value=True)[:, None, None, :]

    def init_weights(self) -> None:
        """adaLN-Zero (Peebles & Xie 2022): every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
            elif isinstance(module, Heads):
                module.init_weights()
        for embedder in (self.time_embed, self.pooled_embed):
            init.normal_(embedder.fc1)
            init.normal_(embedder.fc2)
        for module in self.modules():
            if isinstance(module, Modulation):
                init.zero_(module.linear)
        if hasattr(self, "final"):  # see `cut`
            init.zero_(self.final.linear)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.joint_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs."""
        x = torch.zeros(batch_size, self.latent_channels, self.latent_size, self.latent_size, device=device)
        t = torch.zeros(batch_size, device=device)
        text = torch.zeros(batch_size, text_tokens, self.text_dim, device=device)
        return x, t, {"text": text, "pooled": torch.zeros(batch_size, self.pooled_dim, device=device)}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample at the configured size, image and text together."""
        return (self.latent_size // self.patch_size) ** 2 + text_tokens

    def extra_repr(self) -> str:
        return (
            f"latents {self.latent_channels} x {self.latent_size} x {self.latent_size}, patch_size={self.patch_size}, "
            f"hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}, "
            f"text_dim={self.text_dim}, pooled_dim={self.pooled_dim}, qk_norm={self.qk_norm}, "
            f"dual_attention_blocks={self.dual_attention_blocks}, attention={'packed' if self.packed else 'masked'}"
        )

    def _check_inputs(self, x: Tensor, text: Tensor, pooled: Tensor) -> None:
        C, H, W = x.shape[1:]
        p, most = self.patch_size, self.pos_embed_max_size
        if self.latent_channels != C:
            raise ValueError(
                f"latents have {C} channels, the network takes {self.latent_channels}; set latent_channels"
            )
        if H % p or W % p:
            raise ValueError(f"patch_size {p} does not divide latents of {H} x {W}; crop them to multiples of {p}")
        if max(H, W) // p > most:
            raise ValueError(
                f"latents of {H} x {W} exceed the position table of {most} tokens a side; raise pos_embed_max_size"
            )
        if text.shape[-1] != self.text_dim:
            raise ValueError(f"text has {text.shape[-1]} channels, the network takes {self.text_dim}; set text_dim")
        if pooled.shape[-1] != self.pooled_dim:
            raise ValueError(
                f"pooled has {pooled.shape[-1]} channels, the network takes {self.pooled_dim}; set pooled_dim"
            )


def _check_sizes(sizes: dict[str, int]) -> None:
    """Checks that the sizes fit together, before anything is allocated."""
    check_counts("mmdit", sizes)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    latent, patch, most = sizes["latent_size"], sizes["patch_size"], sizes["pos_embed_max_size"]
    if hidden % heads:
        raise UserError(f"mmdit.hidden_size: {hidden} is not a multiple of num_heads = {heads}; change one of them")
    if hidden % 4:
        raise UserError(f"mmdit.hidden_size: {hidden} is not a multiple of 4, which the 2D sin-cos positions need")
    if latent % patch:
        raise UserError(f"mmdit.patch_size: {patch} does not divide latent_size = {latent}; change one of them")
    if latent // patch > most:
        raise UserError(f"mmdit.pos_embed_max_size: {most}, but latents have {latent // patch} tokens a side; raise it")
