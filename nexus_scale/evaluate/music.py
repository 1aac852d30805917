"""Whether music is what its caption says: key and tempo, judged by rules.

nexus score musicgen_tiny_music --settings score_music
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.fields import read_bytes
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.reader import read_alone
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.engine.hardware import Hardware
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


def judged(captions: Sequence[str], waves: Sequence[tuple[Tensor, int]]) -> dict[str, float | None]:
    """`key`, `tempo`: the share of waves (T,) with their rates that are in the key, or at the tempo, of their caption, of those captions
    that name one; `key_chance`, `tempo_chance`: the share that is in that of another caption, over all pairs of two."""
    keys, tempos = [key_of(*wave) for wave in waves], [tempo_of(*wave) for wave in waves]
    right = {
        "key": [[None if (said := key_said(c)) is None else said == key for c in captions] for key in keys],
        "tempo": [
            [None if (wanted := tempo_said(c)) is None else same_tempo(tempo, wanted) for c in captions]
            for tempo in tempos
        ],
    }
    found: dict[str, float | None] = {}
    for name, table in right.items():
        found[name] = _share(row[number] for number, row in enumerate(table))
        found[f"{name}_chance"] = _share(
            one for number, row in enumerate(table) for other, one in enumerate(row) if other != number
        )
    return found


def _share(answers: Any) -> float | None:
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
    played = _played(trained, captions, settings)
    scores: dict[str, Any] = {}
    for kind, waves in (("", played), ("_real", real)):
        scores |= {f"{name}{kind}": value for name, value in judged(captions, waves).items()}
    scores |= {
        "samples": len(captions),
        "keys": sum(key_said(caption) is not None for caption in captions),
        "tempos": sum(tempo_said(caption) is not None for caption in captions),
        "guidance": settings.guidance,
        "seconds": time.monotonic() - begun,
    }
    folder = place.run.path / "scored"
    folder.mkdir(exist_ok=True)
    for number, (wave, rate) in enumerate(played):
        atomic_write(folder / f"{number:03d}_played.wav", encode_wav(wave[None].numpy(), rate))
    atomic_write(folder / "captions.json", json.dumps(captions, indent=1, ensure_ascii=False).encode())
    atomic_write(place.run.path / "scores.json", json.dumps(scores, indent=1).encode())
    return scores


def recordings(clips: Manifest, count: int) -> tuple[list[str], list[tuple[Tensor, int]]]:
    """Captions and waves (T,) with their rates, `count` or all there are, spread over the folder.

    Raises:
        UserError: it has no recordings or captions, fewer than two, or none of them names a key or a tempo.
    """
    for field in ("audio", "caption"):
        if field not in clips.fields:
            raise UserError(
                f"music.clips: {clips.where} has no {field!r}; give a folder of recordings with captions", code=3
            )
    count = min(count, clips.samples)
    numbers = np.arange(count, dtype=np.int64) * clips.samples // max(count, 1)
    captions = [data.decode() for data in read_bytes(read_alone(clips, "caption", numbers))]
    if count < 2 or not any(key_said(caption) or tempo_said(caption) for caption in captions):
        raise UserError(
            f"music.clips: {clips.where} has {count} recordings, for example {captions[:1]}; expected at least 2, with captions that "
            "name a key, such as `G major`, or a tempo, such as `120 beats a minute`",
            code=3,
        )
    sounds = [decode_wav(data) for data in read_bytes(read_alone(clips, "audio", numbers))]
    return captions, [(torch.from_numpy(sound.wave).mean(0), sound.sample_rate_hz) for sound in sounds]


def _played(trained: Trained, captions: Sequence[str], settings: MusicScoreSettings) -> list[tuple[Tensor, int]]:
    rate = trained.speaking.codec.sample_rate_hz
    request = request_of(trained.recipe, trained.objective, guidance=settings.guidance)
    waves: list[tuple[Tensor, int]] = []
    for first in range(0, len(captions), settings.batch):
        some = captions[first : first + settings.batch]
        log.info("score: playing captions %d to %d of %d", first + 1, first + len(some), len(captions))
        made = trained.generate(
            trained.conditions(some), request, seed=settings.seed, positions=range(first, first + len(some))
        )
        waves += [(wave.mean(0).cpu(), rate) for wave in trained.shown(made)]
    return waves
