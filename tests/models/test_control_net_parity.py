"""ControlNets against diffusers' with the same weights: what the base answers under them, and all gradients; sizes of the releases."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop import flux, mmdit
from nexus_scale.interop import flux_control_net as FLUX
from nexus_scale.interop import mmdit_control_net as MMDIT
from nexus_scale.interop.unet_control_net import DIFFUSERS
from nexus_scale.models.adapters.flux_control_net import FluxControlNet
from nexus_scale.models.adapters.mmdit_control_net import MMDiTControlNet
from nexus_scale.models.adapters.unet_control_net import UNetControlNet
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.models.diffusion.flux import Flux
from nexus_scale.models.diffusion.mmdit import MMDiT
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
        converted_config, converted = DIFFUSERS.to_theirs(grads_of(ours), args)
        again = DIFFUSERS.model_args(converted_config)
        assert again["base"].keywords == args["base"].keywords, "the config comes back"
        expected = grads_of(net)
        assert converted.keys() == expected.keys()
        largest = max(float(grad.abs().max()) for grad in expected.values())
        for n, grad in expected.items():
            assert error(converted[n], grad, floor=4e-3 * largest) < 1e-5, n


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
    assert net(x, t, cond).shape == (1, 4, 32, 32) and cond["control"].shape == (1, 3, 256, 256)
    assert DIFFUSERS.network_of(DIFFUSERS.model_args(_config(**_XL))).twin.pooled_dim == 20


# ----------------------------------------------------------------------------------------- transformers


def _mmdit() -> dict[str, Any]:
    return {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 6,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }  # fmt: skip


def _flux() -> dict[str, Any]:
    return {
        "in_channels": 16, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 10, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip


def fill(net: Any, seed: int) -> Any:
    """Random weights, none zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    return net.eval()


@pytest.mark.parametrize("depths", [(2, 0), (1, 3)], ids=["sd3_two_blocks", "sd3_one_block"])
def test_sd3s_outputs_and_gradients_equal_diffusers(depths: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    depth, extra = depths
    theirs = fill(diffusers.SD3Transformer2DModel(**_mmdit()), 0)
    net = fill(diffusers.SD3ControlNetModel(**{**_mmdit(), "num_layers": depth}, extra_conditioning_channels=extra), 1)
    args, state = MMDIT.DIFFUSERS.to_ours(dict(net.config), net.state_dict())
    ours = MMDiTControlNet(**args)
    ours.load_state_dict(state)
    base_args, base_state = mmdit.DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    base = mmdit.DIFFUSERS.network_of(base_args).to_empty(device="cpu").requires_grad_(False)
    base.load_state_dict(base_state)
    ours.attach(base)
    x, t, picture = torch.randn(2, 4, 8, 6), torch.tensor([0.1, 0.9]), torch.randn(2, 4 + extra, 8, 6)
    text, pooled = torch.randn(2, 5, 12), torch.randn(2, 10)
    told = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t * 1000}
    blocks = net(x, controlnet_cond=picture, conditioning_scale=0.75, return_dict=False, **told)[0]
    y_theirs = theirs(x, block_controlnet_hidden_states=blocks, return_dict=False, **told)[0]
    cond = {"text": text, "pooled": pooled, "control": picture, "control_scale": torch.full((2,), 0.75)}
    compare(ours, net, MMDIT.DIFFUSERS, ours(x, t, cond), y_theirs, base(x, t, cond))


@pytest.mark.parametrize("depths", [(2, 0), (1, 3)], ids=["flux_two_streams", "flux_both_kinds"])
@pytest.mark.parametrize("attention", ["masked", "packed"])
def test_fluxs_outputs_and_gradients_equal_diffusers(depths: tuple[int, int], attention: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.FluxTransformer2DModel(**{**_flux(), "patch_size": 1}), 0)
    net = fill(diffusers.FluxControlNetModel(**{**_flux(), "num_layers": depths[0], "num_single_layers": depths[1]}), 1)
    args, state = FLUX.DIFFUSERS.to_ours(dict(net.config), net.state_dict())
    base_args, base_state = flux.DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    whole = partial(Flux, **base_args, attention=attention)  # type: ignore[arg-type]
    ours = FluxControlNet(**{**args, "base": whole})
    ours.load_state_dict(state)
    base = whole().requires_grad_(False)
    base.load_state_dict(base_state)
    ours.attach(base)
    x, t, picture = torch.randn(2, 4, 8, 6), torch.tensor([0.1, 0.9]), torch.randn(2, 4, 8, 6)
    text, pooled, guidance = torch.randn(2, 5, 12), torch.randn(2, 10), torch.tensor([3.5, 1.0])

    def tokens(value: Any) -> Any:
        return value.unflatten(2, (4, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(3.0), indexing="ij"), -1).view(
        -1, 3
    )
    told = {
        "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t, "guidance": guidance, "img_ids": ids,
        "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    double, single = net(tokens(x), controlnet_cond=tokens(picture), conditioning_scale=0.75, **told)
    out = theirs(tokens(x), controlnet_block_samples=double, controlnet_single_block_samples=single, **told)[0]
    y_theirs = out.view(2, 4, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 6)
    cond = {
        "text": text,
        "pooled": pooled,
        "guidance": guidance,
        "control": picture,
        "control_scale": torch.full((2,), 0.75),
    }
    if attention == "packed":
        cond["text_mask"] = torch.ones(2, 5, dtype=torch.bool)
    compare(ours, net, FLUX.DIFFUSERS, ours(x, t, cond), y_theirs, base(x, t, cond))


def grads_of(net: Any) -> dict[str, Any]:
    """Zero where nothing reads a layer: the last block's text."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}


def compare(ours: Any, net: Any, form: Any, y_ours: Any, y_theirs: Any, plain: Any) -> None:
    assert error(y_ours, plain) > 1e-2 and error(y_ours, y_theirs) < 1e-5
    direction = torch.randn(y_theirs.shape)
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()
    args, _ = form.to_ours(dict(net.config), net.state_dict())
    config, converted = form.to_theirs(grads_of(ours), args)
    assert form.model_args(config)["base"].keywords == args["base"].keywords, "the config comes back"
    expected = grads_of(net)
    assert {n for n in converted if n != "pos_embed.pos_embed"} == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for n, grad in expected.items():
        assert error(converted[n], grad, floor=4e-3 * largest) < 1e-5, n


def test_transformers_controlled_begin_as_their_base_to_the_bit() -> None:
    for cls, whole in (
        (partial(MMDiTControlNet, depth=1), partial(MMDiT, latent_channels=4, latent_size=8, hidden_size=16, depth=3, num_heads=2,
                                                    text_dim=12, pooled_dim=10, pos_embed_max_size=6)),
        (partial(FluxControlNet, depth_double=1, depth_single=1), partial(Flux, latent_channels=4, latent_size=8, hidden_size=16,
            depth_double=2, depth_single=2, num_heads=2, rope_dims=(2, 2, 4), text_dim=12, pooled_dim=10)),
    ):  # fmt: skip
        base = fill(whole(), 0).requires_grad_(False)
        net = cls(base=whole, condition_channels=4)
        net.init_weights()
        net.attach(base)
        x, t, cond = net.example_inputs(2, 3, "cpu")
        x, cond = torch.randn_like(x), {name: torch.randn_like(value) for name, value in cond.items()}
        y = net(x, t + 0.5, cond)
        assert torch.equal(y, base(x, t + 0.5, cond)) and y.any()
        y.square().sum().backward()
        last = net.get_submodule(net.projs[-1])[0].weight
        assert last.grad is not None and last.grad.any() and not any(p.grad is not None for p in base.parameters())
        with pytest.raises(ValueError, match="expected latents of the same size"):
            net.residuals(x, t, {**cond, "control": torch.zeros(2, 3, 8, 8)})
