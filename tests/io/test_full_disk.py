"""A disk that is really full: filled while a run trains and freed again, and filled for good."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_scale.contracts import RunFolder
from nexus_scale.engine.checkpoint import newest
from nexus_scale.run.runs import check_disk, room_needed
from tests.checkpoint_bits import hashes
from tests.distributed import nexus, nexus_started, until

NAME = "mmdit_tiny_openmoji_tiny"
STEPS = 60
RUN = [
    "train", "mmdit/tiny_openmoji", "--tiny", f"steps={STEPS}", "callbacks.metrics={every: 1}", "callbacks.validate={every: 20}",
]  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this process may mount no tmpfs: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Takes every byte that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return filler


def rows(disk: Path) -> list[int]:
    path = disk / "runs" / NAME / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_bytes().splitlines() if line.endswith(b"}")]
        if path.exists()
        else []
    )


def bits(root: Path) -> dict[str, str]:
    checkpoint = newest(root / "runs" / NAME / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STEPS
    return hashes(checkpoint)


def full_run(disk: Path, log: Path, *settings: str, frees: bool) -> tuple[int | None, str]:
    """Exit code and output of a run whose disk is full from its tenth step on, for two seconds or for good."""
    environment = {**os.environ, "NEXUS_RUNS_ROOT": str(disk / "runs"), "NEXUS_DATA_ROOT": str(log.parent / "data")}
    with nexus_started(log.parent, *RUN, *settings, log=log, environment=environment) as process:
        until(lambda: len(rows(disk)) >= 10 or not process.is_alive(), 120)
        assert process.is_alive(), log.read_text()
        filler = fill(disk)
        if frees:
            until(
                lambda: (
                    "rows are kept in memory until they can be written" in log.read_text() or not process.is_alive()
                ),
                60,
            )
            process.join(2.0)
            assert process.is_alive(), log.read_text()
            filler.unlink()
        process.join(240)
        return process.exitcode, log.read_text()


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_saves(disk: Path, tmp_path: Path) -> None:
    settings = ["cluster.workers=0", "callbacks.checkpoint={every: 15, failures: 100}"]
    code, said = full_run(disk, tmp_path / "log", *settings, frees=True)
    assert code == 0 and "Traceback" not in said, said
    assert rows(disk) == list(range(1, STEPS + 1)), "rows that waited are all there, once"
    assert "the rows kept in memory are now written" in said


def test_a_disk_that_stays_full_ends_the_run_with_one_message_and_it_goes_on_later(disk: Path, tmp_path: Path) -> None:
    settings = ["cluster.workers=0", "callbacks.checkpoint={every: 15}"]
    code, said = full_run(disk, tmp_path / "log", *settings, frees=False)
    assert code == 6 and "Traceback" not in said, said
    assert said.count("\nerror: ") == 1 and "the disk is full" in said.strip().splitlines()[-1], said
    places = {"NEXUS_RUNS_ROOT": str(disk / "runs"), "NEXUS_DATA_ROOT": str(tmp_path / "data")}
    code, said = nexus(tmp_path, "train", str(disk / "runs" / NAME), **places)
    assert code == 6 and "Traceback" not in said, "a start on a full disk is refused, too"
    code, said = nexus(tmp_path, "runs", "list", "--root", str(disk / "runs"))
    assert code == 0 and NAME in said, said
    (disk / "filler").unlink()
    code, said = nexus(tmp_path, *RUN, *settings, **places)
    assert code == 0, said
    code, said = nexus(tmp_path, *RUN, *settings, NEXUS_RUNS_ROOT=str(tmp_path / "runs"))
    assert code == 0 and bits(disk) == bits(tmp_path), said
    assert rows(disk) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.ray
def test_a_disk_that_stays_full_under_ray_ends_the_run_with_one_message(disk: Path, tmp_path: Path) -> None:
    settings = ["cluster.workers=1", "callbacks.checkpoint={every: 15}"]
    code, said = full_run(disk, tmp_path / "log", *settings, frees=False)
    assert code == 6 and "Traceback" not in said, said
    assert said.count("error: ") == 1 and "the disk is full" in said, said


def test_a_runs_own_checkpoints_are_room_that_it_has(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    assert room_needed(run, 1000) == 3000
    for step in (1, 2):
        part = run.checkpoints / f"step_{step:08d}" / "rank00000-of-00001.safetensors"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"\0" * 1000)
    assert room_needed(run, 1000) == 1000
    (part.parent / "MANIFEST.json").write_bytes(b"\0" * 500)
    assert room_needed(run, 1000) == 1000, "the next checkpoint is always new"
    assert room_needed(run, 2000) == 3500
    check_disk(run, 1000)


def test_a_run_that_fits_its_disk_goes_on_after_a_kill(disk: Path, tmp_path: Path) -> None:
    """Two checkpoints stand; three times their size is not free any more, one is."""
    places = {"NEXUS_RUNS_ROOT": str(disk / "runs"), "NEXUS_DATA_ROOT": str(tmp_path / "data")}
    settings = [*RUN, "cluster.workers=0", "callbacks.checkpoint={every: 10}"]
    code, said = nexus(tmp_path, *settings, "steps=20", **places)
    assert code == 0, said
    size = sum(path.stat().st_size for path in (disk / "runs" / NAME / "checkpoints").glob("step_00000020/*"))
    filler, free = fill(disk), int(1.5 * size) + (1 << 20)
    os.truncate(filler, filler.stat().st_size - free)
    code, said = nexus(tmp_path, *settings, "steps=30", **places)
    assert code == 0, said
    assert rows(disk) == list(range(1, 31))


def test_a_limit_of_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    """`ulimit -f`: EFBIG, as a quota gives EDQUOT."""
    with nexus_started(tmp_path, *RUN, "cluster.workers=0", "steps=3", log=tmp_path / "log", environment={
        **os.environ, "NEXUS_RUNS_ROOT": str(tmp_path / "runs"), "NEXUS_DATA_ROOT": str(tmp_path / "data"),
    }) as process:  # fmt: skip
        resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (100_000, 100_000))
        process.join(120)
        said = (tmp_path / "log").read_text()
        assert process.exitcode == 6 and "Traceback" not in said and said.count("error: ") == 1, said
