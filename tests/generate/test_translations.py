"""`nexus sample --image`: a run that translates takes a picture or a folder of them, one way or, where it learnt both, the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nexus_scale.contracts import UserError
from nexus_scale.generate.export import export_run
from nexus_scale.generate.given import image_of
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.published import family
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    root = tmp_path_factory.mktemp("translations")
    return {name: trained_on_made_up_data(root, f"{name}/tiny_emoji") for name in ("cyclegan", "pix2pix")}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("b.png", "A.jpg", "c d.webp")):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("reverse", [None, True])
def test_a_folder_is_translated_both_ways(
    reverse: bool | None, runs: dict[str, Place], pictures: Path, tmp_path: Path
) -> None:
    place = runs["cyclegan"]
    folder = draw_prompts(place, [], image=pictures, reverse=reverse, output=tmp_path / "out")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000_a.png", "001_b.png", "002_c-d.png", "grid.png"]
    trained = Trained(place.run, place)
    network = trained.nets["back" if reverse else "model"]
    for name, source in (("000_a.png", "A.jpg"), ("001_b.png", "b.png")):
        with torch.no_grad():
            expected = network(image_of(pictures / source, 16, 16)[None])[0]
        got = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(got, expected, rtol=0, atol=0.51 / 127.5 + 1e-5)


def test_one_picture_is_translated_one_way(runs: dict[str, Place], pictures: Path, tmp_path: Path) -> None:
    folder = draw_prompts(runs["pix2pix"], [], image=pictures / "b.png", output=tmp_path / "out")
    assert sorted(path.name for path in folder.glob("0*")) == ["000_b.png"]


def test_each_network_is_exported_as_the_released_code_has_it(runs: dict[str, Place], tmp_path: Path) -> None:
    place = runs["cyclegan"]
    with pytest.raises(UserError, match="--network 'forth'"):
        export_run(place, None, tmp_path / "none", "forth")
    trained = Trained(place.run, place)
    for role, first in (("back", "model.1.weight"), ("critic", "model.0.weight")):
        folder = export_run(place, "original", tmp_path / role, role)
        assert first in load_file(folder / "model.safetensors") and trained.recipe.trained()[role].name in (
            folder / "README.md"
        ).read_text(encoding="utf-8")
        _, state = family(trained.recipe.trained()[role].name).formats["original"].read(folder / "model.safetensors")
        own = trained.nets[role].state_dict()
        assert state.keys() == own.keys() and all(torch.equal(value, own[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "prompts", "wishes", "words"),
    [
        ("pix2pix", [], {}, "translates pictures: give --image FILE"),
        (
            "pix2pix",
            [],
            {"image": "b.png", "reverse": True},
            "--reverse: recipe .* does not translate pictures both ways",
        ),
        ("cyclegan", [], {"reverse": True}, "--reverse: is of a picture"),
        ("cyclegan", ["a horse"], {"image": "b.png"}, "takes no prompts; leave it out$"),
        ("cyclegan", [], {"image": "b.png", "strength": 0.5}, "--strength: recipe .* draws at once"),
        ("cyclegan", [], {"image": "nowhere.png"}, "--image .*nowhere.png: cannot be read"),
        ("cyclegan", [], {"image": "notes.txt"}, "--image .*notes.txt"),
        ("cyclegan", [], {"image": "empty"}, "has no pictures"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_name(
    name: str,
    prompts: list[str],
    wishes: dict[str, Any],
    words: str,
    runs: dict[str, Place],
    pictures: Path,
    tmp_path: Path,
) -> None:
    (pictures / "empty").mkdir()
    wishes = {key: pictures / value if key == "image" else value for key, value in wishes.items()}
    with pytest.raises(UserError, match=words):
        draw_prompts(runs[name], prompts, output=tmp_path / "out", **wishes)
    assert not (tmp_path / "out").exists()
