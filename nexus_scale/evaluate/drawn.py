"""The `samples:` section of a suite: what a run draws, or a folder holds, held against real samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from nexus_scale.config.recipe import prompts_of
from nexus_scale.contracts import UserError, Word
from nexus_scale.data.manifest import canonical_json
from nexus_scale.evaluate.findings import Findings, figure_of_rows, figures_of_set
from nexus_scale.evaluate.measures import LEAST, measure_of
from nexus_scale.evaluate.scores import Reference
from nexus_scale.evaluate.sight import (
    COLOURS_EYE,
    FOUND,
    SHARES,
    find_classifier,
    find_extractors,
    key_of,
    seen,
    seen_once,
)
from nexus_scale.evaluate.sources import AT_ONCE, Source, folder_source, halves_of, noise_source
from nexus_scale.evaluate.suite import SamplesSection
from nexus_scale.generate.drawing import refuse
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.detectors import Detector, find_detector
from nexus_scale.metrics.colours import COLOURS, colour_follows, colour_said
from nexus_scale.metrics.colours import LEAST as LEAST_SHARE
from nexus_scale.metrics.features import Extractor
from nexus_scale.metrics.scenes import Scene, scene_said
from nexus_scale.metrics.statistics import Resampling

log = logging.getLogger(__name__)

Target = Trained | Path
"""A run or an export, or a folder of what was drawn before."""

OTHER_PROMPTS = "a folder holds what was drawn of other prompts"
GROUP, COLOUR, SCENES = "following/group", "following/colour", ("count", "position")


def ready_for_samples(
    section: SamplesSection, target: Target, data_root: Path, resampling: Resampling
) -> Callable[[], Findings]:
    """Finds everything that the section needs, and returns what draws and measures.

    Raises:
        UserError: something is missing, or does not fit the target.
    """
    reference = folder_source(data_root / section.reference, section.reference_count)
    others = None if section.others is None else folder_source(data_root / section.others, section.count)
    device = target.hardware.device if isinstance(target, Trained) else "cpu"
    extractors = find_extractors(section.features, section.weights, data_root, device)
    judge: Reference | None = None
    if section.needs_classifier:
        extractors["classifier"], judge = find_classifier(section, data_root)
    for entry in section.features:
        if "." in entry and entry.partition(".")[0] == "classifier":
            raise UserError(f"samples.features.{entry}: the classifier has one kind of features")
    asked = _Asked.of(section, reference, target, data_root)
    drawn = (
        drawn_source(target, section, asked) if isinstance(target, Trained) else folder_source(target, section.count)
    )
    for name, source, least in (("samples", drawn, LEAST), (section.reference, reference, LEAST)):
        if source.count < least:
            raise UserError(f"{name}: has {source.count} samples; expected {least} at least", code=3)
    if drawn.count < section.count:
        log.warning("evaluate: %s has %d samples, the suite asks for %d", drawn.name, drawn.count, section.count)
    shape = target.decoded_shape if isinstance(target, Trained) else _shape_of(drawn)
    for name, extractor in extractors.items():
        if extractor.takes == "clips" and len(shape) != 4:
            raise UserError(
                f"samples.features: {name} takes clips, and samples are {tuple(shape)}; name features of images"
            )
    if judge is not None and tuple(judge.heldout.samples.shape[1:]) != tuple(shape):
        raise UserError(
            f"samples: are {tuple(shape)}, but {section.reference} has {tuple(judge.heldout.samples.shape[1:])}, which the classifier "
            "takes; name a reference of their size",
            code=3,
        )
    colours, scenes = _colours(section, target), _scenes(section, target, data_root)
    measuring = _Measuring(section, reference, others, extractors, judge, data_root, resampling)
    return lambda: measuring(drawn, shape, asked, colours, scenes)


@dataclass(frozen=True)
class _Asked:
    """What is drawn: prompts, and the labels that belong to them where the reference says any."""

    prompts: list[str]
    labels: list[int] | None

    @classmethod
    def of(cls, section: SamplesSection, reference: Source, target: Target, data_root: Path) -> _Asked:
        if isinstance(target, Path):
            return cls([], None)
        if section.prompts == "none":
            return cls([""] * section.count, None)
        if section.prompts == "captions":
            if reference.captions is None:
                raise UserError(
                    f"samples.prompts: {reference.name} has no captions; name a file of prompts, or `none`", code=3
                )
            places = [place % reference.count for place in range(section.count)]
            labels = None if reference.labels is None else [reference.labels[place] for place in places]
            return cls([reference.captions[place] for place in places], labels)
        if section.prompts == "classes":
            if reference.labels is None:
                raise UserError(f"samples.prompts: {reference.name} has no labels, and so no classes", code=3)
            classes = sorted(set(reference.labels))
            labels = [classes[place % len(classes)] for place in range(section.count)]
            return cls([str(label) for label in labels], labels)
        lines = list(prompts_of(data_root / section.prompts))
        return cls([lines[place % len(lines)] for place in range(section.count)], None)


def drawn_source(trained: Trained, section: SamplesSection, asked: _Asked, seed: int = 0) -> Source:
    """What a run draws of prompts, in order; each sample depends on the suite's seed and its position.

    Raises:
        UserError: the run does not take such prompts, or cannot draw as asked.
    """
    wanted: dict[str, Word] = {"steps": "steps", "guidance": "guidance"}
    named = {f"samples.{key}": word for key, word in wanted.items() if getattr(section, key) is not None}
    refuse(trained.recipe, trained.draws, named)
    trained.require_decoder()
    guidance = trained.guidance(section.guidance)
    trained.check_steps(section.steps)
    told = trained.conditioned
    prompts, labels = asked.prompts, asked.labels
    if told.takes_label and not told.takes_both and labels is not None:
        prompts = [str(label) for label in labels]
    beside: Sequence[str | int] | None = labels if told.takes_both else None
    some = len(prompts) if told.takes_label else 1  # classes are many and cheap, texts cost an encoder
    trained.conditions(prompts[:some], None if beside is None else beside[:some])

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, len(prompts), AT_ONCE):
            places = range(begin, min(begin + AT_ONCE, len(prompts)))
            log.info("evaluate: drawing %d of %d", places[-1] + 1, len(prompts))
            rows = slice(places[0], places[-1] + 1)
            cond = trained.conditions(prompts[rows], None if beside is None else beside[rows])
            latents = trained.latents(
                cond, seed=section.seed + seed, steps=section.steps, guidance=guidance, positions=places
            )
            yield torch.tensor(places), trained.decoded(latents).cpu()

    digest = xxhash.xxh3_128_hexdigest(canonical_json([prompts, beside, section.seed + seed]))
    name = f"run {trained.run.path.name} at step {trained.step}"
    return Source(name, digest, len(prompts), read, asked.prompts, asked.labels)


def _shape_of(source: Source) -> tuple[int, ...]:
    return tuple(next(source.read())[1].shape[1:])


def _colours(section: SamplesSection, target: Target) -> Source | str | None:
    """Samples of prompts that name colours, the reason why there are none, or None where none are asked for."""
    if "colour" not in section.following:
        return None
    if isinstance(target, Path):
        return OTHER_PROMPTS
    if why := _no_texts(target):
        return why
    if unnamed := [prompt for prompt in section.colours if colour_said(prompt) is None]:
        raise UserError(
            f"samples.colours: {unnamed[0]!r} names no colour, or several; expected one of {', '.join(COLOURS)}"
        )
    prompts = [prompt for prompt in section.colours for _ in range(section.colours_each)]
    return drawn_source(target, section, _Asked(prompts, None), seed=1)


def _no_texts(trained: Trained) -> str | None:
    """The reason why a run cannot be asked for what other texts say."""
    return "the run takes no texts alone" if trained.conditioned.takes_label or not trained.conditioned.names else None


@dataclass(frozen=True)
class _Scenes:
    """Samples of prompts that ask for numbers or sides of things, and who finds these."""

    drawn: Source
    asked: list[Scene]
    detector: Detector

    def add(self, found: Findings, kind: str, resampling: Resampling) -> None:
        """Adds the share of samples that have what is asked for; by chance: the share that has what other prompts ask for."""
        seen = [boxes for _, samples in self.drawn.read() for boxes in self.detector.boxes(samples)]
        own = [float(one.follows(boxes)) for one, boxes in zip(self.asked, seen, strict=True)]
        others = [
            float(other.follows(boxes))
            for one, boxes in zip(self.asked, seen, strict=True)
            for other in {*self.asked} - {one}
        ]
        chance = sum(others) / len(others) if others else None
        figure_of_rows(found, f"following/{kind}", torch.tensor(own), resampling, ceiling=chance)
        found.features["detector"] = {"name": self.detector.folder.name, "fingerprint": self.detector.fingerprint}


def _scenes(section: SamplesSection, target: Target, data_root: Path) -> dict[str, _Scenes | str]:
    """By kind, samples of prompts that ask for numbers or sides of things, or the reason why there are none.

    Raises:
        UserError: no such detector; a prompt that asks for no such thing, or for things that it does not know.
    """
    kinds = [kind for kind in SCENES if kind in section.following]
    if not kinds:
        return {}
    if isinstance(target, Path):
        return dict.fromkeys(kinds, OTHER_PROMPTS)
    if why := _no_texts(target):
        return dict.fromkeys(kinds, why)
    if len(target.decoded_shape) != 3:
        raise UserError("samples.scenes: detectors look at pictures, and the run draws clips; leave them out")
    detector = find_detector(section.detector, data_root, target.hardware.device)
    scenes = {prompt: scene_said(prompt, detector.names) for prompt in section.scenes}
    found: dict[str, _Scenes | str] = {}
    for kind in kinds:
        own = [prompt for prompt, scene in scenes.items() if scene is not None and scene.kind == kind]
        found[kind] = "no prompt among `scenes` asks for it"
        if own:
            prompts = [prompt for prompt in own for _ in range(section.scenes_each)]
            drawn = drawn_source(target, section, _Asked(prompts, None), seed=2 + SCENES.index(kind))
            found[kind] = _Scenes(drawn, [scene for prompt in prompts if (scene := scenes[prompt])], detector)
    if unknown := [prompt for prompt, scene in scenes.items() if scene is None]:
        raise UserError(
            f"samples.scenes: {unknown[0]!r} asks for no number or side of things that {detector.folder} knows; expected `three THINGS` or "
            f"`a THING left of a THING` of {', '.join(detector.names[:5])}, ..."
        )
    return found


@dataclass(frozen=True)
class _Measuring:
    """Measures what was drawn, with what was found for it."""

    section: SamplesSection
    reference: Source
    others: Source | None
    extractors: Mapping[str, Extractor]
    judge: Reference | None
    data_root: Path
    resampling: Resampling

    def __call__(
        self,
        drawn: Source,
        shape: Sequence[int],
        asked: _Asked,
        colours: Source | str | None,
        scenes: Mapping[str, _Scenes | str],
    ) -> Findings:
        found = Findings(
            prompts=None
            if drawn.captions is None
            else xxhash.xxh3_128_hexdigest(canonical_json(sorted(drawn.captions)))
        )
        found.paired = drawn.fingerprint if asked.prompts else None
        pictures: list[Tensor] = []
        seen_of = seen(_watched(drawn, pictures), self.extractors)
        found.pictures = pictures
        real = seen_once(self.reference, self.extractors, self.data_root)
        noise = seen_once(noise_source(shape, drawn.count, self.section.seed), self.extractors, self.data_root)
        found.references[self.section.reference] = self.reference.described
        if self.others is not None:
            found.references[str(self.section.others)] = self.others.described
        self._sets(found, seen_of, real, noise)
        if "group" in self.section.following:
            self._group(found, drawn, seen_of[FOUND], real[FOUND], noise[FOUND])
        if isinstance(colours, str):
            found.left_out[COLOUR] = colours
        elif colours is not None:
            self._colour(found, colours)
        for kind, one in scenes.items():
            if isinstance(one, str):
                found.left_out[f"following/{kind}"] = one
            else:
                one.add(found, kind, self.resampling)
        found.features |= {
            name: {"name": one.name, "fingerprint": one.fingerprint} for name, one in self.extractors.items()
        }
        return found

    def _sets(
        self, found: Findings, drawn: Mapping[str, Tensor], real: Mapping[str, Tensor], noise: Mapping[str, Tensor]
    ) -> None:
        if self.others is not None:
            of_others = seen_once(self.others, self.extractors, self.data_root)
            floors = {key: (value, real[key]) for key, value in of_others.items()}
        else:
            halves = [seen_once(half, self.extractors, self.data_root) for half in halves_of(self.reference)]
            floors = {key: (value, halves[1][key]) for key, value in halves[0].items()}
        for entry, names in self.section.features.items():
            key, measure = key_of(entry, self.extractors), measure_of(names)
            figures_of_set(
                found,
                entry,
                measure,
                drawn[key],
                real[key],
                self.resampling,
                floor=floors[key],
                ceiling=(noise[key], real[key]),
            )

    def _group(self, found: Findings, drawn: Source, answers: Tensor, real: Tensor, noise: Tensor) -> None:
        """Whether the classifier finds the group of what was asked for."""
        assert self.judge is not None
        assert self.reference.labels is not None
        labels = drawn.labels
        if labels is None and drawn.captions is not None and self.reference.captions is not None:
            by_caption = dict(zip(self.reference.captions, self.reference.labels, strict=True))
            labels = [by_caption.get(caption, -1) for caption in drawn.captions]
        if labels is None or not any(label in self.judge.numbers for label in labels):
            found.left_out[GROUP] = "nothing says of which groups of the reference the samples should be"
            return
        floor = float(_rightly(real, self.reference.labels, self.judge.numbers).nanmean())
        figure_of_rows(
            found, GROUP, _rightly(answers, labels, self.judge.numbers), self.resampling, floor=floor,
            ceiling=float(_rightly(noise, labels, self.judge.numbers).nanmean()),
        )  # fmt: skip
        if floor < self.section.least_real_accuracy:
            found.warnings.append(
                f"the classifier finds the group of only {floor:.2f} of real held-out samples, below "
                f"{self.section.least_real_accuracy:.2f}: {GROUP} says little"
            )

    def _colour(self, found: Findings, colours: Source) -> None:
        eye = {"colours": COLOURS_EYE}
        prompts = list(colours.captions or ())
        shares = seen(colours, eye)[SHARES]
        floor = None
        if self.others is not None:
            whole = folder_source(self.data_root / str(self.section.others))
            real = colour_follows(seen_once(whole, eye, self.data_root)[SHARES], list(whole.captions or ()))
            floor = float(real.nanmean()) if bool(real.isfinite().any()) else None
        said = [COLOURS.index(str(colour_said(prompt))) for prompt in prompts]
        by_chance = [
            float(shares[row, other] >= LEAST_SHARE) for row in range(len(said)) for other in said if other != said[row]
        ]
        chance = sum(by_chance) / len(by_chance) if by_chance else None
        figure_of_rows(found, COLOUR, colour_follows(shares, prompts), self.resampling, floor=floor, ceiling=chance)


def _rightly(answers: Tensor, labels: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """1 where the likeliest group (N, G) is the label's, else 0; nan for a label that is no group."""
    wanted = torch.tensor([numbers.index(label) if label in numbers else -1 for label in labels])
    return torch.where(wanted < 0, torch.nan, (answers.argmax(1) == wanted).float())


SHOWN = 64
"""Samples that are shown with the result, at most."""


def _watched(source: Source, pictures: list[Tensor]) -> Source:
    """The source, of which the first samples are put into a list as they come by."""

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for places, samples in source.read():
            pictures.extend(samples[: max(0, SHOWN - len(pictures))])
            yield places, samples

    return Source(source.name, source.fingerprint, source.count, read, source.captions, source.labels)
