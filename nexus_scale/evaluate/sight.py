"""What metrics see of samples: features by the networks that a suite names, a classifier's answers, colours; each with a fingerprint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.evaluate.scores import Reference, ScoreSettings, real_groups
from nexus_scale.evaluate.sources import Source
from nexus_scale.evaluate.suite import Features, SamplesSection
from nexus_scale.interop.extractors import find_extractor
from nexus_scale.io.durable import replacing
from nexus_scale.metrics.clips import features_of
from nexus_scale.metrics.colours import colour_shares
from nexus_scale.metrics.features import Compute, Extractor

log = logging.getLogger(__name__)

KEPT = ".evaluation"
"""A folder below the data root that keeps what is seen of real samples, and classifiers; it may be deleted."""

FOUND, SHARES = "classifier.found", "colours.shares"
"""What is seen beside features: probabilities of the groups, shares of colours."""

COLOURS_EYE = Extractor(
    "rules on pixels", "colours-1", "images", "shares", lambda: lambda images: {"shares": colour_shares(images)}
)


def _pixels(images: Tensor) -> dict[str, Tensor]:
    return {"pixels": torch.nn.functional.adaptive_avg_pool2d(images.float(), (16, 16)).flatten(1)}


PIXELS = Extractor("pixels, averaged to 16 x 16", "pixels-16", "images", "pixels", lambda: _pixels)


def find_extractors(
    features: Features, weights: Mapping[str, Mapping[str, Any]], data_root: Path, device: torch.device | str = "cpu"
) -> dict[str, Extractor]:
    """The networks of features by name, but for `classifier`; none is loaded yet.

    Raises:
        UserError: a package or file is missing, or no such features; says what to do.
    """
    if unused := sorted(set(weights) - {entry.partition(".")[0] for entry in features}):
        raise UserError(f"weights.{unused[0]}: no features of that name; leave it out")
    found: dict[str, Extractor] = {}
    for name in {entry.partition(".")[0] for entry in features} - {"classifier"}:
        found[name] = (
            PIXELS
            if name == "pixels"
            else find_extractor({"name": name, **weights.get(name, {})}, data_root, device=device)
        )
        if found[name].takes == "sounds":
            raise UserError(f"features: {name} takes sounds; expected features of images or clips")
    return found


def key_of(entry: str, extractors: Mapping[str, Extractor]) -> str:
    """`name.kind` of an entry of `features`, whose kind may be left out."""
    name, _, kind = entry.partition(".")
    return f"{name}.{kind or extractors[name].main}"


def find_classifier(section: SamplesSection, data_root: Path) -> tuple[Extractor, Reference]:
    """A classifier of the groups of real samples, which learns from `others` when it first looks; kept for the next time.

    Raises:
        UserError: the folders have no labels, or too few groups.
    """
    assert section.others is not None
    settings = ScoreSettings(
        train=section.others, heldout=section.reference, classifier_networks=section.classifier_networks,
        classifier_steps=section.classifier_steps, least_per_group=section.least_per_group, seed=section.seed,
    )  # fmt: skip
    data = xxhash.xxh3_64_hexdigest(
        "".join(Manifest.load(data_root / one).hash for one in (section.others, section.reference)).encode()
    )
    reference = Reference(settings, *real_groups(data_root, settings), measured={}, kept=data_root / KEPT / data)

    def load() -> Compute:
        classifier = reference.classifier
        return lambda images: {"features": classifier.features(images), "found": classifier(images)}

    fingerprint = xxhash.xxh3_128_hexdigest((data + settings.model_dump_json()).encode())
    name = f"classifier of {len(reference.names)} groups, trained on {section.others}"
    return Extractor(name, fingerprint, "images", "features", load), reference


@torch.no_grad()
def seen(source: Source, extractors: Mapping[str, Extractor]) -> dict[str, Tensor]:
    """What each network gives of a source's samples, (N, ...) by `name.kind`, in one pass over them."""
    found: dict[str, Tensor] = {}
    for places, samples in source.read():
        for name, extractor in extractors.items():
            for kind, values in _of(extractor, samples).items():
                table = found.setdefault(f"{name}.{kind}", torch.zeros(source.count, values.shape[1]))
                table[places] = values.float().cpu()
    return found


def _of(extractor: Extractor, samples: Tensor) -> Mapping[str, Tensor]:
    """Of clips the features of their frames as `metrics.clips` has them, and the mean of a classifier's answers."""
    if samples.ndim == 4 or extractor.takes == "clips":
        return extractor.all(samples)
    kinds = extractor.all(samples[:1, :, 0])
    made = {kind: features_of(partial(_kind, extractor, kind), samples) for kind in kinds}
    return {kind: value[:, : kinds[kind].shape[1]] if kind == "found" else value for kind, value in made.items()}


def _kind(extractor: Extractor, kind: str, images: Tensor) -> Tensor:
    return extractor.all(images)[kind]


def seen_once(source: Source, extractors: Mapping[str, Extractor], data_root: Path) -> dict[str, Tensor]:
    """As `seen`, of real samples or noise, which need be looked at once: what was seen is kept in the data root."""
    from safetensors.torch import load_file, save_file

    found: dict[str, Tensor] = {}
    for name, extractor in extractors.items():
        body = f"{source.fingerprint} {source.count} {extractor.fingerprint}"
        path = data_root / KEPT / f"{name}-{xxhash.xxh3_64_hexdigest(body.encode())}.safetensors"
        if path.is_file():
            found |= load_file(path)
            continue
        log.info("evaluate: %d samples of %s as %s sees them", source.count, source.name, extractor.name)
        own = seen(source, {name: extractor})
        found |= own
        try:
            with replacing(path) as partial:
                save_file({key: value.contiguous() for key, value in own.items()}, partial)
        except OSError as error:
            log.warning("%s: what was seen is not kept: %s", path, error)
    return found
