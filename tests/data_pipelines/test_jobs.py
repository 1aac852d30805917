"""A job states its options once: command lines, recipes and calls give the same, and what the version before made is recognised."""

from __future__ import annotations

import importlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import JOBS, Job, check_options, load_job
from data_pipelines.job import Roots
from nexus_scale.contracts import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "jobs"
COMMANDS: dict[str, list[tuple[str, dict[str, Any]]]] = json.loads((FIXTURES / "commands.json").read_text())


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, dict[str, Any]]]]:
    """A data root that the version before filled, with the options of each job that did."""
    root = tmp_path_factory.mktemp("before")
    with tarfile.open(FIXTURES / "made_before.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / "data", json.loads((root / "jobs.json").read_text())


def test_every_job_is_called_through_the_driver_which_locks_its_output() -> None:
    for name in JOBS:
        module, job = importlib.import_module(f"data_pipelines.{name}"), load_job(name)
        assert (module.run, module.done, module.main) == (job.run, job.done, job.main), name
        assert job.name == name and "output" in job.options.model_fields


@pytest.mark.parametrize("name", JOBS)
def test_a_command_line_gives_what_it_gave_before(name: str) -> None:
    job = load_job(name)
    for line, options in COMMANDS[name]:
        values, roots, debug = job.values(line.split())
        given, known = (job.options.of(each, name).model_dump(mode="json") for each in (values, options))
        assert given == known, line
        assert roots == Roots(Path("data").absolute(), Path("runs").absolute()) and not debug


def test_data_that_the_version_before_made_are_not_made_again(
    before: tuple[Path, list[tuple[str, dict[str, Any]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, jobs = before
    assert len({name for name, _ in jobs}) == len(JOBS) - 18, "all but those that fetch, and the newest"
    for name, options in jobs:
        check_options(name, options)
        job = load_job(name)
        if name == "precompute_phonemes" and not same_espeak(root / options["output"]):
            continue
        assert job.done(**options, data_root=root, runs_root=root), f"{name} {options}"
        stamps = {path: path.stat().st_mtime_ns for path in (root / options["output"]).rglob("*.tar")}
        job.run(**options, data_root=root, runs_root=root)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), f"{name} made them again"


def same_espeak(folder: Path) -> bool:
    """Whether phonemes of this machine's espeak-ng are those of the one that made the folder."""
    phonemes = pytest.importorskip("nexus_scale.interop.phonemes")
    made = json.loads((folder / "manifest.json").read_text())["encoder"]["fingerprint"]
    return bool(phonemes.Phonemizer("en-us").fingerprint == made)


@pytest.mark.parametrize("name", JOBS)
def test_help_names_every_option_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = load_job(name)
    with pytest.raises(SystemExit) as ended:
        job.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and " ".join((job.about.split("\n"))[0].split()) in said
    for key, field in job.options.model_fields.items():
        assert field.description, f"{name}.{key} has no help"
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"(default: {field.default:g})" in said, f"{name}.{key}"


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ingest_clips", {"heldout": 1.0}, "heldout: input should be less than 1; got 1.0"),
        ("ingest_clips", {"size": "32"}, "size '32': expected height and width"),
        ("ingest_clips", {"fps": 0}, "fps 0"),
        ("ingest_images", {"format": "gif"}, "format: input should be one of 'jpg', 'png', 'webp'; got 'gif'"),
        ("ingest_images", {"background": "whit"}, "background 'whit': expected a colour"),
        ("ingest_images", {"source": {"path": "x", "wieght": 1}}, "unknown key 'wieght'; did you mean 'weight'"),
        ("ingest_speech", {"min_seconds": 30}, "a shortest clip that is shorter"),
        ("cut_segments", {"segment_seconds": 0}, "segment_seconds: input should be greater than 0"),
        ("precompute_codes", {"bounds": [3, 2]}, "expected ascending whole numbers"),
        ("precompute_text", {"encoders": []}, "got 0 encoders, expected 1 to 3"),
        ("synthesise_speech", {"voices": ["slt", "alt"]}, "no voice 'alt'; did you mean 'slt'"),
        ("fetch_emoji_clips", {"parts": [5]}, r"got parts \[5\]"),
    ],
)
def test_a_wrong_value_is_the_same_error_in_a_recipe_in_a_call_and_on_the_command_line(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job: Job[Any] = load_job(name)
    options = {**COMMANDS[name][0][1], **wrong}
    if "source" in wrong:
        options.pop("sources")
    with pytest.raises(UserError, match=f"prepare: {name}.*{message}"):
        check_options(name, options)
    for call in (job.run, job.done):
        with pytest.raises(UserError, match=f"^{name}.*{message}"):
            call(**options, data_root=tmp_path, runs_root=tmp_path)
    assert not list(tmp_path.iterdir())
    if name == "ingest_clips" and "fps" in wrong:
        line = "--source v --output o --size 32x48 --frames 9 --fps 0"
        assert job.main([*line.split(), "--data-root", str(tmp_path)]) == 2
        assert "error: ingest_clips: size" in capsys.readouterr().err
