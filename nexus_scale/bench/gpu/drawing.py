"""Drawing token by token: what a step takes as it is, and compiled, with a cache of one shape."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from nexus_scale.bench.gpu.cases import Task
from nexus_scale.bench.gpu.measuring import Emit, peak_memory
from nexus_scale.bench.gpu.training import batch_of, fields_of, made_cheaply, recipe_of
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.engine.hardware import Hardware
from nexus_scale.engine.networks import build_network
from nexus_scale.generate.drawing import request_of
from nexus_scale.kernels import choice
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.rehearsal.batches import specs_of
from nexus_scale.train import make_objective

FIRST = 20
"""Steps that are not counted: what is compiled is compiled in them."""


def draws(task: Task, device: torch.device, *, tiny: bool, compiled: bool, emit: Emit) -> None:
    """Draws `task.micro_batch` samples under the conditions of made-up data, with blocks as they are and compiled.

    Emits `ms` of a step, the median, and `samples_per_second`, steps of samples."""
    recipe = recipe_of(task, tiny)
    objective = make_objective(recipe, None)
    count = 2 if tiny else task.micro_batch
    batch = batch_of(fields_of(task, recipe), count, device).on(device)
    choice.choose({}, device)
    for way in (False, True) if compiled else (False,):
        torch.compiler.reset()
        spec = specs_of(recipe, objective)["model"]
        network = build_network("model", replace(spec, make=partial(made_cheaply, spec.make, device)), 0)
        prepare_blocks(network, "model", activation_checkpointing=False, compiled=way)
        net = Hardware(device, torch.bfloat16).hold(network)
        times: list[float] = []
        cond, request = objective.request_like(batch, request_of(recipe, objective))
        request = replace(request, progress=partial(_note, times))
        with torch.no_grad(), peak_memory(device) as memory:
            begun = time.perf_counter()
            drawn = objective.generate(
                {"model": net}, cond, request, ProgressRng(0, 0, "draw", batch.positions, device)
            )
            held, peak = memory()
        steps = [after - before for before, after in itertools.pairwise(times)]
        ms = 1e3 * median(steps[0 if tiny else FIRST :])
        emit(
            row="draws", recipe=task.recipe, compiled=way, samples=count, steps=drawn.samples.shape[1], ms=ms, first_s=times[0] - begun,
            seconds=times[-1] - begun, samples_per_second=count / ms * 1e3, gib=peak / 2**30, gib_held=held / 2**30,
        )  # fmt: skip


def _note(times: list[float], done: int, steps: int) -> None:
    """A walk's progress: when each of its steps was done."""
    times.append(time.perf_counter())
