"""ControlNets against diffusers' with the same weights: what the base answers under them, and all gradients; sizes of the releases."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.unet_control_net import DIFFUSERS
from nexus_scale.models.adapters.unet_control_net import UNetControlNet
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.models.diffusion.unet_condition import UNetCondition
from tests.models.test_unet_condition_parity import _XL, CASES, _config, pair, small, told
from tests.models.test_unet_parity import error


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def controlled(theirs: Any, base: UNetCondition, seed: int, widths: tuple[int, ...]) -> tuple[Any, UNetControlNet]:
    """diffusers' ControlNet of a network with random weights, none zero, and ours with the same, on our base."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=widths).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    args, state = DIFFUSERS.to_ours(dict(net.config), net.state_dict())
    ours = UNetControlNet(**args).eval()
    ours.load_state_dict(state)
    ours.attach(base)
    return net, ours


@pytest.mark.parametrize("name", ["sd15", "sd21_odd_sizes", "sdxl", "inpainting"])
def test_outputs_and_gradients_of_two_at_once_equal_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config, size = CASES[name]
    theirs, base = pair(config)
    base.requires_grad_(False)
    cond, given, beside = told(base, size)
    del cond["text_mask"], given["encoder_attention_mask"]  # several at once take none there
    (first, a), (second, b) = (controlled(theirs, base, seed, (4, 6, 8)) for seed in (1, 2))
    b.condition = "sketch"
    x, step = torch.cat((torch.randn(3, base.latent_channels, *size), beside), 1), torch.tensor([0, 17, 999])
    pictures = [torch.rand(3, 3, 4 * size[0], 4 * size[1]) for _ in range(2)]
    down, middle = diffusers.MultiControlNetModel([first, second])(
        x, step, controlnet_cond=pictures, conditioning_scale=[0.5, 1.25], return_dict=False, **given
    )
    y_theirs = theirs(
        x, step, down_block_additional_residuals=down, mid_block_additional_residual=middle, **given
    ).sample
    cond |= {"control": pictures[0] * 2 - 1, "sketch": pictures[1] * 2 - 1}
    cond |= {"control_scale": torch.full((3,), 0.5), "sketch_scale": torch.full((3,), 1.25)}
    t = (step + 1) / 1000
    y_ours = a.through(b.through(base))(x, t, cond)
    assert error(y_ours, base(x, t, cond)) > 1e-2, "they change what the base answers"
    assert error(y_ours, y_theirs) < 1e-5
    direction = torch.randn(y_theirs.shape)
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()
    for net, ours in ((first, a), (second, b)):
        args, _ = DIFFUSERS.to_ours(dict(net.config), net.state_dict())
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
        converted_config, converted = DIFFUSERS.to_theirs(found, args)
        again = DIFFUSERS.model_args(converted_config)
        assert again["base"].keywords == args["base"].keywords, "the config comes back"
        expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
        assert converted.keys() == expected.keys()
        largest = max(float(grad.abs().max()) for grad in expected.values())
        for n, grad in expected.items():
            assert error(converted[n], grad, floor=1e-3 * largest) < 1e-5, n


def test_it_begins_as_its_base_to_the_bit_and_learns_from_the_first_step() -> None:
    base = small().requires_grad_(False)
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net = UNetControlNet(base=small, condition_widths=(4, 4))
    net.init_weights()
    net.attach(base)
    cond = {"text": torch.randn(2, 3, 6), "control": torch.rand(2, 3, 16, 16)}
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    y = net(x, t, cond)
    assert torch.equal(y, base(x, t, cond))
    y.square().sum().backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning >= {"middle_conv.weight", *(f"down_convs.{i}.weight" for i in range(4))}
    assert all(p.grad is None for p in base.parameters())
    assert len(net.blocks()) == 5 and not any(name.startswith("twin.levels.up") for name, _ in net.named_parameters())


def test_what_it_cannot_follow_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="adapts a DiT; expected a unet_condition"):
        UNetControlNet(base=partial(DiT, hidden_size=16, num_heads=2, depth=1))  # type: ignore[arg-type]
    net = UNetControlNet(base=small, condition_widths=(4, 4))
    x, t, cond = net.example_inputs(2, 3, "cpu") or ()
    with pytest.raises(ValueError, match="no 'control' among the conditions"):
        net.residuals(x, t, {"text": cond["text"]})
    with pytest.raises(ValueError, match="take one of 3 channels and 2 times their size"):
        net.residuals(x, t, {**cond, "control": torch.zeros(2, 3, 8, 8)})


def test_the_published_one_has_its_size() -> None:
    config = {"cross_attention_dim": 768}
    net = DIFFUSERS.network_of(DIFFUSERS.model_args(config))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(361.3, abs=0.05)
    x, t, cond = net.example_inputs(1, 77, "meta")
    assert net(x, t, cond).shape == (1, 4, 64, 64) and cond["control"].shape == (1, 3, 512, 512)
    assert DIFFUSERS.network_of(DIFFUSERS.model_args(_config(**_XL))).twin.pooled_dim == 20
