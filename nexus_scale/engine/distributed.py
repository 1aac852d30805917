"""Ranks and their messages: tensors only, never pickled objects."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_scale.contracts import UserError

logger = logging.getLogger(__name__)


def resolve_device(device: str | torch.device) -> torch.device:
    """`cuda` becomes this rank's own GPU (LOCAL_RANK, or its number among the visible ones).

    Raises:
        UserError: a GPU is required and torch finds none.
    """
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return wanted
    if not torch.cuda.is_available():
        raise UserError(
            f"device {device!r}: torch finds no GPU; set device to cpu, or run on a machine with a GPU", code=4
        )
    if wanted.index is None:
        wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(wanted)
    return wanted


def init(device: str | torch.device = "cpu", backend: str | None = None, timeout_s: float = 600.0) -> tuple[int, int]:
    """Joins the process group that torchrun or a launch on Ray described in the environment; does nothing where it stands
    already.

    CPU tensors travel by gloo also where GPUs speak nccl, so that flags and counters never wait for a GPU.

    Returns:
        rank, world_size: (0, 1) where the environment names no group.
    """
    # torch 2.13 renamed the collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=r".*(reduce_scatter_tensor|all_gather_into_tensor).*"
    )
    if dist.is_initialized():
        return rank_and_world_size()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    resolved = resolve_device(device)
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = _loopback_store(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return rank_and_world_size()


def _loopback_store(timeout: timedelta) -> dist.Store | None:
    """A store for ranks that are all on this machine, reachable from this machine only; torch's own listens on all interfaces, without
    authentication. Collectives use loopback then, too. None where ranks are on several machines, or a launcher has a store.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    if not loopback or not port or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if interface is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank != 0:
        return dist.TCPStore(host, int(port), world_size, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, int(port)), family=family, backlog=max(128, world_size))
    return dist.TCPStore(
        host, int(port), world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
    )


def rank_and_world_size() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank() -> int:
    return rank_and_world_size()[0]


def world_size() -> int:
    return rank_and_world_size()[1]


def _wire() -> torch.device:
    """The device of tensors that the group can send: the CPU, unless the group has only nccl."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def barrier() -> None:
    if dist.is_initialized():
        sum_over_ranks(torch.zeros(1))


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a small tensor over ranks, on the device it came from. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    sent = value.detach().to(_wire(), copy=True)
    dist.all_reduce(sent)
    return sent.to(value.device)


def sum_on_device(value: Tensor) -> Tensor:
    """Sum over ranks, in place, as gradients travel: on the device, where nothing waits for it. A collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over ranks of small tensors by name, in one collective, as float64 inside; shapes and keys must agree."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or not values:
        return dict(values)
    names = sorted(values)
    flat = torch.cat([values[name].detach().reshape(-1).double().cpu() for name in names])
    total = sum_over_ranks(flat) / dist.get_world_size()
    parts = total.split([values[name].numel() for name in names])
    return {name: part.view(values[name].shape).to(values[name]) for name, part in zip(names, parts, strict=True)}


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on some rank. A collective."""
    return bool(sum_over_ranks(torch.tensor([int(flag)], dtype=torch.int64)).item())


def broadcast_ints(values: list[int]) -> list[int]:
    """Rank 0's integers on every rank; all ranks give a list of the same length. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    sent = torch.tensor(values, dtype=torch.int64, device=_wire())
    dist.broadcast(sent, src=0)
    return [int(value) for value in sent.tolist()]


def broadcast_int(value: int) -> int:
    """Rank 0's integer on every rank. A collective."""
    return broadcast_ints([value])[0]


def gather(value: Tensor) -> Tensor | None:
    """All ranks' tensors, of one shape, joined along the first dimension in the order of ranks: on rank 0, on the CPU;
    None elsewhere. A collective."""
    number, count = rank_and_world_size()
    if count == 1:
        return value.detach().cpu()
    sent = value.detach().to(_wire()).contiguous()
    parts = [torch.empty_like(sent) for _ in range(count)] if number == 0 else None
    dist.gather(sent, parts, dst=0)
    return None if parts is None else torch.cat(parts).cpu()


def shared_token() -> str:
    """A random name for this attempt, 12 hexadecimal digits, equal on all ranks. A collective."""
    return f"{broadcast_int(secrets.randbits(48)):012x}"


def neighbours(count: int) -> Any:
    """The group of this rank among groups of `count` ranks that follow each other. A collective.

    Raises:
        UserError: the ranks do not divide into such groups.
    """
    number, ranks = rank_and_world_size()
    if ranks % count:
        raise UserError(f"{ranks} ranks do not divide into groups of {count}; change cluster.workers", code=4)
    groups = [dist.new_group(list(range(first, first + count))) for first in range(0, ranks, count)]
    return groups[number // count]


class LateSum:
    """Sums over ranks that no rank waits for: what is sent after one step is read after a later one.

    They use a gloo group of their own, so they neither wait for the collectives of training nor delay them. All ranks call in the
    same order, as with every collective; making the first one is itself a collective.
    """

    def __init__(self) -> None:
        self._group = _group_aside()
        self._sent: tuple[Any, Tensor] | None = None

    def send(self, values: Sequence[float]) -> None:
        """Sends this rank's part: numbers that float64 can hold, equally many on all ranks."""
        assert self._sent is None, "the sum that was sent before has not been read"
        tensor = torch.tensor(values, dtype=torch.float64)
        work = None if self._group is None else dist.all_reduce(tensor, group=self._group, async_op=True)
        self._sent = (work, tensor)

    def read(self) -> list[float] | None:
        """The sums of what was sent; None where nothing was sent since the last read."""
        if self._sent is None:
            return None
        (work, tensor), self._sent = self._sent, None
        if work is not None:
            work.wait()
        values: list[float] = tensor.tolist()
        return values


_aside: tuple[Any, Any] | None = None


def _group_aside() -> Any:
    """Another gloo group of all ranks, made once; None for a single rank. A collective at the first call."""
    global _aside
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _aside is None or _aside[0] is not dist.group.WORLD:
        _aside = (dist.group.WORLD, dist.new_group(backend="gloo"))
    return _aside[1]


def begun_collectives() -> int:
    """The number of collectives that this process has begun, in all its groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)  # of C++, whose stubs lack the number
    return sum(group._get_sequence_number_for_group() for group in groups)


def last_collectives(count: int = 8) -> list[str]:
    """The newest collectives that this process began, oldest first, from torch's flight recorder: group, number, name, sizes."""
    if not dist.is_initialized():
        return []
    recorder: Any = torch._C._distributed_c10d
    recorded = json.loads(recorder._dump_fr_trace_json()).get("entries", [])
    lines = []
    for entry in recorded[-count:]:
        sizes = ", ".join("x".join(map(str, size)) for size in entry.get("input_sizes", []))
        group = entry.get("process_group", ["?"])[0]
        lines.append(
            f"group {group}, number {entry.get('collective_seq_id')}: {entry.get('profiling_name')} of {sizes}"
        )
    return lines
