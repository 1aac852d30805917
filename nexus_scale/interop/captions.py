"""Texts through all the encoders of a recipe: the one road that captions take into data, and prompts into sampling."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import TextEncoder, combined_fingerprint

log = logging.getLogger(__name__)

MOST_ENCODERS = 3

Spec = Mapping[str, Any]


def specs_of(spec: Spec | Sequence[Spec], where: str) -> list[Spec]:
    """One to three text encoders as a list, from one or several.

    Raises:
        UserError: none, or too many.
    """
    specs = [spec] if isinstance(spec, Mapping) else list(spec)
    if not 1 <= len(specs) <= MOST_ENCODERS:
        raise UserError(f"{where}: got {len(specs)} encoders, expected 1 to {MOST_ENCODERS}.")
    return specs


class CaptionEncoders:
    """One to three text encoders as one: texts to the fields `text`, `pooled`, `text_2`, `pooled_2`, `text_3`, `pooled_3`.

    Args:
        specs: what `find_text_encoder` takes, in the order of the fields.
        max_tokens: where each encoder cuts, for those whose spec does not say; as manifests record it.
    Attributes:
        fingerprint: what manifests of its output carry.
        channels: by field, channels of its tokens (L, D), or of a pooled text (D,).
        sequences: the fields that are (L, D).
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        root: Path | None = None,
        device: torch.device | str = "cpu",
        max_tokens: Sequence[int | None] = (),
    ):
        cuts = [*max_tokens, *[None] * len(specs)]
        self.encoders = [
            TextEncoder.open({"max_tokens": cut, **spec} if cut and "pad_to" not in spec else spec, root, device)
            for spec, cut in zip(specs, cuts, strict=False)
        ]
        self.fingerprint = combined_fingerprint([each.fingerprint for each in self.encoders])
        self.names = [("text", "pooled"), *((f"text_{n}", f"pooled_{n}") for n in range(2, len(self.encoders) + 1))]
        self.channels: dict[str, int] = {}
        for (text, pooled), encoder in zip(self.names, self.encoders, strict=True):
            self.channels[text] = encoder.dim
            if encoder.pooled_dim is not None:
                self.channels[pooled] = encoder.pooled_dim
        self.sequences = frozenset(text for text, _ in self.names)

    def encode(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Fields of each text, in order, float16: (L, D) of real tokens alone, or (D,)."""
        values: list[dict[str, np.ndarray]] = [{} for _ in texts]
        for (text, pooled), encoder in zip(self.names, self.encoders, strict=True):
            for row, encoded in zip(values, encoder.encode(texts), strict=True):
                row[text] = encoded.tokens
                if encoded.pooled is not None:
                    row[pooled] = encoded.pooled
        return values

    def cut(self, texts: Sequence[str]) -> dict[str, int]:
        """How many of the texts are longer than each encoder reads, in words, for those where some are."""
        counts = {}
        for (text, _), encoder in zip(self.names, self.encoders, strict=True):
            if longer := sum(map(bool, encoder.overlong(texts))):
                counts[f"{text}: captions longer than {encoder.max_tokens} tokens, which are cut"] = longer
        return counts

    def conditions(
        self, texts: Sequence[str], names: Sequence[str], lengths: Mapping[str, int | None]
    ) -> dict[str, Tensor]:
        """Fields of a batch of texts as a loader gives them: (B, ...) float32, sequences cut or padded with zeros, with their masks.

        Args:
            names: of the fields.
            lengths: of the sequences; None, or a name that is absent: the longest text's.
        Raises:
            UserError: a field that these encoders do not make.
        """
        if unknown := sorted(set(names) - set(self.channels)):
            raise UserError(
                f"objective.conditions: {unknown} are not made by data.encoders.text, which give {sorted(self.channels)}; correct either"
            )
        rows = self.encode(texts)
        cond: dict[str, Tensor] = {}
        for name in names:
            values = [torch.from_numpy(row[name]).float() for row in rows]
            if name not in self.sequences:
                cond[name] = torch.stack(values)
                continue
            length = lengths.get(name) or max(len(tokens) for tokens in values)
            encoder = self.encoders[[text for text, _ in self.names].index(name)]
            if longer := sum(map(bool, encoder.overlong(texts, length))):
                read = min(length, encoder.max_tokens)
                log.warning(
                    "%d of %d texts are longer than the %d tokens that are read as %s: cut",
                    longer,
                    len(texts),
                    read,
                    name,
                )
            cond[name] = torch.zeros(len(values), length, self.channels[name])
            cond[f"{name}_mask"] = torch.zeros(len(values), length, dtype=torch.bool)
            for row, tokens in enumerate(values):
                real = min(len(tokens), length)
                cond[name][row, :real] = tokens[:real]
                cond[f"{name}_mask"][row, :real] = True
        return cond
