"""Features of speech that tell what is said more than who says it: what semantic tokens are groups of.

States of a layer of a self-supervised encoder in transformers' format, from a local folder, as HuBERT's and AudioLM's units; or cepstra and
log mel spectrograms of our own, as those of HuBERT's first iteration, with mean 0 and variance 1 in each sound, which takes away most of
a voice and a microphone.

Source: Hsu et al. 2021 (HuBERT), section IV.B; Borsos et al. 2022 (AudioLM), section III.B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import refuse_code
from nexus_scale.interop.folders import parsed_config, weight_files
from nexus_scale.interop.libraries import quiet, transformers_library
from nexus_scale.processes.mels import mel_filters

OWN = ("mfcc", "log_mel")
WINDOW_S, HOP_S, MELS, CEPSTRA = 0.032, 0.02, 40, 13
"""Seconds of a spectrum and between two, bands, and cepstral coefficients."""

CLASSES: Mapping[str, str] = {
    "data2vec-audio": "Data2VecAudioModel",
    "hubert": "HubertModel",
    "unispeech-sat": "UniSpeechSatModel",
    "wav2vec2": "Wav2Vec2Model",
    "wav2vec2-bert": "Wav2Vec2BertModel",
    "wav2vec2-conformer": "Wav2Vec2ConformerModel",
    "wavlm": "WavLMModel",
}
"""By `model_type` of config.json: the class that loads it. The folder never chooses a class."""


class Features(Protocol):
    """Attributes: `sample_rate_hz` of the sounds, `hop`, samples of one frame, `dim`, and `fingerprint`."""

    sample_rate_hz: int
    hop: int
    dim: int
    fingerprint: str

    def of(self, wave: Tensor) -> Tensor:
        """A wave (T,) in [-1, 1] -> (T', dim) float32 on the CPU, T' = ceil(T / hop)."""
        ...


def open_features(spec: Mapping[str, Any], root: Path, device: torch.device | str = "cpu") -> Features:
    """What {folder: PATH, layer: 9} or {name: mfcc, sample_rate_hz: 16000} names.

    Args:
        root: where a relative folder starts.
    Raises:
        UserError: nothing there, or a model that is not known here.
    """
    if ("folder" in spec) == ("name" in spec):
        raise UserError(f"features: got {dict(spec)}; expected a folder of transformers, or a name: {', '.join(OWN)}")
    if "folder" in spec:
        return EncoderStates(root / str(spec["folder"]), spec.get("layer"), device)
    if spec.get("layer") is not None:
        raise UserError(f"features: layer {spec['layer']} is of an encoder's folder; {spec['name']} has none")
    if spec["name"] not in OWN:
        raise UserError(f"features: no {spec['name']!r}; {nearest(str(spec['name']), list(OWN))}")
    return Spectra(int(spec["sample_rate_hz"]), cepstra=spec["name"] == "mfcc")


class Spectra:
    """Log mel spectra (T', 40), or with `cepstra` 13 mel cepstra and their first and second differences (T', 39)."""

    def __init__(self, sample_rate_hz: int, *, cepstra: bool):
        self.sample_rate_hz, self.cepstra, self.dim = sample_rate_hz, cepstra, 3 * CEPSTRA if cepstra else MELS
        self.hop, window = round(HOP_S * sample_rate_hz), 2 * round(WINDOW_S * sample_rate_hz / 2)
        self.fingerprint = (
            f"{'mfcc' if cepstra else 'log_mel'} {self.dim} of {window} by {self.hop} at {sample_rate_hz} Hz"
        )
        self.filters, self.window = mel_filters(sample_rate_hz, window, MELS), torch.hann_window(window)

    def of(self, wave: Tensor) -> Tensor:
        count, window = -(-len(wave) // self.hop), len(self.window)
        before = (window - self.hop) // 2
        whole = F.pad(wave.float(), (before, (count - 1) * self.hop + window - before - len(wave)))
        power = torch.fft.rfft(whole.unfold(0, window, self.hop) * self.window).abs().square()  # (T', window / 2 + 1)
        found = (power @ self.filters.T + 1e-6).log()
        if self.cepstra:
            found = found @ self._cosines.T
            first = _differences(found)
            found = torch.cat([found, first, _differences(first)], dim=1)
        return (found - found.mean(0)) / (found.std(0, correction=0) + 1e-5)

    @cached_property
    def _cosines(self) -> Tensor:
        """The orthonormal cosine transform, (CEPSTRA, MELS)."""
        k, n = torch.arange(CEPSTRA)[:, None], torch.arange(MELS)
        rows = torch.cos(math.pi / MELS * (n + 0.5) * k) * math.sqrt(2 / MELS)
        return torch.where(k == 0, rows / math.sqrt(2), rows)


def _differences(x: Tensor) -> Tensor:
    """Of the frames on both sides, halved; (T', D)."""
    around = torch.cat([x[:1], x, x[-1:]])
    return (around[2:] - around[:-2]) / 2


class EncoderStates:
    """Hidden states of a layer of an encoder, one sound at a time, so that they do not depend on company. A frame that the encoder leaves
    out at the end is its neighbour's.

    Args:
        layer: of `hidden_states`, 0 before the first layer; None: the last.
    """

    def __init__(self, folder: Path, layer: int | None, device: torch.device | str = "cpu"):
        config = parsed_config(folder, "HubertModel")
        kind = config.get("model_type")
        if kind not in CLASSES:
            raise UserError(
                f"{folder / 'config.json'}: model_type is {kind!r}; known: {', '.join(sorted(CLASSES))}", code=2
            )
        depth = int(config.get("num_hidden_layers", 12))
        self.layer = depth if layer is None else layer
        if not 0 <= self.layer <= depth:
            raise UserError(f"features: got layer {layer}; {folder} has 0 to {depth}")
        self.device = torch.device(device)
        model, self._inputs = _loaded(folder, CLASSES[str(kind)])
        self._model = model.to(self.device)
        self.sample_rate_hz, self.dim = int(self._inputs.sampling_rate), int(config["hidden_size"])
        strides = config.get("conv_stride")
        self.hop = math.prod(strides) if strides and kind != "wav2vec2-bert" else self.sample_rate_hz // 50
        digest = xxhash.xxh3_128(json.dumps([CLASSES[str(kind)], self.layer, config], sort_keys=True).encode())
        for file in weight_files(folder, "model.safetensors"):
            digest.update(file.read_bytes())
        self.fingerprint = digest.hexdigest()

    @torch.inference_mode()
    def of(self, wave: Tensor) -> Tensor:
        count = -(-len(wave) // self.hop)
        shortest = 2 * self.sample_rate_hz // 50
        heard = F.pad(wave, (0, max(0, shortest - len(wave)))).numpy()
        inputs = self._inputs(heard, sampling_rate=self.sample_rate_hz, return_tensors="pt").to(self.device)
        states = self._model(**inputs, output_hidden_states=True).hidden_states[self.layer][0].float().cpu()
        return torch.cat([states, states[-1:].expand(max(0, count - len(states)), -1)])[:count]


def _loaded(folder: Path, class_name: str) -> tuple[Any, Any]:
    """A model of transformers, as `loaded_model` has it, and what prepares its inputs."""
    local = {"local_files_only": True, "trust_remote_code": False}
    inputs = _read(
        folder, class_name, lambda library: library.AutoFeatureExtractor.from_pretrained(str(folder), **local)
    )
    return loaded_model(folder, class_name), inputs


def loaded_model(folder: Path, class_name: str) -> Any:
    """A model of transformers in float32 and eval mode, from a folder's safetensors and config alone.

    Raises:
        UserError: it cannot be loaded as that class, or tensors are missing.
    """
    how = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, report = _read(
        folder, class_name, lambda library: getattr(library, class_name).from_pretrained(str(folder), **how)
    )
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise UserError(f"{folder}: weights lack or misfit {len(wrong)} tensors, among them {wrong[0]}", 3)
    return model.eval().requires_grad_(False)


def _read(folder: Path, class_name: str, read: Callable[[Any], Any]) -> Any:
    """What transformers reads of a folder whose config names no code; its mistakes as a UserError."""
    library = transformers_library()
    refuse_code(folder / "config.json")
    with quiet(library):
        try:
            return read(library)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: transformers cannot load it as {class_name} ({error})", 3) from error
