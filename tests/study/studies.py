"""Studies for tests: folders of small samples, raters who choose by a law, and pages driven in a browser."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from nexus_scale.data.sounds import encode_wav
from nexus_scale.media.animations import encode_animation
from nexus_scale.study.answers import Answers, Assignment
from nexus_scale.study.folder import Study
from nexus_scale.study.new import System, Wanted, new_study


def pictures(folder: Path, count: int, shade: int, suffix: str = "png", size: int = 16) -> Path:
    """`count` pictures with their prompts in text files beside them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(shade)
    for number in range(count):
        pixels = np.full((size, size, 3), shade, np.uint8)
        pixels[4:12, 4:12] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{number:03d}_thing.{suffix}")
        (folder / f"{number:03d}_thing.txt").write_text(f"thing <b>{number}</b>")
    return folder


def clips(folder: Path, count: int, shade: int, frames: int = 6) -> Path:
    """Clips whose frame f is as bright as 40 f."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.full((frames, 24, 32, 3), shade, np.uint8)
        pixels[..., 0] = 40 * np.arange(frames)[:, None, None]
        (folder / f"{number:03d}.webp").write_bytes(encode_animation(pixels, 0.1))
    return folder


def sounds(folder: Path, count: int, level: float, rate_hz: int = 16_000) -> Path:
    """Tones of a second, at a level."""
    folder.mkdir(parents=True)
    for number in range(count):
        wave = level * np.sin(2 * np.pi * (300 + 50 * number) * np.arange(rate_hz) / rate_hz)
        (folder / f"{number:03d}.wav").write_bytes(encode_wav(wave[None].astype(np.float32), rate_hz))
    return folder


def study_of(folder: Path, kind: str = "image", systems: int = 2, count: int = 4, **wanted: object) -> Study:
    """A study of small samples in `folder / study`."""
    makers = {"image": pictures, "clip": clips, "sound": sounds}
    values = {"image": (200, 120, 60), "clip": (200, 120, 60), "sound": (0.5, 0.05, 0.2)}[kind]
    made = [System("ABC"[i], makers[kind](folder / "ABC"[i], count, values[i])) for i in range(systems)]  # type: ignore[operator]
    return new_study(made, folder / "study", Wanted(**wanted))  # type: ignore[arg-type]


def side_by(
    strength: Mapping[str, float], study: Study, one: Assignment, chance: random.Random, nu: float = 0.5
) -> str:
    """The side that a rater chooses who follows Davidson's model, and sees every spoilt copy."""
    if one.kind == "degraded":
        return "right" if one.swapped else "left"
    pair = study.pairs[one.item]
    first, second = (strength[study.samples.systems[i]] for i in (pair.first, pair.second))
    tie = nu * (first * second) ** 0.5
    drawn = chance.random() * (first + second + tie)
    if drawn < tie:
        return "tie"
    return "left" if (drawn < tie + first) is not one.swapped else "right"


def take_part(study: Study, raters: int, strength: Mapping[str, float], seed: int = 0, careless: int = 0) -> None:
    """So many raters judge all that they are shown; the first few choose at random, and take the spoilt copy of each check."""
    chance = random.Random(seed)
    answers = Answers(study)
    answers._db.execute("PRAGMA synchronous=OFF")  # tests of the disk are elsewhere
    answers.chance = chance  # type: ignore[assignment]
    for number in range(raters):
        rater = answers.rater(answers.join() or "")
        assert rater is not None
        while (one := answers.next(rater)) is not None:
            side = side_by(strength, study, one, chance)
            if number < careless:
                side = (
                    {"left": "right", "right": "left"}[side]
                    if one.kind == "degraded"
                    else chance.choice(("left", "right"))
                )
            assert answers.answer(rater, one.id, {q.name: side for q in study.settings.questions}, 1 + chance.random())
    answers.close()
