"""Adam and AdamW: torch's fused kernel, Apex's, or torch's over lists of tensors.

Source: Kingma & Ba 2015; Loshchilov & Hutter 2019 (decoupled weight decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nexus_scale.kernels.choice import chosen, warn_once


def make_adam(
    groups: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> torch.optim.Optimizer:
    """An Adam optimizer over parameters or parameter groups.

    Args:
        groups: parameters, or groups {"params": [...], "lr": ..., "weight_decay": ...} that override the defaults.
        decoupled: True is AdamW; False adds weight_decay * parameter to the gradient.
    Returns:
        An optimizer whose state per parameter is `exp_avg`, `exp_avg_sq` (and torch's `step`).
    """
    # Parameters may be generators: list them once before they are inspected and passed on.
    given: list[Any] = [
        {**group, "params": list(group["params"])} if isinstance(group, dict) else group for group in groups
    ]
    tensors = [p for group in given for p in (group["params"] if isinstance(group, dict) else [group])]
    kernel = chosen("adam")
    common: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if kernel == "apex" and all(p.is_cuda for p in tensors):
        from apex.optimizers import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(given, adam_w_mode=decoupled, **common)
        return optimizer
    fused = kernel != "torch_foreach" and all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in tensors
    )
    if not fused and kernel != "torch_foreach":
        warn_once(
            "Adam over parameters outside CPU and CUDA runs over lists of tensors: torch has no fused kernel for them"
        )
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(given, **common, fused=True) if fused else kind(given, **common, foreach=True)


def made_ready(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """`optimizer.step` for good: its parameters stay the ones they are, have their moments, and all have a gradient whenever it is called.

    For torch's fused kernel it has its lists made once, and one count of steps for all parameters of a group. torch rebuilds them at
    each step: 158 us of CPU on 40 small tensors, and 51 without. The bits are the same.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not optimizer.defaults["fused"]:
        return optimizer.step
    kernel: Any = torch._fused_adamw_ if isinstance(optimizer, torch.optim.AdamW) else torch._fused_adam_
    groups = []
    for group in optimizer.param_groups:
        parameters = list(group["params"])
        states = [optimizer.state[parameter] for parameter in parameters]
        count = states[0]["step"]
        for state in states:
            state["step"] = count
        moments = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        groups.append((group, parameters, moments, count, [count] * len(states)))

    @torch.no_grad()
    def step() -> None:
        for group, parameters, moments, count, counts in groups:
            count += 1
            beta1, beta2 = group["betas"]
            kernel(
                parameters, [parameter.grad for parameter in parameters], *moments, [], counts, lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip

    return step
