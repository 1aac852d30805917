"""What lifeiteng/vall-e computes with known weights on known inputs: `python -m tests.golden.valle CHECKOUT`.

CHECKOUT holds https://github.com/lifeiteng/vall-e at commit 9c69096d. Its heavy imports (icefall, lhotse, torchmetrics, matplotlib) do
no arithmetic in the network and are stood in for; nothing of it is installed. Writes valle.npz beside this file: logits, and
gradients of a weighted sum of them, under our parameters' names, computed in float64.
"""

from __future__ import annotations

import importlib
import sys
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus_scale.interop.valle import from_original, to_original
from nexus_scale.models.audio.valle_ar import ValleAR
from nexus_scale.models.audio.valle_nar import ValleNAR

FILE = Path(__file__).with_suffix(".npz")
SIZES: dict[str, Any] = {
    "num_phonemes": 12,
    "codebook_size": 20,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "dropout": 0.0,
}
CODEBOOKS = 4

CASES: dict[str, dict[str, Any]] = {
    "ar": {"L": 5, "T": 9, "lengths": ([5, 3], [9, 6]), "begin": False},
    "ar_begin": {"L": 4, "T": 7, "lengths": ([4, 4, 2], [7, 5, 3]), "begin": True},
    "nar_no_prompt": {"L": 5, "T": 6, "lengths": ([5, 2], [6, 4]), "mode": 0, "level": 1},
    "nar_prefix": {"L": 6, "T": 12, "lengths": ([6, 5], [12, 9]), "mode": 1, "level": 2},
    "nar_segment": {"L": 3, "T": 13, "lengths": ([3, 3], [13, 8]), "mode": 2, "level": 3},
}
"""By name: longest text and codes, lengths of both, and of the second transformer the prefix mode and the codebook."""


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on the name alone, float64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape))


def integers(name: str, shape: tuple[int, ...], high: int) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).integers(0, high, shape))


def fill(net: nn.Module, what: str) -> None:
    """Known weights, float64: norms near one, all else small."""
    net.double().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            centre = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale")) else 0.0
            p.copy_(centre + 0.3 * drawn(f"{what}/{name}", tuple(p.shape)))


def networks(begin: bool = False) -> tuple[ValleAR, ValleNAR]:
    ar, nar = ValleAR(**SIZES, begin=begin), ValleNAR(**SIZES, num_codebooks=CODEBOOKS)
    fill(ar, "ar")
    fill(nar, "nar")
    return ar, nar


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Phonemes (B, L) and which are real, codes (B, T, K) and which are real."""
    case = CASES[name]
    text, sound = (torch.tensor(lengths) for lengths in case["lengths"])
    B, L, T = len(text), case["L"], case["T"]
    phonemes = integers(f"{name}/phonemes", (B, L), SIZES["num_phonemes"])
    codes = integers(f"{name}/codes", (B, T, CODEBOOKS), SIZES["codebook_size"])
    return phonemes, torch.arange(L) < text[:, None], codes, torch.arange(T) < sound[:, None]


def weighted(name: str, logits: Tensor, real: Tensor) -> Tensor:
    """The scalar whose gradients are compared: a sum of logits at real places with known weights."""
    return (logits * drawn(f"{name}/weights", tuple(logits.shape)).to(logits) * real[..., None]).sum()


def prefix_of(name: str) -> int:
    """Frames of the prompt: what their rules make of the shortest sequence, their draw being the least."""
    case = CASES[name]
    return 0 if case["mode"] == 0 else int(0.25 * min(case["lengths"][1]))


# ------------------------------------------------------------------------------------------- their side


def _public(checkout: Path) -> Any:
    """Their module valle.models.valle, with nothing imported that they do not compute with."""

    def module(name: str, path: Path | None = None, **values: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        if path is not None:
            made.__path__ = [str(path)]
        vars(made).update(values)
        sys.modules[name] = made
        return made

    def make_pad_mask(lengths: Tensor) -> Tensor:
        return torch.arange(int(lengths.max())) >= lengths[:, None]

    class Nothing:
        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def __call__(self, *args: Any) -> Tensor:
            return torch.zeros(())

    root = checkout / "valle"
    module("icefall")
    module("icefall.utils", make_pad_mask=make_pad_mask)
    module("torchmetrics")
    module("torchmetrics.classification", MulticlassAccuracy=Nothing)
    for name, path in (
        ("valle", root),
        ("valle.models", root / "models"),
        ("valle.modules", root / "modules"),
        ("valle.data", root),
    ):
        module(name, path)
    module("valle.utils", Transpose=nn.Identity)
    module("valle.data.input_strategies", PromptedFeatures=Nothing)
    module("valle.models.visualizer", visualize=None)
    public = importlib.import_module("valle.models.valle")
    public.NUM_TEXT_TOKENS, public.NUM_AUDIO_TOKENS = SIZES["num_phonemes"], SIZES["codebook_size"]
    return public


class _Draws:
    """Stands in for their generator of levels and segments."""

    def __init__(self, level: int):
        self.level = level

    def choices(self, *args: Any, **kwargs: Any) -> list[int]:
        return [self.level]

    def randint(self, low: int, high: int) -> int:
        return high  # the last segment there is


def _theirs(public: Any, ours: tuple[ValleAR, ValleNAR], mode: int, begin: bool) -> Any:
    """Their module with our weights."""
    torch.set_default_dtype(torch.float64)
    theirs = public.VALLE(
        SIZES["hidden_size"], SIZES["num_heads"], SIZES["depth"], prefix_mode=mode, prepend_bos=begin,
        num_quantizers=CODEBOOKS,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    theirs.load_state_dict(to_original(*ours))
    return theirs.double().eval()


def _computed(public: Any, name: str) -> dict[str, np.ndarray]:
    case, begin = CASES[name], CASES[name].get("begin", False)
    theirs = _theirs(public, networks(begin), case.get("mode", 0), begin)
    phonemes, real_text, codes, real_codes = inputs(name)
    level, seen = case.get("level", 0), []
    layer = theirs.nar_predict_layers[level - 1] if level else theirs.ar_predict_layer
    layer.register_forward_hook(lambda module, given, logits: seen.append(logits))
    theirs.rng = _Draws(level)
    least = torch.randint
    torch.randint = lambda low, high, **kwargs: torch.tensor(low)  # type: ignore[assignment]
    theirs(phonemes, real_text.sum(1), codes, real_codes.sum(1), train_stage=2 if level else 1)
    torch.randint = least  # type: ignore[assignment]
    logits = seen[0]
    weighted(name, logits, compared(name, logits.shape[1])).backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    kept = {"logits": logits.detach().numpy().astype(np.float32)}
    return kept | {
        f"grad/{key}": value.numpy().astype(np.float32) for key, value in _renamed(theirs, grads, level).items()
    }


def compared(name: str, places: int) -> Tensor:
    """Which of the output's places are compared, (B, places) bool: the real ones after the prompt."""
    case = CASES[name]
    lengths = torch.tensor(case["lengths"][1])[:, None]
    if "mode" not in case:
        return torch.arange(places) < lengths + int(case["begin"])
    skipped = prefix_of(name) if case["mode"] == 1 else 0  # a segment before the utterance is not among their outputs
    return torch.arange(places) + skipped < lengths


def _renamed(theirs: nn.Module, grads: Mapping[str, Tensor | None], level: int) -> dict[str, Tensor]:
    """Their gradients under our names: read as if they were weights. A table that is shared has its gradient once, at the embedding."""
    state = {key: torch.zeros_like(value) for key, value in theirs.state_dict().items()}
    state |= {key: value for key, value in grads.items() if value is not None and key in state}
    for k in range(2, CODEBOOKS):
        state[f"nar_predict_layers.{k - 2}.weight"] = state[f"nar_audio_embeddings.{k}.word_embeddings.weight"]
    ar, nar = from_original(state, SIZES["num_heads"])
    return dict((nar if level else ar).state_dict())


SPEECH = {"speech_prefix": 1, "speech_segment": 2}
"""Names of whole inferences, with the prefix mode: text of a prompt (its end not repeated) and a sentence, codes of the prompt."""
ENROLLED = 4
"""Phonemes of the prompt, begin and end counted."""


def speech(name: str) -> tuple[Tensor, Tensor]:
    """Phonemes (1, L) of prompt and sentence, codes (1, P, K) of the prompt."""
    return integers(f"{name}/phonemes", (1, 7), SIZES["num_phonemes"]), integers(
        f"{name}/codes", (1, 5, CODEBOOKS), SIZES["codebook_size"]
    )


def _spoken(public: Any, name: str) -> np.ndarray:
    """Their likeliest codes, (T, K)."""
    theirs = _theirs(public, networks(), SPEECH[name], begin=False)
    phonemes, codes = speech(name)
    with torch.no_grad():
        said = theirs.inference(phonemes, torch.tensor([7]), codes, torch.tensor([ENROLLED]), top_k=1)
    return said[0].numpy().astype(np.int16)


def main() -> None:
    public = _public(Path(sys.argv[1]))
    numbers = {f"{name}/{key}": value for name in CASES for key, value in _computed(public, name).items()}
    numbers |= {f"{name}/said": _spoken(public, name) for name in SPEECH}
    np.savez_compressed(FILE, **numbers)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(numbers)} arrays")


if __name__ == "__main__":
    main()
