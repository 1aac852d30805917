"""Which kernel steps an optimizer, and how fast each is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nexus_scale.config.schema import Adam, AdamW, Optimizer
from nexus_scale.kernels.adam import FusedUpdate, TorchUpdate
from nexus_scale.kernels.update import PlainUpdate, Update


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
        kernel: an option of `adam` in kernels/choice.py. `torch_fused` and `apex` know Adam alone; others then run in plain torch.
    """
    on_cuda = masters[0].device.type == "cuda"
    tags = {"weight_decays": weight_decays, "lr_multipliers": lr_multipliers}
    is_adam = isinstance(spec, AdamW | Adam)
    if not on_cuda or (kernel == "apex" and is_adam):
        return TorchUpdate(spec, masters, **tags, copies=copies, kernel=kernel)
    kind = FusedUpdate if kernel == "torch_fused" and is_adam else PlainUpdate
    return kind(spec, masters, **tags, copies=copies)
