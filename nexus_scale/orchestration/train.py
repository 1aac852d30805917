"""Runs a worker function on Ray: placed, supervised, restarted, and its result brought home.

A worker resumes from the newest valid checkpoint by itself, so that it is only started again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nexus_scale.io import incidents, leaving
from nexus_scale.io.durable import umask
from nexus_scale.io.plain_json import read_json_or
from nexus_scale.orchestration import head, security
from nexus_scale.orchestration.cluster import check_resources, connected
from nexus_scale.orchestration.rank import log_name, write_json
from nexus_scale.orchestration.supervise import Limits, Supervisor

if TYPE_CHECKING:
    from nexus_scale.orchestration.controller import Plan

logger = logging.getLogger(__name__)


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
    """Rank 0's result of `work`, run on all workers to its end.

    Rank 0's output is printed here, too; each rank's is kept in `<run_folder>/attempts/<attempt>/rank_<n>.log`.

    Args:
        work: `module:function`; the function takes `config` and returns a JSON value. Workers import it.
        config: JSON values.
        workers: how many, or (least, most).
        environment: variables of each worker, set before it imports `work`. No secrets, as Ray shows them.
        sizes: the numbers of workers that are allowed, where `workers` is a pair; None: all from least to most.
        max_failures: restarts in a row, without a new checkpoint between them, before the run is given up.
        max_preemptions: how often its machines may ask it to leave; None: any number of times.
        backoff_s: wait before the second restart in a row; it doubles from there.
        start_deadline_s: how long to wait for room on the cluster.
        timeout_s: of a collective, after which a hanging peer counts as dead.
        address: of a Ray cluster; None: the job's own, or a local one during the call.
        nodes: how many machines the run needs.
        standby: whether a spare process with everything imported stands by for each worker, for quick restarts; on CPUs only.
    Raises:
        UserError: raised by a worker (never retried); or the cluster is too small or open, or the environment has a secret.
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
    supervisor = Supervisor(run_folder.resolve(), Limits(max_failures, max_preemptions, backoff_s))
    folder = run_folder / "attempts" / supervisor.name
    folder.mkdir(parents=True)
    task = {
        "work": work,
        "config": config,
        "folder": str(folder.resolve()),
        "environment": environment,
        "gpus": bool(gpus_per_worker),
        "threads": threads_per_worker or max(1, int(cpus_per_worker)),
        "timeout_s": timeout_s,
        "umask": umask(),
        "path": [entry for entry in sys.path if entry],
    }
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    imports = _import_ahead("nexus_scale.orchestration.controller")
    stages = {
        "launched": time.time()
    }  # wall clock: `nexus bench start` compares it with other processes of this machine
    with (
        connected(address=address, nodes=nodes) as connection,
        head.last_act(lambda words: _leave_without_head(supervisor, words)),
        _leaves_when_asked(supervisor.run),
    ):
        stages["connected"] = time.time()
        check_resources(least, cpus_per_worker, gpus_per_worker, start_deadline_s, grows=not connection.ours)
        imports.join()
        stages["imported"] = time.time()
        write_json(folder / "stages.json", stages)
        from nexus_scale.orchestration.controller import Plan

        plan = Plan(
            sizes=sizes if sizes and least < most else range(least, most + 1),
            elastic=isinstance(workers, tuple),
            resources={"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
            local=connection.ours,
            is_final=lambda: _is_final(folder, supervisor),
            standby=standby and not gpus_per_worker,
            start_deadline_s=start_deadline_s,
        )
        with _relayed(folder / log_name(0)):
            _run(task, supervisor, plan)
    return read_json_or(folder / "result.json", dict[str, Any], {})


def _import_ahead(module: str) -> threading.Thread:
    """Imports in a thread: Ray's start is mostly waiting for other processes, and the driver's imports (torch) fit into that."""
    thread = threading.Thread(target=importlib.import_module, args=(module,), daemon=True)
    thread.start()
    return thread


def _run(task: dict[str, Any], supervisor: Supervisor, plan: Plan) -> None:
    """The workers under their controller.

    Raises:
        UserError, Preempted, RuntimeError: see `launch`.
    """
    from nexus_scale.orchestration.controller import Controller

    verdict = Controller(task, plan, supervisor).run()
    if verdict is not None:
        _raise_final(Path(task["folder"]), supervisor)
        raise RuntimeError(verdict.words)


def _is_final(folder: Path, supervisor: Supervisor) -> bool:
    """Whether the launch ends here: a worker found a user's mistake, or the run was asked to leave for good."""
    told, request = _told(folder, supervisor), leaving.asked(supervisor.run)
    if request is not None and request.restart:
        return told is not None and told["kind"] == "user"
    return told is not None or request is not None


def _told(folder: Path, supervisor: Supervisor) -> dict[str, Any] | None:
    """The end of the run as a worker of this attempt wrote it; one of an earlier attempt may have been late."""
    told = read_json_or(folder / "final.json", dict[str, Any], {})
    return told if told.get("attempt") == supervisor.attempt else None


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


@contextlib.contextmanager
def _leaves_when_asked(run: Path) -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C ask the run to save and leave; a second one ends the program, its workers and its Ray at once.

    Entered after Ray is connected, which sets a handler of its own that ends processes under the controller.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    asked = False
    code = 0

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal asked, code
        if asked:
            code = 128 + number
            raise SystemExit(code)
        asked = True
        name = signal.Signals(number).name
        logger.warning("%s: the run is asked to save its state and leave; a second one ends it at once", name)
        try:
            leaving.ask(run, name)
        except OSError as error:
            logger.error("the run cannot be asked to leave: %s; another %s ends it at once", error, name)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BaseException:
        if code:  # within a call of Ray's, an exit that the handler raises comes out with another code
            raise SystemExit(code) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


WORKERS_LEAVE_S = 15.0
"""How long workers that outlive the head may take to save and leave."""

SILENT_S = 3.0
"""Workers without a new heartbeat for so long are gone."""


def _leave_without_head(supervisor: Supervisor, words: str) -> None:
    """Records that the head is gone, and asks workers on other machines to save and leave.

    The request goes through the run folder: Ray no longer reaches them, and ends them a little later.
    """
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
    """Prints what is appended to a file within, to the last byte."""
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
