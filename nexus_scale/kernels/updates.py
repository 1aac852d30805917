"""Which kernel steps an optimizer, and how fast each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_scale.config.schema import Adam, AdamW, Optimizer
from nexus_scale.kernels import transfer
from nexus_scale.kernels.adam import FusedUpdate, TorchUpdate
from nexus_scale.kernels.choice import chosen, possible, settle, warn_once
from nexus_scale.kernels.timing import median_ms
from nexus_scale.kernels.update import PlainUpdate, Update

TRIED = 2**24
"""Weights on which implementations are timed at a start: 0.4 GB for a moment, enough to outgrow any cache."""

TENSORS = 8
"""Into how many tensors they are divided."""


def make_update(
    kernel: str,
    spec: Optimizer,
    masters: Sequence[Tensor],
    *,
    weight_decays: Sequence[float],
    lr_multipliers: Sequence[float],
    copies: Sequence[Tensor] | None = None,
) -> Update:
    """An optimizer over tensors that are given for good.

    Args:
        kernel: an option of `adam` in kernels/choice.py. `torch_fused` and `apex` know Adam alone; in their place, other optimizers take
            Triton's where it can run.
    """
    is_adam = isinstance(spec, AdamW | Adam)
    given: dict[str, Any] = {"weight_decays": weight_decays, "lr_multipliers": lr_multipliers, "copies": copies}
    if transfer.reads_freely(masters[0].device) or (kernel == "apex" and is_adam):
        return TorchUpdate(spec, masters, **given, kernel=kernel)
    device = masters[0].device
    if kernel == "triton" or (kernel != "torch_foreach" and not is_adam and "triton" in possible("adam", device)):
        from nexus_scale.kernels.triton_update import TritonUpdate

        return TritonUpdate(spec, masters, **given)
    kind = FusedUpdate if kernel == "torch_fused" and is_adam else PlainUpdate
    return kind(spec, masters, **given)


# --------------------------------------------------------------------------------------------- how fast each is


def settle_fastest(device: torch.device, numel: int = TRIED) -> str:
    """Times the implementations that can run on a device, has the fastest serve this process, and returns its name.

    One that fails is left out, with a warning: Triton, for example, needs a C compiler. If none can be timed (the memory is full), the one
    that was chosen without it serves on.
    """
    found: dict[str, float] = {}
    for kernel in possible("adam", device):
        try:
            found[kernel] = milliseconds(kernel, device, numel)
        except Exception as error:  # of a compiler, a driver, a library built for another version
            warn_once(f"kernels.adam: {kernel} cannot be timed here and is left out: {type(error).__name__}: {error}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not found:
        return chosen("adam")
    fastest = min(found, key=lambda kernel: found[kernel])
    others = ", ".join(f"{kernel} {ms:.2f}" for kernel, ms in sorted(found.items(), key=lambda pair: pair[1]))
    settle(
        "adam", fastest, f"the fastest here, in ms for {numel / 1e6:.0f} M weights in bf16 with an average: {others}"
    )
    return fastest


def benchmark(device: torch.device, numel: int = 2**28) -> list[dict[str, Any]]:
    """How near each implementation comes to the bandwidth of a plain copy on this device, measured beside it.

    Returns:
        For each: `kernel`, `parameters`, `ms`, `gb_per_second` of `BYTES` a weight, `copy_gb_per_second`, and `share` of it.
    """
    copied = 2 * 4 * numel / _copy_ms(device, numel) / 1e6
    rows = []
    for kernel in possible("adam", device):
        ms = milliseconds(kernel, device, numel)
        rate = BYTES * numel / ms / 1e6
        figures = {"ms": ms, "gb_per_second": rate, "copy_gb_per_second": copied, "share": rate / copied}
        rows.append({"kernel": kernel, "parameters": numel, **figures})
    return rows


def _copy_ms(device: torch.device, numel: int) -> float:
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source), device)


BYTES = 36
"""Bytes of one pass over a weight: a bf16 gradient read, master, two moments and an average read and written, the bf16 copy written:
2 + 4 * 8 + 2. A float32 gradient makes it 38."""


def milliseconds(kernel: str, device: torch.device, numel: int) -> float:
    """Milliseconds of one step of AdamW in bf16 with an average and a norm that is given; median of several."""
    each = -(-numel // TENSORS)
    masters = [torch.ones(each, device=device) for _ in range(TENSORS)]
    gradients = [torch.full((each,), 1e-3, dtype=torch.bfloat16, device=device) for _ in masters]
    tags = {"weight_decays": [0.1] * TENSORS, "lr_multipliers": [1.0] * TENSORS}
    update = make_update(kernel, AdamW(), masters, **tags, copies=[master.bfloat16() for master in masters])
    update.follow([[master.clone() for master in masters]])
    factor = torch.ones((), dtype=torch.float64, device=device)
    return median_ms(lambda: update(gradients, lr=1e-4, factor=factor, decays=[0.999]), device)
