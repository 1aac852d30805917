"""Every way to step an optimizer against its paper in float64: odd sizes, tags, clipping, skips, averages, bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_scale.config.schema import SGD, Adam, AdamW, Optimizer, RMSprop
from nexus_scale.kernels import choice, updates
from nexus_scale.kernels import update as update_kernel
from nexus_scale.kernels.adam import FusedUpdate, TorchUpdate
from nexus_scale.kernels.update import (
    PlainUpdate,
    Update,
    clip_factor,
    device_clip_factor,
    gradient_norm,
    moments_of,
)
from nexus_scale.run import choices
from tests.triton_on_a_cpu import compiled, interpreted

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in Triton's interpreter

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

CASES = [
    (kernel, name)
    for kernel in (*KERNELS, "triton")
    for name, spec in SPECS.items()
    if kernel != "torch_fused" or spec.name in ("adam", "adamw")  # torch has a fused kernel for Adam alone
]


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Update]]:
    """KERNELS, and for a test of `triton` Triton's, which its interpreter runs."""
    if "triton" not in request.node.name:
        return KERNELS
    pytest.importorskip("triton")
    from nexus_scale.kernels.triton_update import TritonUpdate

    interpreted(monkeypatch)
    return {**KERNELS, "triton": TritonUpdate}


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
    kernel: Callable[..., Update], spec: Optimizer, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Update, list[Tensor], list[Tensor]]:
    """An update over fresh tensors, these, and their copies in bf16."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).clamp(-0.4, 0.4).to(device) for shape in SHAPES]
    masters: list[Tensor] = [nn.Parameter(tensor.clone()) for tensor in start]
    copies = [tensor.to(torch.bfloat16) for tensor in start] if dtype == torch.bfloat16 else None
    update = kernel(spec, masters, weight_decays=DECAYS, lr_multipliers=MULTIPLIERS, copies=copies)
    return update, start, copies or []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_a_step_is_the_papers(
    kernel: str, name: str, dtype: torch.dtype, kernels: dict[str, Callable[..., Update]]
) -> None:
    follows_the_paper(kernels[kernel], SPECS[name], dtype, loose=2.0**-7 if kernel == "triton" else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_a_step_on_a_gpu_is_the_papers(name: str, dtype: torch.dtype) -> None:
    for kernel in choice.possible("adam", torch.device("cuda")):
        follows_the_paper(partial(updates.make_update, kernel), SPECS[name], dtype, device="cuda")


def follows_the_paper(
    kernel: Callable[..., Update], spec: Optimizer, dtype: torch.dtype, loose: float = 0.0, device: str = "cpu"
) -> None:
    """Seven steps, two of them skipped. `loose`: of copies; Triton's interpreter cuts bf16 off where a GPU rounds."""
    update, start, copies = made(kernel, spec, dtype, device)
    averages = [[tensor.clone().view(-1) for tensor in start] for _ in KEPT]
    update.follow(averages)
    reference = Reference(spec, [tensor.cpu() for tensor in start])
    generator = torch.Generator().manual_seed(1)
    for number, factor in enumerate(FACTORS):
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        lr = 0.01 * (number + 1)
        reference.step(gradients, lr, 1.0 if factor is None else factor)
        there = None if factor is None else torch.tensor(factor, dtype=torch.float64, device=device)
        update([gradient.to(device) for gradient in gradients], lr=lr, factor=there, decays=KEPT)
        assert update.steps == reference.t
        for i, master in enumerate(update.masters):
            torch.testing.assert_close(master.detach().double().cpu(), reference.weights[i], rtol=1e-5, atol=2e-6)
            for j, moment in enumerate(moments_of(spec)):
                torch.testing.assert_close(
                    update.moments[moment][i].double().cpu(), reference.kept[i][j], rtol=1e-4, atol=1e-6
                )
            for j, values in enumerate(averages):
                torch.testing.assert_close(
                    values[i].double().cpu(), reference.averages[j][i].view(-1), rtol=1e-5, atol=2e-6
                )
        for copy, master in zip(copies, update.masters, strict=False):
            torch.testing.assert_close(copy, master.detach().to(torch.bfloat16), rtol=loose, atol=0)
    update.steps = 0
    assert update.steps == 0
    before = [values[0].clone() for values in averages]
    update([torch.ones(shape, dtype=dtype, device=device) for shape in SHAPES], lr=0.1)
    assert update.steps == 1 and all(torch.equal(a, b[0]) for a, b in zip(before, averages, strict=True))


class Unread(TorchDispatchMode):
    """Complains where a value is read on the host, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kernel", ["plain", "torch_fused", "triton"])
def test_a_step_on_a_device_reads_nothing_on_the_host(
    kernel: str, kernels: dict[str, Callable[..., Update]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_kernel, "clip_factor", device_clip_factor)
    update, start, _ = made(kernels[kernel], SPECS["adamw, clipped weights"], torch.bfloat16)
    update.follow([[tensor.clone() for tensor in start]])
    gradients = [tensor.to(torch.bfloat16) for tensor in start]
    with Unread():
        norm = update.norm(gradients)
        update(gradients, lr=0.1, factor=update.clip_factor(norm), decays=[0.9])
    exact = torch.cat([gradient.double().view(-1) for gradient in gradients]).norm()
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)
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


def test_the_fastest_of_those_that_were_timed_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cpu")
    choice.forget()
    assert updates.milliseconds("torch_fused", device, 1000) > 0
    times = {"torch_fused": 0.25, "torch_foreach": 0.125}
    monkeypatch.setattr(updates, "milliseconds", lambda kernel, device, numel: times[kernel])
    assert updates.settle_fastest(device) == "torch_foreach" == choice.chosen("adam")
    assert choice.report()["adam"]["why"].endswith("torch_foreach 0.12, torch_fused 0.25")
    del times["torch_foreach"]  # it fails
    assert choices._fastest_adam(device) == "torch_fused" == choice.chosen("adam")
    assert "torch_foreach cannot be timed here and is left out: KeyError" in caplog.text
    times["torch_foreach"] = 1.0
    fused, _ = updates.benchmark(device, 10**6)
    assert fused["kernel"] == "torch_fused" and fused["gb_per_second"] == 36 / 0.25
    assert fused["share"] == fused["gb_per_second"] / fused["copy_gb_per_second"]
    choice.forget()


@pytest.mark.gpu
def test_every_implementation_is_timed_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    choice.forget()
    device = torch.device("cuda")
    fastest = updates.settle_fastest(device, 2**20)
    assert "cannot be timed" not in caplog.text
    assert all(f"{kernel} " in choice.report()["adam"]["why"] for kernel in choice.possible("adam", device))
    assert fastest == choice.chosen("adam")
    choice.forget()


# ------------------------------------------------------------------------------------------- Triton's


def test_triton_has_more_averages_than_its_pass_and_gradients_from_anywhere(
    kernels: dict[str, Callable[..., Update]],
) -> None:
    """Five averages; gradients that begin at odd addresses, are laid out oddly, and mix precisions; addresses that change."""
    found = []
    for kernel in ("plain", "triton"):
        update, start, _ = made(kernels[kernel], SPECS["adamw"], torch.float32)
        averages = [[tensor.clone() for tensor in start] for _ in range(5)]
        update.follow(averages)
        for step in range(3):
            rng = torch.Generator().manual_seed(step)
            flat = torch.randn(1 + sum(tensor.numel() for tensor in start), generator=rng)[1:]
            parts = [p.view(s.shape) for p, s in zip(flat.split([s.numel() for s in start]), start, strict=True)]
            gradients = [parts[0].t().contiguous().t(), parts[1].bfloat16(), *parts[2:]]
            update(gradients, lr=0.01, decays=[0.9, 0.8, 0.7, 0.6, 0.5])
        found.append([*update.masters, *(value for values in averages for value in values)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found[0][-1], found[0][-5]), "averages move"


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("value", [3.0, 1.0, 0.0, math.inf, math.nan])
def test_triton_clips_and_counts(value: float, bound: float | None, kernels: dict[str, Callable[..., Update]]) -> None:
    spec = AdamW(clip_grad_norm=bound)
    update: Any = kernels["triton"](spec, [torch.zeros(1)], weight_decays=[0.0], lr_multipliers=[1.0])
    factor = update.clip_factor(torch.tensor(value))
    assert float(factor) == pytest.approx(float(clip_factor(torch.tensor(value), bound)), rel=1e-15, nan_ok=True)
    update.steps = 4
    corrections = update._counted(factor)
    assert update.steps == (5 if math.isfinite(value) else 4)
    assert corrections.tolist() == pytest.approx([1 - beta**update.steps for beta in spec.betas], rel=1e-12)


def test_triton_without_a_c_compiler_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler" in str(choice._triton("", torch.device("cuda")))


def test_triton_refuses_what_its_addresses_cannot_say(kernels: dict[str, Callable[..., Update]]) -> None:
    with pytest.raises(ValueError, match=r"tensor 0 of shape \(3, 5\) is not contiguous"):
        kernels["triton"](AdamW(), [torch.zeros(5, 3).t()], weight_decays=[0.0], lr_multipliers=[1.0])


def test_triton_reaches_weights_beyond_two_billion(kernels: dict[str, Callable[..., Update]]) -> None:
    """Of 2^31 + 70 weights only the last block is touched: the others take address space and no memory."""
    numel = 2**31 + 70
    master, gradient = torch.empty(numel), torch.empty(numel, dtype=torch.bfloat16)
    master[-100:], gradient[-100:] = 1.0, 1.0
    update: Any = kernels["triton"](SGD(), [master], weight_decays=[0.0], lr_multipliers=[1.0])
    update._programs = update._programs[-1:]
    assert update._programs.tolist() == [[0, 2**31]]
    update([gradient], lr=0.5)
    assert master[-100:].tolist() == [1.0] * 30 + [0.5] * 70


def test_triton_compiles_for_an_h100_into_whole_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full blocks of float32 move in pieces of 16 bytes, with no mask, no shared memory and no spilled register."""
    pytest.importorskip("triton")
    from nexus_scale.kernels import triton_update as ours

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    float64, int64 = dict.fromkeys(["FACTOR", "CORRECTIONS"], torch.float64), torch.int64
    types = {**float64, "TAGS": torch.float32, **dict.fromkeys(["TENSORS", "GRADIENTS", "PROGRAMS"], int64)}
    flags = {"COPIES": True, "AVERAGES": 1, "BF16": True, "ALIGNED": True, "BLOCK": ours.BLOCK}
    constants = {**ours.rule_of(SPECS["adamw"])[0], **flags}
    floats = [name for name in ours.update_weights.arg_names if name.islower()]
    figures = compiled(ours.update_weights, types, constants, ours.WARPS, tmp_path, floats)
    assert figures["spilled"] == 0 and figures["registers"] <= 64, figures
    code = (tmp_path / "kernel.ptx").read_text()
    assert code.count("ld.global.v4.b32") == code.count("st.global.v4.b32") == 4  # master, two moments, an average
    assert code.count("ld.global.v2.b32") == code.count("st.global.v2.b32") == 1  # gradient; copy
    assert "shared" not in code.split(".entry")[1]
    compiled(ours.clip, {"NORM": torch.float32, **float64}, {"CLIPS": True}, 1, tmp_path, ["bound"])
    compiled(ours.count_step, {**types, "COUNT": torch.float32, "BETAS": torch.float64}, {}, 1, tmp_path)
