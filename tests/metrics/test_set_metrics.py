"""Metrics of sets of features: each held against a public package, sensitive to what it claims to see, and equal over any split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics.clip_score import AestheticHead, clip_scores
from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.metrics.inception_score import inception_score
from nexus_scale.metrics.kernel_distance import clip_mmd, kernel_inception_distance
from nexus_scale.metrics.moments import Moments, Stack
from nexus_scale.metrics.neighbours import manifolds, nearest
from tests.distributed import run_ranks
from tests.golden import set_metrics as golden

torch.set_num_threads(1)
SAID = json.loads(golden.FILE.read_text())


def pair(name: str) -> tuple[Tensor, Tensor]:
    x, y = golden.pair(name)
    return torch.from_numpy(x), torch.from_numpy(y)


# ------------------------------------------------------------------------------------------ against public packages


@pytest.mark.parametrize("name", ["narrow", "few", pytest.param("inception", marks=pytest.mark.slow)])
def test_frechet_distances_are_those_of_torch_fidelity_and_clean_fid(name: str) -> None:
    x, y = pair(name)
    found = frechet_distance(x, y)
    assert found == pytest.approx(SAID["fid"][name], rel=1e-6)
    assert found == pytest.approx(SAID["clean"][name], rel=1e-6)
    if name != "few":
        assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(SAID["fid"][name], rel=1e-6)
    if name == "narrow":
        assert found == pytest.approx(SAID["fad"], rel=1e-6)


def test_kernel_distances_are_those_of_torch_fidelity_and_clean_fid() -> None:
    x, y = pair("narrow")
    assert kernel_inception_distance(x, y, **golden.KID) == pytest.approx(SAID["kid"], rel=1e-6)
    assert kernel_inception_distance(x[:300], y, subset_size=None).mean == pytest.approx(SAID["kid_whole"], rel=1e-6)


def test_the_inception_score_is_torch_fidelitys() -> None:
    assert inception_score(torch.from_numpy(golden.logits())) == pytest.approx(SAID["isc"], rel=1e-6)


@pytest.mark.parametrize("k", golden.NEIGHBOURS)
def test_manifolds_are_those_of_prdc_and_torch_fidelity(k: int) -> None:
    real, drawn = pair("few")
    found = manifolds(real[:, :16], drawn[:, :16] * 0.9, k=k)
    assert found == pytest.approx(SAID[f"prdc_{k}"], rel=1e-6)
    assert found[:2] == pytest.approx(SAID[f"prc_{k}"], rel=1e-6)


def test_clips_discrepancy_is_its_formula() -> None:
    x, y = (one[:40] / one[:40].norm(dim=1, keepdim=True) for one in pair("narrow"))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / 200).mean()

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert clip_mmd(3 * x, y) == pytest.approx(float(expected), rel=1e-9)
    assert clip_mmd(x, x) == pytest.approx(0, abs=1e-9)


def test_a_clip_score_is_the_cosine_of_an_image_and_its_text(tmp_path: Path) -> None:
    images, texts = torch.tensor([[2.0, 0], [1, 1], [1, 0]]), torch.tensor([[1.0, 0], [0, 3], [-1, 0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([100, 100 / 2**0.5, 0])
    layers = [torch.nn.Linear(2, 5), torch.nn.Linear(5, 1)]
    head = torch.nn.Sequential(layers[0], torch.nn.Dropout(0.2), layers[1])
    state = {f"layers.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    torch.testing.assert_close(
        AestheticHead.open(tmp_path / "head.pth")(3 * images),
        head.eval().double()(torch.nn.functional.normalize(images.double()))[:, 0].detach(),
    )
    torch.save({"layers.0.weight": torch.zeros(2, 2), "layers.0.bias": torch.zeros(2)}, tmp_path / "other.pth")
    for name, said in (("none.pth", "published at"), ("other.pth", "not the weights")):
        with pytest.raises(UserError, match=said):
            AestheticHead.open(tmp_path / name)


# ----------------------------------------------------------------------------------------------------- sensitivity


def modes(count: int, seed: int, kept: int = 8, noise: float = 0.0) -> Tensor:
    """Samples around eight places in 16 dimensions, of which `kept` are drawn."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    which = torch.arange(count) % kept
    near, far = (torch.randn(count, 16, generator=generator) for _ in range(2))
    return (centres[which] + near + noise * far).double() / 4


DISTANCES = {
    "frechet": frechet_distance,
    "kid": lambda x, y: kernel_inception_distance(x, y, subset_size=None).mean,
    "cmmd": clip_mmd,
    "precision": lambda x, y: -manifolds(y, x).precision,
    "recall": lambda x, y: -manifolds(y, x).recall,
    "density": lambda x, y: -manifolds(y, x).density,
    "coverage": lambda x, y: -manifolds(y, x).coverage,
}


@pytest.mark.parametrize("name", [n for n in DISTANCES if n != "recall"])
def test_distances_grow_with_noise(name: str) -> None:
    found = [DISTANCES[name](modes(400, 1, noise=noise), modes(400, 2)) for noise in (0.0, 1.2, 1.5, 2.0)]
    assert found == sorted(found) and len(set(found)) == 4, found


@pytest.mark.parametrize("name", [n for n in DISTANCES if n not in ("precision", "density")])
def test_distances_grow_with_the_modes_that_are_dropped(name: str) -> None:
    found = [DISTANCES[name](modes(400, 1, kept), modes(400, 2)) for kept in (8, 6, 3, 1)]
    assert found == sorted(found) and len(set(found)) == 4, found


def test_copies_cost_recall_and_coverage_and_copies_of_real_samples_are_found() -> None:
    real, drawn = modes(400, 2), modes(400, 1)
    found = [manifolds(real, drawn[:kept].repeat(400 // kept, 1)) for kept in (400, 100, 20)]
    for name in ("recall", "coverage"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values, reverse=True) and len(set(values)) == 3, values
    copied = nearest(torch.cat([real[7:8] + 1e-6, drawn[:1]]), real, k=2)
    assert copied.places[0, 0] == 7 and copied.distances[0, 0] < 1e-5 < 0.5 < copied.distances[1, 0]
    assert copied.distances[0, 1] > copied.distances[0, 0]


def test_the_inception_score_sees_doubt_and_missing_classes() -> None:
    logits = 10 * torch.nn.functional.one_hot(torch.arange(400) % 8, 8).double()
    scores = [inception_score(one, seed=None).mean for one in (logits, logits / 3, logits / 10)]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(8, abs=0.05)
    fewer = 10 * torch.nn.functional.one_hot(torch.arange(400) % 3, 8).double()
    assert inception_score(fewer).mean == pytest.approx(3, abs=0.1)


# --------------------------------------------------------------------------------------------------- over workers


def test_moments_are_numpys_and_equal_over_workers() -> None:
    x = pair("narrow")[0]
    whole = Moments.of(x)
    torch.testing.assert_close(whole.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-13)
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(0)) + 0.1
    weighted = torch.from_numpy(np.cov(x.T.numpy(), aweights=weights.double().numpy()))
    torch.testing.assert_close(Moments.of(x, weights).covariance, weighted, rtol=1e-10, atol=1e-13)
    for workers in (2, 4):
        parts = [Moments(64) for _ in range(workers)]
        for i, batch in enumerate(x.split(37)):
            parts[i % workers].add(batch)
        made = parts[0]
        for other in parts[1:]:
            made.merge(Moments.from_state(other.state()))
        assert made.count == len(x)
        torch.testing.assert_close(made.covariance, whole.covariance, rtol=1e-12, atol=1e-14)
        y = pair("narrow")[1]
        assert frechet_distance(made, y) == pytest.approx(frechet_distance(whole, y), rel=1e-12)


def test_stacks_give_the_same_bits_over_workers() -> None:
    x, places = pair("narrow")[0].float(), torch.arange(400)
    for limit in (None, 150):
        whole = Stack(limit).add(x, places)
        for workers in (2, 4):
            parts = [Stack(limit) for _ in range(workers)]
            for i, (batch, at) in enumerate(zip(x.split(37), places.split(37), strict=True)):
                parts[(i + 1) % workers].add(batch, at)
            made = parts[-1]
            for other in parts[:-1]:
                made.merge(Stack.from_state(other.state(), limit))
            assert torch.equal(made.features(), whole.features())
            assert torch.equal(made.moments().covariance, whole.moments().covariance)
        assert len(whole.positions()) == (limit or 400)
        assert torch.equal(whole.features(), x[whole.positions()])
    assert not torch.equal(Stack(150, seed=1).add(x, places).positions(), whole.positions())


def of_two(rank: int, world_size: int) -> list[float]:
    """A distance whose sums two processes hold, and one of features that they exchange."""
    x, y = pair("narrow")
    mine = torch.arange(rank, len(x), world_size)
    state = Moments.of(x[mine]).state()
    for tensor in state.values():
        torch.distributed.all_reduce(tensor)
    kept = Stack().add(x[mine], mine).state()
    gathered = {name: [torch.empty_like(tensor) for _ in range(world_size)] for name, tensor in kept.items()}
    for name, tensor in kept.items():
        torch.distributed.all_gather(gathered[name], tensor)
    stack = Stack.from_state({name: torch.cat(parts) for name, parts in gathered.items()})
    return [frechet_distance(Moments.from_state(state), y), frechet_distance(stack.moments(), y)]


def test_two_processes_agree_with_one() -> None:
    x, y = pair("narrow")
    one = frechet_distance(Stack().add(x, torch.arange(len(x))).moments(), y)
    for summed, stacked in run_ranks(2, of_two):
        assert summed == pytest.approx(one, rel=1e-12) and stacked == one


def test_what_has_no_metric_is_refused() -> None:
    x, y = pair("narrow")
    nan = torch.full((9, 64), torch.nan)
    refused = [
        (lambda: Moments(3).add(x), "expected"),
        (lambda: Moments(64).add(nan), "not finite in 9 of 9"),
        (lambda: Moments(64).merge(Moments(3)), "expected 64"),
        (lambda: Moments(64).add(x[:1]).covariance, "at least 2"),
        (lambda: Moments.from_state({"count": torch.ones(1)}), "state of Moments"),
        (lambda: frechet_distance(Moments.of(x), y[:, :3]), "expected as many"),
        (lambda: frechet_distance(Moments.of(x), y, x_weights=torch.ones(400)), "beside moments"),
        (lambda: kernel_inception_distance(x, y), "1000 samples"),
        (lambda: inception_score(x[:5]), "10 splits"),
        (lambda: manifolds(x[:5], y), "more than k"),
        (lambda: nearest(x, y[:2], k=3), "3 nearest"),
        (lambda: clip_scores(x, y), "expected the same"),
        (lambda: Stack().features(), "no features"),
        (lambda: Stack().add(x, torch.arange(3)), "positions"),
        (lambda: Stack().add(x, torch.zeros(400)).features(), "two samples at position 0"),
        (lambda: Stack(3).merge(Stack(4)), "expected 3"),
    ]
    for call, said in refused:
        with pytest.raises(ValueError, match=said):
            call()
