"""UNet against diffusers' UNet2DModel with the same weights, outputs and all gradients; sizes against the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.recipe import load_recipe
from nexus_scale.contracts import UserError
from nexus_scale.interop.unet import DIFFUSERS
from nexus_scale.models.diffusion.unet import UNet
from nexus_scale.models.layers.tags import tags_of
from nexus_scale.rehearsal import flops
from nexus_scale.rehearsal.costs import costs
from nexus_scale.rehearsal.meta import network_on_meta


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


ADM: dict[str, Any] = {
    "head_dim": 64, "num_classes": 1000, "learn_sigma": True, "scale_shift": True, "resnet_resample": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("millions", "gflops", "args"),
    [
        (35.75, 6.06, {}),
        (113.67, 249, {"latent_size": 256, "widths": (128, 128, 256, 256, 512, 512), "attention": (4,)}),
        (295.9, 103.9, {"latent_size": 64, "widths": (192, 384, 576, 768), "depth": 3, "attention": (1, 2, 3), **ADM}),
        (421.5, 307, {"latent_size": 128, "widths": (256, 256, 512, 768, 1024), "attention": (2, 3, 4), **ADM}),
        (553.8, 1120, {"latent_size": 256, "widths": (256, 256, 512, 512, 1024, 1024), "attention": (3, 4, 5), **ADM}),
    ],
)
def test_sizes_are_the_papers(millions: float, gflops: float, args: dict[str, Any]) -> None:
    """ADM-256 takes 1120 Gflops by DiT's paper, and ADM-64 103.9 by EDM's, which leaves out products of attention."""
    with torch.device("meta"):
        net = UNet(**args)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=2e-4)
    assert flops.count(net, *net.example_inputs(1, 0, "meta")).flops / 2e9 == pytest.approx(gflops, rel=0.06)
    assert net.tokens(0) == net.latent_size**2


def test_the_recipes_are_the_papers() -> None:
    cifar, adm = load_recipe("ddpm/cifar10"), load_recipe("ddpm/adm256_imagenet")
    assert (cifar.global_batch, cifar.steps, cifar.optimizer.lr) == (128, 800_000, 2e-4)
    assert (adm.global_batch, adm.steps, adm.optimizer.lr, adm.optimizer.weight_decay) == (256, 1_980_000, 1e-4, 0.0)
    for recipe, millions in ((cifar, 35.75), (adm, 553.84)):
        spec = recipe.trained()["model"]
        net = network_on_meta(UNet, spec.arguments, "networks.model")
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=2e-4)
    assert costs(adm)["flops_per_sample"] / 6e9 == pytest.approx(1120, rel=0.01)


# ---------------------------------------------------------------------------------------------- diffusers


def _config(attention: str, **changes: Any) -> dict[str, Any]:
    """Of levels with attention (`a`), of convolutions alone (`-`), or of those with residual blocks between levels (`r`)."""
    kinds = {"a": "Attn{}Block2D", "-": "{}Block2D", "r": "Resnet{}sampleBlock2D"}
    down = tuple(kinds[letter].format("Down") for letter in attention)
    up = tuple(kinds[letter].format("Up") for letter in reversed(attention))
    small = {
        "sample_size": 8, "block_out_channels": (32, 64, 96)[: len(attention)], "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 16, "down_block_types": down, "up_block_types": up,
    }  # fmt: skip
    return small | changes


_ADM = {
    "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet", "attn_norm_num_groups": 8,
    "num_class_embeds": 10, "out_channels": 6,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "ddpm": (
        _config("-a-", downsample_padding=0, freq_shift=1, flip_sin_to_cos=False, attention_head_dim=None, norm_eps=1e-6),
        (12, 20),
    ),
    "adm": (_config("raa", **_ADM), (8, 16)),
    "adm_without_the_middles_norm": (_config("ra", **{**_ADM, "attn_norm_num_groups": None}), (6, 8)),
    "no_attention_in_the_middle": (_config("--", add_attention=False, layers_per_block=2, time_embedding_dim=48), (4, 6)),
    "one_level": (_config("a", in_channels=4, out_channels=4), (5, 7)),
}  # fmt: skip


def pair(config: dict[str, Any]) -> tuple[Any, UNet]:
    """diffusers' model with random weights and ours with the same, in eval mode."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = UNet(**model_args).eval()
    ours.load_state_dict(state)
    return theirs, ours


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name: str) -> None:
    config, (height, width) = CASES[name]
    theirs, ours = pair(config)
    x = torch.randn(3, ours.latent_channels, height, width)
    step, label = torch.tensor([0, 17, 999]), torch.tensor([0, 7, 9])
    leaf_theirs, leaf_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs = theirs(leaf_theirs, step, class_labels=label if ours.num_classes else None).sample
    y_ours = ours(leaf_ours, (step + 1) / 1000, {"label": label})
    direction = torch.randn(y_theirs.shape)
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()
    assert y_ours.shape == (3, ours.out_channels, height, width) and y_theirs.std() > 0.1
    assert error(y_ours, y_theirs) < 1e-5
    assert leaf_theirs.grad is not None and leaf_ours.grad is not None
    assert error(leaf_ours.grad, leaf_theirs.grad) < 1e-5

    # gradients go through the same conversion as weights
    args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    _, converted = DIFFUSERS.to_theirs({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, args)
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert converted.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values() if grad is not None)
    for n, expected in grads.items():  # that of a key's bias is zero but for rounding
        assert expected is not None, n
        assert error(converted[n], expected, floor=1e-3 * largest) < 1e-5, n


# ---------------------------------------------------------------------------------------- by definition


def small(**changes: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(**({"latent_size": 8, "widths": (8, 16), "depth": 1, "num_groups": 4} | changes))
    net.init_weights()
    return net


def test_the_untrained_network_answers_zero_and_odd_sizes_come_back() -> None:
    net = small(num_classes=3, learn_sigma=True, scale_shift=True, resnet_resample=True)
    for size in ((8, 8), (7, 5), (2, 9)):
        for kind in (net, small()):
            y = kind(torch.randn(2, 3, *size), torch.rand(2), {"label": torch.tensor([0, 2])})
            assert y.shape == (2, kind.out_channels, *size) and not y.any()
    y = torch.randn(2, 8, 4, 4)
    stage = net.levels.down[0].stages[0]
    assert torch.equal(stage(y, torch.randn(2, 32)), y), "a stage begins as the identity"
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_dropped_class_adds_nothing_and_time_may_be_continuous() -> None:
    net = small(num_classes=3)
    torch.manual_seed(2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    told = net(x, t, {"label": torch.tensor([1, 2])})
    dropped = net(x, t, {"label": torch.tensor([1, 2]), "drop": torch.tensor([True, False])})
    other = net(x, t, {"label": torch.tensor([0, 2]), "drop": torch.tensor([True, False])})
    assert torch.equal(dropped, other) and not torch.equal(told[0], dropped[0]) and torch.equal(told[1], dropped[1])
    continuous = small(num_classes=3, counts_steps=False)
    continuous.load_state_dict(net.state_dict())
    assert torch.allclose(continuous(x, t - 0.001, {"label": torch.tensor([1, 2])}), told, atol=1e-3)


def test_dropout_is_there_in_training_alone() -> None:
    net = small(dropout=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert not torch.equal(net(x, t, {}), net(x, t, {}))
    assert torch.equal(net.eval()(x, t, {}), net(x, t, {}))


def test_inputs_that_do_not_fit_are_named() -> None:
    net = small(num_classes=3)
    with pytest.raises(ValueError, match="5 channels"):
        net(torch.zeros(1, 5, 8, 8), torch.rand(1), {})
    with pytest.raises(ValueError, match=r"labels from 3 to 3; expected 0 \.\. 2"):
        net(torch.zeros(1, 3, 8, 8), torch.rand(1), {"label": torch.tensor([3])})
    for wrong in (
        {"widths": (30, 64)}, {"widths": ()}, {"attention": (4,)}, {"attention": (1, 1)}, {"head_dim": 60}, {"depth": 0},
        {"latent_size": 4}, {"dropout": 1.0}, {"norm_eps": 0.0}, {"num_classes": -1}, {"time_dim": 0},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"unet.*{next(iter(wrong))}"):
            UNet(**wrong)  # type: ignore[arg-type]


def test_tags() -> None:
    net = small(num_classes=3).to(torch.float64)
    decaying = {name for name, p in net.named_parameters() if tags_of(p).decay}
    assert decaying == {name for name, p in net.named_parameters() if p.dim() > 1 and "class_embed" not in name}
