"""What the card can do, by the simplest calls: matrix products, copies, attention. `nexus plan` reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nexus_scale.bench.gpu.measuring import Emit
from nexus_scale.contracts import UserError
from nexus_scale.kernels import choice
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.timing import median_ms

ATTENTION_SHAPES = ((64, 256), (72, 256), (64, 1178), (64, 4096), (64, 17776), (128, 1024), (128, 4096))
"""(head dim, tokens): DiT's at 64 and at XL's 72, SD3's, CogVideoX's, FLUX's."""

HEADS, TOKENS = 16, 16384
"""Heads, and tokens of a batch at least."""


def ceilings(device: torch.device, *, tiny: bool, emit: Emit) -> None:
    """bf16 products of square matrices, on random values: on zeros they are faster than on data; and a copy within the device."""
    size = 64 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda: a @ b, device, repeats=15)
    emit(row="matmul", size=size, dtype="bf16", ms=ms, tflops=2 * size**3 / ms / 1e9)
    source = torch.randn((1 << 12) if tiny else (1 << 29), device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device, repeats=15)
    moved = 2 * source.numel() * source.element_size()
    emit(row="copy", bytes_read_and_written=moved, ms=ms, gb_per_second=moved / ms / 1e6)


def attention_rates(device: torch.device, *, tiny: bool, emit: Emit) -> None:
    """Each implementation that is available, at each shape: forward, and forward with backward; TFLOP/s of useful work."""
    for dim, tokens in ((8, 16),) if tiny else ATTENTION_SHAPES:
        batch = 1 if tiny else max(1, TOKENS // tokens)
        q, k, v = (
            torch.randn(batch, HEADS, tokens, dim, device=device, dtype=torch.bfloat16).mul_(0.5).requires_grad_(True)
            for _ in range(3)
        )
        for name in choice.OPTIONS["attention"]:
            try:
                choice.choose({"attention": name}, device)
            except UserError as error:
                emit(row="attention", kernel=name, head_dim=dim, tokens=tokens, unavailable=str(error))
                continue
            shape = {"kernel": name, "head_dim": dim, "tokens": tokens, "batch": batch, "heads": HEADS}
            try:
                emit(row="attention", **shape, **_rates(q, k, v))
            except RuntimeError as error:  # no kernel for the shape, or no memory for one that keeps the whole matrix
                emit(row="attention", **shape, unavailable=str(error)[:300])


def _rates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    batch, heads, tokens, dim = q.shape
    forward_flops = 4 * batch * heads * tokens**2 * dim
    direction = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            attention(q, k, v)

    def both() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), direction)

    calls: dict[str, tuple[Callable[[], None], float]] = {"forward": (forward, 1.0), "both": (both, 3.5)}
    found: dict[str, float] = {}
    for name, (call, factor) in calls.items():
        ms = median_ms(call, q.device, repeats=15)
        found |= {f"{name}_ms": ms, f"{name}_tflops": factor * forward_flops / ms / 1e9}
    return found
