"""What keeps our Ray clusters closed: a token on every port, and no secret in what Ray shows or logs.

Ray's Jobs API hands a shell to whoever reaches it, and its GCS and raylet listen on all interfaces; only token authentication
(RAY_AUTH_MODE=token) closes both (CVE-2023-48022 and its kin).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nexus_scale.orchestration import ray_internals

logger = logging.getLogger(__name__)

ALLOW_OPEN_CLUSTER = "NEXUS_ALLOW_UNAUTHENTICATED_CLUSTER"
"""Set to 1, it lets a run start on a cluster of several nodes without a token."""

_SECRET = re.compile(r"(?i)key|token|secret|passw")
# On a command line `data.text_tokens=16` is a count, so the plural passes there.
_SECRET_ARGUMENT = re.compile(r"(?i)key|token(?!s\b|izer)|secret|passw")


def refuse_secrets(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
    """Refuses what looks like a secret in a runtime environment or on a command line.

    Ray shows both in its Jobs API and writes them to its logs (ray issues 28276, 39502).

    Raises:
        UserError: names the variable or the option, never its value.
    """
    found = [name for name in environment if _SECRET.search(name)]
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        if (has_value or name.startswith("-")) and _SECRET_ARGUMENT.search(name):
            found.append(name)
    if found:
        from nexus_scale.contracts import UserError

        raise UserError(
            f"{', '.join(found)}: looks like a secret. Ray shows environment variables and command lines to everyone who can read "
            "its API and logs; put secrets into a file that only you can read, or into the environment of the nodes"
        )


def refuse_open_cluster(nodes: int, auth_mode: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a cluster of several nodes that asks for no token.

    Args:
        nodes: live nodes of the cluster.
        auth_mode: how this process authenticates, `token` or `disabled`.
    Raises:
        UserError: several nodes and no token.
    """
    if nodes <= 1 or auth_mode == "token":
        return
    if environment.get(ALLOW_OPEN_CLUSTER) == "1":
        logger.warning(
            "%s=1: this cluster of %d nodes has no token authentication; whoever reaches its ports can run commands on all nodes",
            ALLOW_OPEN_CLUSTER,
            nodes,
        )
        return
    from nexus_scale.contracts import UserError

    raise UserError(
        f"the cluster has {nodes} nodes and no token authentication: whoever reaches its ports can run commands on all nodes. "
        "Start Ray on every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN_PATH "
        f"(`ray get-auth-token --generate` makes one), or set {ALLOW_OPEN_CLUSTER}=1 if the network is closed",
        code=4,
    )


def auth_mode() -> str:
    """How this process authenticates to Ray: `token` or `disabled`."""
    return "token" if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else "disabled"


_made: dict[int, tuple[Path, int]] = {}
"""By process: its private folder, and the lock that marks it as in use."""

PREFIX = "nexus-ray-"

_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_BELOW = "/session_2026-11-26_21-44-48_900006_4194304/sockets/plasma_store"
"""The longest path of a socket below a session's folder."""

_ABANDONED_S = 60.0


def private_folder() -> Path:
    """This process's folder for the token, sockets and logs of its local cluster, mode 0700.

    It is removed with the process; folders of killed processes are removed here. It lies in RAY_TMPDIR or TMPDIR. Where paths of
    sockets would be too long for the kernel it lies in /tmp, and the log says so.

    Raises:
        UserError: no folder can be written to and has a short enough path.
    """
    if os.getpid() in _made and _made[os.getpid()][0].is_dir():
        return _made[os.getpid()][0]
    forget_tokens()  # it was deleted
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    room = _SOCKET_BYTES - len(f"/{PREFIX}12345678/ray{_BELOW}")
    for base in dict.fromkeys(map(os.path.abspath, [wanted, "/tmp", "/var/tmp"])):  # noqa: S108 - a folder of mode 0700 is made there
        try:
            if len(os.fsencode(base)) <= room:
                _forget_abandoned(Path(base))
                folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
                break
        except OSError:
            continue
    else:
        from nexus_scale.contracts import UserError

        raise UserError(
            f"no folder for Ray's sockets: {wanted} must be writable and its path at most {room} bytes long, because a socket's "
            f"path has at most {_SOCKET_BYTES}; set RAY_TMPDIR to such a folder",
            code=4,
        )
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _made[os.getpid()] = folder, lock
    atexit.register(forget_tokens)
    if folder.parent != Path(os.path.abspath(wanted)):
        logger.info("%s: not writable, or too long a path for Ray's sockets; they lie in %s", wanted, folder)
    return folder


def session_folder() -> Path:
    """Ray's session folder. Ray makes it readable for everyone; its parent is private."""
    return private_folder() / "ray"


def forget_session() -> None:
    """Removes what a session leaves behind."""
    shutil.rmtree(session_folder(), ignore_errors=True)


def _forget_abandoned(base: Path) -> None:
    for folder in base.glob(f"{PREFIX}*"):
        try:
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # not one of these
        with os.fdopen(lock), contextlib.suppress(BlockingIOError):  # it is in use
            if time.time() - os.fstat(lock).st_mtime > _ABANDONED_S:  # a younger one may be about to be locked
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def use_token() -> None:
    """Makes a cluster that this process starts ask for a token: the user's, or a new one.

    A new token lies in a file that only this user can read, and is removed with the process; Ray's own would stay in the home
    folder, readable by everyone. One token serves all clusters of a process, because Ray reads it once.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        logger.warning(
            "RAY_AUTH_MODE=%s: the local Ray cluster has no token authentication", os.environ["RAY_AUTH_MODE"]
        )
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    given = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", ""))
    if given.parent.name.startswith(PREFIX) and not given.exists():  # an earlier new one, which was deleted
        del os.environ["RAY_AUTH_TOKEN_PATH"]
    if not any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        path = private_folder() / "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path if path.exists() else write_token(path))
    ray_internals.read_authentication_again()


def write_token(path: Path) -> Path:
    """A new token in a file that is created with mode 0600."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def forget_tokens() -> None:
    """Removes this process's private folder with its tokens, where no exit handler will run. A forked child keeps its parent's."""
    if os.getpid() in _made:
        folder, lock = _made.pop(os.getpid())
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def bearer(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The HTTP header with the token for Ray's dashboard; empty where no token is set."""
    token = environment.get("RAY_AUTH_TOKEN")
    if token is None and "RAY_AUTH_TOKEN_PATH" in environment:
        token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
