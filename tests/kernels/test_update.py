"""Every way to step an optimizer against its paper in float64: odd sizes, tags, clipping, skips, averages, bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_scale.config.schema import SGD, Adam, AdamW, Optimizer, RMSprop
from nexus_scale.kernels.adam import FusedUpdate, TorchUpdate
from nexus_scale.kernels.update import (
    DeviceUpdate,
    PlainUpdate,
    Update,
    clip_factor,
    device_clip_factor,
    gradient_norm,
    moments_of,
)

SPECS: dict[str, Optimizer] = {
    "adamw": AdamW(betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
    "adam": Adam(betas=(0.5, 0.999), eps=1e-8, weight_decay=0.1),
    "adamw, clipped weights": AdamW(clip_weights=0.5),
    "rmsprop": RMSprop(alpha=0.9, weight_decay=0.1),
    "rmsprop with momentum": RMSprop(momentum=0.5, clip_weights=0.8),
    "sgd": SGD(weight_decay=0.1),
    "sgd with momentum": SGD(momentum=0.9, weight_decay=0.1),
    "nesterov": SGD(momentum=0.9, nesterov=True),
}
SHAPES = ((3, 5), (7,), (1,), (2, 515))
DECAYS, MULTIPLIERS = (0.1, 0.0, 0.1, 0.0), (1.0, 1.0, 0.5, 0.5)
FACTORS: tuple[float | None, ...] = (None, 0.3, math.nan, 1.0, math.inf, 0.01, 1.0)
KEPT = (0.9, 0.25)
KERNELS: dict[str, Callable[..., Update]] = {
    "plain": PlainUpdate,
    "torch_fused": FusedUpdate,
    "torch's optimizer": TorchUpdate,
    "torch's optimizer over lists": partial(TorchUpdate, kernel="torch_foreach"),
}

ON_DEVICES = [name for name, make in KERNELS.items() if isinstance(make, type) and issubclass(make, DeviceUpdate)]
CASES = [
    (kernel, name)
    for kernel in KERNELS
    for name, spec in SPECS.items()
    if kernel != "torch_fused" or spec.name in ("adam", "adamw")  # torch has a fused kernel for Adam alone
]


def by_the_paper(
    spec: Any, w: Tensor, gradient: Tensor, kept: list[Tensor], t: int, lr: float, decay: float
) -> tuple[Tensor, list[Tensor]]:
    """A weight in float64 and what its optimizer keeps, after update t = 1, 2, ... Kingma & Ba 2015, algorithm 1, and AdamW's line 12;
    RMSprop and momentum as in torch's documentation."""
    if spec.name == "adamw":
        w = w - lr * decay * w
    else:
        gradient = gradient + decay * w
    if spec.name in ("adam", "adamw"):
        (b1, b2), (m, v) = spec.betas, kept
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        return w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + spec.eps), [m, v]
    new = []
    if spec.name == "rmsprop":
        new = [spec.alpha * kept[0] + (1 - spec.alpha) * gradient**2]
        gradient = gradient / (new[0].sqrt() + spec.eps)
    if spec.momentum:
        buffer = spec.momentum * kept[-1] + gradient
        new.append(buffer)
        gradient = gradient + spec.momentum * buffer if getattr(spec, "nesterov", False) else buffer
    return w - lr * gradient, new


class Reference:
    """The same update of every tensor, in float64."""

    def __init__(self, spec: Optimizer, start: Sequence[Tensor]):
        self.spec, self.t = spec, 0
        self.weights = [tensor.double() for tensor in start]
        self.kept = [[torch.zeros_like(w) for _ in moments_of(spec)] for w in self.weights]
        self.averages = [[w.clone() for w in self.weights] for _ in KEPT]

    def step(self, gradients: Sequence[Tensor], lr: float, factor: float) -> None:
        if math.isfinite(factor):
            self.t += 1
            for i, gradient in enumerate(gradients):
                scaled, rate = gradient.double() * factor, lr * MULTIPLIERS[i]
                w, self.kept[i] = by_the_paper(
                    self.spec, self.weights[i], scaled, self.kept[i], self.t, rate, DECAYS[i]
                )
                bound = self.spec.clip_weights
                self.weights[i] = w if bound is None else w.clamp(-bound, bound)
        for part, average in zip(KEPT, self.averages, strict=True):
            for i, w in enumerate(self.weights):
                average[i] = part * average[i] + (1 - part) * w


def made(
    kernel: Callable[..., Update], spec: Optimizer, dtype: torch.dtype
) -> tuple[Update, list[Tensor], list[Tensor]]:
    """An update over fresh tensors, these, and their copies in bf16."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).clamp(-0.4, 0.4) for shape in SHAPES]
    masters: list[Tensor] = [nn.Parameter(tensor.clone()) for tensor in start]
    copies = [tensor.to(torch.bfloat16) for tensor in start] if dtype == torch.bfloat16 else None
    update = kernel(spec, masters, weight_decays=DECAYS, lr_multipliers=MULTIPLIERS, copies=copies)
    return update, start, copies or []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_a_step_is_the_papers(kernel: str, name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    update, start, copies = made(KERNELS[kernel], spec, dtype)
    averages = [[tensor.clone().view(-1) for tensor in start] for _ in KEPT]
    update.follow(averages)
    reference = Reference(spec, start)
    generator = torch.Generator().manual_seed(1)
    for number, factor in enumerate(FACTORS):
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        lr = 0.01 * (number + 1)
        reference.step(gradients, lr, 1.0 if factor is None else factor)
        update(gradients, lr=lr, factor=None if factor is None else torch.tensor(factor).double(), decays=KEPT)
        assert update.steps == reference.t
        for i, master in enumerate(update.masters):
            torch.testing.assert_close(master.detach().double(), reference.weights[i], rtol=1e-5, atol=2e-6)
            for j, moment in enumerate(moments_of(spec)):
                torch.testing.assert_close(
                    update.moments[moment][i].double(), reference.kept[i][j], rtol=1e-4, atol=1e-6
                )
            for j, values in enumerate(averages):
                torch.testing.assert_close(values[i].double(), reference.averages[j][i].view(-1), rtol=1e-5, atol=2e-6)
        assert all(torch.equal(copy, m.to(torch.bfloat16)) for copy, m in zip(copies, update.masters, strict=False))
    update.steps = 0
    assert update.steps == 0
    before = [values[0].clone() for values in averages]
    update([torch.ones(shape, dtype=dtype) for shape in SHAPES], lr=0.1)
    assert update.steps == 1 and all(torch.equal(a, b[0]) for a, b in zip(before, averages, strict=True))


class Unread(TorchDispatchMode):
    """Complains where a value is read on the host, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kernel", ON_DEVICES)
def test_a_step_on_a_device_reads_nothing_on_the_host(kernel: str) -> None:
    update, start, _ = made(KERNELS[kernel], SPECS["adamw, clipped weights"], torch.bfloat16)
    update.follow([[tensor.clone() for tensor in start]])
    gradients = [tensor.to(torch.bfloat16) for tensor in start]
    factor = torch.tensor(0.5, dtype=torch.float64)
    with Unread():
        update(gradients, lr=0.1, factor=factor, decays=[0.9])
    with pytest.raises(AssertionError, match="read on the host"), Unread():
        assert update.steps == 1
    with pytest.raises(ValueError, match=r"2 decays of 1 averages"):
        update(gradients, lr=0.1, decays=[0.9, 0.5])


@pytest.mark.parametrize("bound", [None, 1.0, 100.0])
@pytest.mark.parametrize("value", [3.0, 1.0, math.inf, math.nan])
def test_the_factor_that_clips(value: float, bound: float | None) -> None:
    expected = math.nan if not math.isfinite(value) else 1.0
    if bound == 1.0 and value == 3.0:
        expected = 1.0 / (3.0 + 1e-6)
    for factor in (clip_factor, device_clip_factor):
        assert float(factor(torch.tensor(value), bound)) == pytest.approx(expected, rel=1e-15, nan_ok=True)


def test_the_norm_is_summed_in_float32() -> None:
    gradients = [torch.full((5,), 2.0, dtype=torch.bfloat16), torch.tensor([4.0], dtype=torch.bfloat16)]
    assert gradient_norm(gradients).dtype == torch.float32 and float(gradient_norm(gradients)) == 6.0
    ones = [torch.ones(70_000, dtype=torch.bfloat16)] * 2
    assert float(gradient_norm(ones)) == pytest.approx(140_000**0.5, rel=1e-6), "bf16 would stop at 256"
