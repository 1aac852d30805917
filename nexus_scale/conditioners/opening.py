"""From `data.encoders` of a recipe to what encodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_scale.conditioners import text
from nexus_scale.conditioners.phonemes import PhonemeConditioner
from nexus_scale.conditioners.text import TextConditioner, specs_of
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import Conditioner, UserError
from nexus_scale.data.encoded import Encoded
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.interop.encoders import open_codec

CAPTION = "caption"
"""The raw field that texts and phonemes are made of."""

Specs = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def fingerprint_of(field: str, spec: Specs, data_root: Path, runs_root: Path) -> str:
    """The fingerprint of what an entry of `data.encoders` names: an autoencoder (`moments`), a codec (`codes`), a phonemizer
    (`phonemes`), or one or several text encoders."""
    openers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "moments": lambda one: open_vae(one, runs_root, data_root),
        "codes": lambda one: open_codec(one, runs_root, data_root),
        "phonemes": lambda one: PhonemeConditioner.open(**one),
    }
    if field not in openers:
        return text.fingerprint_of(specs_of(spec, f"data.encoders.{field}"), data_root)
    if not isinstance(spec, Mapping):
        raise UserError(f"data.encoders.{field}: got several; expected one")
    fingerprint: str = openers[field](spec).fingerprint
    return fingerprint


def on_the_fly(recipe: Recipe, data_root: Path, device: str = "cpu") -> list[Encoded]:
    """What encodes captions while data are read: the entries of `data.on_the_fly`."""

    def opened(field: str) -> Conditioner:
        spec: Any = recipe.data.encoders[field]
        if field == "phonemes":
            return PhonemeConditioner.open(**spec)
        return TextConditioner(specs_of(spec, f"data.encoders.{field}"), data_root, device)

    return [Encoded(opened(field), CAPTION) for field in dict.fromkeys(recipe.data.on_the_fly)]
