"""Rows of curves while they are written: half lines, growing lines, files that are cut or replaced, and a million of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nexus_scale.io.rows import RowFile
from nexus_scale.report.history import MOST_ROWS, History


def line(step: int, **more: float) -> bytes:
    return (
        json.dumps({"step": step, "seconds": step / 10, "loss": 100.0 / step, "time/forward": 0.5, **more}).encode()
        + b"\n"
    )


def test_rows_appear_as_they_are_written_and_half_a_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    assert history.read().rows == []
    path.write_bytes(line(1) + line(2)[:10])
    assert [row["step"] for row in history.read().rows] == [1]
    with path.open("ab") as file:
        file.write(line(2)[10:] + b"not json\n" + b'{"step": -1}\n' + line(3))
    version = history.version
    assert [row["step"] for row in history.read().rows] == [1, 2, 3] and history.version != version
    version = history.version
    assert history.read().version == version, "nothing was written, and nothing is read"
    assert history.newest == {"step": 3, "seconds": 0.3, "loss": 100 / 3, "time/forward": 0.5}
    assert history.sums("time/") == {"forward": 1.5}


def test_the_newest_row_may_grow_and_a_run_may_go_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows, history = RowFile(path, 0), History(path)
    for step in (1, 2):
        rows.append({"step": step, "loss": 1.0})
        assert history.read().newest == {"step": step, "loss": 1.0}
    rows.extend({"validation/loss": 2.0})
    assert history.read().rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0, "validation/loss": 2.0}]
    rows.append({"step": 3, "loss": float("nan")})
    assert history.read().newest == {"step": 3}
    rows.close()
    rows = RowFile(path, 1)  # resumed: later rows are gone
    assert history.read().rows == [{"step": 1, "loss": 1.0}]
    rows.append({"step": 2, "loss": 5.0})
    assert [row["loss"] for row in history.read().rows] == [1.0, 5.0]
    rows.close()
    path.write_bytes(line(7) * 1)  # in place, and shorter
    assert [row["step"] for row in history.read().rows] == [7]
    path.unlink()
    assert history.read().rows == []
    path.mkdir()
    assert history.read().rows == []


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "little by little"])
def test_many_rows_are_merged_by_their_means_and_sums_stay_exact(tmp_path: Path, at_once: bool) -> None:
    path, history, count = tmp_path / "metrics.jsonl", History(tmp_path / "metrics.jsonl"), 3 * MOST_ROWS
    lines = [line(step, swing=float(step % 2)) for step in range(1, count + 1)]
    for part in [lines] if at_once else [lines[i : i + 500] for i in range(0, count, 500)]:
        with path.open("ab") as file:
            file.write(b"".join(part))
        history.read()
    assert len(history.rows) <= MOST_ROWS + 1 and history.rows[-1]["step"] == count
    assert all(abs(row["swing"] - 0.5) < 0.01 for row in history.rows[:-2]), "a swing of the curve was kept by chance"
    assert history.sums("time/") == {"forward": pytest.approx(0.5 * count)}
    steps = [row["step"] for row in history.rows]
    assert steps == sorted(steps)


def test_a_long_file_is_opened_by_its_stretches_and_followed_from_there(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 60_000
    path.write_bytes(b"".join(line(step) for step in range(1, count + 1)))
    begun = time.process_time()
    history = History(path, longest=256 << 10).read()
    assert time.process_time() - begun < 1.0
    assert history.sampled and history.newest["step"] == count
    assert 1000 < len(history.rows) <= MOST_ROWS + 1
    assert history.rows[0]["step"] < 100, "the beginning of the curve is there"
    assert history.sums("time/")["forward"] == pytest.approx(0.5 * count, rel=0.1)
    for row in history.rows:
        assert row["seconds"] == pytest.approx(row["step"] / 10)
    with path.open("ab") as file:
        file.write(line(count + 1))
    assert history.read().newest["step"] == count + 1
