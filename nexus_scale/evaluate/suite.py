"""Suites: what `nexus evaluate` measures. A file below configs/suites, or any; sections that `nexus score` knows mean the same here."""

from __future__ import annotations

from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from nexus_scale.config.kinds import check_kind
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import find_config
from nexus_scale.config.registry import explain, nearest
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import canonical_json
from nexus_scale.evaluate.likelihood import LikelihoodSettings
from nexus_scale.evaluate.measures import LEAST, SETS
from nexus_scale.evaluate.music import MusicScoreSettings
from nexus_scale.evaluate.speech import SpeechScoreSettings
from nexus_scale.metrics.statistics import Resampling

STRICT = ConfigDict(extra="forbid", frozen=True)

Features = dict[str, tuple[str, ...]]
"""Figures by the features that they are computed in: `classifier`, `pixels`, or a name that `interop.extractors` knows, with `.kind` where
a network gives several."""


def _known(features: Features) -> Features:
    for name, figures in features.items():
        for figure in figures:
            if figure not in SETS:
                raise ValueError(f"{name}: {figure!r} is no figure of sets; {nearest(figure, list(SETS))}")
    return features


class SamplesSection(BaseModel):
    """The `samples:` section: what is drawn is held against real samples.

    Attributes:
        reference: folder of real samples below the data root: shards, or pictures. Its captions are the prompts.
        others: a folder of further real ones, such as the training data: they stand beside each figure as what a perfect model would reach,
            and the classifier learns from them. None: halves of the reference are held against each other.
        count: samples that are drawn; where the reference has fewer, its captions are repeated.
        reference_count: real samples at most; None: all.
        prompts: `captions` or `classes` of the reference, `none`, or a text file below the data root with a prompt a line.
        features: see `Features`.
        weights: of features that need files or folders, below the data root, by their names; see `interop.extractors`.
        following: `group`: the classifier finds the group of the prompt; `colour`: of `colours`, prompts that name one, so many times each;
            `count`, `position`: of `scenes`, prompts such as `three apples` and `a dog left of a cat`, by what a `detector` finds.
        detector: a DETR-like model that knows the things of `scenes`: {folder: PATH} of transformers, below the data root.
        classifier_networks, classifier_steps, least_real_accuracy: of the classifier; see `ScoreSettings`.
        guidance, steps, seed: of drawing; None: the recipe's.
    """

    model_config = STRICT
    reference: str
    others: str | None = None
    count: int = Field(256, ge=LEAST, le=10**7)
    reference_count: int | None = Field(None, ge=LEAST, le=10**7)
    prompts: str = "captions"
    features: Features = {"classifier": ("frechet",)}
    weights: dict[str, dict[str, str | int]] = {}
    following: tuple[Literal["group", "colour", "count", "position"], ...] = ()
    colours: tuple[str, ...] = ()
    colours_each: int = Field(4, ge=1, le=10**4)
    scenes: tuple[str, ...] = ()
    scenes_each: int = Field(4, ge=1, le=10**4)
    detector: dict[str, str] = {}
    classifier_networks: int = Field(1, ge=1, le=100)
    classifier_steps: int = Field(400, ge=1, le=10**7)
    least_per_group: int = Field(1, ge=1, le=10**9)
    least_real_accuracy: float = Field(0.7, ge=0, le=1)
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)

    _features = field_validator("features")(_known)

    @model_serializer(mode="wrap")
    def _as_it_was(self, dump: Any) -> dict[str, Any]:
        """Without `scenes` where there are none, so that evaluations older than the key compare with newer ones."""
        values: dict[str, Any] = dump(self)
        left = () if self.scenes else ("scenes", "scenes_each", "detector")
        return {key: value for key, value in values.items() if key not in left}

    @property
    def needs_classifier(self) -> bool:
        return "group" in self.following or "classifier" in self.features

    @model_validator(mode="after")
    def _whole(self) -> SamplesSection:
        if self.needs_classifier and self.others is None:
            raise ValueError(
                "others: missing; the classifier learns from a folder of real samples that are not the reference"
            )
        if ("colour" in self.following) != bool(self.colours):
            raise ValueError("following: `colour` and `colours` (prompts that name one) go together")
        if len({bool({"count", "position"} & {*self.following}), bool(self.scenes), bool(self.detector)}) > 1:
            raise ValueError("following: `count` or `position`, `scenes` (prompts) and `detector` go together")
        return self


class ReconstructionSection(BaseModel):
    """The `reconstruction:` section: what an autoencoder or tokenizer makes of its held-out data.

    `samples`: of the validation data, from the first; `figures`: of each picture with itself; `features`: of all, as rFID is.
    """

    model_config = STRICT
    samples: int = Field(256, ge=LEAST, le=10**7)
    figures: tuple[Literal["psnr", "ssim"], ...] = ("psnr", "ssim")
    features: Features = {}
    weights: dict[str, dict[str, str | int]] = {}
    seed: int = Field(0, ge=0, lt=2**63)

    _features = field_validator("features")(_known)


class ResamplingSection(BaseModel):
    """The `resampling:` section; see `metrics.statistics.Resampling`."""

    model_config = STRICT
    level: float = Field(0.95, gt=0.5, lt=1)
    bootstraps: int = Field(1000, ge=10, le=10**6)
    halves: int = Field(50, ge=4, le=10**5)
    seed: int = Field(0, ge=0, lt=2**63)

    def resampling(self) -> Resampling:
        return Resampling(self.level, self.bootstraps, self.halves, self.seed)


class Suite(BaseModel):
    """A suite, whose sections are measured one after another."""

    model_config = STRICT
    samples: SamplesSection | None = None
    reconstruction: ReconstructionSection | None = None
    likelihood: LikelihoodSettings | None = None
    speech: SpeechScoreSettings | None = None
    music: MusicScoreSettings | None = None
    resampling: ResamplingSection = Field(default_factory=ResamplingSection)

    @model_validator(mode="after")
    def _some(self) -> Suite:
        if not self.sections:
            raise ValueError(f"has no section to measure; expected one of {', '.join(SECTIONS)}")
        return self

    @property
    def sections(self) -> dict[str, BaseModel]:
        """The sections that are there, by name."""
        return {name: part for name in SECTIONS if (part := getattr(self, name)) is not None}

    @property
    def fingerprint(self) -> str:
        """Of all settings: evaluations of one fingerprint compare."""
        return xxhash.xxh3_128_hexdigest(canonical_json(self.model_dump(mode="json")))


SECTIONS = ("samples", "reconstruction", "likelihood", "speech", "music")


def read_suite(name: str) -> Suite:
    """A suite by path, or by name below configs/suites.

    Raises:
        UserError: no such file, an unknown or ill-typed key.
    """
    values = read_yaml(find_config(name, "suites"))
    check_kind(Suite, values, name)
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, name))) from None
