"""Parts of a transformer over tokens: embeddings, positions, pre-norm blocks, and the key-value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.norms import layer_norm
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param

EPS = 1e-5


class TokenTable(KeepsTags, nn.Module):
    """One row of D for each of V tokens: (...,) integers -> (..., D)."""

    def __init__(self, num_tokens: int, hidden_size: int):
        super().__init__()
        # with decay, rows of tokens missing from a batch would shrink without being trained
        self.rows = tag_param(nn.Parameter(torch.empty(num_tokens, hidden_size)), decay=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.rows)

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.rows, std=std)

    def extra_repr(self) -> str:
        return f"{self.rows.shape[0]} tokens, hidden_size={self.rows.shape[1]}"


def check_tokens(tokens: Tensor, num_tokens: int, what: str) -> None:
    """Raises ValueError for a token outside the table; on the CPU only, since a GPU would have to wait."""
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"{what} from {low} to {high}; expected 0 .. {num_tokens - 1}: data and network differ in size"
            )


def check_sizes(
    name: str,
    counts: Mapping[str, int],
    *,
    mlp_ratio: float,
    dropout: float,
    least: Mapping[str, int] | None = None,
) -> None:
    """Checks that the sizes of a transformer over tokens fit together.

    Args:
        name: of the network, for the message.
        counts: arguments that must be at least 1, or what `least` says of them; `hidden_size` and `num_heads` among them.
    Raises:
        UserError: names the argument.
    """
    check_counts(name, counts, least)
    hidden_size, num_heads = counts["hidden_size"], counts["num_heads"]
    if hidden_size % num_heads or hidden_size % 2:
        raise UserError(
            f"{name}.hidden_size: got {hidden_size} with num_heads {num_heads}; it must be a multiple of both num_heads and 2"
        )
    if mlp_ratio <= 0 or not 0 <= dropout < 1:
        raise UserError(
            f"{name}.mlp_ratio and {name}.dropout: got {mlp_ratio}, {dropout}; expected above 0, and in [0, 1)"
        )


def example_lengths(lengths: Mapping[str, int] | None, text_tokens: int) -> tuple[int, int]:
    """Phonemes and frames of an example: those of a recipe, of codes or of whatever else it has, or `text_tokens` and ten seconds at 75
    frames a second."""
    frames = {name: length for name, length in (lengths or {}).items() if name != "phonemes"}
    return (lengths or {}).get("phonemes", text_tokens), frames.get("codes", next(iter(frames.values()), 750))


def sinusoidal_places(places: Tensor, dim: int) -> Tensor:
    """Sines and cosines of places, in turn, at dim / 2 wavelengths from 2 pi to 10000 * 2 pi.

    Args:
        places: (...,) integers.
    Returns:
        (..., dim) float32: sin, cos, sin, cos, ...
    Source: Vaswani et al. 2017, section 3.5.
    """
    frequencies = torch.exp(
        torch.arange(0, dim, 2, dtype=torch.float32, device=places.device) * -(math.log(10_000.0) / dim)
    )
    angles = places.float()[..., None] * frequencies  # (..., dim / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class PositionEmbedding(KeepsTags, nn.Module):
    """Adds sinusoids of place to embeddings, times a number that is learned or 1, and drops out.

    Source: Li et al. 2019 ("Neural Speech Synthesis with Transformer Network"), scaled positional encoding.
    """

    def __init__(self, *, learned: bool, dropout: float):
        super().__init__()
        self.learned, self.dropout = learned, dropout
        if learned:
            self.scale = tag_param(nn.Parameter(torch.ones(1)), decay=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x: (B, L, D). places: (L,) or (B, L) integers."""
        sinusoids = sinusoidal_places(places, x.shape[-1]).to(x.dtype)
        placed = x + (self.scale * sinusoids if self.learned else sinusoids)
        return F.dropout(placed, self.dropout, self.training)

    def init_weights(self) -> None:
        if self.learned:
            nn.init.ones_(self.scale)

    def extra_repr(self) -> str:
        return f"{'learned' if self.learned else 'fixed'} scale, dropout={self.dropout}"


class AdaLayerNorm(KeepsTags, nn.Module):
    """Layer norm; with `staged`, scaled by a_i and shifted by b_i from the embedding of stage i (AdaLN).

    Source: Wang et al. 2023 (VALL-E), section 4.2.2: AdaLN(h, i) = a_i LayerNorm(h) + b_i.
    """

    def __init__(self, hidden_size: int, *, staged: bool):
        super().__init__()
        self.weight = tag_param(nn.Parameter(torch.empty(hidden_size)), decay=False)
        self.bias = tag_param(nn.Parameter(torch.empty(hidden_size)), decay=False)
        self.project = Linear(hidden_size, 2 * hidden_size) if staged else None

    def forward(self, x: Tensor, stage: Tensor | None = None) -> Tensor:
        """x: (B, L, D). stage: (D,), where the norm is staged."""
        normed = layer_norm(x, self.weight, self.bias, EPS)
        if self.project is None:
            return normed
        a, b = self.project(stage).chunk(2, dim=-1)  # (D,) each
        return a * normed + b

    def init_weights(self) -> None:
        """Of a plain layer norm: a = 1 and b = 0 but for a little of the stage."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.project is not None:
            init.normal_(self.project)
            with torch.no_grad():
                self.project.bias[: len(self.weight)] = 1.0


class KVCache:
    """Keys and values of all blocks for sequences that grow, in slots that are allocated once.

    A sequence is a beginning that all share (a text, padded to one length) and tokens that follow; sequences of a batch may
    be of different lengths, each goes on at its own place.

    Args:
        real: which of the first slots hold a token, (B, S) bool: the beginning, then the tokens that are known.
        first: slot of the token at place 0.
        lengths: tokens of each sequence after the beginning, (B,).
        capacity: tokens that may follow.
        depth, num_heads, head_dim: of the network.
        dtype: of its activations.
        static: every forward reads all slots, of which the mask hides those without a token: one shape at every step, as compiled blocks
            like it, at the cost of a whole cache each.
    """

    def __init__(
        self,
        real: Tensor,
        first: int,
        lengths: Tensor,
        *,
        capacity: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        static: bool = False,
    ):
        (B, S), device, self.static = real.shape, real.device, static
        self.first, self.lengths, self.end = first, lengths, S  # slots from `end` on are invisible
        self.visible = F.pad(real, (0, capacity))  # (B, S + capacity)
        self.keys = torch.zeros(depth, B, num_heads, S + capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def slots(self) -> Slots:
        """Those of the beginning and of the tokens that are known, for the forward that reads them."""
        index = torch.arange(self.end, device=self.visible.device).expand(len(self.visible), -1)
        return Slots(self.keys, self.values, self.visible, index, self.end)

    def grow(self) -> tuple[Tensor, Slots]:
        """Makes room for one more token of each sequence.

        Returns:
            Its place, (B, 1), and its slot.
        Raises:
            ValueError: the cache is full.
        """
        if self.end == self.visible.shape[1]:
            raise ValueError(f"the cache is full after {self.end} slots; create it with a larger capacity")
        places = self.lengths[:, None]
        slots = self.first + places  # (B, 1); over what padding may have left there
        self.visible.scatter_(1, slots, True)
        self.lengths, self.end = self.lengths + 1, self.end + 1
        end = self.visible.shape[1] if self.static else self.end
        return places, Slots(self.keys, self.values, self.visible, slots, end)


class Slots:
    """Slots of one forward's tokens in a cache, the same for all blocks. `mask`: (B, 1, 1, S) bool, the visible slots."""

    def __init__(self, keys: Tensor, values: Tensor, visible: Tensor, slots: Tensor, end: int):
        self.keys, self.values, self.end = keys, values, end
        self.mask = visible[:, None, None, :end]
        self._index = slots[:, None, :, None]  # (B, 1, L, 1)

    def store(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, N, L, E) of the new tokens -> all so far, (B, N, S, E) each."""
        index = self._index.expand(-1, k.shape[1], -1, k.shape[3])
        keys, values = self.keys[block], self.values[block]
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys[:, :, : self.end], values[:, :, : self.end]


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class TokenBlock(nn.Module):
    """Pre-norm self-attention and an MLP, a ReLU's unless `activation` says otherwise: x + attention(norm(x)), then x + MLP(norm(x)).

    Dropout is on both branches and inside the MLP. The attention weights themselves are not dropped: no fused kernel would serve.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        dropout: float,
        staged: bool = False,
        activation: str = "relu",
    ):
        super().__init__()
        self.num_heads, self.dropout, self.activation = num_heads, dropout, activation
        self.norm1 = AdaLayerNorm(hidden_size, staged=staged)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.norm2 = AdaLayerNorm(hidden_size, staged=staged)
        self.fc1 = Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        stage: Tensor | None = None,
        slots: Slots | None = None,
        number: int = 0,
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, L, D).
            mask: (B, 1, 1, S) or (B, 1, L, S) bool, True = attend; S is L, or with a cache all its tokens so far.
            stage: (D,), for staged norms.
            slots: where this block, of that number, keeps keys and values.
            bias: added to the logits in the place of a mask, (B or 1, N, L, S).
        """
        q, k, v = self.qkv(self.norm1(x, stage)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if slots is not None:
            k, v = slots.store(number, k, v)  # (B, N, S, E)
        y = attention(q, k, v, mask=mask, bias=bias).transpose(1, 2).flatten(2)  # (B, L, D)
        x = x + F.dropout(self.proj(y), self.dropout, self.training)
        y = F.dropout(ACTIVATIONS[self.activation](self.fc1(self.norm2(x, stage))), self.dropout, self.training)
        return x + F.dropout(self.fc2(y), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}"


def init_tokens_(net: nn.Module) -> None:
    """Embeddings N(0, 1) as the sinusoids beside them are, matrices Xavier, so that a norm sees both."""
    for module in net.modules():
        if isinstance(module, Linear):
            init.xavier_(module)
    for module in net.modules():
        if isinstance(module, AdaLayerNorm | PositionEmbedding):
            module.init_weights()
        elif isinstance(module, TokenTable):
            module.init_weights(std=1.0)
