"""What a transformer over tokens is told, as tokens before its own: a class, a text, phonemes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Cond
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import PositionEmbedding, TokenTable, check_tokens


class Told(nn.Module):
    """A class's embedding, a text's, projected, and those of phonemes: none, one or several.

    Args:
        num_classes: of `label`; 0: it is told none. A dropped one is a class of its own.
        text_dim: of `text`; 0: it is told none.
        num_phonemes: of `phonemes`; 0: it is told none.
        pace: places of what follows that a phoneme takes in the mean. Where both have the same places, attention finds the phoneme that is
            being said from the first step on, and need not learn how fast one speaks (Ping et al. 2018, "Deep Voice 3", section 3.5).
    """

    def __init__(self, num_classes: int, text_dim: int, hidden_size: int, *, num_phonemes: int = 0, pace: float = 1.0):
        super().__init__()
        self.hidden_size = hidden_size
        self.label = TokenTable(num_classes + 1, hidden_size) if num_classes else None
        self.text = Linear(text_dim, hidden_size) if text_dim else None
        self.num_phonemes, self.pace = num_phonemes, pace
        self.phonemes = TokenTable(num_phonemes, hidden_size) if num_phonemes else None
        self.phoneme_places = PositionEmbedding(learned=True, dropout=0.0) if num_phonemes else None

    def forward(self, cond: Cond, like: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) and which are real, (B, L) bool, L may be 0.

        Args:
            cond: `label` (B,), with `drop` (B,) bool; `text` (B, L, text_dim) and `text_mask` (B, L); `phonemes` (B, L) integers and
                `phonemes_mask` (B, L).
            like: (B, ...), on the device.
        """
        B = len(like)
        told = [self._embedded(cond, B, like.device)]
        real = [torch.ones(B, told[0].shape[1], dtype=torch.bool, device=like.device)]
        if self.text is not None:
            told.append(self.text(cond["text"].to(self.text.weight.dtype)))
            whole = torch.ones(cond["text"].shape[:2], dtype=torch.bool, device=like.device)
            real.append(cond.get("text_mask", whole))
        if self.phonemes is not None and self.phoneme_places is not None:
            phonemes = cond["phonemes"]
            check_tokens(phonemes, self.num_phonemes, "phonemes")
            places = torch.arange(phonemes.shape[1], device=like.device) * self.pace
            told.append(self.phoneme_places(self.phonemes(phonemes), places))
            real.append(cond.get("phonemes_mask", torch.ones_like(phonemes, dtype=torch.bool)))
        return torch.cat(told, dim=1), torch.cat(real, dim=1)

    def _embedded(self, cond: Cond, B: int, device: torch.device) -> Tensor:
        """The class, (B, 1, D); (B, 0, D) where it is told none."""
        if self.label is None:
            like = self.text.weight if self.text else self.phonemes.rows if self.phonemes else None
            return torch.zeros(B, 0, self.hidden_size, device=device, dtype=None if like is None else like.dtype)
        label, none = cond["label"], self.label.rows.shape[0] - 1
        label = torch.where(cond["drop"], none, label) if "drop" in cond else label
        return self.label(label)[:, None]

    def example(self, batch_size: int, text_tokens: int, device: torch.device | str) -> dict[str, Tensor]:
        """A condition, on any device, meta too."""
        found: dict[str, Tensor] = {}
        if self.label is not None:
            found["label"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if self.text is not None:
            found["text"] = torch.zeros(batch_size, text_tokens, self.text.in_features, device=device)
        if self.phonemes is not None:
            found["phonemes"] = torch.zeros(batch_size, text_tokens, dtype=torch.int64, device=device)
        return found

    def tokens(self, text_tokens: int) -> int:
        """How many tokens it makes of a text of so many."""
        texts = int(self.text is not None) + int(self.phonemes is not None)
        return int(self.label is not None) + texts * text_tokens


class StreamTables(nn.Module):
    """Embeds the tokens of K streams, each by a table of its own, and adds them up: (..., K) integers -> (..., D).

    One parameter holds all tables, of V + 1 rows each: the last stands where a stream has no token, or hides it.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, hidden_size: int):
        super().__init__()
        self.num_codebooks, self.size = num_codebooks, codebook_size + 1
        self.table = TokenTable(num_codebooks * self.size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        first = torch.arange(self.num_codebooks, device=tokens.device) * self.size
        return self.table(tokens + first).sum(-2)

    @torch.no_grad()
    def zero_hidden_(self) -> None:
        """Makes the last row of each table zero: what is hidden adds nothing to what is known."""
        self.table.rows.unflatten(0, (self.num_codebooks, self.size))[:, -1].zero_()
