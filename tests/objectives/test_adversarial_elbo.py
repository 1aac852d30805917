"""The autoencoder's adversarial training: its loss is latent diffusion's, its perceptual distance is that of the `lpips` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import Batch, UserError
from nexus_scale.interop.init_from import opened
from nexus_scale.interop.lpips import ORIGINAL
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.gan.patch_discriminator import Layer, PatchDiscriminator
from nexus_scale.models.vae.autoencoder_kl import AutoencoderKL
from nexus_scale.models.vae.lpips import LPIPS
from nexus_scale.objectives.adversarial_elbo import DISCRIMINATOR, GENERATOR, AdversarialELBO

VALUES = 3 * 16 * 16


def nets() -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "model": AutoencoderKL(image_size=16, channels=(4, 8), depth=1, num_groups=2),
        "discriminator": PatchDiscriminator(hidden_size=4, depth=2, num_groups=2),
        "perceptual": LPIPS(channels=(4, 8), depth=(1, 2)),
    }
    for net in found.values():
        net.init_weights()
    found["perceptual"].requires_grad_(False)
    return found


def batch_of(x: Tensor, rows: slice) -> Batch:
    positions = torch.arange(len(x))[rows]
    return Batch({"image": x[rows]}, positions, positions)


def rng_of(rows: slice, step: int) -> ProgressRng:
    return ProgressRng(0, step, GENERATOR, torch.arange(4)[rows], torch.device("cpu"))


def test_the_loss_is_latent_diffusions_whatever_the_micro_batches() -> None:
    """L1 + LPIPS + 1e-6 KL + adaptive weight * 0.5 * adversarial: latent diffusion's sum over an image's values, divided by these."""
    found, x = nets(), torch.rand(4, 3, 16, 16) * 2 - 1
    model, objective = found["model"], AdversarialELBO(latent_shape=(4, 8, 8), discriminator_begins=0)

    def gradients_of(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, list(model.parameters()), retain_graph=True))

    def paper(ratio: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """The whole batch's loss over an image's values, and the ratio that it gives."""
        eps = rng_of(slice(4), step).normal("posterior", (4, 8, 8))
        x_hat, mean, logvar = model(x, eps)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / 4
        nll = ((x - x_hat).abs() + found["perceptual"](x, x_hat).view(4, 1, 1, 1)).sum() / 4
        adversarial = -found["discriminator"](x_hat).mean()
        kernel = model.decoder["conv_out"].weight
        norms = [torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
        following = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
        weight = 0.0 if ratio is None else 0.5 * ratio
        return (nll + 1e-6 * kl + weight * adversarial) / VALUES, following

    before: Tensor | None = None
    for step in range(2):
        expected, following = paper(before, step)
        parts = [slice(0, 1), slice(1, 4)]
        losses = [objective.loss(GENERATOR, found, batch_of(x, rows), rng_of(rows, step), step) for rows in parts]
        shares = [
            gradients_of(loss.total * (rows.stop - rows.start) / 4) for loss, rows in zip(losses, parts, strict=True)
        ]
        whole = gradients_of(expected)
        largest = max(gradient.abs().max() for gradient in whole)
        for got, gradient in zip(map(sum, zip(*shares, strict=True)), whole, strict=True):
            assert float((got - gradient).abs().max()) < 1e-5 * float(largest), step
        assert float(losses[0].metrics["ratio"]) == pytest.approx(float(before or 0), rel=1e-5)
        objective.after_phase(GENERATOR, found, lambda value: value, rng_of(slice(4), step), step)
        before = following
    assert 0 < float(following) < 1e4

    again = AdversarialELBO(latent_shape=(4, 8, 8))
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.kept["norms"], objective.kept["norms"])
    with pytest.raises(ValueError, match=r"keeps norms \(2,\); got norms \(3,\)"):
        again.load_state_dict({"norms": torch.zeros(3)})
    with pytest.raises(ValueError, match="norms"):
        again.load_state_dict({})


def test_the_discriminator_begins_late_and_learns_the_hinge_on_the_same_images() -> None:
    found, x = nets(), torch.rand(2, 3, 16, 16) * 2 - 1
    objective = AdversarialELBO(latent_shape=(4, 8, 8), discriminator_begins=3)
    assert [len(objective.phases(step)) for step in (0, 2, 3)] == [1, 1, 2]
    early = objective.loss(GENERATOR, found, batch_of(x, slice(2)), rng_of(slice(2), 0), 0)
    assert "adversarial" not in early.metrics and float(early.total.detach()) == pytest.approx(
        float(early.metrics["loss"])
    )
    objective.loss(GENERATOR, found, batch_of(x, slice(2)), rng_of(slice(2), 3), 3)
    got = objective.loss(DISCRIMINATOR, found, batch_of(x, slice(2)), rng_of(slice(2), 3), 3)
    x_hat = found["model"](x, rng_of(slice(2), 3).normal("posterior", (4, 8, 8)))[0].detach()
    real, fake = found["discriminator"](x), found["discriminator"](x_hat)
    expected = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    torch.testing.assert_close(got.total, expected)
    plain = AdversarialELBO(latent_shape=(4, 8, 8), adversarial_weight=0.0, perceptual_weight=0.0)
    assert plain.needs == ("model",) and plain.state_dict() == {}


def test_the_discriminator_is_pix2pixs_with_group_norms() -> None:
    net = PatchDiscriminator()
    # NLayerDiscriminator of 3 layers and 64 channels has as many
    assert sum(p.numel() for p in net.parameters()) == 2_765_633
    torch.manual_seed(0)
    small = PatchDiscriminator(hidden_size=4, num_groups=2)
    small.init_weights()
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after, stride in ((4, 8, 2), (8, 16, 2), (16, 32, 1)):
        layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(2, after), nn.LeakyReLU(0.2)]
    plain = nn.Sequential(*layers, nn.Conv2d(32, 1, 4, 1, 1))
    ours = [small.first.weight, small.first.bias]
    for layer in small.layers:
        assert isinstance(layer, Layer)
        ours += [layer.conv.weight, layer.scale, layer.shift]
    ours += [small.last.weight, small.last.bias]
    plain.load_state_dict(dict(zip(plain.state_dict(), ours, strict=True)))
    x = torch.randn(2, 3, 40, 32)
    torch.testing.assert_close(small(x), plain(x), rtol=1e-5, atol=1e-6)
    assert small(x).shape == (2, 1, 3, 2)
    with pytest.raises(ValueError, match="at least 16 x 16"):
        small(x[..., :8])


def file_of_lpips() -> dict[str, Tensor]:
    """What `lpips.LPIPS(net="vgg").state_dict()` holds, of few channels: layers as torchvision counts them, heads twice."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    for name, width, before in (
        ("net.slice1.0", 4, 3), ("net.slice1.2", 4, 4), ("net.slice2.5", 6, 4), ("net.slice2.7", 6, 6), ("net.slice3.10", 5, 6),
    ):  # fmt: skip
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.randn(width, before, 3, 3) * 0.2,
            torch.randn(width) * 0.1,
        )
    for i, width in enumerate((4, 6, 5)):
        state[f"lin{i}.model.1.weight"] = state[f"lins.{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return state


def lpips_of_package(state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Zhang et al. 2018, equation 1, layer by layer."""

    def features(image: Tensor) -> list[Tensor]:
        h, found, slice_before = (image - state["scaling_layer.shift"]) / state["scaling_layer.scale"], [], "slice1"
        for name in [
            key.removesuffix(".weight") for key in state if key.startswith("net.") and key.endswith(".weight")
        ]:
            if (this := name.split(".")[1]) != slice_before:
                found.append(h)
                h, slice_before = F.max_pool2d(h, 2, 2), this
            h = F.relu(F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
        return [one / (one.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for one in [*found, h]]

    differences = [(a - b).pow(2) for a, b in zip(features(x), features(y), strict=True)]
    return sum(F.conv2d(one, state[f"lin{i}.model.1.weight"]).mean((1, 2, 3)) for i, one in enumerate(differences))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_of_the_lpips_package_give_its_distance(kind: str, tmp_path: Path) -> None:
    state, path = file_of_lpips(), tmp_path / f"lpips_vgg.{kind}"
    if kind == "pth":
        torch.save(state, path)
    else:
        save_file({key: value.clone() for key, value in state.items()}, path)
    args, ours = ORIGINAL.read(path)
    assert args == {"channels": (4, 6, 5), "depth": (2, 2, 1)}
    net = LPIPS(**args)
    with opened(InitFrom(format="original", path=path.name), net, tmp_path) as read:
        for name, p in net.named_parameters():
            assert torch.equal(read(name, 0, p.numel()).view(p.shape), ours[name])
    net.load_state_dict(ours)
    x, y = torch.rand(3, 3, 13, 10) * 2 - 1, (torch.rand(3, 3, 13, 10) * 2 - 1).requires_grad_()
    expected = lpips_of_package(state, x, y)
    torch.testing.assert_close(net(x, y), expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(of.sum(), y)[0] for of in (net(x, y), expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-8)
    same = torch.zeros(1, 3, 8, 8, requires_grad=True)
    net(torch.zeros(1, 3, 8, 8), same).sum().backward()
    assert same.grad is not None and bool(same.grad.isfinite().all()), "features of 0 have a slope"


def test_weights_that_are_missing_or_others_are_refused(tmp_path: Path) -> None:
    net = LPIPS(channels=(4, 6, 5), depth=(2, 2, 1))

    def said(path: str) -> str:
        with pytest.raises(UserError) as caught, opened(InitFrom(format="original", path=path), net, tmp_path):
            pass
        return str(caught.value)

    assert "lpips/vgg.pth: no such file" in said("lpips/vgg.pth")
    assert "No such file" in said("vgg.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"not torch's")
    assert "not a readable file of torch's tensors" in said("broken.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert "expected tensors by name" in said("list.pth")
    # only the weights of the heads, as they lie in the package
    torch.save({key: value for key, value in file_of_lpips().items() if key.startswith("lin0")}, tmp_path / "heads.pth")
    assert "missing" in said("heads.pth") or "channels" in said("heads.pth")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdversarialELBO(latent_shape=(4, 8, 8), discriminator_begins=-1), "discriminator_begins -1"),
        (lambda: PatchDiscriminator(hidden_size=48), "num_groups: 32 does not divide"),
        (lambda: LPIPS(channels=(4,), depth=(1, 1)), "as many of both"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
