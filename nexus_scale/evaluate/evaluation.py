"""`nexus evaluate`: everything that a suite measures, of a run, an export or a folder, with intervals, floors and ceilings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.drawn import Target, ready_for_samples
from nexus_scale.evaluate.findings import PICTURE, Evaluation, Findings, figure_of_rows, write
from nexus_scale.evaluate.heard import ready_for_music, ready_for_speech
from nexus_scale.evaluate.likelihood import LikelihoodSettings, data_of, likelihoods
from nexus_scale.evaluate.music import MusicScoreSettings
from nexus_scale.evaluate.rebuilt import ready_to_rebuild
from nexus_scale.evaluate.speech import SpeechScoreSettings
from nexus_scale.evaluate.suite import ReconstructionSection, SamplesSection, Suite, read_suite
from nexus_scale.generate.exported import exported_at
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics.statistics import Resampling
from nexus_scale.run.files import is_run
from nexus_scale.train import Place

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"
"""Folder of a run or an export that holds one for each suite and step."""


def evaluate(
    what: Path,
    place: Place | None,
    suite: str,
    data_root: Path,
    *,
    step: int | None = None,
    weights: str | None = None,
    output: Path | None = None,
    hardware: Hardware | None = None,
) -> tuple[Evaluation, Path]:
    """Evaluates a run or an export (whose `place` is given) or a folder of what was drawn, and writes the result.

    Args:
        step: of an earlier checkpoint of a run; None: the newest.
        weights: which average of a run; None: its first.
        output: folder of the result; None: `evaluations/SUITE-STEP` in the run, `FOLDER.evaluations/SUITE` beside a folder.
    Returns:
        the result, and the folder that it is in.
    Raises:
        UserError: anything is missing, which is found before anything is drawn.
    """
    begun = time.monotonic()
    asked, name = read_suite(suite), Path(suite).stem
    of: dict[str, Any]
    target: Target
    if place is None:
        if step is not None or weights is not None:
            raise UserError(f"--step and --weights: {what} is a folder of samples; leave them out")
        target, of, folder = what, {"name": str(what)}, what.parent / f"{what.name}.{EVALUATIONS}" / name
    else:
        target = Trained(place.run, place, weights, hardware, step)
        data_root = place.data_root
        of = {"name": place.run.path.name, "step": target.step, "weights": weights}
        folder = place.run.path / EVALUATIONS / f"{name}-{target.step:08d}{'' if weights is None else f'-{weights}'}"
    folder = output or folder
    ready = {section: _ready(asked, section, target, data_root) for section in asked.sections}
    found = {section: measure() for section, measure in ready.items()}
    evaluation = Evaluation(
        of=of,
        suite={
            "name": name,
            "fingerprint": asked.fingerprint,
            "settings": asked.model_dump(mode="json", exclude_none=True),
        },
        figures={key: figure for one in found.values() for key, figure in one.figures.items()},
        references={key: value for one in found.values() for key, value in one.references.items()},
        features={key: value for one in found.values() for key, value in one.features.items()},
        prompts={section: one.prompts for section, one in found.items()},
        paired={section: one.paired for section, one in found.items()},
        left_out={key: why for one in found.values() for key, why in one.left_out.items()},
        warnings=[words for one in found.values() for words in one.warnings],
        seconds=round(time.monotonic() - begun, 1),
    )
    write(folder, evaluation, {key: tensor for one in found.values() for key, tensor in one.tensors.items()})
    _show(folder, found)
    return evaluation, folder


def is_drawn_by(path: Path) -> bool:
    """Whether a folder is a run or an export, which draws, and not a folder of samples."""
    return is_run(path) or exported_at(path) is not None


def _ready(suite: Suite, section: str, target: Target, data_root: Path) -> Callable[[], Findings]:
    settings, resampling = suite.sections[section], suite.resampling.resampling()
    if isinstance(settings, SamplesSection):
        return ready_for_samples(settings, target, data_root, resampling)
    if isinstance(settings, SpeechScoreSettings):
        return ready_for_speech(settings, target, data_root, resampling)
    if isinstance(settings, MusicScoreSettings):
        return ready_for_music(settings, target, data_root, resampling)
    if isinstance(target, Path):
        raise UserError(f"{section}: needs a run; {target} is a folder of samples: name a suite without this section")
    if isinstance(settings, ReconstructionSection):
        return ready_to_rebuild(settings, target, resampling)
    assert isinstance(settings, LikelihoodSettings)
    return _ready_for_likelihood(settings, target, resampling)


def _ready_for_likelihood(
    settings: LikelihoodSettings, trained: Trained, resampling: Resampling
) -> Callable[[], Findings]:
    dataset = data_of(trained, trained.place, settings)
    likelihoods(trained, dataset, settings.model_copy(update={"samples": 1, "draws": 1, "tolerance": 1.0}))

    def measure() -> Findings:
        found = Findings(paired=f"{dataset.hash} {settings.samples} {settings.seed}")
        for name, values in likelihoods(trained, dataset, settings).items():
            figure_of_rows(found, f"likelihood/{name}", values, resampling)
        found.references["likelihood data"] = {"fingerprint": dataset.hash, "samples": settings.samples}
        return found

    return measure


def _show(folder: Path, found: dict[str, Findings]) -> None:
    """A grid of the first samples, of clips strips of frames."""
    for section, one in found.items():
        if one.pictures:
            columns = 8 if one.pictures[0].ndim == 3 else 2
            shown = [to_uint8(picture.expand(3, *picture.shape[1:])[None])[0].numpy() for picture in one.pictures]
            path = folder / PICTURE
            path = path if section == "samples" else path.with_stem(f"{path.stem}-{section}")
            atomic_write(path, encode_image(make_grid(shown, columns)))
