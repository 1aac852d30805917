"""R3GAN's networks and losses equal the published code's: outputs, both losses, both penalties, and the gradients of all parameters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import Batch, UserError
from nexus_scale.interop import r3gan_critic, r3gan_generator
from nexus_scale.interop.init_from import opened
from nexus_scale.models.gan.r3gan_critic import R3GANCritic
from nexus_scale.models.gan.r3gan_generator import GAIN, R3GANGenerator, ResidualBlock
from nexus_scale.objectives.adversarial import Adversarial
from tests.golden import r3gan as golden


def published(form: Any, found: dict[str, Tensor], prefix: str, make: Any) -> tuple[Any, dict[str, Any]]:
    """Our network with the weights of theirs, and its arguments, as they are read."""
    names = [key.partition("/")[2] for key in found if key.startswith(f"{prefix}/") and key.count(".")]
    args, ours = form.to_ours(
        None, {f"Model.{key}": golden.drawn(f"{prefix}.{key}", found[f"{prefix}/{key}"].shape) for key in names}
    )
    network = make(**args)
    network.load_state_dict(ours)
    return network, args


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize("name", golden.CASES)
def test_images_answers_losses_penalties_and_gradients_are_those_of_the_published_code(name: str) -> None:
    with np.load(golden.FILE) as file:
        found = {key.partition("/")[2]: torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{name}/")}
    case = golden.CASES[name]
    generator, args = published(r3gan_generator.ORIGINAL, found, "g", R3GANGenerator)
    critic, _ = published(r3gan_critic.ORIGINAL, found, "d", R3GANCritic)
    assert (args["noise_size"], args["hidden_sizes"], args["depths"]) == (case["noise"], case["widths"], case["depths"])
    size = critic.image_size
    x = golden.drawn("x", (golden.BATCH, 3, size, size)) * size
    label = golden.labels(case["classes"])
    fields = {"image": x} if label is None else {"image": x, "label": label}
    batch = Batch(fields, torch.arange(golden.BATCH), torch.arange(golden.BATCH))
    rng: Any = SimpleNamespace(normal=lambda name, shape: golden.drawn("z", (golden.BATCH, *shape)))
    objective = Adversarial(
        noise_size=case["noise"],
        paired=True,
        r1_weight=golden.GAMMA,
        r2_weight=golden.GAMMA,
        conditions=tuple(fields)[1:],
    )
    nets = {"model": generator, "critic": critic}
    assert near(generator(rng.normal("z", (case["noise"],)), fields), found["image"]) and near(
        critic(x, fields), found["answer"]
    )
    for phase, network, prefix in (("generator", generator, "g"), ("critic", critic, "d")):
        loss = objective.loss(phase, nets, batch, rng, 0)
        network.zero_grad()
        loss.total.backward()
        form = r3gan_critic.ORIGINAL if prefix == "d" else r3gan_generator.ORIGINAL
        for key, gradient in form.theirs_of(network, {name: p.grad for name, p in network.named_parameters()}).items():
            assert key.endswith("Kernel") or near(gradient, found[f"{prefix}/{key.removeprefix('Model.')}"]), key
        penalties = [found[f"d/{penalty}"].mean() for penalty in ("r1", "r2")] if prefix == "d" else []
        total = found[f"{prefix}/loss"].mean() + 0.5 * golden.GAMMA * sum(penalties)
        assert near(loss.total.detach(), total)
        assert not penalties or near(torch.stack([loss.metrics["r1"], loss.metrics["r2"]]), torch.stack(penalties))  # type: ignore[list-item]


@pytest.mark.parametrize("name", golden.SIZES)
def test_parameters_are_as_many_as_in_the_published_code(name: str) -> None:
    widths, groups, classes = golden.SIZES[name]
    depths = (2,) * len(widths)
    with torch.device("meta"):
        one = R3GANGenerator(hidden_sizes=widths, depths=depths, num_groups=groups, num_classes=classes)
        two = R3GANCritic(hidden_sizes=widths[::-1], depths=depths, num_groups=groups[::-1], num_classes=classes)
    with np.load(golden.FILE) as file:
        assert [sum(p.numel() for p in network.parameters()) for network in (one, two)] == file[
            f"{name}/parameters"
        ].tolist()


def test_an_untrained_network_keeps_the_size_of_its_signal() -> None:
    torch.manual_seed(0)
    generator = R3GANGenerator(noise_size=32, hidden_sizes=(64, 64), depths=(2, 1), num_groups=(8, 8))
    generator.init_weights()
    images = generator(torch.randn(32, 32), {})
    assert images.shape == (32, 3, 8, 8) and 0.3 < float(images.detach().std()) < 3
    stds = [
        float(block.conv1.weight.detach().std() * 64**0.5)
        for block in generator.modules()
        if isinstance(block, ResidualBlock)
    ]
    assert all(abs(std / (GAIN * 3**-0.25) - 1) < 0.05 for std in stds)
    assert not any(block.conv3.weight.any() for block in generator.blocks()), "each block begins as the identity"


def test_stages_that_cannot_be_are_refused() -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"depths": (1,)}, "4 hidden_sizes, 1 depths"),
        ({"num_groups": (96, 96, 96, 7)}, "7 groups"),
        ({"depths": (0, 1, 1, 1)}, "depths"),
    ]
    for wrong, words in mistakes:
        for network in (R3GANGenerator, R3GANCritic):
            with pytest.raises(UserError, match=words):
                network(**wrong)


def test_weights_go_into_files_of_the_published_code_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for form, make in ((r3gan_generator.ORIGINAL, R3GANGenerator), (r3gan_critic.ORIGINAL, R3GANCritic)):
        args: dict[str, Any] = {
            "hidden_sizes": (4, 6),
            "depths": (1, 2),
            "num_groups": (4, 2),
            "expansion": 3,
            "num_classes": 2,
        }
        args = {"image_channels": 1, **({"noise_size": 5} if make is R3GANGenerator else {}), **args}
        network = make(**args)
        network.init_weights()
        file = form.write(tmp_path, network.state_dict(), args) / form.file
        found, state = form.read(file)
        assert found == args and all(torch.equal(state[name], value) for name, value in network.state_dict().items())
        spec = InitFrom(format="original", path=str(file))
        with opened(spec, network, tmp_path) as read:
            for name, value in network.state_dict().items():
                assert torch.equal(read(name, 0, value.numel()).view(value.shape), value)
        with pytest.raises(UserError, match="expansion"), opened(spec, make(**{**args, "expansion": 2}), tmp_path):
            pass
