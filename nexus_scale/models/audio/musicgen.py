"""MusicGen's decoder: the codes of all codebooks so far, shifted against one another, and a text -> the next codes.

Source: Copet et al. 2023, "Simple and Controllable Music Generation"; initialisation: facebookresearch/audiocraft, `models/lm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.linear import linear
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.norms import AffineNorm
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.tokens import EPS, KVCache, Slots, check_sizes, check_tokens, example_lengths

TextKeys = tuple[Tensor, Tensor]
"""Keys and values of a text in one block, (B, N, L, E) each."""


class CodeEmbedding(KeepsTags, nn.Module):
    """The sum of K tables' rows: tokens (B, S, K) of 0 .. V -> (B, S, D); V stands where a codebook has no code."""

    def __init__(self, num_codebooks: int, codebook_size: int, hidden_size: int):
        super().__init__()
        self.rows = tag_param(nn.Parameter(torch.empty(num_codebooks, codebook_size + 1, hidden_size)), decay=False)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.rows.shape[1], "codes")
        embedded = [F.embedding(tokens[..., k], table) for k, table in enumerate(self.rows.unbind(0))]
        return torch.stack(embedded).sum(0)


class CodeHeads(KeepsTags, nn.Module):
    """Logits of each codebook's next code: (..., D) -> (..., K, V)."""

    def __init__(self, num_codebooks: int, codebook_size: int, hidden_size: int):
        super().__init__()
        self.weight = tag_param(nn.Parameter(torch.empty(num_codebooks, codebook_size, hidden_size)), decay=True)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])


class MusicBlock(nn.Module):
    """Pre-norm self-attention, attention to a text where `reads_text`, and a GELU MLP, each added; only norms have biases."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float, dropout: float, reads_text: bool):
        super().__init__()
        self.num_heads, self.dropout, self.reads_text = num_heads, dropout, reads_text
        self.norm1 = AffineNorm(hidden_size, EPS)
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = Linear(hidden_size, hidden_size, bias=False)
        if reads_text:
            self.norm_text = AffineNorm(hidden_size, EPS)
            self.text_q = Linear(hidden_size, hidden_size, bias=False)
            self.text_kv = Linear(hidden_size, 2 * hidden_size, bias=False)
            self.text_proj = Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = AffineNorm(hidden_size, EPS)
        self.fc1 = Linear(hidden_size, int(hidden_size * mlp_ratio), bias=False)
        self.fc2 = Linear(int(hidden_size * mlp_ratio), hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        slots: Slots | None = None,
        number: int = 0,
        texts: dict[int, TextKeys] | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, L, D).
            mask: (B, 1, 1, S) or (B, 1, L, S) bool, True = attend; S is L, or with a cache all its tokens so far.
            text: (B, T, D), and text_mask: (B, 1, 1, T) bool; of a block that reads a text.
            slots: where this block, of that number, keeps keys and values.
            texts: where blocks keep those of the text, once they are computed.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if slots is not None:
            k, v = slots.store(number, k, v)  # (B, N, S, E)
        x = x + self._dropped(self.proj(_joined(attention(q, k, v, mask=mask))))
        if self.reads_text:
            assert text is not None
            q = self.text_q(self.norm_text(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            k, v = self._text_keys(text, number, texts)
            x = x + self._dropped(self.text_proj(_joined(attention(q, k, v, mask=text_mask))))
        return x + self._dropped(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _text_keys(self, text: Tensor, number: int, texts: dict[int, TextKeys] | None) -> TextKeys:
        if texts is not None and number in texts:
            return texts[number]
        k, v = self.text_kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if texts is not None:
            texts[number] = k, v
        return k, v

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}, reads_text={self.reads_text}"


def _joined(heads: Tensor) -> Tensor:
    """(B, N, L, E) -> (B, L, N E)."""
    return heads.transpose(1, 2).flatten(2)


class Told(NamedTuple):
    """What blocks read beside codes: what is put `before` them (B, C, D), and a `text` (B, T, D) with its `mask` (B, 1, 1, T)."""

    before: Tensor
    text: Tensor | None = None
    mask: Tensor | None = None


class Memory(NamedTuple):
    """What generation keeps between codes."""

    cache: KVCache
    told: Told
    texts: dict[int, TextKeys]


class MusicGen(Network):
    """A transformer over steps of codes, each of K codebooks; a step sees itself and those before it, and a text.

    Codebooks may be shifted against one another (`processes.codebooks`): V, one more than there are codes, stands where a codebook
    has none. A text of zeros is none: what guidance is away from.
    In outputs and gradients this is transformers' `MusicgenForConditionalGeneration` behind its text encoder. The
    defaults are the small model: 419.6 M parameters and 0.8 M of the text's projection.

    Args:
        num_codebooks: K; a stereo model has twice its codec's, left and right in turn.
        codebook_size: V.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embeddings and on residual branches.
        text_dim: of the text's states, which are projected to D where they are not of that size.
        audio_channels: of the sound, whose codes stand in turn, left and right; transformers' name for that, which nothing here reads.
    Raises:
        UserError: sizes that do not fit one another.
    """

    reads_text = True
    """Whether blocks attend to the text; otherwise it stands before the codes."""

    def __init__(
        self,
        *,
        num_codebooks: int = 4,
        codebook_size: int = 2048,
        hidden_size: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        text_dim: int = 768,
        audio_channels: int = 1,
    ):
        super().__init__()
        check_sizes(
            name := type(self).__module__.rpartition(".")[2],
            {
                "num_codebooks": num_codebooks,
                "codebook_size": codebook_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "text_dim": text_dim,
            },
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            least={"hidden_size": 4},
        )
        if audio_channels not in (1, 2) or num_codebooks % audio_channels:
            raise UserError(
                f"{name}.audio_channels: got {audio_channels} with {num_codebooks} codebooks; expected 1, or 2 that share them"
            )
        self.num_codebooks, self.codebook_size, self.hidden_size = num_codebooks, codebook_size, hidden_size
        self.depth, self.num_heads, self.dropout = depth, num_heads, dropout
        self.mlp_ratio, self.text_dim, self.audio_channels = mlp_ratio, text_dim, audio_channels

        self.code_embed = CodeEmbedding(num_codebooks, codebook_size, hidden_size)
        self.text_in = Linear(text_dim, hidden_size) if text_dim != hidden_size else None
        self.music_blocks = nn.ModuleList(
            MusicBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, reads_text=self.reads_text)
            for _ in range(depth)
        )
        self.norm = AffineNorm(hidden_size, EPS)
        self.heads = CodeHeads(num_codebooks, codebook_size, hidden_size)

    def forward(self, tokens: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            tokens: (B, S, K) integers, codes or V; what follows a sequence's own end is seen by none before it.
            cond: `text` (B, T, text_dim); optional `text_mask` (B, T) bool, True at real ones; optional `chroma` (B, T', chroma_dim).
        Returns:
            Logits (B, S, K, V): step s is for the codes of step s + 1.
        Raises:
            ValueError: a code that the tables do not have.
        """
        told = self._told(cond)
        x = self._placed(tokens, told.before)
        L = x.shape[1]
        mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril().expand(len(x), 1, L, L)
        for block in self.music_blocks:
            x = block(x, mask, told.text, told.mask)
        return self.heads(self.norm(x[:, told.before.shape[1] :]))

    # ----------------------------------------------------------------------------------------- step by step

    def prefill(self, tokens: Tensor, cond: Cond, capacity: int) -> tuple[Tensor, Memory]:
        """Reads the text and the first steps, and begins a memory.

        Args:
            tokens: (B, S, K), at least the step at which all codebooks are V.
            cond: as for `forward`.
            capacity: steps that may follow.
        Returns:
            Logits of the next codes, (B, K, V), and the memory for `extend`.
        """
        told = self._told(cond)
        x = self._placed(tokens, told.before)
        (B, L, _), first = x.shape, told.before.shape[1]
        cache = KVCache(
            torch.ones(B, L, dtype=torch.bool, device=x.device), first, torch.full((B,), L - first, device=x.device),
            capacity=capacity, depth=self.depth, num_heads=self.num_heads, head_dim=self.hidden_size // self.num_heads, dtype=x.dtype,
            static=self.compiled,
        )  # fmt: skip
        memory, slots = Memory(cache, told, {}), cache.slots()
        mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril().expand(B, 1, L, L)
        return self._next(x, mask, slots, memory), memory

    def extend(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Logits of the next codes, (B, K, V), after one more step `tokens` (B, K); updates `memory` in place.

        Equal to `forward` on all steps so far.
        """
        places, slots = memory.cache.grow()
        x = self.code_embed(tokens[:, None])
        x = x + sinusoids(places + memory.told.before.shape[1], self.hidden_size).to(x.dtype)
        return self._next(x, slots.mask, slots, memory)

    def _next(self, x: Tensor, mask: Tensor, slots: Slots, memory: Memory) -> Tensor:
        for number, block in enumerate(self.music_blocks):
            x = block(x, mask, memory.told.text, memory.told.mask, slots, number, memory.texts)
        return self.heads(self.norm(x[:, -1]))

    # ------------------------------------------------------------------------------------------------ parts

    def _told(self, cond: Cond) -> Told:
        text, mask = self._text(cond), cond.get("text_mask")
        return Told(text[:, :0], text, None if mask is None else mask[:, None, None])

    def _text(self, cond: Cond) -> Tensor:
        """The text's states, projected, (B, T, D): zeros where they are padding or were dropped."""
        text = cond["text"]
        real = (text != 0).any(-1)
        x = text if self.text_in is None else self.text_in(text.to(self.text_in.weight.dtype))
        if (mask := cond.get("text_mask")) is not None:
            real = real & mask
        return x * real[..., None].to(x.dtype)

    def _placed(self, tokens: Tensor, before: Tensor) -> Tensor:
        """What is put before the codes, and the codes, embedded, with their places: (B, C + S, D)."""
        x = torch.cat([before, self.code_embed(tokens)], dim=1)
        places = torch.arange(x.shape[1], device=x.device)
        return F.dropout(x + sinusoids(places, self.hidden_size).to(x.dtype), self.dropout, self.training)

    def init_weights(self) -> None:
        """N(0, 1 / fan in), cut at three deviations; in block i, counted from one, over 2 i; biases zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                _cut_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, AffineNorm):
                module.init_weights()
        for number, block in enumerate(self.music_blocks, start=1):
            for module in block.modules():
                if isinstance(module, Linear):
                    _cut_normal_(module.weight, 2 * number)
        _cut_normal_(self.code_embed.rows)
        _cut_normal_(self.heads.weight)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.music_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments of `forward`, on any device, meta too: for FLOP counts and dry runs. `lengths`: of `codes`; without them ten seconds
        at 75 steps a second."""
        _, T = example_lengths(lengths, text_tokens)
        tokens = torch.zeros(batch_size, T, self.num_codebooks, dtype=torch.int64, device=device)
        return tokens, {"text": torch.zeros(batch_size, text_tokens, self.text_dim, device=device)}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Steps of one sample of these lengths, as for `example_inputs`."""
        return example_lengths(lengths, text_tokens)[1]

    def extra_repr(self) -> str:
        return (
            f"num_codebooks={self.num_codebooks}, codebook_size={self.codebook_size}, hidden_size={self.hidden_size}, "
            f"depth={self.depth}, num_heads={self.num_heads}, text_dim={self.text_dim}"
        )


def _cut_normal_(weight: Tensor, divisor: int = 1) -> None:
    std = 1 / math.sqrt(weight.shape[-1] * divisor)
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def sinusoids(places: Tensor, dim: int) -> Tensor:
    """Cosines, then sines of places (...,), at dim / 2 wavelengths from 2 pi to 10000 * 2 pi, with both: (..., dim) float32."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=places.device) * (-math.log(10_000.0) / (half - 1))
    )
    angles = places.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
