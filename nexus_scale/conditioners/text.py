"""Text by one or several encoders: T5, CLIP, BERT and their kin.

Stable Diffusion 3 reads two CLIPs, tokens and pooled text, and a T5; FLUX a T5's tokens and a CLIP's pooled text. Which of the fields a
network is given, and how it joins them, is the recipe's `objective.conditions` and the network's own (`models/layers/text.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nexus_scale.contracts import CondField, Conditioner, UserError
from nexus_scale.interop.encoders import TextEncoder, combined_fingerprint, find_text_encoder
from nexus_scale.interop.text_tokens import TextTokens

MAX_ENCODERS = 3

Spec = Mapping[str, Any]


def specs_of(spec: Spec | Sequence[Spec], where: str) -> list[Spec]:
    """One to three text encoders as a list, from one or several.

    Raises:
        UserError: none, or too many.
    """
    specs = [spec] if isinstance(spec, Mapping) else list(spec)
    if not 1 <= len(specs) <= MAX_ENCODERS:
        raise UserError(f"{where}: got {len(specs)} encoders, expected 1 to {MAX_ENCODERS}.")
    return specs


def fingerprint_of(specs: Sequence[Spec], root: Path | None = None) -> str:
    """The fingerprint of a `TextConditioner` of these encoders, without loading them."""
    return combined_fingerprint([find_text_encoder(spec, root).fingerprint for spec in specs])


def _opened(spec: Spec, root: Path | None, device: str) -> TextEncoder | TextTokens:
    found = find_text_encoder(spec, root)
    return (
        TextTokens(found, spec.get("max_tokens")) if found.ids else TextEncoder(found, spec.get("max_tokens"), device)
    )


class TextConditioner(Conditioner):
    """Texts -> `text` (L, D) and `pooled` (Dp,) of the first encoder, `text_2`, `pooled_2`, `text_3`, `pooled_3` of the others.

    Args:
        specs: what `find_text_encoder` takes, one to three, in the order of the fields.
        root: where relative folders start; the current folder without it.
        max_tokens: where each encoder cuts, for those whose spec does not say; as manifests record it.
    """

    reads = "text"

    def __init__(
        self,
        specs: Sequence[Spec],
        root: Path | None = None,
        device: str = "cpu",
        max_tokens: Sequence[int | None] = (),
    ):
        cuts = [*max_tokens, *[None] * len(specs)]
        self.encoders = [
            _opened({"max_tokens": cut, **spec} if cut and "pad_to" not in spec else spec, root, device)
            for spec, cut in zip(specs, cuts, strict=False)
        ]
        self.fingerprint = combined_fingerprint([each.fingerprint for each in self.encoders])
        self.names: list[tuple[str, str]] = []
        self.fields: dict[str, CondField] = {}
        for number, encoder in enumerate(self.encoders, start=1):
            end = "" if number == 1 else f"_{number}"
            wide = (encoder.dim,) if isinstance(encoder, TextEncoder) else ()
            text, pooled = f"text{end}" if wide else f"text{end}_ids", f"pooled{end}"
            self.names.append((text, pooled))
            self.fields[text] = CondField((None, *wide), encoder.dtype)
            if encoder.pooled_dim is not None:
                self.fields[pooled] = CondField((encoder.pooled_dim,), encoder.dtype)

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """Fields of each text: tokens of real text alone, unless the encoder pads."""
        rows: list[dict[str, np.ndarray]] = [{} for _ in values]
        for (text, pooled), encoder in zip(self.names, self.encoders, strict=True):
            for row, encoded in zip(rows, encoder.encode(values), strict=True):
                row[text] = encoded.tokens
                if encoded.pooled is not None:
                    row[pooled] = encoded.pooled
        return rows

    def cut(self, values: Sequence[Any], lengths: Mapping[str, int | None]) -> dict[str, tuple[int, int]]:
        found = {}
        for (text, _), encoder in zip(self.names, self.encoders, strict=True):
            read = min(lengths.get(text) or encoder.max_tokens, encoder.max_tokens)
            if longer := sum(map(bool, encoder.overlong(values, read))):
                found[text] = longer, read
        return found
