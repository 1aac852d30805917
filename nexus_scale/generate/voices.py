"""What speech is drawn from: a sentence in a voice, or a recording of which a part is spoken anew."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.generate.speech import Voice, in_manner, padded

if TYPE_CHECKING:
    from nexus_scale.generate.trained import Trained


class Asked(Protocol):
    """The options of a call that speech reads; see `generate.prompts.Wishes`."""

    @property
    def voice(self) -> Path | None: ...
    @property
    def voice_text(self) -> str | None: ...
    @property
    def speaker(self) -> str | None: ...
    @property
    def prosody(self) -> str | None: ...
    @property
    def prosody_text(self) -> str | None: ...
    @property
    def timbre(self) -> str | None: ...
    @property
    def edit(self) -> Path | None: ...
    @property
    def edit_text(self) -> str | None: ...
    @property
    def span(self) -> str | None: ...


class Told(NamedTuple):
    """Conditions and what is given, one row a sentence; and the codes that the samples follow, None where they are whole."""

    cond: dict[str, Tensor]
    given: dict[str, Tensor]
    before: Tensor | None


def check_edit(asked: Asked) -> None:
    """Raises a UserError for options of a recording that is spoken anew, where there is none, or its text is missing, and for the text
    of a manner where there is none."""
    if asked.prosody_text is not None and asked.prosody is None:
        raise UserError("--prosody-text: says what is said in --prosody; give both")
    if asked.edit is None and (asked.edit_text is not None or asked.span is not None):
        raise UserError("--edit-text and --span: are of a recording that is changed; give --edit FILE, too")
    if asked.edit is not None and not asked.edit_text:
        raise UserError(f"--edit {asked.edit}: needs --edit-text, what is said in it")
    if asked.span is not None and (asked.voice is not None or asked.speaker is not None):
        raise UserError("--span: is spoken anew in the recording's own voice; leave --voice and --speaker out")


def told_to_speak(trained: Trained, asked: Asked, texts: Sequence[str]) -> Told:
    """What sentences become: said in a voice; or with `edit` in place of what that recording says, of which only other words are new;
    or of the same words its `span`; or with a voice beside it, all of it, with its timing.

    Raises:
        UserError: a recording that cannot be read; a text that cannot be said, or is not the one that it has to be; no such span.
    """
    speaking = trained.speaking
    if asked.edit is None:
        voice = voice_of(trained, asked)
        cond, given = speaking.condition(texts, [voice] * len(texts))
        others = apart(trained, voice, asked, len(texts))
        return Told({**cond, **others[0]}, {**given, **others[1]}, voice.codes)
    recording = speaking.voice(asked.edit, asked.edit_text or "", "--edit")
    said = [speaking.spoken(text) for text in texts]
    given = dict(zip(("codes", "codes_mask"), padded([recording.codes] * len(texts)), strict=True))
    same = [one == list(recording.phonemes) for one in said]
    if asked.voice is not None or asked.speaker is not None:
        if not all(same):
            raise UserError(
                "--edit with --voice: says the recording's own words in the voice; give --prompt the words of --edit-text"
            )
        voice = voice_of(trained, asked)
        cond, of_voice = speaking.condition(texts, [voice] * len(texts))
        like = {f"like{name.removeprefix('codes')}": value for name, value in given.items()}
        return Told(cond, {**of_voice, **like}, voice.codes)
    cond = dict(zip(("phonemes", "phonemes_mask"), padded([torch.tensor(one) for one in said]), strict=True))
    if asked.span is not None:
        if not all(same):
            raise UserError(
                "--span: the recording keeps its words; give --prompt the words of --edit-text, or leave --span out"
            )
        gap = _span(asked.span, len(recording.codes), speaking.codec.sample_rate_hz / speaking.codec.hop)
        return Told(cond, {**given, "gap": gap.expand(len(texts), -1)}, None)
    if any(same):
        raise UserError(
            "--edit: the prompt says what the recording says; give other words, or --span FROM-TO to speak a part anew"
        )
    words = padded([torch.tensor(recording.phonemes)] * len(texts))
    return Told(cond, {**given, "said": words[0], "said_mask": words[1]}, None)


def _span(text: str, frames: int, frames_per_second: float) -> Tensor:
    """`0.8-1.4`, in seconds, as frames (T,) bool."""
    begin, _, end = text.partition("-")
    try:
        first, last = float(begin), float(end)
    except ValueError:
        raise UserError(f"--span {text}: expected FROM-TO in seconds, such as 0.8-1.4") from None
    seconds = frames / frames_per_second
    if not 0 <= first < last or first >= seconds:
        raise UserError(
            f"--span {text}: expected FROM-TO within the recording's {seconds:.2f} seconds, such as 0.8-1.4"
        )
    places = (torch.arange(frames) + 0.5) / frames_per_second
    gap = (places >= first) & (places < last)
    if not bool(gap.any()):
        raise UserError(f"--span {text}: is shorter than a frame, {1 / frames_per_second:.3f} seconds")
    return gap


def voice_of(trained: Trained, asked: Asked) -> Voice:
    """The voice of a recording or of a held-out speaker, the first unless one is named."""
    if asked.voice is not None:
        if not asked.voice_text:
            raise UserError(
                f"--voice {asked.voice}: needs --voice-text, what is said in it, since its phonemes lead the sentence's"
            )
        return trained.speaking.voice(asked.voice, asked.voice_text)
    return next(iter(trained.voices)) if asked.speaker is None else held_out(trained, asked.speaker, "--speaker")


def held_out(trained: Trained, speaker: str, option: str) -> Voice:
    """The voice of a held-out speaker, by label."""
    voices = {voice.name: voice for voice in trained.voices}
    if speaker not in voices:
        raise UserError(f"{option} {speaker!r}: no such held-out speaker; {nearest(speaker, list(voices))}")
    return voices[speaker]


def apart(trained: Trained, voice: Voice, asked: Asked, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditions and what is given of attributes that have prompts of their own, for `count` sentences: `prosody` and `timbre` name
    recordings, or held-out speakers by label.

    Raises:
        UserError: a recording that cannot be read, or without its text; no such speaker; a codec that hears no timbre.
    """
    cond: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    if asked.prosody is not None:
        cond, given = in_manner([_manner(trained, asked.prosody, asked.prosody_text)] * count)
    if "timbre" in trained.draws.takes:
        heard = voice.timbre if asked.timbre is None else _timbre(trained, asked.timbre)
        if heard is None:
            raise UserError(
                "--timbre: the codec of data.encoders.codes hears no timbre; name a run of a recipe of facodec there"
            )
        given["timbre"] = heard.expand(count, -1)
    return cond, given


def _manner(trained: Trained, named: str, text: str | None) -> Voice:
    if not os.path.isfile(named):
        return held_out(trained, named, "--prosody")
    if not text:
        raise UserError(f"--prosody {named}: needs --prosody-text, what is said in it")
    return trained.speaking.voice(Path(named), text, "--prosody")


def _timbre(trained: Trained, named: str) -> Tensor | None:
    if os.path.isfile(named):
        return trained.speaking.timbre(Path(named), "--timbre")
    return held_out(trained, named, "--timbre").timbre
