"""The private names of DeepSpeed that the engine uses, each with its reason; all other code uses DeepSpeed's public API.

pyproject.toml pins DeepSpeed to one version because of these names. An upgrade is a change of the pin, and then of what
tests/engine/test_deepspeed_internals.py complains about: it exercises every name below and fails with the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

PINNED = "0.19.8"

NAMES = {
    "__compatible_ops__": (
        "DeepSpeed looks here for the ops it may compile, and would fill it by running a compiler; the "
        "shared-memory op for CPUs would then be built at run time, and a build that is killed leaves a lock "
        "on which every later start waits"
    ),
    "ds_tensor": (
        "a rank's slice of a parameter, padded: what forward and backward gather from. Checkpoints, averages "
        "and published weights are read from it and written into it; without it each would gather whole "
        "parameters"
    ),
    "parameter_offload": (
        "its hooks gather weights before each module and release them after. A network that is kept whole "
        "runs without them: they cost a third of a small network's step, and cannot be differentiated twice"
    ),
    "_partition_all_parameters": (
        "releases gathered weights in every step, which a network that is kept whole must be spared"
    ),
    "applied_pre_backward_ref_cnt": (
        "for how many more backwards a module's weights are gathered, one for each forward. An objective that "
        "takes gradients of several losses through one forward goes backward more often, and would meet "
        "weights that are not there"
    ),
    "_set_fp32_optimizer_param_groups": (
        "puts the master slices into the optimizer's groups, which are empty outside of a step: without them "
        "the moments cannot be made before the first step, nor the count of steps be read"
    ),
    "_running_engine_backward": (
        "whether the engine itself goes backward. One loss may teach several networks, and one engine's backward goes "
        "through all: the others would take theirs for one that the user began, and reduce what is left a second time"
    ),
    "_backward_epilogue": (
        "reduces what a backward has left: an engine calls it for itself alone, and the steps of the other networks that "
        "a loss teaches would find no gradients"
    ),
    "grad_partitions_flat_buffer": (
        "all of a rank's gradient slices: zeroed after a step, or a parameter that takes no part in the next "
        "one would be updated with the last one's gradient"
    ),
}
"""What each is for, and what goes wrong without it."""


class MovedName(RuntimeError):
    """A private name is not where the pinned version has it."""

    def __init__(self, name: str):
        super().__init__(
            f"deepspeed {version('deepspeed')} has no {name!r} where {PINNED} has it; nexus-scale needs it: {NAMES[name]}. "
            f"Install deepspeed=={PINNED}"
        )
        self.name = name


def _of(owner: Any, name: str) -> Any:
    """A private attribute.

    Raises:
        MovedName: it is not there.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise MovedName(name) from None


def forbid_compilers(ops: Any) -> None:
    """Tells `deepspeed.ops` that none of its C++ ops can be built. Replaced whole: reading it would run a compiler."""
    if "__compatible_ops__" not in _of(ops, "__getattr__").__code__.co_consts:
        raise MovedName("__compatible_ops__")
    ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def slice_of(parameter: Tensor) -> Tensor:
    """This rank's slice of a sharded parameter, (ceil(N / W),), padded with zeros on the last ranks; live."""
    held: Tensor = _of(parameter, "ds_tensor").detach().view(-1)
    return held


def stop_gathering(engine: Any) -> None:
    """Takes the hooks off an engine's modules, and lets its steps leave gathered weights alone: for a network kept whole."""
    zero = engine.optimizer
    _of(zero, "_partition_all_parameters")
    _of(zero, "parameter_offload").destroy()
    zero._partition_all_parameters = lambda: None


def release_gathered(engine: Any) -> None:
    """Releases gathered weights, and the next forward gathers them anew from the slices: after these were written, stale copies would
    compute. It is `engine.empty_partition_cache()` without its garbage collection."""
    engine.optimizer.empty_partition_cache()


def gather_in_every_backward(network: nn.Module) -> None:
    """Lets each module gather its weights in as many backwards as there are. Call it after `deepspeed.initialize`."""
    for module in network.modules():
        counted: Any = module
        counted.applied_pre_backward_ref_cnt = 1 << 62


def backward(engines: Sequence[Any], loss: Tensor) -> None:
    """Adds the gradients of one loss to all networks of these engines; they are reduced for each."""
    first, *others = engines
    for engine in others:
        _of(engine, "_running_engine_backward")
        engine._running_engine_backward = True
    try:
        first.backward(loss, scale_wrt_gas=False)
        for engine in others:
            _of(engine, "_backward_epilogue")()
    finally:
        for engine in others:
            engine._running_engine_backward = False


@contextmanager
def with_masters(engine: Any, optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizer that DeepSpeed steps, with this rank's flat masters as its parameters."""
    _of(engine.optimizer, "_set_fp32_optimizer_param_groups")()
    try:
        yield optimizer
    finally:
        for group in optimizer.param_groups:
            group["params"] = []


def forget_gradients(engine: Any) -> None:
    """Zeroes the gradients of the last step."""
    _of(engine.optimizer, "grad_partitions_flat_buffer").zero_()
