"""The worker whose start is measured: a small network under ZeRO-3, one optimizer step, and when what was reached."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def work(config: dict[str, Any]) -> dict[str, Any]:
    """One step. Rank 0 writes the wall clock at each stage, seconds since the epoch, into `config["marks"]`."""
    marks = {"worker": time.time()}
    import torch
    from torch import nn

    from nexus_scale.engine import build_engine, distributed
    from nexus_scale.engine.settings import EngineSettings, NetSpec, OptimizerSpec

    class Network(nn.Module):
        """Four linear layers."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

        def init_weights(self) -> None:
            for layer in self.layers:
                layer.reset_parameters()  # type: ignore[operator]

        def blocks(self) -> list[nn.Module]:
            return list(self.layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x).tanh()  # (B, 64)
            return x

    torch.set_num_threads(1)
    distributed.init("cpu", timeout_s=300)
    marks["imported"] = time.time()
    settings = EngineSettings(
        kind="deepspeed", zero_stage=3, precision="float32", micro_batch=4, accumulation=1, steps=1, device="cpu"
    )
    engine = build_engine({"model": NetSpec(make=Network, optimizer=OptimizerSpec())}, {}, settings)
    marks["engine"] = time.time()
    with engine.training("model"):
        loss = engine.nets["model"](torch.randn(4, 64)).square().mean()
        engine.backward("model", loss, last=True)
        engine.step("model", 0)
    marks["step"] = time.time()
    if distributed.rank() == 0:
        Path(config["marks"]).write_text(json.dumps(marks))
    return marks


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    work({"marks": sys.argv[1]})
