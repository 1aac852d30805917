"""A network of two machines on this one: two network namespaces, and between them a link that a process of ours carries frame by frame.

The kernel's own way to make a link slow or lossy (tc netem) is a module that many kernels lack. Here each namespace has a TAP device
of which the carrying process holds the other end; what it delays, drops or keeps is what happens to the link. Namespaces and devices
have no names outside and vanish with their processes, however these end.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import itertools
import json
import math
import os
import random
import select
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.io.durable import atomic_write
from tests.distributed import started, until

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LONGEST_FRAME = 65_536
LOOK_EVERY_S = 0.05

DEVICE = "link0"
"""The device's name on both machines, as GLOO_SOCKET_IFNAME takes it."""

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def missing() -> str:
    """What this machine lacks for such a link; empty where it lacks nothing."""
    if not Path("/dev/net/tun").exists():
        return "wants /dev/net/tun"
    if os.geteuid() != 0:
        return "wants root, to make network namespaces and TAP devices"
    try:
        command = ["unshare", "--net", "ip", "tuntap", "add", "dev", DEVICE, "mode", "tap"]
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError as error:
        return f"wants the command {error.filename}"
    except subprocess.CalledProcessError as error:
        return f"wants CAP_NET_ADMIN and network namespaces: {error.stderr.decode().strip()}"
    return ""


@dataclass(frozen=True)
class Link:
    """Two machines and the link between them, whole and quick until told otherwise.

    Attributes:
        namespaces: of the machines, as `enter` takes them.
    """

    namespaces: tuple[str, str]
    folder: Path

    def becomes(self, *, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        """From now on frames take so long on their way, in either direction, and so large a share of them is lost (1: a partition)."""
        wanted = {"delay_s": delay_s, "loss": loss, "seed": seed}
        atomic_write(self.folder / "wanted", json.dumps(wanted), synced=False)
        until(lambda: self.state()["is"] == wanted)

    def state(self) -> dict[str, Any]:
        """What the link `is`, and how many frames have been `carried` and `lost` since it was made."""
        state: dict[str, Any] = json.loads((self.folder / "state").read_text())
        return state


def enter(namespace: str) -> None:
    """Puts this process, which may have no other thread yet, on a machine of a link."""
    descriptor = os.open(namespace, os.O_RDONLY)
    _call("setns", descriptor, CLONE_NEWNET)
    os.close(descriptor)


@contextmanager
def link(folder: Path) -> Iterator[Link]:
    """Two machines with a link while within; `folder` is its own, and made here."""
    folder.mkdir()
    carrier = started(_carry, folder, log=folder / "log")
    try:
        until(lambda: (folder / "state").exists() or not carrier.is_alive())
        assert carrier.is_alive(), (folder / "log").read_text()
        first, second = json.loads((folder / "namespaces").read_text())
        yield Link((f"/proc/{carrier.pid}/fd/{first}", f"/proc/{carrier.pid}/fd/{second}"), folder)
        assert carrier.is_alive(), (folder / "log").read_text()
    finally:
        carrier.kill()
        carrier.join()


def _call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _machine(address: str) -> tuple[int, int]:
    """Makes a namespace with a TAP device, which this process is in from then on; returns descriptors of both."""
    _call("unshare", CLONE_NEWNET)
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TAP | IFF_NO_PI))
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["ip", "addr", "add", f"{address}/24", "dev", DEVICE],
        ["ip", "link", "set", DEVICE, "up"],
    ):
        subprocess.run(command, check=True)
    return namespace, tap


def _carry(folder: Path) -> None:
    machines = [_machine(address) for address in ADDRESSES]
    (folder / "namespaces").write_text(json.dumps([namespace for namespace, _ in machines]))
    taps = [tap for _, tap in machines]
    other = dict(zip(taps, reversed(taps), strict=True))
    now_is: dict[str, Any] = {"delay_s": 0.0, "loss": 0.0, "seed": 0}
    draw, numbers, parent = random.Random(0), itertools.count(), os.getppid()
    under_way: list[tuple[float, int, int, bytes]] = []  # when it arrives, its number, where, the frame
    carried, lost, looked = 0, 0, -math.inf
    while os.getppid() == parent:  # a test that was killed leaves no link behind
        now = time.monotonic()
        if now - looked > LOOK_EVERY_S:
            looked, wanted = now, folder / "wanted"
            if wanted.exists() and (asked := json.loads(wanted.read_text())) != now_is:
                now_is, draw = asked, random.Random(asked["seed"])
            atomic_write(folder / "state", json.dumps({"is": now_is, "carried": carried, "lost": lost}), synced=False)
        while under_way and under_way[0][0] <= now:
            _, _, to, frame = heapq.heappop(under_way)
            try:
                os.write(to, frame)
                carried += 1
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ENOBUFS):  # the device is down or full: a link may lose a frame
                    raise
                lost += 1
        wait = min(LOOK_EVERY_S, under_way[0][0] - now) if under_way else LOOK_EVERY_S
        for tap in select.select(taps, [], [], max(0.0, wait))[0]:
            frame = os.read(tap, LONGEST_FRAME)
            if draw.random() < now_is["loss"]:
                lost += 1
            else:
                heapq.heappush(under_way, (time.monotonic() + now_is["delay_s"], next(numbers), other[tap], frame))
