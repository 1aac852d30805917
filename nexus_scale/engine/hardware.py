"""Where and in what precision a trained network draws: the accelerator of a cluster file, or the CPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.config.recipe import Cluster
from nexus_scale.engine.networks import Caller, place
from nexus_scale.engine.precision import measured_precision

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
"""What a precision computes in."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """A device and the precision of what computes there."""

    device: torch.device
    dtype: torch.dtype

    def hold(self, network: nn.Module) -> Any:
        """The network here, without gradients, as objectives call it: inputs cast on the way in, outputs float32."""
        held = place(network.eval().requires_grad_(False), self.device, self.dtype)
        return held if self.dtype == torch.float32 else Caller(held, held, self.dtype)

    def take(self, values: Any) -> dict[str, Tensor]:
        """Tensors by name, here."""
        return {name: value.to(self.device) for name, value in values.items()}


CPU = Hardware(torch.device("cpu"), torch.float32)
"""Any machine: float32, since bf16 is no faster on most processors."""


def hardware_of(cluster: Cluster, precision: str | None = None) -> Hardware:
    """The accelerator of a cluster file where this machine has it; the CPU where it does not, which is said.

    Args:
        precision: what the run computes in, `float32` or `bf16`; None: as the cluster file says, measured where it says `auto`.
    """
    if not cluster.gpus_per_worker:
        return CPU
    if not torch.cuda.is_available():
        log.warning(
            "cluster %s: workers have GPUs, but torch finds none here: computing on the CPU in float32", cluster.name
        )
        return CPU
    chosen = cluster.precision if precision is None else precision
    chosen = measured_precision("cuda") if chosen == "auto" else chosen
    return Hardware(torch.device("cuda", torch.cuda.current_device()), DTYPES[chosen])
