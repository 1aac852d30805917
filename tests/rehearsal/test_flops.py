"""Counted costs against arithmetic by hand, without memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.kernels.attention import attention
from nexus_scale.rehearsal.flops import count


def test_linear_layers_count_two_per_multiply_add() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    forward = 2 * 3 * (8 * 16 + 16 * 4)
    assert count(network, torch.zeros(3, 8)).flops == forward
    # Backward: weights of both layers, and the input of the second only: the data need no gradient.
    assert count(network, torch.zeros(3, 8), backward=True).flops == forward * 2 + 2 * 3 * 16 * 4
    assert all(parameter.grad is None and not parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_both_products(masked: bool) -> None:
    q, k = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool) if masked else None

    def fn(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, k, mask=mask)

    forward = 2 * (2 * 3 * 5 * 7 * 8) * 2
    assert count(fn, q, k, mask).flops == forward
    assert count(fn, q.requires_grad_(), k.requires_grad_(), mask, backward=True).flops == 3 * forward


def test_bytes_are_what_operations_read_and_write() -> None:
    x = torch.zeros(10, 4)
    assert count(lambda a: a + a, x).bytes == 3 * 160
    assert count(lambda a: a.view(4, 10).transpose(0, 1), x).bytes == 0
    assert count(lambda a: a * 2, x.half()).bytes == 2 * 80


def test_mappings_reach_the_network_and_nothing_is_allocated() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(100_000, 100_000, device="meta"))  # 40 GB if it were real

        def forward(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
            assert cond["text"].is_meta and x.is_meta
            return x @ self.weight + cond["text"]

    assert count(Conditioned(), torch.zeros(1, 100_000), {"text": torch.zeros(1, 1)}).flops == 2 * 10**10


def test_backward_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="requires a gradient"):
        count(lambda x: x @ x, torch.zeros(2, 2), backward=True)
