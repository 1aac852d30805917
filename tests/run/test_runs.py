"""Run folders: who holds one, what state it is in, how it is followed, stopped, deleted, and changed on the way."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nexus_scale.cli import app
from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine.checkpoint.objects import ObjectStore
from nexus_scale.generate.trained import make_draw
from nexus_scale.io import incidents, leaving
from nexus_scale.io.stages import stage
from nexus_scale.orchestration.supervise import Limits, Supervisor
from nexus_scale.run import files as run_files
from nexus_scale.run import runs
from nexus_scale.run.resume import other_curve
from nexus_scale.train import Place, train
from tests.distributed import script, until


def tiny(**changes: Any) -> recipes.Recipe:
    callbacks = {"checkpoint": {"every": 1, "keep": 10}, "validate": None, "samples": None, "metrics": {"every": 1}}
    return recipes.load_recipe("mmdit/tiny_openmoji", recipes.merge({"callbacks": callbacks}, changes), tiny=True)


IN_PROCESS = recipes.cluster_from({"workers": 0}, "test")


def prepared(root: Path, name: str = "one", **changes: Any) -> RunFolder:
    run = RunFolder(root / name)
    runs.prepare_run(run, tiny(**changes), IN_PROCESS)
    return run


def beat(run: RunFolder, step: int, at: float) -> None:
    folder = run.path / "heartbeats"
    folder.mkdir(exist_ok=True)
    (folder / "rank0.json").write_text(json.dumps({"rank": 0, "step": step, "pid": 1, "at": at}))


def saved(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step_{step:08d}").mkdir(parents=True)


HOLD = """
import sys, time
from pathlib import Path
from nexus_scale.io import incidents, leaving
from nexus_scale.contracts import RunFolder
from nexus_scale.run.runs import locked
run = RunFolder(Path(sys.argv[1]))
with locked(run):
    print("held", flush=True)
    while sys.argv[2] == "deaf" or leaving.asked(run.path) is None:
        time.sleep(0.05)
    log = run.path / "attempts" / "1" / "rank_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("the last words\\n")
    incidents.note(run.path, "straggler", "rank 1 is slow")
"""


@contextmanager
def held(run: RunFolder, kind: str = "listens") -> Iterator[BaseProcess]:
    """Another process that holds the run, and leaves when it is asked to unless it is deaf."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        holder = script(HOLD, str(run.path), kind, log=log)
        try:
            until(lambda: log.exists() and log.read_text() == "held\n")
            yield holder
        finally:
            holder.kill()
            holder.join()


# ------------------------------------------------------------------------------------------------- states


def test_states_follow_from_what_lies_in_the_folder(tmp_path: Path) -> None:
    def state(run: RunFolder) -> str:
        summary = runs.summary_of(run)
        assert summary.state in runs.STATES
        return summary.state

    run = prepared(tmp_path)
    assert state(run) == "new"
    beat(run, 1, time.time() - 1000)
    saved(run, 1)
    assert state(run) == "failed"
    incidents.note(run.path, "preempted", "asked to leave")
    assert state(run) == "left"
    incidents.note(run.path, "restarted", "again")
    assert state(run) == "failed"
    leaving.ask(run.path, "test")
    assert state(run) == "left"
    with held(run, "deaf"):
        assert state(run) == "starting", "the heartbeat is of an earlier start"
        beat(run, 2, time.time())
        assert state(run) == "running"
        assert runs.summary_of(run).step == 2
        beat(run, 2, time.time() + 0.001)
        lock = json.loads((run.path / runs.LOCK).read_text())
        (run.path / runs.LOCK).write_text(json.dumps({**lock, "at": time.time() - 900}))
        beat(run, 2, time.time() - 800)
        assert state(run) == "stalled"
    saved(run, 3)
    assert state(run) == "done"


def test_a_killed_driver_no_longer_holds(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    with held(run) as holder:
        owner = runs.owner_of(run)
        assert owner is not None and owner["pid"] == holder.pid
        with pytest.raises(UserError, match=f'"pid": {holder.pid}'), runs.locked(run):
            pass
        holder.kill()
        holder.join(30)
        assert runs.owner_of(run) is None
        with runs.locked(run):
            assert runs.owner_of(run) is not None


def test_looking_does_not_keep_a_driver_from_starting(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    with (run.path / runs.LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `nexus runs` does, only longer
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with runs.locked(run):
            pass


# ------------------------------------------------------------------------------------------------- the command


def nexus(*arguments: str, input: str | None = None) -> Any:
    return CliRunner().invoke(app, ["runs", *arguments], input=input, catch_exceptions=False)


def test_list_shows_all_runs_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    first, broken = prepared(tmp_path, "first"), prepared(tmp_path, "broken")
    saved(first, 2)
    first.metrics.write_text(json.dumps({"step": 2, "loss": 0.25}) + "\n" + '{"step": 3, "lo')
    incidents.note(first.path, "save_failed", "no room [left]")
    broken.recipe.write_text("steps: [")
    (broken.path / run_files.STARTED).unlink()
    (tmp_path / "not_a_run").mkdir()
    shown = nexus("list", "--root", str(tmp_path)).output
    assert "first" in shown and "2/3" in shown and "0.2500" in shown and "save_failed: no room [left]" in shown
    found = {row["name"]: row for row in json.loads(nexus("--root", str(tmp_path), "--json").stdout)}
    assert set(found) == {"first", "broken"}
    assert (found["first"]["state"], found["broken"]["state"]) == ("failed", "unreadable")
    assert found["first"]["loss"] == 0.25 and found["first"]["incident"]["kind"] == "save_failed"
    assert "no runs in" in nexus("--root", str(tmp_path / "empty")).output


def test_stop_asks_and_waits_until_the_run_has_left(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    with held(run) as holder:
        result = nexus("stop", "one", "--root", str(tmp_path))
        assert result.exit_code == 0 and "one: left after step 0 of 3" in result.output
        holder.join(30)
        assert holder.exitcode == 0
    result = nexus("stop", "one", "--root", str(tmp_path))
    assert result.exit_code == 5


def test_stop_says_when_a_run_does_not_leave(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    with held(run, "deaf") as holder:
        with pytest.raises(UserError, match=rf"the request remains.*{holder.pid}"):
            runs.stop(run, deadline_s=0.5)
        assert leaving.asked(run.path) is not None


def test_follow_prints_to_the_last_word_and_ends_with_the_run(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    incidents.note(run.path, "restarted", "known before")
    with held(run):
        threading.Timer(0.5, leaving.ask, (run.path, "test")).start()
        notice, *told = runs.follow(run, poll_s=0.05)
    assert "no worker has written a log yet" in notice
    assert sorted(told) == ["incident: straggler: rank 1 is slow", "the last words"]
    log = run.path / "attempts" / "2" / "rank_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {i}\n" for i in range(50)) + "no end")
    assert list(runs.follow(run, lines=3)) == ["line 48", "line 49", "no end"]


def test_following_a_run_without_a_log_says_why_nothing_comes(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (line,) = runs.follow(RunFolder(tmp_path / "alone"))
    assert "cluster.workers=0" in line


def test_delete_asks_refuses_what_is_held_and_what_lies_elsewhere(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    run, other = prepared(root), prepared(elsewhere, "mine")
    (root / "link").symlink_to(other.path)
    for name in ("../elsewhere/mine", str(other.path), "link", "absent", ".", ".."):
        assert nexus("delete", name, "--yes", "--root", str(root)).exit_code == 5, name
    assert other.recipe.is_file()
    with held(run, "deaf"):
        assert nexus("delete", "one", "--yes", "--root", str(root)).exit_code == 5
    assert "nothing deleted" in nexus("delete", "one", "--root", str(root), input="n\n").output
    assert run.recipe.is_file()
    assert nexus("delete", "one", "--root", str(root), input="y\n").exit_code == 0
    assert sorted(path.name for path in root.iterdir()) == ["link"]


# ------------------------------------------------------------------------------------------------- allowed changes


def trained(root: Path, recipe: recipes.Recipe) -> None:
    run = RunFolder(root)
    runs.prepare_run(run, recipe, IN_PROCESS)
    train(recipe, IN_PROCESS, Place(run, root / "data", root.parent), make_draw)


def test_a_named_key_may_change_on_the_way_and_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, faster = RunFolder(tmp_path / "one"), tiny(optimizer={"lr": 0.5})
    trained(run.path, tiny())
    shutil.rmtree(run.checkpoints / "step_00000003")
    with pytest.raises(UserError, match=r"--allow-change(.|\n)*optimizer.lr: 0.002 -> 0.5"):
        runs.prepare_run(run, faster, IN_PROCESS)
    with pytest.raises(UserError, match=r"does not cover every difference(.|\n)*optimizer.lr") as caught:
        runs.change_run(run, faster, IN_PROCESS, ["optimizer.betas", "optimizer.l"])
    assert caught.value.code == 5
    assert runs.accepted_hashes(run) == set()
    assert runs.change_run(run, faster, IN_PROCESS, ["optimizer"]) == ["optimizer.lr: 0.002 -> 0.5"]
    assert "optimizer.lr: 0.002 -> 0.5" in caplog.text
    (note,) = [json.loads(line) for line in (run.path / runs.CHANGES).read_text().splitlines()]
    assert note["step"] == 2 and note["changed"] == ["optimizer.lr: 0.002 -> 0.5"]
    trained(run.path, faster)
    assert runs.newest_step(run) == 3


def test_a_checkpoint_of_a_recipe_that_nobody_allowed_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    trained(run.path, tiny())
    plain_yaml.write_yaml(run.recipe, recipes.dump(tiny(seed=7)))
    with pytest.raises(UserError, match="a different recipe"):
        trained(run.path, tiny(seed=7))


def test_a_version_that_knows_one_key_more_takes_the_checkpoints_of_one_that_did_not(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "one"), tiny()
    older = {"recipe_hash": "of an older version", "recipe": recipes.identity(recipe)}
    del older["recipe"]["data"]["text_tokens"]  # the default in this recipe's tiny form would be another
    plain = recipes.recipe_from(recipes.merge(recipes.dump(recipe), {"data": {"text_tokens": None}}), "test")
    assert other_curve(run, plain, older, "old") == []
    assert other_curve(run, recipe, older, "old") == [f"data.text_tokens: None -> {recipe.data.text_tokens}"]
    older["recipe"]["optimizer"]["amsgrad"] = True
    with pytest.raises(UserError, match=r"old: unknown key 'optimizer\.amsgrad'"):
        other_curve(run, plain, older, "old")


def test_an_allowed_change_covers_checkpoints_that_another_version_wrote(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    older = {"recipe_hash": "of an older version", "recipe": recipes.identity(tiny())}
    changed = tiny(optimizer={"lr": 0.5})
    assert other_curve(run, changed, older, "old") == ["optimizer.lr: 0.002 -> 0.5"]
    runs.change_run(run, changed, IN_PROCESS, ["optimizer.lr"])
    assert other_curve(run, changed, older, "old") == []


def test_what_was_chosen_is_kept_unless_its_change_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    trained(run.path, tiny())

    def asks(**keys: Any) -> recipes.Cluster:
        return recipes.cluster_from({"workers": 0, "precision": "auto", **keys}, "test")

    runs.check_run(run, tiny(), asks(kernels={"norm": "auto"}))
    for keys, words in (
        ({"precision": "bf16"}, "cluster.precision: 'float32' -> 'bf16'"),
        ({"micro_batch": 1}, "cluster.micro_batch: None -> 1"),
        ({"kernels": {"norm": "apex"}}, "cluster.kernels.norm: 'torch' -> 'apex'"),
    ):
        with pytest.raises(UserError, match=f"--allow-change(.|\n)*{words}") as caught:
            runs.prepare_run(run, tiny(), asks(**keys))
        assert caught.value.code == 5
    with pytest.raises(UserError, match="does not cover every difference"):
        runs.change_run(run, tiny(), asks(micro_batch=1, precision="bf16"), ["cluster.micro_batch"])
    assert runs.change_run(run, tiny(), asks(micro_batch=1), ["cluster"]) == ["cluster.micro_batch: None -> 1"]
    runs.prepare_run(run, tiny(), asks(micro_batch=1))
    frozen = runs.frozen_choices(run)
    assert frozen is not None and frozen["micro_batch"] == 1 and frozen["precision"] == "float32"
    assert frozen["kernels"]["attention"] == "sdpa"


def test_a_kernel_that_came_after_a_run_began_is_plain_torch_to_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    trained(run.path, tiny())
    environment = json.loads(run.environment.read_text())
    del environment["choices"]["kernels"]["linear"]
    run.environment.write_text(json.dumps(environment))
    trained(run.path, tiny())
    frozen = runs.frozen_choices(run)
    assert frozen is not None and frozen["kernels"]["linear"] == "torch"


def test_a_run_that_took_no_step_makes_room_for_the_corrected_one(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    run.environment.write_text(json.dumps({"choices": {"precision": "bf16", "micro_batch": 2, "kernels": {}}}))
    runs.prepare_run(run, tiny(optimizer={"lr": 0.5}), IN_PROCESS)
    assert runs.open_run(run.path)[1].optimizer.lr == 0.5 and runs.frozen_choices(run) is None
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"optimizer.lr: 0.5 -> 0.002"):
        runs.prepare_run(run, tiny(), IN_PROCESS)


def test_a_run_does_not_end_before_where_it_is(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    saved(run, 3)
    runs.check_run(run, tiny(steps=3), IN_PROCESS)
    with pytest.raises(UserError, match="steps=2: the run has already trained 3 steps"):
        runs.check_run(run, tiny(steps=2), IN_PROCESS)


def test_checkpoints_in_an_object_store_count_as_those_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    trained(run.path, tiny(callbacks={"checkpoint": {"to": f"file://{tmp_path}/far"}}))
    assert not list(run.checkpoints.glob("step_*"))
    supervisor = Supervisor(run.path, Limits(failures=1, preemptions=None, backoff_s=0))
    assert runs.newest_step(run) == 3 and runs.summary_of(run).state == "done" and supervisor.committed() == 3

    def away(store: ObjectStore) -> dict[str, int]:
        raise OSError(f"{store.url}: no answer")

    monkeypatch.setattr(ObjectStore, "listing", away)
    assert [summary.state for summary in runs.runs_below(run.path.parent)] == ["unreadable"]
    assert supervisor.committed() == 3, "a store that is away says nothing of what is in it"


def test_a_run_whose_data_are_being_made_is_listed_and_followed(tmp_path: Path) -> None:
    with stage(tmp_path / "run", "ingest_images -> emoji") as progress:
        (found,) = runs.runs_below(tmp_path)
        assert (
            found.state == "preparing"
            and found.doing is not None
            and found.doing.startswith("ingest_images -> emoji: for ")
        )
        lines = runs.follow(RunFolder(tmp_path / "run"), poll_s=0.05)
        assert next(lines).startswith("ingest_images -> emoji: for ")
        progress(1, 2)
    assert list(lines) == [] and runs.runs_below(tmp_path) == [], "nothing of a run has been begun yet"
