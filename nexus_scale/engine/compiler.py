"""torch's compiler: what it needs here, its limits, and how much it has done in this process."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import astuple, dataclass
from importlib import metadata

import torch

from nexus_scale.contracts import UserError

BACKEND = "inductor"
"""What compiles graphs, by its name in torch."""

MOST_GRAPHS = 256
"""Graphs of one class of blocks, at most. There is one for each structure of the blocks, size of the data, and mode (training,
evaluation); torch's own limit of 8 would leave the rest uncompiled."""


def tools(device_type: str) -> str:
    """What compiles for a type of device on this machine, in words.

    Raises:
        UserError: a compiler that Inductor calls is missing; names it and how to do without.
    """
    cxx, cc = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"), os.environ.get("CC")
    if device_type == "cpu":
        found = shutil.which(cxx)
        if found is None:
            raise UserError(f"cluster.compile: on a CPU it needs a C++ compiler, and {cxx!r} is not here; {_REMEDY}", 4)
        return f"inductor with {found}"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise UserError(f"cluster.compile: on a GPU it needs triton, which is not installed; {_REMEDY}", 4) from None
    found = cc or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise UserError(f"cluster.compile: triton needs a C compiler, and neither gcc nor clang is here; {_REMEDY}", 4)
    return f"inductor with triton {triton} and {found}"


_REMEDY = "install it on every machine, or set compile: false in the cluster file (cluster.compile=false)"


def set_limits() -> None:
    """Raises the limits of this process, for blocks that are compiled as one graph for each size."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * MOST_GRAPHS)
    # An objective may go backward through a network once for each of several losses; compiled code must not give away what it
    # saved for backward, which at most holds the activations of one block until its backward ends.
    functorch.donated_buffer = False
    # Each worker would start as many compilers as the machine has cores.
    inductor.compile_threads = min(inductor.compile_threads or 1, torch.get_num_threads())


@dataclass(frozen=True)
class Work:
    """What the compiler has done in this process so far.

    Attributes:
        graphs: blocks of one structure, in one mode and size.
        made, found: pieces of code for them (forward, backward) that Inductor compiled, and that it found in the cache.
        breaks: places where a block came apart into several graphs.
    """

    graphs: int
    made: int
    found: int
    breaks: int

    def since(self, before: Work) -> Work:
        return Work(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


def graphs() -> int:
    """How many graphs this process has."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def work() -> Work:
    from torch._dynamo.utils import counters

    code = counters["inductor"]
    breaks = sum(counters["graph_break"].values())
    return Work(graphs(), code["fxgraph_cache_miss"], code["fxgraph_cache_hit"], breaks)
