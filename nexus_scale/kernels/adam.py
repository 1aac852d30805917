"""Adam and AdamW: torch's fused kernel, Apex's, or torch's over lists of tensors.

Source: Kingma & Ba 2015; Loshchilov & Hutter 2019 (decoupled weight decay).
"""

from __future__ import annotations

from collections.abc import Iterable
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
    # Parameters may come as generators: listed once, then looked at and passed on.
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
