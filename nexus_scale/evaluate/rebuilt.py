"""The `reconstruction:` section of a suite: what an autoencoder or a tokenizer makes of held-out pictures, beside these."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Request, UserError
from nexus_scale.data.manifest import canonical_json
from nexus_scale.evaluate.findings import Findings, figure_of_rows, figures_of_set
from nexus_scale.evaluate.measures import measure_of
from nexus_scale.evaluate.sight import find_extractors, key_of, seen
from nexus_scale.evaluate.sources import AT_ONCE, Source, held_out
from nexus_scale.evaluate.suite import ReconstructionSection
from nexus_scale.generate.trained import Trained
from nexus_scale.metrics.psnr import psnr
from nexus_scale.metrics.ssim import WINDOW, ssim
from nexus_scale.metrics.statistics import Resampling

log = logging.getLogger(__name__)

FIGURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}


def ready_to_rebuild(
    section: ReconstructionSection, trained: Trained, resampling: Resampling
) -> Callable[[], Findings]:
    """Finds what the section needs, and returns what rebuilds and measures.

    Raises:
        UserError: the run rebuilds no pictures, or a package is missing.
    """
    if "classifier" in section.features:
        raise UserError(
            "reconstruction.features: `classifier` belongs to `samples:`; expected networks such as efficientnet_lite0"
        )
    extractors = find_extractors(section.features, section.weights, trained.place.data_root, trained.hardware.device)
    dataset = held_out(trained, "reconstruction")
    first = next(dataset.fixed(1, batch=1))
    given = _given(trained, first)
    if given is None or given.ndim != 4 or given.shape[1] not in (1, 3):
        raise UserError(
            f"reconstruction: recipe {trained.recipe.name} rebuilds no pictures; expected an autoencoder or tokenizer of images"
        )
    if "ssim" in section.figures:
        if min(given.shape[2:]) < WINDOW:
            raise UserError(
                f"reconstruction.figures: ssim needs {WINDOW} pixels; pictures are {tuple(given.shape[2:])}", code=3
            )
        ssim(given, given)  # whether its package is there

    def measure() -> Findings:
        found = Findings(paired=f"{dataset.hash} {section.samples} {section.seed}")
        pairs: list[tuple[Tensor, Tensor]] = []
        for batch in dataset.fixed(section.samples, batch=AT_ONCE):
            log.info("evaluate: rebuilding %d", len(batch))
            pairs.append(_rebuilt(trained, batch, section.seed))
        generator = torch.Generator().manual_seed(section.seed)
        for name in section.figures:
            rows = torch.cat([FIGURES[name](made, real) for real, made in pairs])
            noise = [FIGURES[name](torch.rand(real.shape, generator=generator) * 2 - 1, real) for real, _ in pairs]
            figure_of_rows(found, f"reconstruction/{name}", rows, resampling, ceiling=float(torch.cat(noise).mean()))
        real, made = (seen(_listed(side), extractors) for side in zip(*pairs, strict=True))
        for entry, names in section.features.items():
            key = key_of(entry, extractors)
            figures_of_set(
                found, f"reconstruction/{entry}", measure_of(names), made[key], real[key], resampling, None, None
            )
        found.features = {name: {"name": one.name, "fingerprint": one.fingerprint} for name, one in extractors.items()}
        found.references["validation data"] = {
            "fingerprint": dataset.hash,
            "samples": sum(len(one) for one, _ in pairs),
        }
        found.pictures = [picture for real, made in pairs for both in zip(real, made, strict=True) for picture in both][
            :64
        ]
        return found

    return measure


def _given(trained: Trained, batch: Batch) -> Tensor | None:
    """The pictures of a batch that the run rebuilds, in [-1, 1]."""
    draws = trained.draws
    _, request = trained.objective.request_like(batch.on(trained.hardware.device), Request())
    return next((request.given[name] for name in (draws.makes, *draws.given) if name in request.given), None)


def _rebuilt(trained: Trained, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures and what is made of them, on the CPU, as eight bits hold them."""
    cond, request = trained.objective.request_like(batch.on(trained.hardware.device), Request())
    made = trained.generate(cond, request, seed=seed, positions=batch.positions.tolist()).samples
    real = _given(trained, batch)
    assert real is not None
    return real.float().cpu(), ((made.float().clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1).cpu()


def _listed(parts: tuple[Tensor, ...]) -> Source:
    """Pictures in memory as a source; grey ones become three equal channels."""
    places = torch.arange(sum(map(len, parts))).split([len(part) for part in parts])
    return Source(
        "", canonical_json([]).decode(), sum(map(len, parts)),
        lambda: ((place, part.expand(-1, 3, -1, -1)) for place, part in zip(places, parts, strict=True)),
    )  # fmt: skip
