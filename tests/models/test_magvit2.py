"""MAGVIT-v2's tokenizer: layers, outputs and gradients of the public video model; codes of first frames are those of images."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.magvit2 import ORIGINAL
from nexus_scale.models.gan.video_discriminator import VideoDiscriminator, blurred
from nexus_scale.models.layers import init
from nexus_scale.models.vae.causal_vae3d import CausalConv3d
from nexus_scale.models.vae.magvit2 import Magvit2
from tests.golden.open_magvit2 import BITS, CHANNELS, CLIP, DEPTH, FILE, LATENTS, MULTIPLES, weight
from tests.golden.pythae import drawn, projected


def small(**changes: Any) -> Magvit2:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_frames": 5, "image_size": (8, 12), "bits": 4, "channels": (4, 8, 8), "depth": 1}
    net = Magvit2(**{**sizes, "num_groups": 2, **changes})
    net.init_weights()
    return net


def test_codes_clips_and_gradients_are_those_of_the_public_video_model() -> None:
    channels = tuple(CHANNELS * times for times in MULTIPLES)
    net = Magvit2(bits=BITS, channels=channels, depth=DEPTH, temporal_ratio=2, norm_over="chunk", image_size=(8, 12))
    shapes = {name: value.shape for name, value in ORIGINAL.theirs_of(net, net.state_dict()).items()}
    args, state = ORIGINAL.to_ours(None, {name: weight(name, shape) for name, shape in shapes.items()})
    assert (args["channels"], args["depth"], args["bits"], args["temporal_ratio"]) == (channels, DEPTH, BITS, 2)
    net.load_state_dict(state)
    golden = np.load(FILE)
    for side, compute, shape in (("encoder", net.latents, CLIP), ("decoder", net.pixels, LATENTS)):
        x = drawn(f"{side} input", shape).requires_grad_()
        y = compute(x)
        net.zero_grad()
        (y * drawn(f"{side} onto", y.shape)).sum().backward()
        every = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
        own = {name: of for name, of in ORIGINAL.theirs_of(net, every).items() if name.startswith(f"{side}.")}
        assert x.grad is not None
        for key, got in (
            (side, y.detach().numpy()),
            (f"{side}_slope", x.grad.numpy()),
            (f"{side}_gradients", projected(own)),
        ):
            assert np.linalg.norm(got - golden[key]) < 1e-5 * np.linalg.norm(golden[key]), key


def test_an_image_has_the_codes_of_a_first_frame_and_nothing_looks_ahead() -> None:
    net, x = small(), torch.randn(2, 3, 9, 8, 12)
    codes, first = net.encode(x), net.encode(x[:, :, :1])
    assert codes.shape == (2, *net.code_shape(9, 8, 12)) == (2, 3, 2, 3) and torch.equal(codes[:, :1], first)
    assert torch.equal(net.encode(x[:, :, :5]), codes[:, :2])
    clip = net.decode(codes)
    torch.testing.assert_close(clip, net(x).x_hat)
    torch.testing.assert_close(net.decode(codes[:, :2]), clip[:, :, :5])
    torch.testing.assert_close(net.decode(codes.flatten(1)), clip)
    torch.testing.assert_close(net(x[1:]).x_hat, net(x).x_hat[1:])
    assert not torch.equal(small(norm_over="chunk").encode(x)[:, :1], small(norm_over="chunk").encode(x[:, :, :1]))


def test_an_image_in_two_dimensions_is_a_clip_of_one_frame() -> None:
    conv, x = CausalConv3d(4, 6, stride=(2, 2, 2), zeros=True), torch.randn(2, 4, 1, 6, 8, requires_grad=True)
    init.uniform_(conv)
    whole, tail = conv(x, torch.zeros(2, 4, 2, 6, 8))
    alone, own = conv(x)
    torch.testing.assert_close(alone, whole)
    assert torch.equal(own, tail)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), (x, conv.weight)) for y in (alone, whole)), strict=True):
        torch.testing.assert_close(one, other)


def test_what_images_teach_an_inflated_network_holds_for_all_frames() -> None:
    """Before and after a step on images, a clip is the images of its first and every fourth frame."""
    net, x = small(inflates=True), torch.randn(2, 3, 9, 8, 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        with torch.no_grad():
            clip, images = net(x), [net(x[:, :, frame : frame + 1]) for frame in (0, 4, 8)]
        assert torch.equal(clip.codes, torch.cat([image.codes for image in images], dim=1))
        for frame in range(9):
            own = images[(frame + 3) // 4].x_hat[:, :, 0]
            torch.testing.assert_close(clip.x_hat[:, :, frame], own, atol=1e-4, rtol=1e-4)
        before = net.up[0].conv.weight.detach().clone()  # type: ignore[union-attr]
        (net(torch.randn(2, 3, 1, 8, 12)).x_hat - 1).square().mean().backward()
        optimizer.step()
        assert not torch.equal(net.up[0].conv.weight, before)  # type: ignore[union-attr]


def test_the_papers_sizes() -> None:
    with torch.device("meta"):
        net, critic = Magvit2(), VideoDiscriminator()
        assert net(*net.example_inputs(1, 0, "meta")).codes.shape == (1, 5, 16, 16) and net.codebook_size == 1 << 18
        assert critic(*critic.example_inputs(2, 0, "meta")).shape == (2, 1, 2, 8, 8)
    assert sum(p.numel() for p in net.parameters()) == 370_547_349


def test_blurring_weighs_neighbours_and_keeps_what_is_even() -> None:
    line = torch.arange(6.0).square().view(1, 1, 1, 1, 6).expand(1, 1, 3, 3, 6)
    padded = torch.cat([line[0, 0, 0, 0, :1], line[0, 0, 0, 0], line[0, 0, 0, 0, -1:]])
    expected = torch.stack([padded[2 * i : 2 * i + 3] @ torch.tensor([0.25, 0.5, 0.25]) for i in range(3)])
    torch.testing.assert_close(blurred(line)[0, 0, 0, 0], expected)
    assert blurred(torch.ones(1, 1, 1, 4, 5)).shape == (1, 1, 1, 2, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small(num_frames=4), "a video of 4 frames: the tokenizer takes 1 + 4k frames"),
        (lambda: small(image_size=(8, 10)), "frames of 8 x 10: crop or resize them to multiples of 4"),
        (lambda: small(temporal_ratio=8), "temporal_ratio: got 8"),
        (lambda: small(num_groups=3), "3 does not divide channels"),
        (lambda: small(bits=0), "bits: got 0"),
        (lambda: VideoDiscriminator(depth=0), "depth: got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make()
    with pytest.raises(ValueError, match="expected \\(B, 3, F, H, W\\)"):
        small().encode(torch.zeros(1, 3, 8, 8))
