"""A vocoder in the place of a codec: mels are stored as they are, and any vocoder of the same settings reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_scale.conditioners.audio import CODES, CodeConditioner
from nexus_scale.interop.encoders import OwnCodec
from nexus_scale.media.audio import Audio, cut, ended
from nexus_scale.models.audio.mel_vocoder import MelVocoder

SMALL = {
    "sample_rate_hz": 8000,
    "hop": 16,
    "window": 64,
    "num_mels": 6,
    "hidden_channels": 8,
    "mlp_channels": 8,
    "depth": 1,
}


def codec(**changes: int) -> OwnCodec:
    network = MelVocoder(**SMALL | changes)
    network.init_weights()
    return OwnCodec(network, "mel_vocoder", SMALL | changes)


def test_mels_are_codes_that_are_numbers() -> None:
    one, other = codec(), codec(depth=2)
    waves = [0.1 * torch.randn(1, length, generator=torch.Generator().manual_seed(length)) for length in (160, 170)]
    first, second = (row[CODES] for row in CodeConditioner(one).encode(waves))
    assert first.dtype == np.float32 and first.shape == (10, 6) and second.shape == (11, 6)
    torch.testing.assert_close(torch.from_numpy(first), one.network.encode(waves[0][None])[0])
    assert one.fingerprint == other.fingerprint != codec(hop=8).fingerprint


@pytest.mark.parametrize("codes", [torch.tensor([[[-3.0], [2.0], [5.0]]]), torch.tensor([[[3], [2], [5]]])])
def test_the_end_of_codes_is_marked_whatever_they_are(codes: torch.Tensor) -> None:
    marked = cut(codes, torch.tensor([[True, True, False]]))
    assert marked.dtype == codes.dtype and ended(marked).tolist() == [[False, False, True]]
    assert torch.equal(marked[:, :2], codes[:, :2])


def test_a_wave_is_as_long_as_its_mels() -> None:
    medium = Audio(8000, codec())
    mels = cut(torch.randn(1, 5, 6), torch.tensor([[True] * 3 + [False] * 2]))
    (wave,) = medium.decode(mels)
    assert wave.shape == (1, 48) and float(wave.abs().max()) <= 1
