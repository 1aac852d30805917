"""One case in a process of its own: `python -m nexus_scale.bench.gpu.worker CASE DEVICE full|tiny`.

It imports everything, says so, and waits for a line on its input, trials of kernels that are known, so that a case may start up while the
one before still compiles. Rows go
to its output, each a line that begins with ROW.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nexus_scale.bench.gpu import ceilings, drawing, kernels
from nexus_scale.bench.gpu.cases import CASES, Case, Task
from nexus_scale.bench.gpu.measuring import READY, ROW, Emit, measure
from nexus_scale.bench.gpu.peers import Theirs
from nexus_scale.bench.gpu.training import Ours
from nexus_scale.contracts import UserError
from nexus_scale.engine import distributed
from nexus_scale.kernels import determinism
from nexus_scale.rehearsal.peaks import peak_tflops


def do(case: Case, device: torch.device, *, tiny: bool, compiled: bool, emit: Emit, trials: Sequence[Any] = ()) -> None:
    """Runs a case and emits its rows."""
    alone = {"ceilings": ceilings.ceilings, "attention": ceilings.attention_rates, "optimizer": kernels.optimizer_pass}
    if case.kind in alone:
        alone[case.kind](device, tiny=tiny, emit=emit)
    elif case.kind == "fused":
        kernels.fused(device, tiny=tiny, compiled=compiled, emit=emit)
    elif case.kind == "blocks":
        kernels.blocks(device, tiny=tiny, compiled=compiled, emit=emit)
    elif case.kind == "draws":
        assert case.task is not None, case
        drawing.draws(case.task, device, tiny=tiny, compiled=compiled, emit=emit)
    else:
        assert case.task is not None, case
        with determinism.repeating(bool(case.cluster.get("deterministic"))):
            _measure(case, case.task, device, tiny, compiled, emit, trials)


def _measure(
    case: Case, task: Task, device: torch.device, tiny: bool, compiled: bool, emit: Emit, trials: Sequence[Any]
) -> None:
    begun = time.perf_counter()
    if case.kind == "ours":
        settings = {
            **case.cluster,
            "compile": compiled,
            "cuda_graphs": compiled and case.cluster.get("cuda_graphs", False),
        }
        try:
            subject: Any = Ours(task, settings, device, tiny=tiny, trials=trials)
        except UserError as error:
            if "kernels" not in case.cluster:
                raise
            emit(row="built", unavailable=str(error))
            return
        emit(
            row="built",
            seconds=time.perf_counter() - begun,
            flops=subject.flops,
            kernels=subject.kernels,
            trials=subject.trials,
        )
    else:
        subject = Theirs(task, device, tiny=tiny, compiled=compiled)
        emit(row="built", seconds=time.perf_counter() - begun, flops=subject.flops)
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    micro = 2 if tiny else task.micro_batch
    measure(subject, micro, largest=case.largest, peak_flops=peak and peak * 1e12, tiny=tiny, emit=emit)


def prepare(device: str, case: Case) -> None:
    """Imports what the case imports late, and keeps dynamo from generalising sizes: each micro-batch is compiled for itself."""
    import torch._dynamo.config as dynamo

    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    dynamo.automatic_dynamic_shapes = False
    needed = (
        "diffusers" if case.kind == "diffusers" else "deepspeed" if case.cluster.get("engine") == "deepspeed" else ""
    )
    with contextlib.suppress(ImportError):  # the case itself says that it is missing
        importlib.import_module(needed or "torch")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _write(case: str, **row: Any) -> None:
    print(ROW + json.dumps({"case": case, **row}), flush=True)


def main() -> None:
    name, device_name, size = sys.argv[1:4]
    prepare(device_name, CASES[name])
    print(READY, flush=True)
    if not (line := sys.stdin.readline()):
        return  # its turn did not come
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    emit = partial(_write, name)
    code = 0
    try:
        distributed.init(device)
        do(CASES[name], device, tiny=size == "tiny", compiled=device.type == "cuda", emit=emit, trials=json.loads(line))
    except Exception as error:
        traceback.print_exc()
        emit(row="failed", error=f"{type(error).__name__}: {str(error)[:600]}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without gloo's threads, which abort one exit in ten


if __name__ == "__main__":
    main()
