"""A wheel carries the recipes, the clusters and the data pipelines, finds them where it is installed, and trains from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, installed by pip beside the environment that the tests run in."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, text=True)
    return folder / "site"


def installed(site: Path, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(site))
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_carries_configs_and_pipelines_and_nothing_else(site: Path) -> None:
    for top, inside in (
        ("configs", "nexus_scale/configs"),
        ("data_pipelines", "data_pipelines"),
        ("nexus_scale", "nexus_scale"),
    ):
        ours = {
            f.relative_to(REPO / top) for f in (REPO / top).rglob("*") if f.is_file() and "__pycache__" not in f.parts
        }
        theirs = {f.relative_to(site / inside) for f in (site / inside).rglob("*") if f.is_file()}
        assert ours <= theirs, f"the wheel lacks {sorted(map(str, ours - theirs))}"
    tops = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"nexus_scale", "data_pipelines", "bin"}, "bin has the command"
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "nexus = nexus_scale.cli:main" in entry_points.read_text()


def test_configs_are_found_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    code = (
        "import nexus_scale\n"
        "from nexus_scale.config import recipe\n"
        f"assert nexus_scale.__file__.startswith({str(site)!r}), nexus_scale.__file__\n"
        "print(recipe.load_cluster('h100x8').name, recipe.load_recipe('mmdit/tiny_openmoji').name)\n"
    )
    shown = installed(site, ["-c", code], tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == ["h100x8", "mmdit_tiny_openmoji"]


def test_the_main_job_runs_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    options = ["--tiny", "steps=2", "cluster.workers=0", "callbacks.samples=null"]
    done = installed(site, [str(site / "bin/nexus"), "train", "mmdit/tiny_openmoji", *options], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "mmdit_tiny_openmoji_tiny"
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert (run / "report.html").exists() and list((run / "checkpoints").glob("step_00000002"))


@pytest.mark.parametrize(
    "extra", ["wandb", "webdataset", "bench", "hf", "s3", "speech", "video", "quickstart", "gpu", "dev"]
)
def test_it_offers_what_recipes_may_need(site: Path, extra: str) -> None:
    (metadata,) = site.glob("*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    assert f"Provides-Extra: {extra}" in lines
    assert any(line.startswith("Requires-Dist: ") and f"extra == '{extra}'" in line for line in lines)
