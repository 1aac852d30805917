"""Attention by every implementation that a GPU has, against its formula in float64. Other kernels on a GPU are in tests/kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nexus_scale.kernels import choice
from nexus_scale.kernels.attention import attention


@pytest.fixture
def any_kernel() -> Iterator[None]:
    yield
    choice.forget()


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_attention_and_its_gradients_are_the_formulas(masked: bool, device: str, any_kernel: None) -> None:
    """By every implementation that is there and has a kernel for the shape."""
    done = []
    for dim, tokens in ((64, 256), (72, 256), (128, 200)):
        rng = torch.Generator().manual_seed(0)
        drawn = [torch.randn(2, 4, tokens, dim, generator=rng).bfloat16() for _ in range(4)]
        mask = (torch.arange(tokens) < tokens - 40).view(1, 1, 1, -1).expand(2, 1, 1, -1) if masked else None
        doubles = [value.double().requires_grad_() for value in drawn[:3]]
        y = exact(*doubles, mask)
        wanted = [y, *torch.autograd.grad(y, doubles, drawn[3].double())]
        for name in choice.possible("attention", torch.device(device)):
            choice.choose({"attention": name}, device)
            try:
                got = computed([value.to(device) for value in drawn], mask)
            except RuntimeError:  # it has none
                continue
            done.append((name, dim))
            for ours, theirs in zip(got, wanted, strict=True):
                error = float((ours.cpu().double() - theirs.detach()).norm() / theirs.detach().norm())
                assert error < 2e-2, f"{name}, head dim {dim}: off by {error:.1e}"
    assert {dim for _, dim in done} == {64, 72, 128}


def computed(values: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The result for (q, k, v), and gradients in the direction of the last value."""
    leaves = [value.requires_grad_() for value in values[:3]]
    y = attention(*leaves, mask=None if mask is None else mask.to(values[0].device))
    return [y.detach(), *torch.autograd.grad(y, leaves, values[3])]
