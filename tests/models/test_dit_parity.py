"""DiT against diffusers' DiTTransformer2DModel with the same weights, outputs and all gradients; sizes against the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.callbacks.made import SERVICES
from nexus_scale.config.recipe import check, load_recipe, network_class
from nexus_scale.contracts import UserError
from nexus_scale.interop.dit import DIFFUSERS
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.models.layers.tags import tags_of
from nexus_scale.rehearsal import flops
from nexus_scale.rehearsal.costs import costs

# depth, hidden size, heads: table 1 of the paper
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# size, patch: parameters in millions and Gflops (a multiplication and its addition are one), tables 1 and 4 of the paper
PAPER = {
    ("S", 8): (33, 0.36), ("S", 4): (33, 1.41), ("S", 2): (33, 6.06),
    ("B", 8): (131, 1.42), ("B", 4): (130, 5.56), ("B", 2): (130, 23.01),
    ("L", 8): (459, 5.01), ("L", 4): (458, 19.70), ("L", 2): (458, 80.71),
    ("XL", 8): (676, 7.39), ("XL", 4): (675, 29.05), ("XL", 2): (675, 118.64),
}  # fmt: skip
PATCH_2 = {"S": 32.9, "B": 130.3, "L": 457.8, "XL": 674.8}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("size", "patch"), PAPER)
def test_parameters_and_flops_are_the_papers(size: str, patch: int) -> None:
    depth, hidden_size, num_heads = SIZES[size]
    with torch.device("meta"):
        net = DiT(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch)
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    millions, gflops = PAPER[size, patch]
    assert round(parameters) == millions
    if patch == 2:
        assert round(parameters, 1) == PATCH_2[size]
    counted = flops.count(net, *net.example_inputs(1, 0, "meta")).flops / 2e9
    assert counted == pytest.approx(gflops, rel=0.006)  # the paper rounds to two digits: 0.36 is 0.358
    assert net.tokens(0) == (32 // patch) ** 2


@pytest.mark.parametrize(("size", "patch"), PAPER)
def test_the_recipes_are_the_papers_twelve(size: str, patch: int) -> None:
    recipe = load_recipe(f"dit/{size.lower()}{patch}_imagenet")
    check(recipe, SERVICES)
    cls, arguments = network_class(recipe.trained()["model"])
    with torch.device("meta"):
        net = cls(**arguments)
    millions, gflops = PAPER[size, patch]
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    counted = costs(recipe)  # what the dry run prints: three forwards, two operations each
    assert counted["flops_per_sample"] / 6e9 == pytest.approx(gflops, rel=0.006)
    assert counted["tokens_per_sample"] == (32 // patch) ** 2
    assert (recipe.global_batch, recipe.optimizer.lr, recipe.optimizer.weight_decay) == (256, 1e-4, 0.0)


# ---------------------------------------------------------------------------------------------- diffusers


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    latent_size: int


def _config(**changes: Any) -> dict[str, Any]:
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    return small | changes


CASES = {
    "learned_variance": Case(_config(), 8),
    "one_block_patch_4": Case(_config(num_layers=1, patch_size=4, sample_size=16, norm_eps=1e-6), 16),
    "pixels": Case(_config(in_channels=3, out_channels=3, num_attention_heads=3, attention_head_dim=12), 8),
    "larger_than_configured": Case(_config(out_channels=None), 12),
    "wide": Case(_config(num_attention_heads=4, attention_head_dim=32, sample_size=24, num_layers=2), 24),
}


def pair(case: Case) -> tuple[Any, DiT]:
    """diffusers' model with random weights and ours with the same, in float64 and eval mode. Its blocks share an embedder."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(**case.config).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
        for block in theirs.transformer_blocks:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = DiT(**model_args).double()
    ours.load_state_dict(state)
    return theirs, ours


def inputs(case: Case, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """x, steps 0 .. 999, labels of which the last is none."""
    torch.manual_seed(1)
    size = case.latent_size
    x = torch.randn(batch, case.config["in_channels"], size, size, dtype=torch.float64)
    return x, torch.tensor([0, 17, 500, 999])[:batch], torch.tensor([0, 7, 9, 10])[:batch]


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    theirs, ours = (net.to(dtype) for net in pair(case))
    x, step, label = inputs(case)
    x = x.to(dtype)
    cond = {"label": label.clamp(max=9), "drop": label == 10}

    leaf_theirs, leaf_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs = theirs(leaf_theirs, step, label).sample
    y_ours = ours(leaf_ours, (step + 1) / 1000, cond)
    direction = torch.randn(y_theirs.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()

    assert y_ours.shape == (len(x), ours.out_channels, *x.shape[2:])
    assert y_theirs.std() > 0.1
    assert error(y_ours, y_theirs) < 1e-5
    assert leaf_theirs.grad is not None and leaf_ours.grad is not None
    assert error(leaf_ours.grad, leaf_theirs.grad) < 1e-5

    # gradients go through the same conversion as weights; that of our one embedder is the sum over theirs
    model_args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    _, converted = DIFFUSERS.to_theirs(
        {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, model_args
    )
    theirs_grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert converted.keys() == theirs_grads.keys()
    for n, expected in theirs_grads.items():
        if ".norm1.emb." in n:
            inner = n.split(".", 2)[2]
            expected = sum(g for m, g in theirs_grads.items() if m.endswith(inner))
        assert expected is not None, n
        matrix = theirs_grads[n.removesuffix(".bias").removesuffix(".weight") + ".weight"]
        assert matrix is not None and matrix.abs().max() > 1e-3, n
        assert error(converted[n], expected, floor=float(matrix.abs().max())) < 1e-5, n


def test_the_comparison_sees_swapped_parts_of_the_modulation() -> None:
    theirs, ours = pair(CASES["learned_variance"])
    x, step, label = inputs(CASES["learned_variance"])
    with torch.no_grad():
        linear = ours.dit_blocks[1].mod.linear
        shift, scale, *rest = linear.weight.chunk(6)
        linear.weight.copy_(torch.cat((scale, shift, *rest)))
        y = ours(x, (step + 1) / 1000, {"label": label})
        assert error(y, theirs(x, step, label).sample) > 1e-2


# ---------------------------------------------------------------------------------------- by definition


def small(**changes: Any) -> DiT:
    torch.manual_seed(0)
    given = {"latent_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    net = DiT(**(given | changes))
    net.init_weights()
    return net


@pytest.mark.parametrize(("shift", "last"), [(0, 10_000 ** (-127 / 128)), (1, 1e-4)])
def test_whole_steps_are_told_to_the_bit(shift: int, last: float) -> None:
    """DiT's own code divides the exponent by 128, diffusers' by 127; all thousand steps come through float32 times whole."""
    net = small(frequency_shift=shift)
    told: list[Tensor] = []
    net.time_embed.fc1.register_forward_hook(lambda module, args, out: told.append(args[0]))
    step = torch.arange(1000)
    net.time_embed((step + 1).float() / 1000)
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / (128 - shift))
    assert float(frequencies[-1]) == pytest.approx(last, rel=1e-5)
    angles = step[:, None].float() * frequencies
    assert torch.equal(told[0], torch.cat((angles.cos(), angles.sin()), 1))


def test_the_untrained_network_answers_zero_and_its_blocks_are_identities() -> None:
    net = small()
    x = torch.randn(3, 4, 8, 8)
    cond = {"label": torch.tensor([0, 1, 4])}
    assert not net(x, torch.rand(3), cond).any()
    tokens = torch.randn(3, 16, 32)
    assert torch.equal(net.dit_blocks[0](tokens, torch.randn(3, 32)), tokens)
    assert float(net.label_embed.table.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not net.time_embed.fc1.bias.any()


def test_a_dropped_label_is_the_row_of_no_class() -> None:
    net = small()
    torch.manual_seed(2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    dropped = net(x, t, {"label": torch.tensor([1, 3]), "drop": torch.tensor([True, False])})
    none = net(x, t, {"label": torch.tensor([5, 3])})
    assert torch.equal(dropped, none)
    assert not torch.equal(dropped[0], net(x, t, {"label": torch.tensor([1, 3])})[0])


def test_inputs_that_do_not_fit_are_named() -> None:
    net, t = small(), torch.rand(1)
    cond = {"label": torch.tensor([0])}
    with pytest.raises(ValueError, match="5 channels"):
        net(torch.zeros(1, 5, 8, 8), t, cond)
    with pytest.raises(ValueError, match="9 x 8"):
        net(torch.zeros(1, 4, 9, 8), t, cond)
    with pytest.raises(ValueError, match=r"labels from 6 to 6; expected 0 \.\. 4"):
        net(torch.zeros(1, 4, 8, 8), t, {"label": torch.tensor([6])})
    assert net(torch.zeros(1, 4, 8, 12), t, cond).shape == (1, 8, 8, 12)
    for wrong in ({"hidden_size": 30}, {"patch_size": 3}, {"depth": 0}, {"frequency_shift": 2}, {"mlp_ratio": 0}):
        with pytest.raises(UserError, match=f"dit.{next(iter(wrong))}"):
            DiT(**wrong)


def test_tags() -> None:
    net = small()
    assert not tags_of(net.label_embed.table).decay
    assert tags_of(net.patch_embed.weight).decay
    moved = net.to(torch.float64)
    assert not tags_of(moved.label_embed.table).decay
