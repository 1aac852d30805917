"""What a run draws is measured while it trains: known spreads, known modes, a collapse; by two ranks as by one; and it changes no bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines import load_job
from data_pipelines.class_images import LabelledImages, write_splits
from nexus_scale.callbacks.made import check_files
from nexus_scale.callbacks.monitor import Against, Modes, Monitor
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Objective, Progress, RunFolder, StepInfo, UserError
from nexus_scale.engine import distributed
from nexus_scale.generate.trained import make_draw
from nexus_scale.io import incidents
from nexus_scale.io.rows import read_rows
from nexus_scale.metrics.diversity import diversity, grid_of_modes, mode_coverage, small
from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.train import Place, train
from tests.distributed import run_ranks
from tests.generate.test_drawing import IN_PROCESS

# ------------------------------------------------------------------------------------------------- figures


def test_diversity_is_the_deviation_within_a_condition() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    assert diversity(x) == pytest.approx(float(x.double().var(0).mean().sqrt()), rel=1e-12)
    groups = torch.arange(60) % 3
    apart = x + 100.0 * groups[:, None]
    within = torch.stack([apart[groups == g].double().var(0) for g in range(3)]).mean().sqrt()
    assert diversity(apart, groups) == pytest.approx(float(within), rel=1e-9), "what conditions do is no variety"
    assert diversity(torch.ones(4, 3)) == 0.0 and diversity(groups[:, None].float(), groups) == 0.0
    assert small(torch.ones(2, 3, 40, 8)).shape == (2, 3 * 16 * 8) and small(torch.ones(2, 7)).shape == (2, 7)


def test_a_mode_is_reached_by_a_sample_within_its_radius() -> None:
    centres = grid_of_modes(Modes().side, Modes().spacing)
    assert centres.shape == (25, 2) and centres.mean(0).tolist() == [0, 0] and float(centres.max()) == 4.0
    samples = torch.cat([centres[:20], centres[:20] + 0.1, centres[20:] + torch.tensor([0.3, 0.0])])
    assert mode_coverage(samples, centres, 0.15) == (20, pytest.approx(40 / 45))
    assert mode_coverage(centres, centres, 0.15) == (25, 1.0)


# ------------------------------------------------------------------------------------------------- the callback


class Draws:
    """In place of what draws: points around 0 whose deviation a test sets, the same for any number of ranks."""

    spread = 1.0

    def own(self, engine: Any, count: int, anew: bool = False) -> Iterator[tuple[Batch, Tensor]]:
        each = -(-5 // engine.world_size)
        for begin in range(0, count, 5):
            own = begin + torch.arange(engine.rank * each, (engine.rank + 1) * each).clamp(max=4)
            all_points = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
            fields = {"image": all_points[own], "label": own % 2}
            yield Batch(fields, own, own), all_points[own] * self.spread

    def decoded(self, samples: Tensor) -> Tensor:
        raise AssertionError("no classifier looks at them")


class Points(Objective):
    from nexus_scale.contracts import Draws as _Draws

    draws = _Draws("image", conditions=("label",))


class Ranks:
    def __init__(self, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")


def monitor(run: RunFolder, draws: Draws, **given: Any) -> Monitor:
    arguments = {"every": 10, "samples": 30, "objective": Points(), "data_root": None, "context": {}, **given}
    return Monitor(draw=draws, run=run, stage=lambda name: None, **arguments)


def at(step: int, engine: Any) -> StepInfo:
    return StepInfo(step, 1000, {}, engine, Progress(step=step))


def test_a_collapse_warns_once_and_again_after_it_recovered_and_is_known_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, draws, engine = RunFolder(tmp_path), Draws(), Ranks()
    watch = monitor(run, draws)

    def go(spreads: dict[int, float]) -> list[int]:
        for step, spread in spreads.items():
            draws.spread = spread
            watch.after_step(at(step, engine))
        watch.close()
        return [row["step"] for row in incidents.read(run.path) if row["kind"] == "collapse"]

    watch.before_run(engine, Progress())
    with caplog.at_level(logging.WARNING):
        # at the start samples are alike; more varied than the data is no level to keep
        assert go({10: 0.05, 15: 0.0, 20: 3.0, 30: 0.6, 40: 0.45, 50: 0.1}) == [40]
    assert "samples have collapsed: at step 40 their diversity is" in caplog.text
    watch = monitor(run, draws)
    watch.before_run(engine, Progress(step=50))
    assert go({60: 0.1}) == [40], "a resumed run has said it already"
    watch = monitor(run, draws)
    watch.before_run(engine, Progress(step=60))
    assert go({70: 0.9, 80: 0.2}) == [40, 80]
    rows = list(read_rows(tmp_path / "monitor.jsonl"))
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert rows[1]["diversity"] == pytest.approx(3 * rows[1]["diversity_real"], rel=1e-6)
    watch = monitor(run, draws, collapse=0.0)
    watch.before_run(engine, Progress(step=60))
    assert go({70: 0.001}) == [40, 80], "0 warns of nothing"


class OddOnRank1(Draws):
    """Rank 1 draws points in space."""

    def own(self, engine: Any, count: int, anew: bool = False) -> Iterator[tuple[Batch, Tensor]]:
        for batch, points in super().own(engine, count, anew):
            yield batch, torch.cat([points, points], dim=1) if engine.rank else points


def measured(rank: int, world_size: int) -> dict[str, float]:
    engine: Any = Ranks(rank, world_size)
    watch = monitor(RunFolder(Path("none")), Draws(), modes=Modes(side=3, spacing=1.0, radius=0.3))
    found = watch.measure(engine, Draws())
    assert (found is None) == (distributed.rank() > 0)
    if world_size > 1:  # no rank waits for another that has found a mistake
        with pytest.raises(UserError, match="samples have 4 values" if rank else "another worker found a mistake"):
            watch.measure(engine, OddOnRank1())
        with pytest.raises(UserError, match=r"samples are \(4,\) here" if rank else r"samples are \(2,\) here"):
            monitor(RunFolder(Path("none")), Draws()).measure(engine, OddOnRank1())
    return found or {}


def test_two_ranks_measure_what_one_does() -> None:
    alone = measured(0, 1)
    assert set(alone) == {"diversity", "diversity_real", "modes", "in_modes"} and alone["modes"] > 2
    assert run_ranks(2, measured)[0] == alone, "each sample once, in one order, though two do not divide five"


@pytest.mark.parametrize(
    ("given", "said"),
    [({"collapse": 1.0}, "collapse: got 1; expected a share"), ({"samples": 1}, "samples: got 1; expected at least 2")],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        monitor(RunFolder(Path("none")), Draws(), **given)


# ------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Light and dark images of 16 pixels, and the classifier that tells them apart."""
    root = tmp_path_factory.mktemp("monitored") / "data"
    splits = {}
    for seed, (name, count) in enumerate({"train": 48, "heldout": 24}.items()):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        pixels = torch.randint(0, 128, (count, 16, 16, 3), generator=generator) + 120 * labels.view(-1, 1, 1, 1)
        splits[name] = LabelledImages(pixels.to(torch.uint8).numpy(), labels.numpy())
    write_splits(root / "shades", splits, ("dark", "light"), licence="none", attribution="made up", progress=None)
    (root / "score.yaml").write_text(
        json.dumps(
            {
                "score": {
                    "train": "shades/train/images", "heldout": "shades/heldout/images", "classifier_networks": 1,
                    "classifier_steps": 3,
                }
            }
        )
    )  # fmt: skip
    options = {"score": str(root / "score.yaml"), "output": "classifier"}
    job, roots = load_job("train_classifier"), {"data_root": root, "runs_root": root.parent / "runs"}
    assert not job.done(**options, **roots)
    job.run(**options, **roots)
    assert job.done(**options, **roots)
    return root


def test_the_named_classifier_tells_real_images_from_others(data_root: Path) -> None:
    against = Against(data_root / "classifier", torch.device("cpu"))
    torch.manual_seed(0)
    noise = torch.rand(24, 3, 16, 16) * 2 - 1
    dark = torch.randint(0, 128, (24, 3, 16, 16)) / 127.5 - 1
    dark[1::2] += 120 / 127.5
    near, far = (frechet_distance(against.features(images), against.real) for images in (dark, noise))
    assert len(against.real) == 24 and near < 0.5 * far
    recipe = recipes.load_recipe("wgan_gp/tiny_fashion_mnist", {"callbacks": {"monitor": {"classifier": "nowhere"}}})
    with pytest.raises(UserError, match="train_classifier") as caught:
        check_files(recipe, data_root)
    assert caught.value.code == 3, "before a worker starts"
    for other in ((3, 8, 8), (2,)):
        with pytest.raises(UserError, match=r"takes images \(3, 16, 16\), or clips of them; the run draws"):
            against.features(torch.zeros(4, *other))


def test_a_monitored_run_has_the_bits_of_one_that_is_not_and_shows_its_figures(data_root: Path, tmp_path: Path) -> None:
    folders = {"train": "shades/train/images", "validation": "shades/heldout/images"}
    changed = {
        "steps": 2, "prepare": [], "networks": {name: {"image_size": 16} for name in ("model", "critic")},
        "data": {"synthetic": None, **{split: {"sources": [{"folders": [f]}]} for split, f in folders.items()}},
    }  # fmt: skip
    found = {}
    for name in ("plain", "watched"):
        recipe = recipes.load_recipe("gan/tiny_fashion_mnist", changed, tiny=True)
        callbacks: dict[str, Any] = {"checkpoint": {"every": 2}, "metrics": {"every": 1, "progress": False}}
        if name == "watched":
            callbacks["monitor"] = {"every": 1, "samples": 24, "classifier": "classifier"}
        recipe = recipes.recipe_from({**recipes.dump(recipe), "callbacks": callbacks}, "test")
        place = Place(RunFolder(tmp_path / name), data_root, tmp_path)
        train(recipe, IN_PROCESS, place, make_draw)
        found[name] = {file.name: file.read_bytes() for file in place.run.checkpoints.rglob("*.safetensors")}
    assert found["plain"] and found["plain"] == found["watched"]
    rows = list(read_rows(tmp_path / "watched" / "monitor.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["frechet"] > 0 and rows[0]["frechet"] != rows[1]["frechet"] and rows[0]["diversity_real"] > 0.2
    metrics = list(read_rows(tmp_path / "watched" / "metrics.jsonl"))
    assert metrics[-1]["monitor/frechet"] == pytest.approx(rows[-1]["frechet"])
