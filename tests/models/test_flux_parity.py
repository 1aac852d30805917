"""Flux against diffusers' FluxTransformer2DModel with the same weights: outputs, gradients of parameters and inputs.

In float64 and in float32, relative to the largest value of each tensor; a bias's gradient is measured against that of
its layer's matrix if that is larger, since biases of keys have none in exact arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nexus_scale.interop.flux import DIFFUSERS
from nexus_scale.models.diffusion.flux import Flux
from tests.models.test_mmdit_parity import error

FluxTransformer2DModel = pytest.importorskip("diffusers").FluxTransformer2DModel


class Case(NamedTuple):
    config: dict[str, Any]
    latents: tuple[int, int]
    text_tokens: int


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    }
    return base | changes


CASES = {
    "schnell": Case(config(), (8, 8), 5),
    "dev": Case(config(guidance_embeds=True), (8, 12), 7),
    "one_of_each_wide": Case(config(num_layers=1, num_single_layers=1, in_channels=4), (2, 26), 1),
    "no_single_blocks": Case(config(num_single_layers=0, guidance_embeds=True), (10, 4), 3),
    "three_heads": Case(config(num_attention_heads=3, attention_head_dim=8, axes_dims_rope=(2, 2, 4)), (24, 2), 11),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pair(case: Case) -> tuple[Any, Flux]:
    """diffusers' model with every parameter random, and ours with its weights."""
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**case.config).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = Flux(**model_args).double()
    ours.load_state_dict(state)
    return theirs, ours


def inputs(case: Case, batch: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    c = case.config
    x = torch.randn(batch, c["in_channels"] // 4, *case.latents, dtype=torch.float64)
    text = torch.randn(batch, case.text_tokens, c["joint_attention_dim"], dtype=torch.float64)
    cond = {"text": text, "pooled": torch.randn(batch, c["pooled_projection_dim"], dtype=torch.float64)}
    if c.get("guidance_embeds"):
        cond["guidance"] = torch.rand(batch) * 6
    return x, torch.rand(batch), cond


def run_theirs(theirs: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """As its pipeline calls it: 2 x 2 latents packed on channels, places as ids."""
    B, C, H, W = x.shape
    h, w = H // 2, W // 2
    tokens = x.view(B, C, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * 4)
    ids = torch.zeros(h, w, 3)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)[None, :]
    y = theirs(
        hidden_states=tokens,
        encoder_hidden_states=cond["text"],
        pooled_projections=cond["pooled"],
        timestep=t,
        img_ids=ids.reshape(h * w, 3),
        txt_ids=torch.zeros(cond["text"].shape[1], 3),
        guidance=cond.get("guidance"),
        return_dict=False,
    )[0]
    return y.view(B, h, w, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


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
        y = run(leaves[0], t, cond | {"text": leaves[1], "pooled": leaves[2]})
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
    assert all(p.grad is not None for p in ours.parameters())
    model_args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    _, converted = DIFFUSERS.to_theirs({n: p.grad for n, p in ours.named_parameters()}, model_args)
    theirs_grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert converted.keys() == theirs_grads.keys()
    last = f"transformer_blocks.{case.config['num_layers'] - 1}."
    ends = ("ff_context", "attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q")
    # without single blocks nothing looks at the last text
    unseen = tuple(f"{last}{end}" for end in ends) if not case.config["num_single_layers"] else ()
    for n, expected in theirs_grads.items():
        if n.startswith(unseen):
            assert expected is None or not expected.any()
            assert not converted[n].any()
            continue
        assert expected is not None, n
        matrix = theirs_grads[n.removesuffix(".bias").removesuffix(".weight") + ".weight"]
        assert matrix.abs().max() > 1e-3, n
        assert error(converted[n], expected, floor=float(matrix.abs().max())) < 1e-5, n


@pytest.mark.parametrize("part", ["final", "axes", "guidance"])
def test_the_comparison_sees_what_is_easily_swapped(part: str) -> None:
    case = CASES["dev"]
    theirs, ours = pair(case)
    x, t, cond = inputs(case)
    expected = run_theirs(theirs, x, t, cond)
    with torch.no_grad():
        assert error(ours(x, t, cond), expected) < 1e-5
        if part == "final":
            linear = ours.final.mod.linear
            linear.weight.copy_(torch.cat(linear.weight.chunk(2)[::-1]))
            linear.bias.copy_(torch.cat(linear.bias.chunk(2)[::-1]))
        elif part == "axes":
            ours.rope_dims = (4, 8, 4)
        else:
            cond = cond | {"guidance": cond["guidance"] + 0.1}
        assert error(ours(x, t, cond), expected) > 1e-3


@pytest.mark.parametrize("name", ["dev", "three_heads", "no_single_blocks"])
def test_packed_masked_and_each_sample_alone_agree(name: str) -> None:
    case = CASES[name]
    _, masked = pair(case)
    args, _ = DIFFUSERS.to_ours(case.config, pair(case)[0].state_dict())
    packed = Flux(**args, attention="packed").double()
    packed.load_state_dict(masked.state_dict())
    x, t, cond = inputs(case)
    lengths = [case.text_tokens, 2, 1]
    mask = torch.arange(case.text_tokens) < torch.tensor(lengths)[:, None]

    def run(net: Flux, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        net.zero_grad()
        y = net(*args)
        y.square().sum().backward()
        return y.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    y_masked, grads_masked = run(masked, x, t, cond | {"text_mask": mask})
    y_packed, grads_packed = run(packed, x, t, cond | {"text_mask": mask})
    assert error(y_packed, y_masked) < 1e-6  # the angles are float32 in either
    total = {n: torch.zeros_like(g) for n, g in grads_masked.items()}
    for i, length in enumerate(lengths):
        alone = {key: value[i : i + 1] for key, value in cond.items()}
        alone["text"] = alone["text"][:, :length]
        y, grads = run(masked, x[i : i + 1], t[i : i + 1], alone)
        assert error(y_packed[i : i + 1], y) < 1e-6
        for n, grad in grads.items():
            total[n] += grad
    scale = max(float(grad.abs().max()) for grad in total.values())
    for n, grad in total.items():
        assert float((grad - grads_masked[n]).abs().max()) < 1e-6 * scale, n
        assert float((grad - grads_packed[n]).abs().max()) < 1e-6 * scale, n
    with torch.no_grad():  # the mask is what did it
        assert error(masked(x, t, cond)[1:], y_masked[1:]) > 1e-4
