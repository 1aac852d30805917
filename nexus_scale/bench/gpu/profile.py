"""Where the device's time goes: shares by kind of kernel, the longest kernels, and how long the device had nothing to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: tuple[tuple[str, str], ...] = (
    ("collectives", r"nccl|all_?gather|reduce_?scatter|all_?reduce"),
    ("optimizer", r"adam|multi_tensor|_foreach_|^(update_weights|square_sums|count_step|clip)$"),
    ("fused", r"^triton_"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("copies", r"^mem(cpy|set)|copy_?kernel|catarray|aten::(copy_|cat|_to_copy|clone|contiguous|fill_|zero_)$"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|cublas|splitk|conv|aten::(mm|addmm|bmm|baddbmm|linear)$|mkldnn|onednn"),
    ("fused", r"^[a-z_]\w*$"),
    ("elementwise", r"elementwise|reduce|norm|softmax|^aten::|index|scatter|gather|embedding|void "),
)
"""Kinds and the names of their kernels, in the order in which they are asked. What bears a plain name and is no library's matrix product is
a kernel of Triton, by inductor (`triton_...`) or by hand. On the CPU, where there are no kernels, the names are those of operations."""

LONGEST = 20


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name; `other` where none fits."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def profiled(do: Callable[[int], None], device: torch.device, steps: int) -> dict[str, Any]:
    """What so many steps took on the device, done by `do(steps)`.

    Returns:
        `device_ms`: milliseconds of a step in which any kernel ran; `shares`: by kind, of the sum of all kernels; `longest`: the twenty
        longest by name, milliseconds and calls a step.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        do(steps)
        if on_gpu:
            torch.cuda.synchronize(device)
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans = []
    for event in recorded.events():
        if on_gpu and event.device_type == DeviceType.CUDA and not _marks(event):
            spans.append((event.time_range.start, event.time_range.end))
            spent[event.name] += event.time_range.end - event.time_range.start
            calls[event.name] += 1
        elif not on_gpu and event.name.startswith("aten::"):
            spans.append((event.time_range.start, event.time_range.end))
            spent[event.name] += event.self_cpu_time_total
            calls[event.name] += 1
    return {
        "device_ms": covered(spans) / steps / 1e3,
        "shares": shares(spent),
        "longest": [
            {"kernel": name[:160], "kind": kind_of(name), "ms": time / steps / 1e3, "calls": calls[name] / steps}
            for name, time in spent.most_common(LONGEST)
        ],
    }


def _marks(event: Any) -> bool:
    """Whether an event on the device is the span of something on the host, and no kernel."""
    return event.is_user_annotation or event.name.startswith(
        ("aten::", "##", "Torch-Compiled", "CompiledFunction", "Optimizer.", "ProfilerStep", "nccl:")
    )


def shares(spent: Counter[str]) -> dict[str, float]:
    """Parts of the sum by kind, largest first."""
    kinds: Counter[str] = Counter()
    for name, time in spent.items():
        kinds[kind_of(name)] += time
    total = sum(kinds.values()) or 1
    return {kind: time / total for kind, time in kinds.most_common()}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans: kernels on several streams, and operations within others, count once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
