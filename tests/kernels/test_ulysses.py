"""Attention over a sequence that is spread over ranks: outputs and gradients are those of one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.ulysses import gather_sequence, split_sequence, ulysses_attention
from tests.distributed import run_ranks

B, N, S, E, D = 2, 4, 12, 8, 16


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, S, D), weights of one projection (3 * N * E, D), a mask of keys (B, 1, 1, S), the loss's direction."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(B, S, D, generator=g), torch.randn(3 * N * E, D, generator=g) / 4
    mask = (torch.arange(S) < torch.tensor([[S], [7]]))[:, None, None, :]
    return x, w, mask, torch.randn(B, S, N * E, generator=g)


def heads(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (x @ w.T).unflatten(-1, (3, N, E)).permute(2, 0, 3, 1, 4)
    return q, k, v


def alone(masked: bool) -> list[torch.Tensor]:
    x, w, mask, direction = problem()
    x.requires_grad_()
    w.requires_grad_()
    y = attention(*heads(x, w), mask=mask if masked else None).transpose(1, 2).flatten(2)
    (y * direction).sum().backward()
    assert x.grad is not None and w.grad is not None
    return [y.detach(), x.grad, w.grad]


def spread(rank: int, world_size: int, masked: bool, compiled: bool) -> float:
    """Largest difference from one rank's, relative to the largest value."""
    attend = torch.compile(ulysses_attention, backend="aot_eager", fullgraph=True) if compiled else ulysses_attention
    x, w, mask, direction = problem()
    x.requires_grad_()
    w.requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    part = split_sequence(x, group)
    y = attend(*heads(part, w), group=group, mask=mask if masked else None)
    y = gather_sequence(y.transpose(1, 2).flatten(2), group)
    (y * direction).sum().backward()
    assert x.grad is not None and w.grad is not None
    for grad in (x.grad, w.grad):
        dist.all_reduce(grad)  # each rank has that of its own tokens
    expected = alone(masked)
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip([y.detach(), x.grad, w.grad], expected, strict=True)
    )


def too_many_ranks(rank: int, world_size: int) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    said = []
    q = torch.zeros(1, 3, 4, 8)
    for call in (lambda: ulysses_attention(q, q, q, group=group), lambda: split_sequence(torch.zeros(1, 5, 4), group)):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    return said


@pytest.mark.parametrize(
    ("world_size", "masked", "compiled"),
    [(2, False, False), (4, True, False), (2, True, True)],
    ids=["two", "four, masked", "two, masked, compiled"],
)
def test_outputs_and_gradients_equal_one_rank(world_size: int, masked: bool, compiled: bool) -> None:
    errors = run_ranks(world_size, spread, masked, compiled)
    assert max(errors) < 1e-5


def test_the_comparison_sees_the_mask() -> None:
    assert (alone(True)[0] - alone(False)[0]).abs().max() > 1e-2


def test_what_does_not_divide_is_refused() -> None:
    for heads_said, tokens_said in run_ranks(2, too_many_ranks):
        assert "3 heads do not divide among 2 ranks" in heads_said
        assert "5 tokens does not divide among 2 ranks" in tokens_said
