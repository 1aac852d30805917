"""The spectral codec: Vocos's decoder, frames that are split and joined, books in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.config.registry import find
from nexus_scale.contracts import UserError
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.models.audio.quantization import Seen
from nexus_scale.models.audio.spectral_codec import Frames, SpectralCodec, Tones
from tests.golden import vocos as golden

SMALL: dict[str, Any] = {
    "sample_rate_hz": 8000,
    "hop": 8,
    "window": 32,
    "hidden_channels": 8,
    "mlp_channels": 16,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "latent_channels": 6,
    "num_codebooks": 3,
    "codebook_size": 8,
    "kmeans_iterations": 3,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(**changes: Any) -> SpectralCodec:
    torch.manual_seed(0)
    net = SpectralCodec(**(SMALL | changes))
    net.init_weights()
    return net


def waves(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", golden.CASES)
def test_the_decoder_is_vocos(name: str) -> None:
    stored = np.load(golden.FILE, allow_pickle=False)
    net = golden.decoder(name)
    found = net(golden.latents(name))[:, 0]
    torch.testing.assert_close(found, torch.from_numpy(stored[f"{name}/waves"]), atol=1e-5, rtol=1e-5)
    golden.weighted(name, found).backward()
    for key, p in net.named_parameters():
        expected = torch.from_numpy(stored[f"{name}/grad/{key}"])
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize(("window", "hop"), [(32, 8), (16, 8), (30, 10), (12, 4)])
@pytest.mark.parametrize("samples", [1, 8, 40, 77])
def test_frames_are_joined_to_what_was_split(window: int, hop: int, samples: int) -> None:
    frames, x = Frames(window, hop), waves(2, samples)
    split = frames.split(x)
    assert split.shape == (2, window // 2 + 1, -(-samples // hop))
    hann = torch.hann_window(window)
    joined = frames.join(split * hann.square().sum().sqrt())[:, :samples]
    torch.testing.assert_close(joined, x, atol=1e-4, rtol=0)


def test_a_tone_that_is_held_keeps_its_pitch() -> None:
    """440 Hz are 7.04 waves a hop: equal frames could only make 7."""
    frames, amplitude = Frames(512, 128), torch.zeros(1, 80, 400)
    amplitude[0, 36] = 0.5
    wave = frames.join(torch.zeros(1, frames.bins, 400, dtype=torch.complex64), Tones(frames, 8000, 80)(amplitude))[0]
    at = torch.arange(frames.margin, frames.margin + len(wave), dtype=torch.float64)
    torch.testing.assert_close(wave.double(), 0.5 * torch.sin(2 * torch.pi * 440 / 8000 * at), atol=1e-4, rtol=0)


def test_any_length_is_coded_and_the_books_code_what_is_left() -> None:
    net = make().eval()
    x = waves(4, 1, 512)
    with torch.no_grad():
        net.quantizer.follow(
            [Seen(net(x).latents, net(x).codes, torch.arange(4))],
            lambda value: value.clone(),
            torch.Generator().manual_seed(0),
        )
        z = net.encoder(x)
        errors = [float((net.quantizer(z, n).latents - z).square().mean()) for n in (1, 2, 3)]
        assert errors[0] > errors[1] > errors[2] > 0
        codes = net.encode(x)
        assert torch.equal(codes[..., :2], net.encode(x, 2))
        assert torch.allclose(net.decode(codes)[..., :512], net(x).x_hat, atol=1e-5)
        for samples in (1, 7, 8, 9, 401):
            codes = net.encode(x[:1, :, :samples])
            assert codes.shape == (1, -(-samples // 8), 3)
            assert net.decode(codes).shape == (1, 1, 8 * codes.shape[1])


def test_initialised_every_parameter_learns_and_checkpointing_computes_the_same() -> None:
    assert find("models", "spectral_codec") is SpectralCodec
    gradients = []
    for checkpointing in (False, True):
        net = make(centred=True, tones=12).train()
        prepare_blocks(net, "spectral_codec", activation_checkpointing=checkpointing, compiled=False)
        out = net(waves(2, 1, 256))
        assert out.x_hat.isfinite().all() and out.x_hat.std() > 1e-4
        out.x_hat.square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_silence_has_gradients_that_are_finite() -> None:
    net = make().train()
    x = torch.zeros(1, 1, 64, requires_grad=True)
    net(x).x_hat.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 15}, r"window: got 15 with hop 8; expected an even number of at least 16"),
        ({"window": 14}, "at least 16"),
        ({"hop": 7}, "the hop even"),
        ({"decoder_depth": 0}, "decoder_depth: got 0"),
        ({"codebook_decay": 1.0}, r"spectral_codec\.codebook_decay: got 1\.0"),
        ({"num_codebooks": 0}, r"spectral_codec\.num_codebooks: got 0"),
        ({"tones": 76}, r"spectral_codec\.tones: got 76; expected at most 75, below half of 8000 Hz"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SpectralCodec(**(SMALL | changes))
