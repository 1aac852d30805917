"""Products of 8 bits against what they stand for, computed by the CPU's own; and a network trained with them beside one in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels import choice, fp8
from nexus_scale.kernels.linear import linear
from tests.triton_on_a_cpu import one_graph


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "serves", lambda x, weight: weight.shape[0] % 16 == weight.shape[1] % 16 == 0)
    monkeypatch.setattr("nexus_scale.kernels.linear.chosen", lambda name: "fp8")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as 8 bits and a scale hold it, by hand: through the nearest value of the format."""
    scale = float(x.abs().max()) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).double() * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("asked_for")
def test_a_product_is_that_of_rounded_factors(bias: bool) -> None:
    given = [drawn(2, 16, 48), drawn(32, 48, seed=1), *([drawn(32, seed=2)] if bias else [])]
    leaves = [x.clone().requires_grad_() for x in given]
    y = linear(*leaves)
    dy = drawn(2, 16, 32, seed=3)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    x, weight = (rounded(x, fp8.INPUTS) for x in given[:2])
    slope = rounded(dy, fp8.GRADIENTS).flatten(0, 1)
    wanted = [x @ weight.T, (slope @ weight).view(2, 16, 48), slope.T @ x.flatten(0, 1)]
    if bias:
        wanted = [wanted[0] + given[2].double(), *wanted[1:], dy.double().sum((0, 1))]
    for ours, exact in zip(got, wanted, strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))
    assert not torch.allclose(y.double(), F.linear(*given).double(), rtol=1e-2, atol=1e-2), (
        "another product than bf16's"
    )


@pytest.mark.usefixtures("asked_for")
def test_what_is_not_finite_stays_so_and_zeros_stay_zeros() -> None:
    x, weight = drawn(16, 16), drawn(16, 16, seed=1)
    assert torch.equal(linear(torch.zeros_like(x), weight), torch.zeros_like(x))
    x[3, 4] = torch.inf
    assert not torch.isfinite(linear(x, weight)[3]).any()


@pytest.mark.usefixtures("asked_for")
def test_it_compiles_whole() -> None:
    leaves = [drawn(16, 32).requires_grad_(), drawn(16, 32, seed=1).requires_grad_()]
    found = [torch.autograd.grad(call(*leaves).float().square().sum(), leaves) for call in (one_graph(linear), linear)]
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2 * float(eager.abs().max()))


def test_it_serves_large_products_of_bf16_on_a_gpu_alone_and_is_never_chosen_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choice.choose({}, "cpu")["linear"].kernel != "fp8" and not fp8.serves(drawn(256, 256), drawn(256, 256))
    with pytest.raises(UserError, match=r"kernels.linear: 'fp8'.*compute capability 8.9.*device is cpu"):
        choice.choose({"linear": "fp8"}, "cpu")
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert isinstance(choice._fp8(device), choice.Choice) == able
        assert choice._decide("linear", "auto", device).kernel == "torch"
        if not able:
            with pytest.raises(UserError, match="A100 has no products of 8 bits"):
                choice._decide("linear", "fp8", device)


def test_a_small_network_learns_as_in_bf16(monkeypatch: pytest.MonkeyPatch, asked_for: None) -> None:
    """Two layers fit a random map of 32 features: after 80 steps of Adam both losses are a small part of the first, near each other."""
    losses = {}
    for kernel in ("fp8", "torch"):
        monkeypatch.setattr(fp8, "serves", lambda x, weight, kernel=kernel: kernel == "fp8")
        masters = [(drawn(64, 32, seed=1) / 8).float(), (drawn(32, 64, seed=2) / 8).float()]
        optimizer = torch.optim.Adam([m.requires_grad_() for m in masters], lr=1e-2)
        teacher, curve = drawn(32, 32, seed=3).float() / 6, []
        for step in range(80):
            x = drawn(64, 32, seed=10 + step)
            y = linear(torch.tanh(linear(x, masters[0].bfloat16())), masters[1].bfloat16())
            loss = (y.float() - torch.tanh(x.float() @ teacher)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss))
        losses[kernel] = curve
    last = {kernel: sum(curve[-10:]) / 10 for kernel, curve in losses.items()}
    assert last["fp8"] < 0.25 * losses["fp8"][0] and last["fp8"] < 1.5 * last["torch"] + 0.01, last


@pytest.mark.gpu
def test_gpu_products_of_8_bits_are_those_of_rounded_factors() -> None:
    if torch.cuda.get_device_capability() < fp8.ADA:
        pytest.skip("needs a GPU of compute capability 8.9 or later")
    choice.choose({"linear": "fp8"}, "cuda")
    x, weight, dy = (drawn(*shape, seed=i) for i, shape in enumerate(((512, 256), (768, 256), (512, 768))))
    leaves = [x.cuda().requires_grad_(), weight.cuda().requires_grad_()]
    y = linear(*leaves)
    got = [y, *torch.autograd.grad(y, leaves, dy.cuda())]
    small, slope = (rounded(value, fp8.INPUTS) for value in (x, weight)), rounded(dy, fp8.GRADIENTS)
    x_, weight_ = small
    for ours, exact in zip(got, (x_ @ weight_.T, slope @ weight_, slope.T @ x_), strict=True):
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))
