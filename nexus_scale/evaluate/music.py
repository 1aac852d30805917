"""Whether music is what its caption says: key, tempo and instrument, judged by rules.

nexus score musicgen_tiny_music --settings score_music
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
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
from nexus_scale.metrics.music import NOTES, PROFILES, Timbres, key_of, same_tempo, tempo_of
from nexus_scale.metrics.statistics import by_chance
from nexus_scale.train import Place

log = logging.getLogger(__name__)

KEY = re.compile(rf"\b({'|'.join(sorted(NOTES, key=len, reverse=True))}) ({'|'.join(PROFILES)})\b")
TEMPO = re.compile(r"\b(\d+(?:\.\d+)?) (?:beats a minute|beats per minute|bpm)\b", re.IGNORECASE)
PLAYER = re.compile(r"\bplayed by an? ([a-z]+)")


class MusicScoreSettings(BaseModel):
    """The `music:` section of a settings file.

    `clips`: folder of recordings (`audio`, `caption`) whose captions are played. `instruments`: folder of others, by which instruments are
    known; None: those are not judged; `known`: of how many of them. `samples`: how many captions, spread over the folder. `batch`: drawn
    together. `guidance`: None: the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    clips: str
    instruments: str | None = None
    known: int = Field(512, ge=2, le=10**6)
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


def player_said(caption: str) -> str | None:
    """`flute`, of a caption that says `played by a flute`."""
    found = PLAYER.search(caption)
    return found[1] if found else None


Answers = dict[str, list[list[bool | None]]]
"""For `key`, `tempo` and `instrument`, of each wave whether it has that of each caption; None of a caption that names none."""


def answers_of(captions: Sequence[str], waves: Sequence[tuple[Tensor, int]], timbres: Timbres | None = None) -> Answers:
    """Whether waves (T,) with their rates are in the keys and at the tempos of captions, and by their instruments where `timbres` knows
    some."""
    keys, tempos = [key_of(*wave) for wave in waves], [tempo_of(*wave) for wave in waves]
    answers = {
        "key": [[None if (said := key_said(c)) is None else said == key for c in captions] for key in keys],
        "tempo": [
            [None if (wanted := tempo_said(c)) is None else same_tempo(tempo, wanted) for c in captions]
            for tempo in tempos
        ],
    }
    if timbres is not None:
        players = [timbres(*wave) for wave in waves]
        answers["instrument"] = [
            [None if (said := player_said(c)) is None else said == player for c in captions] for player in players
        ]
    return answers


def own_of(table: Sequence[Sequence[bool | None]]) -> Iterator[bool | None]:
    """The answers of each wave to its own caption."""
    return (row[number] for number, row in enumerate(table))


def others_of(table: Sequence[Sequence[bool | None]]) -> Iterator[bool | None]:
    """The answers of each wave to all other captions: chance."""
    return (one for number, row in enumerate(table) for other, one in enumerate(row) if other != number)


def judged(
    captions: Sequence[str], waves: Sequence[tuple[Tensor, int]], timbres: Timbres | None = None
) -> dict[str, float | None]:
    """`key`, `tempo`, `instrument`: the share of waves (T,) with their rates that have that of their caption, of those captions that name
    one; `_chance`: the share that has that of another caption, over all pairs of two; `_p`: how probable so many are by that chance."""
    found: dict[str, float | None] = {}
    for name, table in answers_of(captions, waves, timbres).items():
        own, chance = [one for one in own_of(table) if one is not None], share(others_of(table))
        p = None if chance is None else by_chance(sum(own), len(own), chance)
        found |= {name: share(own), f"{name}_chance": chance, f"{name}_p": p}
    return found


def share(answers: Iterable[bool | None]) -> float | None:
    """The share of answers that are yes, of those that are one."""
    kept = [bool(one) for one in answers if one is not None]
    return sum(kept) / len(kept) if kept else None


def score_music(place: Place, settings: MusicScoreSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Plays captions of held-out recordings, writes what is played to `scored/` and the scores to scores.json.

    Returns:
        what `judged` gives, of what the run plays; with `_real` after their names, of the recordings of the same captions, and with
        `_resynthesis` of those that have the codec's rate, through the codec. `samples`, `keys`, `tempos`, `players` (captions that name
        one), `seconds`.
    """
    begun = time.monotonic()
    captions, real = recordings(Manifest.load(place.data_root / settings.clips), settings.samples)
    trained = Trained(place.run, place, hardware=hardware)
    codec = trained.speaking.codec
    timbres = known_timbres(place.data_root, settings, {codec.sample_rate_hz})
    waves = played(trained, captions, settings)
    kinds = {"": waves, "_real": real}
    if all(rate == codec.sample_rate_hz for _, rate in real):
        kinds["_resynthesis"] = [(codec.decode(codec.encode(wave[None, None]))[0, 0], rate) for wave, rate in real]
    scores: dict[str, Any] = {}
    for kind, several in kinds.items():
        scores |= {f"{name}{kind}": value for name, value in judged(captions, several, timbres).items()}
    for name, said in {"keys": key_said, "tempos": tempo_said, "players": player_said}.items():
        scores[name] = sum(said(caption) is not None for caption in captions)
    scores |= {
        "samples": len(captions),
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


def known_timbres(data_root: Path, settings: MusicScoreSettings, rates: set[int]) -> Timbres | None:
    """Instruments as they sound in the recordings of `instruments`; None where none are asked for.

    Args:
        rates: of the waves that are to be judged, in Hz.
    Raises:
        UserError: fewer than two instruments there, or several rates.
    """
    if settings.instruments is None:
        return None
    captions, waves = recordings_of(
        Manifest.load(data_root / settings.instruments), settings.known, "music.instruments"
    )
    said = [(name, wave) for caption, wave in zip(captions, waves, strict=True) if (name := player_said(caption))]
    names, known = {name for name, _ in said}, {rate for _, (_, rate) in said}
    if len(names) < 2 or len(known | rates) > 1:
        raise UserError(
            f"music.instruments: {settings.instruments} has recordings of {sorted(names)} at {sorted(known)} Hz, what is judged has "
            f"{sorted(rates)} Hz; expected two instruments at least, in captions such as `played by a flute`, and one rate",
            code=3,
        )
    return Timbres([name for name, _ in said], [wave for _, wave in said])


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
