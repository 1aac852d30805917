"""One rank of a run in a process of its own: its settings, its output in the rank's log, the work, and what became of it.

Results and errors come back as plain values and as files in the run folder, not as pickled exceptions.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nexus_scale.io.durable import atomic_write, trouble
from nexus_scale.io.terminal import open_output
from nexus_scale.orchestration.standby import import_all, loaded_modules
from nexus_scale.orchestration.supervise import is_collateral, last_line

logger = logging.getLogger(__name__)

Work = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of a rank's work.

    Attributes:
        kind: `done`; `mistake`: a UserError; `left`: it saved and left, as asked; `failed`: it raised; `gone`: its process ended.
        error: the type of what was raised.
        text: its traceback; of a mistake, its message.
        code: exit code of a mistake.
    """

    kind: Literal["done", "mistake", "left", "failed", "gone"]
    error: str = ""
    text: str = ""
    code: int = 2


@dataclass(frozen=True)
class Seat:
    """Where a process runs: its node's id, address and name, and the numbers of its GPUs."""

    node: str
    address: str
    hostname: str
    gpus: tuple[str, ...]


class Rank:
    """The actor. Its calls may overlap: `run` lasts as long as the work does."""

    def __init__(self) -> None:
        self._importing = (
            threading.Lock()
        )  # two threads that import the same modules at once may meet one that is half there

    def seat(self) -> Seat:
        import ray

        here = ray.get_runtime_context()
        gpus = tuple(map(str, here.get_accelerator_ids().get("GPU", [])))
        return Seat(here.get_node_id(), ray.util.get_node_ip_address(), socket.gethostname(), gpus)

    def free_port(self) -> int:
        """A port on which nobody listens now, for the ranks' rendezvous."""
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def answers(self) -> bool:
        return True

    def modules(self) -> list[str]:
        """What the process has imported."""
        return loaded_modules()

    def prepare(self, modules: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """Takes the run's settings and imports; returns what could not be imported."""
        with self._importing:
            settle(settings)
            return import_all(modules)

    def run(self, task: dict[str, Any], variables: Mapping[str, str]) -> Outcome:
        """Does the work as the rank that `variables` describe.

        Args:
            task: see `train.launch`.
            variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ... and NEXUS_ATTEMPT.
        """
        os.environ.update(variables)
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(run_work(task)), name="work", daemon=True)
        thread.start()
        thread.join()
        return outcomes[0]


def run_work(task: dict[str, Any]) -> Outcome:
    """Settings, output to the rank's log, the ranks' process group, the work; its result or final error goes to a file."""
    from nexus_scale.contracts import Preempted, UserError
    from nexus_scale.engine.memory import is_out_of_memory

    folder, rank = Path(task["folder"]), int(os.environ["RANK"])
    try:
        settle(task)
        redirect_output(folder / log_name(rank))
        result = _joined_work(task)
    except UserError as error:
        return _mistake(folder, error, rank)
    except Preempted as left:
        _say_final(folder, {"kind": "preempted", "step": left.step})
        return Outcome("left", type(left).__name__, str(left))
    except BaseException as error:
        known = trouble(error) if isinstance(error, OSError) else None
        if known is not None:
            return _mistake(folder, UserError(f"{known[0]} (rank {rank})", known[1]), rank)
        if is_out_of_memory(error):
            return _mistake(folder, UserError(f"rank {rank} ran out of memory: {last_line(str(error))}", 4), rank)
        text = traceback.format_exc()
        # A peer's end is the peer's to explain: what it printed would be lost among the traces of all that waited for it.
        print(f"rank {rank}: {last_line(text)}" if is_collateral(text) else text, file=sys.stderr)
        return Outcome("failed", type(error).__name__, text)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if rank == 0:
        try:
            write_json(folder / "result.json", result)
        except OSError as error:  # the run is done: its last checkpoint is committed
            logger.error("%s: is not written: %s", folder / "result.json", error)
    return Outcome("done")


def _joined_work(task: dict[str, Any]) -> dict[str, Any]:
    from nexus_scale.engine import distributed

    distributed.init("cuda" if task["gpus"] else "cpu", timeout_s=task["timeout_s"])
    module, _, name = task["work"].partition(":")
    work: Work = getattr(importlib.import_module(module), name)
    return work(task["config"])


def _mistake(folder: Path, error: Any, rank: int) -> Outcome:
    _say_final(folder, {"kind": "user", "message": str(error), "code": error.code, "rank": rank})
    return Outcome("mistake", type(error).__name__, str(error), error.code)


def _say_final(folder: Path, final: dict[str, Any]) -> None:
    """Leaves word of what ends the run for good; where the disk takes no more, the outcome itself carries it to the driver."""
    try:
        write_json(folder / "final.json", {**final, "attempt": os.environ["NEXUS_ATTEMPT"]})
    except OSError as error:
        logger.error("%s: is not written: %s", folder / "final.json", error)


def settle(task: Mapping[str, Any]) -> None:
    """Gives this process the settings of a run's workers: environment, umask, path, threads."""
    os.environ.update(task["environment"])
    # A local Ray starts with 077; what the run writes gets the permissions that the user's own files get.
    os.umask(task["umask"])
    for entry in task["path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    import torch

    torch.set_num_threads(task["threads"])


def redirect_output(path: Path) -> None:
    """Lets this process print into a file, C++ code included; a restart appends."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout, sys.stderr = open_output(1), open_output(2)  # a full disk costs lines of the log, and not the run


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; the first of several ranks to report stays."""
    atomic_write(path, json.dumps(value), synced=False)


def log_name(rank: int) -> str:
    return f"rank_{rank}.log"
