"""The video autoencoder against diffusers' AutoencoderKLCogVideoX, and against itself in chunks of other sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.registry import find
from nexus_scale.contracts import UserError
from nexus_scale.interop.causal_vae3d import DIFFUSERS
from nexus_scale.models.vae.causal_vae3d import CausalVAE3D, Chunk

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "block_out_channels": (4, 6, 8, 8),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "latent_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 16,
    "sample_width": 24,
}
CONFIGS = {
    "four_stages": SMALL,
    "two_blocks_no_time": SMALL
    | {"layers_per_block": 2, "temporal_compression_ratio": 1, "block_out_channels": (4, 8, 4, 4)},
    "three_stages": SMALL
    | {
        "block_out_channels": (6, 4, 4),
        "down_block_types": ("CogVideoXDownBlock3D",) * 3,
        "up_block_types": ("CogVideoXUpBlock3D",) * 3,
        "temporal_compression_ratio": 2,
    },
}
OURS: dict[str, Any] = {
    "num_frames": 17,
    "image_size": (16, 16),
    "latent_channels": 3,
    "channels": (4, 8, 8),
    "depth": 1,
    "num_groups": 2,
    "norm_over": "frame",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def randomise(net: torch.nn.Module) -> None:
    """Every parameter random, those that start as zero or one too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))


def pair(name: str, dtype: torch.dtype) -> tuple[Any, CausalVAE3D]:
    theirs = diffusers.AutoencoderKLCogVideoX(**CONFIGS[name]).to(dtype)
    randomise(theirs)
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = CausalVAE3D(**model_args, num_frames=9).to(dtype)
    ours.load_state_dict(state)
    return theirs, ours


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


def both(theirs: Any, ours: CausalVAE3D, what: str, x: Tensor) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Of each: result, gradient of the input, gradients of parameters by diffusers' names."""
    results = []
    for side, net in (("theirs", theirs), ("ours", ours)):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        if side == "ours" and what == "encode":
            y = net.encode(leaf)
        elif side == "ours":  # diffusers takes an even number of latent frames for r times as many
            r, f = net.temporal_ratio, leaf.shape[2]
            y = net.decode(leaf, frames=r * f if f % 2 == 0 else 1 + r * (f - 1))
        else:
            y = net.encode(leaf).latent_dist.parameters if what == "encode" else net.decode(leaf).sample
        direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        (y * direction).sum().backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
        if side == "ours":
            args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
            grads = DIFFUSERS.to_theirs(grads, args)[1]
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad, grads))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("frames", [1, 8, 13, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_equals_diffusers(name: str, frames: int, dtype: torch.dtype) -> None:
    theirs, ours = pair(name, dtype)
    x = torch.randn(1, 3, frames, 16, 24, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (y, dx, grads), (y_ours, dx_ours, grads_ours) = both(theirs, ours, "encode", x)
    assert y.std() > 0.02
    assert error(y_ours, y) < 1e-5
    assert error(dx_ours, dx) < 1e-5
    _same_gradients(grads_ours, grads, "encoder.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_diffusers(name: str, frames: int, dtype: torch.dtype) -> None:
    theirs, ours = pair(name, dtype)
    z = torch.randn(2, 3, frames, 2, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (y, dz, grads), (y_ours, dz_ours, grads_ours) = both(theirs, ours, "decode", z)
    assert y.std() > 0.02
    assert error(y_ours, y) < 1e-5
    assert error(dz_ours, dz) < 1e-5
    _same_gradients(grads_ours, grads, "decoder.")


def _same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], part: str) -> None:
    assert got.keys() == expected.keys()
    # what a norm takes away again has a gradient of zero, and holds rounding noise of either side
    floor = 0.01 * max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        if name.startswith(part):
            assert error(got[name], grad, floor=floor) < 1e-5, name


def test_published_size() -> None:
    with torch.device("meta"):
        net = CausalVAE3D()
        theirs = diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4
        )
    count = sum(p.numel() for p in net.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6, 1) == 215.6
    assert net.latent_shape == (16, 13, 60, 90)


# ---------------------------------------------------------------------------------------------- chunks


def make(**changes: Any) -> CausalVAE3D:
    net = CausalVAE3D(**(OURS | changes)).double()
    randomise(net)
    return net


@pytest.mark.parametrize("frames", [16, 17, 29])
def test_with_norms_of_a_frame_any_chunk_gives_the_same(frames: int) -> None:
    """Values and gradients across chunk borders, down to one latent frame at a time."""
    whole = make(chunk_frames=64, latent_chunk=64)
    x = torch.randn(1, 3, frames, 8, 8, dtype=torch.float64)
    z = torch.randn(1, 3, whole.latent_frames(frames), 2, 2, dtype=torch.float64)
    results = []
    for chunk, latents in ((64, 64), (4, 1), (8, 2), (12, 3)):
        net = make(chunk_frames=chunk, latent_chunk=latents)
        x_leaf, z_leaf = x.clone().requires_grad_(), z.clone().requires_grad_()
        moments, videos = net.encode(x_leaf), net.decode(z_leaf, frames=frames)
        (moments.square().sum() + videos.square().sum()).backward()
        results.append([moments, videos, x_leaf.grad, z_leaf.grad, *(p.grad for p in net.parameters())])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert error(a, b, floor=1e-6) < 1e-9


def test_a_stream_equals_the_whole_to_the_bit() -> None:
    net = make(norm_over="chunk")
    x = torch.randn(2, 3, 25, 16, 16, dtype=torch.float64)
    shards = iter([x[:, :, :9], x[:, :, 9:17], x[:, :, 17:]])
    with torch.no_grad():
        whole = net.encode(x)
        assert torch.equal(torch.cat(list(net.encode_chunks(shards)), dim=2), whole)
        z = whole[:, :3]
        shards = iter([z[:, :, :3], z[:, :, 3:5], z[:, :, 5:]])
        videos = net.decode(z)
        assert torch.equal(torch.cat(list(net.decode_chunks(shards)), dim=2), videos)
    assert videos.shape == x.shape


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 13, 16, 17, 21])
@pytest.mark.parametrize("norm_over", ["chunk", "frame"])
def test_as_many_frames_come_back_as_went_in(norm_over: str, frames: int) -> None:
    """Two latent frames are of 5 frames or of 8; the way there and back in one, which training takes, says what is right."""
    net = make(norm_over=norm_over)
    x = torch.randn(1, 3, frames, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        mean = net.encode(x)[:, :3]
        decoded = net.decode(mean, frames=frames)
        assert decoded.shape == x.shape
        assert torch.equal(decoded, net(x)[0])
        unsaid = net.decode(mean)  # as num_frames, 17, has it
        assert unsaid.shape[2] == (frames if frames % 4 == 1 else frames - 3)
        if frames % 8 == 0:
            assert make(num_frames=8).decode(mean).shape == x.shape
        chunks = iter(mean.split([1] * mean.shape[2], dim=2))
        assert torch.cat(list(net.decode_chunks(chunks, first=frames % 4 == 1)), dim=2).shape == x.shape
        with pytest.raises(ValueError, match=f"a video of {frames + 8} frames has"):
            net.decode(mean, frames=frames + 8)
    with pytest.raises(UserError, match="a video of 6 frames"):
        net.decode(mean, frames=6)


def test_chunks_that_forget_the_past_differ() -> None:
    """The comparison sees a border: frames encoded without what came before give something else."""
    net = make()
    x = torch.randn(1, 3, 17, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        apart = torch.cat([net.encoder(x[:, :, :9], Chunk(True)), net.encoder(x[:, :, 9:], Chunk(False))], dim=2)
        assert error(apart, net.encode(x)) > 1e-3


def test_nothing_looks_ahead() -> None:
    net = make(chunk_frames=64, latent_chunk=64)
    x = torch.randn(1, 3, 17, 8, 8, dtype=torch.float64)
    other = x.clone()
    other[:, :, 9:] = torch.randn(1, 3, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        a, b = net.encode(x), net.encode(other)
        assert error(b[:, :, :3], a[:, :, :3]) < 1e-12 and error(b[:, :, 3:], a[:, :, 3:]) > 1e-3
        assert error(net.encode(x[:, :, :1]), a[:, :, :1]) < 1e-12, "an image is a video of one frame"
        videos, cut = net.decode(a[:, :3]), net.decode(a[:, :3, :3])
        assert error(videos[:, :, :9], cut) < 1e-12


def test_activation_checkpointing_computes_the_same() -> None:
    from nexus_scale.engine.blocks import prepare_blocks

    gradients = []
    for checkpointing in (False, True):
        net = make(chunk_frames=4, latent_chunk=1).train()
        prepare_blocks(net, "vae", activation_checkpointing=checkpointing, compiled=False)
        x = torch.randn(1, 3, 17, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x_hat, mean, logvar = net(x)
        (x_hat.square().sum() + mean.square().sum() + logvar.sum()).backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frames", [2, 3, 4, 6, 12])
def test_frames_that_it_cannot_take_are_refused(frames: int) -> None:
    with pytest.raises(UserError, match=rf"{frames} frames: the autoencoder takes 1 \+ 4k"):
        make().encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channels": (4, 7)}, "does not divide"),
        ({"temporal_ratio": 3}, "power of two"),
        ({"temporal_ratio": 8}, "power of two"),
        ({"chunk_frames": 6}, "multiple of temporal_ratio"),
        ({"image_size": (16, 18)}, "multiples of 4 pixels"),
        ({"num_frames": 6}, "cut it to 5 or pad it to 9"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CausalVAE3D(**(OURS | changes))


def test_initialised_it_reconstructs_something_finite_and_every_parameter_learns() -> None:
    assert find("models", "causal_vae3d") is CausalVAE3D
    torch.manual_seed(0)
    net = CausalVAE3D(**OURS)
    net.init_weights()
    x = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    x_hat, mean, logvar = net(x, torch.randn(1, *net.latent_shape))
    assert x_hat.shape == x.shape and mean.shape == logvar.shape == (1, *net.latent_shape)
    assert x_hat.isfinite().all() and 0.01 < x_hat.std() < 100
    assert (logvar == -4).all()
    (x_hat.square().mean() + mean.square().mean() + logvar.square().mean()).backward()
    assert all(p.grad is not None for p in net.parameters())


# ---------------------------------------------------------------------------------------------- in and out


def test_round_trip_through_a_folder_is_exact(tmp_path: Path) -> None:
    theirs, ours = pair("four_stages", torch.float32)
    args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    folder = DIFFUSERS.write(tmp_path / "vae", ours.state_dict(), args, scaling_factor=0.7)
    loaded, report = diffusers.AutoencoderKLCogVideoX.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.scaling_factor == 0.7
    for name, p in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p)
    again, state = DIFFUSERS.read(tmp_path)
    assert again == args
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())


def test_what_is_not_cogvideox_is_refused(tmp_path: Path) -> None:
    theirs, ours = pair("four_stages", torch.float32)
    config, state = json.loads(json.dumps(dict(theirs.config))), theirs.state_dict()
    with pytest.raises(UserError, match="use_quant_conv"):
        DIFFUSERS.to_ours(config | {"use_quant_conv": True}, state)
    with pytest.raises(UserError, match="among them extra"):
        DIFFUSERS.to_ours(config, state | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match="is missing"):
        DIFFUSERS.to_ours(config, {name: t for name, t in state.items() if "mid_block" not in name})
    args, _ = DIFFUSERS.to_ours(config, state)
    with pytest.raises(UserError, match="cannot be exported"):
        DIFFUSERS.to_theirs(ours.state_dict(), args | {"norm_over": "frame"})
