"""R3GAN's networks and losses equal the published code's: outputs, both losses, both penalties, and the gradients of all parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Batch, UserError
from nexus_scale.models.gan.r3gan_critic import R3GANCritic
from nexus_scale.models.gan.r3gan_generator import GAIN, R3GANGenerator, ResidualBlock
from nexus_scale.objectives.adversarial import Adversarial
from tests.golden import r3gan as golden


def theirs(network: nn.Module, name: str) -> str:
    """The published name of a parameter. Their stages begin (generator) or end (critic) with what lies between two of ours."""
    critic, (head, *rest) = isinstance(network, R3GANCritic), name.split(".")
    last = len(list(network.get_submodule("stages"))) - 1
    if head == "embedding":
        return "EmbeddingLayer.weight"
    if head == "stages":
        stage, block, layer, _ = rest
        kind = ("NonLinearity", "Bias") if layer[:3] == "act" else ("LinearLayer", "Layer.weight")
        return f"MainLayers.{stage}.Layers.{int(block) + (not critic)}.{kind[0]}{layer[-1]}.{kind[1]}"
    if head == "widen":
        stage = int(rest[0]) + (not critic)
        place = len(network.stages[stage]) if critic else 0  # type: ignore[index,arg-type]
        return f"MainLayers.{stage}.Layers.{place}.LinearLayer.Layer.weight"
    if head == ("first" if critic else "last"):
        return f"{'Extraction' if critic else 'Aggregation'}Layer.Layer.weight"
    ends = f"MainLayers.{last}.Layers.{len(network.stages[last])}" if critic else "MainLayers.0.Layers.0"  # type: ignore[index,arg-type]
    kind_of = {
        "basis": "Basis.weight" if critic else "Basis",
        "first": "LinearLayer.weight",
        "last": "LinearLayer.weight",
    }
    return f"{ends}.{kind_of[head]}"


def filled(network: Any, prefix: str) -> Any:
    for name, parameter in network.named_parameters():
        parameter.data = golden.drawn(f"{prefix}.{theirs(network, name)}", parameter.shape)
    return network


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize("name", golden.CASES)
def test_images_answers_losses_penalties_and_gradients_are_those_of_the_published_code(name: str) -> None:
    with np.load(golden.FILE) as file:
        found = {key.partition("/")[2]: torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{name}/")}
    case = golden.CASES[name]
    stages = {"hidden_sizes": case["widths"], "depths": case["depths"], "num_groups": case["groups"]}
    generator = filled(R3GANGenerator(noise_size=case["noise"], num_classes=case["classes"], **stages), "g")
    stages = {key: value[::-1] for key, value in stages.items()}
    critic = filled(R3GANCritic(num_classes=case["classes"], **stages), "d")
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
        for key, parameter in network.named_parameters():
            assert near(parameter.grad, found[f"{prefix}/{theirs(network, key)}"]), key
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
        float(block.conv1.weight.std() * 64**0.5) for block in generator.modules() if isinstance(block, ResidualBlock)
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
