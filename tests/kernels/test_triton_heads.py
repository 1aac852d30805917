"""Triton's kernels between projection and attention against float64, in its interpreter on a CPU, or on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.kernels import heads
from nexus_scale.kernels.heads import LAYER, PLAIN, RMS
from nexus_scale.kernels.rope import rope_frequencies
from nexus_scale.models.diffusion.cogvideox import CogVideoXBlock
from nexus_scale.models.diffusion.flux import DoubleBlock, Joint, SingleBlock
from nexus_scale.models.diffusion.mmdit import MMDiTBlock
from tests.triton_on_a_cpu import compiled, interpreted, one_graph

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-5


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched; on a GPU, where they are not counted, both."""
    from nexus_scale.kernels import triton_heads

    monkeypatch.setattr(heads, "serves", lambda qkvs, num_heads, norm, rotation: norm != PLAIN or rotation is not None)
    monkeypatch.setattr(triton_heads, "PROGRAMS", 4)  # a program has several tokens
    if DEVICE == "cuda":
        return [kernel.fn.__name__ for kernel in triton_heads.KERNELS]
    return interpreted(monkeypatch)


def drawn(lengths: tuple[int, ...], N: int, E: int, norm: int, dtype: torch.dtype, B: int = 2) -> list[Tensor]:
    """Streams, the second a part of a longer one, and weights near 1."""
    rng = torch.Generator().manual_seed(0)
    more = [0, 2, 0][: len(lengths)]
    streams = [torch.randn(B, L + m, 3 * N * E, generator=rng)[:, m:] for L, m in zip(lengths, more, strict=True)]
    count = {PLAIN: 0, RMS: 2, LAYER: 4}[norm] * len(lengths)
    weights = [1 + torch.randn(E, generator=rng) / 4 for _ in range(count)]
    return [x.to(DEVICE, dtype) for x in (*streams, *weights)]


def outcome(call: Any, given: list[Tensor], dtype: torch.dtype, streams: int) -> list[Tensor]:
    """Results and gradients, of sums with weights that lie as attention's gradients do."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    outs = call(leaves[:streams], leaves[streams:])
    rng = torch.Generator().manual_seed(1)
    dys = [torch.randn(*out.transpose(1, 2).shape, generator=rng).to(DEVICE, dtype).transpose(1, 2) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, dys)]


CASES = {  # lengths of streams, streams with queries, heads, head dim, norm, first token that turns
    "normed": ((5,), 1, 3, 6, RMS, None),
    "normed and turned": ((9,), 1, 2, 20, RMS, 0),
    "two streams": ((4, 3), 2, 3, 8, RMS, 0),
    "the second without queries": ((4, 3), 1, 1, 4, RMS, None),
    "layer norm, the end turned": ((7,), 1, 5, 10, LAYER, 3),
    "layer norm": ((1,), 1, 2, 16, LAYER, None),
    "samples end to end": ((19,), 1, 2, 8, RMS, 0),
    "turned alone": ((6,), 1, 2, 32, PLAIN, 2),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_their_formulas(case: str, dtype: torch.dtype, tolerance: float, launched: list[str]) -> None:
    lengths, num_q, N, E, norm, turned_from = CASES[case]
    rotation = None
    if turned_from is not None:
        positions = torch.arange(sum(lengths) - turned_from)[:, None]
        cos, sin = rope_frequencies(positions, (E,), 100.0)
        rotation = cos.to(DEVICE), sin.to(DEVICE)
    first = turned_from or 0
    given = drawn(lengths, N, E, norm, dtype, B=1 if case == "samples end to end" else 2)
    settings = {"norm": norm, "num_q": num_q, "num_heads": N, "eps": EPS, "turned_from": first}
    got = outcome(lambda s, w: heads.joined(s, w, rotation, **settings), given, dtype, len(lengths))
    wanted = outcome(lambda s, w: heads.plain(s, w, rotation, **settings), given, torch.float64, len(lengths))
    for ours, exact in zip(got, wanted, strict=True):
        assert ours.dtype is dtype and ours.shape == exact.shape
        torch.testing.assert_close(
            ours.double(), exact, rtol=tolerance, atol=tolerance * float(exact.detach().abs().max())
        )
    assert {"heads_forward", "heads_backward"} <= set(launched)


def blocks() -> dict[str, tuple[torch.nn.Module, list[Any]]]:
    """Blocks of every family whose heads are normed or turned, with their inputs."""
    torch.manual_seed(0)
    D, N, L, T = 24, 2, 5, 3
    img, txt, silu_c = torch.randn(2, L, D), torch.randn(2, T, D), torch.randn(2, D)
    joint = Joint(*rope_frequencies(torch.arange(L + T)[:, None], (D // N,)))
    turning = rope_frequencies(torch.arange(L)[:, None], (D // N,))
    return {
        "mmdit": (
            MMDiTBlock(D, N, mlp_ratio=2, qk_norm=True, dual_attention=True, last=False),
            [img, txt, silu_c],
        ),
        "the last of mmdit": (
            MMDiTBlock(D, N, mlp_ratio=2, qk_norm=True, dual_attention=False, last=True),
            [img, txt, silu_c],
        ),
        "flux, double": (DoubleBlock(D, N, mlp_ratio=2), [img, txt, silu_c, joint]),
        "flux, single": (SingleBlock(D, N, mlp_ratio=2), [torch.cat((img, txt), dim=1), silu_c, joint, L]),
        "cogvideox": (CogVideoXBlock(D, N, D, 2), [img, txt, silu_c, turning]),
    }


def on_device(x: Any) -> Any:
    """A tensor, or a tuple of some, there."""
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    if isinstance(x, Joint):
        return x._replace(cos=x.cos.to(DEVICE), sin=x.sin.to(DEVICE))
    return tuple(map(on_device, x)) if isinstance(x, tuple) else x


@pytest.mark.parametrize("name", list(blocks()))
def test_a_block_computes_the_same_with_them(name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = blocks()[name]
    block, inputs = block.to(DEVICE), [on_device(x) for x in inputs]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, Tensor)]
    leaves += list(block.parameters())
    found = []
    for _ in range(2):
        outs = block(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum(out.square().sum() for out in outs)
        found.append([*outs, *torch.autograd.grad(loss, leaves, allow_unused=True)])
        assert ("heads_backward" in launched) == (len(found) == 1) or DEVICE == "cuda"
        launched.clear()
        monkeypatch.setattr(heads, "serves", lambda *_: False)
    for ours, plain in zip(*found, strict=True):
        given = [value for value in (ours, plain) if value is not None]
        if len(given) == 1:  # of a weight that nothing depends on
            assert not given[0].any()
        elif given:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))


def rotation_of(S: int, E: int) -> heads.Rotation:
    cos, sin = rope_frequencies(torch.arange(S)[:, None], (E,))
    return cos.to(DEVICE), sin.to(DEVICE)


def test_they_compile_whole_and_can_be_differentiated_twice(launched: list[str]) -> None:
    given, rotation = drawn((4, 3), 2, 8, RMS, torch.float32), rotation_of(7, 8)
    settings = {"norm": RMS, "num_q": 2, "num_heads": 2, "eps": EPS, "turned_from": 0}

    def ours(streams: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        return heads.joined(streams, weights, rotation, **settings)

    def plain(streams: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        return heads.plain(streams, weights, rotation, **settings)

    wanted = outcome(plain, given, torch.float32, 2)
    for got, exact in zip(outcome(one_graph(ours), given, torch.float32, 2), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert DEVICE == "cuda" or launched == 2 * ["heads_forward"] + 2 * ["heads_backward"]

    def penalty(call: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        y = sum(out.square().sum() for out in call(leaves[:2], leaves[2:]))
        slopes = torch.autograd.grad(y, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves))

    for got, exact in zip(penalty(ours), penalty(plain), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("N", "E", "norm"), [(24, 64, RMS), (30, 64, LAYER), (24, 128, RMS)])
def test_they_compile_for_an_h100_and_keep_their_sums_in_registers(
    N: int, E: int, norm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus_scale.kernels import triton_heads

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, _, most_heads, width, warps = triton_heads._shape(8, 1024, N, E)
    flags = {
        "ROWS": rows, "HEADS": most_heads, "WIDTH": width, "NORM": norm, "TURNED": True, "QUERIES": True, "VALUES": True,
    }  # fmt: skip
    for kernel in triton_heads.KERNELS:
        tensors = {name for name in kernel.arg_names if name.isupper()} - {*flags, "L", "N", "E"}
        types = {name: torch.float32 if name in ("COS", "SIN", "SUMS") else torch.bfloat16 for name in tensors}
        constants = {name: value for name, value in flags.items() if name in kernel.arg_names}
        figures = compiled(kernel, types, constants, warps, tmp_path)
        assert figures["spilled"] == 0, (kernel.fn.__name__, figures)
