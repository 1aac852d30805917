"""CogVideoX: one transformer over text and video tokens together, in which only the modulation tells the two apart.

Source: Yang et al. 2024, "CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer"; sizes and details as in the
released 2B and 5B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nexus_scale.contracts import Cond, Network, UserError, on_both, on_host
from nexus_scale.kernels import heads
from nexus_scale.kernels.attention import attention, packed_attention
from nexus_scale.kernels.blocked import branch, gated_add, gated_branch, norm_modulate
from nexus_scale.kernels.lengths import Lengths, Rearranged
from nexus_scale.kernels.norms import layer_norm
from nexus_scale.kernels.rope import apply_rope, rope_frequencies
from nexus_scale.kernels.transfer import to_device
from nexus_scale.kernels.ulysses import gather_sequence, split_sequence, ulysses_attention
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import sinusoid
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.norms import AffineNorm
from nexus_scale.models.layers.packed import all_real
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.text import all_true
from nexus_scale.models.layers.tokens import TokenTable
from nexus_scale.models.layers.transformer import MLP

EPS = 1e-5
HEAD_EPS = 1e-6
STEPS = 1000

Rotation = tuple[Tensor, Tensor]


class RealTokens(Lengths):
    """Real tokens of each sample, which precede the padding of its text and of its video.

    Args:
        mask: on the host, (B, T + L), True at real tokens.
        num_text: T.
        device: of compiled blocks.

    Attributes:
        pairs: per sample, the number of real text tokens and of real video tokens.
        order: in compiled code, which of all tokens, B * (T + L), lies at each place of the packed ones, (S,) int64.
        inverse: and where each is packed, (B * (T + L),), -1 for padding.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, mask: Tensor, num_text: int, device: torch.device | None = None):
        parts = mask.split((num_text, mask.shape[1] - num_text), dim=1)
        self.pairs = [(t, n) for t, n in torch.stack([part.sum(1) for part in parts], dim=1).tolist()]
        super().__init__([t + n for t, n in self.pairs], mask.shape[1], device)
        if device is not None:
            real = mask.flatten()
            inverse = torch.where(real, real.cumsum(0) - 1, -1)
            self.order, self.inverse = to_device(real.nonzero()[:, 0], device), to_device(inverse, device)

    def open_tensors(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [self.rows, self.order]


class StepEmbedder(nn.Module):
    """t in [0, 1], (B,) -> (B, time_dim), through the paper's step 1000 t - 1: its steps 0 .. 999 are t = 0.001 .. 1."""

    def __init__(self, frequencies: int, time_dim: int):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = Linear(frequencies, time_dim)
        self.fc2 = Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        # float32 holds t to 6e-5 of a step, which cosines would carry on: to the nearest 1/1024, whole steps are whole
        step = (t.double() * (STEPS * 1024)).round() / 1024 - 1  # (B,)
        sinusoids = sinusoid(step, self.frequencies).to(self.fc1.weight.dtype)  # (B, frequencies)
        return self.fc2(F.silu(self.fc1(sinusoids)))

    def extra_repr(self) -> str:
        return f"frequencies={self.frequencies}"


class ExpertNorm(AffineNorm):
    """Expert adaptive layer norm: one norm for all tokens, a shift, scale and gate for text and another for video (figure 3 of
    the paper)."""

    def __init__(self, hidden_size: int, time_dim: int):
        super().__init__(hidden_size, EPS)
        self.linear = Linear(time_dim, 6 * hidden_size)

    def forward(self, silu_c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, time_dim) -> shift, scale and gate of video, then of text, (B, D) each, for a norm without weight and bias."""
        shift, scale, gate, text_shift, text_scale, text_gate = self.linear(silu_c).chunk(6, dim=-1)
        return *self._folded(shift, scale), gate, *self._folded(text_shift, text_scale), text_gate

    def _folded(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # (y w + b)(1 + scale) + shift: weight and bias ride along in the vectors of a sample, and cost no pass over x
        scale = 1 + scale
        return self.bias * scale + shift, self.weight * scale - 1


class Heads(KeepsTags, nn.Module):
    """(B, S, 3D) -> q, k, v (B, N, S, E); queries and keys layer-normed per head, those of video rotated by position."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_weight, self.k_weight = (tag_param(nn.Parameter(torch.ones(head_dim)), decay=False) for _ in "qk")
        self.q_bias, self.k_bias = (tag_param(nn.Parameter(torch.zeros(head_dim)), decay=False) for _ in "qk")

    def forward(self, qkv: Tensor, num_text: int, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        if heads.serves((qkv,), self.num_heads, heads.LAYER, rotation):
            q, k, v = heads.joined(
                (qkv,), (self.q_weight, self.q_bias, self.k_weight, self.k_bias), rotation,
                norm=heads.LAYER, num_heads=self.num_heads, eps=HEAD_EPS, turned_from=num_text,
            )  # fmt: skip
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (B, N, S, E) each
        q = layer_norm(q, self.q_weight, self.q_bias, HEAD_EPS)
        k = layer_norm(k, self.k_weight, self.k_bias, HEAD_EPS)
        if rotation is not None:
            q, k = (torch.cat((x[:, :, :num_text], apply_rope(x[:, :, num_text:], *rotation)), dim=2) for x in (q, k))
        return q, k, v

    def init_weights(self) -> None:
        for name, p in self.named_parameters():
            nn.init.ones_(p) if name.endswith("weight") else nn.init.zeros_(p)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class CogVideoXBlock(nn.Module):
    """Full attention over text and video at once, then one MLP for both."""

    def __init__(self, hidden_size: int, num_heads: int, time_dim: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = ExpertNorm(hidden_size, time_dim)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.heads = Heads(num_heads, hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)
        self.norm2 = ExpertNorm(hidden_size, time_dim)
        self.mlp = MLP(hidden_size, mlp_ratio)

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        silu_c: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        real: RealTokens | None = None,
        group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            video: (B, L, D). text: (B, T, D). silu_c: (B, time_dim), silu of the time's embedding.
            rotation: cosines and sines of the video tokens' places, (L, E/2) each.
            mask: (B, 1, 1, T + L) bool, True at keys to attend to; None for all.
            real: attend within the real tokens of each sample alone; those left out get zeros.
            group: ranks that hold the other parts of both streams; `mask` is then of all keys, (B, 1, 1, P * (T + L)).
        Returns:
            video, text.
        """
        T, L = text.shape[1], video.shape[1]
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm1(silu_c)  # (B, D) each
        video, video_in = branch(video, shift, scale, EPS)
        text, text_in = branch(text, text_shift, text_scale, EPS)
        q, k, v = self.heads(self.qkv(torch.cat((text_in, video_in), dim=1)), T, rotation)  # (B, N, T + L, E) each
        if real is not None:
            y = attend_packed(q, k, v, T, real)  # (B, T + L, D)
        elif group is not None:
            y = ulysses_attention(q, k, v, group=group, mask=mask).transpose(1, 2).flatten(2)
        else:
            y = attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)
        text_y, video_y = self.proj(y).split((T, L), dim=1)

        shift, scale, mlp_gate, text_shift, text_scale, text_mlp_gate = self.norm2(silu_c)
        video, video_in = gated_branch(video, gate, video_y, shift, scale, EPS)
        text, text_in = gated_branch(text, text_gate, text_y, text_shift, text_scale, EPS)
        text_y, video_y = self.mlp(torch.cat((text_in, video_in), dim=1)).split((T, L), dim=1)
        return gated_add(video, mlp_gate, video_y), gated_add(text, text_mlp_gate, text_y)


def share_tokens(
    video: Tensor, text: Tensor, rotation: Rotation | None, token_mask: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor, Rotation | None, Tensor | None]:
    """This rank's equal part of both streams, padded at the end if the ranks do not divide them.

    Args:
        video: (B, L, D). text: (B, T, D). rotation: (L, E/2) each. token_mask: (B, T + L), True at real tokens; None for all.
    Returns:
        video (B, L / P, D), text (B, T / P, D), rotation of the part; mask (B, 1, 1, T + L) of the keys in the order in which the ranks
        bring them, text and video of the first, then of the second; None where all are real.
    """
    ranks = dist.get_world_size(group)
    T, L = text.shape[1], video.shape[1]
    more_text, more_video = -T % ranks, -L % ranks
    if token_mask is None and (more_text or more_video):
        token_mask = torch.ones(len(video), T + L, dtype=torch.bool, device=video.device)
    mask = None
    if token_mask is not None:
        masks = [
            F.pad(part, (0, more)).chunk(ranks, dim=1)
            for part, more in zip(token_mask.split((T, L), dim=1), (more_text, more_video), strict=True)
        ]
        mask = torch.cat([part for pair in zip(*masks, strict=True) for part in pair], dim=1)[:, None, None, :]
    if rotation is not None:
        cos, sin = (split_sequence(F.pad(table, (0, 0, 0, more_video)), group, dim=0) for table in rotation)
        rotation = cos, sin
    video, text = (
        split_sequence(F.pad(x, (0, 0, 0, more)), group) for x, more in ((video, more_video), (text, more_text))
    )
    return video, text, rotation, mask


def attend_packed(q: Tensor, k: Tensor, v: Tensor, num_text: int, real: RealTokens) -> Tensor:
    """Attention among the real tokens of each sample, packed end to end; (B, N, T + L, E) -> (B, T + L, D).

    Slices and concatenations only, as in layers/packed.py: their gradients are sums in one order on every device.
    """
    if torch.compiler.is_compiling():
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * (T + L), N, E)
        packed = (Rearranged.apply(x, real.order, real.inverse).transpose(0, 1)[None] for x in flat)  # (1, N, S, E)
        y = packed_attention(*packed, q_lengths=real, k_lengths=real)[0].transpose(0, 1)  # (S, N, E)
        return Rearranged.apply(y, real.inverse, real.order).flatten(1).unflatten(0, (len(q), -1))
    places = [
        (i, place) for i, (t, n) in enumerate(real.pairs) for place in (slice(0, t), slice(num_text, num_text + n))
    ]
    packed = (torch.cat([x[i, :, place] for i, place in places], dim=1)[None] for x in (q, k, v))  # (1, N, S, E)
    y = packed_attention(*packed, q_lengths=real, k_lengths=real)[0]  # (N, S, E)
    text, video = num_text, q.shape[2] - num_text
    parts = y.split([n for pair in real.pairs for n in pair], dim=1)
    padded = [F.pad(part, (0, 0, 0, (video if i % 2 else text) - part.shape[1])) for i, part in enumerate(parts)]
    rows = [torch.cat(padded[i : i + 2], dim=1) for i in range(0, len(padded), 2)]  # (N, T + L, E) each
    return torch.stack(rows).transpose(1, 2).flatten(2)


class FinalLayer(AffineNorm):
    """A norm of its own, a modulated norm, then one linear to the values of a patch: (B, L, D) -> (B, L, C * p * p)."""

    def __init__(self, hidden_size: int, time_dim: int, out_features: int):
        super().__init__(hidden_size, EPS)
        self.norm = AffineNorm(hidden_size, EPS)
        self.mod = Linear(time_dim, 2 * hidden_size)
        self.linear = Linear(hidden_size, out_features)

    def forward(self, video: Tensor, silu_c: Tensor) -> Tensor:  # type: ignore[override]
        shift, scale = self.mod(silu_c).chunk(2, dim=-1)  # (B, D) each
        scale = 1 + scale
        video = norm_modulate(self.norm(video), self.bias * scale + shift, self.weight * scale - 1, self.eps)
        return self.linear(video)


class CogVideoX(Network):
    """Video diffusion transformer on latents; an image is a video of one frame.

    | model | depth | num_heads | hidden_size | positions | parameters |
    | ----- | ----- | --------- | ----------- | --------- | ---------- |
    | 2B    | 30    | 30        | 1920        | sincos    | 1.69 B     |
    | 5B    | 42    | 48        | 3072        | rotary    | 5.57 B     |

    Args:
        latent_channels: C.
        beside_channels: channels of the input behind the noised latents: those of frames that are given (image to video).
        latent_frames, latent_height, latent_width: the size that rotary places are scaled to; other sizes work.
        patch_size: latent pixels a token spans on each side.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        text_dim: channels of the text encoder's tokens.
        text_tokens: longest text; what diffusers' class sizes its table by, without a meaning for the weights.
        time_dim: width of the time's embedding.
        positions: `sincos` is added to the tokens once, `rotary` turns queries and keys in every block; `learned` is rotary with a table of
            the configured size and text_tokens beside, which is added once, too.
        spatial_scale, temporal_scale: sin-cos places are divided by them.
        mlp_ratio: inner width of the MLPs over D.
        attention: what is done about padded text and frames, with the same result: `masked` computes it and attends to none
            of it; `packed` takes it out of the attention, which is most of the work at video's lengths.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        beside_channels: int = 0,
        latent_frames: int = 13,
        latent_height: int = 60,
        latent_width: int = 90,
        patch_size: int = 2,
        hidden_size: int = 1920,
        depth: int = 30,
        num_heads: int = 30,
        text_dim: int = 4096,
        text_tokens: int = 226,
        time_dim: int = 512,
        positions: Literal["sincos", "rotary", "learned"] = "sincos",
        spatial_scale: float = 1.875,
        temporal_scale: float = 1.0,
        mlp_ratio: float = 4.0,
        attention: Literal["masked", "packed"] = "masked",
    ):
        super().__init__()
        check_counts(
            "cogvideox",
            {
                "latent_channels": latent_channels,
                "latent_frames": latent_frames,
                "latent_height": latent_height,
                "latent_width": latent_width,
                "patch_size": patch_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "text_dim": text_dim,
                "text_tokens": text_tokens,
                "time_dim": time_dim,
                "beside_channels": beside_channels,
            },
            {"beside_channels": 0},
        )
        for name, scale in (
            ("spatial_scale", spatial_scale),
            ("temporal_scale", temporal_scale),
            ("mlp_ratio", mlp_ratio),
        ):
            if scale <= 0:
                raise UserError(f"cogvideox.{name}: got {scale}; it must be above 0")
        if latent_height % patch_size or latent_width % patch_size:
            raise UserError(
                f"cogvideox.patch_size: {patch_size} does not divide latents of {latent_height} x {latent_width}; change one"
            )
        if hidden_size % num_heads:
            raise UserError(
                f"cogvideox.hidden_size: {hidden_size} is not a multiple of num_heads = {num_heads}; change one of them"
            )
        if hidden_size % 16 or (positions != "sincos" and hidden_size // num_heads % 16):
            raise UserError(
                f"cogvideox.hidden_size: got {hidden_size} for {num_heads} heads; time has a quarter of the features and height "
                "and width three eighths each: multiples of 16 are needed, per head too where positions is rotary"
            )
        self.latent_channels, self.latent_frames, self.beside_channels = latent_channels, latent_frames, beside_channels
        self.latent_height, self.latent_width, self.patch_size = latent_height, latent_width, patch_size
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.text_dim, self.text_tokens, self.time_dim = text_dim, text_tokens, time_dim
        self.positions, self.spatial_scale, self.temporal_scale = positions, spatial_scale, temporal_scale
        self.mlp_ratio, self.packed = mlp_ratio, attention == "packed"
        self.group: ProcessGroup | None = None

        self.patch_embed = Linear((latent_channels + beside_channels) * patch_size**2, hidden_size)
        self.place_table = TokenTable(self.tokens(text_tokens), hidden_size) if positions == "learned" else None
        self.text_embed = Linear(text_dim, hidden_size)
        self.time_embed = StepEmbedder(hidden_size, time_dim)
        self.joint_blocks = nn.ModuleList(
            CogVideoXBlock(hidden_size, num_heads, time_dim, mlp_ratio) for _ in range(depth)
        )
        self.final = FinalLayer(hidden_size, time_dim, latent_channels * patch_size**2)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: noised latents, (B, C, F, H, W), with `beside_channels` more behind them on channels.
            t: time in [0, 1], (B,); 0 is data, 1 is noise.
            cond: `text` (B, T, text_dim); optional `text_mask` (B, T) and `frame_mask` (B, F) bool, True at real tokens and
                frames, which come first. Without a mask all are attended to, padded text too, as in the released models.
        Returns:
            (B, C, F, H, W) in the dtype of x; zeros at frames that are not real.
        Raises:
            ValueError: latents that the patch size does not divide; channels of another width.
        """
        text, text_mask, frame_mask = cond["text"], cond.get("text_mask"), cond.get("frame_mask")
        self._check_inputs(x, text)
        f, h, w = x.shape[2], x.shape[3] // self.patch_size, x.shape[4] // self.patch_size
        dtype = self.patch_embed.weight.dtype

        # embed
        video = self.patch_embed(self.patchify(x.to(dtype)))  # (B, f*h*w, D)
        if self.positions == "sincos":
            video = video + self.places(f, h, w, x.device).to(dtype)
        rotation = None if self.positions == "sincos" else self.rotation(f, h, w, x.device)
        text_tokens = self.text_embed(text.to(dtype))  # (B, T, D)
        if self.place_table is not None:
            text_tokens, video = self._placed(text_tokens, video)
        silu_c = F.silu(self.time_embed(t))  # (B, time_dim)

        # transform
        sizes = text.shape[:2], (len(x), f), h * w
        token_mask = joint_mask(text_mask, frame_mask, *sizes, always=self.compiled)  # (B, T + f*h*w) or None
        real, mask = None, None
        if token_mask is not None and self.packed:
            real = RealTokens(on_host(token_mask), text.shape[1], x.device if self.compiled else None)
        elif token_mask is not None:
            mask = token_mask[:, None, None, :]
        group = self.group if self.training else None
        if group is not None:
            video, text_tokens, rotation, mask = share_tokens(video, text_tokens, rotation, token_mask, group)
        for block in self.joint_blocks:
            video, text_tokens = block(video, text_tokens, silu_c, rotation, mask, real, group)

        # back to latents
        values = self.final(video, silu_c)  # (B, f*h*w, C*p*p)
        if group is not None:
            values = gather_sequence(values, group)[:, : f * h * w]
        y = self.unpatchify(values, f, h, w).to(x.dtype)  # (B, C, F, H, W)
        return y if frame_mask is None else y * frame_mask[:, None, :, None, None]

    def _placed(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Both with the learned table; raises a ValueError where they are of another size than it."""
        assert self.place_table is not None
        (T, L), known = (text.shape[1], video.shape[1]), len(self.place_table.rows)
        if self.text_tokens + L != known or self.text_tokens < T:
            raise ValueError(
                f"{T} tokens of text and {L} of video; the learned table of places is for up to {self.text_tokens}, and "
                f"{known - self.text_tokens}"
            )
        table = self.place_table.rows.to(text.dtype)
        return text + table[:T], video + table[self.text_tokens :]

    def share_sequence(self, group: ProcessGroup) -> None:
        """See contracts.Network: each of the P ranks computes 1 / P of the tokens, and in attention all tokens of 1 / P of the heads.

        Raises:
            UserError: heads that the ranks do not divide; attention that is packed.
        """
        ranks = dist.get_world_size(group)
        if self.num_heads % ranks:
            raise UserError(
                f"cluster.sequence_parallel: {ranks} ranks do not divide the {self.num_heads} heads; use fewer for a sequence"
            )
        if self.packed:
            raise UserError("cogvideox.attention: packed sequences are not shared among ranks; set attention: masked")
        self.group = group

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, F, h*p, w*p) -> (B, F*h*w, C*p*p)."""
        B, C, f, H, W = x.shape
        p = self.patch_size
        x = x.reshape(B, C, f, H // p, p, W // p, p).permute(0, 2, 3, 5, 1, 4, 6)  # (B, F, h, w, C, p, p)
        return x.reshape(B, f * (H // p) * (W // p), C * p * p)

    def unpatchify(self, x: Tensor, f: int, h: int, w: int) -> Tensor:
        """(B, f*h*w, C*p*p) -> (B, C, f, h*p, w*p)."""
        p, C = self.patch_size, self.latent_channels
        x = x.reshape(x.shape[0], f, h, w, C, p, p).permute(0, 4, 1, 2, 5, 3, 6)  # (B, C, f, h, p, w, p)
        return x.reshape(x.shape[0], C, f, h * p, w * p)

    def places(self, f: int, h: int, w: int, device: torch.device) -> Tensor:
        """Sin-cos table of the first f x h x w places, (f*h*w, D) float32: a quarter of D for time, then width, then height."""

        def axis(length: int, dim: int, scale: float) -> Tensor:
            # float32 before float64: to the bit the table of the released 2B
            place = torch.arange(length, dtype=torch.float32, device=device) / scale
            exponents = torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim / 2.0)
            angles = torch.outer(place.double(), 1.0 / 10_000**exponents)  # (length, dim / 2)
            return torch.cat((angles.sin(), angles.cos()), dim=1).float()  # (length, dim)

        D = self.hidden_size
        time = axis(f, D // 4, self.temporal_scale)[:, None, None].expand(f, h, w, -1)
        across = axis(w, 3 * D // 8, self.spatial_scale)[None, None, :].expand(f, h, w, -1)
        down = axis(h, 3 * D // 8, self.spatial_scale)[None, :, None].expand(f, h, w, -1)
        return torch.cat((time, across, down), dim=-1).reshape(f * h * w, D)

    def rotation(self, f: int, h: int, w: int, device: torch.device) -> Rotation:
        """Rotary cosines and sines of f x h x w places, (f*h*w, E/2) each.

        Height and width are spread over the centred part of the configured size that has their aspect ratio; frames count.
        """
        base_h, base_w = self.latent_height // self.patch_size, self.latent_width // self.patch_size
        if h / w > base_h / base_w:
            span_h, span_w = base_h, round(base_h / h * w)
        else:
            span_h, span_w = round(base_w / w * h), base_w
        top, left = round((base_h - span_h) / 2.0), round((base_w - span_w) / 2.0)

        def axis(first: int, span: int, count: int) -> Tensor:
            return torch.linspace(
                first, (first + span) * (count - 1) / count, count, dtype=torch.float32, device=device
            )

        grid = torch.meshgrid(
            torch.arange(f, dtype=torch.float32, device=device),
            axis(top, span_h, h),
            axis(left, span_w, w),
            indexing="ij",
        )
        head_dim = self.hidden_size // self.num_heads
        places = torch.stack([places.flatten() for places in grid], dim=1)  # (f*h*w, 3)
        return rope_frequencies(places, (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3))

    def init_weights(self) -> None:
        """adaLN-Zero: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
            elif isinstance(module, AffineNorm | Heads):
                module.init_weights()
        init.normal_(self.time_embed.fc1)
        init.normal_(self.time_embed.fc2)
        for module in self.modules():
            if isinstance(module, ExpertNorm):
                init.zero_(module.linear)
        if self.place_table is not None:
            p, frames = self.patch_size, self.latent_frames
            places = self.places(frames, self.latent_height // p, self.latent_width // p, self.place_table.rows.device)
            with torch.no_grad():
                self.place_table.rows.zero_()[self.text_tokens :] = places
        init.zero_(self.final.mod)
        init.zero_(self.final.linear)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.joint_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too: for FLOP counts and dry runs."""
        size = (self.latent_frames, self.latent_height, self.latent_width)
        x = torch.zeros(batch_size, self.latent_channels + self.beside_channels, *size, device=device)
        t = torch.zeros(batch_size, device=device)
        tokens = text_tokens if self.place_table is None else min(text_tokens, self.text_tokens)
        return x, t, {"text": torch.zeros(batch_size, tokens, self.text_dim, device=device)}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample at the configured size, video and text together."""
        return self.latent_frames * self.latent_height * self.latent_width // self.patch_size**2 + text_tokens

    def extra_repr(self) -> str:
        return (
            f"latents {self.latent_channels} x {self.latent_frames} x {self.latent_height} x {self.latent_width}, "
            f"patch_size={self.patch_size}, hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}, "
            f"text_dim={self.text_dim}, positions={self.positions}, attention={'packed' if self.packed else 'masked'}"
        )

    def _check_inputs(self, x: Tensor, text: Tensor) -> None:
        p = self.patch_size
        channels = self.latent_channels + self.beside_channels
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(
                f"latents of shape {tuple(x.shape)}; expected (B, {channels}, F, H, W): images have one frame, and {self.beside_channels} "
                "channels are of what is given beside (objective first_frame)"
            )
        if x.shape[3] % p or x.shape[4] % p:
            raise ValueError(f"patch_size {p} does not divide latents of {x.shape[3]} x {x.shape[4]}; crop them to it")
        if text.shape[-1] != self.text_dim:
            raise ValueError(f"text has {text.shape[-1]} channels, the network takes {self.text_dim}; set text_dim")


def joint_mask(
    text_mask: Tensor | None,
    frame_mask: Tensor | None,
    text_shape: tuple[int, ...],
    frame_shape: tuple[int, int],
    tokens_per_frame: int,
    always: bool = False,
) -> Tensor | None:
    """Real tokens of text and video in one row, (B, T + F * tokens_per_frame) bool.

    None where all are real, since attention without a mask has faster kernels; with `always` only where there is no mask.
    """
    masks = [mask for mask in (text_mask, frame_mask) if mask is not None]
    if not masks or (all(map(all_real, masks)) and not always):
        return None
    device = masks[0].device
    text_mask = all_true(text_shape, device) if text_mask is None else text_mask
    frame_mask = all_true(frame_shape, device) if frame_mask is None else frame_mask

    def joined(text: Tensor, frames: Tensor) -> Tensor:
        return torch.cat((text.bool(), frames.bool().repeat_interleave(tokens_per_frame, dim=1)), dim=1)

    return on_both(joined, text_mask, frame_mask)
