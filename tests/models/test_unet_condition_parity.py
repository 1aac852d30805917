"""UNetCondition against diffusers' UNet2DConditionModel with the same weights, outputs and all gradients; sizes of the releases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.unet_condition import DIFFUSERS
from nexus_scale.models.diffusion.unet_condition import UNetCondition, guidance_sinusoids
from nexus_scale.models.layers.tags import tags_of
from tests.models.test_unet_parity import error


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


RELEASED: dict[str, tuple[float, dict[str, Any]]] = {
    "sd15": (859.5, {"cross_attention_dim": 768}),
    "sd15_inpainting": (859.5, {"cross_attention_dim": 768, "in_channels": 9}),
    "lcm": (859.6, {"cross_attention_dim": 768, "time_cond_proj_dim": 256}),
    "sd21": (
        865.9,
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "upcast_attention": True},
    ),
    "sdxl": (
        2567.5,
        {
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
    ),
}  # fmt: skip
"""Millions of parameters, and what their configs on the Hub say beside defaults."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_make_networks_of_their_size(name: str) -> None:
    millions, config = RELEASED[name]
    net = DIFFUSERS.network_of(DIFFUSERS.model_args(config))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    blocks = [sum(p.numel() for p in block.parameters()) for block in net.blocks()]
    # no block, which ZeRO-3 gathers whole, is a large part of the network; what lies outside of them is small
    assert max(blocks) < 0.1 * millions * 1e6 and sum(blocks) > 0.95 * millions * 1e6
    x, t, cond = net.example_inputs(2, 77, "meta")
    assert net(x, t, cond).shape == (2, 4, *x.shape[2:]) and net.tokens(77) == net.latent_size**2 + 77


# ---------------------------------------------------------------------------------------------- diffusers


def _config(**changes: Any) -> dict[str, Any]:
    small = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
        "cross_attention_dim": 12, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return small | changes


_XL = {
    "block_out_channels": (16, 32, 64), "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 2, 3),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "sd15": (_config(), (8, 12)),
    "sd21_odd_sizes": (_config(use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True), (7, 5)),
    "sdxl": (_config(**_XL), (9, 6)),
    "lcm": (_config(time_cond_proj_dim=32, layers_per_block=(1, 2)), (4, 6)),
    "inpainting": (_config(in_channels=9, downsample_padding=0, freq_shift=1, flip_sin_to_cos=False), (8, 6)),
    "upscaler": (
        _config(in_channels=7, only_cross_attention=(True, False), num_class_embeds=10, resnet_time_scale_shift="scale_shift"),
        (6, 5),
    ),
    "projected_text_small_middle": (_config(encoder_hid_dim=20, mid_block_type="UNetMidBlock2D", only_cross_attention=True), (3, 4)),
    "no_middle": (_config(mid_block_type=None, out_channels=8, time_embedding_dim=24), (4, 5)),
}  # fmt: skip


def pair(config: dict[str, Any], **more: Any) -> tuple[Any, UNetCondition]:
    """diffusers' model with random weights and ours with the same, in eval mode."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = UNetCondition(**model_args, **more).eval()
    ours.load_state_dict(state)
    return theirs, ours


def told(
    ours: UNetCondition, size: tuple[int, int], batch: int = 3
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Our conditions, diffusers' arguments, and what joins the latents."""
    text = torch.randn(batch, 5, ours.text_features or ours.text_dim)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
    cond, theirs = {"text": text}, {"encoder_hidden_states": text}
    if (
        not ours.only_cross
    ):  # diffusers masks the second attention alone; its networks of this kind read padding as text
        cond["text_mask"] = theirs["encoder_attention_mask"] = mask
    beside = torch.randn(batch, ours.beside_channels, *size)
    if ours.pooled_dim:
        numbers = torch.tensor(
            [[512.0, 384, 0, 17, 1024, 1024], [64, 64, 3, 0, 64, 32], [1024, 1024, 0, 0, 1024, 1024]]
        )
        cond |= {"pooled": torch.randn(batch, ours.pooled_dim)}
        cond |= {name: numbers[:, 2 * i : 2 * i + 2] for i, name in enumerate(ours.sizes)}
        theirs["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": numbers}
    if ours.guidance_dim:
        cond["guidance"] = torch.tensor([1.0, 7.5, 15.0])
        theirs["timestep_cond"] = guidance_sinusoids(cond["guidance"], ours.guidance_dim)
    if ours.num_classes:
        cond["label"] = theirs["class_labels"] = torch.tensor([0, 7, 9])
    return cond, theirs, beside


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name: str) -> None:
    config, size = CASES[name]
    theirs, ours = pair(config)
    cond, given, beside = told(ours, size)
    x, step = torch.randn(3, ours.latent_channels, *size), torch.tensor([0, 17, 999])
    leaf_theirs, leaf_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs = theirs(torch.cat((leaf_theirs, beside), 1), step, **given).sample
    y_ours = ours(torch.cat((leaf_ours, beside), 1), (step + 1) / 1000, cond)
    direction = torch.randn(y_theirs.shape)
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()
    assert y_ours.shape == (3, ours.out_channels, *size) and y_theirs.std() > 0.1
    assert error(y_ours, y_theirs) < 1e-5
    assert leaf_theirs.grad is not None and leaf_ours.grad is not None
    assert error(leaf_ours.grad, leaf_theirs.grad) < 1e-5

    # gradients go through the same conversion as weights
    args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    converted_config, converted = DIFFUSERS.to_theirs(
        {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, args
    )
    assert DIFFUSERS.model_args(converted_config) == args, "the config comes back"
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert converted.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values() if grad is not None)
    for n, expected in grads.items():
        assert expected is not None, n
        assert error(converted[n], expected, floor=1e-3 * largest) < 1e-5, n


def test_the_guidance_scale_is_told_as_lcms_pipeline_tells_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    scale = torch.tensor([1.0, 1.5, 8.0, 15.0])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    assert torch.equal(embed(None, scale - 1, embedding_dim=256), guidance_sinusoids(scale, 256))


# ---------------------------------------------------------------------------------------- by definition


def small(**changes: Any) -> UNetCondition:
    given = {
        "latent_size": 8,
        "widths": (8, 16),
        "depth": 1,
        "transformer_depth": (1, 0),
        "num_heads": 2,
        "text_dim": 6,
        "num_groups": 4,
    }
    torch.manual_seed(0)
    net = UNetCondition(**(given | changes))  # type: ignore[arg-type]
    net.init_weights()
    return net


def test_the_untrained_network_answers_zero_and_stages_are_their_shortcuts() -> None:
    net = small(guidance_dim=4)
    cond = {"text": torch.randn(2, 3, 6), "guidance": torch.ones(2)}
    assert not net(torch.randn(2, 4, 8, 8), torch.rand(2), cond).any()
    y = torch.randn(2, 8, 4, 4)
    assert torch.equal(net.levels.down[0].stages[0](y, torch.randn(2, 32), cond["text"]), y)
    decaying = {name for name, p in net.named_parameters() if tags_of(p).decay}
    assert decaying == {name for name, p in net.named_parameters() if p.dim() > 1}


def test_padding_says_nothing_and_masks_may_be_left_out() -> None:
    net = small()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 3, 6)
    plain = net(x, t, {"text": text})
    padded = torch.cat((text, torch.randn(2, 2, 6)), 1)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    torch.testing.assert_close(net(x, t, {"text": padded, "text_mask": mask}), plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(x, t, {"text": text, "text_mask": mask[:, :3]}), plain)


def test_what_does_not_fit_is_named() -> None:
    net, x, t = small(beside_channels=5, num_classes=3), torch.zeros(1, 9, 8, 8), torch.rand(1)
    given = {"text": torch.zeros(1, 3, 6), "label": torch.tensor([2])}
    assert net(x, t, given).shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="input has 4 channels; the network takes 4 and 5 beside"):
        net(x[:, :4], t, given)
    for cond, words in (
        ({"label": given["label"]}, "no 'text' among"),
        ({"text": given["text"]}, "no 'label' among"),
        ({**given, "text": torch.zeros(1, 3, 7)}, "text of 7 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            net(x, t, cond)
    for wrong in (
        {"widths": (30, 64)}, {"depth": (1, 2)}, {"transformer_depth": 0, "only_cross": (0,)}, {"num_heads": (3, 1, 1, 1)},
        {"only_cross": (3,)}, {"beside_channels": -1}, {"guidance_dim": 3}, {"pooled_dim": 4, "num_sizes": 5}, {"text_dim": 0},
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"unet_condition\."):
            UNetCondition(**wrong)  # type: ignore[arg-type]


def test_configs_of_other_networks_are_refused() -> None:
    for changes, words in (
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}, "down_block_types"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"cross_attention_dim": (12, 16)}, "cross_attention_dim"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"attention_head_dim": (2, 2, 2)}, "attention_head_dim"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type"),
        ({"in_channels": 3}, "beside_channels"),
    ):
        with pytest.raises(UserError, match=words):
            DIFFUSERS.model_args(_config(**changes))
    net = small(transformer_depth=(1, 2), middle_depth=3)
    with pytest.raises(UserError, match="middle_depth 3"):
        DIFFUSERS.config_of(net)
