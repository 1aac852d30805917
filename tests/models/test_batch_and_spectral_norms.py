"""Norms that keep state: against torch's own, and alike however the global batch is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Follower
from nexus_scale.models.layers import spectral_norms
from nexus_scale.models.layers.batch_norms import BatchNorm, ConditionalBatchNorm


def followed(layer: Any, ranks: int = 1) -> None:
    assert isinstance(layer, Follower)
    layer.follow(layer.seen() * ranks)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (2, 1, 7, 1), (3, 4, 1, 5)])
def test_a_batch_norm_whose_batch_is_one_group_is_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(shape[1], shape[0]), nn.BatchNorm2d(shape[1])
    ours.init_weights(0.5)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        x, y = (torch.randn(shape) * 2 + 1).requires_grad_(), torch.randn(shape)
        found = [torch.autograd.grad((net(x) * y).sum(), [x, net.weight, net.bias]) for net in (ours, theirs)]
        close(ours(x), theirs(x.detach()))
        for a, b in zip(*found, strict=True):
            close(a, b)
        followed(ours)


def test_running_statistics_follow_torchs_one_step_at_a_time() -> None:
    torch.manual_seed(1)
    ours, theirs = BatchNorm(3, 4), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 2) * 3 - 1
        ours(x), theirs(x)
        followed(ours)
    followed(ours)  # nothing was seen since
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    close(ours(x), theirs(x))
    before = ours.running_var.clone()
    ours.train()(torch.full((4, 3, 5, 2), float("nan")))
    followed(ours)
    assert torch.equal(ours.running_var, before) and not ours.pending.any(), "a batch that is not finite moves nothing"


def test_a_batch_is_cut_as_one_likes() -> None:
    """Two workers with two micro-batches each; one that computes everything twice; and what is left over is a group of its own."""
    torch.manual_seed(2)
    x, label = torch.randn(8, 3, 4, 4), torch.arange(8) % 5
    net = ConditionalBatchNorm(3, 2, 5)
    net.init_weights()
    nn.init.normal_(net.weight), nn.init.normal_(net.bias)
    alone, cut, twice = (copy.deepcopy(net) for _ in range(3))
    whole = alone(x, label)
    followed(alone)
    parts = torch.cat([cut(part, some) for part, some in zip(x.split(2), label.split(2), strict=True)])
    followed(cut, ranks=2)
    torch.testing.assert_close(whole, parts)
    twice(x, label), twice(x, label)
    followed(twice)
    for other in (cut, twice):
        close(other.running_mean, alone.running_mean)
        close(other.running_var, alone.running_var)
    close(alone(x[:5], label[:5])[4:], net(x[4:5], label[4:5]))
    assert not torch.allclose(whole, ConditionalBatchNorm(3, 4, 5)(x, label)), "a group is what it says"


LAYERS = {
    "conv": (lambda: spectral_norms.Conv2d(3, 5), lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 5)),
    "point": (lambda: spectral_norms.Conv2d(4, 2, 1), lambda: nn.Conv2d(4, 2, 1), (3, 4, 1, 7)),
    "linear": (lambda: spectral_norms.Linear(7, 1), lambda: nn.Linear(7, 1), (3, 7)),
    "embedding": (lambda: spectral_norms.Embedding(6, 4), lambda: nn.Embedding(6, 4), ()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_spectral_norm_is_torchs(name: str) -> None:
    """With one forward in a step torch's parametrization has the same vectors, weights, outputs and gradients."""
    torch.manual_seed(3)
    make, theirs, shape = LAYERS[name]
    ours: Any = make()
    plain = theirs()
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            parameter.copy_(getattr(plain, key))
    ours.init_vectors()
    peer: Any = nn.utils.parametrizations.spectral_norm(plain)
    normed = peer.parametrizations.weight[0]
    normed._u, normed._v = ours.left.clone(), ours.right.clone()
    for _ in range(2):
        x = torch.tensor([1, 5, 0]) if name == "embedding" else torch.randn(shape)
        a, b = ours(x), peer(x)
        close(a, b)
        y = torch.randn_like(a)
        mine = torch.autograd.grad((a * y).sum(), ours.weight)[0]
        close(mine, torch.autograd.grad((b * y).sum(), peer.parametrizations.weight.original)[0])
        again = ours(x)
        assert torch.equal(a, again), "another forward of the step has the same vectors"
        followed(ours)
        close(ours.left, normed._u)
        close(ours.right, normed._v)
        with torch.no_grad():
            ours.weight -= 0.1 * mine
            peer.parametrizations.weight.original -= 0.1 * mine
    followed(ours)
    close(ours.left, normed._u)
    ours.eval(), peer.eval()
    close(ours(x), peer(x))
    largest = torch.linalg.matrix_norm(ours.normed().detach().flatten(1), 2)
    assert float(largest) == pytest.approx(1, rel=0.05)
