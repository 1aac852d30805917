"""Triton's kernels of a modulated block against float64, in its interpreter on a CPU, or on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.kernels import blocked, choice, modulation
from tests.triton_on_a_cpu import compiled, interpreted, one_graph

pytest.importorskip("triton")
pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-5


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched; on a GPU, where they are not counted, always the three."""
    from nexus_scale.kernels import triton_modulation

    monkeypatch.setattr(modulation, "serves", lambda x: True)
    monkeypatch.setattr(triton_modulation, "PROGRAMS", 4)  # a program has several tokens
    if DEVICE == "cuda":
        return [kernel.fn.__name__ for kernel in triton_modulation.KERNELS]
    return interpreted(monkeypatch)


def plain(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + gate[:, None] * y
    return stream, F.layer_norm(stream, (x.shape[-1],), eps=EPS) * (1 + scale[:, None]) + shift[:, None]


CASES: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "norm": (
        lambda x, gate, y, shift, scale: blocked.norm_modulate(x, shift, scale, EPS),
        lambda x, gate, y, shift, scale: plain(x, 0 * gate, y, shift, scale)[1],
    ),
    "branch": (
        lambda x, gate, y, shift, scale: blocked.branch(x, shift, scale, EPS),
        lambda x, gate, y, shift, scale: plain(x, 0 * gate, y, shift, scale),
    ),
    "gated_branch": (
        lambda x, gate, y, shift, scale: blocked.gated_branch(x, gate, y, shift, scale, EPS),
        lambda *given: plain(*given),
    ),
    "gated_add": (
        lambda x, gate, y, shift, scale: blocked.gated_add(x, gate, y),
        lambda *given: plain(*given)[0],
    ),
}


def drawn(B: int, L: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """x, gate, y, shift, scale, laid out as in a block: y is part of two streams, the vectors are rows of one projection."""
    rng = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE, dtype)

    shift, scale, gate = values(B, 3 * D).chunk(3, dim=-1)
    return [values(B, L, D) + 1, gate, values(B, L + 3, D)[:, 3:], shift, scale]


def outcome(fn: Callable[..., object], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients, of sums with fixed weights that are in turn laid out oddly: every second feature of a larger tensor."""
    leaves = [value.detach().to(dtype).requires_grad_() for value in given]
    out = fn(*leaves)
    outs: tuple[Tensor, ...] = out if isinstance(out, tuple) else (out,)  # type: ignore[assignment]
    rng = torch.Generator().manual_seed(9)
    weights = [torch.randn(*o.shape[:-1], 2 * o.shape[-1], generator=rng).to(DEVICE, dtype)[..., ::2] for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights, allow_unused=True)]


def close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for ours, exact in zip(got, wanted, strict=True):
        if ours is not None:
            torch.testing.assert_close(
                ours.double(), exact.double(), rtol=tolerance, atol=tolerance * float(exact.detach().abs().max())
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(2, 9, 100), (1, 1, 33), (5, 1, 64), (2, 13, 130)])
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_their_formulas(
    case: str, shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, launched: list[str]
) -> None:
    kernel, formula = CASES[case]
    given = drawn(*shape, dtype)
    got, wanted = outcome(kernel, given, dtype), outcome(formula, given, torch.float64)
    close(got, wanted, tolerance)
    assert all(value.dtype is dtype for value in got if value is not None)
    assert ("gated_add_backward" if case == "gated_add" else "norm_modulate_backward") in launched


def test_the_same_call_has_the_same_bits(launched: list[str]) -> None:
    kernel, _ = CASES["gated_branch"]
    first, second = (outcome(kernel, drawn(2, 13, 130), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and launched


def block(x: Tensor, mod: Tensor, weight: Tensor) -> Tensor:
    """A block of two branches, each a linear map and tanh."""
    shift, scale, gate, shift2, scale2, gate2 = mod.chunk(6, dim=-1)
    x, y = blocked.branch(x, shift, scale, EPS)
    x, y = blocked.gated_branch(x, gate, torch.tanh(y @ weight), shift2, scale2, EPS)
    return blocked.gated_add(x, gate2, torch.tanh(y @ weight))


def leaves_of_a_block() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = (2, 5, 12), (2, 72), (12, 12)
    return [(torch.randn(*shape, generator=rng) / 2).to(DEVICE).requires_grad_() for shape in shapes]


def test_a_block_compiles_whole_and_its_gradients_are_those_of_plain_torch(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = leaves_of_a_block()
    found = []
    for fn in (one_graph(block), block):
        y = fn(*leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        seen = list(launched)
        monkeypatch.setattr(modulation, "serves", lambda x: False)
    close(found[0], found[1], 1e-5)
    forwards_and_backwards = 2 * ["norm_modulate_forward"] + ["gated_add_backward"] + 2 * ["norm_modulate_backward"]
    assert DEVICE == "cuda" or seen == forwards_and_backwards


def test_a_gradient_can_be_differentiated_in_turn(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, found = leaves_of_a_block(), []
    for _ in range(2):
        gradients = torch.autograd.grad(torch.tanh(block(*leaves)).sum(), leaves, create_graph=True)
        found.append(list(torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)))
        monkeypatch.setattr(modulation, "serves", lambda x: False)
    close(found[0], found[1], 1e-4)
    assert launched


@pytest.mark.parametrize(("D", "num_warps"), [(1152, 8), (3072, 8)])
def test_kernels_compile_for_an_h100_and_keep_their_sums_in_registers(
    D: int, num_warps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus_scale.kernels import triton_modulation

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, _, wide, warps = triton_modulation._shape(torch.empty(64, 256, D, device="meta"))
    assert warps == num_warps
    flags = {"GATED": True, "RESIDUAL": True, "ROWS": 32, "BLOCK": wide}
    for kernel in triton_modulation.KERNELS:
        tensors = {name for name in kernel.arg_names if name.isupper()} - {*flags, "L", "D"}
        types = {name: torch.float32 if name in ("MEAN", "RSTD", "SUMS") else torch.bfloat16 for name in tensors}
        constants = {name: value for name, value in flags.items() if name in kernel.arg_names}
        figures = compiled(kernel, types, constants, num_warps, tmp_path)
        assert figures["spilled"] == 0 and figures["registers"] <= 192, (kernel.fn.__name__, figures)


def test_a_cpu_has_plain_torch() -> None:
    choice.forget()
    assert choice.choose({}, "cpu")["modulation"].kernel == "torch"
    assert not modulation.serves(torch.empty(1, 1, 8))
