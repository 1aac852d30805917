"""A wheel carries the recipes, the clusters and the data pipelines, and finds them where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


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
    assert tops == {"nexus_scale", "data_pipelines"}
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "nexus = nexus_scale.cli:main" in entry_points.read_text()


def test_configs_are_found_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    code = (
        "import nexus_scale\n"
        "from nexus_scale import recipe\n"
        f"assert nexus_scale.__file__.startswith({str(site)!r}), nexus_scale.__file__\n"
        "print(recipe.load_cluster('h100x8').name, recipe.load_recipe('mmdit/tiny_openmoji').name)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(site))
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == ["h100x8", "mmdit_tiny_openmoji"]
