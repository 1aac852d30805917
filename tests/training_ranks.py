"""Whole trainings as real processes that may die: one per rank, speaking gloo over a fresh port, without Ray."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Preempted, RunFolder
from nexus_scale.engine.checkpoint import newest
from tests.distributed import environment_of, free_port, started
from tests.links import ADDRESSES, DEVICE, Link, enter

QUIET: dict[str, Any] = {"samples": None, "validate": None, "checkpoint": {"every": 4}, "metrics": {"every": 1}}
"""Callbacks of these trainings beside the defaults: saving often, and no time spent on pictures."""


class Ranks:
    """A training of the recipe's `tiny:` form: started at once, ended at the latest with the test."""

    def __init__(
        self,
        root: Path,
        world_size: int = 1,
        *,
        recipe: str = "mmdit/tiny_openmoji",
        fault: str | None = None,
        poison: dict[str, list[int]] | None = None,
        louder: list[int] | None = None,
        trick: tuple[int, int, str] | None = None,
        micro_batch: int | None = None,
        engine: str = "deepspeed",
        link: Link | None = None,
        late: bool = False,
        collective_timeout_s: float = 60,
        **changed: Any,
    ):
        """`poison`: global batches, by rank as a string, whose samples reach that rank as NaN; `louder`: such that are 10 times as
        large on all ranks; `trick`: (rank, global batch, one of TRICKS), see `_play`; `link`: between the machines of two ranks;
        `late`: metrics are read a step later, as where a device computes by itself."""
        callbacks = {**QUIET, **changed.pop("callbacks", {})}
        made = recipes.load_recipe(recipe, {**changed, "callbacks": callbacks}, tiny=True)
        self.root, self.world_size = root, world_size
        workers = 0 if world_size == 1 else world_size
        config = {
            "recipe": recipes.dump(made),
            "cluster": {
                "workers": workers,
                "threads_per_worker": 1,
                "precision": "float32",
                "collective_timeout_s": collective_timeout_s,
                "micro_batch": micro_batch,
                "engine": engine,
            },
            "run": str(root),
            "trick": trick,
            "late": late,
            "scales": [
                dict.fromkeys(louder or [], 10.0) | dict.fromkeys((poison or {}).get(str(rank), []), math.nan)
                for rank in range(world_size)
            ],
        }
        root.mkdir(parents=True, exist_ok=True)
        port, faults = free_port(), {"NEXUS_FAULT": fault} if fault else {}
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            environment = {**environment_of(rank, world_size, port), **faults}
            if world_size == 1:
                del environment["RANK"], environment["LOCAL_RANK"]
            if link is not None:
                environment |= {
                    "MASTER_ADDR": ADDRESSES[0],
                    "GLOO_SOCKET_IFNAME": DEVICE,
                    "NAMESPACE": link.namespaces[rank],
                }
            self.processes.append(started(_main, config, log=self.log(rank), environment=environment))

    def log(self, rank: int) -> Path:
        return self.root / f"rank{rank}.out"

    def wait(self, timeout: float = 180) -> list[int]:
        """Exit codes by rank, once all have ended."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            assert not any(p.is_alive() for p in self.processes), f"still running after {timeout:g} s\n{self.said()}"
        finally:
            self.kill()
        return [_exit_code(process) for process in self.processes]

    def wait_for(self, rank: int, timeout: float = 180) -> int:
        """The exit code of one of them."""
        process = self.processes[rank]
        process.join(timeout)
        assert not process.is_alive(), f"rank {rank} still runs after {timeout:g} s\n{self.said()}"
        return _exit_code(process)

    def done(self, timeout: float = 180) -> Ranks:
        """Waits for a good end."""
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}\n{self.said()}"
        return self

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def said(self) -> str:
        return "\n".join(f"--- rank {r}\n{self.log(r).read_text()[-4000:]}" for r in range(self.world_size))

    def reached(self, step: int, timeout: float = 120) -> None:
        """Waits until the metrics hold a row of this step or a later one."""
        deadline = time.monotonic() + timeout
        while not any(row["step"] >= step for row in rows(self.root)):
            assert all(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < deadline, f"step {step} was not reached in {timeout:g} s\n{self.said()}"
            time.sleep(0.02)


def _exit_code(process: BaseProcess) -> int:
    assert process.exitcode is not None
    return process.exitcode


def rows(root: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = root / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def newest_step(root: Path) -> int:
    checkpoint = newest(RunFolder(root).checkpoints)
    return 0 if checkpoint is None else checkpoint.step


def final(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors and the counters of the newest checkpoint."""
    checkpoint = newest(RunFolder(root).checkpoints)
    assert checkpoint is not None
    return {name: checkpoint.tensor(name) for name in checkpoint.names}, checkpoint.state["progress"]


def assert_same_end(a: Path, b: Path) -> None:
    """The same bits in every tensor, the same counters."""
    (one, counters), (other, others) = final(a), final(b)
    assert counters == others
    assert one.keys() == other.keys() and len(one) > 4
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _scale(scales: dict[int, float]) -> None:
    """Multiplies the samples of some global batches as they are handed out."""
    from nexus_scale.data.loader import Loader

    next_batches = Loader.next_batches

    def scaled(loader: Loader) -> list[Batch]:
        batches = next_batches(loader)
        by = scales.get(batches[0].draw)
        if by is None:
            return batches
        return [
            replace(batch, fields={name: x * by if x.is_floating_point() else x for name, x in batch.fields.items()})
            for batch in (given.on("cpu") for given in batches)
        ]

    Loader.next_batches = scaled  # type: ignore[method-assign]


TRICKS = ("extra", "missing", "short")


def _play(trick: tuple[int, int, str] | None) -> None:
    """Lets one rank part from the others at a global batch: by a collective that they do not make, by leaving one out that they
    make, or with a micro-batch less."""
    from nexus_scale.data.loader import Loader
    from nexus_scale.engine import deepspeed, distributed

    if trick is None or trick[0] != int(os.environ["RANK"]):
        return
    _, draw, what = trick
    next_batches, refresh = Loader.next_batches, deepspeed.ZeroNetwork.refresh
    left_out: list[int] = []

    def tricked(loader: Loader) -> list[Batch]:
        batches = next_batches(loader)
        if batches[0].draw != draw:
            return batches
        if what == "extra":
            torch.distributed.barrier(group=distributed._group_aside())
        if what == "missing":
            left_out.append(draw)
        return batches[:-1] if what == "short" else batches

    def refreshed(network: deepspeed.ZeroNetwork, copied: bool = False) -> None:
        if left_out:
            left_out.pop()
        else:
            refresh(network, copied)

    Loader.next_batches = tricked  # type: ignore[method-assign]
    deepspeed.ZeroNetwork.refresh = refreshed  # type: ignore[method-assign]


def _main(config: dict[str, Any]) -> None:
    from nexus_scale.orchestration.worker import work

    root = Path(config["run"])
    if "NAMESPACE" in os.environ:
        enter(os.environ["NAMESPACE"])
    _scale(config.pop("scales")[int(os.environ.get("RANK", "0"))])
    _play(config.pop("trick"))
    if config.pop("late"):
        from nexus_scale import trainer

        trainer.reads_late = lambda device: True
    try:
        work({**config, "data_root": str(root / "data"), "runs_root": str(root.parent)})
    except Preempted as left:
        print(left)
        sys.exit(75)
