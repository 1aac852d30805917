"""From `data.encoders` of a recipe to what encodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.conditioners import text
from nexus_scale.conditioners.image import MOMENTS, ImageConditioner
from nexus_scale.conditioners.image_prompt import IMAGE_PROMPT, ImagePromptConditioner
from nexus_scale.conditioners.phonemes import PhonemeConditioner
from nexus_scale.conditioners.semantic import SEMANTIC, SemanticConditioner
from nexus_scale.conditioners.text import TextConditioner, specs_of
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import CondField, Conditioner, UserError
from nexus_scale.data.encoded import Encoded
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.interop.encoders import open_codec
from nexus_scale.interop.image_encoders import find_image_encoder
from nexus_scale.interop.tokenizers import open_tokenizer

CAPTION, IMAGE = "caption", "image"
"""The raw fields that texts and phonemes, and latents, are made of."""

OF_SOUNDS = (SEMANTIC,)
"""Fields that `of_sounds` makes."""

Specs = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def fingerprint_of(field: str, spec: Specs, data_root: Path, runs_root: Path) -> str:
    """The fingerprint of what an entry of `data.encoders` names: an autoencoder (`moments`), a codec (`codes`), a tokenizer
    (`video_codes`), a phonemizer (`phonemes`), an encoder of pictures (`image_prompt`), groups of features (`semantic`), or one or several
    text encoders."""
    openers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "moments": lambda one: open_vae(one, runs_root, data_root),
        "codes": lambda one: open_codec(one, runs_root, data_root),
        "video_codes": lambda one: open_tokenizer(one, runs_root, data_root),
        "phonemes": lambda one: PhonemeConditioner.open(**one),
        IMAGE_PROMPT: lambda one: find_image_encoder(one, data_root),
        SEMANTIC: lambda one: SemanticConditioner.open(one, data_root),
    }
    if field not in openers:
        return text.fingerprint_of(specs_of(spec, f"data.encoders.{field}"), data_root)
    if not isinstance(spec, Mapping):
        raise UserError(f"data.encoders.{field}: got several; expected one")
    fingerprint: str = openers[field](spec).fingerprint
    return fingerprint


def of_sounds(recipe: Recipe, data_root: Path, codec: Any, device: str = "cpu") -> list[Conditioner]:
    """What is told of a recording beside its codes: the entries of `data.encoders` that hear it; of made-up data a stand-in.

    Raises:
        UserError: it hears sounds at another rate than the codec.
    """
    synthetic = recipe.data.synthetic
    if synthetic is not None:
        return [LoudnessTokens(codec, int(synthetic.fields[SEMANTIC]["high"]))] if SEMANTIC in synthetic.fields else []
    if SEMANTIC not in recipe.data.encoders:
        return []
    spec: Any = recipe.data.encoders[SEMANTIC]
    made = SemanticConditioner.open(spec, data_root, device)
    if made.sample_rate_hz != codec.sample_rate_hz:
        raise UserError(
            f"data.encoders.semantic: hears sounds at {made.sample_rate_hz} Hz, the codec at {codec.sample_rate_hz}; give a codec of that "
            "rate"
        )
    return [made]


class LoudnessTokens(Conditioner):
    """The stand-in of semantic tokens: how loud each step of a stand-in's codec is."""

    reads, fingerprint = "audio", "made up"

    def __init__(self, codec: Any, num_tokens: int):
        self.codec, self.num_tokens = codec, num_tokens
        self.fields = {SEMANTIC: CondField((None,), "int16")}

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        codes = [self.codec.encode(wave[None])[0, :, 0] % self.num_tokens for wave in values]
        return [{SEMANTIC: one.numpy().astype(np.int16)} for one in codes]


def on_the_fly(recipe: Recipe, data_root: Path, runs_root: Path, device: str = "cpu") -> list[Encoded]:
    """What encodes captions and images while data are read: the entries of `data.on_the_fly`."""

    def opened(field: str) -> Encoded:
        spec: Any = recipe.data.encoders[field]
        if field == MOMENTS:
            vae = open_vae(spec, runs_root, data_root, device)
            conditioner = ImageConditioner(vae, mirror=bool(recipe.objective.arguments.get("mirror")))
            return Encoded(conditioner, IMAGE, read=_planes, latent_stats=vae.stated)
        if field == IMAGE_PROMPT:
            return Encoded(ImagePromptConditioner(spec, data_root, device), IMAGE, read=_planes)
        if field == "phonemes":
            return Encoded(PhonemeConditioner.open(**spec), CAPTION)
        return Encoded(TextConditioner(specs_of(spec, f"data.encoders.{field}"), data_root, device), CAPTION)

    return [opened(field) for field in dict.fromkeys(recipe.data.on_the_fly)]


def _planes(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
