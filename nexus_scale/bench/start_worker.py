"""The worker whose start and recovery are measured: a small network under ZeRO-3, and the times of its stages."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def work(config: dict[str, Any]) -> dict[str, Any]:
    """One step. Rank 0 writes the time of each stage, in seconds since the epoch, to `config["marks"]`."""
    marks = {"worker": time.time()}
    import torch

    from nexus_scale.engine import distributed

    torch.set_num_threads(1)
    distributed.init("cpu", timeout_s=300)
    marks["imported"] = time.time()
    engine = _engine(steps=1)
    marks["engine"] = time.time()
    _step(engine, 0)
    marks["step"] = time.time()
    if distributed.rank() == 0:
        Path(config["marks"]).write_text(json.dumps(marks))
    return marks


def work_until_killed(config: dict[str, Any]) -> dict[str, Any]:
    """Steps with a checkpoint every few of them. Rank 1 kills itself once, in the step after `kill_at`.

    Args:
        config: `folder` of all files; `steps`; `every`, steps between checkpoints; `pause_s` after each step; `kill_at`. Rank 0
            appends (seconds since the epoch, steps done) to `steps.txt`, rank 1 writes the time of its end to `killed.txt`, and
            each start of rank 0 appends its marks to `starts.jsonl`.
    """
    marks = {"worker": time.time()}
    import torch

    from nexus_scale.engine import distributed
    from nexus_scale.engine.checkpoint import CheckpointStore, newest

    torch.set_num_threads(1)
    rank, world_size = distributed.init("cpu", timeout_s=300)
    marks["imported"] = time.time()
    folder = Path(config["folder"])
    engine = _engine(config["steps"])
    marks["engine"] = time.time()
    checkpoints = folder / "checkpoints"
    store = CheckpointStore(checkpoints, rank=rank, world_size=world_size, attempt=distributed.shared_token(), keep=2)
    step = 0
    if (found := newest(checkpoints)) is not None:
        engine.load_shards(found.read)
        step = found.step
    marks["loaded"] = time.time()
    while step < config["steps"]:
        killed = folder / "killed.txt"
        if rank == 1 and step == config["kill_at"] and not killed.exists():
            killed.write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        _step(engine, step)
        step += 1
        if rank == 0:
            with (folder / "steps.txt").open("a") as file:
                file.write(f"{time.time()!r} {step}\n")
            if "step" not in marks:
                marks["step"] = time.time()
                with (folder / "starts.jsonl").open("a") as file:
                    file.write(json.dumps(marks) + "\n")
        if step % config["every"] == 0:
            store.save(step, dict(engine.shards()), {"step": step})
        time.sleep(config["pause_s"])
    store.wait()
    store.close()
    return {"steps": step}


def _engine(steps: int) -> Any:
    import torch
    from torch import nn

    from nexus_scale.config.schema import AdamW
    from nexus_scale.contracts import Network
    from nexus_scale.engine import build_engine
    from nexus_scale.engine.settings import EngineSettings, NetSpec

    class Layers(Network):
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

    settings = EngineSettings(
        engine="deepspeed", zero_stage=3, precision="float32", micro_batch=4, accumulation=1, steps=steps, device="cpu"
    )
    return build_engine({"model": NetSpec(make=Layers, optimizer=AdamW())}, {}, settings)


def _step(engine: Any, step: int) -> None:
    import torch

    with engine.training("model"):
        loss = engine.nets["model"](torch.randn(4, 64)).square().mean()
        engine.backward("model", loss, last=True)
        engine.step("model", step)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    work({"marks": sys.argv[1]})
    sys.stdout.flush()
    os._exit(0)  # without gloo's threads, which DeepSpeed keeps and which abort one exit in ten
