"""Files of samples from prompts: `nexus sample`."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from nexus_scale.config.kinds import is_number
from nexus_scale.config.recipe import Component, Recipe
from nexus_scale.contracts import OF_LATENTS, Cond, Generated, Guidance, Latent, Request, UserError, Word
from nexus_scale.engine.hardware import Hardware
from nexus_scale.generate.begun import begun_of
from nexus_scale.generate.drawing import check_sampling, refuse, request_of, sampler_named
from nexus_scale.generate.given import Kept, PictureFiles, pictures_of
from nexus_scale.generate.latents import Latents, latents_of
from nexus_scale.generate.trained import Trained
from nexus_scale.generate.voices import check_edit, told_to_speak
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_text import clean_text
from nexus_scale.io.ticker import paced
from nexus_scale.media import check_format
from nexus_scale.media.grid import make_grid
from nexus_scale.train import Place

log = logging.getLogger(__name__)

LONGEST_PROMPT = 50_000
"""Characters; far more than any text encoder reads."""

MOST_SAMPLES = 100_000
SHOWN = 100
"""Samples in a grid, at most."""

AT_ONCE = {"denoise": 64, "logits": 16, "masks": 16, "": 64}
"""Samples drawn together at most, by what the sampler walks with."""

RECORD = "prompts"
"""Text that grid.png carries, as pictures of other programs do: what was asked for, and the files that were written, in JSON."""

GRID = "grid.png"
_FILE = re.compile(r"\d{3,}_[a-z0-9-]+(_\d{2,})?\.(png|webp|mp4|wav|flac)")


# ------------------------------------------------------------------------------------------------- prompts


def check_prompts(prompts: Sequence[str], option: str = "--prompt") -> None:
    """Raises a UserError that names a prompt which is empty, too long, or has characters that no text has."""
    for prompt in prompts:
        if len(prompt) > LONGEST_PROMPT:
            raise UserError(
                f"{option} {shown(prompt)}: has {len(prompt):,} characters; expected at most {LONGEST_PROMPT:,}"
            )
        odd = sorted({c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t"})
        if odd:
            raise UserError(
                f"{option} {shown(prompt)}: has characters that are no text, {odd[:4]}; remove them (is it UTF-8?)"
            )
        if not clean_text(prompt):
            raise UserError(f"{option} {shown(prompt)}: is empty; give words, or leave it out")


def shown(text: str, longest: int = 80) -> str:
    """A text quoted for a message: escaped, and cut where it is long."""
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def slug(text: str) -> str:
    """A file name from a prompt: letters, digits and dashes alone, never a path."""
    return re.sub(r"[^a-z0-9]+", "-", text[:400].lower()).strip("-")[:60].strip("-") or "prompt"


# ------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Wishes:
    """The options of drawing beside prompts; None is the recipe's own, or nothing.

    `guidance`: classifier-free guidance, a scale or settings that change the recipe's ({scale: 2, interval: [0.2, 0.8]}); of a
    network that was distilled to obey a scale, that scale. `true_guidance`: classifier-free guidance of such a network, at twice
    the cost. `negative_prompt`: what is guided away from, in the place of no prompt; an empty one is the empty text as the encoders
    read it. `label`: of a network that is told a class beside the text, classes by name or number, one for each prompt or one for
    all. `sampler`: another than the recipe's, `name:key=value,...`. `size`: HEIGHTxWIDTH in pixels.
    `original_size` and `crop`: of a network that is told them (SDXL), the size of the image that the sample is to be a part of,
    HEIGHTxWIDTH, and where it begins in that image once scaled to cover the sample, TOPxLEFT; unless given, the sample is the whole
    image. `length`: frames of a clip, or seconds of sound at most. `per_prompt`: samples of each prompt. `voice` and `voice_text`: of
    speech, a recording whose voice is taken, and what is said in it; `speaker`: instead of them, the label of a held-out speaker.
    `prosody` (with `prosody_text`) and `timbre`: another recording or held-out speaker, whose manner or whose timbre is taken instead.
    `edit`, `edit_text` and `span`: a recording that is spoken anew in part, what is said in it, and the part; see `generate.voices`.
    `begin`: a sound or a clip that samples go on from; `melody`: one whose melody they follow. `image`: a picture that is noised by
    `strength` and drawn anew, with `mask` where that is white, with `grow` around it; of
    clips, their first frame; of a run that translates, what it translates, with `reverse` back. `control`: pictures that samples follow,
    see `generate.controls`. `weights`: an average, or a network. `format`: of the files. `interpolate`, `walk`, `mix`, `traverse`: ways
    through the latents of the `per_prompt` draws of each prompt, and `truncate`, psi; see `generate.latents`.
    """

    steps: int | None = None
    sampler: str | None = None
    guidance: float | Mapping[str, Any] | None = None
    true_guidance: float | None = None
    negative_prompt: str | None = None
    label: Sequence[str] | None = None
    size: str | None = None
    original_size: str | None = None
    crop: str | None = None
    length: float | None = None
    per_prompt: int = 1
    seed: int = 0
    voice: Path | None = None
    voice_text: str | None = None
    speaker: str | None = None
    prosody: str | None = None
    prosody_text: str | None = None
    timbre: str | None = None
    edit: Path | None = None
    edit_text: str | None = None
    span: str | None = None
    begin: Path | None = None
    melody: Path | None = None
    image: Path | None = None
    reverse: bool | None = None
    mask: Path | None = None
    grow: str | None = None
    control: Sequence[str] | None = None
    strength: float | None = None
    interpolate: int | None = None
    walk: float | None = None
    mix: float | None = None
    traverse: int | None = None
    truncate: float | None = None
    weights: str | None = None
    format: str | None = None

    def check(self) -> None:
        """Raises a UserError for what no family takes."""
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed {self.seed}: expected 0 to 2^63 - 1")
        if self.per_prompt < 1:
            raise UserError(f"--per-prompt {self.per_prompt}: expected at least 1")
        if self.length is not None and not 0 < self.length < float("inf"):
            raise UserError(f"--length {self.length}: expected frames of a clip, or seconds of sound, above 0")
        if self.steps is not None and self.sampler is not None and re.search(r"[:,]\s*steps\s*=", self.sampler):
            raise UserError(
                f"--steps {self.steps} and --sampler {shown(self.sampler)}: both say how many steps; give one"
            )
        if self.negative_prompt:
            check_prompts([self.negative_prompt], "--negative")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(
                f"--strength {self.strength:g}: expected above 0, which leaves the picture, to 1, which leaves none of it"
            )
        for option in ("mask", "grow", "strength", "reverse"):
            given = self.image or (self.begin if option == "mask" else None)
            if getattr(self, option) is not None and given is None:
                raise UserError(f"--{option}: is of a picture that is drawn anew; give --image FILE, too")
        if self.voice_text is not None and self.voice is None:
            raise UserError("--voice-text: says what is said in --voice; give both")
        if self.voice is not None and self.speaker is not None:
            raise UserError("--voice and --speaker: both name a voice; give one")
        check_edit(self)
        self.latents(None)

    def words(self) -> dict[str, Word]:
        """The options that were given, and what each asks for."""
        return {option: word for name, (option, word) in OPTIONS.items() if getattr(self, name) is not None}

    def latents(self, latent: Latent | None) -> Latents | None:
        """What is asked of the latents of a family that has such a one."""
        asked = {name: getattr(self, name) for name in OF_LATENTS}
        return latents_of(latent, self.per_prompt, **asked)


OPTIONS: Mapping[str, tuple[str, Word]] = {
    "steps": ("--steps", "steps"),
    "sampler": ("--sampler", "sampler"),
    "guidance": ("--guidance", "guidance"),
    "true_guidance": ("--true-guidance", "true_guidance"),
    "negative_prompt": ("--negative", "negative"),
    "label": ("--label", "label"),
    "size": ("--size", "size"),
    "original_size": ("--original-size", "sizes"),
    "crop": ("--crop", "sizes"),
    "length": ("--length", "length"),
    "image": ("--image", "image"),
    "reverse": ("--reverse", "reverse"),
    "mask": ("--mask", "mask"),
    "grow": ("--grow", "mask"),
    "control": ("--control", "control"),
    "strength": ("--strength", "strength"),
    "voice": ("--voice", "voice"),
    "voice_text": ("--voice-text", "voice"),
    "speaker": ("--speaker", "voice"),
    "prosody": ("--prosody", "prosody"),
    "prosody_text": ("--prosody-text", "prosody"),
    "timbre": ("--timbre", "timbre"),
    "edit": ("--edit", "edit"),
    "edit_text": ("--edit-text", "edit"),
    "span": ("--span", "edit"),
    "begin": ("--begin", "begin"),
    "melody": ("--melody", "melody"),
    "interpolate": ("--interpolate", "interpolate"),
    "walk": ("--walk", "walk"),
    "mix": ("--mix", "mix"),
    "traverse": ("--traverse", "traverse"),
    "truncate": ("--truncate", "truncate"),
}
"""Options that not every family takes, each with its word in `Draws.takes`."""


class Sample(NamedTuple):
    """One sample, ready to write: `kind` and contents of its file, and a picture (H, W, 3) uint8 for the grid."""

    kind: str
    data: bytes
    picture: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A checked call: conditions, one row for each different prompt, the row of each sample, and what is asked of their latents."""

    cond: Cond
    rows: Sequence[int]
    request: Request
    voice: Tensor | None = None
    latents: Latents | None = None
    kept: Kept | None = None


def draw_prompts(
    place: Place,
    prompts: Sequence[str],
    *,
    output: Path | None = None,
    hardware: Hardware | None = None,
    **wishes: Any,
) -> Path:
    """Writes one file a sample: an image, a clip or a sound; and `grid.png`, of clips strips of frames, of sounds their spectrograms. What
    an earlier call wrote into the folder is replaced.

    Args:
        hardware: what computes; None: the run's own, see `Trained`.
        wishes: see `Wishes`.
    Returns:
        The folder.
    Raises:
        UserError: no prompt, or one that cannot be drawn; a wish that the run's family cannot take, named.
    """
    wanted = Wishes(**wishes)
    wanted.check()
    check_prompts(prompts)
    prompts = [clean_text(prompt) for prompt in prompts]  # as captions are
    if len(prompts) * wanted.per_prompt > MOST_SAMPLES:
        raise UserError(
            f"{len(prompts):,} prompts with {wanted.per_prompt:,} samples each: expected at most {MOST_SAMPLES:,} samples together"
        )
    trained = Trained(place.run, place, wanted.weights, hardware)
    check_family(trained, prompts, wanted)
    pictures = pictures_of(wanted.image) if wanted.image is not None and trained.draws.translates else []
    prompts = [path.stem for path in pictures] or prompts
    plan = translation_of(trained, pictures, wanted) if pictures else plan_of(trained, prompts or [""], wanted)
    format = check_format(trained.medium, wanted.format)  # what cannot be shown is said before minutes of drawing
    each = len(plan.rows) // len(prompts or [""])
    prompts = [prompt for prompt in prompts or [""] for _ in range(each)]
    own = place.run.samples / "prompts"
    columns = None if plan.latents is None else plan.latents.way.columns
    files = Files(output or own, output is None, prompts, each, columns)
    return _write(files, _drawn(trained, plan, wanted, format), wanted, trained.step)


def check_family(trained: Trained, prompts: Sequence[str], wanted: Wishes) -> None:
    """Raises a UserError where the family draws nothing by itself, needs prompts or takes none, or does not take an option."""
    draws, name = trained.draws, trained.recipe.name
    if draws.translates and wanted.image is None:
        raise UserError(f"recipe {name} translates pictures: give --image FILE, or a folder of them")
    if draws.given and not draws.takes & {"voice", "image"}:
        raise UserError(f"recipe {name} draws nothing: it shows what it makes of data, in {trained.run.samples}")
    if draws.conditions and not prompts:
        raise UserError("expected at least one prompt; give --prompt TEXT or --prompts FILE")
    if not draws.conditions and prompts:
        raise UserError(
            f"--prompt: recipe {name} has no conditions and takes no prompts; leave it out"
            + ("" if draws.translates else ", and give --count N")
        )
    if wanted.guidance is not None and not isinstance(wanted.guidance, Mapping) and not is_number(wanted.guidance):
        raise UserError(f"--guidance: got {wanted.guidance}; expected a finite number, such as 4.0; 1 is none")
    refuse(trained.recipe, draws, wanted.words())


def plan_of(trained: Trained, prompts: Sequence[str], wanted: Wishes) -> Plan:
    """Checks everything that was asked for, so that no mistake is found only while drawing."""
    draws = trained.draws
    named = None if wanted.sampler is None else sampler_named(wanted.sampler, recipe=trained.recipe)
    labels = _labels(wanted, len(prompts))
    pairs = [(prompt, labels[i] if labels else None) for i, prompt in enumerate(prompts)]
    different = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
    latents = wanted.latents(draws.latent)
    each = wanted.per_prompt if latents is None else latents.way.each
    if len(pairs) * each > MOST_SAMPLES:
        raise UserError(
            f"{len(pairs):,} prompts with {each:,} samples each on the way: expected at most {MOST_SAMPLES:,}"
        )
    rows = [different[pair] for pair in pairs for _ in range(each)]
    texts = [text for text, _ in different]
    if "voice" in draws.takes:
        told = told_to_speak(trained, wanted, texts)
        trained.check_steps(wanted.steps, named)
        guidance, recipe = trained.guidance(wanted.guidance), _of_length(trained, wanted, named)
        asked = request_of(recipe, trained.objective, steps=wanted.steps, guidance=guidance)
        return Plan(told.cond, rows, replace(asked, given=told.given), told.before)
    cond = trained.conditions(texts, [str(label) for _, label in different] if labels else None)
    cond = {**cond, **_sizes(trained, wanted, len(different))}
    if not draws.walks:
        return Plan(cond, rows, Request(shape=trained.shape), latents=latents)
    guidance = trained.guidance(wanted.guidance, wanted.true_guidance)
    trained.check_steps(wanted.steps, named)
    negative = _negative(trained, guidance, wanted, cond)
    if draws.embeds_guidance and guidance.is_double:
        log.info("true guidance %g: two forwards a step, twice the time", guidance.scale)
    _ = trained.medium
    recipe, tokens = trained.recipe, draws.walks != "denoise"
    if draws.walks == "logits":
        recipe, named = _of_length(trained, wanted, named), None
    asked = request_of(recipe, trained.objective, steps=wanted.steps, guidance=guidance, sampler=named)
    shape = trained.shape if tokens else shape_wanted(trained, wanted)
    begun = begun_of(trained, shape, wanted)
    of_each = partial(_of_each, count=len(different))
    if negative is not None:
        negative = {**negative, **of_each(begun.cond)}
    asked = replace(asked, shape=shape, negative=negative, given=of_each(begun.given), strength=begun.strength)
    return Plan({**cond, **of_each(begun.cond)}, rows, asked, latents=latents, kept=begun.kept)


def translation_of(trained: Trained, pictures: Sequence[Path], wanted: Wishes) -> Plan:
    """Pictures that are translated, each `per_prompt` times; with `reverse` the other way."""
    draws = trained.draws
    field = draws.makes if wanted.reverse else draws.given[0]
    given: Mapping[str, Any] = {field: PictureFiles(pictures, trained.shape)}
    rows = [row for row in range(len(pictures)) for _ in range(wanted.per_prompt)]
    return Plan({}, rows, Request(shape=trained.shape, given=given))


def _of_each(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Tensors of one sample (1, ...), for `count`."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in values.items()}


def _sizes(trained: Trained, wanted: Wishes, count: int) -> dict[str, Tensor]:
    """What was asked for of the network's sizes, (count, 2) each."""
    asked = {"original_size": ("--original-size", wanted.original_size), "crop_top_left": ("--crop", wanted.crop)}
    given = {}
    for name, (option, text) in asked.items():
        if text is None:
            continue
        if name not in trained.draws.conditions:
            raise UserError(f"{option}: the network of recipe {trained.recipe.name} is not told {name}; leave it out")
        pair = _size(text, option)
        if name == "original_size" and 0 in pair:
            raise UserError(f"{option} {text}: expected at least 1x1")
        given[name] = torch.tensor(pair).expand(count, 2)
    return given


def _labels(wanted: Wishes, prompts: int) -> list[str]:
    """A class for each prompt; empty without --label."""
    labels = list(wanted.label or [])
    if len(labels) not in (0, 1, prompts):
        raise UserError(f"--label: got {len(labels)} for {prompts} prompts; give one for all, or one for each")
    return labels * prompts if len(labels) == 1 else labels


def _negative(trained: Trained, guidance: Guidance, wanted: Wishes, cond: Cond) -> dict[str, Tensor] | None:
    """Conditions to guide away from, one row for each different prompt; None: the unconditional ones."""
    if wanted.negative_prompt is None:
        return None
    if not guidance.is_double:
        cure = "--true-guidance 4, which costs two forwards a step" if trained.draws.embeds_guidance else "--guidance 4"
        raise UserError(f"--negative: has no effect at guidance {guidance.scale:g}; give {cure}, or leave it out")
    if guidance.by:
        raise UserError(
            f"--negative: guidance is by {guidance.by!r}, which is told the same as what it guides; leave one of them out"
        )
    return trained.conditioned.negative(clean_text(wanted.negative_prompt), cond)


def shape_wanted(trained: Trained, wanted: Wishes) -> tuple[int, ...]:
    """The shape of one sample in model space."""
    if wanted.size is None and wanted.length is None:
        if len(trained.sizes) > 1:
            log.info(
                "drawn in the size that most of the data have, latents %s; --size HEIGHTxWIDTH asks for another",
                trained.shape,
            )
        return trained.shape
    if wanted.length is not None and wanted.length != int(wanted.length):
        raise UserError(f"--length {wanted.length:g}: expected a whole number of frames")
    frames = None if wanted.length is None else int(wanted.length)
    if wanted.size is None:
        return trained.shape_of(frames=frames)
    height, width = _size(wanted.size)
    return trained.shape_of(height, width, frames)


def _of_length(trained: Trained, wanted: Wishes, named: Component | None) -> Recipe:
    """The recipe with the sampler that was named, cut to --length seconds."""
    section = named or trained.recipe.sample
    if section is None or (named is None and wanted.length is None):
        return trained.recipe
    arguments = dict(section.arguments)
    if wanted.length is not None:
        codec = trained.speaking.codec
        arguments["max_tokens"] = max(1, round(wanted.length * codec.sample_rate_hz / codec.hop))
        arguments["min_tokens"] = min(int(arguments.get("min_tokens", 1)), arguments["max_tokens"])
    recipe = trained.recipe.model_copy(update={"sample": Component.model_validate({"name": section.name, **arguments})})
    check_sampling(recipe, trained.objective)
    return recipe


def _drawn(trained: Trained, plan: Plan, wanted: Wishes, format: str) -> Iterator[Sample]:
    """Samples, drawn as they are iterated over."""
    medium, count = trained.medium, len(plan.rows)
    progress = Progress(count)
    for begin in range(0, count, at_once := AT_ONCE[trained.draws.walks]):
        positions = range(begin, min(begin + at_once, count))
        rows = plan.rows[positions.start : positions.stop]
        _, shown = draw_rows(trained, plan, rows, positions, wanted.seed, progress.of(positions))
        for one in shown if plan.kept is None else map(plan.kept.around, shown):
            yield Sample(format, medium.file(one, format), medium.picture(one))


def draw_rows(
    trained: Trained,
    plan: Plan,
    rows: Sequence[int],
    positions: Sequence[int],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Generated, list[Tensor]]:
    """One sample for each of the plan's rows that are named, in model space, and as it is seen or heard.

    Args:
        rows: of the plan's conditions, one a sample.
        positions: of the samples: with the seed, what their noise follows from.
        progress: told (steps done, steps).
    """
    chosen, asked = torch.tensor(rows), plan.request
    request = replace(
        asked,
        given=_taken(asked.given, chosen),
        negative=None if asked.negative is None else _taken(asked.negative, chosen),
        progress=progress or asked.progress,
    )
    made = trained.generate(_taken(plan.cond, chosen), request, seed=seed, positions=positions, latents=plan.latents)
    return made, trained.shown(made, None if plan.voice is None else [plan.voice] * len(rows))


def _taken(values: Cond, rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


class Progress:
    """Says every few seconds how far drawing is: `samples 1 to 64 of 200: step 10 of 25`."""

    def __init__(self, count: int):
        self.count, self.say = count, paced(log.info)

    def of(self, positions: range) -> Callable[[int, int], None]:
        """The callback of the samples at these positions."""

        one = len(positions) == 1
        which = f"sample {positions.stop}" if one else f"samples {positions.start + 1} to {positions.stop}"

        def tell(done: int, steps: int) -> None:
            self.say(f"{which} of {self.count}: step {done} of {steps}")

        return tell


def _size(text: str, option: str = "--size") -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if match is None:
        how = "TOPxLEFT in pixels, such as 0x256" if option == "--crop" else "HEIGHTxWIDTH in pixels, such as 512x768"
        raise UserError(f"{option} {shown(text)}: expected {how}")
    return int(match[1]), int(match[2])


# ------------------------------------------------------------------------------------------------- files


class Files(NamedTuple):
    """Where samples go: the folder, whether it is the run's own, the prompt of each sample, how many each prompt has, and how many stand
    beside each other in the grid."""

    folder: Path
    own: bool
    prompts: Sequence[str]
    each: int
    columns: int | None


def _write(files: Files, drawn: Iterator[Sample], wanted: Wishes, step: int) -> Path:
    folder, prompts = files.folder, files.prompts
    made = not folder.exists()
    try:
        before = _earlier(folder, files.own)
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before minutes of drawing
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        asked = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(wanted).items()
            if value is not None
        }
        names: list[str] = []
        pictures: list[np.ndarray] = []
        for number, sample in enumerate(drawn):
            pictures += [sample.picture] if len(pictures) < SHOWN else []
            if not names:  # so that what is written before an end that comes early is known for ours
                names = [_name(i, prompt, files.each, sample.kind) for i, prompt in enumerate(prompts)]
                _grid(files, pictures, {"step": step, **asked}, [*names, *before])
            atomic_write(folder / names[number], sample.data)
        _grid(files, pictures, {"step": step, **asked}, names)
        for stale in sorted(set(before) - {*names, GRID}):
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: samples cannot be written there: {error.strerror or error}", code=6) from error
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):  # what was refused leaves nothing behind
            folder.rmdir()
    return folder


def _name(number: int, prompt: str, per_prompt: int, kind: str) -> str:
    named = slug(prompt) if prompt else "sample"
    if per_prompt == 1:
        return f"{number:03d}_{named}.{kind}"
    return f"{number // per_prompt:03d}_{named}_{number % per_prompt:02d}.{kind}"


def _grid(files: Files, pictures: Sequence[np.ndarray], asked: dict[str, Any], names: Sequence[str]) -> None:
    each = list(dict.fromkeys(prompt for prompt in files.prompts if prompt))
    info = PngImagePlugin.PngInfo()
    info.add_itxt(RECORD, json.dumps({**asked, "prompts": each, "files": sorted({*names, GRID})}, ensure_ascii=False))
    buffer = io.BytesIO()
    make_grid(pictures, files.columns, files.prompts[: len(pictures)]).save(buffer, "png", pnginfo=info)
    atomic_write(files.folder / GRID, buffer.getvalue())


def record_of(folder: Path) -> dict[str, Any]:
    """The options of the call that wrote a folder's samples, and its `files`; empty where there are none."""
    try:
        with Image.open(folder / GRID, formats=["png"]) as image:
            value = json.loads(image.info.get(RECORD, "{}"))
    except (OSError, ValueError, SyntaxError):  # none there, or a picture of someone else's
        return {}
    return value if isinstance(value, dict) else {}


def _earlier(folder: Path, own: bool) -> list[str]:
    """Files of an earlier call in the folder. `own`: it is the run's, and holds nothing else.

    Raises:
        UserError: the folder has files that look like samples, and no list names them: they may be someone else's.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; expected a folder")
    if not folder.is_dir():
        return []
    listed = record_of(folder).get("files", [])
    present = {path.name for path in folder.iterdir() if _FILE.fullmatch(path.name) or path.name == GRID}
    unlisted = sorted(present - set(map(str, listed if isinstance(listed, list) else [])))
    if unlisted and not own:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise UserError(
            f"--output {folder}: has {unlisted[0]}{more}, which look like samples and are in no list of `nexus sample` there; delete "
            "them, or choose another folder"
        )
    return sorted(present)
