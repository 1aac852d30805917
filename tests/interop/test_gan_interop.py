"""GAN networks in the files of public code, out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import UserError
from nexus_scale.engine.checkpoint import newest
from nexus_scale.generate.export import export_run
from nexus_scale.generate.trained import Trained
from nexus_scale.interop import dcgan_critic, dcgan_generator, sngan_generator
from nexus_scale.interop.init_from import opened
from nexus_scale.models.gan.dcgan_critic import DCGANCritic
from nexus_scale.models.gan.dcgan_generator import DCGANGenerator
from nexus_scale.models.gan.sngan_generator import SNGANGenerator
from tests.generate.test_prompts import trained_on_made_up_data
from tests.golden import gan_networks as golden

GENERATOR: dict[str, Any] = {"image_size": 24, "image_channels": 2, "noise_size": 5, "hidden_size": 3, "depth": 3}
CRITIC: dict[str, Any] = {"image_size": 12, "image_channels": 1, "hidden_size": 2, "depth": 2}
RESIDUAL: dict[str, Any] = {"image_size": 12, "noise_size": 5, "widths": (6, 4, 2)}


def example(*layers: nn.Module) -> nn.Module:
    """Layers as pytorch/examples names them."""
    return nn.ModuleDict({"main": nn.Sequential(*layers)})


def published(critic: bool) -> Any:
    """The example's classes, of other sizes."""
    if critic:
        return example(
            nn.Conv2d(1, 2, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(2, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4),
            nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 0, bias=False),
        )  # fmt: skip
    layers: list[nn.Module] = []
    for i, (before, width) in enumerate(((5, 12), (12, 6), (6, 3))):
        shape = (3, 1, 0) if i == 0 else (4, 2, 1)
        layers += [nn.ConvTranspose2d(before, width, *shape, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return example(*layers, nn.ConvTranspose2d(3, 2, 4, 2, 1, bias=False), nn.Tanh())


@pytest.mark.parametrize("critic", [False, True])
def test_a_dcgan_goes_to_pytorchs_example_and_back(critic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = DCGANCritic(**CRITIC) if critic else DCGANGenerator(**GENERATOR)
    net.init_weights()
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    form, args = (dcgan_critic.ORIGINAL, CRITIC) if critic else (dcgan_generator.ORIGINAL, GENERATOR)
    _, tensors = form.to_theirs(net.state_dict(), args)
    theirs = published(critic)
    theirs.load_state_dict(tensors)
    theirs.eval(), net.eval()
    x = golden.waves((2, 1, 12, 12) if critic else (2, 5))
    expected = theirs["main"](x if critic else x[:, :, None, None])
    torch.testing.assert_close(net(x, {}).view_as(expected), expected, rtol=1e-5, atol=1e-6)

    file = form.write(tmp_path, net.state_dict(), args) / form.file
    found, state = form.read(file)
    assert found == args and all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    spec = InitFrom(format="original", path=str(file))
    with opened(spec, net, tmp_path) as read:
        for name, value in net.state_dict().items():
            assert torch.equal(read(name, 0, value.numel()).view(value.shape), value)
    wider = DCGANCritic(**CRITIC | {"hidden_size": 4}) if critic else DCGANGenerator(**GENERATOR | {"hidden_size": 4})
    with pytest.raises(UserError, match="hidden_size"), opened(spec, wider, tmp_path):
        pass


@pytest.mark.parametrize("classes", [0, 3])
def test_a_residual_generator_has_the_names_of_the_authors(classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = {**RESIDUAL, "image_channels": 3, "num_classes": classes}
    net = SNGANGenerator(**args)
    net.init_weights()
    form = sngan_generator.ORIGINAL
    file = form.write(tmp_path, net.state_dict(), args) / form.file
    _, tensors = form.to_theirs(net.state_dict(), args)
    norm = "block2/b1/gammas/W" if classes else "block2/b1/gamma"
    assert {"l1/W", "block3/c_sc/b", norm, "block3/b2/avg_var", "b4/beta", "l4/W"} < set(tensors)
    found, state = form.read(file)
    assert found == args and all(torch.equal(state[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("recipe", ["gan/tiny_dcgan_fashion_mnist", "gan/tiny_acgan_fashion_mnist"])
def test_the_export_of_a_run_begins_another(recipe: str, tmp_path: Path) -> None:
    """The averaged generator with its running statistics: what `nexus sample` draws with."""
    place = trained_on_made_up_data(tmp_path, recipe)
    (file,) = export_run(place).glob("*.safetensors")
    trained = Trained(place.run, place)
    drawing, stored = trained.nets["model"], newest(place.run.checkpoints)
    assert stored is not None
    with opened(InitFrom(format="original", path=str(file)), drawing, tmp_path) as read:
        for name, value in drawing.state_dict().items():
            assert torch.equal(read(name, 0, value.numel()).view(value.shape), value), name
            assert torch.equal(value, stored.tensor(f"ema/{name}.{'buffer' if 'running' in name else 'ema'}")), name
    assert any(not torch.equal(value, stored.tensor(f"model/{n}.fp32")) for n, value in drawing.named_parameters())
