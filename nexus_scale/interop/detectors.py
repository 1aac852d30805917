"""Detectors that a user names: a folder of transformers with a DETR-like model, which finds things of the names that its config has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import refuse_code
from nexus_scale.interop.folders import parsed_config, weight_files
from nexus_scale.interop.libraries import quiet, transformers_library
from nexus_scale.metrics.features import bytes_of, fingerprint_of
from nexus_scale.metrics.scenes import SURE, Boxes

PREPROCESSOR = "preprocessor_config.json"
PUBLISHED = "https://huggingface.co/facebook/detr-resnet-50"


@dataclass(frozen=True)
class Detector:
    """A detector, found and not loaded.

    Attributes:
        names: of what it finds.
    """

    folder: Path
    names: tuple[str, ...]
    fingerprint: str
    device: str = "cpu"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        library, local = transformers_library(), {"local_files_only": True, "trust_remote_code": False}
        with quiet(library):
            try:
                net = library.AutoModelForObjectDetection.from_pretrained(
                    str(self.folder), use_safetensors=True, dtype=torch.float32, **local
                )
                processor = library.AutoImageProcessor.from_pretrained(str(self.folder), **local)
            except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
                raise UserError(f"{self.folder}: transformers cannot load it as a detector ({error})", 3) from error
        return net.eval().requires_grad_(False).to(self.device), processor

    @torch.no_grad()
    def boxes(self, images: Tensor) -> list[Boxes]:
        """What is in each of (B, 3, H, W) in [-1, 1]: boxes in pixels, above a probability of `SURE`."""
        net, processor = self._loaded
        arrays = [np.asarray(one) for one in bytes_of(images).permute(0, 2, 3, 1)]
        given = processor(images=arrays, return_tensors="pt").to(self.device)
        sizes = [tuple(images.shape[2:])] * len(images)
        found = processor.post_process_object_detection(net(**given), threshold=SURE, target_sizes=sizes)
        named = net.config.id2label
        return [
            Boxes([named[int(label)] for label in one["labels"]], one["scores"].cpu(), one["boxes"].cpu())
            for one in found
        ]


def find_detector(spec: Mapping[str, Any], root: Path, device: torch.device | str = "cpu") -> Detector:
    """What `{folder: PATH}` names.

    Args:
        root: where a relative folder starts.
    Raises:
        UserError: not there, or no such folder.
    """
    if set(spec) != {"folder"}:
        raise UserError(f"detector: got {dict(spec)}; expected {{folder: PATH}} of transformers, such as {PUBLISHED}")
    folder = root / str(spec["folder"])
    said = parsed_config(folder, f"a detector of transformers, such as {PUBLISHED}")
    refuse_code(folder / "config.json")
    names = said.get("id2label")
    if not str(next(iter(said.get("architectures") or [""]))).endswith("ForObjectDetection") or not isinstance(
        names, Mapping
    ):
        raise UserError(
            f"{folder / 'config.json'}: architectures is {said.get('architectures')}; expected a model for object detection with id2label",
            3,
        )
    if not (folder / PREPROCESSOR).is_file():
        raise UserError(
            f"{folder}: no {PREPROCESSOR} there, which says how pictures are scaled; save the image processor, too"
        )
    files = (folder / "config.json", folder / PREPROCESSOR, *weight_files(folder, "model.safetensors"))
    fingerprint = fingerprint_of({file.name: file for file in files}, "detector")
    return Detector(folder, tuple(map(str, names.values())), fingerprint, str(device))
