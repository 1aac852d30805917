"""Faults on demand, incidents and requests to leave: the small things that the large tests stand on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_scale.contracts import UserError
from nexus_scale.io import durable, faults, incidents, leaving


def test_a_fault_strikes_where_everything_holds_and_only_once(tmp_path: Path) -> None:
    (fault,) = faults.parse(f"rank:1, step:7, phase:save_mid, action:raise, once:{tmp_path / 'struck'}")
    struck = faults.Faults([fault])
    struck.arm(1, lambda: 7)
    struck.at("save_begin")
    struck.at("save_mid", step=8)
    with pytest.raises(RuntimeError, match="NEXUS_FAULT"):
        struck.at("save_mid")
    struck.at("save_mid")
    other = faults.Faults(faults.parse("rank:1,step:7,phase:save_mid,action:raise"))
    other.arm(0, lambda: 7)
    other.at("save_mid")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rnak:1,phase:step,action:SIGKILL", "rnak"),
        ("rank:one,phase:step,action:SIGKILL", "expected a number"),
        ("phase:step,action:explode", "explode"),
        ("action:SIGKILL", "either a phase or after_s"),
    ],
)
def test_a_fault_that_is_none_is_named(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        faults.parse(text)


def test_a_process_dies_of_its_environment() -> None:
    code = "from nexus_scale.io import faults; faults.arm(0, lambda: 3); faults.at('forward'); faults.at('step'); print('on')"
    environment = {**os.environ, "NEXUS_FAULT": "step:3,phase:step,action:SIGKILL"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    environment["NEXUS_FAULT"] = "step:4,phase:step,action:SIGKILL"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "on\n"


def test_incidents_are_kept_in_order_and_a_torn_line_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_ATTEMPT", "a1")
    incidents.note(tmp_path, "stalled", "rank 1 stands", rank=1, step=4)
    incidents.note(tmp_path, "restarted", "again")
    with (tmp_path / incidents.FILE).open("ab") as file:
        file.write(b'{"at": 1, "kind": "stal')
    rows = incidents.read(tmp_path)
    assert [row["kind"] for row in rows] == ["stalled", "restarted"]
    assert rows[0]["rank"] == 1
    assert rows[0]["attempt"] == "a1"
    with pytest.raises(AssertionError, match="sneezed"):
        incidents.note(tmp_path, "sneezed", "no such kind")


def test_an_incident_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / incidents.FILE).mkdir()
    incidents.note(tmp_path, "stalled", "rank 1 stands")
    assert "rank 1 stands" in caplog.text


def test_a_request_to_leave_stands_until_it_is_withdrawn(tmp_path: Path) -> None:
    assert leaving.asked(tmp_path) is None
    leaving.ask(tmp_path, "the machine goes", restart=True)
    request = leaving.asked(tmp_path)
    assert request is not None
    assert (request.reason, request.restart) == ("the machine goes", True)
    leaving.withdraw(tmp_path)
    leaving.withdraw(tmp_path)
    assert leaving.asked(tmp_path) is None


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    durable.atomic_write(path, json.dumps([1]))
    durable.atomic_write(path, b"[2]", synced=False)
    assert json.loads(path.read_text()) == [2]
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    path.parent.joinpath("other").mkdir()
    with pytest.raises(OSError, match="directory"):
        durable.atomic_write(path.parent / "other", "x")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file.json", "other"]
