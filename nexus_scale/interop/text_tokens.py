"""A text encoder's tokenizer alone: texts become the numbers of their tokens, which a network of the run reads in each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import TextEncoder, TextEncoderFolder, TextStates, open_tokenizer_of


def words_of(token: str, count: int) -> list[str]:
    """What a new token of several vectors is called in tokenizers, as diffusers has it: `<cat>`, `<cat>_1`, ..."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


class TextTokens:
    """As `TextEncoder`, of numbers of tokens (L,) in the place of their states. The weights are not read.

    Attributes:
        new_tokens: words that the tokenizer does not have, and how many tokens each of them is; they are numbered from the encoder's
            vocabulary on.
    """

    dtype, pooled_dim = "int32", None
    overlong = TextEncoder.overlong

    def __init__(self, found: TextEncoderFolder, max_tokens: int | None = None):
        self.found, self.fingerprint = found, found.fingerprint
        self.new_tokens: Mapping[str, int] = dict(found.new_tokens)
        self._tokenizer = open_tokenizer_of(found)
        limit = min(int(self._tokenizer.model_max_length), int(found.config.get("max_position_embeddings", 77)))
        self.max_tokens = min(found.pad_to or max_tokens or limit, limit)
        first = int(found.config["vocab_size"])
        for token, count in self.new_tokens.items():
            words = words_of(token, count)
            added = self._tokenizer.add_tokens(words)
            numbers = self._tokenizer.convert_tokens_to_ids(words)
            if added != count or numbers != list(range(first, first + count)):
                raise UserError(
                    f"{found.tokenizer}: {token!r} becomes tokens {numbers}; expected {first} and on: choose a word that it does not have"
                )
            first += count

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[TextStates]:
        """The tokens of each text, in order, special ones included."""
        if not texts:
            return []
        cut, padding = (
            min(max_tokens or self.max_tokens, self.max_tokens),
            False if self.found.pad_to is None else "max_length",
        )
        told = [self._spelt(text) for text in texts]
        ids = self._tokenizer(told, truncation=True, max_length=cut, padding=padding)["input_ids"]
        return [TextStates(np.array(row, np.int32), None) for row in ids]

    def _spelt(self, text: str) -> str:
        """The text with every new word as all of its tokens."""
        for token, count in self.new_tokens.items():
            text = text.replace(token, " ".join(words_of(token, count)))
        return text
