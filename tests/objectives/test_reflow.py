"""Rectified flow's three runs through the real program on made-up data: a flow, the pairs that it draws, a flow of those pairs from its
weights, and one step from noise to sample."""

from __future__ import annotations

import pytest
import torch

from data_pipelines import generate_samples
from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.contracts import RunFolder
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.engine.checkpoint import newest_of
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.train import Place, train
from tests.generate.test_prompts import CALLBACKS, IN_PROCESS, trained_on_made_up_data

PAIRS = "pairs"
STEPS = {
    "steps": 50,
    "global_batch": 16,
    "optimizer": {"lr": 1e-2, "schedule": {"name": "constant", "warmup_steps": 0}},
    "networks": {"ema": {"decay": 0.9}},
}


def begun_from(first: Place, name: str) -> Place:
    """The tiny form of a recipe, on the pairs of the first run and from its weights."""
    recipe = recipes.dump(recipes.load_recipe(name, STEPS, tiny=True))
    recipe["networks"]["model"]["init_from"] = {"format": "run", "path": first.run.path.name, "weights": "ema"}
    recipe["data"]["synthetic"], split = None, {"sources": [{"folders": [PAIRS]}]}
    recipe["data"] |= {"train": split, "validation": split}
    made = recipes.recipe_from({**recipe, "callbacks": CALLBACKS}, "test")
    place = Place(RunFolder(first.runs_root / name.replace("/", "_")), first.data_root, first.runs_root)
    train(made, IN_PROCESS, place, make_draw)
    write_yaml(place.run.recipe, recipes.dump(made))
    write_yaml(place.run.cluster, recipes.dump(IN_PROCESS))
    return place


def error(place: Place, cond: dict[str, torch.Tensor], noise: torch.Tensor, x0: torch.Tensor) -> float:
    """Of one step from noise to sample."""
    trained = Trained(place.run, place)
    denoise = trained.objective.predictor(trained.nets, cond)
    with torch.no_grad():
        return float((denoise(noise, torch.ones(len(noise)))[0] - x0).square().mean())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = trained_on_made_up_data(tmp_path_factory.mktemp("reflow"), "rectified_flow/tiny_fashion_mnist", **STEPS)
    generate_samples.run(
        run=place.run.path.name, output=PAIRS, per_class=2, latents=True, workers=0, steps=8,
        data_root=place.data_root, runs_root=place.runs_root,
    )  # fmt: skip
    return place


@pytest.mark.parametrize(
    "name", ["rectified_flow/tiny_fashion_mnist_reflow", "rectified_flow/tiny_fashion_mnist_distilled"]
)
def test_pairs_that_a_run_draws_train_the_next_one(name: str, first: Place) -> None:
    second = begun_from(first, name)
    folder = Dataset.open([Source([first.data_root / PAIRS])])
    batch = next(folder.fixed(20, batch=20)).on("cpu")
    pair = {"label": batch["label"]}, batch["noise"], batch["latents"]
    assert error(second, *pair) < 0.5 * error(first, *pair), "one step lies nearer to what many steps drew"
    assert newest_of(second.run).step == STEPS["steps"]
    drawn = Trained(second.run, second).latents({"label": torch.arange(3)}, seed=1)
    assert drawn.shape == (3, 3, 8, 8) and bool(drawn.isfinite().all())
