"""PixArt-alpha against diffusers' PixArtTransformer2DModel with the same weights, outputs and all gradients; sizes against the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.recipe import load_recipe, network_class
from nexus_scale.contracts import UserError
from nexus_scale.interop.pixart import DIFFUSERS
from nexus_scale.models.diffusion.pixart import PixArt
from nexus_scale.models.layers.tags import tags_of
from tests.models.test_dit_parity import error

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "sample_size": 8,
    "caption_channels": 10,
}
# their settings, then height and width of latents: square, portrait and landscape ones of sizes that the configured one does not divide
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "learned_variance": ({}, (8, 8)),
    "portrait": ({"num_layers": 1, "patch_size": 1, "in_channels": 3, "out_channels": 3}, (7, 5)),
    "micro_conditions": ({"sample_size": 128}, (10, 6)),
    "scaled_positions": ({"interpolation_scale": 2, "use_additional_conditions": True, "out_channels": None}, (6, 14)),
}
LENGTHS = [3, 1, 5]
STEPS = torch.tensor([0, 500, 999])
ORIGINAL, TARGET = (
    torch.tensor([[1024, 768], [300, 301], [64, 2048]]),
    torch.tensor([[1152, 896], [512, 2048], [960, 1024]]),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pair(changes: dict[str, Any], dtype: torch.dtype) -> tuple[Any, PixArt]:
    """diffusers' model with random weights and ours with the same."""
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(**SMALL | changes).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    arguments, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = PixArt(**arguments).double()
    ours.load_state_dict(state)
    return theirs.to(dtype), ours.to(dtype)


def inputs(net: PixArt, size: tuple[int, int], masked: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(3, net.latent_channels, *size, dtype=torch.float64)
    cond = {"text": torch.randn(3, 5, 10, dtype=torch.float64).to(dtype)}
    cond |= {"text_mask": torch.arange(5) < torch.tensor(LENGTHS)[:, None]} if masked else {}
    return x.to(dtype), cond | ({"original_size": ORIGINAL, "target_size": TARGET} if net.micro_conditions else {})


def of_theirs(model: Any, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
    added = {"resolution": None, "aspect_ratio": None}
    if "original_size" in cond:
        ratio = cond["target_size"][:, :1] / cond["target_size"][:, 1:]
        added = {"resolution": cond["original_size"].to(x.dtype), "aspect_ratio": ratio.to(x.dtype)}  # type: ignore[dict-item]
    y: Tensor = model(
        x, cond["text"], STEPS, added_cond_kwargs=added, encoder_attention_mask=cond.get("text_mask"),
    ).sample  # fmt: skip
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name: str, dtype: torch.dtype) -> None:
    changes, size = CASES[name]
    theirs, ours = pair(changes, dtype)
    x, cond = inputs(ours, size, name != "learned_variance", dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    texts = [cond["text"].clone().requires_grad_() for _ in range(2)]
    y_theirs = of_theirs(theirs, leaves[0], cond | {"text": texts[0]})
    y_ours = ours(leaves[1], (STEPS + 1) / 1000, cond | {"text": texts[1]})
    direction = torch.randn(y_theirs.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()

    assert y_ours.shape == (3, ours.out_channels, *size) and y_theirs.std() > 0.1
    assert error(y_ours, y_theirs) < 1e-5
    for got, expected in ((leaves[1].grad, leaves[0].grad), (texts[1].grad, texts[0].grad)):
        assert got is not None and expected is not None and error(got, expected) < 1e-5
    arguments = DIFFUSERS.model_args(dict(theirs.config))
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    _, converted = DIFFUSERS.to_theirs(gradients, arguments)
    expected_all = {n: p.grad for n, p in theirs.named_parameters()}
    assert converted.keys() == expected_all.keys()
    for n, expected in expected_all.items():
        matrix = expected_all.get(n.removesuffix(".bias") + ".weight", expected)
        assert expected is not None and matrix is not None and matrix.abs().max() > 1e-4, n
        assert error(converted[n], expected, floor=float(matrix.abs().max())) < 1e-5, n


def test_padding_and_the_order_of_sizes_matter_as_they_should() -> None:
    """What is masked changes nothing; height and width, and shift and scale of the shared modulation, are not taken for each other."""
    theirs, ours = pair(CASES["micro_conditions"][0], torch.float64)
    x, cond = inputs(ours, (4, 4), True, torch.float64)
    t = (STEPS + 1) / 1000
    with torch.no_grad():
        y = ours(x, t, cond)
        noise = torch.where(cond["text_mask"][..., None], cond["text"], torch.randn_like(cond["text"]))
        assert error(ours(x, t, cond | {"text": noise}), y) < 1e-12
        assert error(ours(x, t, cond | {"original_size": ORIGINAL.flip(1)}), y) > 1e-3
        assert error(ours(x, t, cond | {"target_size": TARGET.flip(1)}), y) > 1e-3
        shift, scale, *rest = ours.mod.linear.weight.chunk(6)
        ours.mod.linear.weight.copy_(torch.cat((scale, shift, *rest)))
        assert error(ours(x, t, cond), of_theirs(theirs, x, cond)) > 1e-2


def test_the_untrained_network_answers_zero_and_does_not_hear_the_text() -> None:
    torch.manual_seed(0)
    net = PixArt(latent_size=8, hidden_size=24, depth=2, num_heads=2, text_dim=10, micro_conditions=True)
    net.init_weights()
    x, cond = inputs(net, (8, 8), True, torch.float32)
    assert not net(x, torch.rand(3), cond).any()
    torch.nn.init.normal_(net.final.linear.weight)
    one, other = (net(x, STEPS / 1000, cond | {"text": text}) for text in (cond["text"], torch.randn(3, 5, 10)))
    assert one.any() and torch.equal(one, other)
    assert not tags_of(net.final.table).decay and tags_of(net.pixart_blocks[0].cross.kv.weight).decay


def test_inputs_that_do_not_fit_are_named() -> None:
    net = PixArt(latent_size=8, hidden_size=24, depth=1, num_heads=2, text_dim=10, micro_conditions=True)
    x, cond = inputs(net, (8, 8), False, torch.float32)
    t = torch.rand(3)
    for given, told, words in (
        (x[:, :3], cond, "3 channels"),
        (x[..., :7], cond, "8 x 7"),
        (x, cond | {"text": cond["text"][..., :4]}, "text has 4 channels"),
        (x, {"text": cond["text"]}, "original_size and target_size; add them to objective.conditions"),
    ):
        with pytest.raises(ValueError, match=words):
            net(given, t, told)
    for wrong in ({"hidden_size": 30}, {"patch_size": 3}, {"hidden_size": 16, "micro_conditions": True}):
        with pytest.raises(UserError, match=f"pixart.{next(iter(wrong))}"):
            PixArt(**{"num_heads": 4, **wrong})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="interpolation_scale 0"):
        PixArt(interpolation_scale=0)


def test_older_folders_name_another_class() -> None:
    """As the released PixArt-XL-2-1024-MS has it, whose settings are `Transformer2DModel`'s."""
    config = {
        "_class_name": "Transformer2DModel",
        "sample_size": 128,
        "caption_channels": 4096,
        "double_self_attention": False,
    }
    assert DIFFUSERS.model_args(config)["micro_conditions"]
    assert not DIFFUSERS.model_args(config | {"sample_size": 64})["micro_conditions"]
    with pytest.raises(UserError, match="norm_type is 'ada_norm'"):
        DIFFUSERS.model_args(config | {"norm_type": "ada_norm"})


@pytest.mark.parametrize(("name", "parameters"), [("256", 610_856_096), ("512", 610_856_096), ("1024", 611_349_152)])
def test_recipes_have_the_released_parameters(name: str, parameters: int) -> None:
    cls, arguments = network_class(load_recipe(f"pixart/{name}").trained()["model"])
    with torch.device("meta"):
        net = cls(**arguments)
    assert sum(p.numel() for p in net.parameters()) == parameters
    theirs = DIFFUSERS.config_of(net)
    assert theirs["sample_size"] == int(name) // 8 and theirs["interpolation_scale"] == max(int(name) // 512, 1)
