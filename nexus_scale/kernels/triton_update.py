"""An optimizer's step in one pass, as a Triton kernel: gradient, master, moments and averages are read once, and all but the gradient
written once, with the bf16 copy. With Adam, a bf16 gradient and one average that is 36 bytes a weight.

One launch serves all tensors of a network. The kernel finds them by their addresses, in a table on the device; that of gradients is
written anew when an address has changed. Imported only where Triton is; the plain twin is `update.PlainUpdate`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexus_scale.config.schema import Adam, AdamW, Optimizer, RMSprop
from nexus_scale.kernels.update import DeviceUpdate

BLOCK, WARPS = 1024, 8
"""Weights that a program updates, and its warps: four weights a thread, which are 16 bytes in float32. Eight, the 16 bytes of bf16, have
values change threads through shared memory, and 105 registers a thread in place of 40 (compiled for an H100)."""

NORM_BLOCK = 8192
"""Gradients of which a program adds up the squares."""

MOST_AVERAGES = 4
"""Averages that move in the pass; more than these move after it."""

ADAM, RMSPROP, SGD = 0, 1, 2


@triton.jit
def update_weights(
    TENSORS, GRADIENTS, TAGS, PROGRAMS, FACTOR, CORRECTIONS,
    lr, first_kept, second_kept, first_added, second_added, eps, bound, w0, w1, w2, w3,
    RULE: tl.constexpr, DECOUPLED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLIPS: tl.constexpr,
    COPIES: tl.constexpr, AVERAGES: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor.

    TENSORS (n, 9): numel and addresses of master, moments, copy and averages. GRADIENTS (n,): addresses. TAGS (n, 2): multiplier of the
    learning rate, weight decay. PROGRAMS (p, 2): each program's tensor, and its first weight there.
    """
    program = tl.program_id(0).to(tl.int64)
    which = tl.load(PROGRAMS + 2 * program)
    start = tl.multiple_of(tl.load(PROGRAMS + 2 * program + 1), BLOCK)
    row = TENSORS + 9 * which
    numel = tl.load(row)
    master = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    first = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    copy = tl.load(row + 4).to(tl.pointer_type(tl.bfloat16))
    gradient = tl.load(GRADIENTS + which).to(tl.pointer_type(tl.bfloat16 if BF16 else tl.float32))
    a0 = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    a1 = tl.load(row + 6).to(tl.pointer_type(tl.float32))
    a2 = tl.load(row + 7).to(tl.pointer_type(tl.float32))
    a3 = tl.load(row + 8).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        master, first, second = tl.multiple_of(master, 16), tl.multiple_of(first, 16), tl.multiple_of(second, 16)
        copy, gradient = tl.multiple_of(copy, 16), tl.multiple_of(gradient, 16)
        a0, a1, a2, a3 = tl.multiple_of(a0, 16), tl.multiple_of(a1, 16), tl.multiple_of(a2, 16), tl.multiple_of(a3, 16)
    rate = lr * tl.load(TAGS + 2 * which)
    decay = tl.load(TAGS + 2 * which + 1)
    factor = tl.load(FACTOR).to(tl.float32)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:  # without a mask, by which a thread would read its eight weights one by one
        update_block(
            master, first, second, copy, gradient, a0, a1, a2, a3, at, numel, factor, CORRECTIONS, rate, decay,
            first_kept, second_kept, first_added, second_added, eps, bound, w0, w1, w2, w3,
            RULE, DECOUPLED, MOMENTUM, NESTEROV, CLIPS, COPIES, AVERAGES, False,
        )  # fmt: skip
    else:
        update_block(
            master, first, second, copy, gradient, a0, a1, a2, a3, at, numel, factor, CORRECTIONS, rate, decay,
            first_kept, second_kept, first_added, second_added, eps, bound, w0, w1, w2, w3,
            RULE, DECOUPLED, MOMENTUM, NESTEROV, CLIPS, COPIES, AVERAGES, True,
        )  # fmt: skip


@triton.jit
def update_block(
    master, first, second, copy, gradient, a0, a1, a2, a3, at, numel, factor, CORRECTIONS, rate, decay,
    first_kept, second_kept, first_added, second_added, eps, bound, w0, w1, w2, w3,
    RULE: tl.constexpr, DECOUPLED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLIPS: tl.constexpr,
    COPIES: tl.constexpr, AVERAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The formulas of `update.stepped`. `first` is Adam's mean, or momentum; `second` the mean square."""
    sound = tl.abs(factor) < float("inf")
    g = read(gradient, at, numel, MASKED).to(tl.float32) * factor
    old = read(master, at, numel, MASKED)
    w = old
    if DECOUPLED:
        w = w * (1.0 - rate * decay)
    else:
        g = g + decay * w
    if RULE == 0:
        m_old = read(first, at, numel, MASKED)
        v_old = read(second, at, numel, MASKED)
        m = m_old + first_added * (g - m_old)
        v = second_kept * v_old + second_added * g * g
        second_correction = tl.load(CORRECTIONS + 1).to(tl.float32)
        w = w - (rate / tl.load(CORRECTIONS).to(tl.float32)) * m / (tl.sqrt(v / second_correction) + eps)
        write(first, at, tl.where(sound, m, m_old), numel, MASKED)
        write(second, at, tl.where(sound, v, v_old), numel, MASKED)
    else:
        if RULE == 1:
            v_old = read(second, at, numel, MASKED)
            v = second_kept * v_old + second_added * g * g
            g = g / (tl.sqrt(v) + eps)
            write(second, at, tl.where(sound, v, v_old), numel, MASKED)
        if MOMENTUM:
            m_old = read(first, at, numel, MASKED)
            m = first_kept * m_old + g
            if NESTEROV:
                g = g + first_kept * m
            else:
                g = m
            write(first, at, tl.where(sound, m, m_old), numel, MASKED)
        w = w - rate * g
    if CLIPS:
        w = tl.minimum(tl.maximum(w, -bound), bound)
    w = tl.where(sound, w, old)
    write(master, at, w, numel, MASKED)
    if COPIES:
        write(copy, at, w.to(tl.bfloat16), numel, MASKED)
    if AVERAGES > 0:
        move(a0, at, w, w0, numel, MASKED)
    if AVERAGES > 1:
        move(a1, at, w, w1, numel, MASKED)
    if AVERAGES > 2:
        move(a2, at, w, w2, numel, MASKED)
    if AVERAGES > 3:
        move(a3, at, w, w3, numel, MASKED)


@triton.jit
def move(average, at, weight, added, numel, MASKED: tl.constexpr):
    """average <- average + added (weight - average), from the nearer end, as torch's lerp: with `added` 1 it is the weight to the bit."""
    old = read(average, at, numel, MASKED)
    step = weight - old
    write(average, at, tl.where(added < 0.5, old + added * step, weight - step * (1.0 - added)), numel, MASKED)


@triton.jit
def read(pointer, at, numel, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + at, mask=at < numel, other=0.0)
    else:
        return tl.load(pointer + at)


@triton.jit
def write(pointer, at, value, numel, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, value, mask=at < numel)
    else:
        tl.store(pointer + at, value)


@triton.jit
def square_sums(
    TENSORS, GRADIENTS, PROGRAMS, SQUARES, BF16: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """SQUARES (p,): the sum of squares of each program's block of gradients. No atomics: the same gradients give the same bits."""
    program = tl.program_id(0).to(tl.int64)
    which = tl.load(PROGRAMS + 2 * program)
    start = tl.multiple_of(tl.load(PROGRAMS + 2 * program + 1), BLOCK)
    numel = tl.load(TENSORS + 9 * which)
    gradient = tl.load(GRADIENTS + which).to(tl.pointer_type(tl.bfloat16 if BF16 else tl.float32))
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        g = read(gradient, at, numel, False).to(tl.float32)
    else:
        g = read(gradient, at, numel, True).to(tl.float32)
    tl.store(SQUARES + program, tl.sum(g * g, axis=0))


@triton.jit
def clip(NORM, FACTOR, bound, CLIPS: tl.constexpr):
    """`update.clip_factor` in one launch."""
    norm = tl.load(NORM).to(tl.float64)
    factor = norm * 0.0 + 1.0  # NaN where the norm is not finite
    if CLIPS:
        factor = tl.where(norm > bound, factor * bound / (norm + 1e-6), factor)
    tl.store(FACTOR, factor)


@triton.jit
def count_step(FACTOR, COUNT, BETAS, CORRECTIONS):
    """`DeviceUpdate._counted` in one launch."""
    sound = tl.abs(tl.load(FACTOR).to(tl.float64)) < float("inf")
    count = tl.load(COUNT) + sound.to(tl.float32)
    tl.store(COUNT, count)
    moment = tl.arange(0, 2)
    beta = tl.load(BETAS + moment)
    tl.store(CORRECTIONS + moment, 1.0 - tl.exp2(count.to(tl.float64) * tl.log2(beta)))


KERNELS = update_weights, square_sums, clip, count_step


class TritonUpdate(DeviceUpdate):
    """Any of the optimizers in one launch, with copies and up to MOST_AVERAGES averages."""

    takes_bf16 = True

    def __init__(
        self,
        spec: Optimizer,
        masters: Sequence[Tensor],
        *,
        weight_decays: Sequence[float],
        lr_multipliers: Sequence[float],
        copies: Sequence[Tensor] | None = None,
    ):
        super().__init__(spec, masters, weight_decays=weight_decays, lr_multipliers=lr_multipliers, copies=copies)
        self._constants, self._scalars = rule_of(spec)
        tags = list(zip(self.lr_multipliers, self.weight_decays, strict=True))
        self._tags = self._there(tags, torch.float32)
        self._programs, self._norm_programs = self._blocks(BLOCK), self._blocks(NORM_BLOCK)
        self._squares = torch.empty(len(self._norm_programs), dtype=torch.float32, device=self.count.device)
        self._gradients: tuple[list[int], Tensor] | None = None
        self._table()

    def follow(self, averages: Sequence[Sequence[Tensor]]) -> None:
        super().follow(averages)
        self._table()

    def _there(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A small table on the device; the host does not wait for its copy."""
        table = torch.as_tensor(values, dtype=dtype)
        device = self.masters[0].device
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)

    def _blocks(self, size: int) -> Tensor:
        """Which tensor each program works on, and from where."""
        starts = [torch.arange(0, master.numel(), size) for master in self.masters]
        rows = [torch.stack([torch.full_like(start, i), start], 1) for i, start in enumerate(starts)]
        return self._there(torch.cat(rows), torch.int64)

    def _table(self) -> None:
        """Writes down where everything is but the gradients."""
        names = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "square_avg")
        moments = [next((self.moments[name] for name in of if name in self.moments), None) for of in names]
        columns: list[list[Tensor] | None] = [self.masters, *moments, self.copies, *self.averages[:MOST_AVERAGES]]
        columns += [None] * (8 - len(columns))
        rows = []
        for i, master in enumerate(self.masters):
            tensors = [None if column is None else column[i] for column in columns]
            for tensor in tensors:
                if tensor is not None and not tensor.is_contiguous():
                    raise ValueError(f"tensor {i} of shape {tuple(tensor.shape)} is not contiguous; make it so")
            rows.append([master.numel(), *(0 if tensor is None else tensor.data_ptr() for tensor in tensors)])
        self._aligned = all(address % 16 == 0 for row in rows for address in row[1:])
        self._tensors = self._there(rows, torch.int64)

    def _readable(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
        """Gradients as the kernels read them, to be kept until these are queued, and what the kernels are compiled for.

        Their addresses are written down anew where one has changed: torch's allocator mostly gives the same ones in every step."""
        dtypes = {gradient.dtype for gradient in gradients}
        bf16 = dtypes == {torch.bfloat16}
        given = list(gradients)
        if not (bf16 or dtypes == {torch.float32}) or not all(gradient.is_contiguous() for gradient in given):
            dtype = torch.bfloat16 if bf16 else torch.float32
            given = [gradient.to(dtype).contiguous() for gradient in given]
        found = [gradient.data_ptr() for gradient in given]
        if self._gradients is None or self._gradients[0] != found:
            self._gradients = found, self._there(found, torch.int64)
            self._gradients_aligned = all(address % 16 == 0 for address in found)
        aligned = self._aligned and self._gradients_aligned
        return given, {"BF16": bf16, "ALIGNED": aligned, "num_warps": WARPS}

    @torch.no_grad()
    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        given, compiled_for = self._readable(gradients)
        assert self._gradients is not None
        square_sums[(len(self._norm_programs),)](
            self._tensors, self._gradients[1], self._norm_programs, self._squares, BLOCK=NORM_BLOCK, **compiled_for
        )
        del given
        return self._squares.sum().sqrt()

    def clip_factor(self, norm: Tensor) -> Tensor:
        bound, factor = self.spec.clip_grad_norm, torch.empty_like(self._one)
        clip[(1,)](norm, factor, bound or 0.0, CLIPS=bound is not None, num_warps=1)
        return factor

    def _counted(self, factor: Tensor) -> Tensor:
        corrections = torch.empty_like(self._betas)
        count_step[(1,)](factor, self.count, self._betas, corrections, num_warps=1)
        return corrections

    def _apply(
        self, gradients: Sequence[Tensor], lr: float, factor: Tensor, corrections: Tensor, decays: Sequence[float]
    ) -> None:
        given, compiled_for = self._readable(gradients)
        assert self._gradients is not None
        added = [1.0 - decay for decay in decays[:MOST_AVERAGES]]
        update_weights[(len(self._programs),)](
            self._tensors, self._gradients[1], self._tags, self._programs, factor, corrections,
            lr, *self._scalars, *added, *[0.0] * (MOST_AVERAGES - len(added)),
            **self._constants, COPIES=self.copies is not None, AVERAGES=len(added), BLOCK=BLOCK, **compiled_for,
        )  # fmt: skip
        del given
        for decay, average in zip(decays[MOST_AVERAGES:], self.averages[MOST_AVERAGES:], strict=True):
            torch._foreach_lerp_(average, self.masters, 1.0 - decay)


def rule_of(spec: Optimizer) -> tuple[dict[str, Any], list[float]]:
    """What the kernel is compiled for, and its numbers: parts of both moments that stay, parts that come in, eps, the bound of weights."""
    constants: dict[str, Any] = {"DECOUPLED": False, "MOMENTUM": False, "NESTEROV": False}
    bound, eps = spec.clip_weights, 0.0
    if isinstance(spec, AdamW | Adam):
        constants |= {"RULE": ADAM, "DECOUPLED": isinstance(spec, AdamW)}
        kept, added, eps = list(spec.betas), [1.0 - beta for beta in spec.betas], spec.eps
    elif isinstance(spec, RMSprop):
        constants |= {"RULE": RMSPROP, "MOMENTUM": spec.momentum > 0}
        kept, added, eps = [spec.momentum, spec.alpha], [1.0, 1.0 - spec.alpha], spec.eps
    else:
        constants |= {"RULE": SGD, "MOMENTUM": spec.momentum > 0, "NESTEROV": spec.nesterov}
        kept, added = [spec.momentum, 0.0], [1.0, 0.0]
    return {**constants, "CLIPS": bound is not None}, [*kept, *added, eps, bound or 0.0]
