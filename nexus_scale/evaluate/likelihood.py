"""How probable a run finds data that it was not trained on: bits for each value, by the likelihood of its flow.

nexus score flow_matching_tiny_fashion_mnist --settings likelihood
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import Batch
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.sources import held_out
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.train import Place

log = logging.getLogger(__name__)


class LikelihoodSettings(BaseModel):
    """The `likelihood:` section of a settings file.

    `folders`: of the data, joined sample by sample, below the data root; none: the run's validation data. `samples`: how many, from the
    first. `draws`: of each sample, with other noise (of the dequantisation and of the estimate). `divergence`: `estimated` by one gradient,
    or `exact` by one for each value of a sample. `tolerance`, `earliest`: of the solver; see `Objective.likelihood`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folders: tuple[str, ...] = ()
    samples: int = Field(256, ge=1, le=10**9)
    draws: int = Field(1, ge=1, le=10**4)
    batch: int = Field(64, ge=1, le=10**5)
    divergence: Literal["estimated", "exact"] = "estimated"
    tolerance: float = Field(1e-5, ge=1e-12, le=1)
    earliest: float = Field(1e-5, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)


def score_likelihood(place: Place, settings: LikelihoodSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Means over the samples of what the objective's `likelihood` gives.

    Returns:
        bits (for each value of a sample) and whatever else there is by name, each with its `_error`, the standard error of the mean;
        samples, draws, divergence, seconds. Written to the run's likelihood.json.
    """
    begun = time.monotonic()
    trained = Trained(place.run, place, hardware=hardware)
    values = likelihoods(trained, data_of(trained, place, settings), settings)
    found: dict[str, Any] = {}
    for name, whole in values.items():
        found[name] = float(whole.mean())
        found[f"{name}_error"] = float(whole.std() / len(whole) ** 0.5) if len(whole) > 1 else None
    found |= {
        "samples": len(values["bits"]),
        "draws": settings.draws,
        "divergence": settings.divergence,
        "seconds": time.monotonic() - begun,
    }
    atomic_write(place.run.path / "likelihood.json", json.dumps(found, indent=1))
    return found


def likelihoods(trained: Trained, dataset: Any, settings: LikelihoodSettings) -> dict[str, Tensor]:
    """`bits` and whatever else the objective's `likelihood` gives, of each sample (N,)."""
    values: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in dataset.fixed(settings.samples, rank=0, world_size=1, batch=settings.batch):
            log.info("likelihood: %d samples", len(batch))
            for name, value in _mean_of_draws(trained, batch, settings).items():
                values.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in values.items()}


def data_of(trained: Trained, place: Place, settings: LikelihoodSettings) -> Any:
    """The data whose likelihood is asked for.

    Raises:
        UserError: the recipe has none, and the settings name none.
    """
    if settings.folders:
        return Dataset.open([Source([place.data_root / folder for folder in settings.folders], 1.0)])
    return held_out(trained, "likelihood.folders")


def _mean_of_draws(trained: Trained, batch: Batch, settings: LikelihoodSettings) -> dict[str, Tensor]:
    device = trained.hardware.device
    found = [
        trained.objective.likelihood(
            trained.nets, batch.on(device), ProgressRng(settings.seed, draw, "likelihood", batch.samples, device),
            exact=settings.divergence == "exact", tolerance=settings.tolerance, earliest=settings.earliest,
        )
        for draw in range(settings.draws)
    ]  # fmt: skip
    return {name: torch.stack([one[name] for one in found]).mean(0).cpu() for name in found[0]}
