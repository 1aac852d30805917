"""Jobs have their output to themselves, stay below the data root, and tell of a full or forbidden disk in one message."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from data_pipelines import check_options, ingest_images
from data_pipelines.output_folder import LOCK, held, output_folder, output_name
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import configs_root, load_recipe
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.io.durable import append_line, atomic_write, replacing, umask
from nexus_scale.main_job import prepare, resolve
from nexus_scale.orchestration.data_jobs import ShardActor, ShardJob, Task, run_job
from nexus_scale.orchestration.mapped import _Row
from nexus_scale.run.runs import newest_step
from tests.distributed import until


def photos(root: Path, count: int = 8, side: int = 8) -> None:
    (root / "photos").mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"photos/{number:02d}.png")
        (root / f"photos/{number:02d}.txt").write_text(f"caption {number}")


def ingest(root: Path, output: str = "out", **options: Any) -> None:
    ingest_images.run(output=output, source="photos", data_root=root, runs_root=root, **options)


def command(root: Path, *options: str) -> subprocess.Popen[str]:
    script = Path(ingest_images.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    line = [sys.executable, str(script), "--source", "photos", "--output", "out", "--data-root", str(root), *options]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


# ------------------------------------------------------------------------------------------------- one job at a time


def test_three_processes_that_make_the_same_data_at_once_all_end_well(tmp_path: Path) -> None:
    photos(tmp_path, count=120, side=64)
    options = ("--shard-samples", "2", "--heldout", "0.25")
    three = [command(tmp_path, *options) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in three]
    assert [process.returncode for process in three] == [0, 0, 0], said
    made = [Manifest.load(tmp_path / "out" / split / "images") for split in ("train", "heldout")]
    for manifest in made:
        manifest.verify(deep=True)
    assert sum(manifest.samples for manifest in made) == 120
    assert not list((tmp_path / "out").rglob(".*")), "no lock and no temporary file stays"


HOLDER = """
import sys, time
from pathlib import Path
from data_pipelines.output_folder import held
with held(Path(sys.argv[1]), "ingest_images"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_job_waits_says_for_whom_and_goes_on_when_the_holder_is_killed(tmp_path: Path) -> None:
    photos(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(ingest_images.__file__).parents[1])}
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    holder = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiter = command(tmp_path)
    assert waiter.stderr is not None
    told = waiter.stderr.readline()
    assert f"ingest_images (process {holder.pid} on " in told and "waiting for it" in told, told
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    _, errors = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, errors
    assert Manifest.load(tmp_path / "out/train/images").samples > 0 and not (tmp_path / "out" / LOCK).exists()


def test_a_job_that_fails_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        ingest(tmp_path, "a/b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="no such file"):
        ingest(tmp_path, "kept/b")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and not list((tmp_path / "kept").iterdir())


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="has no locks") as raised, held(tmp_path / "out", "job"):
        pass
    assert raised.value.code == 6


# ------------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_code_6_with_one_message(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path, count=60, side=64)  # 12 kB each, which do not get smaller
    line = [
        "--source",
        str(tmp_path / "photos"),
        "--output",
        "out",
        "--data-root",
        str(small_disk),
        "--shard-samples",
        "4",
    ]
    assert ingest_images.main(line) == 6
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {small_disk}/out") and "No space left" in error and "GB are free" in error
    assert "--data-root" in error and "run the same command again" in error
    assert not list(small_disk.rglob(".*")), "nothing half-written stays on a full disk"


def write_much(row: Any) -> int:
    Path(row["output"]).write_bytes(bytes(1 << 20))
    return 1


class Much:
    """An encoder whose output is larger than the small disk."""

    fingerprint = "much"
    fields = (Field("codes", "codes.npy", "int16", (None,)),)

    def __init__(self, device: str):
        pass

    def encode(self, samples: Any) -> list[dict[str, Any]]:
        return [{"codes": np.zeros(1 << 17, np.int16)} for _ in samples]


def test_workers_tell_of_a_full_disk_as_a_value_and_write_with_the_users_umask(
    tmp_path: Path, small_disk: Path
) -> None:
    """What Ray's workers run, without Ray: an error there would be tried again, and be printed with its trace."""
    before = os.umask(0o077)  # as a local Ray's workers start
    try:
        told = _Row(write_much, small_disk, 0o022)({"output": str(small_disk / "x")})
        assert told["code"] == 6 and str(small_disk) in told["error"]
        source = words(tmp_path / "source", 4)
        (small_disk / "x").unlink()
        task = Task(
            str(source.folder / "a.tar"), source.shards[0].xxh3_128, str(small_disk / "a.tar"), "", 2, Much.fingerprint
        )
        row = {name: np.array([value]) for name, value in vars(task).items()}
        answer = ShardActor(Much, 1, "cpu", 0o027)(row)
        assert answer["code"] == [6] and "No space left" in answer["error"][0]
        row["output"] = np.array([str(tmp_path / "made" / "a.tar")])
        assert ShardActor(Much, 1, "cpu", 0o027)(row)["code"] == [0]
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").iterdir()}
        assert modes == {0o640}, modes
    finally:
        os.umask(before)


def test_a_read_only_disk_is_named_and_finished_data_on_it_serve(tmp_path: Path, small_disk: Path) -> None:
    photos(tmp_path)
    source = str(tmp_path / "photos")
    ingest_images.run(output="out", source=source, data_root=small_disk, runs_root=tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ingest_images.run(output="out", source=source, data_root=small_disk, runs_root=tmp_path)
    with pytest.raises(UserError, match=r"other.*cannot be written \(Read-only file system\)") as raised:
        ingest_images.run(output="other", source=source, data_root=small_disk, runs_root=tmp_path)
    assert raised.value.code == 6


# ------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "", " ", ".", "~/x", "a\0b", None, 5, ["x"]])
def test_an_output_is_a_name_below_the_data_root(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match="below the data root"):
        output_name(name)
    with pytest.raises(UserError, match="below the data root"):
        ingest(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_or_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, message in (
        ("file", "a file, expected a folder"),
        ("link", "link to nowhere"),
        ("file/x", "a file"),
        ("link/x/y", "link to"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            output_folder(name, tmp_path)
        assert raised.value.code == 3
    (tmp_path / "real").mkdir()
    (tmp_path / "other").symlink_to("real")
    assert output_folder("other/x", tmp_path) == tmp_path / "other/x"


def words(folder: Path, samples: int, encoder: dict[str, Any] | None = None) -> Manifest:
    with ShardWriter(folder / "a.tar", [Field("caption", "txt", "text")]) as writer:
        for number in range(samples):
            writer.write(str(number), {"caption": f"word {number}"})
    return finish_folder(folder, encoder=encoder)


def test_a_job_does_not_replace_what_another_kind_of_job_made_nor_foreign_tars(tmp_path: Path) -> None:
    source = words(tmp_path / "source", 3)
    kept = words(tmp_path / "kept", 5)
    job = ShardJob(source.folder, tmp_path / "kept", Much, {"kind": "much", "fingerprint": "much"}, {}, 2)
    with pytest.raises(UserError, match="holds data of no encoder"):
        run_job(job, workers=0)
    assert Manifest.load(tmp_path / "kept").hash == kept.hash
    with pytest.raises(UserError, match="lies in the input"):
        run_job(ShardJob(source.folder, source.folder / "x", Much, job.encoder, {}, 2), workers=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/holiday.tar").write_bytes(b"mine")
    run_job(ShardJob(source.folder, tmp_path / "out", Much, job.encoder, {}, 2), workers=0)
    assert (tmp_path / "out/holiday.tar").read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------- options of a recipe


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ingest_images",
            {"source": "a", "output": "x", "resolutoin": 3},
            "unknown key 'resolutoin'; did you mean 'resolution",
        ),
        ("ingest_images", {"source": "a"}, "'output' is missing"),
        ("ingest_images", {"source": "a", "output": "x", "seed": "1"}, r"ingest_images\.seed: .*integer; got '1'"),
        ("ingest_images", {"source": "a", "output": "x", "heldout": float("nan")}, "valid number"),
        ("ingest_images", {"source": "a", "output": "../x"}, "below the data root"),
        ("precompute_text", {"input": "a", "output": "b", "encoders": [{"folder": "t5"}], "workers": True}, "workers"),
        ("precompute_txt", {}, "did you mean 'precompute_text'"),
        (
            "precompute_latents",
            {"input": "a", "output": "b", "vae": {"run": "../x"}},
            r"vae\.run: got '../x', expected the plain name",
        ),
        ("precompute_codes", {"input": "a", "output": "b", "codec": {"run": 5}}, r"codec\.run: got 5"),
        ("train", {}, "train: 'recipe' is missing"),
        ("train", {"recipe": "vae/tiny", "runn": "x"}, "unknown key 'runn'; did you mean 'run'"),
        ("train", {"recipe": 5}, r"train\.recipe"),
        ("cut_segments", {"input": "a", "output": "b", "segment_seconds": "1"}, "segment_seconds"),
    ],
)
def test_options_of_prepare_are_checked_by_name_and_type(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(name, options)


def test_the_jobs_of_all_recipes_pass() -> None:
    jobs = 0
    for path in configs_root().glob("*/*.yaml"):
        if path.parent.name not in ("_base", "cluster", "suites"):
            for job in load_recipe(str(path)).prepare:
                check_options(job.job, job.options)
                jobs += 1
    assert jobs > 20


def test_a_recipe_with_a_mistake_in_prepare_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    values = read_yaml(configs_root() / "vae/tiny_openmoji.yaml")
    recipe.write_text(json.dumps({**values, "prepare": [{"job": "train"}]}))
    with pytest.raises(UserError, match="prepare: train: 'recipe' is missing"):
        resolve(str(recipe), ["cluster.workers=0"])


# ------------------------------------------------------------------------------------------------- runs that others need


RUN_HOLDER = """
import sys, time
from pathlib import Path
from nexus_scale.contracts import RunFolder
from nexus_scale.run.runs import locked
with locked(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_that_another_trains_already_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two recipes that need one autoencoder, started at the same second: the second waits, and trains it where the first dies."""
    values = read_yaml(configs_root() / "vae/tiny_openmoji.yaml")
    first = [
        {
            "job": "train",
            "recipe": "vae/tiny_openmoji",
            "run": "needed",
            "set": {"steps": 1, "prepare": [], **values["tiny"]},
        }
    ]
    first[0]["set"]["steps"] = 1
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({**values, "prepare": first}))
    target = resolve(
        str(recipe), ["cluster.workers=0", f"cluster.paths.data={tmp_path}/data", f"cluster.paths.runs={tmp_path}/runs"]
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ingest_images.__file__).parents[1])}
    line = [sys.executable, "-c", RUN_HOLDER, str(tmp_path / "runs/needed")]
    holder = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    failed: list[BaseException] = []

    def work() -> None:
        try:
            prepare(target)
        except BaseException as error:
            failed.append(error)

    with caplog.at_level("INFO"):
        waiter = threading.Thread(target=work)
        waiter.start()
        until(lambda: f'"pid": {holder.pid}' in caplog.text or bool(failed))
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
        waiter.join(120)
    assert not failed and not waiter.is_alive(), failed
    assert "waiting:" in caplog.text and newest_step(RunFolder(tmp_path / "runs/needed")) == 1


def test_files_that_libraries_write_have_the_users_umask(tmp_path: Path) -> None:
    """safetensors makes files of mode 600, whatever the umask: exports and classifiers that nobody else could read."""
    before = os.umask(0o027)
    try:
        assert umask() == 0o027
        with replacing(tmp_path / "a.safetensors") as partial:
            save_file({"a": np.zeros(3)}, partial)
        atomic_write(tmp_path / "b", b"")
        append_line(tmp_path / "c", "")
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "a.safetensors": 0o640,
        "b": 0o640,
        "c": 0o640,
    }
