"""What vocos 0.1.0 computes with known weights on known inputs: `python -m tests.golden.vocos FOLDER`.

FOLDER holds that wheel, unpacked. It imports torchaudio for a scale that is not used here, which is stood in for; nothing of it is
installed. Writes vocos.npz beside this file: waveforms, and gradients of a weighted sum of them under our parameters' names.
"""

from __future__ import annotations

import sys
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus_scale.models.audio.spectral_codec import Decoder, Frames

FILE = Path(__file__).with_suffix(".npz")
LATENTS, CHANNELS, MLP, DEPTH = 6, 8, 20, 2
CASES: dict[str, tuple[int, int, int]] = {"four_hops": (32, 8, 7), "two_hops": (16, 8, 5), "one_frame": (24, 8, 1)}
"""By name: window, hop, frames."""


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on the name alone, float32."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def decoder(name: str) -> Decoder:
    """Known weights: norms near one, all else small."""
    window, hop, _ = CASES[name]
    net = Decoder(Frames(window, hop), CHANNELS, MLP, DEPTH, LATENTS).eval()
    with torch.no_grad():
        for key, p in net.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            p.copy_(centre + 0.3 * drawn(f"{name}/{key}", tuple(p.shape)))
    return net


def latents(name: str) -> Tensor:
    return drawn(f"{name}/latents", (2, LATENTS, CASES[name][2]))


def weighted(name: str, waves: Tensor) -> Tensor:
    """The scalar whose gradients are compared: of waves (B, T)."""
    return (waves * drawn(f"{name}/weights", tuple(waves.shape))).sum()


def theirs_of(ours: str) -> str:
    """Their name of our parameter: `backbone.` or `head.` and so on."""
    if ours.startswith("head."):
        return ours.replace("head.", "head.out.")
    name = ours.removeprefix("trunk.")
    for mine, other in (
        ("norm_in", "norm"), ("norm_out", "final_layer_norm"), ("blocks", "convnext"), ("depthwise", "dwconv"),
        ("up.", "pwconv1."), ("down.", "pwconv2."), ("scale", "gamma"),
    ):  # fmt: skip
        name = name.replace(mine, other)
    return f"backbone.{name}"


# ------------------------------------------------------------------------------------------- their side


def _public(folder: Path) -> Any:
    made = types.ModuleType("torchaudio.functional.functional")
    vars(made).update(_hz_to_mel=None, _mel_to_hz=None)
    sys.modules |= {
        "torchaudio": types.ModuleType("torchaudio"),
        "torchaudio.functional": types.ModuleType("torchaudio.functional"),
        made.__name__: made,
    }
    package = types.ModuleType("vocos")
    package.__path__ = [str(folder / "vocos")]
    sys.modules["vocos"] = package
    from vocos import heads, models  # type: ignore[import-not-found]

    return heads, models


class _Theirs(nn.Module):
    def __init__(self, public: Any, window: int, hop: int):
        super().__init__()
        heads, models = public
        self.backbone = models.VocosBackbone(LATENTS, CHANNELS, MLP, DEPTH)
        self.head = heads.ISTFTHead(CHANNELS, window, hop, padding="same")

    def forward(self, z: Tensor) -> Tensor:
        waves: Tensor = self.head(self.backbone(z))
        return waves


def _computed(public: Any, name: str) -> Mapping[str, np.ndarray]:
    window, hop, _ = CASES[name]
    ours, theirs = decoder(name), _Theirs(public, window, hop)
    names = {key: theirs_of(key) for key, _ in ours.named_parameters()}
    state = dict(theirs.state_dict()) | {names[key]: value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    waves = theirs(latents(name))
    weighted(name, waves).backward()
    parameters = dict(theirs.named_parameters())
    assert set(parameters) == set(names.values())
    return {"waves": waves.detach().numpy()} | {f"grad/{key}": parameters[names[key]].grad.numpy() for key in names}


if __name__ == "__main__":
    found = _public(Path(sys.argv[1]))
    np.savez_compressed(
        FILE, **{f"{name}/{key}": value for name in CASES for key, value in _computed(found, name).items()}
    )
