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
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nexus_scale.io import incidents, leaving
from nexus_scale.io.durable import atomic_write, trouble, umask
from nexus_scale.io.plain_json import read_json_or
from nexus_scale.io.terminal import open_output
from nexus_scale.orchestration import head, security
from nexus_scale.orchestration.cluster import check_resources, connected
from nexus_scale.orchestration.supervise import Failure, Limits, Supervision, Supervisor, Verdict, last_line, normalised

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
    max_preemptions: int | None = None,
    backoff_s: float = 2.0,
    sizes: Sequence[int] | None = None,
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
        sizes: numbers of workers that the work allows, where `workers` is a pair; None: all from least to most.
        max_failures: restarts in a row, without a new checkpoint between them, before the run is given up.
        max_preemptions: times that it may be asked to leave by its machines; None: any number.
        backoff_s: wait before the second restart in a row; it doubles from there.
        start_deadline_s: how long to wait for a cluster that has room.
        timeout_s: of a collective, after which a hanging peer counts as dead.
        address: of a Ray cluster; None: the job's own, or a local one for the time of the call.
        nodes: machines that the run is meant for.
        standby: whether as many processes as there are workers wait beside them with everything imported, for a quick restart; on
            processors alone.
    Raises:
        UserError: raised by a worker (never retried), or: too small a cluster, an open one, a secret in the environment.
        Preempted: the run was asked to leave and has saved its state.
        RuntimeError: workers failed more often than `max_failures`, or twice at the same step with the same error; carries the
            last worker's traceback.
    """
    environment = dict(environment or {})
    security.refuse_secrets(environment, sys.argv[1:])
    json.dumps(config)  # a value that is not JSON is a mistake of the caller's, found before anything starts
    if not gpus_per_worker:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    leaving.withdraw(run_folder)  # a request that stands there was meant for an earlier launch
    limits = Limits(max_failures, max_preemptions, backoff_s)
    supervisor = Supervisor(run_folder.resolve(), limits)
    folder = run_folder / "attempts" / supervisor.name
    folder.mkdir(parents=True)
    task = {
        "work": work,
        "config": config,
        "folder": str(folder.resolve()),
        "environment": environment,
        "threads": threads_per_worker or max(1, int(cpus_per_worker)),
        "umask": umask(),
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
    with (
        connected(address=address, nodes=nodes) as connection,
        head.last_act(lambda words: _leave_without_head(supervisor, words)),
        _leaves_when_asked(supervisor.run),
    ):
        stages["connected"] = time.time()
        least, most = workers if isinstance(workers, tuple) else (workers, workers)
        check_resources(least, cpus_per_worker, gpus_per_worker, start_deadline_s, grows=not connection.ours)
        imports.join()
        stages["imported"] = time.time()
        _write(folder / "stages.json", stages)
        supervision = Supervision(
            supervisor,
            sizes=(sizes or range(least, most + 1)) if isinstance(workers, tuple) else None,
            local=connection.ours,
            is_final=lambda: _is_final(folder, supervisor),
            # Ray hides the GPUs from an actor that takes none by its count, as a spare does.
            standby=standby and not gpus_per_worker,
            start_deadline_s=start_deadline_s,
        )
        with _driver_settings(start_deadline_s, local=connection.ours), _relayed(folder / _log(0)):
            _fit(
                task,
                supervision,
                workers=workers,
                resources={"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
                storage=supervisor.run / "attempts",
                timeout_s=timeout_s,
            )
    return read_json_or(folder / "result.json", dict[str, Any], {})


def _fit(task: dict[str, Any], supervision: Supervision, **options: Any) -> None:
    """Ray Train under the supervisor, and again where Ray Train itself fails."""
    from nexus_scale.contracts import UserError
    from nexus_scale.orchestration import ray_train

    supervisor, folder = supervision.supervisor, Path(task["folder"])
    name = supervisor.name
    while True:
        try:
            ray_train.fit(run_worker, task, name=name, supervision=supervision, **options)
            supervisor.end("finished")
            return
        except ray_train.WorkerGroupError:
            _raise_final(folder, supervisor)
            if supervisor.gave_up is None:
                raise
            _raise_given_up(supervisor.gave_up)
        except ray_train.ControllerError as error:
            _raise_final(folder, supervisor)
            cause = error.controller_failure
            if isinstance(cause, UserError):
                raise cause from None
            if type(cause).__name__ in ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"):
                raise UserError(f"the cluster did not start the workers in time: {cause}", code=4) from error
            verdict = supervisor.gave_up or supervisor.judge(
                Failure(
                    "controller",
                    f"Ray Train failed: {last_line(str(cause))}",
                    error=normalised(repr(cause)),
                    details=str(error),
                )
            )
            if not verdict.restart:
                _raise_given_up(verdict)
            time.sleep(verdict.wait_s)
            # Ray Train's own state is never read again: a torn file of it under an old name would end every later start.
            name = f"{supervisor.name}.ray{supervisor.starts}"


def _is_final(folder: Path, supervisor: Supervisor) -> bool:
    """Whether the launch ends here: a worker found a mistake of the user's, or the run was asked to leave for good."""
    told, request = _told(folder, supervisor), leaving.asked(supervisor.run)
    if request is not None and request.restart:
        return told is not None and told["kind"] == "user"
    return told is not None or request is not None


def _told(folder: Path, supervisor: Supervisor) -> dict[str, Any] | None:
    """What a worker of the last attempt left behind as the end of the run; one of an earlier attempt may have been late."""
    told = read_json_or(folder / "final.json", dict[str, Any], {})
    return told if told.get("attempt") == supervisor.attempt else None


def _raise_given_up(verdict: Verdict) -> NoReturn:
    if verdict.code is not None:
        from nexus_scale.contracts import UserError

        raise UserError(verdict.words, code=verdict.code)
    raise RuntimeError(verdict.words)


def _raise_final(folder: Path, supervisor: Supervisor) -> None:
    """Raises what ended the run for good, if anything did."""
    from nexus_scale.contracts import Preempted, UserError

    told, request = _told(folder, supervisor), leaving.asked(supervisor.run)
    if told is not None:
        if told["kind"] == "user":
            supervisor.end("failed", told["message"])
            raise UserError(told["message"], told["code"]) from None
        supervisor.end("left", request.reason if request is not None else "a worker was asked to leave")
        raise Preempted(told["step"]) from None
    if request is not None and not request.restart:
        supervisor.end("left", f"{request.reason}; the workers ended before they could save")
        raise Preempted(supervisor.committed()) from None


# ------------------------------------------------------------------------------------------------ in a worker


def run_worker(task: dict[str, Any]) -> None:
    """What Ray Train calls in each worker: settings, output to the rank's log, the work, its result or final error to a file."""
    from nexus_scale.contracts import Preempted, UserError

    rank = int(os.environ["RANK"])
    folder = Path(task["folder"])
    settle(task)
    _redirect_output(folder / _log(rank))
    # What ends the work is printed below, once, and a mistake of the user's and a preemption not at all: they come home in a file.
    logging.getLogger("ray.train.v2._internal.util").setLevel(logging.CRITICAL)
    if os.environ.get("RAY_TRAIN_ENABLE_PRINT_PATCH") != "0":
        from nexus_scale.orchestration import ray_train

        ray_train.keep_output_plain()
    try:
        result = _find(task["work"])(task["config"])
    except UserError as error:
        _say_final(folder, {"kind": "user", "message": str(error), "code": error.code, "rank": rank})
        raise
    except Preempted as left:
        _say_final(folder, {"kind": "preempted", "step": left.step})
        raise
    except OSError as error:
        known = trouble(error)
        if known is None:
            traceback.print_exc()
            raise
        mistake = UserError(f"{known[0]} (rank {rank})", known[1])
        _say_final(folder, {"kind": "user", "message": str(mistake), "code": mistake.code, "rank": rank})
        raise mistake from error
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if rank == 0:
        try:
            _write(folder / "result.json", result)
        except OSError as error:  # the run is done: its last checkpoint is committed
            logger.error("%s: is not written: %s", folder / "result.json", error)


def _say_final(folder: Path, final: dict[str, Any]) -> None:
    """Leaves word of what ends the run for good; where the disk takes no more, the error itself carries it to the driver."""
    try:
        _write(folder / "final.json", {**final, "attempt": os.environ["NEXUS_ATTEMPT"]})
    except OSError as error:
        logger.error("%s: is not written: %s", folder / "final.json", error)


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
    sys.stdout, sys.stderr = open_output(1), open_output(2)  # a full disk costs lines of the log, and not the run


def _write(path: Path, value: Any) -> None:
    """Whole or not at all; the first of several ranks to report stays."""
    atomic_write(path, json.dumps(value), synced=False)


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
def _leaves_when_asked(run: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the run to save and leave; a second one ends this program, its workers and its Ray at once.

    Entered after Ray is connected, as it sets a handler of its own that ends its processes under the feet of the controller.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; its owner has
        return
    asked = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise SystemExit(128 + number)
        asked = True
        name = signal.Signals(number).name
        logger.warning("%s: the run is asked to save its state and leave; once more ends it at once", name)
        try:
            leaving.ask(run, name)
        except OSError as error:
            logger.error("the run cannot be asked to leave: %s; another %s ends it at once", error, name)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


WORKERS_LEAVE_S = 15.0
"""How long workers that outlive the head may take to save and leave."""

SILENT_S = 3.0
"""Workers whose heartbeats stand still for so long are gone."""


def _leave_without_head(supervisor: Supervisor, words: str) -> None:
    """Writes down that the head is gone. Workers on machines that still stand are asked to save and leave, by the run's folder: Ray no
    longer carries a word to them, and ends them a little later."""
    incidents.note(supervisor.run, "head_lost", words, attempt=supervisor.attempt, step=supervisor.step())
    begun = moved = time.monotonic()
    beats, asked = supervisor.beats(), False
    while (now := time.monotonic()) - moved < SILENT_S and now - begun < WORKERS_LEAVE_S:
        time.sleep(0.2)
        if (fresh := supervisor.beats()) != beats:
            beats, moved = fresh, now
            if not asked:
                logger.warning("workers outlive the head: they are asked to save and leave")
                leaving.ask(supervisor.run, words)
                asked = True
    supervisor.end("left" if asked else "failed", words)


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
