"""Points of a mixture: what the job writes, and how a point is shown."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines import load_job
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import UserError
from nexus_scale.media.points import Points
from nexus_scale.metrics.diversity import grid_of_modes
from nexus_scale.train import open_data


def points(folder: Path, split: str) -> torch.Tensor:
    recipe = recipes.load_recipe("gan/mixture")
    data = open_data(recipe, folder, "train" if split == "train" else "validation")
    return torch.cat([batch["point"] for batch in data.fixed(data.samples)])


def test_points_are_of_25_modes_the_same_each_time_and_others_are_held_out(tmp_path: Path) -> None:
    job, given = load_job("make_mixture"), {"output": "mixture", "samples": 500, "heldout": 100}
    for root in ("one", "two"):
        roots = {"data_root": tmp_path / root, "runs_root": tmp_path}
        assert not job.done(**given, **roots)
        job.run(**given, **roots)
        assert job.done(**given, **roots)
    one, two = (points(tmp_path / root, "train") for root in ("one", "two"))
    assert one.shape == (500, 2) and torch.equal(one, two)
    centres = grid_of_modes(5, 2.0).float()
    assert sorted(set(centres[:, 0].tolist())) == [-4.0, -2.0, 0.0, 2.0, 4.0] and len(centres) == 25
    distance, nearest = torch.cdist(one, centres).min(1)
    assert len(nearest.unique()) == 25 and 0.04 < float((distance.square().mean() / 2).sqrt()) < 0.06
    held_out = points(tmp_path / "one", "heldout")
    assert held_out.shape == (100, 2) and float(torch.cdist(held_out, one).min()) > 0
    with pytest.raises(UserError, match="other options"):
        job.run(**{**given, "deviation": 0.1}, data_root=tmp_path / "one", runs_root=tmp_path)


def test_a_point_is_a_dot_in_its_place_and_a_file_of_its_numbers() -> None:
    medium = Points(largest=4.0)
    (shown,) = medium.decode(torch.tensor([[4.0, -9.0]]))
    picture = medium.picture(shown)
    rows, columns = np.nonzero((picture == (176, 32, 32)).all(2))
    assert rows.min() == 62 and rows.max() == 63, "below, at the border that it lies beyond"
    assert columns.mean() == round((1 + 4 / 5) / 2 * 63)
    assert np.load(io.BytesIO(medium.file(shown))).tolist() == [4.0, -9.0]
