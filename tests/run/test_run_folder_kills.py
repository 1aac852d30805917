"""A kill at every write of every file of a run folder: the same command goes on to the same bits, and the commands take the folder.

A program counts what it does to files (opened, half written, written, renamed, removed) and kills itself with SIGKILL at one of these
points. `NEXUS_KILLS=1 pytest tests/run/test_run_folder_kills.py` tries all of them, CI a sample.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import started

NAME = "mmdit_tiny_openmoji_tiny"
SETTINGS = ["cluster.workers=0", "steps=3", "callbacks.checkpoint={every: 1, keep: 2}", "callbacks.metrics={every: 1}"]

Point = tuple[str, str, int]
"""What was done, to which file (numbers left out), for which time."""


class Killer:
    """Stands between a program and its files; `seen` are the points it came by, `at` the one where it dies."""

    def __init__(self, root: Path, at: Point | None = None):
        self.root, self.at = str(root), at
        self.seen: list[Point] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()

    def point(self, what: str, path: Any) -> None:
        name = os.fsdecode(path)
        if not name.startswith(self.root):
            return
        name = re.sub(r"[0-9a-f]{8,}|\d+", "#", os.path.relpath(name, self.root))
        with self.lock:
            self.counts[what, name] += 1
            point = (what, name, self.counts[what, name])
            if point == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append(point)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        kept = {"open": os.open, "write": os.write, "pwrite": os.pwrite}
        of_names = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate")}
        opens = io.open

        def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            opened = opens(file, mode, *args, **options)
            if set(mode) & set("wax+") and not isinstance(file, int):
                self.point("opened", file)
            return opened

        def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            handle = kept["open"](path, flags, *args, **options)
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.point("opened", path)
            return handle

        def written(write: Callable[..., int]) -> Callable[..., int]:
            def wrapped(handle: int, data: Any, *where: int) -> int:
                path = os.readlink(f"/proc/self/fd/{handle}")
                half = memoryview(data).cast("B")[: len(data) // 2]
                if self.at is not None and self.at[0] == "half" and path.startswith(self.root):
                    write(handle, half, *where)
                    self.point("half", path)  # goes on from the beginning below, over the same bytes
                    if not where and os.lseek(handle, 0, os.SEEK_CUR) and not _appends(handle):
                        os.lseek(handle, -len(half), os.SEEK_CUR)
                    elif not where:
                        return len(half)
                elif path.startswith(self.root):
                    self.point("half", path)
                return write(handle, data, *where)

            return wrapped

        def named(function: Callable[..., Any], what: str) -> Callable[..., Any]:
            def wrapped(path: Any, *args: Any, **options: Any) -> Any:
                target = args[0] if what in ("replace", "rename") else path
                if isinstance(target, int):
                    target = os.readlink(f"/proc/self/fd/{target}")
                self.point(f"before {what}", target)
                result = function(path, *args, **options)
                self.point(f"after {what}", target)
                return result

            return wrapped

        builtins.open = io.open = open_file  # type: ignore[assignment]
        os.open, os.write, os.pwrite = os_open, written(kept["write"]), written(kept["pwrite"])
        for name, function in of_names.items():
            setattr(os, name, named(function, name))
        try:
            yield
        finally:
            builtins.open = io.open = opens
            for name, function in {**kept, **of_names}.items():
                setattr(os, name, function)


def _appends(handle: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_APPEND)


def forked(action: Callable[[], Any], log: Path) -> int:
    """The exit code of `action` in a fork of this process, which prints into a file; minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            action()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def train(root: Path) -> None:
    from nexus_scale import main_job
    from nexus_scale.cli import guarded

    roots = [f"cluster.paths.runs={root}", f"cluster.paths.data={root / 'data'}"]
    guarded(lambda: main_job.main("mmdit/tiny_openmoji", [*SETTINGS, *roots], tiny=True))


def final(root: Path) -> dict[str, Any]:
    """Bits of the last checkpoint, and the curve."""
    from nexus_scale.engine.checkpoint import newest
    from tests.checkpoint_bits import hashes

    checkpoint = newest(root / NAME / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3
    rows = [json.loads(line) for line in (root / NAME / "metrics.jsonl").read_text().splitlines()]
    return {"tensors": hashes(checkpoint), "curve": [(row["step"], row["loss"]) for row in rows]}


def command(*arguments: str) -> None:
    from nexus_scale import cli

    sys.argv = ["nexus", *arguments]
    cli.main()


def kills(work: Path, base: Path | None, share: int) -> dict[str, Any]:
    """Kills of a start of the run; of a first one, or of one that finds `base`.

    Args:
        share: of all points, every so-and-so-many-th; 1: all.
    Returns:
        the points that were tried.
    """
    log = work / "log"

    def fresh(name: str) -> Path:
        root = work / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if base is not None:
            shutil.copytree(base, root / NAME)
        return root

    def counting(root: Path) -> None:
        killer = Killer(root)
        with killer.watching():
            train(root)
        (work / "points.json").write_text(json.dumps(killer.seen))

    root = fresh("whole")
    assert forked(lambda: counting(root), log) == 0, log.read_text()
    points = [(what, name, count) for what, name, count in json.loads((work / "points.json").read_text())]
    expected = final(root)
    # The first and the last time that something is done to a file of a kind; what is between is of the same kind.
    last = {point[:2]: point for point in points}
    chosen = [point for point in dict.fromkeys(points) if point[2] == 1 or last[point[:2]] == point]
    always = [
        p for p in chosen if p[:2] in (("opened", f"{NAME}/recipe.yaml"), ("before replace", f"{NAME}/cluster.yaml"))
    ]
    tried = list(dict.fromkeys([*always, *chosen[::share]]))
    died = 0
    for point in tried:
        root = fresh("killed")

        def victim(root: Path = root, point: Point = point) -> None:
            with Killer(root, point).watching():
                train(root)

        code = forked(victim, log)
        assert code in (0, -signal.SIGKILL), (point, code, log.read_text())  # beats of a thread come by less often
        died += code != 0
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)
        code = forked(partial(command, "runs", "list", "--json", "--root", str(root)), log)
        listed = log.read_text()
        assert code == 0 and "unreadable" not in listed and "Traceback" not in listed, (point, listed)
        if (copy / NAME / "lock").exists():
            assert NAME in listed, (point, listed)
            code = forked(partial(command, "runs", "delete", NAME, "--yes", "--root", str(copy)), log)
            assert code == 0 and not (copy / NAME).exists(), (point, log.read_text())
        assert forked(partial(train, root), log) == 0, (point, log.read_text())
        assert final(root) == expected, (point, "another curve or other bits")
        left = [str(path) for path in (root / NAME).rglob("*") if ".partial" in path.name or ".tmp-" in path.name]
        assert not left, (point, left)
    return {"tried": len(tried), "died": died, "points": len(points), "kinds": sorted({point[0] for point in tried})}


def all_kills(work: str, restart: bool, every: bool, out: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["NEXUS_RUNS_ROOT"] = os.environ["NEXUS_DATA_ROOT"] = ""
    for variable in ("NEXUS_RUNS_ROOT", "NEXUS_DATA_ROOT"):
        del os.environ[variable]
    folder = Path(work)
    # In a fork, too: a build of torch for CUDA refuses backward in forks of a process that has run it.
    assert forked(partial(train, folder / "warm"), folder.with_suffix(".log")) == 0, folder.with_suffix(
        ".log"
    ).read_text()
    base = None
    if restart:
        base = folder / "warm" / NAME
        shutil.rmtree(base / "checkpoints" / "step_00000003")
    done = kills(folder, base, 1 if every else 16)
    Path(out).write_text(json.dumps(done))


@pytest.mark.parametrize("restart", [False, True], ids=["start", "restart"])
def test_a_kill_at_any_write_leaves_a_run_that_goes_on_to_the_same_bits(restart: bool, tmp_path: Path) -> None:
    every = "NEXUS_KILLS" in os.environ
    out, log = tmp_path / "out.json", tmp_path / "driver.log"
    process = started(all_kills, str(tmp_path / "work"), restart, every, str(out), log=log)
    process.join(3000 if every else 300)
    code = process.exitcode
    process.kill()
    process.join()
    assert code == 0, log.read_text()[-6000:]
    done = json.loads(out.read_text())
    print(done)
    assert done["tried"] >= 6 and done["died"] >= 0.8 * done["tried"], done
