"""Edges of a run folder: what cannot be written, output that nobody reads, names, secrets, other working directories, what is shown."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus_scale import main_job
from nexus_scale.config import recipe as recipes
from nexus_scale.config.secret_names import refuse_secrets_in
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.io.terminal import visible
from nexus_scale.orchestration.cluster import data_root_of_run
from nexus_scale.run import files as run_files
from nexus_scale.run import runs
from tests.distributed import nexus, nexus_started, started, until

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["train", "mmdit/tiny_openmoji", "--tiny", "cluster.workers=0", "callbacks.validate=null"]
NAME = "mmdit_tiny_openmoji_tiny"


def at(root: Path, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """`nexus ...` with its roots there: exit code and output, which never holds a traceback."""
    code, said = nexus(cwd or root, *arguments, NEXUS_RUNS_ROOT=str(root / "runs"), NEXUS_DATA_ROOT=str(root / "data"))
    assert "Traceback" not in said, said
    return code, said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished run of three steps."""
    root = tmp_path_factory.mktemp("made")
    code, said = at(root, *TINY, "steps=3", "callbacks.checkpoint={every: 1}")
    assert code == 0, said
    return root


# ------------------------------------------------------------------------------------------------- not writable


def test_what_is_no_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    runs_root = tmp_path / "runs"
    runs_root.mkdir()
    (runs_root / "file").write_text("mine")
    (runs_root / "dangling").symlink_to(tmp_path / "nowhere")
    for name, words in (("file", "is not a folder"), ("dangling", "which does not exist")):
        code, said = at(tmp_path, *TINY, f"run={name}")
        assert code == 5 and words in said and str(runs_root / name) in said, said
    assert (runs_root / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    code, said = at(tmp_path, *TINY, f"cluster.paths.runs={runs_root / 'file'}")
    assert code == 5 and "is not a folder" in said, said


def _bound_by_permissions(arguments: list[str], root: str) -> None:
    """`nexus ...` as a user whom permissions bind; root is one without two of its capabilities."""
    import ctypes
    import struct

    from nexus_scale import cli

    libc = ctypes.CDLL(None)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    sets = list(struct.unpack("6I", data.raw))
    for i in (0, 1):  # effective and permitted, without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        sets[i] &= ~0b110
    assert libc.capset(header, struct.pack("6I", *sets)) == 0
    os.chdir(root)
    sys.argv[:] = ["nexus", *arguments]
    cli.main()


def bound(arguments: list[str], root: Path, log: Path) -> Any:
    environment = {**os.environ, "NEXUS_RUNS_ROOT": str(root / "runs"), "NEXUS_DATA_ROOT": str(root / "data")}
    return started(_bound_by_permissions, arguments, str(root), log=log, environment=environment)


def test_a_folder_that_may_not_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    process = bound(TINY, tmp_path, tmp_path / "log")
    process.join(120)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 5 and "no permission to write" in said and "Traceback" not in said, said


@pytest.mark.parametrize("folder", ["checkpoints", "."])
def test_a_folder_that_may_no_longer_be_written_ends_the_run_with_one_message(folder: str, tmp_path: Path) -> None:
    settings = ["steps=100000", "callbacks.checkpoint={every: 5}", "callbacks.metrics={every: 1}"]
    process = bound([*TINY, *settings], tmp_path, tmp_path / "log")
    run = tmp_path / "runs" / NAME
    try:
        until(lambda: list(run.glob("checkpoints/step_" + "[0-9]" * 8)) or not process.is_alive(), 120)
        (run / "checkpoints").chmod(0o555)
        (run / folder).chmod(0o555)
        process.join(120)
        said = (tmp_path / "log").read_text()
        assert process.exitcode == 5, said
    finally:
        process.kill()
        process.join()
    assert "Traceback" not in said and said.count("\nerror: ") == 1, said
    assert "Permission denied" in said


# ------------------------------------------------------------------------------------------------- output that nobody reads


@pytest.mark.parametrize("streams", ["left", "closed"])
def test_output_that_nobody_reads_ends_no_training(streams: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "NEXUS_RUNS_ROOT": str(tmp_path),
        "NEXUS_DATA_ROOT": str(tmp_path),
    }
    command = [sys.executable, "-m", "nexus_scale.cli", *TINY, "steps=3"]
    if streams == "closed":
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=environment, cwd=tmp_path, timeout=120
        )
        code = done.returncode
    else:
        reader, writer = os.pipe()
        os.close(reader)  # as `| head` has left
        with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=writer, stderr=writer) as process:
            os.close(writer)
            code = process.wait(timeout=120)
    assert code == 0
    assert json.loads((tmp_path / NAME / "results.json").read_text())["steps"] == 3


# ------------------------------------------------------------------------------------------------- names


def recipe_file(root: Path, name: str, prepare: list[dict[str, Any]], **changes: Any) -> Path:
    values = recipes.dump(recipes.load_recipe("mmdit/tiny_openmoji", tiny=True))
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, "name": name, "prepare": prepare, **changes}))
    return path


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", "", "-x", "x" * 101, "x\n"])
def test_a_run_that_a_recipe_prepares_has_a_plain_name(name: str, tmp_path: Path) -> None:
    first = recipe_file(tmp_path, "first", [])
    second = recipe_file(tmp_path, "second", [{"job": "train", "recipe": str(first), "run": name}])
    if name == "":
        assert main_job.resolve(str(second)).place.run.path.name == "second"
        return
    with pytest.raises(UserError, match="expected a plain name"):
        main_job.resolve(str(second))
    encoders = {"moments": {"run": name}}
    values = yaml.safe_load(first.read_text())
    third = recipe_file(tmp_path, "third", [], data={**values["data"], "encoders": encoders})
    with pytest.raises(UserError, match=r"data\.encoders\.moments\.run"):
        main_job.resolve(str(third))


def test_recipes_that_prepare_themselves_are_refused(tmp_path: Path) -> None:
    own = recipe_file(tmp_path, "own", [{"job": "train", "recipe": str(tmp_path / "own.yaml")}])
    with pytest.raises(UserError, match="waits for itself: own needs own"):
        main_job.resolve(str(own))
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        recipe_file(tmp_path, name, [{"job": "train", "recipe": str(tmp_path / f"{other}.yaml")}])
    with pytest.raises(UserError, match="a needs b needs c needs a"):
        main_job.resolve(str(tmp_path / "a.yaml"))
    with pytest.raises(UserError, match="b needs c needs a needs b"):
        main_job.resolve(str(tmp_path / "a.yaml"), run="mine")
    ends = {"job": "train", "recipe": str(tmp_path / "d.yaml"), "set": {"prepare": []}, "run": "first_part"}
    assert main_job.resolve(str(recipe_file(tmp_path, "d", [ends]))).recipe.name == "d"


def test_tiny_runs_have_a_name_of_their_own_and_older_ones_go_on(made: Path, tmp_path: Path) -> None:
    code, said = at(made, "train", "mmdit/tiny_openmoji", "--dry-run")
    assert code == 0, said
    paths = [f"cluster.paths.runs={made / 'runs'}"]
    tiny, full = (main_job.resolve("mmdit/tiny_openmoji", paths, tiny=tiny) for tiny in (True, False))
    assert (tiny.place.run.path.name, full.place.run.path.name) == (NAME, "mmdit_tiny_openmoji")
    shutil.copytree(made / "runs" / NAME, tmp_path / "mmdit_tiny_openmoji")
    older = main_job.resolve("mmdit/tiny_openmoji", [f"cluster.paths.runs={tmp_path}"], tiny=True)
    assert older.place.run.path.name == "mmdit_tiny_openmoji", "begun when tiny runs had the recipe's name"
    other = main_job.resolve("mmdit/tiny_openmoji", [f"cluster.paths.runs={tmp_path}", "seed=5"], tiny=True)
    assert other.place.run.path.name == NAME


# ------------------------------------------------------------------------------------------------- secrets

CANARY = "7f3a9c-canary-0123456789"


@pytest.mark.parametrize(
    "place",
    [
        {"callbacks": {"metrics": {"wandb": {"api_key": CANARY}}}},
        {"callbacks": {"metrics": {"wandb": {"project": f"https://me:{CANARY}@example.org"}}}},
        {"networks": {"model": {"hf_token": CANARY}}},
        {"prepare": [{"job": "ingest_images", "password": CANARY}]},
        {"sample": {"name": "ode", "secret": CANARY}},
    ],
)
def test_a_secret_in_a_recipe_is_written_nowhere(place: dict[str, Any], tmp_path: Path) -> None:
    values = recipes.merge(recipes.dump(recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)), place)
    own, base = tmp_path / "elsewhere" / "own.yaml", tmp_path / "elsewhere" / "base.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump(values))
    base.write_text(yaml.safe_dump({"base": str(own), "name": "derived"}))
    for recipe in (own, base):
        code, said = at(tmp_path, "train", str(recipe), "cluster.workers=0")
        assert code == 2 and "looks like a secret" in said and CANARY not in said, said
    assert not (tmp_path / "runs").exists()


def test_words_that_only_sound_like_secrets_pass() -> None:
    fine = {
        "group_key": "label",
        "text_tokens": 16,
        "pad_token": "<pad>",
        "tokens": {"codes": 3},
        "key_dim": 64,
        "monkey": "see",
    }
    refuse_secrets_in(fine, "test")
    refuse_secrets_in({"endpoint": "s3://bucket/prefix", "mail": "me@example.org"}, "test")
    for name in recipes.configs_root().rglob("*.yaml"):
        refuse_secrets_in(yaml.safe_load(name.read_text()), str(name))


# ------------------------------------------------------------------------------------------------- another folder


def test_the_run_folder_knows_its_roots(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NEXUS_DATA_ROOT", "NEXUS_RUNS_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    project = tmp_path / "project"
    shutil.copytree(made / "runs" / NAME, project / "runs" / NAME)
    run, (recipe, cluster) = RunFolder(project / "runs" / NAME), run_files.open_run(project / "runs" / NAME)[1:]
    (project / "data").mkdir()
    run_files.write_started(run, recipe, cluster, project / "data")
    monkeypatch.chdir(tmp_path)
    assert data_root_of_run(run, cluster) == project / "data"
    assert main_job.resolve(str(run.path)).place.data_root == project / "data"
    moved = RunFolder(tmp_path / "moved" / "runs" / NAME)
    project.rename(tmp_path / "moved")
    assert data_root_of_run(moved, cluster) == tmp_path / "moved" / "data", "the project was moved as a whole"
    monkeypatch.setenv("NEXUS_DATA_ROOT", str(tmp_path / "mine"))
    assert data_root_of_run(moved, cluster) == tmp_path / "mine"
    asked = [f"cluster.paths.data={tmp_path / 'asked'}"]
    assert main_job.resolve(str(moved.path), asked).place.data_root == tmp_path / "asked"
    monkeypatch.delenv("NEXUS_DATA_ROOT")
    (moved.path / run_files.STARTED).unlink()
    assert data_root_of_run(moved, cluster) == tmp_path / "moved" / "data", "an older run: beside its runs"


def test_a_run_goes_on_from_another_folder_and_says_where_its_data_are(made: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    command = [*TINY, "callbacks.checkpoint={every: 1}"]
    code, said = nexus(project, *command, "steps=2")
    assert code == 0, said
    code, said = nexus(tmp_path, "train", str(project / "runs" / NAME), "steps=3")
    assert code == 0 and f"data in {project / 'data'}, runs in {project / 'runs'}" in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"], "nothing is made where the user stands"
    code, said = nexus(tmp_path, "sample", str(project / "runs" / NAME), "--prompt", "a")
    assert code == 0 and f"data in {project / 'data'}" in said, said


# ------------------------------------------------------------------------------------------------- what is shown


def test_what_comes_from_files_steers_no_terminal(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    nasty = "a\x1b[31m\x07\u202e\x9b[bold]b"
    shutil.copytree(made / "runs" / NAME, root / nasty)
    incidents.note(root / nasty, "straggler", "worse\x1b]0;title\x07\nnext [red]")
    log = root / nasty / "attempts" / "1" / "rank_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("line\x1b[2J\u202e\n")
    (root / os.fsdecode(b"bytes\xff")).mkdir()
    shutil.copy(root / nasty / "recipe.yaml", root / os.fsdecode(b"bytes\xff"))
    (root / nasty / "cluster.yaml").write_text("workers: \x1b[31m")
    for arguments in (["list"], ["list", "--json"], ["follow", nasty], ["stop", nasty], ["delete", nasty, "--yes"]):
        code, said = nexus(tmp_path, "runs", *arguments, "--root", str(root))
        assert code in (0, 5) and "Traceback" not in said, said
        assert not set(said) & set("\x1b\x07\x9b\u202e"), repr(said)
    assert not (root / nasty).exists()


def test_visible_leaves_words_and_writes_out_the_rest() -> None:
    assert visible("Grüße, 你好 👍🏽\n\tx") == "Grüße, 你好 👍🏽\n\tx"
    assert visible("\x1b[0m\r\x7f") == "\\x1b[0m\\r\\x7f"
    assert visible("a\nb", keep="") == "a\\nb"
    assert visible("\udcff") == "\\udcff"


@pytest.mark.parametrize("root", ["/etc/passwd", "file/below"])
def test_a_root_that_is_no_folder_is_named(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = nexus(tmp_path, "runs", "--root", root)
    assert code == 5 and "expected a folder of runs" in said, said


def test_a_dangling_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="which does not exist") as caught:
        runs.runs_below(tmp_path / "link")
    assert caught.value.code == 5 and runs.runs_below(tmp_path / "absent") == []


# ------------------------------------------------------------------------------------------------- damaged files


def copy_of(made: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(made / "runs" / NAME, tmp_path / "runs" / NAME)))


@pytest.mark.parametrize("name", ["recipe.yaml", "cluster.yaml"])
@pytest.mark.parametrize("content", [b"", b"half: [", b"\x00\xff", b"- 1\n"])
def test_a_torn_recipe_or_cluster_is_healed(name: str, content: bytes, made: Path, tmp_path: Path) -> None:
    run = copy_of(made, tmp_path)
    _, recipe, cluster = run_files.open_run(run.path)
    (run.path / name).write_bytes(content)
    assert run_files.open_run(run.path) == (run, recipe, cluster)
    runs.prepare_run(run, recipe, cluster)
    assert yaml.safe_load((run.path / name).read_text()) and (run.path / f"{name}.damaged").read_bytes() == content


def test_a_run_with_torn_files_goes_on_by_its_folder(made: Path, tmp_path: Path) -> None:
    run = copy_of(made, tmp_path)
    for name in (
        "recipe.yaml",
        "cluster.yaml",
        "checkpoints/ATTEMPT",
        "environment.json",
        "stages.json",
        "results.json",
    ):
        (run.path / name).write_bytes(b"")
    code, said = at(tmp_path, "train", str(run.path), "steps=4")
    assert code == 0 and "recipe.yaml" in said and "started.json" in said and runs.newest_step(run) == 4, said


def test_a_recipe_that_is_nowhere_else_is_named_and_the_command_that_began_it_goes_on(
    made: Path, tmp_path: Path
) -> None:
    run = copy_of(made, tmp_path)
    run.recipe.write_bytes(b"")
    (run.path / run_files.STARTED).unlink()
    code, said = at(tmp_path, "train", str(run.path))
    assert code == 5 and f"run={NAME}" in said, said
    code, said = at(tmp_path, "report", str(run.path))
    assert code == 0, said
    code, said = at(tmp_path, *TINY, "steps=4", "seed=7", "callbacks.checkpoint={every: 1}")
    assert code == 5 and "seed: 0 -> 7" in said, "the newest checkpoint says what made the curve"
    code, said = at(tmp_path, *TINY, "steps=4", "callbacks.checkpoint={every: 1}")
    assert code == 0, said
    assert runs.newest_step(run) == 4


def test_choices_that_are_damaged_come_from_the_newest_checkpoint(made: Path, tmp_path: Path) -> None:
    run = copy_of(made, tmp_path)
    before = run_files.frozen_choices(run)
    run.environment.write_text("{")
    assert run_files.frozen_choices(run) == before
    run.environment.unlink()
    assert run_files.frozen_choices(run) == before
    shutil.rmtree(run.checkpoints)
    assert run_files.frozen_choices(run) is None
    run.environment.write_text("{")
    with pytest.raises(UserError, match=r"environment\.json: is damaged") as caught:
        run_files.frozen_choices(run)
    assert caught.value.code == 5


@pytest.mark.parametrize("deleted", ["checkpoints", "."])
def test_what_was_deleted_under_a_run_is_made_again(deleted: str, tmp_path: Path) -> None:
    """The checkpoints by the next save, and what a failed one left goes with it; or all of the folder."""
    root, log = tmp_path / "runs", tmp_path / "log"
    environment = {**os.environ, "NEXUS_RUNS_ROOT": str(root), "NEXUS_DATA_ROOT": str(tmp_path)}
    settings = [*TINY, "steps=60", "callbacks.checkpoint={every: 2}", "callbacks.metrics={every: 1}"]
    with nexus_started(tmp_path, *settings, log=log, environment=environment) as process:
        until(lambda: list(root.glob(f"{NAME}/checkpoints/step_" + "[0-9]" * 8)) or not process.is_alive(), 120)
        shutil.rmtree(root / NAME / deleted, ignore_errors=True)
        process.join(120)
        assert process.exitcode == 0, log.read_text()
    names = sorted(path.name for path in (root / NAME / "checkpoints").iterdir())
    assert not [name for name in names if ".tmp-" in name or "partial" in name], names
    assert "step_00000060" in names
    (summary,) = runs.runs_below(root)
    assert (summary.state, summary.step, summary.loss is None) == ("done", 60, False)
    assert "done: 60 steps" in log.read_text()


def test_files_have_the_permissions_that_the_user_asks_for(made: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (made / "runs" / NAME).rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_a_run_that_is_only_held_is_listed_and_can_be_deleted(tmp_path: Path) -> None:
    """As one whose driver was killed before its recipe was written."""
    run = RunFolder(tmp_path / "one")
    with runs.locked(run):
        assert [(summary.name, summary.state) for summary in runs.runs_below(tmp_path)] == [("one", "starting")]
    assert [(summary.name, summary.state) for summary in runs.runs_below(tmp_path)] == [("one", "new")]
    code, said = nexus(tmp_path, "runs", "delete", "one", "--yes", "--root", str(tmp_path))
    assert code == 0 and not run.path.exists(), said


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "", "x\ny"])
def test_networks_have_plain_names(name: str) -> None:
    values = recipes.dump(recipes.load_recipe("mmdit/tiny_openmoji", tiny=True))
    average = next(key for key, spec in values["networks"].items() if "average_of" in spec)
    values["networks"][name] = values["networks"].pop(average)
    with pytest.raises(UserError, match="networks"):
        main_job.check_recipe(recipes.recipe_from(values, "test"))


def test_following_ends_with_its_reader(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    log = run.path / "attempts" / "1" / "rank_0.log"
    log.parent.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "nexus_scale.cli", "runs", "follow", "one", "--root", str(tmp_path)]
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)
    run_files.write_started(run, recipe, recipes.cluster_from({"workers": 0}, "test"), tmp_path)
    with runs.locked(run), log.open("w") as file, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        print("first", file=file, flush=True)
        assert process.stdout.readline() == "first\n"
        process.stdout.close()

        def ended() -> bool:
            print("more", file=file, flush=True)
            return process.poll() is not None

        until(ended)
        assert process.returncode == 0 and "Traceback" not in process.stderr.read()
