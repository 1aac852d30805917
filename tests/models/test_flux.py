"""Flux by itself: sizes of the release, shapes, initialisation, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.registry import find
from nexus_scale.contracts import UserError
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.models.diffusion.flux import Flux
from nexus_scale.models.layers.tags import tags_of

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "latent_size": 8,
    "hidden_size": 32,
    "depth_double": 2,
    "depth_single": 2,
    "num_heads": 2,
    "rope_dims": (4, 6, 6),
    "text_dim": 24,
    "pooled_dim": 20,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny(**changes: Any) -> Flux:
    net = Flux(**(TINY | changes))
    net.init_weights()
    return net


def randomise(net: Flux) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(2, 4, *size), torch.rand(2), {"text": torch.randn(2, 3, 24), "pooled": torch.randn(2, 20)}


@pytest.mark.parametrize(("guidance", "count"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_parameter_counts_are_the_releases(guidance: bool, count: int) -> None:
    with torch.device("meta"):
        net = Flux(guidance_embed=guidance)
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(net.blocks()) == 57
    x, t, cond = net.example_inputs(2, 512, "meta")
    assert net(x, t, cond).shape == x.shape == (2, 16, 128, 128)
    assert net.tokens(512) == 4608


def test_registered_by_file_name() -> None:
    assert find("models", "flux") is Flux


def test_starts_as_the_zero_function_and_all_parameters_learn() -> None:
    net = tiny(guidance_embed=True)
    x, t, cond = inputs((4, 12))
    cond["guidance"] = torch.tensor([3.5, 1.0])
    assert not net(x, t, cond).any()
    randomise(net)
    net(x, t, cond).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        assert tags_of(p) == (p.dim() > 1, 1.0), name
    assert not net._parameters and not list(net.buffers())


def test_sees_time_text_pooled_guidance_and_place() -> None:
    net = tiny(guidance_embed=True)
    randomise(net)
    x, t, cond = inputs()
    cond["guidance"] = torch.tensor([3.5, 1.0])
    with torch.no_grad():
        y = net(x, t, cond)
        assert (net(x, t + 0.1, cond) - y).abs().max() > 1e-3
        for name in cond:
            assert (net(x, t, cond | {name: cond[name] + 1}) - y).abs().max() > 1e-3
        moved = net(x.roll(2, dims=-1), t, cond).roll(-2, dims=-1)
        assert (moved - y).abs().max() > 1e-3


def test_keeps_the_dtype_of_the_latents_around_half_precision_weights() -> None:
    net = tiny()
    randomise(net)
    x, t, cond = inputs()
    with torch.no_grad():
        full = net(x, t, cond)
        half = net.bfloat16()(x, t, cond)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("attention", ["masked", "packed"])
def test_checkpointed_blocks_give_the_same_gradients(attention: str) -> None:
    x, t, cond = inputs()
    cond["text_mask"] = torch.tensor([[True, True, False], [True, True, True]])
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        net = tiny(attention=attention)
        randomise(net)
        prepare_blocks(net, "model", activation_checkpointing=checkpointed, compiled=False)
        net.train()
        net(x, t, cond).square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 33}, "multiple of num_heads"),
        ({"rope_dims": (4, 6, 4)}, "whose sum is hidden_size / num_heads = 16"),
        ({"rope_dims": (5, 5, 6)}, "even numbers"),
        ({"patch_size": 3}, "does not divide latent_size"),
        ({"depth_double": 0}, "depth_double"),
        ({"depth_single": -1}, "depth_single"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Flux(**(TINY | changes))


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = tiny()
    x, t, cond = inputs()
    for changed, words in (
        ((x[:, :3], t, cond), "3 channels"),
        ((x[..., :7], t, cond), "does not divide latents of 8 x 7"),
        ((x, t, cond | {"text": cond["text"][..., :5]}), "set text_dim"),
        ((x, t, cond | {"pooled": cond["pooled"][..., :5]}), "set pooled_dim"),
    ):
        with pytest.raises(ValueError, match=words):
            net(*changed)
    with pytest.raises(ValueError, match=r"objective\.constants"):
        tiny(guidance_embed=True)(x, t, cond)
