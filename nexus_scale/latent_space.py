"""The latents that a run learns: their normalisation, which stays the run's own, their frames, and their way back to pixels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.durable import write_whole
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.processes.latents import LatentStats
from nexus_scale.recipe import Recipe
from nexus_scale.runs import begun

log = logging.getLogger(__name__)

LATENTS_FILE = "latents.json"
"""In a run folder: the normalisation of the latents that the run was begun on."""


def check_normalisation(run: RunFolder, dataset: Any) -> None:
    """That the data's latents are normalised as those that the run was begun on. Runs of older versions do not say how theirs were.

    Raises:
        UserError: they are not; says both.
    """
    kept = _kept(run)
    if kept is None or not begun(run) or kept == dataset.latent_stats:
        return
    raise UserError(
        f"{run.path}: was trained on latents normalised as {kept}; the data's are normalised as {dataset.latent_stats}: restore the data "
        f"that it was begun on, make the latents again with those `statistics`, or start another run (run=NAME)",
        code=5,
    )


def keep_normalisation(run: RunFolder, dataset: Any) -> None:
    """Writes down how the data's latents are normalised, for `check_normalisation`; nothing where the data are no latents."""
    stats: LatentStats | None = dataset.latent_stats
    if stats is None or (_kept(run) == stats):
        return
    described = {"mean": stats.mean, "std": stats.std, **{k: v for k, v in _made_by(dataset).items() if k != "kind"}}
    write_whole(run.path / LATENTS_FILE, json.dumps(described, indent=1))


def check_scale(recipe: Recipe, dataset: Any, runs_root: Path, data_root: Path) -> None:
    """Says so where networks begin with published weights (`init_from`), and the data's latents are on another scale than the one that
    their autoencoder states, which those weights were trained on."""
    begins = [name for name, spec in recipe.networks.items() if "init_from" in spec]
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


def _kept(run: RunFolder) -> LatentStats | None:
    file = run.path / LATENTS_FILE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return LatentStats(tuple(map(float, value["mean"])), tuple(map(float, value["std"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not readable as a normalisation of latents ({error!r}); restore it, or delete it if the data are still those that "
            "the run was begun on",
            code=5,
        ) from None


def _made_by(dataset: Any) -> Mapping[str, Any]:
    made: Mapping[str, Any] = dataset.encoders.get("moments", {})
    return made


def decoder_of(recipe: Recipe, dataset: Any, runs_root: Path, data_root: Path) -> Callable[[Tensor], Tensor]:
    """`decode(z)`: latents as the autoencoder gives them -> images (B, 3, H, W) or clips (B, 3, F, H, W), of as many frames as the
    data's latents stand for.

    Raises:
        UserError: the recipe names no autoencoder.
    """
    spec = recipe.data.encoders.get("moments")
    if not isinstance(spec, Mapping):
        raise UserError(
            f"recipe {recipe.name}: data.encoders.moments is left out, and latents become images or clips only by the autoencoder that "
            "made them; name it, for example {run: NAME} or {folder: PATH}"
        )
    frames = frames_of(dataset)
    vae = open_vae(spec, runs_root, data_root)

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z, frames.get(z.shape[2]) if z.ndim == 5 else None)

    return decode


def frames_of(dataset: Any) -> dict[int, int]:
    """How many frames the data's latents stand for, by their number of latent frames, in the order of the sources; empty of images, and
    of latents whose manifest does not say.

    Raises:
        UserError: sources of clips whose numbers of frames differ and whose latents' do not.
    """
    known: dict[int, int] = {}
    for manifests in getattr(dataset, "sources", ()):
        made = next((one for one in manifests if "moments" in one.fields and (one.encoder or {}).get("frames")), None)
        shape = None if made is None else made.fields["moments"].shape
        if made is None or shape is None or len(shape) != 4:
            continue
        latent, frames = int(shape[1] or 0), int(made.encoder["frames"])
        if known.setdefault(latent, frames) != frames:
            raise UserError(
                f"{made.where}: latents of clips of {frames} frames beside others of {known[latent]}; both are {latent} latent frames, so "
                "that a sample could be either: leave one source out",
                code=3,
            )
    return known
