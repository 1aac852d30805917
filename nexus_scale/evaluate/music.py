"""Whether music is what its caption says: key and tempo, judged by rules.

nexus score musicgen_tiny_music --settings score_music
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.sounds import encode_wav
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.sources import Waves, recordings_of
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.metrics.music import NOTES, PROFILES, key_of, same_tempo, tempo_of
from nexus_scale.train import Place

log = logging.getLogger(__name__)

KEY = re.compile(rf"\b({'|'.join(sorted(NOTES, key=len, reverse=True))}) ({'|'.join(PROFILES)})\b")
TEMPO = re.compile(r"\b(\d+(?:\.\d+)?) (?:beats a minute|beats per minute|bpm)\b", re.IGNORECASE)


class MusicScoreSettings(BaseModel):
    """The `music:` section of a settings file.

    `clips`: folder of recordings (`audio`, `caption`) whose captions are played. `samples`: how many, spread over the folder. `batch`:
    drawn together. `guidance`: None: the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    clips: str
    samples: int = Field(64, ge=2, le=10**6)
    batch: int = Field(16, ge=1, le=10**4)
    guidance: float | None = Field(None, ge=-1000, le=1000)
    seed: int = Field(0, ge=0, lt=2**63)


def key_said(caption: str) -> str | None:
    """`G major`, of a caption that names a major or minor key."""
    found = KEY.search(caption)
    return found[0] if found else None


def tempo_said(caption: str) -> float | None:
    """Beats a minute, of a caption that names them."""
    found = TEMPO.search(caption)
    return float(found[1]) if found else None


Answers = dict[str, list[list[bool | None]]]
"""For `key` and `tempo`, of each wave whether it is in that of each caption; None of a caption that names none."""


def answers_of(captions: Sequence[str], waves: Sequence[tuple[Tensor, int]]) -> Answers:
    """Whether waves (T,) with their rates are in the keys and at the tempos of captions."""
    keys, tempos = [key_of(*wave) for wave in waves], [tempo_of(*wave) for wave in waves]
    return {
        "key": [[None if (said := key_said(c)) is None else said == key for c in captions] for key in keys],
        "tempo": [
            [None if (wanted := tempo_said(c)) is None else same_tempo(tempo, wanted) for c in captions]
            for tempo in tempos
        ],
    }


def own_of(table: Sequence[Sequence[bool | None]]) -> Iterator[bool | None]:
    """The answers of each wave to its own caption."""
    return (row[number] for number, row in enumerate(table))


def others_of(table: Sequence[Sequence[bool | None]]) -> Iterator[bool | None]:
    """The answers of each wave to all other captions: chance."""
    return (one for number, row in enumerate(table) for other, one in enumerate(row) if other != number)


def judged(captions: Sequence[str], waves: Sequence[tuple[Tensor, int]]) -> dict[str, float | None]:
    """`key`, `tempo`: the share of waves (T,) with their rates that are in the key, or at the tempo, of their caption, of those captions
    that name one; `key_chance`, `tempo_chance`: the share that is in that of another caption, over all pairs of two."""
    found: dict[str, float | None] = {}
    for name, table in answers_of(captions, waves).items():
        found |= {name: share(own_of(table)), f"{name}_chance": share(others_of(table))}
    return found


def share(answers: Iterable[bool | None]) -> float | None:
    """The share of answers that are yes, of those that are one."""
    kept = [bool(one) for one in answers if one is not None]
    return sum(kept) / len(kept) if kept else None


def score_music(place: Place, settings: MusicScoreSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Plays captions of held-out recordings, writes what is played to `scored/` and the scores to scores.json.

    Returns:
        what `judged` gives, of what the run plays; with `_real` after their names, of the recordings of the same captions. `samples`,
        `keys`, `tempos` (captions that name one), `seconds`.
    """
    begun = time.monotonic()
    captions, real = recordings(Manifest.load(place.data_root / settings.clips), settings.samples)
    trained = Trained(place.run, place, hardware=hardware)
    waves = played(trained, captions, settings)
    scores: dict[str, Any] = {}
    for kind, several in (("", waves), ("_real", real)):
        scores |= {f"{name}{kind}": value for name, value in judged(captions, several).items()}
    scores |= {
        "samples": len(captions),
        "keys": sum(key_said(caption) is not None for caption in captions),
        "tempos": sum(tempo_said(caption) is not None for caption in captions),
        "guidance": settings.guidance,
        "seconds": time.monotonic() - begun,
    }
    folder = place.run.path / "scored"
    folder.mkdir(exist_ok=True)
    for number, (wave, rate) in enumerate(waves):
        atomic_write(folder / f"{number:03d}_played.wav", encode_wav(wave[None].numpy(), rate))
    atomic_write(folder / "captions.json", json.dumps(captions, indent=1, ensure_ascii=False).encode())
    atomic_write(place.run.path / "scores.json", json.dumps(scores, indent=1).encode())
    return scores


def recordings(clips: Manifest, count: int) -> tuple[list[str], Waves]:
    """Captions and waves (T,) with their rates, `count` or all there are, spread over the folder.

    Raises:
        UserError: it has no recordings or captions, fewer than two, or none of them names a key or a tempo.
    """
    captions, waves = recordings_of(clips, count, "music.clips")
    check_said(captions, f"music.clips: {clips.where}")
    return captions, waves


def check_said(captions: Sequence[str], where: str) -> None:
    """Raises a UserError where fewer than two, or none of the captions names a key or a tempo."""
    if len(captions) < 2 or not any(key_said(caption) or tempo_said(caption) for caption in captions):
        raise UserError(
            f"{where} has {len(captions)} recordings, for example {captions[:1]}; expected at least 2, with captions that name a key, "
            "such as `G major`, or a tempo, such as `120 beats a minute`",
            code=3,
        )


def played(trained: Trained, captions: Sequence[str], settings: MusicScoreSettings) -> Waves:
    """Captions as the run plays them: waves (T,) with their rate."""
    rate = trained.speaking.codec.sample_rate_hz
    request = request_of(trained.recipe, trained.objective, guidance=settings.guidance)
    waves: Waves = []
    for first in range(0, len(captions), settings.batch):
        some = captions[first : first + settings.batch]
        log.info("score: playing captions %d to %d of %d", first + 1, first + len(some), len(captions))
        made = trained.generate(
            trained.conditions(some), request, seed=settings.seed, positions=range(first, first + len(some))
        )
        waves += [(wave.mean(0).cpu(), rate) for wave in trained.shown(made)]
    return waves
