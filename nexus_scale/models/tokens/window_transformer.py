"""A transformer that predicts hidden codes of a clip from those that are known and from codes of the same clip at a lower resolution, each
block within windows of its own.

Source: Kondratyuk et al. 2023 (VideoPoet), section 3.4: super-resolution by masked codes, with attention in windows along rows, columns and
time. There low codes come by cross attention within the window; here a place has those that lie under it added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import (
    AdaLayerNorm,
    PositionEmbedding,
    TokenBlock,
    TokenTable,
    check_sizes,
    check_tokens,
    init_tokens_,
)

Shape = tuple[int, int, int]


class WindowTransformer(Network):
    """Pre-norm blocks over the codes (f, h, w) of a clip in a row, in the order of frames, rows and columns.

    Args:
        codebook_size: V, codes of both resolutions; V itself hides one, or stands for low codes that were dropped.
        code_shape: (f, h, w).
        low_shape: of the low codes, each a divisor of the number above it.
        windows: frames, rows and columns of a window, 0 for all; of one block after the other, from the first again.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embeddings and on residual branches.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 1 << 18,
        code_shape: Shape = (5, 32, 32),
        low_shape: Shape = (5, 16, 16),
        windows: tuple[Shape, ...] = ((1, 0, 4), (1, 4, 0), (0, 4, 4)),
        hidden_size: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ):
        super().__init__()
        counts = {"codebook_size": codebook_size, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
        sides = {"code_shape": min(code_shape), "low_shape": min(low_shape)}
        check_sizes("window_transformer", {**counts, **sides}, mlp_ratio=mlp_ratio, dropout=dropout)
        whole = [tuple(side or full for side, full in zip(one, code_shape, strict=True)) for one in windows]
        for name, shapes in (("windows", whole), ("low_shape", [low_shape])):
            for one in shapes:
                if any(side < 1 or full % side for side, full in zip(one, code_shape, strict=True)):
                    raise UserError(
                        f"window_transformer.{name}: got {one}; expected divisors of code_shape {code_shape}"
                    )
        if not whole:
            raise UserError("window_transformer.windows: got none; expected at least one")
        self.codebook_size, self.code_shape, self.low_shape = codebook_size, tuple(code_shape), tuple(low_shape)
        self.windows, self.hidden_size, self.depth = whole, hidden_size, depth

        self.embed, self.low = (TokenTable(codebook_size + 1, hidden_size) for _ in range(2))
        self.places = PositionEmbedding(learned=True, dropout=dropout)
        self.token_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=False)
        self.head = Linear(hidden_size, codebook_size, bias=False)

    def forward(self, codes: Tensor, level: int, cond: Cond) -> Tensor:
        """
        Args:
            codes: (B, T, 1) integers in 0 .. V, V where one is hidden, T = f h w.
            level: 0; there is one.
            cond: `low_video_codes` (B, T') integers; optional `drop` (B,) bool, whose samples are told none.
        Returns:
            Logits (B, T, V).
        Raises:
            ValueError: codes of another shape, or that the tables do not have.
        """
        check_tokens(codes, self.codebook_size + 1, "codes")
        check_tokens(cond["low_video_codes"], self.codebook_size, "low codes")
        x = self.places(self.embed(codes[..., 0]), torch.arange(codes.shape[1], device=codes.device))  # (B, T, D)
        x = (x + self._under(cond)).unflatten(1, self.code_shape)  # (B, f, h, w, D)
        for number, block in enumerate(self.token_blocks):
            parts = split(x, window := self.windows[number % len(self.windows)])  # (B n, L, D)
            mask = torch.ones(1, 1, 1, parts.shape[1], dtype=torch.bool, device=x.device)
            x = joined(block(parts, mask), window, x.shape)
        return self.head(self.norm(x.flatten(1, 3)))

    def _under(self, cond: Cond) -> Tensor:
        """The low code that lies under each place, embedded, (B, T, D)."""
        low = cond["low_video_codes"].long()
        if "drop" in cond:
            low = torch.where(cond["drop"][:, None], self.codebook_size, low)
        low = low.unflatten(1, self.low_shape)
        for axis, (own, full) in enumerate(zip(self.low_shape, self.code_shape, strict=True), start=1):
            low = low.repeat_interleave(full // own, dim=axis)
        return self.low(low.flatten(1))

    def init_weights(self) -> None:
        """Embeddings N(0, 1) as the sinusoids beside them are, matrices Xavier; the head N(0, 0.02^2)."""
        init_tokens_(self)
        init.normal_(self.head)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.token_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Arguments of `forward` at the configured size, on any device, meta too."""
        (f, h, w), (a, b, c) = self.code_shape, self.low_shape
        low = torch.zeros(batch_size, a * b * c, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, f * h * w, 1, dtype=torch.int64, device=device), 0, {"low_video_codes": low}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Codes of one sample."""
        f, h, w = self.code_shape
        return f * h * w

    def extra_repr(self) -> str:
        return f"codes {self.code_shape} from {self.low_shape}, windows={self.windows}, hidden_size={self.hidden_size}"


def split(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, f, h, w, D) in windows, (B n, L, D)."""
    a, b, c = window
    parts = x.unflatten(3, (-1, c)).unflatten(2, (-1, b)).unflatten(1, (-1, a))  # (B, f/a, a, h/b, b, w/c, c, D)
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def joined(parts: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of `split`, of (B, f, h, w, D) with that `shape`."""
    a, b, c = window
    B, f, h, w, _ = shape
    x = parts.unflatten(0, (B, f // a, h // b, w // c)).unflatten(4, (a, b, c))  # (B, f/a, h/b, w/c, a, b, c, D)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
