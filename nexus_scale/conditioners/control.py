"""Pictures as what drawings are to follow: edges, blurred or small pictures, sketches, silhouettes; made without a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.contracts import CondField, Conditioner, UserError
from nexus_scale.processes.followed import MAKERS, maker

CONTROL, MAKER = "control", "maker"


class ControlConditioner(Conditioner):
    """Images (3, H, W) uint8 -> `control` (3, H, W) uint8 of the same size.

    Args:
        name: of the maker, see `processes.followed`.
        settings: its own; what is left out has its default.
    """

    reads = "image"

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None):
        self.maker = maker(name, settings or {})
        self.fields = {CONTROL: CondField((3, None, None), "uint8")}
        self.settings: dict[str, Any] = {MAKER: name, **dataclasses.asdict(self.maker)}
        self.fingerprint = " ".join(f"{key}={value}" for key, value in self.settings.items())

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        return [{CONTROL: self.maker(torch.as_tensor(image)).numpy()} for image in values]


def made_as(encoder: Mapping[str, Any], image: Tensor, what: str) -> Tensor:
    """The condition of an image (3, H, W) uint8, as a manifest says of its own how they were made.

    Raises:
        UserError: it says nothing.
    """
    if encoder.get(MAKER) not in MAKERS:
        raise UserError(
            f"{what}: the data do not say how their pictures were made (precompute_controls); give the picture to follow itself"
        )
    settings = {key: value for key, value in encoder.items() if key not in (MAKER, "kind", "fingerprint")}
    return torch.from_numpy(ControlConditioner(str(encoder[MAKER]), settings).encode([image])[0][CONTROL])
