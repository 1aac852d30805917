"""Sound as semantic tokens: which group of features each stretch of it belongs to. What SoundStorm is told, and AudioLM's first stage.

Source: Borsos et al. 2022 (AudioLM), section III.B: k-means over features of which each dimension has mean 0 and variance 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import CondField, Conditioner, UserError
from nexus_scale.interop.speech_features import Features, open_features
from nexus_scale.io.durable import atomic_write, replacing
from nexus_scale.models.audio.quantization import nearest

SEMANTIC = "semantic"
CENTRES, SETTINGS = "centres.safetensors", "semantic.json"
"""The files of a folder of `cluster_features`."""


class SemanticConditioner(Conditioner):
    """Waves (1, T) in [-1, 1] at the features' rate -> `semantic` (T',) int16, T' = ceil(T / hop).

    Args:
        features: of a sound.
        every: frames of features that a token stands for; their mean is looked at.
        centres: (V, D), of features after `shift` and `scale` (D,).
    Attributes:
        hop: samples that a token stands for.
        num_tokens: V.
    """

    reads = "audio"

    def __init__(self, features: Features, every: int, centres: Tensor, shift: Tensor, scale: Tensor):
        self.features, self.every, self.centres, self.shift, self.scale = features, every, centres, shift, scale
        self.sample_rate_hz, self.hop, self.num_tokens = features.sample_rate_hz, features.hop * every, len(centres)
        self.fields = {SEMANTIC: CondField((None,), "int16")}
        digest = xxhash.xxh3_128(f"{features.fingerprint} by {every}".encode())
        for table in (centres, shift, scale):
            digest.update(table.contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def open(cls, spec: Mapping[str, Any], root: Path, device: torch.device | str = "cpu") -> SemanticConditioner:
        """What {folder: PATH} of `cluster_features` names.

        Raises:
            UserError: no such folder, or an encoder of features that is not there.
        """
        from safetensors.torch import load_file

        if set(spec) != {"folder"}:
            raise UserError(f"data.encoders.semantic: got {dict(spec)}; expected a folder of cluster_features")
        folder = root / str(spec["folder"])
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tables = load_file(folder / CENTRES)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no semantic tokens there ({error}); make them by cluster_features", 3) from None
        features = open_features(settings["features"], root, device)
        return cls(features, int(settings["every"]), tables["centres"], tables["shift"], tables["scale"])

    def save(self, folder: Path, features: Mapping[str, Any]) -> None:
        """Writes a folder that `open` reads; `features` as `open_features` takes them."""
        from safetensors.torch import save_file

        tables = {"centres": self.centres, "shift": self.shift, "scale": self.scale}
        with replacing(folder / CENTRES) as partial_file:
            save_file({name: table.contiguous() for name, table in tables.items()}, partial_file)
        told = {
            "features": dict(features),
            "every": self.every,
            "num_tokens": self.num_tokens,
            "fingerprint": self.fingerprint,
        }
        atomic_write(folder / SETTINGS, json.dumps(told, indent=1).encode())

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        return [{SEMANTIC: self._tokens(wave).numpy().astype(np.int16)} for wave in values]

    def _tokens(self, wave: Tensor) -> Tensor:
        pooled = pooled_features(self.features, wave, self.every)
        return nearest((pooled - self.shift) / self.scale, self.centres)


def pooled_features(features: Features, wave: Tensor, every: int) -> Tensor:
    """The features of a wave (1, T) or (T,), the mean of each `every` frames: (T', D)."""
    found = features.of(wave.reshape(-1))
    return torch.stack([part.mean(0) for part in found.split(every)])


def grouped(rows: Tensor, count: int, *, rounds: int, seed: int) -> Tensor:
    """Centres (count, D) of rows (N, D): k-means++ on a part of them, then Lloyd's rounds over all, until none moves.

    Source: Arthur & Vassilvitskii 2007 (k-means++).
    Raises:
        UserError: fewer rows than centres.
    """
    if len(rows) < count:
        raise UserError(f"clusters: got {count} of {len(rows)} tokens' features; expected at most as many", 3)
    rng = np.random.default_rng(seed)
    some = rows[torch.from_numpy(rng.permutation(len(rows))[: 32 * count])]
    centres = some[:1]
    away = (some - centres).square().sum(1)
    for _ in range(count - 1):
        total = away.double().cumsum(0)
        chosen = int((total <= rng.random() * total[-1]).sum().clamp(max=len(some) - 1))
        centres = torch.cat([centres, some[chosen : chosen + 1]])
        away = torch.minimum(away, (some - centres[-1]).square().sum(1))
    for _ in range(rounds):
        which = torch.cat([nearest(part, centres) for part in rows.split(1 << 14)])
        sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, which, rows.double())
        sizes = torch.bincount(which, minlength=count)[:, None]
        moved = torch.where(sizes > 0, (sums / sizes.clamp(min=1)).float(), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
