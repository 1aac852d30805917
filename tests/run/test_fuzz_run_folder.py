"""Every file of a run folder torn, mutated, replaced: the commands list, report, resume, draw and delete, or say what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import fuzz, nexus

NAME = "one"
TRAIN = [
    "train", "mmdit/tiny_openmoji", "--tiny", f"run={NAME}", "cluster.workers=0", "callbacks.checkpoint={every: 1}",
    "callbacks.validate={every: 1, samples: 4}", "callbacks.metrics={every: 1}",
]  # fmt: skip

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 10**30, -(10**12), 0.5, 1e300, float("nan"), float("inf"), "", "a", "0", "..", "../x",
    "a/b", "/etc/passwd", "a\0b", "\ud800", "x" * 300, "\x1b[31m", [], [1], [[]], {}, {"a": 1}, ["a"], [None], {"step": -1}, "float32",
)  # fmt: skip

DEEP = "[" * 100_000


def whole(folder: Path) -> Path:
    """A finished run with all files that a run can have, made once for the cases of a process."""
    base = folder.parent / f"base-{os.getpid()}"
    if base.is_dir():
        return base / "runs" / NAME
    kept = dict(os.environ)
    os.environ["NEXUS_RUNS_ROOT"], os.environ["NEXUS_DATA_ROOT"] = str(base / "runs"), str(base / "data")
    assert nexus(*TRAIN, "steps=2") == 0
    os.environ.update(kept)
    run = base / "runs" / NAME
    picture = (Path(__file__).parents[2] / "nexus_scale" / "bench" / "results" / "quickstart.png").read_bytes()
    more: dict[str, Any] = {
        "heartbeats/rank0.json": {"rank": 0, "pid": 1, "life": "a", "beat": 3, "step": 2, "draws": 2, "stage": "data", "at": 1.7e9},
        "leave.json": {"reason": "SIGTERM", "restart": False, "at": 1.7e9},
        "passed_over.json": [{"step": 1, "first": 50, "last": 60, "reason": "a spike"}],
        "scores.json": {
            "group_accuracy": 0.5, "groups": {"a": 0.5, "b": 1.0}, "confusion": {"labels": ["a", "b"], "matrix": [[1, 2], [3, 4]]},
            "samples": 4, "guidance": None,
        },
        "samples/step_00000002.json": {"step": 2, "captions": ["a", "b"], "columns": 2, "width": 32, "height": 32, "pad": 2},
        "attempts/20260101-000000-aaaaaa/attempt.json": {"attempt": "a", "begin": 1.7e9, "workers": 1, "first_step": 0},
        "attempts/20260101-000000-aaaaaa/final.json": {"kind": "preempted", "step": 2, "attempt": "a"},
    }  # fmt: skip
    for name, value in more.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(value))
    (run / "samples" / "step_00000002.png").write_bytes(picture[:20_000])
    (run / "attempts" / "20260101-000000-aaaaaa" / "rank_0.log").write_text("a line\n" * 30)
    lines = {
        "incidents.jsonl": {"at": 1.7e9, "kind": "preempted", "message": "asked", "step": 2, "rank": 0},
        "changes.jsonl": {
            "at": 1.7e9,
            "step": 1,
            "changed": ["optimizer.lr: 1 -> 2"],
            "before": "f" * 32,
            "recipe": {"seed": 1},
        },
    }
    for name, row in lines.items():
        (run / name).write_text(2 * (json.dumps(row) + "\n"))
    return run


# ------------------------------------------------------------------------------------------------- mutators


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:4]):
            found += leaves(inner, (*path, i))
    return found


def with_odd(rng: random.Random, value: Any) -> Any:
    """One value somewhere replaced, removed, or joined by another."""
    path = rng.choice(leaves(value))
    if not path:
        return rng.choice(ODD)
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    kind = rng.random()
    if kind < 0.7:
        place[path[-1]] = rng.choice(ODD)
    elif kind < 0.85:
        del place[path[-1]]
    elif isinstance(place, dict):
        place[rng.choice(["", "a\0", "unknown", "\ud800", "step"])] = rng.choice(ODD)
    return copy


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutated(rng: random.Random, data: bytes, name: str) -> bytes:
    """Bytes of a file after something happened to it."""
    if name.endswith((".json", ".jsonl", "ATTEMPT")) and rng.random() < 0.5:
        try:
            rows = [json.loads(line) for line in (data.splitlines() if name.endswith(".jsonl") else [data])]
            rows[rng.randrange(len(rows))] = with_odd(rng, rng.choice(rows))
            return b"\n".join(encoded(row) for row in rows) + rng.choice([b"\n", b""])
        except (ValueError, IndexError, RecursionError):
            return b""  # damaged before
    kinds: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: data[: rng.randrange(len(data) + 1)],
        lambda: b"\0" * rng.choice([1, 8, len(data)]),
        lambda: rng.randbytes(rng.choice([1, 30, 3000])),
        lambda: data + data,
        lambda: b"\xff\xfe" + data.decode("utf-8", "replace").encode("utf-16-le"),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: rng.choice(
            [b"[]", b"{}", b"null", b"3", b'"a"', b"true", b"NaN", b"[null]", b"{", b"[", b"-", b"\n\n"]
        ),
        lambda: DEEP.encode(),
        lambda: DEEP.replace("[", '{"a":').encode(),
        lambda: b"9" * 10_000,
        lambda: b"\xed\xa0\x80",
        lambda: _flipped(rng, data),
    ]
    return rng.choice(kinds)()


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"a")
    for _ in range(rng.choice([1, 1, 3, 20])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def replaced(rng: random.Random, path: Path) -> None:
    """Something else in the file's place."""
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(rng.choice(["nowhere", path.name, "/dev/null", ".", "/etc/passwd"]))
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3 and path.parent.name != NAME:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"a file")


def prepare(rng: random.Random, folder: Path) -> Sequence[Any]:
    run = folder / "runs" / NAME
    shutil.copytree(whole(folder), run)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        files = sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())
        # Parts of checkpoints have tests of their own (test_checkpoint_mutations).
        files = [path for path in files if path.suffix != ".safetensors" or rng.random() < 0.2]
        path = rng.choice(files)
        if rng.random() < 0.85:
            path.write_bytes(mutated(rng, path.read_bytes(), path.name))
        else:
            replaced(rng, path)
    return [rng.choices(COMMANDS, WEIGHTS)[0]]


COMMANDS: list[list[str]] = [
    ["runs", "list"],
    ["runs", "--json"],
    ["runs", "follow", NAME],
    ["runs", "stop", NAME],
    ["runs", "delete", NAME, "--yes"],
    ["report", NAME],
    ["train", f"runs/{NAME}", "steps=3"],
    [*TRAIN, "steps=3"],
    [*TRAIN, "steps=3", "optimizer.lr=0.1", "--allow-change", "optimizer.lr"],
    ["export", NAME],
    ["sample", NAME, "--prompt", "a"],
    ["score", NAME],
]
WEIGHTS = [4, 3, 2, 1, 2, 6, 3, 3, 1, 2, 1, 1]


def act(arguments: list[str]) -> int:
    code = nexus(*arguments)
    if arguments[:2] in (["runs", "list"], ["runs", "--json"]) and code:
        raise AssertionError("one damaged run hides the others")
    if arguments[:2] == ["runs", "delete"] and code == 0:
        assert not Path("runs", NAME).exists()
    return code


def test_damaged_run_folders_are_read_or_named(tmp_path: Path) -> None:
    fuzz("run folder", prepare, tmp_path, act)
