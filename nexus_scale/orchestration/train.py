"""Runs a worker function on Ray Train: placed, supervised, restarted, and its result brought home.

Results and errors come back as files in the run folder, not as pickled objects. A worker goes on from the newest valid checkpoint by
itself, so Ray only restarts it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from nexus_scale.orchestration import security
from nexus_scale.orchestration.cluster import check_resources, connected

logger = logging.getLogger(__name__)

Work = Callable[[dict[str, Any]], dict[str, Any]]

_LOCAL = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away with a notice: a process less
    "RAY_TRAIN_METRICS_ENABLED": "0",  # nobody collects them
}
_DRIVER = {
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would replace this program's own logging
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 s by default: the wait from a worker's end or death until it is seen
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a group with a dead peer does not close; 30 s by default
}


def launch(
    work: str,
    config: dict[str, Any],
    *,
    workers: int | tuple[int, int],
    run_folder: Path,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    environment: Mapping[str, str] | None = None,
    max_failures: int = 3,
    start_deadline_s: float = 120,
    timeout_s: float = 600,
    threads_per_worker: int | None = None,
    address: str | None = None,
    nodes: int = 1,
    standby: bool = True,
) -> dict[str, Any]:
    """Runs `work` on all workers to its end and returns rank 0's result.

    Rank 0's output appears here as it is printed; every rank's is kept in `<run_folder>/attempts/<attempt>/rank_<n>.log`.

    Args:
        work: `module:function`; the function takes `config` and returns a JSON value. Workers import it.
        config: JSON values.
        workers: how many, or (least, most).
        environment: variables set in each worker before it imports `work`. No secrets: Ray does not hide them.
        max_failures: restarts of the workers before the run is given up.
        start_deadline_s: how long to wait for a cluster that has room.
        timeout_s: of a collective, after which a hanging peer counts as dead.
        address: of a Ray cluster; None: the job's own, or a local one for the time of the call.
        nodes: machines that the run is meant for.
        standby: whether as many processes as there are workers wait beside them with everything imported, for a quick restart.
    Raises:
        UserError: raised by a worker (never retried), or: too small a cluster, an open one, a secret in the environment.
        Preempted: the run was asked to leave and has saved its state.
        RuntimeError: workers failed more often than `max_failures`; carries the last worker's traceback.
    """
    environment = dict(environment or {})
    security.refuse_secrets(environment, sys.argv[1:])
    json.dumps(config)  # a value that is not JSON is a mistake of the caller's, found before anything starts
    if not gpus_per_worker:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    attempt = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
    folder = run_folder / "attempts" / attempt
    folder.mkdir(parents=True)
    task = {
        "work": work,
        "config": config,
        "folder": str(folder.resolve()),
        "environment": environment,
        "threads": threads_per_worker or max(1, int(cpus_per_worker)),
        "umask": _umask(),
        "path": [entry for entry in sys.path if entry],
    }

    # Ray's start is mostly waiting for other processes; the driver's imports (torch, pandas: 2.5 s) fit into that.
    imports = threading.Thread(
        target=importlib.import_module, args=("nexus_scale.orchestration.ray_train",), daemon=True
    )
    imports.start()
    stages = {
        "launched": time.time()
    }  # wall clock: compared with other processes of this machine by `nexus bench start`
    with connected(address=address, nodes=nodes) as connection, _ended_by_signals():
        stages["connected"] = time.time()
        least = workers[0] if isinstance(workers, tuple) else workers
        check_resources(least, cpus_per_worker, gpus_per_worker, start_deadline_s, grows=not connection.ours)
        imports.join()
        stages["imported"] = time.time()
        _write(folder / "stages.json", stages)
        with _driver_settings(start_deadline_s, local=connection.ours), _relayed(folder / _log(0)):
            _fit(
                task,
                workers=workers,
                resources={"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
                storage=run_folder.resolve() / "attempts",
                name=attempt,
                timeout_s=timeout_s,
                max_failures=max_failures,
                local=connection.ours,
                standby=standby,
            )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _fit(task: dict[str, Any], **options: Any) -> None:
    from nexus_scale.orchestration import ray_train

    final = Path(task["folder"]) / "final.json"
    try:
        ray_train.fit(run_worker, task, is_final=final.exists, **options)
    except ray_train.WorkerGroupError as error:
        _raise_final(final)
        raise RuntimeError(
            f"the workers failed {options['max_failures'] + 1} times, the last time so:\n{error}"
        ) from None
    except ray_train.ControllerError as error:
        _raise_final(final)
        if type(error.controller_failure).__name__ in (
            "WorkerGroupStartupTimeoutError",
            "InsufficientClusterResourcesError",
        ):
            from nexus_scale.contracts import UserError

            raise UserError(
                f"the cluster did not start the workers in time: {error.controller_failure}", code=4
            ) from error
        raise


def _raise_final(final: Path) -> None:
    """Raises what a worker left behind as the end of the run."""
    if not final.exists():
        return
    from nexus_scale.contracts import Preempted, UserError

    told = json.loads(final.read_text())
    if told["kind"] == "preempted":
        raise Preempted(told["step"]) from None
    raise UserError(told["message"], told["code"]) from None


# ------------------------------------------------------------------------------------------------ in a worker


def run_worker(task: dict[str, Any]) -> None:
    """What Ray Train calls in each worker: settings, output to the rank's log, the work, its result or final error to a file."""
    from nexus_scale.contracts import Preempted, UserError

    rank = int(os.environ["RANK"])
    folder = Path(task["folder"])
    settle(task)
    _redirect_output(folder / _log(rank))
    if os.environ.get("RAY_TRAIN_ENABLE_PRINT_PATCH") != "0":
        from nexus_scale.orchestration import ray_train

        ray_train.keep_output_plain()
    try:
        result = _find(task["work"])(task["config"])
    except UserError as error:
        _write(folder / "final.json", {"kind": "user", "message": str(error), "code": error.code, "rank": rank})
        raise
    except Preempted as left:
        _write(folder / "final.json", {"kind": "preempted", "step": left.step})
        raise
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if rank == 0:
        _write(folder / "result.json", result)


def settle(task: Mapping[str, Any]) -> None:
    """The settings of a run's workers, for the process that this is: environment, umask, path, threads."""
    os.environ.update(task["environment"])
    os.umask(
        task["umask"]
    )  # a local Ray starts with 077; what the run writes gets the permissions that the user's own files get
    for entry in task["path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    import torch

    torch.set_num_threads(task["threads"])


def _find(work: str) -> Work:
    module, _, name = work.partition(":")
    found: Work = getattr(importlib.import_module(module), name)
    return found


def _redirect_output(path: Path) -> None:
    """Lets this process print into a file, C++ code included; a restart appends."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _write(path: Path, value: Any) -> None:
    """Whole or not at all; the first of several ranks to report stays."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.replace(path)


# ------------------------------------------------------------------------------------------------ in the driver


@contextlib.contextmanager
def _driver_settings(start_deadline_s: float, *, local: bool) -> Iterator[None]:
    """What Ray Train's controller reads from the environment of the process it runs in, which here is the driver."""
    wanted = {**_DRIVER, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_deadline_s), **(_LOCAL if local else {})}
    fresh = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(fresh)
    noisy = [logging.getLogger(name) for name in ("ray.train", "ray.util")]
    levels = [logger.level for logger in noisy]
    for each in noisy:
        each.setLevel(logging.ERROR)  # "Attempting to start training worker group", one line per state
    try:
        yield
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)
        for name in fresh:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM leaves like Ctrl-C does: by an exception, through the code that ends the workers and Ray.

    Entered after Ray is connected, as it sets a handler of its own that ends its processes under the feet of the controller.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; its owner has
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _relayed(path: Path) -> Iterator[None]:
    """Prints what is appended to a file while within, to the last byte."""
    ended = threading.Event()

    def relay() -> None:
        position = 0
        while True:
            last = ended.is_set()
            if path.exists():
                with path.open("rb") as file:
                    file.seek(position)
                    fresh = file.read()
                position += len(fresh)
                if fresh:
                    sys.stdout.write(fresh.decode(errors="replace"))
                    sys.stdout.flush()
            if last:
                return
            ended.wait(0.2)

    thread = threading.Thread(target=relay, name="relay of rank 0", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def _log(rank: int) -> str:
    return f"rank_{rank}.log"


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
