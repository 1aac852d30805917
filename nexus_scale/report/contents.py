"""What a run's page shows, read from its folder: once for the report, and again and again, as far as files change, for the board."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from nexus_scale.callbacks.goodput import FOLDER as GOODPUT
from nexus_scale.callbacks.goodput import Account, account
from nexus_scale.config.plain_yaml import parse_yaml
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.io.plain_json import is_number, read_json_or
from nexus_scale.io.stages import STAGES, Doing, Stage, doing, read_stages
from nexus_scale.report.curves import newest
from nexus_scale.report.evaluations import FOLDER as EVALUATIONS
from nexus_scale.report.evaluations import Evaluated, read_evaluations
from nexus_scale.report.history import LONGEST_READ, History

log = logging.getLogger(__name__)

T = TypeVar("T")

SCORES = ("scores.json", "following.json", "likelihood.json")
"""Files in which `nexus score` leaves what it measured."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn after a step: `words` describe it (`step`, `captions`, the tiles of the picture); a picture of `size`, or sounds."""

    words: dict[str, Any]
    picture: Path | None
    size: tuple[int, int]
    sounds: list[tuple[str, Path]]

    @property
    def step(self) -> int:
        return int(self.words["step"])


@dataclass(frozen=True)
class Contents:
    """The contents of a run folder that its page shows; missing parts are empty.

    Attributes:
        inside: seconds of training, by part.
        scores, more_scores: of scores.json, and of the other files of scores.
        doing: what the run does besides training.
        evaluated: what the callback evaluate measured; `nearest`: its pictures of samples beside their nearest training samples.
    """

    name: str
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    monitor: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    inside: dict[str, float]
    recipe: dict[str, Any]
    cluster: dict[str, Any]
    environment: dict[str, Any]
    scores: dict[str, Any]
    more_scores: list[dict[str, Any]]
    evaluations: list[Evaluated]
    stages: list[Stage]
    doing: Doing | None
    drawn: list[Drawn]
    nearest: list[Drawn]
    texts: dict[str, str]
    account: Account | None = None
    incidents: Sequence[Mapping[str, Any]] = ()

    @property
    def pictures(self) -> list[Drawn]:
        return [one for one in self.drawn if one.picture is not None]

    @property
    def sounds(self) -> list[tuple[str, Path]]:
        """The newest sounds, with their captions."""
        return self.drawn[-1].sounds if self.drawn else []


class Confusion(BaseModel):
    """The confusion in scores.json: `matrix[prompted][found as]`, counts."""

    labels: list[str]
    matrix: list[list[Annotated[int, Field(ge=0, lt=2**53)]]]


_Pixels = Annotated[int, Field(ge=0, lt=2**24)]


class Described(BaseModel):
    """`samples/step_<n>.json`: what the picture or sounds of the same name show."""

    step: Annotated[int, Field(ge=0, lt=2**53)]
    captions: list[str]
    audio: list[str] | None = None
    columns: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    width: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    height: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    pad: _Pixels | None = None


class Reader:
    """Reads a run's folder; a second `read` looks only at what has changed since.

    Args:
        longest: bytes of curves that one `read` takes in whole, see `History`.
    """

    def __init__(self, run: RunFolder, longest: int = LONGEST_READ):
        self.run = run
        files = (run.metrics.name, "validation.jsonl", "monitor.jsonl", "evaluation.jsonl")
        self.metrics, self.validation, self.monitor, self.evaluated = (
            History(run.path / name, longest) for name in files
        )
        self._kept: dict[str, tuple[object, Any]] = {}

    def read(self) -> Contents:
        """The contents of the folder. Raises UserError if it does not exist."""
        run = self.run
        if not run.path.is_dir():
            raise UserError(f"{run.path}: not a run folder; expected runs/<name>", code=5)
        files = (run.recipe, run.cluster)
        texts = {path.name: self._once(path, _text) for path in files if path.is_file()}
        metrics = self.metrics.read()
        scores, *more = [
            self._once(run.path / name, lambda path: _scores(read_json_or(path, dict[str, Any], {}))) for name in SCORES
        ]
        return Contents(
            name=run.path.name,
            metrics=metrics.rows,
            validation=self.validation.read().rows,
            monitor=self.monitor.read().rows,
            evaluated=self.evaluated.read().rows,
            inside=metrics.sums("time/"),
            recipe=self._once(run.recipe, lambda path: _yaml(path, texts), "yaml"),
            cluster=self._once(run.cluster, lambda path: _yaml(path, texts), "yaml"),
            environment=self._once(
                run.environment,
                lambda path: _mappings(read_json_or(path, dict[str, Any], {}), "versions", "kernels", "choices"),
            ),
            scores=scores,
            more_scores=more,
            evaluations=self._once(run.path / EVALUATIONS, read_evaluations),
            stages=self._once(run.path / STAGES, lambda path: read_stages(path.parent)),
            doing=doing(run.path),
            drawn=self._once(run.samples, _drawn),
            nearest=self._once(run.samples, partial(_drawn, named="nearest"), "nearest"),
            texts=texts,
            account=self._once(run.path / GOODPUT, lambda _: account(run)),
            incidents=self._once(run.path / incidents.FILE, lambda path: incidents.read(path.parent)),
        )

    def _once(self, path: Path, read: Callable[[Path], T], what: str = "") -> T:
        """What `read` makes of a file or a folder's names, kept until it changes."""
        key, mark = f"{path.name} {what}", mark_of(path)
        if key not in self._kept or self._kept[key][0] != mark or mark is None:
            self._kept[key] = (mark, read(path))
        found: T = self._kept[key][1]
        return found


def mark_of(path: Path) -> tuple[int, ...] | None:
    """Differs whenever a file, or the names in a folder, have changed; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def read_contents(run: RunFolder) -> Contents:
    """The contents of a run folder. Raises UserError if it does not exist."""
    return Reader(run).read()


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _drawn(samples: Path, named: str = "step") -> list[Drawn]:
    found = []
    for path in sorted(samples.glob(f"{named}_*.json")):
        said: Described | None = read_json_or(path, Described, None)
        if said is None:
            continue
        words = said.model_dump(exclude_none=True)
        sounding = (
            (caption, samples / (Path(file).name or "none"))
            for caption, file in zip(said.captions, said.audio or [], strict=False)
        )
        sounds = [(caption, file) for caption, file in sounding if file.is_file()]
        size = _size_of(image := path.with_suffix(".png"))
        if size or sounds:
            found.append(Drawn(words, image if size else None, size or (0, 0), sounds))
    return found


def _size_of(picture: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None if it is missing or cannot be shown."""
    from PIL import Image, UnidentifiedImageError

    if not picture.is_file():
        return None
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        log.warning("%s: left out of the report: %s", picture, error)
        return None


def _mappings(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The values without those of these names that are not mappings."""
    return {key: value for key, value in values.items() if key not in names or isinstance(value, Mapping)}


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that can be shown: numbers, text, groups and confusion."""
    shares = ("group_accuracy", "real_accuracy", "wer", "similarity")
    kept = {
        key: value
        for key, value in scores.items()
        if is_number(value) or (isinstance(value, str | bool) and key not in shares)
    }
    groups, confusion = scores.get("groups"), scores.get("confusion")
    if isinstance(groups, dict):
        kept["groups"] = {str(name): value for name, value in groups.items() if is_number(value)}
    try:
        table = Confusion.model_validate(confusion)
        if len(table.labels) == len(table.matrix):
            kept["confusion"] = table.model_dump()
    except ValidationError:
        log.debug("scores.json has no confusion that can be drawn")
    return kept


def _yaml(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    if path.name not in texts:
        return {}
    try:
        found = parse_yaml(texts[path.name], str(path))
    except UserError as error:
        log.warning("%s", error)
        return {}
    return _mappings(found, "networks") if isinstance(found, dict) else {}


def results_of(contents: Contents, given: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run. Missing ones are null, so that every run has the same names."""
    last = contents.metrics[-1] if contents.metrics else {}
    validation = contents.validation[-1] if contents.validation else {}
    spent: list[dict[str, Any]] = [{"name": stage.name, "seconds": stage.seconds} for stage in contents.stages]
    memory = [row["memory_peak_bytes"] for row in contents.metrics if row.get("memory_peak_bytes")]
    results: dict[str, Any] = {
        "run": contents.name,
        "steps": last.get("step"),
        "workers": contents.environment.get("workers", contents.cluster.get("workers")),
        "loss": newest(contents.metrics, "loss"),
        "validation_loss": validation.get("loss"),
        "validation_loss_ratio": validation.get("ratio"),
        "frechet": newest(contents.monitor, "frechet"),
        "diversity": newest(contents.monitor, "diversity"),
        "group_accuracy": contents.scores.get("group_accuracy"),
        "real_accuracy": contents.scores.get("real_accuracy"),
        "wer": contents.scores.get("wer"),
        "similarity": contents.scores.get("similarity"),
        "samples_per_s": newest(contents.metrics, "samples_per_s"),
        "wall_seconds": sum(stage.seconds for stage in contents.stages) if spent else last.get("seconds"),
        "peak_memory_bytes": int(max(memory)) if memory else None,
        "stages": spent,
        **goodput_of(contents),
    }
    return {**results, **given}


def goodput_of(contents: Contents) -> dict[str, Any]:
    """Effective training time, seconds of everything else, and incidents by kind."""
    kept = contents.account
    kinds = [str(row["kind"]) for row in contents.incidents]
    return {
        "effective_training_time": None if kept is None else kept.effective,
        "time": None if kept is None else {name: round(seconds, 3) for name, seconds in kept.parts.items()},
        "attempts": None if kept is None else kept.attempts,
        "incidents": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }
