"""`nexus doctor`: what is installed, which kernels are used and why, and what will go wrong.

Each check is a function of its arguments (paths, versions, environment) and returns findings; `diagnose` collects them. Nothing is changed
or compiled, and no package of doubtful identity is imported.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from nexus_scale.contracts import SAFE_ENVIRONMENT, UserError
from nexus_scale.engine import compiler
from nexus_scale.kernels import choice, identity, updates

GIB = 2**30

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")

PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "numpy",
    "pydantic",
    "safetensors",
    "webdataset",
    "diffusers",
    "transformers",
    "wandb",
)

STALE_AFTER_S = 60.0
"""From this age on, a lock that no process holds open is stale; the owner of a younger one may be between two system calls."""

STALE_UNSEEN_S = 30 * 60.0
"""The same where open files cannot be listed (no /proc): building these operators takes less than half an hour."""

SHM = Path("/dev/shm")  # noqa: S108 - looked at, never written to
DASHBOARD = ("127.0.0.1", 8265)


@dataclass(frozen=True)
class Finding:
    """What was checked, what was found, and what to do about it (empty where all is well)."""

    level: Level
    what: str
    detail: str
    remedy: str = ""


def diagnose(
    *,
    roots: Sequence[Path] = (Path("."),),
    shm: Path = SHM,
    home: Path | None = None,
    environ: Mapping[str, str] | None = None,
    dashboards: Sequence[tuple[str, int]] = (DASHBOARD,),
) -> list[Finding]:
    """All findings, in reading order.

    Args:
        roots: folders for runs and data.
        shm: shared memory, where Ray and data workers exchange tensors.
        home: whose ~/.cache and ~/.ray are checked.
        environ: of the processes that will train.
        dashboards: Ray dashboards that should not answer without a token.
    """
    home = home or Path.home()
    environ = os.environ if environ is None else environ
    return [
        *versions(),
        *accelerator(),
        *kernels(),
        *compilation(),
        *packages(),
        *mismatches(importlib.metadata.distributions()),
        *stale_locks(extension_folders(environ, home)),
        *[finding for host, port in dashboards for finding in open_cluster(host, port)],
        *token_file(environ, home),
        *space(shm, 1.0, "shared memory", "give the container more, for example --shm-size=8g"),
        *[
            finding
            for root in roots
            for finding in space(root, 5.0, "disk", "free some, or set paths.runs and paths.data")
        ],
        *threads(environ),
        *unsafe_environment(environ),
    ]


def worst(findings: Iterable[Finding]) -> Level:
    """The most serious level among the findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def table(findings: Sequence[Finding]) -> str:
    """Plain text: a line for each finding, with its remedy below."""
    width = max((len(finding.what) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.what:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- what there is


def versions() -> list[Finding]:
    found = [Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in PACKAGES:
        try:
            found.append(Finding("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("note", name, "not installed"))
    return found


def accelerator() -> list[Finding]:
    """The devices that torch sees, and a warning where this build of torch cannot use the GPU."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            text = (
                f"{device.name}, {device.total_memory / GIB:.1f} GiB, compute capability {device.major}.{device.minor}"
            )
            found.append(Finding("ok", f"device cuda:{index}", text))
        return found
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return [
            Finding(
                "warning",
                "device",
                f"this machine has an NVIDIA driver, but torch {torch.__version__} is a build without CUDA",
                "install torch's CUDA build of the same version",
            )
        ]
    return [
        Finding(
            "ok", "device", f"cpu, {available_cores()} core(s), capability {torch.backends.cpu.get_cpu_capability()}"
        )
    ]


def kernels() -> list[Finding]:
    """The implementation of each kernel, and why it is used. On a GPU those of the optimizer are timed, as at the start of a run."""
    if torch.cuda.is_available():
        updates.settle_fastest(torch.device("cuda"))
    return [Finding("ok", f"kernel {name}", f"{row['kernel']}: {row['why']}") for name, row in choice.report().items()]


def compilation() -> list[Finding]:
    """What would compile blocks here (`compile: true`), and where it would be kept."""
    try:
        with_what = compiler.tools("cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        return [Finding("warning" if torch.cuda.is_available() else "note", "compile", str(error))]
    kept = "kept in .compiled in the root of runs; environment.json of a run says what was compiled"
    return [Finding("ok", "compile", f"{with_what}; {kept}")]


def packages() -> list[Finding]:
    """Packages that have the name of a kernel library and are something else."""
    remedies = {
        "apex": "pip uninstall apex; NVIDIA's is built from its source (docker/gpu.Dockerfile), never from the index",
        "flash_attn": "remove it, or install the package: pip install 'nexus-scale[gpu]'",
    }
    return [
        Finding("warning", found.name, found.why, remedies[found.name])
        for found in (identity.identify_apex(), identity.identify_flash_attn())
        if found.found and not found.genuine
    ]


def mismatches(distributions: Iterable[importlib.metadata.Distribution]) -> list[Finding]:
    """Packages that need another version of torch (torchvision, torchaudio), or are outside our own bounds."""
    installed: dict[str, importlib.metadata.Distribution] = {}
    for distribution in distributions:
        name = distribution.metadata["Name"]
        if name:
            installed.setdefault(_canonical(name), distribution)
    found = []
    for owner, only in (("torchvision", {"torch"}), ("torchaudio", {"torch"}), ("nexus-scale", None)):
        if owner not in installed:
            continue
        for line in installed[owner].requires or []:
            requirement = Requirement(line)
            name = _canonical(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not applies or (only is not None and name not in only) or name not in installed:
                continue
            version = installed[name].version
            if not requirement.specifier.contains(version, prereleases=True):
                detail = f"{owner} {installed[owner].version} needs {name}{requirement.specifier}, but {version} is installed"
                found.append(
                    Finding("error", owner, detail, f"pip install '{name}{requirement.specifier}', or remove {owner}")
                )
    return found


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


# --------------------------------------------------------------------------------------- what would go wrong


def extension_folders(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Where torch builds C++ extensions at run time."""
    own = environ.get("TORCH_EXTENSIONS_DIR")
    return ([Path(own)] if own else []) + [home / ".cache" / "torch_extensions"]


def stale_locks(folders: Iterable[Path], now: float | None = None, proc: Path = Path("/proc")) -> list[Finding]:
    """Lock files of killed builds, which make every later start wait forever, silently."""
    now = time.time() if now is None else now
    found = []
    for folder in folders:
        for lock in sorted(folder.rglob("lock")) if folder.is_dir() else []:
            try:
                age = now - lock.stat().st_mtime
            except FileNotFoundError:
                continue  # its build has just ended
            holder = lock_holder(lock, proc) if proc.is_dir() else None
            if holder is not None:
                found.append(Finding("note", "extension build", f"process {holder} is building in {lock.parent}"))
            elif age > (STALE_AFTER_S if proc.is_dir() else STALE_UNSEEN_S):
                detail = f"{lock} is {age / 60:.0f} min old and no process here holds it: every later start would wait for ever"
                found.append(
                    Finding("error", "extension build", detail, f"rm {lock}  (unless another host builds there now)")
                )
    return found


def lock_holder(lock: Path, proc: Path = Path("/proc")) -> int | None:
    """The process that holds the lock open, as torch's builder does until it is done; None if none is visible."""
    target = str(lock.resolve())
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            handles = list((process / "fd").iterdir())
        except OSError:
            continue  # another user's process, or one that just ended
        if any(_opened(handle) == target for handle in handles):
            return int(process.name)
    return None


def _opened(handle: Path) -> str | None:
    """The target of an entry of /proc/<pid>/fd; None if it has been closed."""
    try:
        return os.readlink(handle)
    except OSError:
        return None


def open_cluster(host: str, port: int, timeout_s: float = 1.0) -> list[Finding]:
    """Whether a Ray dashboard answers without a token; anyone who reaches it could then run commands (CVE-2023-48022)."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/api/version")
        response = connection.getresponse()
        status, body = response.status, response.read(65536)
    except (OSError, http.client.HTTPException):
        return [Finding("ok", "ray cluster", f"none answers at {host}:{port}")]
    finally:
        connection.close()
    if status in (401, 403):
        return [Finding("ok", "ray cluster", f"{host}:{port} asks for a token")]
    try:
        answer = json.loads(body) if status == 200 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or "ray_version" not in answer:
        return [Finding("note", "ray cluster", f"{host}:{port} answers {status}, and is not a Ray dashboard")]
    return [
        Finding(
            "error",
            "ray cluster",
            f"Ray {answer['ray_version']} at {host}:{port} answers without a token: anyone who reaches it can run commands",
            "ray stop; then start it with RAY_AUTH_MODE=token in the environment",
        )
    ]


def token_file(environ: Mapping[str, str], home: Path) -> list[Finding]:
    """Whether other users can read the token file, which then protects nothing."""
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return []
    if mode & 0o077:
        return [Finding("warning", "ray token", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}")]
    return [Finding("ok", "ray token", f"{path} is readable by its owner alone")]


def space(folder: Path, wanted_gib: float, what: str, remedy: str) -> list[Finding]:
    """Free space at a folder, or at its nearest parent that exists."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / GIB
    detail = f"{free:.1f} GiB free at {there}"
    if free >= wanted_gib:
        return [Finding("ok", what, detail)]
    return [
        Finding("error" if free < wanted_gib / 5 else "warning", what, f"{detail}; {wanted_gib:g} GiB wanted", remedy)
    ]


def available_cores() -> int:
    """Cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(environ: Mapping[str, str], cores: int | None = None) -> list[Finding]:
    """Whether there are more threads than cores, which slows every step down."""
    cores = cores or available_cores()
    asked = environ.get("OMP_NUM_THREADS", "")
    if asked and not asked.isdigit():
        return [Finding("warning", "threads", f"OMP_NUM_THREADS={asked!r} is not a number", "unset OMP_NUM_THREADS")]
    if asked and int(asked) > cores:
        return [
            Finding(
                "warning", "threads", f"OMP_NUM_THREADS={asked} on {cores} core(s)", f"export OMP_NUM_THREADS={cores}"
            )
        ]
    return [
        Finding(
            "ok",
            "threads",
            f"{asked or torch.get_num_threads()} in this process, {cores} core(s); workers take threads_per_worker",
        )
    ]


UNSAFE = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "torch.load would run code that a checkpoint carries",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION": "Ray Data would run code that a shard carries",
}


def unsafe_environment(environ: Mapping[str, str]) -> list[Finding]:
    """Variables that turn safe loading off, and those that turn it on in every library."""
    found = [
        Finding("error", name, f"is {environ[name]!r}: {why}", f"unset {name}")
        for name, why in UNSAFE.items()
        if environ.get(name, "").lower() not in ("", "0", "false", "no")
    ]
    for name, value in SAFE_ENVIRONMENT.items():
        if environ.get(name) == value:
            found.append(Finding("ok", name, "set: other libraries load safely, too"))
        else:
            found.append(
                Finding(
                    "note",
                    name,
                    "not set; nexus_scale does not need it, other libraries in the process may",
                    f"export {name}={value}",
                )
            )
    return found
