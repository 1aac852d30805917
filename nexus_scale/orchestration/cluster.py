"""The Ray cluster of a run: the one that the program was submitted to, or a local one for the time of the program.

Nothing imports torch or Ray at the top of this file, not even for `contracts.UserError`: Ray's start is mostly waiting, and torch is
imported meanwhile (1.3 s of some 8 to the first step).
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
"""Training passes nothing large through Ray, whose default is 30 % of the memory."""

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; unset, every worker warns
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray Data's actors print advice for Ray's developers
    "RAY_USAGE_STATS_ENABLED": "0",  # a local run reports nothing
}

_CLOSED = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as on those systems, every server listens on 127.0.0.1 alone
    "RAY_enable_metrics_collection": "0",  # no metrics pages, which would ask for no token
}
"""Settings that close a local cluster to other users and machines."""

ATTACH_S = 10.0
"""How long a cluster may take to answer at its address."""

JOIN_S = 90.0
"""How long Ray may take to join a cluster that answers."""


@dataclass(frozen=True)
class Connection:
    """`ours`: this process started the cluster, on this machine alone. `nodes`: live nodes on entry."""

    ours: bool
    nodes: int


_local = False
"""Whether this process started the Ray that it is connected to."""


def is_submitted_job() -> bool:
    """Whether this program was started by `ray job submit`, in a copy of the working folder."""
    return _JOB in os.environ


def roots(cluster: Cluster) -> tuple[Path, Path]:
    """Absolute folders of data and runs.

    A path in the cluster file comes first, then NEXUS_DATA_ROOT and NEXUS_RUNS_ROOT, then `./data` and `./runs`. A submitted job
    runs in a copy of the working folder that is deleted with it; its relative paths start at `~/nexus_scale`.
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
    """The data root of an existing run, wherever the command is given.

    It is a path that the command names, NEXUS_DATA_ROOT, an absolute path in the cluster file, or the run's data root when it was last
    started (`run.files.data_root_of`).

    Args:
        asked: whether this command sets `cluster.paths.data`.
    """
    from nexus_scale.run.files import data_root_of

    given = cluster.paths.data
    absolute = given is not None and Path(given).expanduser().is_absolute()
    if asked or (given is None and os.environ.get("NEXUS_DATA_ROOT")):
        return roots(cluster)[0]
    known = roots(cluster)[0] if absolute else data_root_of(run)
    if known is not None and (known.is_dir() or not absolute):
        return known
    here, beside = roots(cluster)[0], run.path.parent.parent / "data"  # for runs of an older version
    return beside if beside.is_dir() and not here.is_dir() else here


@contextmanager
def connected(*, address: str | None = None, nodes: int = 1) -> Iterator[Connection]:
    """Ray within: the cluster at `address`, the one that this job was submitted to, or a local one that is stopped at the end.

    A Ray that this process is connected to already is used and left running, so that a program with several stages pays for one
    start. Within, the program ends when the cluster's head is gone, or this machine's part of it (`head.watched`).

    Args:
        address: of a running cluster; None: RAY_ADDRESS where it is set, the job's own cluster, or a new local one.
        nodes: how many machines the run needs; a local cluster has one.
    Raises:
        UserError: no such cluster; one of several nodes without a token; a local one for several nodes.
    """
    import ray

    global _local
    if ray.is_initialized():
        with _watched_head(_local):
            yield Connection(ours=_local, nodes=_alive())
        return
    if address is None and (is_submitted_job() or os.environ.get("RAY_ADDRESS")):
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local":  # Ray's word for a new local one
        address = None
    if address is None and nodes > 1:
        from nexus_scale.contracts import UserError

        raise UserError(
            f"nodes {nodes}: this program would start a local Ray cluster, of one node; start Ray on {nodes} machines and "
            "submit the job there (`ray job submit`), or set nodes to 1",
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
        # Without its dashboard the cluster needs one port and 60 MB less. Only the job API needs it, and a local cluster takes no jobs.
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

    advice = "start one there (`ray start --head`), set RAY_ADDRESS to a running cluster, or unset it for a local one"
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
    """Waits until the cluster has room for the workers: a machine may still be joining, or another job ending.

    Args:
        workers: how many must fit, each on one node with `cpus` and `gpus`.
        deadline_s: how long to wait.
        grows: whether machines may still join. A cluster that is too small and cannot grow is refused at once.
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
        f"within {deadline_s:g} s: {_described(nodes, free)}; {whole_workers(nodes, cpus, gpus)} would fit when it is idle. "
        "Lower cluster.workers or what each takes, or add machines",
        code=4,
    )


def whole_workers(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many whole workers fit on these nodes."""
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
    """Submits a job by `ray job submit --no-wait`, and tries again while a new cluster has no agent to run it.

    Args:
        entrypoint: the command, word by word.
        address: of the dashboard, `http://127.0.0.1:8265`.
        environment: variables of the job; whoever can read the API sees them, so none may look like a secret.
    Returns:
        The job's id, for `job_status` and `ray job logs`.
    Raises:
        UserError: a secret among the variables or in the command, or the cluster takes no job within `timeout_s`.
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
            raise UserError(f"{address}: Ray's job server did not answer within {timeout_s + 60:g} s", code=4) from None
        if done.returncode == 0:
            return _submission_id(done.stdout)
        said = done.stdout + done.stderr
        # For some seconds after `ray start`, the job server knows no agent and answers 500 (not 503).
        if "No available agent" not in said or time.monotonic() > end:
            raise UserError(
                f"{address}: Ray did not take the job: {said.strip().splitlines()[-1] if said.strip() else 'no answer'}",
                code=4,
            )
        time.sleep(1)


def job_status(job: str, address: str) -> str:
    """A job's status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

    The job server is asked directly: Ray's own client keeps the first token that its process has read.

    Raises:
        UserError: no answer.
    """
    from nexus_scale.contracts import UserError

    assert address.startswith(("http://", "https://")), address
    request = urllib.request.Request(f"{address}/api/jobs/{job}", headers=security.bearer())  # noqa: S310 - see above
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return str(json.load(answer)["status"])
    except OSError as error:
        raise UserError(f"{address}: Ray's job server gave no status of job {job}: {error}", code=4) from None


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
