"""Stages besides training: how far they are, who believes it, and what is kept of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nexus_scale.io.stages import DOING, doing, note_stage, read_stages, stage, words_of


def test_a_stage_says_how_far_it_is_and_leaves_its_seconds(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with stage(tmp_path, "ingest", lambda done, total: told.append((done, total))) as progress:
        found = doing(tmp_path)
        assert found is not None and (found.name, found.share, found.pid) == ("ingest", None, os.getpid())
        assert words_of(found).startswith("ingest: for ")
        progress(1, 4)
        with stage(tmp_path, "inner", noted=False) as inner:
            inner(2, 2)
            assert doing(tmp_path).name == "inner"  # type: ignore[union-attr]
            time.sleep(1.2)  # the outer stage keeps quiet meanwhile
            assert words_of(doing(tmp_path)) == "inner: 2 of 2, 100 %, about 0 s left"  # type: ignore[arg-type]
        time.sleep(1.2)
        assert "ingest: 1 of 4, 25 %, about " in words_of(doing(tmp_path))  # type: ignore[arg-type]
    assert told == [(1, 4)] and doing(tmp_path) is None and not (tmp_path / DOING).exists()
    note_stage(tmp_path, "ingest", 100.0)
    assert [one.name for one in read_stages(tmp_path)] == ["ingest"] and read_stages(tmp_path)[0].seconds > 100.0
    with pytest.raises(ValueError, match="broken"), stage(tmp_path, "broken"):
        raise ValueError("broken")
    assert not (tmp_path / DOING).exists() and len(read_stages(tmp_path)) == 1, (
        "a stage that failed took no time of the run's"
    )


def test_nobody_believes_a_stage_whose_process_is_gone(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    said = {"name": "ingest", "begun": time.time(), "at": time.time(), "host": socket.gethostname(), "pid": ended.pid}
    (tmp_path / DOING).write_text(json.dumps(said))
    assert doing(tmp_path) is None
    (tmp_path / DOING).write_text(json.dumps({**said, "host": "elsewhere"}))
    assert doing(tmp_path) is not None
    (tmp_path / DOING).write_text(json.dumps({**said, "host": "elsewhere", "at": time.time() - 1000}))
    assert doing(tmp_path) is None
    (tmp_path / DOING).write_text("{")
    assert doing(tmp_path) is None
