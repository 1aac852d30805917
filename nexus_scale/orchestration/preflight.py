"""Checks before a run starts on several machines: the same run folder, code, versions and time, free disk, and a network between them.

A task on each machine reports what it sees, and the reports are compared here. A difference found now costs seconds, later a night.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from nexus_scale.io.durable import atomic_write

logger = logging.getLogger(__name__)

CLOCKS_WITHIN_S = 2.0
PACKAGES = ("torch", "deepspeed", "ray", "numpy", "safetensors", "nexus-scale")


@dataclass(frozen=True)
class Seen:
    """The report of one machine.

    Attributes:
        node, host: Ray's id and the host name.
        marker: the text of the marker file in the run folder; None where there is none.
        writable: whether a file can be made in the run folder.
        free_bytes: on the disk of the run folder.
        versions: of Python and of the packages that a run's bits depend on.
        code: hash of this package's source.
        clock_s: by how much its clock is certainly off the driver's.
    """

    node: str
    host: str
    marker: str | None
    writable: bool
    free_bytes: int
    versions: Mapping[str, str]
    code: str
    clock_s: float = 0.0


def check_machines(
    nodes: Sequence[str] | None, run: Path, *, needed_bytes: int, timeout_s: float = 120, gathers: bool = True
) -> list[Seen]:
    """The reports of all machines, which agree. The run folder holds a marker file meanwhile.

    Args:
        nodes: Ray's ids; None: all live nodes.
        needed_bytes: free disk that the run needs.
        timeout_s: for everything together.
        gathers: whether to try a collective between all machines, too.
    Raises:
        UserError: names the machine and what differs. Code 5: the run folder; 6: the disk; 4: anything else.
    """
    import ray

    if nodes is None:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    nonce = secrets.token_hex(8)
    marker = run / f".preflight-{nonce}"
    atomic_write(marker, nonce)
    try:
        seen = _look_around(nodes, marker, timeout_s)
    finally:
        marker.unlink()
    compare(seen, nonce, run, needed_bytes)
    if gathers and len(nodes) > 1:
        _gather(nodes, {one.node: one.host for one in seen}, timeout_s)
    logger.info("preflight: %d machines agree", len(nodes))
    return seen


def compare(seen: Sequence[Seen], nonce: str, run: Path, needed_bytes: int) -> None:
    """Raises UserError at the first difference between the machines, or from what the run needs."""
    from nexus_scale.contracts import UserError

    first = seen[0]
    for one in seen:
        where = f"preflight: machine {one.host} ({one.node[:8]})"
        if one.marker != nonce:
            raise UserError(
                f"{where} does not see {run} as this machine does; runs must lie on storage that all machines share: set "
                "cluster.paths.runs",
                code=5,
            )
        if not one.writable:
            raise UserError(f"{where} cannot write to {run}; give its user write permission", code=5)
        for name in sorted({*one.versions, *first.versions}):
            here, there = first.versions.get(name, "absent"), one.versions.get(name, "absent")
            if here != there:
                raise UserError(
                    f"{where} has {name} {there}, {first.host} has {here}; install the same on all machines", code=4
                )
        if one.code != first.code:
            raise UserError(
                f"{where} runs other source of nexus_scale ({one.code[:12]}) than {first.host} ({first.code[:12]}); install the same "
                "on all machines",
                code=4,
            )
        if abs(one.clock_s) > CLOCKS_WITHIN_S:
            raise UserError(
                f"{where}: its clock is {one.clock_s:+.1f} s off this machine's, at most {CLOCKS_WITHIN_S:g} s are allowed; synchronise "
                "both by NTP",
                code=4,
            )
        if one.free_bytes < needed_bytes:
            raise UserError(
                f"{where}: {one.free_bytes / 2**30:.2f} GiB free below {run}, the run's checkpoints need "
                f"{needed_bytes / 2**30:.2f} GiB; free some space, or set cluster.paths.runs",
                code=6,
            )


def _look_around(nodes: Sequence[str], marker: Path, timeout_s: float) -> list[Seen]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nexus_scale.contracts import UserError

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    clock = ray.remote(num_cpus=0, max_retries=0)(_clock)
    end = time.monotonic() + timeout_s
    on = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    looks = {node: look.options(scheduling_strategy=on[node]).remote(str(marker)) for node in nodes}
    seen = []
    for node in nodes:
        try:
            told = ray.get(looks[node], timeout=max(1.0, end - time.monotonic()))
            # There is a warm process on the machine by now, so that the call is short; the shortest of three counts.
            offsets = []
            for _ in range(3):
                before = time.time()
                there = ray.get(clock.options(scheduling_strategy=on[node]).remote(), timeout=30)
                offsets.append(_offset(before, there, time.time()))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            raise UserError(
                f"preflight: machine {node[:8]} did not answer within {timeout_s:g} s: {str(error).splitlines()[0]}",
                code=4,
            ) from None
        seen.append(Seen(node=node, clock_s=min(offsets, key=abs), **told))
    return seen


def _clock() -> float:
    return time.time()


def _offset(before: float, there: float, after: float) -> float:
    """By how much another clock, read between two readings of this one, is certainly off; 0 if it lies between them."""
    return there - after if there > after else there - before if there < before else 0.0


def _look(marker: str) -> dict[str, Any]:
    """One machine's report, made there."""
    path = Path(marker)
    probe = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
        writable = True
    except OSError:
        writable = False
    there = next(folder for folder in path.parents if folder.exists())
    seen = Seen(
        node="",
        host=socket.gethostname(),
        marker=path.read_text() if path.is_file() else None,
        writable=writable,
        free_bytes=shutil.disk_usage(there).free,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        code=code_hash(),
    )
    return {key: value for key, value in asdict(seen).items() if key not in ("node", "clock_s")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def code_hash() -> str:
    """SHA-256 of the package's Python source, file names included."""
    import nexus_scale

    root = Path(nexus_scale.__path__[0])
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


class _Member:
    """One process of the trial collective."""

    def address(self) -> tuple[str, int]:
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return str(ray.util.get_node_ip_address()), int(free.getsockname()[1])

    def reduce(self, address: str, rank: int, size: int, timeout_s: float) -> float:
        """The sum of all ranks' numbers, each counted from 1."""
        import torch
        import torch.distributed as dist

        deadline = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=deadline)
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        dist.destroy_process_group()
        return float(total)


def _gather(nodes: Sequence[str], hosts: Mapping[str, str], timeout_s: float) -> None:
    """Tries an all-reduce by gloo between one process on each machine: flags and counters of the run take the same way.

    Raises:
        UserError: names the machines on which it failed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nexus_scale.contracts import UserError

    actor = ray.remote(num_cpus=0)(_Member)
    members = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    try:
        host, port = ray.get(members[0].address.remote(), timeout=timeout_s)
        calls = [
            member.reduce.remote(f"{host}:{port}", rank, len(nodes), timeout_s) for rank, member in enumerate(members)
        ]
        ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        why = [_why_failed(call, len(nodes)) for call in calls]
        failed = [f"{hosts[node]}{words}" for node, words in zip(nodes, why, strict=True) if words is not None]
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        failed = [f"{hosts[nodes[0]]} ({str(error).strip().splitlines()[-1]})"]
    finally:
        for member in members:
            ray.kill(member)
    if failed:
        raise UserError(
            f"preflight: no collective passes between all machines within {timeout_s:g} s; it failed on {', '.join(failed)}. Open the "
            "ports between them, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network that they share",
            code=4,
        )


def _why_failed(call: Any, size: int) -> str | None:
    """What went wrong with a rank's part in the collective, to follow its name; None where nothing did."""
    import ray

    if not ray.wait([call], timeout=0)[0]:
        return ""
    try:
        return None if ray.get(call) == size * (size + 1) / 2 else ""
    except ray.exceptions.RayError as error:
        return f" ({str(error).strip().splitlines()[-1]})"
