"""Chooses the implementation of each kernel, once per process; logged, and written into the run's environment.json.

A setting is `auto` or a name of `OPTIONS`. A path that is named but cannot run is an error; there is no fallback. Where it is `auto`,
what a run tried as it started (kernels/trial.py) goes before the rules here.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.kernels import flash, fp8
from nexus_scale.kernels.identity import Identity, identify_apex, identify_flash_attn

log = logging.getLogger(__name__)

OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": ("fp8", "onednn", "torch"),
    "attention": (
        "flash_attn",
        "flash_attn_3",
        "flash_attn_4",
        "cudnn",
        "torch_flash",
        "torch_efficient",
        "torch_math",
        "sdpa",
    ),
    "norm": ("apex", "torch"),
    "modulation": ("triton", "torch"),
    "rope": ("triton", "torch"),
    "adam": ("triton", "apex", "torch_fused", "torch_foreach"),
}
"""The implementations of each kernel, apart from `auto`."""

PLAIN = {name: paths[-1] for name, paths in OPTIONS.items()}
"""The plain implementation of each kernel."""

NOT_REPEATING = {
    ("attention", "cudnn"): "its backward adds with atomics, and torch has no other (pytorch/pytorch#182551)",
}
"""Implementations, as (kernel, path), whose results on a GPU differ in their last bits from one call to the next, each with the reason:
`cluster.deterministic` does without them. Whoever adds a path that adds with atomics, or chooses by timing within a call, names it here."""

AMPERE, HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class Choice:
    """`kernel`: one of `OPTIONS`. `why`: in one line, for people."""

    kernel: str
    why: str


_lock = threading.RLock()
_chosen: dict[str, Choice] | None = None
_settings: tuple[dict[str, str], str, bool] | None = (
    None  # what `_chosen` answers: paths wanted by kernel, the device type, and whether results must repeat
)
_warned: set[str] = set()

Shape = tuple[int, ...]
_by_shape: dict[tuple[str, Shape], str] = {}  # what a trial found faster than `_chosen` says
_noted: Counter[tuple[str, Shape]] | None = None  # shapes seen on the meta device, in `noting`


def warn_once(message: str) -> None:
    """Warns once per process and text that a path is not used. Not in code that is being compiled, which would come apart here."""
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        log.warning(message)


# ------------------------------------------------------------------------------------- one rule per kernel


def _usable(identity: Identity, module: str, device: torch.device) -> Choice | str:
    """The package as a choice, or why it is not available. Imported only if it is genuine and the device is CUDA."""
    if not identity.genuine:
        if identity.found:
            warn_once(identity.why)
        return identity.why
    if device.type != "cuda":
        return f"{identity.why} serves CUDA only, and the device is {device.type}"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        reason = f"{identity.why} does not load here: {error}"
        warn_once(reason)
        return reason
    return Choice(identity.name, identity.why)


def _cudnn(device: torch.device) -> Choice | str:
    if device.type != "cuda":
        return f"cuDNN serves CUDA only, and the device is {device.type}"
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < HOPPER:
        return f"{name} is older than Hopper, where cuDNN's attention is the faster one"
    return Choice("cudnn", f"{name}: cuDNN's attention is about twice as fast as FlashAttention 2 on Hopper and later")


def _flash(name: str, device: torch.device) -> Choice | str:
    identity, reason = flash.why_not(name, device)
    if reason is not None:
        if identity.found and not identity.genuine:
            warn_once(reason)
        return reason
    return Choice(name, f"{identity.why} in the place of torch's FlashAttention 2")


def _torchs(name: str, device: torch.device) -> Choice | str:
    if device.type != "cuda":
        return f"torch's kernels are chosen among on CUDA only, and the device is {device.type}"
    return Choice(name, f"the {name.removeprefix('torch_')} kernel of torch's scaled_dot_product_attention")


Probes = list[tuple[str, Callable[[], Choice | str]]]
"""Implementations of one kernel, preferred first; each probe returns a choice, or why it is not available."""


def _attention(device: torch.device) -> Probes:
    return [
        ("cudnn", lambda: _cudnn(device)),
        ("flash_attn", lambda: _usable(identify_flash_attn(), "flash_attn.flash_attn_interface", device)),
        ("sdpa", lambda: Choice("sdpa", "torch.nn.functional.scaled_dot_product_attention")),
        # by name, or as the fastest of a trial
        *((name, partial(_flash, name, device)) for name in flash.FORMS),
        *((name, partial(_torchs, name, device)) for name in ("torch_flash", "torch_efficient", "torch_math")),
    ]


def _norm(device: torch.device) -> Probes:
    return [
        ("apex", lambda: _usable(identify_apex(), "apex.normalization.fused_layer_norm", device)),
        ("torch", lambda: Choice("torch", "torch.nn.functional.layer_norm and rms_norm")),
    ]


def _adam(device: torch.device) -> Probes:
    def torch_fused() -> Choice | str:
        if device.type in ("cpu", "cuda"):
            return Choice("torch_fused", f"torch's own fused Adam runs on {device.type}")
        return f"torch's fused Adam does not run on {device.type}"

    return [
        ("triton", lambda: _triton("one pass over gradient, weight, moments and averages", device)),
        ("apex", lambda: _usable(identify_apex(), "apex.optimizers", device)),
        ("torch_fused", torch_fused),
        ("torch_foreach", lambda: Choice("torch_foreach", "torch's Adam over lists of tensors")),
    ]


def _linear(device: torch.device) -> Probes:
    def onednn() -> Choice | str:
        if device.type != "cpu":
            return f"oneDNN serves the CPU only, and the device is {device.type}"
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return "this torch has no oneDNN"
        return Choice("onednn", f"oneDNN's float32 products with {torch.backends.cpu.get_cpu_capability()}")

    probes: Probes = [("onednn", onednn), ("torch", lambda: Choice("torch", "torch.nn.functional.linear"))]
    by_name: Probes = [("fp8", lambda: _fp8(device))]  # it trains otherwise
    return [*(probes if device.type == "cpu" and _mkl_is_behind() else probes[::-1]), *by_name]


def _fp8(device: torch.device) -> Choice | str:
    if device.type != "cuda":
        return f"products of 8 bits need a GPU of compute capability 8.9 or later, and the device is {device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < fp8.ADA:
        return f"{torch.cuda.get_device_name(device)} has no products of 8 bits, which begin with compute capability 8.9 (Ada, Hopper)"
    return Choice("fp8", "large products in 8 bits, e4m3 forward and e5m2 for gradients")


def _mkl_is_behind() -> bool:
    """Whether MKL leaves AVX-512 unused here, as it does on processors that are not Intel's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _triton(what: str, device: torch.device) -> Choice | str:
    if device.type != "cuda":
        return f"Triton's kernels serve CUDA only, and the device is {device.type}"
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, OSError, RuntimeError) as error:
        return f"triton does not load here: {error}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler for what launches its kernels, and there is none: install gcc"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere: it has no bf16"
    return Choice("triton", f"triton {version}, {what}")


def _triton_or_torch(device: torch.device) -> Probes:
    return [
        ("triton", lambda: _triton("one pass over each activation, forward and backward", device)),
        ("torch", lambda: Choice("torch", "plain torch; torch.compile fuses it")),
    ]


_RULES: dict[str, Callable[[torch.device], Probes]] = {
    "linear": _linear,
    "attention": _attention,
    "norm": _norm,
    "modulation": _triton_or_torch,
    "rope": _triton_or_torch,
    "adam": _adam,
}


def _decide(name: str, wanted: str, device: torch.device, deterministic: bool = False) -> Choice:
    options = dict(_RULES[name](device))
    if deterministic:
        for path in [path for path in options if (name, path) in NOT_REPEATING]:
            options[path] = partial(_refused, name, path)
    if wanted != "auto":
        answer = options[wanted]()
        if isinstance(answer, str):
            raise UserError(f"kernels.{name}: {wanted!r} is not available here: {answer}. Set kernels.{name}: auto")
        return Choice(answer.kernel, f"asked for by name; {answer.why}")
    passed: list[str] = []
    for probe in options.values():
        answer = probe()
        if isinstance(answer, Choice):
            return Choice(answer.kernel, "; ".join([answer.why, *passed]))
        passed.append(answer)
    raise AssertionError(f"kernel {name} has no path for {device}")


def _refused(name: str, path: str) -> str:
    return f"{path} does not repeat to the bit, which cluster.deterministic asks for: {NOT_REPEATING[name, path]}"


# --------------------------------------------------------------------------------------------- the choice


def check(settings: Mapping[str, str]) -> None:
    """Checks settings as far as possible without their device.

    Raises:
        UserError: an unknown kernel or path; names the nearest.
    """
    for name, wanted in settings.items():
        if name not in OPTIONS:
            raise UserError(f"kernels.{name}: unknown kernel; {nearest(name, list(OPTIONS))}")
        if wanted not in ("auto", *OPTIONS[name]):
            raise UserError(f"kernels.{name}: no {wanted!r}; {nearest(wanted, ['auto', *OPTIONS[name]])}")


@contextmanager
def plain() -> Iterator[None]:
    """A context in which plain torch serves every kernel on any device, to measure shapes and costs."""
    global _chosen, _settings
    with _lock:
        before = _chosen, _settings
        _chosen = {name: Choice(path, "plain torch, for the meta device") for name, path in PLAIN.items()}
        _settings = None
        try:
            yield
        finally:
            _chosen, _settings = before


def choose(settings: Mapping[str, str], device: torch.device | str, deterministic: bool = False) -> dict[str, Choice]:
    """Chooses a path for every kernel of this process, and logs it. Repeating the call changes and logs nothing.

    Args:
        settings: `auto` or a name of `OPTIONS` by kernel; what is missing is `auto`.
        device: where the networks run.
        deterministic: leave out paths of `NOT_REPEATING`.
    Raises:
        UserError: an unknown kernel or path (names the nearest), or a named path that is not available.
    """
    global _chosen, _settings
    device = torch.device(device)
    check(settings)
    wanted = {name: settings.get(name, "auto") for name in OPTIONS}
    with _lock:
        if _chosen is not None and _settings == (wanted, device.type, deterministic):
            return dict(_chosen)
        decided = {name: _decide(name, wanted[name], device, deterministic) for name in OPTIONS}
        if _chosen is not None and {n: c.kernel for n, c in _chosen.items()} != {
            n: c.kernel for n, c in decided.items()
        }:
            log.warning("kernels are chosen again in this process: the settings or the device changed")
        _take_in(decided["attention"].kernel)
        _chosen, _settings = decided, (wanted, device.type, deterministic)
        log.info(
            "kernels on %s: %s", device.type, ", ".join(f"{name} {choice.kernel}" for name, choice in decided.items())
        )
        return dict(decided)


def _take_in(kernel: str) -> None:
    try:
        flash.take_in(kernel if kernel in flash.FORMS else None)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"kernels.attention: {kernel!r} does not load here: {error}. Set kernels.attention: auto", code=4
        ) from None


def chosen(name: str) -> str:
    """The implementation of kernel `name`; chosen for the present device if there was no choice yet."""
    if _chosen is None:
        choose({}, "cuda" if torch.cuda.is_available() else "cpu")
    assert _chosen is not None
    return _chosen[name].kernel


def possible(name: str, device: torch.device) -> list[str]:
    """Implementations of a kernel that can run on a device, preferred first."""
    return [option for option, probe in _RULES[name](device) if isinstance(probe(), Choice)]


def settle(name: str, kernel: str, why: str) -> None:
    """Has an implementation serve from now on: the fastest, for example, of those that were timed."""
    chosen(name)
    with _lock:
        assert _chosen is not None
        _chosen[name] = Choice(kernel, why)
        log.info("kernel %s: %s: %s", name, kernel, why)


def chosen_for(name: str, shape: Shape) -> str:
    """The implementation of kernel `name` for a shape (trial.py: `_key`): the fastest of a trial, else `chosen`."""
    return _by_shape.get((name, shape)) or chosen(name)


def note(name: str, shape: Shape) -> None:
    """Notes that kernel `name` was called with a shape, for `noting`; called on the meta device only."""
    if _noted is not None:
        _noted[name, shape] += 1


@contextmanager
def noting() -> Iterator[Counter[tuple[str, Shape]]]:
    """A context in which calls on the meta device are counted, by kernel and shape."""
    global _noted
    with _lock:
        before, _noted = _noted, Counter()
        try:
            yield _noted
        finally:
            _noted = before


def prefer(found: Mapping[tuple[str, Shape], str]) -> None:
    """Has the implementations that a trial found serve the shapes that it was made for."""
    _by_shape.clear()
    _by_shape.update(found)


def report() -> dict[str, dict[str, str]]:
    """Each kernel's implementation and the reason, for environment.json and `nexus doctor`: {name: {"kernel": ..., "why": ...}}."""
    chosen("attention")
    assert _chosen is not None
    return {name: {"kernel": choice.kernel, "why": choice.why} for name, choice in _chosen.items()}


def forget() -> None:
    """Forgets the choice, for tests and `nexus doctor`."""
    global _chosen, _settings
    with _lock:
        _chosen = _settings = None
        _warned.clear()
        _by_shape.clear()
        flash.take_in(None)
