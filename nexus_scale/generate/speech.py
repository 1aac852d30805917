"""Text and a voice -> codes -> a waveform: what speech needs beside its networks, and how a sound looks.

A recipe names both under `data.encoders`: `codes` is the codec, `phonemes` the phonemizer that its data were made with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus_scale.conditioners.audio import CODES, TIMBRE, CodeConditioner
from nexus_scale.conditioners.chroma import CHROMA, ChromaConditioner
from nexus_scale.conditioners.opening import OF_SOUNDS, of_sounds
from nexus_scale.conditioners.phonemes import PHONEMES, PhonemeConditioner
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import Batch, Conditioner, UserError
from nexus_scale.data import stand_ins
from nexus_scale.data.manifest import DataError
from nexus_scale.data.sounds import decode_wav
from nexus_scale.engine.hardware import CPU, Hardware
from nexus_scale.interop.phonemes import BEGIN, END
from nexus_scale.media.audio import Audio
from nexus_scale.media.latent_space import check_made_with
from nexus_scale.media.opening import open_codec
from nexus_scale.train import Place

log = logging.getLogger(__name__)

LOOKED_AT = 1 << 12
"""Held-out samples among which voices are looked for."""


class Voice(NamedTuple):
    """An acoustic prompt: `codes` (P, K), what is said in it, as phonemes with begin and end, and other sequences that its family is told
    of a sound, by the names of their fields, such as semantic tokens (P',); and `timbre` (D,) where a codec hears one."""

    name: str
    phonemes: list[int]
    codes: Tensor
    beside: Mapping[str, Tensor] = MappingProxyType({})
    timbre: Tensor | None = None


def beside_codes(batch: Batch, row: int) -> dict[str, Tensor]:
    """Of a row of a batch, what else is heard in its sound."""
    return {name: batch[name][row][batch[f"{name}_mask"][row]] for name in OF_SOUNDS if name in batch}


class Speaking:
    """The codec and the phonemizer of a recipe, opened when they are first asked for; of made-up data, stand-ins.

    Args:
        dataset: the recipe's data, which say by what they were made; None where it does not matter.
    Raises (where they are opened):
        UserError: the recipe names none, or they are not those that the data were made with.
    """

    def __init__(self, recipe: Recipe, place: Place, dataset: Any = None, hardware: Hardware = CPU):
        self.recipe, self.place, self.dataset, self.hardware = recipe, place, dataset, hardware

    def _spec(self, field: str, example: str) -> dict[str, Any]:
        spec = self.recipe.data.encoders.get(field)
        if not isinstance(spec, dict):
            raise UserError(
                f"data.encoders.{field}: needed to speak; recipe {self.recipe.name} has none, for example {example}"
            )
        return spec

    @cached_property
    def codec(self) -> Any:
        """Decodes codes. Raises Undecodable where the recipe names none."""
        place = self.place
        return open_codec(self.recipe, self.dataset, place.runs_root, place.data_root, self.hardware.device)

    @cached_property
    def medium(self) -> Audio:
        return Audio(self.codec.sample_rate_hz, self.codec)

    @cached_property
    def phonemes(self) -> PhonemeConditioner:
        if self.recipe.data.synthetic is not None:
            return PhonemeConditioner(stand_ins.phonemizer_of(self.recipe.data.synthetic.fields))
        made = PhonemeConditioner.open(**self._spec("phonemes", "{language: en-us}"))
        check_made_with(self.dataset, "phonemes", made.fingerprint)
        return made

    @cached_property
    def heard(self) -> list[Conditioner]:
        """What the recipe's data are told of a sound beside its codes."""
        made = of_sounds(self.recipe, self.place.data_root, self.codec, str(self.hardware.device))
        for one in made:
            for field in one.fields:
                check_made_with(self.dataset, field, one.fingerprint)
        return made

    # ---------------------------------------------------------------------------------------------- voices

    def voice(self, clip: Path, text: str, option: str = "--voice") -> Voice:
        """The voice of a recording, (`clip`: a WAV file of 16-bit PCM at the codec's rate), in which `text` is said.

        Raises:
            UserError: cannot be read, is at another rate, or is silent; a text that cannot be said.
        """
        wave = self._mono(clip, option)[None]
        heard = {
            name: torch.from_numpy(value).long() for one in self.heard for name, value in one.encode([wave])[0].items()
        }
        return Voice(clip.stem, self.spoken(text), self._codes(clip, option), heard, self.timbre(clip, option))

    def given(self, begin: Path | None, melody: Path | None, field: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What recordings give to samples: the codes (1, P, K) that they go on from, under `field`, and as a condition the melody
        (1, T, 12) that they follow.

        Raises:
            UserError: cannot be read, is at another rate, or is silent; a codec of fewer books.
        """
        codes = {} if begin is None else {field: self._begun(begin, int(self.dataset.fields[field][-1]))[None]}
        if melody is None:
            return codes, {}
        wave = self._mono(melody, "--melody")
        made = ChromaConditioner(self.codec.sample_rate_hz).encode([wave[None]])[0][CHROMA]
        return codes, {CHROMA: torch.from_numpy(made).float()[None]}

    def _begun(self, clip: Path, num_codebooks: int) -> Tensor:
        """Codes of as many books as samples have; of two channels both are the recording's."""
        codes = self._codes(clip, "--begin")
        codes = codes.repeat_interleave(2, dim=1) if num_codebooks == 2 * codes.shape[1] else codes[:, :num_codebooks]
        if codes.shape[1] != num_codebooks:
            raise UserError(f"--begin {clip}: the run's codec has {codes.shape[1]} books, samples {num_codebooks}")
        return codes

    def _codes(self, clip: Path, option: str) -> Tensor:
        """The codes (P, K) of a recording, as the data's were made."""
        codes = CodeConditioner(self.codec).encode([self._mono(clip, option)[None]])[0][CODES]  # (P, K)
        return torch.from_numpy(codes if codes.dtype.kind == "f" else codes.astype("int64"))

    def timbre(self, clip: Path, option: str) -> Tensor | None:
        """The timbre (D,) of a recording; None where the codec hears none."""
        if not getattr(self.codec, "timbre_size", 0):
            return None
        return torch.from_numpy(CodeConditioner(self.codec).encode([self._mono(clip, option)[None]])[0][TIMBRE])

    def _mono(self, clip: Path, option: str) -> Tensor:
        """A recording at the codec's rate, (T,)."""
        try:
            wave, rate = decode_wav(clip.read_bytes())
        except (OSError, DataError) as error:
            raise UserError(f"{option} {clip}: cannot be read as 16-bit PCM in a WAV file: {error}", code=3) from None
        wanted = self.codec.sample_rate_hz
        if rate != wanted:
            raise UserError(
                f"{option} {clip}: got {rate} Hz, the run's codec takes {wanted} Hz; resample it, for example: "
                f"sox {clip.name} -r {wanted} resampled.wav",
                code=3,
            )
        mono = torch.from_numpy(wave).mean(0)
        if float(mono.abs().max()) < 1e-3:
            raise UserError(f"{option} {clip}: is silent; give a recording of some seconds", code=3)
        return mono

    def spoken(self, text: str) -> list[int]:
        """The phonemes of a text, with begin and end."""
        ids: list[int] = self.phonemes.encode([text])[0][PHONEMES].tolist()
        return ids

    @staticmethod
    def held_out(dataset: Any, frames: int) -> list[Voice]:
        """One utterance of each speaker (`label`) of a data set of codes and phonemes, the one nearest in length to `frames`; of
        one speaker where the data do not tell them apart. In the order of the labels.

        Raises:
            UserError: the data are of something else.
        """
        missing = sorted({"codes", "phonemes"} - set(dataset.fields))
        if missing:
            raise UserError(f"voices come from data of codes and phonemes; these lack {missing}", code=3)
        best: dict[int, tuple[int, Voice]] = {}
        for batch in (given.on("cpu") for given in dataset.fixed(min(dataset.samples, LOOKED_AT), batch=64)):
            labels = batch["label"].tolist() if "label" in batch else [0] * len(batch)
            for row, label in enumerate(labels):
                length = int(batch["codes_mask"][row].sum())
                if label not in best or abs(length - frames) < best[label][0]:
                    spoken = batch["phonemes"][row][batch["phonemes_mask"][row]].tolist()
                    timbre = batch[TIMBRE][row] if TIMBRE in batch else None
                    beside = beside_codes(batch, row)
                    voice = Voice(str(label), spoken, batch["codes"][row, :length], beside, timbre)
                    best[label] = abs(length - frames), voice
        return [voice for _, (_, voice) in sorted(best.items())]

    # ---------------------------------------------------------------------------------------------- speech

    def condition(self, texts: Sequence[str], voices: Sequence[Voice]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Conditions of sentences: each one's phonemes after those of its voice, and both alone. And what is given: the voices'
        codes, and what else is heard in them.

        Raises:
            UserError: a text that cannot be said.
        """
        sentences = [self.spoken(text) for text in texts]
        space = self.phonemes.phonemizer.table.index(" ")
        joined = [after(voice.phonemes, sentence, space) for voice, sentence in zip(voices, sentences, strict=True)]
        phonemes, phonemes_mask = padded([torch.tensor(one) for one in joined])
        sentence, sentence_mask = padded([torch.tensor(list(one)) for one in sentences])
        codes, codes_mask = padded([voice.codes for voice in voices])
        voice, voice_mask = padded([torch.tensor(one.phonemes) for one in voices])
        cond = {
            "phonemes": phonemes, "phonemes_mask": phonemes_mask, "sentence": sentence, "sentence_mask": sentence_mask,
            "voice": voice, "voice_mask": voice_mask,
        }  # fmt: skip
        given = {"codes": codes, "codes_mask": codes_mask}
        for name in voices[0].beside:
            given[name], given[f"{name}_mask"] = padded([voice.beside[name] for voice in voices])
        timbres = [voice.timbre for voice in voices if voice.timbre is not None]
        if timbres:
            given[TIMBRE] = torch.stack(timbres)
        return cond, given

    def wave(self, codes: Tensor, before: Tensor | None = None, timbre: Tensor | None = None) -> Tensor:
        """The waveform (T,) of codes (T', K), decoded after those `before` it, as they follow one another, with a `timbre` (D,)."""
        return self.medium.wave(codes, before, timbre)[0].cpu()


def after(first: Sequence[int], then: Sequence[int], space: int) -> list[int]:
    """One text after another: phonemes with begin and end, the inner ones replaced by a space."""
    head = list(first[:-1]) if first and first[-1] == END else list(first)
    tail = list(then[1:]) if then and then[0] == BEGIN else list(then)
    return [*head, space, *tail]


def in_manner(voices: Sequence[Voice]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What gives sentences the durations and the prosody of voices of their own, beside `Speaking.condition`."""
    words, words_mask = padded([torch.tensor(one.phonemes) for one in voices])
    codes, codes_mask = padded([one.codes for one in voices])
    cond = {"prosody_voice": words, "prosody_voice_mask": words_mask}
    return cond, {"prosody_codes": codes, "prosody_codes_mask": codes_mask}


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors (L_i, ...) in one (B, L, ...), zeros after each, and which are real, (B, L)."""
    lengths = torch.tensor([len(row) for row in rows])
    out = rows[0].new_zeros(len(rows), int(lengths.max()), *rows[0].shape[1:])
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out, torch.arange(out.shape[1]) < lengths[:, None]
