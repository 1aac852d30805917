"""Prompts and what is drawn of them: read, checked, drawn with a run's averaged weights, and written into a folder."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.data.sounds import encode_wav
from nexus_scale.engine.hardware import Hardware
from nexus_scale.generate.speech import Voice
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_text import clean_text
from nexus_scale.media.grid import make_grid
from nexus_scale.train import Place

log = logging.getLogger(__name__)

LONGEST_PROMPT = 50_000
"""Characters; far above what any text encoder reads."""

MOST_SAMPLES = 100_000
SHOWN = 100
"""Samples in a grid, at most."""

AT_ONCE = 64
RECORD = "prompts"
"""Text that grid.png carries, as pictures of other programs do: what was asked for, and the files that were written, in JSON."""

GRID = "grid.png"
_FILE = re.compile(r"\d{3,}_[a-z0-9-]+(_\d{2,})?\.(png|webp|wav)")


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
    """A text as messages quote it: escaped, and cut where it is long."""
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def slug(text: str) -> str:
    """A file name from a prompt: letters, digits and dashes alone, never a path."""
    return re.sub(r"[^a-z0-9]+", "-", text[:400].lower()).strip("-")[:60].strip("-") or "prompt"


# ------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Wishes:
    """What may be asked of drawing beside prompts; None is the recipe's own, or nothing.

    `guidance`: classifier-free guidance; of a network that was distilled to obey a scale, that scale. `true_guidance`: classifier-free
    guidance of such a network, at twice the cost. `negative_prompt`: what is guided away from, in the place of no prompt; an empty one is
    the empty text as the encoders read it. `label`: of a network that is told a class beside the text, classes by name or number, one for
    each prompt or one for all. `size`: HEIGHTxWIDTH in pixels. `per_prompt`: samples of each prompt. `voice` and `voice_text`: of speech,
    a recording whose voice is taken, and what is said in it; `speaker`: instead of them, the label of a held-out speaker.
    """

    steps: int | None = None
    guidance: float | None = None
    true_guidance: float | None = None
    negative_prompt: str | None = None
    label: Sequence[str] | None = None
    size: str | None = None
    per_prompt: int = 1
    seed: int = 0
    voice: Path | None = None
    voice_text: str | None = None
    speaker: str | None = None

    OF_PICTURES = ("steps", "guidance", "true_guidance", "negative_prompt", "label", "size")
    OF_SPEECH = ("voice", "voice_text", "speaker")

    def check(self) -> None:
        """Raises a UserError for what no family takes."""
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed {self.seed}: expected 0 to 2^63 - 1")
        if self.per_prompt < 1:
            raise UserError(f"--per-prompt {self.per_prompt}: expected at least 1")
        if self.negative_prompt:
            check_prompts([self.negative_prompt], "--negative-prompt")
        if self.voice_text is not None and self.voice is None:
            raise UserError("--voice-text: says what is said in --voice; give both")
        if self.voice is not None and self.speaker is not None:
            raise UserError("--voice and --speaker: both name a voice; give one")

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Raises a UserError where one of these is asked for."""
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if given:
            raise UserError(f"{' and '.join(given)}: {why}; leave {'it' if len(given) == 1 else 'them'} out")


class Sample(NamedTuple):
    """What is written of one: `kind` of its file, its contents, and a picture (H, W, 3) uint8 for the grid."""

    kind: str
    data: bytes
    picture: np.ndarray


def draw_prompts(
    place: Place,
    prompts: Sequence[str],
    *,
    output: Path | None = None,
    hardware: Hardware | None = None,
    **wishes: Any,
) -> Path:
    """Writes one PNG a sample, one animated WebP where clips are drawn, one WAV where the family speaks; `grid.png`, of clips strips of
    frames, of sounds their spectrograms. What an earlier call wrote into the folder is replaced.

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
    trained = Trained(place.run, place, hardware=hardware)
    conditional = bool(trained.draws.conditions or trained.draws.given)
    if conditional and not prompts:
        raise UserError("expected at least one prompt; give --prompt TEXT or --prompts FILE")
    if not conditional and prompts:
        raise UserError(
            f"--prompt: recipe {trained.recipe.name} has no conditions and takes no prompts; leave it out, and give --count N"
        )
    prompts = [prompt for prompt in prompts or [""] for _ in range(wanted.per_prompt)]
    speaks = "voice" in trained.draws.takes
    drawn = _spoken(trained, prompts, wanted) if speaks else _pictures(trained, prompts, wanted)
    own = place.run.samples / "prompts"
    return _write(output or own, output is None, prompts, drawn, wanted, trained.step)


def _spoken(trained: Trained, prompts: Sequence[str], wanted: Wishes) -> Iterator[Sample]:
    name = trained.recipe.name
    wanted.refuse(Wishes.OF_PICTURES, f"recipe {name} speaks token by token")
    voice = _voice(trained, wanted)

    def draw() -> Iterator[Sample]:
        for one in trained.speak(prompts, [voice] * len(prompts), seed=wanted.seed):
            yield Sample("wav", encode_wav(one.audio[None], one.sample_rate_hz), one.image)

    return draw()


def _pictures(trained: Trained, prompts: Sequence[str], wanted: Wishes) -> Iterator[Sample]:
    """Checks all that was asked for now, and draws as it is iterated."""
    wanted.refuse(Wishes.OF_SPEECH, f"recipe {trained.recipe.name} draws pictures")
    labels = _labels(wanted, len(prompts))
    asked = list(zip(prompts, labels or [""] * len(prompts), strict=True))
    different = list(dict.fromkeys(asked))
    cond = trained.conditions(
        [prompt for prompt, _ in different], [label for _, label in different] if labels else None
    )
    guidance = trained.guidance(wanted.guidance, wanted.true_guidance)
    trained.check_steps(wanted.steps)
    negative = None
    if wanted.negative_prompt is not None:
        if not cond:
            wanted.refuse(["negative_prompt"], f"recipe {trained.recipe.name} has no conditions")
        if not guidance.is_double:
            cure = (
                "--true-guidance 4, which costs two forwards a step"
                if trained.draws.embeds_guidance
                else "--guidance 4"
            )
            raise UserError(
                f"--negative-prompt: has no effect at guidance {guidance.scale:g}; give {cure}, or leave it out"
            )
        negative = trained.conditioned.negative(clean_text(wanted.negative_prompt), cond)
    if trained.draws.embeds_guidance and guidance.is_double:
        log.info("true guidance %g: two forwards a step, twice the time", guidance.scale)
    trained.require_decoder()  # before minutes of drawing
    shape = trained.shape_of(*_size(wanted.size)) if wanted.size is not None else None
    if shape is None and len(trained.sizes) > 1:
        log.info(
            "drawn in the size that most of the data have, latents %s; --size HEIGHTxWIDTH asks for another",
            trained.shape,
        )
    places, medium = {one: place for place, one in enumerate(different)}, trained.medium

    def draw() -> Iterator[Sample]:
        for begin in range(0, len(prompts), AT_ONCE):
            positions = range(begin, min(begin + AT_ONCE, len(prompts)))
            rows = torch.tensor([places[asked[i]] for i in positions])
            latents = trained.latents(
                {name: value[rows] for name, value in cond.items()},
                seed=wanted.seed, steps=wanted.steps, guidance=guidance, shape=shape, positions=positions,
                negative=None if negative is None else {name: value[rows] for name, value in negative.items()},
            )  # fmt: skip
            for one in medium.decode(latents):
                yield Sample(medium.formats[0], medium.file(one), medium.picture(one))

    return draw()


def _labels(wanted: Wishes, samples: int) -> list[str]:
    """The class of each sample; empty where none is asked for."""
    given = list(wanted.label or ())
    prompts = samples // wanted.per_prompt
    if len(given) not in (0, 1, prompts):
        raise UserError(f"--label: got {len(given)} for {prompts} prompts; give one for all, or one for each")
    if len(given) == 1:
        return given * samples
    return [label for label in given for _ in range(wanted.per_prompt)]


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if match is None:
        raise UserError(f"--size {shown(text)}: expected HEIGHTxWIDTH in pixels, such as 512x768")
    return int(match[1]), int(match[2])


def _voice(trained: Trained, wanted: Wishes) -> Voice:
    if wanted.voice is not None:
        if not wanted.voice_text:
            raise UserError(
                f"--voice {wanted.voice}: needs --voice-text, what is said in it, since its phonemes lead the sentence's"
            )
        return trained.speaking.voice(wanted.voice, wanted.voice_text)
    voices = {voice.name: voice for voice in trained.voices}
    if wanted.speaker is None:
        return next(iter(voices.values()))
    if wanted.speaker not in voices:
        raise UserError(
            f"--speaker {wanted.speaker!r}: no such held-out speaker; {nearest(wanted.speaker, list(voices))}"
        )
    return voices[wanted.speaker]


# ------------------------------------------------------------------------------------------------- files


def _write(folder: Path, own: bool, prompts: Sequence[str], drawn: Iterator[Sample], wanted: Wishes, step: int) -> Path:
    made = not folder.exists()
    try:
        before = _earlier(folder, own)
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
                names = [_name(i, prompt, wanted.per_prompt, sample.kind) for i, prompt in enumerate(prompts)]
                _grid(folder, pictures, prompts, {"step": step, **asked}, [*names, *before])
            atomic_write(folder / names[number], sample.data)
        _grid(folder, pictures, prompts, {"step": step, **asked}, names)
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


def _grid(
    folder: Path, pictures: Sequence[np.ndarray], prompts: Sequence[str], asked: dict[str, Any], files: Sequence[str]
) -> None:
    each = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    info = PngImagePlugin.PngInfo()
    info.add_itxt(RECORD, json.dumps({**asked, "prompts": each, "files": sorted({*files, GRID})}, ensure_ascii=False))
    buffer = io.BytesIO()
    make_grid(pictures, captions=prompts[: len(pictures)]).save(buffer, "png", pnginfo=info)
    atomic_write(folder / GRID, buffer.getvalue())


def record_of(folder: Path) -> dict[str, Any]:
    """What was asked of the call that wrote a folder's samples, and its `files`; empty where there is none."""
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
