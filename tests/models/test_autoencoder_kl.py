"""The image autoencoder against diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import UserError
from nexus_scale.interop.autoencoder_kl import DIFFUSERS, OLD_NAMES
from nexus_scale.interop.init_from import opened
from nexus_scale.interop.layout import of_now
from nexus_scale.models.vae.autoencoder_kl import AutoencoderKL

diffusers = pytest.importorskip("diffusers")


def config_of(channels: tuple[int, ...], **more: Any) -> dict[str, Any]:
    stages = len(channels)
    types = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    return {
        "block_out_channels": channels,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 32,
        **types,
        **more,
    }


CONFIGS = {
    "stable_diffusion": config_of((8, 12, 16, 16), layers_per_block=2),
    "flux": config_of((8, 16, 12), latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "no_attention": config_of((16, 8), latent_channels=3, mid_block_add_attention=False),
}


def pair(name: str) -> tuple[Any, AutoencoderKL]:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**CONFIGS[name])
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = AutoencoderKL(**model_args)
    ours.load_state_dict(state)
    return theirs, ours


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


@pytest.mark.parametrize(
    ("name", "size"), [("stable_diffusion", (40, 24)), ("flux", (20, 12)), ("no_attention", (6, 14))]
)
def test_outputs_and_gradients_are_diffusers(name: str, size: tuple[int, int]) -> None:
    theirs, ours = pair(name)
    x = torch.randn(2, 3, *size)
    moments = ours.encode(x)
    distribution = theirs.encode(x).latent_dist
    assert error(moments, distribution.parameters) < 1e-5
    eps = torch.randn_like(distribution.mean)
    x_hat, mean, logvar, last = ours(x, eps, True)
    expected = theirs.decode(distribution.mean + distribution.std * eps).sample
    assert error(x_hat, expected) < 1e-5
    assert error(mean, distribution.mean) < 1e-5 and error(logvar, distribution.logvar) < 1e-5
    assert error(ours.decoder["conv_out"](last), expected) < 1e-5
    weight = torch.randn_like(expected)
    (x_hat * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    _, named = DIFFUSERS.to_theirs(gradients, DIFFUSERS.model_args(dict(theirs.config)))
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for key, p in theirs.named_parameters():
        # a bias before a norm nearly cancels in its group: it is measured against a hundredth of the largest
        assert error(named[key], p.grad, 1e-2 * largest) < 1e-5, key


def test_an_export_is_loaded_by_diffusers_and_read_again(tmp_path: Any) -> None:
    theirs, ours = pair("flux")
    args = DIFFUSERS.model_args(dict(theirs.config))
    DIFFUSERS.write(tmp_path, ours.state_dict(), args)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in theirs.state_dict().items())
    read_args, state = DIFFUSERS.read(tmp_path)
    assert read_args == args and all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_folders_with_the_old_names_of_attention_are_read(tmp_path: Any) -> None:
    theirs, ours = pair("stable_diffusion")
    DIFFUSERS.write(tmp_path, ours.state_dict(), DIFFUSERS.model_args(dict(theirs.config)))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {new: before for before, new in OLD_NAMES.items()}
    save_file({of_now(key, old): value for key, value in load_file(file).items()}, file)
    assert any(".proj_attn." in key for key in load_file(file))
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path) is not None, "which diffusers reads, too"
    _, state = DIFFUSERS.read(tmp_path)
    with opened(InitFrom(format="diffusers", path=str(tmp_path)), ours, tmp_path) as read:
        for key, p in ours.named_parameters():
            assert torch.equal(state[key], p) and torch.equal(read(key, 0, p.numel()).view(p.shape), p)


def test_the_published_sizes_have_their_parameters() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in AutoencoderKL(**settings).parameters())
            for settings in ({}, {"latent_channels": 16, "quant_conv": False})
        ]
    assert [round(count / 1e6, 2) for count in counts] == [83.65, 83.82]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": (48, 64)}, "num_groups: 32 does not divide"),
        ({"image_size": 20}, "need a multiple of 8"),
        ({"depth": 0}, "depth"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AutoencoderKL(**settings)


def test_images_that_do_not_fit_are_refused() -> None:
    net = AutoencoderKL(channels=(2, 2), num_groups=1, depth=1, image_size=4)
    with pytest.raises(ValueError, match="multiples of 2"):
        net.encode(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match="set latent_channels"):
        net.decode(torch.zeros(1, 5, 2, 2))
