"""A network may be told a class beside a text: each prompt then has a label, and what makes no sense is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import generate_samples
from nexus_scale.contracts import UserError
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data

TEXT = {"text": {"shape": [6, 24], "lengths": True}}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("both")
    changed = {
        "objective": {"conditions": ["label", "text"]},
        "data": {"text_tokens": 6, "synthetic": {"fields": TEXT}},
    }
    return trained_on_made_up_data(root, "dit/tiny_cifar10", **changed)


@pytest.fixture
def told(both: Place, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The conditions of each forward of the network, whose weights make it listen."""
    seen: list[dict[str, torch.Tensor]] = []
    init = Trained.__init__

    def listening(self: Trained, *given: Any, **wishes: Any) -> None:
        init(self, *given, **wishes)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in self.nets["model"].parameters():
                p.normal_(std=0.2)
        self.nets["model"].register_forward_pre_hook(lambda module, given: seen.append(dict(given[2])))

    monkeypatch.setattr(Trained, "__init__", listening)
    return seen


def test_each_prompt_has_its_class(both: Place, told: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder = draw_prompts(
        both, ["cat", "cat", "dog"], label=["3", "5", "5"], per_prompt=2, steps=1, guidance=1.0, output=tmp_path / "a"
    )
    [cond] = told
    assert cond["label"].tolist() == [3, 3, 5, 5, 5, 5]
    assert torch.equal(cond["text"][0], cond["text"][2]) and not torch.equal(cond["text"][0], cond["text"][4])
    names = [f"{n:03d}_{word}_{i:02d}.png" for n, word in enumerate(("cat", "cat", "dog")) for i in (0, 1)]
    assert sorted(path.name for path in folder.glob("0*.png")) == names
    alone = draw_prompts(
        both, ["cat", "cat", "dog"], label=["5"], per_prompt=2, steps=1, guidance=1.0, output=tmp_path / "b"
    )
    first, again = (np.stack([np.asarray(Image.open(path / name)) for name in names]) for path in (folder, alone))
    assert not np.array_equal(first[0], again[0]) and np.array_equal(first[2], again[2])


def test_a_negative_prompt_keeps_the_class(both: Place, told: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    draw_prompts(both, ["cat", "dog"], label=["3", "5"], negative_prompt="grey", guidance=3.0, steps=1, output=tmp_path)
    [cond] = told
    assert cond["label"].tolist() == [3, 5, 3, 5] and "drop" not in cond
    assert torch.equal(cond["text"][2], cond["text"][3]) and not torch.equal(cond["text"][0], cond["text"][2])


def test_nexus_generate_tells_a_class_too(both: Place, told: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    given: dict[str, Any] = {
        "run": str(both.run.path),
        "prompts": str(tmp_path / "prompts.txt"),
        "output": "out",
        "steps": 1,
        "workers": 0,
    }
    roots: dict[str, Any] = {"data_root": tmp_path, "runs_root": both.runs_root}
    made = generate_samples.run(**given, label="5", **roots)
    assert "caption" in made.fields and told[-1]["label"].unique().tolist() == [5]
    with pytest.raises(UserError, match="--label: missing"):
        generate_samples.run(**given | {"output": "none"}, **roots)
    with pytest.raises(UserError, match="told a class beside a text; give prompts and a label"):
        generate_samples.run(**given | {"output": "none", "prompts": None, "per_class": 2}, **roots)


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({}, "--label: missing; the network of recipe .* is told a class beside the text: give one, such as --label 0"),
        ({"label": ["1", "2", "3"]}, "--label: got 3 for 2 prompts; give one for all, or one for each"),
        ({"label": ["10"]}, "no class '10': give a number from 0 to 9"),
    ],
)
def test_what_is_missing_is_named(both: Place, wishes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        draw_prompts(both, ["cat", "dog"], **wishes)


@pytest.mark.parametrize(
    ("name", "prompts", "said"),
    [
        ("mmdit/tiny_openmoji", ["cat"], "--label: the network of recipe .* is told no class; leave it out"),
        ("dit/tiny_cifar10", ["3"], "is told a class and no text; give the class as the prompt"),
    ],
)
def test_a_class_that_nobody_is_told_is_refused(tmp_path: Path, name: str, prompts: list[str], said: str) -> None:
    place = trained_on_made_up_data(tmp_path, name)
    with pytest.raises(UserError, match=said):
        draw_prompts(place, prompts, label=["3"])
