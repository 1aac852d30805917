"""The private names of DeepSpeed that the engine uses, each with its reason; all other code uses DeepSpeed's public API.

pyproject.toml pins DeepSpeed to one version because of these names. An upgrade is a change of the pin, and then of what
tests/engine/test_deepspeed_internals.py complains about: it exercises every name below and fails with the name.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor

PINNED = "0.19.8"

NAMES = {
    "__compatible_ops__": (
        "DeepSpeed looks here for the ops it may compile, and would fill it by running a compiler; the "
        "shared-memory op for CPUs would then be built at run time, and a build that is killed leaves a lock "
        "on which every later start waits"
    ),
    "ds_tensor": (
        "a rank's slice of a flat tensor: what forward and backward gather from. It is moved to lie beside the slices of the other blocks, "
        "so that the optimizer has one tensor to update; checkpoints, averages and published weights are read from it and written into it"
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


def move_slice(parameter: Tensor, to: Tensor) -> None:
    """Moves this rank's slice of a sharded tensor into other memory, of ceil(N / W) values, where DeepSpeed goes on to find it."""
    held = _of(parameter, "ds_tensor")
    to.copy_(held.detach().view(-1))
    held.data = to
