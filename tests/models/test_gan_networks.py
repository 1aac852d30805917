"""GAN networks against public code (tests/golden/gan_networks.py), outputs and all gradients; sizes against the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.engine.networks import place
from nexus_scale.models.gan.dcgan_critic import DCGANCritic
from nexus_scale.models.gan.dcgan_generator import DCGANGenerator
from nexus_scale.models.gan.sngan_critic import SNGANCritic
from nexus_scale.models.gan.sngan_generator import SNGANGenerator
from nexus_scale.models.layers.spectral_norms import SpectralNormed
from tests.golden import gan_networks as golden

LABEL = torch.tensor([2, 0, 1, 2])
WIDTHS: dict[str, Any] = {"noise_size": golden.NOISE, "widths": (4, 4, 4, 4), "norm_group": 4}
CRITIC: dict[str, Any] = {"widths": (3, 3, 3, 3)}
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, str]]] = {
    "dcgan_generator": (
        lambda: DCGANGenerator(image_channels=1, noise_size=golden.NOISE, hidden_size=1, norm_group=3),
        (3, golden.NOISE),
        {"first.conv": "main.0", "first.norm": "main.1", "last": "main.12"}
        | {f"middle.{i}.{ours}": f"main.{3 * i + 3 + k}" for i in range(3) for k, ours in enumerate(("conv", "norm"))},
    ),
    "dcgan_critic": (
        lambda: DCGANCritic(image_channels=1, hidden_size=2, norm_group=5),
        (5, 1, 64, 64),
        {"first": "main.0", "last": "main.11"}
        | {f"middle.{i}.{ours}": f"main.{3 * i + 2 + k}" for i in range(3) for k, ours in enumerate(("conv", "norm"))},
    ),
    "sngan_generator": (lambda: SNGANGenerator(**WIDTHS), (4, golden.NOISE), {}),
    "cgan_pd_generator": (lambda: SNGANGenerator(**WIDTHS, num_classes=golden.CLASSES), (4, golden.NOISE), {}),
    "sngan_critic": (lambda: SNGANCritic(**CRITIC), (4, 3, 32, 32), {}),
    "cgan_pd_critic": (lambda: SNGANCritic(**CRITIC, num_classes=golden.CLASSES), (4, 3, 32, 32), {}),
    "wgan_gp_critic": (lambda: SNGANCritic(**CRITIC, spectral=False, pooling="mean"), (4, 3, 32, 32), {}),
}
PARTS = {"conv1": "c1", "conv2": "c2", "shortcut": "c_sc", "norm1": "b1", "norm2": "b2"}


def theirs(name: str, case: str) -> str:
    """What a module of ours is called there."""
    if table := CASES[case][2]:
        return table[name]
    generator = case.endswith("generator")
    ends = {"first": "l1", "norm": "b5", "last": "c5" if generator else "l5", "embed": "l_y"}
    if name in ends:
        return ends[name]
    _, number, part = name.split(".")
    return f"block{int(number) + (2 if generator else 1)}.{PARTS[part]}"


def held(case: str, kind: str, name: str, shape: torch.Size) -> Tensor:
    """A weight or its gradient there, by the name of ours."""
    module, _, leaf = name.rpartition(".")
    key = f"{case}/{kind}/{theirs(module, case)}"
    with np.load(golden.FILE) as stored:
        if f"{key}.embed.weight" in stored:  # scales of all channels, then shifts
            return torch.from_numpy(stored[f"{key}.embed.weight"]).chunk(2, dim=1)[leaf == "bias"]
        found = stored[f"{key}.{leaf}_orig" if f"{key}.{leaf}_orig" in stored else f"{key}.{leaf}"]
    return torch.from_numpy(found).view(shape)


def equal(found: Tensor, expected: Tensor, name: str, least: float = 0.0) -> None:
    """`least`: a norm below which differences are compared with it: before a batch norm a bias has gradient zero, but for rounding."""
    error = torch.linalg.vector_norm(found.detach() - expected) / torch.linalg.vector_norm(expected).clamp(min=least)
    assert float(error) < 1e-5, (name, float(error))


@pytest.mark.parametrize("case", CASES)
def test_networks_are_those_of_public_code(case: str) -> None:
    make, shape, _ = CASES[case]
    net = make()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(held(case, "weight", name, parameter.shape))
    for layer in net.modules():
        if isinstance(layer, SpectralNormed):
            layer.left, layer.right = golden.singular(layer.weight.detach())
    x = golden.waves(shape).requires_grad_()
    out = net(x, {"label": LABEL[: len(x)]})
    with np.load(golden.FILE) as stored:
        expected, at_input = (torch.from_numpy(stored[f"{case}/{key}"]) for key in ("out", "gradient/in"))
    answer = torch.sigmoid(out) if case == "dcgan_critic" else out
    gradients = torch.autograd.grad(
        (answer.view_as(expected) * golden.waves(expected.shape)).sum(), [x, *net.parameters()]
    )
    equal(answer.view_as(expected), expected, "out")
    equal(gradients[0].view_as(at_input), at_input, "in")
    parameters = list(net.named_parameters())
    there = {name: held(case, "gradient", name, parameter.shape) for name, parameter in parameters}
    largest = max(float(gradient.norm()) for gradient in there.values())
    for (name, _), gradient in zip(parameters, gradients[1:], strict=True):
        equal(gradient, there[name], name, 1e-2 * largest)


IMAGENET: dict[str, Any] = {"image_size": 128, "num_classes": 1000}


@pytest.mark.parametrize(
    ("network", "args", "parameters"),
    [
        (DCGANGenerator, {}, 3_576_704),
        (DCGANCritic, {}, 2_765_568),
        (SNGANGenerator, {}, 4_276_739),
        (SNGANCritic, {}, 1_053_825),
        (SNGANGenerator, {**IMAGENET, "widths": (1024, 1024, 512, 256, 128, 64)}, 41_996_931),
        (SNGANCritic, {"image_size": 128, "widths": (64, 128, 256, 512, 1024, 1024), "depth": 5}, 29_017_857),
    ],
)
def test_sizes_are_those_of_public_code(network: Any, args: dict[str, Any], parameters: int) -> None:
    """pytorch/examples, and mimicry's networks for 32 and 128 pixels."""
    with torch.device("meta"):
        assert sum(p.numel() for p in network(**args).parameters()) == parameters


def test_a_critic_may_name_classes_and_what_cannot_be_is_refused() -> None:
    torch.manual_seed(0)
    net = SNGANCritic(image_size=8, widths=(4, 6), depth=1, num_classes=5, classes="auxiliary")
    net.init_weights()
    answers, logits = net(torch.randn(3, 3, 8, 8), {})
    assert answers.shape == (3,) and logits.shape == (3, 5)
    for make, words in (
        (lambda: SNGANCritic(widths=(4,), depth=2), "sngan_critic: got widths"),
        (lambda: SNGANGenerator(image_size=36, widths=(4, 4, 4, 4)), "sngan_generator.image_size"),
        (lambda: DCGANGenerator(image_size=28), "dcgan_generator.image_size: got 28"),
        (lambda: DCGANCritic(norm_group=0), "norm_group"),
    ):
        with pytest.raises(UserError, match=words):
            make()


@pytest.mark.parametrize("case", ["dcgan_generator", "dcgan_critic", "cgan_pd_generator", "cgan_pd_critic"])
def test_networks_compute_in_bf16_too(case: str) -> None:
    """In training and in eval mode; running statistics and singular vectors stay in float32."""
    torch.manual_seed(0)
    make, shape, _ = CASES[case]
    net, x = make(), golden.waves(shape)
    net.init_weights()
    whole = net(x, {"label": LABEL[: len(x)]}).detach()
    place(net, torch.device("cpu"), torch.bfloat16)
    low = net(x.bfloat16(), {"label": LABEL[: len(x)]})
    low.float().sum().backward()
    assert low.dtype == torch.bfloat16 and float((low.float() - whole).detach().abs().max()) < 0.1
    assert {buffer.dtype for buffer in net.buffers()} == {torch.float32}
    assert bool(net.eval()(x.bfloat16(), {"label": LABEL[: len(x)]}).isfinite().all())
