"""The medium of a run's data: what its samples are decoded by, at which rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import UserError
from nexus_scale.data import stand_ins
from nexus_scale.interop import encoders, tokenizers
from nexus_scale.media import Medium, Undecodable
from nexus_scale.media.audio import Audio
from nexus_scale.media.image import Decoder, Image
from nexus_scale.media.latent_space import check_made_with, decoder_of, encoder_of
from nexus_scale.media.points import Points
from nexus_scale.media.video import Video

Encoder = Callable[[Tensor], Tensor]
"""Pixels (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w) float32 on the CPU."""

PIXELS = ("image", "video")
"""Fields whose samples are seen as they are."""
FEW = 256
"""Points of the data whose size says how large a plane is shown."""


def open_medium(
    recipe: Recipe,
    dataset: Any,
    runs_root: Path,
    data_root: Path,
    *,
    field: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sample_rate_hz: int | None = None,
) -> Medium:
    """What shows samples that stand in the place of a batch field.

    Args:
        dataset: the recipe's data: shape of the field, normalisation of latents, rates.
        field: `image`, `video`, `moments`, `audio`, `codes`, `video_codes`, or any of vectors.
        device, dtype: where and in what autoencoders compute. Codecs compute in float32: they are small, and bf16 has fewer values than
            16 bits of sound.
        sample_rate_hz: of waveforms, where the objective knows it.
    Raises:
        Undecodable: the recipe names no autoencoder, codec or tokenizer.
        UserError: the one that it names cannot be opened, or is another than the data's.
    """
    if field == "codes":
        codec = open_codec(recipe, dataset, runs_root, data_root, device)
        return Audio(codec.sample_rate_hz, codec)
    rate = dataset.rates.get(field)
    if field == "video_codes":
        return Video(open_tokenizer(recipe, dataset, runs_root, data_root, device).decode, rate_hz=rate)
    if field == "audio":
        if sample_rate_hz is None and rate is None:
            raise UserError("the data's manifest does not say their sample rate; make the folder again", code=3)
        return Audio(int(sample_rate_hz or rate))
    if len(dataset.fields[field]) == 1:
        return Points(
            max(float(batch.on("cpu")[field].abs().max()) for batch in dataset.fixed(min(FEW, dataset.samples)))
        )
    decode = None if field in PIXELS else decoder_of_latents(recipe, dataset, runs_root, data_root, device, dtype)
    stats = None if field in PIXELS else dataset.latent_stats
    if len(dataset.fields[field]) == 3:
        return Image(decode, stats)
    return Video(decode, stats, rate)


def decoder_of_latents(
    recipe: Recipe,
    dataset: Any,
    runs_root: Path,
    data_root: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """What turns latents, not normalised, into pixels (B, 3, ...); of made-up data a stand-in.

    Raises:
        Undecodable: the recipe names no autoencoder.
    """
    if recipe.data.synthetic is not None:
        return stand_ins.decode_latents
    return decoder_of(recipe, dataset, runs_root, data_root, device, dtype)


def encoder_of_latents(
    recipe: Recipe,
    dataset: Any,
    runs_root: Path,
    data_root: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """What turns pixels (B, 3, H, W) in [-1, 1] into moments (B, 2C, h, w); of made-up data a stand-in.

    Raises:
        Undecodable: the recipe names no autoencoder.
        UserError: it is not the one that the data were made with.
    """
    if recipe.data.synthetic is not None:
        return partial(stand_ins.encode_latents, channels=dataset.fields["moments"][0] // 2)
    return encoder_of(recipe, dataset, runs_root, data_root, device, dtype)


def open_codec(
    recipe: Recipe, dataset: Any, runs_root: Path, data_root: Path, device: torch.device | str = "cpu"
) -> Any:
    """The codec that the recipe names under `data.encoders.codes`; of made-up data a stand-in.

    Args:
        dataset: the recipe's data, which say by what they were made; None where it does not matter.
    Raises:
        Undecodable: the recipe names none.
        UserError: it is not the one that the data were made with.
    """
    if recipe.data.synthetic is not None:
        return stand_ins.codec_of(recipe.data.synthetic.fields)
    return _that_made(
        recipe, dataset, "codes", "sound only by the codec", encoders.open_codec, (runs_root, data_root, device)
    )


def open_tokenizer(
    recipe: Recipe, dataset: Any, runs_root: Path, data_root: Path, device: torch.device | str = "cpu"
) -> Any:
    """The tokenizer that the recipe names under `data.encoders.video_codes`; of made-up data a stand-in.

    Raises:
        Undecodable: the recipe names none.
        UserError: it is not the one that the data were made with.
    """
    if recipe.data.synthetic is not None:
        return stand_ins.tokenizer_of(recipe.data.synthetic.fields)
    roots = (runs_root, data_root, device)
    return _that_made(recipe, dataset, "video_codes", "clips only by the tokenizer", tokenizers.open_tokenizer, roots)


def _that_made(
    recipe: Recipe, dataset: Any, field: str, becomes: str, opened: Callable[..., Any], roots: tuple[Any, ...]
) -> Any:
    """What the recipe names under `data.encoders.<field>`, and that made the data."""
    spec = recipe.data.encoders.get(field)
    if not isinstance(spec, dict):
        raise Undecodable(
            f"data.encoders.{field} is left out, and codes become {becomes} that made them; name it, for example {{run: NAME}}"
        )
    made = opened(spec, *roots)
    check_made_with(dataset, field, made.fingerprint)
    return made
