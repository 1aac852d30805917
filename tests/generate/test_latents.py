"""Ways through latents, on draws whose values are known, and on a GAN and a VAE of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexus_scale.contracts import Latent, UserError
from nexus_scale.generate.latents import latents_of, slerp
from nexus_scale.generate.prompts import draw_prompts, record_of
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data

Z = Latent("z", (2, 3))


def at(places: Tensor) -> ProgressRng:
    return ProgressRng(0, 0, "sample", places)


def z_of(count: int, samples: Sequence[int], **asked: Any) -> Tensor:
    latents = latents_of(Z, count, **asked)
    assert latents is not None
    return latents.rng(at, samples).normal("z", Z.shape)


def drawn(*positions: int) -> Tensor:
    return at(torch.tensor(positions)).normal("z", Z.shape)


def test_slerp_is_the_papers_formula_and_keeps_its_ends_and_lengths() -> None:
    torch.manual_seed(0)
    a, b, t = torch.randn(5, 3, 7).double(), torch.randn(5, 3, 7).double(), torch.rand(5).double()
    for i in range(5):
        u, v = a[i].numpy().ravel(), b[i].numpy().ravel()
        omega = np.arccos(u / np.linalg.norm(u) @ (v / np.linalg.norm(v)))
        expected = (np.sin((1 - float(t[i])) * omega) * u + np.sin(float(t[i]) * omega) * v) / np.sin(omega)
        assert np.allclose(slerp(a, b, t)[i].numpy().ravel(), expected, rtol=1e-12)
    assert torch.allclose(slerp(a, b, torch.zeros(5)), a) and torch.allclose(slerp(a, b, torch.ones(5)), b)
    unit = torch.nn.functional.normalize(a.flatten(1)), torch.nn.functional.normalize(b.flatten(1))
    assert torch.allclose(slerp(*unit, t).norm(dim=1), torch.ones(5).double())
    # one direction and opposite ones have no arc: the line between them
    assert torch.allclose(slerp(a, 2 * a, t), a * (1 + t).view(5, 1, 1))
    assert torch.allclose(slerp(a, -a, torch.full((5,), 0.25)), 0.5 * a)


def test_an_interpolation_goes_through_the_draws_of_its_prompt() -> None:
    way = {"interpolate": 4}
    latents = latents_of(Z, 3, **way)
    assert latents is not None and latents.way.each == 7
    first, second = z_of(3, range(7), **way), z_of(3, range(7, 14), **way)
    assert torch.equal(first[[0, 3, 6]], drawn(0, 1, 2)) and torch.equal(second[[0, 3, 6]], drawn(3, 4, 5))
    assert torch.allclose(first[1], slerp(drawn(0), drawn(1), torch.tensor([1 / 3]))[0])
    assert torch.equal(z_of(3, [8], **way)[0], second[1]), "a sample does not depend on those drawn beside it"
    rng = latents.rng(at, range(7))
    assert rng.positions.tolist() == [0, 0, 1, 1, 1, 2, 2], "what is no latent is of the nearer draw"
    assert torch.equal(rng.normal("other", (2,)), at(rng.positions).normal("other", (2,)))


def test_a_walk_stays_as_probable_as_its_draws_and_its_neighbours_are_alike() -> None:
    assert torch.allclose(z_of(5, range(5), walk=1.0), drawn(0, 1, 2, 3, 4))
    large = Latent("z", (20_000,))
    latents = latents_of(large, 40, walk=0.6)
    assert latents is not None
    z = latents.rng(at, [0, 20, 38, 39]).normal("z", large.shape)
    assert torch.allclose(z.std(1), torch.ones(4), atol=0.02)
    alike = torch.corrcoef(z)
    assert abs(alike[2, 3] - 0.8) < 0.02 and abs(alike[0, 1]) < 0.03


def test_a_walk_in_batches_goes_on_where_the_last_one_ended() -> None:
    asked: list[Tensor] = []

    def counted(positions: Tensor) -> ProgressRng:
        asked.append(positions)
        return at(positions)

    latents = latents_of(Z, 30, walk=0.6)
    assert latents is not None
    batches = [range(begin, begin + 9) for begin in range(0, 90, 9)]  # of three prompts
    parts = [latents.rng(counted, batch).normal("z", Z.shape) for batch in batches]
    assert torch.equal(torch.cat(parts), z_of(30, range(90), walk=0.6)) and len(asked) < 200


def test_a_mix_is_a_table_of_pairs_with_the_draws_on_its_diagonal() -> None:
    table = z_of(3, range(9), mix=0.25).view(3, 3, *Z.shape)
    assert torch.allclose(table[[0, 1, 2], [0, 1, 2]], drawn(0, 1, 2))
    assert torch.allclose(table[0, 2], slerp(drawn(0), drawn(2), torch.tensor([0.25]))[0])
    assert torch.equal(z_of(3, range(9), mix=0.0), drawn(0, 0, 0, 1, 1, 1, 2, 2, 2))


def test_a_traversal_changes_one_number_at_a_time_and_truncation_draws_in() -> None:
    rows = z_of(2, range(2 * 6 * 5), traverse=5).view(2, 6, 5, 6)
    base = drawn(0, 1).view(2, 6)
    for draw in range(2):
        for number in range(6):
            assert rows[draw, number, :, number].tolist() == [-3.0, -1.5, 0.0, 1.5, 3.0]
            others = [i for i in range(6) if i != number]
            assert torch.equal(rows[draw, number][:, others], base[draw, others].expand(5, 5))
    assert torch.equal(z_of(2, range(2), truncate=0.5), 0.5 * drawn(0, 1))
    around_the_mean = z_of(1, range(18), traverse=3, truncate=0.0).view(6, 3, 6)
    assert torch.equal(around_the_mean[0, 2], torch.tensor([3.0, 0, 0, 0, 0, 0])), "the base is truncated, not the way"


@pytest.mark.parametrize(
    ("count", "asked", "said"),
    [
        (2, {"interpolate": 3, "walk": 0.5}, "--interpolate and --walk: each is a way through the latents; give one"),
        (1, {"interpolate": 3}, "--interpolate: goes from one draw of a prompt to another; give --count 2"),
        (1, {"mix": 0.5}, "--mix: goes from one draw"),
        (2, {"interpolate": 1}, "--interpolate 1: expected 2 to 10,000"),
        (2, {"walk": 0.0}, "--walk 0: expected above 0"),
        (2, {"mix": float("nan")}, "--mix nan: expected 0"),
        (2, {"truncate": float("inf")}, "--truncate inf: expected -10 to 10"),
    ],
)
def test_ways_that_there_are_none_of_are_refused(count: int, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        latents_of(None, count, **asked)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return trained_on_made_up_data(tmp_path_factory.mktemp("latents"), "gan/tiny_fashion_mnist")


def pictures(place: Place, prompts: list[str], folder: Path, **wishes: Any) -> list[np.ndarray]:
    drawn = draw_prompts(place, prompts, output=folder, seed=1, **wishes)
    names = [name for name in record_of(drawn)["files"] if name != "grid.png"]
    return [np.asarray(Image.open(drawn / name)).astype(int) for name in names]


def test_nexus_sample_interpolates_mixes_and_walks_a_gan(gan: Place, tmp_path: Path) -> None:
    plain = pictures(gan, ["3", "7"], tmp_path / "plain", per_prompt=2)
    between = pictures(gan, ["3", "7"], tmp_path / "between", per_prompt=2, interpolate=5)
    assert len(between) == 10
    for found, expected in zip((between[0], between[4], between[5], between[9]), plain, strict=True):
        assert np.abs(found - expected).max() <= 1, "the ends are what is drawn without a way"
    assert 0 < np.abs(between[1] - between[0]).mean() < np.abs(between[4] - between[0]).mean()
    table = pictures(gan, ["3"], tmp_path / "mix", per_prompt=2, mix=0.5)
    assert len(table) == 4 and np.abs(table[3] - plain[1]).max() <= 1 and np.abs(table[1] - table[2]).max() <= 1
    means = pictures(gan, ["3"], tmp_path / "mean", per_prompt=3, truncate=0.0)
    assert np.array_equal(means[0], means[2]) and np.abs(means[0] - plain[0]).max() > 0
    assert len(pictures(gan, ["3"], tmp_path / "rows", traverse=3)) == 8 * 3, "a row for each number of the latent"
    with pytest.raises(UserError, match=r"8,000,000 samples each on the way: expected at most 100,000"):
        draw_prompts(gan, ["3"], per_prompt=10_000, traverse=100)
