"""W&B is a copy of the record and never in the way: slow, broken, hanging or gone, the run goes on; and it learns no secret."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nexus_scale.callbacks.metrics import WandbThread, check_wandb, safe_record
from nexus_scale.contracts import UserError


class FakeWandb(SimpleNamespace):
    """The four names of W&B that are called."""

    def __init__(self, init: Any = None, log: Any = None, finish: Any = None):
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.given: dict[str, Any] = {}
        self.finished = False

        def start(**arguments: Any) -> Any:
            self.given = arguments
            if init is not None:
                init()
            return SimpleNamespace(
                log=log or (lambda row, step: self.logged.append((step, row))), finish=finish or self.end
            )

        super().__init__(init=start, Settings=lambda **settings: settings)

    def end(self) -> None:
        self.finished = True


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def put(**behaviour: Any) -> FakeWandb:
        fake = FakeWandb(**behaviour)
        monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
        return fake

    return put


def log_many(thread: WandbThread, rows: int) -> float:
    """Seconds that the caller spent in `rows` calls."""
    begin = time.perf_counter()
    for step in range(1, rows + 1):
        thread.log({"step": step, "loss": 1.0 / step})
    return time.perf_counter() - begin


def test_rows_arrive_in_order_and_argv_stays_here(install: Any, tmp_path: Path) -> None:
    fake = install()
    thread = WandbThread({"mode": "offline", "project": "p"}, tmp_path, {"steps": 5})
    log_many(thread, 50)
    thread.close()
    assert [step for step, _ in fake.logged] == list(range(1, 51))
    assert fake.logged[0][1] == {"loss": 1.0}
    assert fake.finished
    assert fake.given["settings"]["x_disable_meta"] is True
    assert fake.given["settings"]["save_code"] is False
    assert fake.given["config"] == {"steps": 5}


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_an_error_anywhere_is_one_warning(
    install: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    install(**{where: broken})
    thread = WandbThread({"mode": "offline"}, tmp_path, {})
    log_many(thread, 100)
    if where != "finish":
        thread._thread.join(10)
        log_many(thread, 100)
    thread.close()
    assert len(caplog.records) == 1
    assert "no space left on device" in caplog.text
    assert "metrics.jsonl" in caplog.text


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_hang_anywhere_costs_the_training_thread_nothing(
    install: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    release = threading.Event()
    install(**{where: lambda *_, **__: release.wait(60)})
    thread = WandbThread({"mode": "online", "deadline_s": 0.2}, tmp_path, {}, rows=20)
    spent = log_many(thread, 200)
    time.sleep(0.3)
    spent += log_many(thread, 10)
    begin = time.perf_counter()
    thread.close(wait_s=0.3)
    closing = time.perf_counter() - begin
    release.set()
    # Against the 60 s of the hang, and the 0.2 s of its deadline for each of 200 rows; a busy machine takes its time too.
    assert spent < 20
    assert closing < 20
    assert len(caplog.records) == 1
    assert "switched off" in caplog.text


def test_the_default_is_off_and_then_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert check_wandb(False) is None
    assert check_wandb(True) == {"mode": "offline"}
    monkeypatch.setenv("WANDB_MODE", "online")
    assert check_wandb({"project": "p"}) == {"project": "p", "mode": "online"}


@pytest.mark.parametrize("name", ["api_key", "key", "token", "password"])
def test_a_key_in_the_recipe_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="wandb login"):
        check_wandb({name: "x"})


@pytest.mark.parametrize("wrong", [{"projekt": "p"}, {"mode": "sometimes"}])
def test_unknown_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"valid|expected"):
        check_wandb(wrong)


def test_records_lose_secrets_and_keep_the_rest() -> None:
    record = {
        "data": "https://user:" + "hunter2@host:8080/path?x=1",
        "nested": [{"hf_token": "abc", "text_tokens": 16, "keep": "all"}],
        "tokens_per_sample": 32.0,
        "api_key": "abc",
    }
    assert safe_record(record) == {
        "data": "https://host:8080/path?x=1",
        "nested": [{"hf_token": "(left out)", "text_tokens": 16, "keep": "all"}],
        "tokens_per_sample": 32.0,
        "api_key": "(left out)",
    }


REAL = """
import sys
from pathlib import Path
from nexus_scale.callbacks.metrics import WandbThread, check_wandb
thread = WandbThread(check_wandb({"project": "p", "deadline_s": %(deadline)s, "mode": "%(mode)s"}), Path(sys.argv[1]), {"steps": 5})
for step in range(1, 6):
    thread.log({"step": step, "loss": 0.5})
thread.close(wait_s=%(wait)s)
print("closed", flush=True)
"""


@pytest.mark.slow
def test_the_real_one_stores_no_canary_from_argv_or_environment(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_API_KEY": "c" * 40, "HOME": str(tmp_path / "home")}
    script = REAL % {"deadline": 120, "mode": "offline", "wait": 120}
    command = [sys.executable, "-c", script, str(tmp_path / "run"), "--password=CANARY-8f1d"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip().endswith("closed"), done.stderr
    stored = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in stored), stored
    for path in [*stored, *(p for p in (tmp_path / "home").rglob("*") if p.is_file())]:
        content = path.read_bytes()
        assert b"CANARY-8f1d" not in content, path
        assert b"c" * 40 not in content, path


@pytest.mark.slow
def test_the_real_one_without_a_server_holds_up_neither_run_nor_exit(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {
        **os.environ, "WANDB_API_KEY": "c" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path / "home"),
    }  # fmt: skip
    script = REAL % {"deadline": 2, "mode": "online", "wait": 2}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "closed" in done.stdout
    assert "W&B is switched off" in done.stderr
