"""The Ray cluster that a run works on: found where the program runs as a job, started and stopped where it does not.

Nothing here imports torch or Ray at the top, not even for `contracts.UserError`: Ray's start is mostly waiting, and torch is imported
meanwhile (1.3 s of some 8 to the first step).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_scale.orchestration import head, ray_internals, security

if TYPE_CHECKING:
    from nexus_scale.config.recipe import Cluster
    from nexus_scale.contracts import RunFolder

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 2**20
"""Training passes nothing large through Ray; its default is 30 % of the memory."""

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; unset, every worker warns of it
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray Data's actors each bring a line of advice to Ray's own developers
    "RAY_USAGE_STATS_ENABLED": "0",  # a local run tells nobody
}

_CLOSED = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # this machine is 127.0.0.1, as on those systems, and every server listens there alone
    "RAY_enable_metrics_collection": "0",  # no metrics pages, which ask for no token
}
"""The environment of a cluster that is for one program on one machine."""

ATTACH_S = 10.0
"""How long a cluster may take to answer at its address before it is given up."""

JOIN_S = 90.0
"""How long Ray itself may take to join a cluster that answers."""


@dataclass(frozen=True)
class Connection:
    """`ours`: this process started the cluster, on this machine alone. `nodes`: alive ones when it was entered."""

    ours: bool
    nodes: int


_local = False
"""Whether the Ray that this process is connected to was started by it, on this machine alone."""


def is_submitted_job() -> bool:
    """Whether this program runs under `ray job submit`, in a copy of the working folder."""
    return _JOB in os.environ


def roots(cluster: Cluster) -> tuple[Path, Path]:
    """Absolute folders of data and runs.

    A path of the cluster file wins, then NEXUS_DATA_ROOT and NEXUS_RUNS_ROOT, then `./data` and `./runs` where the user stands. A
    submitted job stands in a copy of the working folder that is deleted with it: there, relative paths start in
    `~/nexus_scale`, and so does the default.
    """
    start = Path.home() / "nexus_scale" if is_submitted_job() else Path.cwd()
    found = []
    for given, variable, default in (
        (cluster.paths.data, "NEXUS_DATA_ROOT", "data"),
        (cluster.paths.runs, "NEXUS_RUNS_ROOT", "runs"),
    ):
        found.append((start / Path(given or os.environ.get(variable) or default).expanduser()).resolve())
    return found[0], found[1]


def data_root_of_run(run: RunFolder, cluster: Cluster, *, asked: bool = False) -> Path:
    """Where an existing run's data lie, wherever this command is given: a path that the command names, NEXUS_DATA_ROOT, an absolute path
    of its cluster file, or where they lay when it was last started (see `run_files.data_root_of`).

    Args:
        asked: whether `cluster.paths.data` is of this command.
    """
    from nexus_scale.run.files import data_root_of

    given = cluster.paths.data
    absolute = given is not None and Path(given).expanduser().is_absolute()
    if asked or (given is None and os.environ.get("NEXUS_DATA_ROOT")):
        return roots(cluster)[0]
    known = roots(cluster)[0] if absolute else data_root_of(run)
    if known is not None and (known.is_dir() or not absolute):
        return known
    here, beside = roots(cluster)[0], run.path.parent.parent / "data"  # a run of an older version
    return beside if beside.is_dir() and not here.is_dir() else here


@contextmanager
def connected(*, address: str | None = None, nodes: int = 1) -> Iterator[Connection]:
    """Ray within: the cluster at `address`, the one whose job this is, or one started here and stopped at the end.

    Where Ray runs in this process already, that is used and left running; so a program with several stages enters once around
    all of them and pays for one start. Within, this program ends when the cluster's head is gone, or
    this machine's part of it (`head.watched`).

    Args:
        address: of a running cluster; None: RAY_ADDRESS where it is set, the job's own, or a new local one.
        nodes: machines that the run is meant for; a local cluster has one.
    Raises:
        UserError: no such cluster; an open one of several nodes; several nodes wanted of a local one.
    """
    import ray

    global _local
    if ray.is_initialized():
        with _watched_head(_local):
            yield Connection(ours=_local, nodes=_alive())
        return
    if address is None and (is_submitted_job() or os.environ.get("RAY_ADDRESS")):
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local":  # Ray's word for a cluster of one's own
        address = None
    if address is None and nodes > 1:
        from nexus_scale.contracts import UserError

        raise UserError(
            f"nodes {nodes}: this program would start a Ray of its own, on this machine alone; start Ray on {nodes} machines and "
            "submit it there (`ray job submit`), or set nodes to 1",
            code=4,
        )
    try:
        if address is None:
            _start_local()
            _local = True
        else:
            _attach(address)
        count = _alive()
        if address is not None:
            security.refuse_open_cluster(count, security.auth_mode())
        with _watched_head(ours=address is None):
            yield Connection(ours=address is None, nodes=count)
    finally:
        ray.shutdown()
        if _local:
            security.forget_session()
        _local = False


def _start_local() -> None:
    import ray

    security.use_token()
    folder = {"RAY_TMPDIR": str(security.private_folder())}  # Ray keeps its session in `ray` below it
    with (
        _environment({**_QUIET, **_CLOSED}),
        _environment(folder, replace=True),
        ray_internals.loopback(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        # Without its dashboard the cluster needs one port and 60 MB less; the job API, which only the dashboard serves, is
        # for clusters that outlive a program.
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _attach(address: str) -> None:
    import ray

    from nexus_scale.contracts import UserError

    advice = "start one there (`ray start --head`), set RAY_ADDRESS to one that runs, or unset it for one on this machine alone"
    if address != "auto":
        why = head.silence(address, ATTACH_S)
        if why:
            raise UserError(f"no Ray cluster answers at {address} ({why}); {advice}", code=4)
    try:
        with head.deadline(JOIN_S, f"Ray did not join the cluster at {address} within {JOIN_S:g} s; {advice}"):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}; {advice}", code=4) from error


def _watched_head(ours: bool) -> AbstractContextManager[None]:
    import ray

    here = ray.get_runtime_context()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here.get_node_id()]
    raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    return head.watched(
        [
            head.Server("Ray's daemon on this machine", raylet, head.NO_WAY_BACK_S),
            head.Server("the head of the Ray cluster", here.gcs_address, head.patience_s(ours)),
        ]
    )


def _alive() -> int:
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


@contextmanager
def _environment(values: Mapping[str, str], *, replace: bool = False) -> Iterator[None]:
    """Environment variables for the processes started within; what the user has set stays, unless it is replaced meanwhile."""
    before = {name: os.environ.get(name) for name in values if replace or name not in os.environ}
    os.environ.update({name: values[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ------------------------------------------------------------------------------------------------ resources


def check_resources(workers: int, cpus: float, gpus: float, deadline_s: float, grows: bool = True) -> None:
    """Waits until the cluster can place so many workers; a machine may still be joining, another job may be ending.

    Args:
        workers: how many must fit, each whole on one node, with `cpus` and `gpus`.
        deadline_s: how long to wait.
        grows: whether a machine may still join; a cluster that is too small and cannot grow is refused at once.
    Raises:
        UserError: what there is, what is needed, and what to change.
    """
    import ray

    end = time.monotonic() + deadline_s
    said = False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        free = list(ray_internals.free_resources().values())
        if whole_workers(nodes, cpus, gpus) >= workers and whole_workers(free, cpus, gpus) >= workers:
            return
        if time.monotonic() >= end or (not grows and nodes and whole_workers(nodes, cpus, gpus) < workers):
            break
        if not said and time.monotonic() > end - deadline_s + 2:
            logger.info(
                "waiting for room for %d workers, at most %.0f s: %s", workers, deadline_s, _described(nodes, free)
            )
            said = True
        time.sleep(0.1)
    from nexus_scale.contracts import UserError

    raise UserError(
        f"the cluster cannot place {workers} workers of {cpus:g} CPU{f' and {gpus:g} GPU' if gpus else ''} each "
        f"within {deadline_s:g} s: {_described(nodes, free)}; {whole_workers(nodes, cpus, gpus)} would fit on it when idle. "
        "Lower cluster.workers or what each takes, or add machines",
        code=4,
    )


def whole_workers(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """Whole workers that these nodes hold."""
    total = 0
    for node in nodes:
        shares = [node.get(name, 0.0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
        total += int(min(shares) + 1e-6) if shares else 10**6
    return total


def _described(nodes: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]) -> str:
    def total(of: Sequence[Mapping[str, float]], name: str) -> float:
        return sum(node.get(name, 0.0) for node in of)

    return (
        f"it has {len(nodes)} node{'s' * (len(nodes) != 1)} with {total(nodes, 'CPU'):g} CPUs and {total(nodes, 'GPU'):g} GPUs, "
        f"of which {total(free, 'CPU'):g} and {total(free, 'GPU'):g} are free"
    )


# ------------------------------------------------------------------------------------------------ jobs


def submit(
    entrypoint: Sequence[str],
    *,
    address: str,
    working_dir: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 60,
) -> str:
    """`ray job submit --no-wait`, tried again while a cluster that has just started knows no agent to run the job.

    Args:
        entrypoint: the command, word by word.
        address: of the dashboard, `http://127.0.0.1:8265`.
        environment: variables of the job; anyone who reads the API sees them, so none may look like a secret.
    Returns:
        the job's id, for `job_status` and `ray job logs`.
    Raises:
        UserError: a secret among the variables or in the command; the cluster takes no job within `timeout_s`.
    """
    from nexus_scale.contracts import UserError

    environment = dict(environment or {})
    security.refuse_secrets(environment, entrypoint)
    command = [_ray(), "job", "submit", "--no-wait", "--address", address, "--working-dir", str(working_dir)]
    if environment:
        command += ["--runtime-env-json", json.dumps({"env_vars": environment})]
    end = time.monotonic() + timeout_s
    while True:
        try:
            done = subprocess.run([*command, "--", *entrypoint], capture_output=True, text=True, timeout=timeout_s + 60)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{address}: Ray's job server does not answer within {timeout_s + 60:g} s", code=4
            ) from None
        if done.returncode == 0:
            return _submission_id(done.stdout)
        said = done.stdout + done.stderr
        # Seconds pass after `ray start` before the first node's agent is known to the job server (a 500, not a 503).
        if "No available agent" not in said or time.monotonic() > end:
            raise UserError(
                f"{address}: Ray took no job: {said.strip().splitlines()[-1] if said.strip() else 'no answer'}", code=4
            )
        time.sleep(1)


def job_status(job: str, address: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

    Asked of the job server itself: Ray's own client keeps the first token that its process ever read.

    Raises:
        UserError: nobody answers there, or not in time.
    """
    from nexus_scale.contracts import UserError

    assert address.startswith(("http://", "https://")), address
    request = urllib.request.Request(f"{address}/api/jobs/{job}", headers=security.bearer())  # noqa: S310 - see above
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return str(json.load(answer)["status"])
    except OSError as error:
        raise UserError(f"{address}: Ray's job server does not tell of job {job}: {error}", code=4) from None


def _submission_id(output: str) -> str:
    for word in output.replace("'", " ").split():
        if word.startswith("raysubmit_"):
            return word
    raise RuntimeError(f"ray job submit named no job: {output!r}")


def _ray() -> str:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        from nexus_scale.contracts import UserError

        raise UserError("the `ray` command is not on the PATH; install the package with its dependencies", code=4)
    return found
