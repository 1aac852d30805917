"""Running out of memory, on a GPU or on a CPU, as a message that says what was taken and what to set."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nexus_scale.config.recipe import Cluster
from nexus_scale.contracts import Progress, UserError
from nexus_scale.engine import distributed

GIB = 2**30

_WORDS = re.compile(
    r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|out of memory"
    r"|(can't allocate|not enough) memory: you tried to allocate|std::bad_alloc|Cannot allocate memory"
)
"""As torch's allocators, its libraries and the C++ runtime say it."""


_WITHIN_A_LIMIT = re.compile(r"could not (create|execute) a ")
"""What oneDNN says of a refused allocation, and of much else."""


def is_out_of_memory(error: BaseException, limited: bool = False) -> bool:
    """Whether an error, or what caused it, is a refused allocation. `limited`: it was met within a limit on a CPU's memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(cause, RuntimeError) and (
            _WORDS.search(str(cause)) or (limited and _WITHIN_A_LIMIT.match(str(cause)))
        ):
            return True
        cause = cause.__cause__
    return False


@contextmanager
def explained(cluster: Cluster, micro_batch: Callable[[], int], progress: Progress) -> Iterator[None]:
    """A context in which running out of memory becomes the user's message.

    Args:
        micro_batch: samples that a rank takes at once.
    Raises:
        UserError: names the micro-batch, what was taken, and what to set.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        raise UserError(
            f"rank {distributed.rank()} ran out of memory at step {progress.step} ({taken()}): {first_line(error)}\n"
            + _advice(cluster, micro_batch(), progress.step > 0),
            code=4,
        ) from None


def _advice(cluster: Cluster, micro: int, begun: bool) -> str:
    smaller = (
        f"cluster.micro_batch={micro // next(p for p in range(2, micro + 1) if micro % p == 0)}" if micro > 1 else ""
    )
    if smaller and begun:
        smaller += " (with --allow-change cluster.micro_batch, as the run has begun)"
    ways = [
        smaller,
        "" if begun or micro == 1 else "cluster.micro_batch=auto",
        "" if cluster.activation_checkpointing else "cluster.activation_checkpointing=true",
        "" if cluster.compile else "cluster.compile=true",
        "cluster.offload=cpu" if cluster.gpus_per_worker and cluster.offload == "none" else "",
        "more workers",
    ]
    return f"Each worker takes micro_batch {micro} at once. Set {', or '.join(way for way in ways if way)}"


def first_line(error: BaseException) -> str:
    """The first line of an error, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def taken() -> str:
    """What this process takes of its device's memory, in words."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, whole = torch.cuda.mem_get_info()
        tensors = torch.cuda.max_memory_allocated()
        return (
            f"{tensors / GIB:.1f} GiB of tensors at the most, {free / GIB:.1f} of the GPU's {whole / GIB:.1f} GiB free"
        )
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{most / GIB:.1f} of {host_limit() / GIB:.1f} GiB at the most"


def host_limit() -> int:
    """Bytes that the processes of this container or machine may take together."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            words = Path(path).read_text().strip()
        except OSError:
            continue
        if words.isdecimal():
            whole = min(whole, int(words))
    return whole


RESERVE = 0.05
"""Part of a GPU's memory that a trial leaves free: other lengths and a longer run cut the rest into pieces. An assumption."""


@contextmanager
def limited(device: torch.device, cluster: Cluster) -> Iterator[None]:
    """A context in which this process is refused memory beyond its share: of the GPU all but `RESERVE`; of a CPU's memory what the
    cluster file or the container has for a worker, which Linux alone can refuse (RLIMIT_DATA)."""
    if device.type == "cuda":
        before = torch.cuda.get_per_process_memory_fraction(device)
        torch.cuda.set_per_process_memory_fraction(before * (1 - RESERVE), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, device)
        return
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    room = max(0, share_of_host(cluster) - resident())
    allowed = min(limit for limit in (_of_this_process("VmData") + room, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def resident() -> int:
    """Bytes of memory that this process holds now, on Linux."""
    return _of_this_process("VmRSS")


def _of_this_process(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def share_of_host(cluster: Cluster) -> int:
    """Bytes of a machine's memory that are one worker's: as the cluster file or the container says."""
    stated = math.inf if cluster.node_memory_gib is None else cluster.node_memory_gib * GIB
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(stated, host_limit()) / workers)
