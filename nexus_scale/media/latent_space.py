"""The latents that a run learns: their normalisation, which stays the run's own, their frames, and their way back to pixels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Manifest
from nexus_scale.engine.checkpoint import newest_state
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import DamagedFile, read_json
from nexus_scale.media import Undecodable
from nexus_scale.processes.latents import LatentStats
from nexus_scale.run.runs import begun

log = logging.getLogger(__name__)

NO_AUTOENCODER = (
    "data.encoders.moments is left out, and latents become images or clips only by the autoencoder that made them; name it, for example "
    "{run: NAME} or {folder: PATH}"
)

LATENTS_FILE = "latents.json"
"""In a run folder: the normalisation of the latents that the run was begun on."""


class Kept(BaseModel):
    """`latents.json`, and `latents` of a checkpoint's state."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_normalisation(run: RunFolder, dataset: Any) -> None:
    """That the data's latents are normalised as those that the run was begun on. Runs of older versions do not say how theirs were:
    by the data's statistics, since there was nothing else.

    Raises:
        UserError: they are not; says both.
    """
    stats: LatentStats | None = dataset.latent_stats
    if stats is None or not begun(run):
        return
    kept = _kept(run)
    if kept is not None and kept != stats:
        raise UserError(
            f"{run.path}: was trained on latents normalised as {kept}; the data's are normalised as {stats}: restore the data that it was "
            "begun on, make the latents again with those `statistics`, or start another run (run=NAME)",
            code=5,
        )
    if kept is None and any(made.get("normalisation") == "stated" for made in _makers(dataset)):
        raise UserError(
            f"{run.path}: was begun by an older version, on latents normalised by the data's own statistics; the data's are normalised as "
            f"their autoencoder states, {stats}: make the latents again with `statistics: channel` (or whole, as it had them), or start "
            "another run (run=NAME)",
            code=5,
        )


def keep_normalisation(run: RunFolder, dataset: Any) -> None:
    """Writes down how the data's latents are normalised, for `check_normalisation`; nothing where the data are no latents."""
    stats: LatentStats | None = dataset.latent_stats
    if stats is None:
        return
    notes = next(iter(_makers(dataset)), {})
    described = {"mean": stats.mean, "std": stats.std, **{key: value for key, value in notes.items() if key != "kind"}}
    atomic_write(run.path / LATENTS_FILE, json.dumps(described, indent=1))


def _kept(run: RunFolder) -> LatentStats | None:
    """The normalisation that the run was begun on, from its folder or else from its newest checkpoint; None where neither says."""
    damaged = None
    try:
        kept = read_json(run.path / LATENTS_FILE, Kept)
        if kept is not None:
            return LatentStats(kept.mean, kept.std)
    except (DamagedFile, ValueError) as error:
        damaged = error
    state = newest_state(run.checkpoints) or {}
    try:
        if state.get("latents"):
            kept = Kept.model_validate(state["latents"])
            return LatentStats(kept.mean, kept.std)
    except ValueError as error:
        damaged = damaged or error
    if damaged is not None:
        raise UserError(
            f"{damaged}; no checkpoint says how the run's latents are normalised either: restore {LATENTS_FILE}, or delete it if the data "
            "are still those that the run was begun on",
            code=5,
        ) from None
    return None


def _makers(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """What manifests say of the autoencoder that made the latents, by source."""
    for manifests in dataset.sources:
        yield from (one.encoder for one in manifests if one.latent is not None and one.encoder is not None)


def check_scale(recipe: Recipe, dataset: Any, runs_root: Path, data_root: Path) -> None:
    """Says so where networks begin with published weights (`init_from`), and the data's latents are on another scale than the one that
    their autoencoder states, which those weights were trained on."""
    begins = [name for name, network in recipe.built().items() if network.init_from is not None]
    vae = recipe.data.encoders.get("moments")
    if not begins or not isinstance(vae, Mapping) or dataset.latent_stats is None:
        return
    stated = open_vae(vae, runs_root, data_root).stated
    if stated is not None and stated != dataset.latent_stats:
        log.warning(
            "networks.%s.init_from: published weights read latents as their autoencoder states, %s; the data's are normalised as %s: make "
            "them again without `statistics`, into another folder, unless the weights were trained on these",
            begins[0],
            stated,
            dataset.latent_stats,
        )


def decoder_of(
    recipe: Recipe,
    dataset: Any,
    runs_root: Path,
    data_root: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[[Tensor], Tensor]:
    """`decode(z)`: latents as the autoencoder gives them -> images (B, 3, H, W) or clips (B, 3, F, H, W), of as many frames as the
    data's latents stand for.

    Raises:
        Undecodable: the recipe names no autoencoder.
    """
    spec = recipe.data.encoders.get("moments")
    if not isinstance(spec, Mapping):
        raise Undecodable(NO_AUTOENCODER)
    frames = frames_of(dataset)
    vae = open_vae(spec, runs_root, data_root, device, dtype)

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z, frames.get(z.shape[2]) if z.ndim == 5 else None)

    return decode


def encoder_of(
    recipe: Recipe,
    dataset: Any,
    runs_root: Path,
    data_root: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[[Tensor], Tensor]:
    """`encode(x)`: images (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w), as the data have them.

    Raises:
        Undecodable: the recipe names no autoencoder.
        UserError: it is not the one that the data were made with.
    """
    spec = recipe.data.encoders.get("moments")
    if not isinstance(spec, Mapping):
        raise Undecodable(NO_AUTOENCODER)
    vae = open_vae(spec, runs_root, data_root, device, dtype)
    check_made_with(dataset, "moments", vae.fingerprint)
    return lambda x: vae.encode(x).cpu()


def check_made_with(dataset: Any, field: str, fingerprint: str) -> None:
    """That an encoder with this fingerprint made a field of the data, as far as they say by what it was made.

    Args:
        dataset: the run's data; None where it does not matter.
    Raises:
        UserError: another one made it.
    """
    made = None if dataset is None else dataset.encoders.get(field, {}).get("fingerprint")
    if made is not None and made != fingerprint:
        raise UserError(
            f"data.encoders.{field}: has fingerprint {fingerprint}, the data that the run learned from were made with {made}; "
            "name the one they were made with",
            code=3,
        )


def frames_of(dataset: Any) -> dict[int, int]:
    """How many frames the data's latents stand for, by their number of latent frames, in the order of the sources; empty of images, and
    of latents whose manifest does not say.

    Raises:
        UserError: sources of clips whose numbers of frames differ and whose latents' do not.
    """
    known: dict[int, int] = {}
    for manifests in dataset.sources:
        made = next((one for one in manifests if "moments" in one.fields), None)
        shape = None if made is None else made.fields["moments"].shape
        if made is None or shape is None or len(shape) != 4:
            continue
        latent, frames = shape[1], (made.encoder or {}).get("frames")
        if frames is None:
            frames = _frames_of_source(made)
        if frames is None:
            if latent is not None and latent % 2 == 0:
                log.info(
                    "%s: made by an older version, its manifest does not say of how many frames its %d latent frames are: taken for those "
                    "of clips as the autoencoder was trained on",
                    made.where,
                    latent,
                )
            continue
        if type(frames) is not int or type(latent) is not int or frames < 1:
            raise UserError(
                f"{made.where}: its manifest says that {latent} latent frames stand for {frames!r} frames; expected whole numbers from 1 "
                "up: make the folder again",
                code=3,
            )
        if known.setdefault(latent, frames) != frames:
            raise UserError(
                f"{made.where}: latents of clips of {frames} frames beside others of {known[latent]}; both are {latent} latent frames, so "
                "that a sample could be either: leave one source out",
                code=3,
            )
    return known


def _frames_of_source(made: Manifest) -> int | None:
    """Frames of the clips that latents were made from, where these lie beside them, as jobs put them; None where they do not."""
    if made.source is None or made.store is not None:
        return None
    for manifest in sorted(made.folder.parent.glob(f"*/{MANIFEST_FILE}")):
        try:
            source = Manifest.load(manifest.parent)
        except (DataError, OSError) as error:
            log.debug("%s: not looked at: %s", manifest.parent, error)
            continue
        if source.hash == made.source:
            shape = next(
                (field.shape for field in source.fields.values() if field.shape and len(field.shape) == 4), None
            )
            return None if shape is None else shape[1]
    return None
