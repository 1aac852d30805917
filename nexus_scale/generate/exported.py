"""An exported folder as something that draws: its weights read back, with the recipe and the data that they were trained on.

`nexus export` leaves `nexus.json` beside what other libraries read. The data's manifests must still be there: they say sizes and
encoders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from pydantic import BaseModel, ConfigDict

from nexus_scale.config.recipe import Cluster, Recipe, cluster_from, computing, dump, network_class, recipe_from
from nexus_scale.contracts import Network, RunFolder, UserError
from nexus_scale.data.manifest import hash_file
from nexus_scale.interop.published import family
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import read_json
from nexus_scale.processes.latents import LatentStats
from nexus_scale.train import Place

FILE = "nexus.json"


class Note(BaseModel):
    """`nexus.json`: what the folder was exported from."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    layout: str
    run: str
    step: int
    recipe: dict[str, object]
    cluster: dict[str, object]
    data_root: str
    runs_root: str
    latents: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Exported:
    """An exported folder, read back.

    Attributes:
        place: the folder in a run's place, and the roots that the run had.
        stats: how the run's latents are normalised; None where it has learnt no latents.
    """

    place: Place
    layout: str
    step: int
    recipe: Recipe
    cluster: Cluster
    stats: LatentStats | None

    def networks(self) -> dict[str, Network]:
        """The recipe's one trained network with the exported weights, on the CPU in float32.

        Raises:
            UserError: several networks, or weights that are not there or of another network.
        """
        role, entry = next(iter(self.recipe.trained().items()))
        spec = computing(entry)
        form = family(spec.name).formats.get(self.layout)
        if form is None or len(self.recipe.trained()) > 1:
            raise UserError(f"{self.place.run.path}: an export of {spec.name} is not read back; name the run it is of")
        arguments, state = form.read(self.place.run.path)
        cls, _ = network_class(spec)
        network: Network = cls(**arguments)
        with torch.no_grad():
            network.load_state_dict(state)
        return {role: network}

    @property
    def weights_hash(self) -> str:
        """A hash of all weights in the folder."""
        files = sorted(self.place.run.path.rglob("*.safetensors"))
        return xxhash.xxh3_128_hexdigest(json.dumps([hash_file(file) for file in files]).encode())


def note(
    place: Place, layout: str, step: int, recipe: Recipe, cluster: Cluster, stats: LatentStats | None, folder: Path
) -> None:
    """Writes `nexus.json` into an exported folder."""
    kept = Note(
        layout=layout,
        run=place.run.path.name,
        step=step,
        recipe=dump(recipe),
        cluster=dump(cluster),
        data_root=str(place.data_root.absolute()),
        runs_root=str(place.runs_root.absolute()),
        latents=None if stats is None else (stats.mean, stats.std),
    )
    atomic_write(folder / FILE, kept.model_dump_json(indent=1))


def exported_at(folder: Path) -> Exported | None:
    """The export in a folder; None where the folder is none, or one of an older version.

    Raises:
        UserError: its nexus.json is damaged.
    """
    try:
        found = read_json(folder / FILE, Note)
    except ValueError as error:
        raise UserError(f"{error}: export the run again", code=5) from None
    if found is None:
        return None
    where = str(folder / FILE)
    place = Place(RunFolder(folder.resolve()), Path(found.data_root), Path(found.runs_root))
    stats = None if found.latents is None else LatentStats(*found.latents)
    return Exported(
        place, found.layout, found.step, recipe_from(found.recipe, where), cluster_from(found.cluster, where), stats
    )
