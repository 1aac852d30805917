"""MMDiT against diffusers' SD3Transformer2DModel with the same weights: outputs, gradients of parameters and inputs.

In float64 and in float32, relative to the largest value of each tensor; a bias's gradient is measured against that of
its layer's matrix if that is larger, since biases of keys have none in exact arithmetic (softmax does not see a shift
common to all keys) and hold rounding noise of either side.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nexus_scale.interop.mmdit import DIFFUSERS
from nexus_scale.models.diffusion.mmdit import MMDiT

SD3Transformer2DModel = pytest.importorskip("diffusers").SD3Transformer2DModel


class Case(NamedTuple):
    config: dict[str, Any]
    latents: tuple[int, int]
    text_tokens: int


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
    }
    return base | changes


CASES = {
    "sd3": Case(config(), (8, 8), 5),
    "qk_norm": Case(config(qk_norm="rms_norm"), (8, 8), 7),
    "dual": Case(config(dual_attention_layers=(0, 1)), (8, 12), 3),
    "dual_qk_norm_wide": Case(config(qk_norm="rms_norm", dual_attention_layers=(0,), num_layers=2), (6, 18), 11),
    "patch_1_heads_4": Case(
        config(patch_size=1, sample_size=5, num_attention_heads=4, caption_projection_dim=64, qk_norm="rms_norm"),
        (7, 4),
        1,
    ),
    "dual_in_last_block": Case(config(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2)), (24, 2), 6),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pair(case: Case) -> tuple[Any, MMDiT]:
    """diffusers' model with every parameter random, those that start as zero or one too, and ours with its weights."""
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(**case.config).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = MMDiT(**model_args).double()
    ours.load_state_dict(state)
    return theirs, ours


def inputs(case: Case, batch: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    c = case.config
    x = torch.randn(batch, c["in_channels"], *case.latents, dtype=torch.float64)
    t = torch.rand(batch, dtype=torch.float64)
    text = torch.randn(batch, case.text_tokens, c["joint_attention_dim"], dtype=torch.float64)
    return x, t, {"text": text, "pooled": torch.randn(batch, c["pooled_projection_dim"], dtype=torch.float64)}


def run_theirs(theirs: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return theirs(x, cond["text"], cond["pooled"], t.float() * 1000.0, return_dict=False)[0]


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    theirs, ours = (net.to(dtype) for net in pair(case))
    x, t, cond = inputs(case)
    x, cond = x.to(dtype), {key: value.to(dtype) for key, value in cond.items()}
    direction = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))

    results = []
    for run in (lambda *args: run_theirs(theirs, *args), ours):
        leaves = [v.clone().requires_grad_() for v in (x, cond["text"], cond["pooled"])]
        y = run(leaves[0], t, {"text": leaves[1], "pooled": leaves[2]})
        (y * direction).sum().backward()
        results.append((y.detach(), [leaf.grad for leaf in leaves]))
    (y_theirs, grads_theirs), (y_ours, grads_ours) = results

    assert y_ours.shape == x.shape
    assert y_theirs.std() > 0.1
    assert error(y_ours, y_theirs) < 1e-5
    for got, expected in zip(grads_ours, grads_theirs, strict=True):
        assert expected.abs().max() > 0
        assert error(got, expected) < 1e-5

    # gradients go through the same conversion as weights, so each is held against its counterpart
    ours_grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in ours.named_parameters()}
    model_args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    _, converted = DIFFUSERS.to_theirs(ours_grads, model_args)
    last = f"transformer_blocks.{case.config['num_layers'] - 1}.attn."
    dead = (f"{last}add_q_proj", f"{last}norm_added_q")  # the last block's text queries have no effect
    theirs_grads = {n: p.grad for n, p in theirs.named_parameters()}
    for n, expected in theirs_grads.items():
        assert expected is not None, n
        if n.startswith(dead):
            assert not expected.any()
            assert not converted[n].any()
            continue
        matrix = theirs_grads[n.removesuffix(".bias").removesuffix(".weight") + ".weight"]
        assert matrix.abs().max() > 1e-3, n
        assert error(converted[n], expected, floor=float(matrix.abs().max())) < 1e-5, n


def test_the_comparison_sees_a_swapped_final_modulation() -> None:
    case = CASES["sd3"]
    theirs, ours = pair(case)
    with torch.no_grad():
        linear = ours.final.mod.linear
        linear.weight.copy_(torch.cat(linear.weight.chunk(2)[::-1]))
        linear.bias.copy_(torch.cat(linear.bias.chunk(2)[::-1]))
        x, t, cond = inputs(case)
        assert error(ours(x, t, cond), run_theirs(theirs, x, t, cond)) > 1e-2


@pytest.mark.parametrize("name", ["sd3", "dual_qk_norm_wide"])
def test_masked_text_equals_each_sample_with_its_real_tokens(name: str) -> None:
    case = CASES[name]
    _, ours = pair(case)
    x, t, cond = inputs(case)
    lengths = [case.text_tokens, 2, 1]
    mask = torch.arange(case.text_tokens) < torch.tensor(lengths)[:, None]
    leaf = x.clone().requires_grad_()
    masked = ours(leaf, t, cond | {"text_mask": mask})
    (masked**2).sum().backward()
    assert leaf.grad is not None
    for i, length in enumerate(lengths):
        one = x[i : i + 1].clone().requires_grad_()
        y = ours(one, t[i : i + 1], {"text": cond["text"][i : i + 1, :length], "pooled": cond["pooled"][i : i + 1]})
        (y**2).sum().backward()
        assert one.grad is not None
        assert error(masked[i : i + 1], y) < 1e-5
        assert error(leaf.grad[i : i + 1], one.grad) < 1e-5
    # the mask is what did it
    assert error(ours(x, t, cond)[1:], masked[1:]) > 1e-4


def test_a_mask_of_real_tokens_alone_is_no_mask() -> None:
    case = CASES["qk_norm"]
    _, ours = pair(case)
    x, t, cond = inputs(case)
    mask = torch.ones(cond["text"].shape[:2], dtype=torch.bool)
    assert MMDiT.key_mask(mask, 16) is None
    with torch.no_grad():
        assert torch.equal(ours(x, t, cond | {"text_mask": mask}), ours(x, t, cond))


def test_a_copy_trained_apart_differs() -> None:
    """Parity is not an accident of shared memory: our weights are a copy of diffusers'."""
    theirs, ours = pair(CASES["sd3"])
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
