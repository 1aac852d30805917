"""Philox4x64-10 in one Triton kernel: the words of `random.words_numpy`, bit for bit, where their twin in torch launches 250 kernels.

Imported only where Triton is; `TRITON_INTERPRET=1` runs it on a CPU. Source: Salmon et al. 2011.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (what a kernel takes has types of Triton, made up as it is compiled)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit(do_not_specialize=["key_low", "key_high"])
def philox(POSITIONS, WORDS, blocks, key_low, key_high, BLOCK: tl.constexpr):
    """WORDS (B, blocks, 4) int64: those of counters position * blocks + 1 and on."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < blocks
    x0 = (tl.load(POSITIONS + row) * blocks + place + 1).to(tl.uint64)  # the three words above it stay 0
    x1 = tl.zeros_like(x0)
    x2 = tl.zeros_like(x0)
    x3 = tl.zeros_like(x0)
    k0 = tl.full((BLOCK,), 0, tl.uint64) + key_low.to(tl.uint64)
    k1 = tl.full((BLOCK,), 0, tl.uint64) + key_high.to(tl.uint64)
    m0 = tl.full((BLOCK,), 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full((BLOCK,), 0xCA5A826395121157, tl.uint64)
    w0 = tl.full((BLOCK,), 0x9E3779B97F4A7C15, tl.uint64)
    w1 = tl.full((BLOCK,), 0xBB67AE8584CAA73B, tl.uint64)
    for _ in range(10):
        high0, low0 = tl.umulhi(x0, m0), x0 * m0
        high1, low1 = tl.umulhi(x2, m1), x2 * m1
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0 += w0
        k1 += w1
    words = WORDS + (row.to(tl.int64) * blocks + place) * 4
    tl.store(words, x0.to(tl.int64), mask=inside)
    tl.store(words + 1, x1.to(tl.int64), mask=inside)
    tl.store(words + 2, x2.to(tl.int64), mask=inside)
    tl.store(words + 3, x3.to(tl.int64), mask=inside)


def words(key: tuple[int, int], positions: Tensor, blocks: int) -> Tensor:
    """As `random.words_plain`.

    Args:
        key: two integers that int64 can hold.
        positions: (B,) int64 on the device.
    """
    found = torch.empty(len(positions), blocks * 4, dtype=torch.int64, device=positions.device)
    philox[(len(positions), triton.cdiv(blocks, BLOCK))](positions, found, blocks, *key, BLOCK=BLOCK)
    return found
