"""The scoreboard: equal compute, rows, claims, and mistakes that are said before anything is trained."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from data_pipelines.class_images import LabelledImages, write_splits
from nexus_scale.bench import claims, scoreboard
from nexus_scale.conditioners.label import LabelConditioner
from nexus_scale.config.recipe import load_recipe
from nexus_scale.contracts import Batch, UserError
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained
from nexus_scale.metrics import classifier
from nexus_scale.planner.losses import flops_of_step
from nexus_scale.rehearsal.costs import costs
from tests.golden import pythae_trained

SMALL = {"latent_size": 16, "hidden_size": 16, "depth": 1, "num_heads": 1, "num_classes": 2}
OVERRIDES = [
    *(f"networks.model.{key}={value}" for key, value in SMALL.items()),
    "global_batch=8",
    "prepare=[]",
    "callbacks={validate: {every: 1, samples: 4}, checkpoint: {}}",
]
AT_ONCE = {
    "recipe": "gan/tiny_fashion_mnist",
    "run": "at_once",
    "steps": 2,
    "overrides": [
        *(f"networks.{name}.{key}={value}" for name in ("model", "critic")
          for key, value in {"image_size": 16, "hidden_size": 4, "depth": 1, "num_classes": 0}.items()),
        "objective.conditions=[]",
        "global_batch=4",
        "prepare=[]",
        "callbacks={validate: {every: 1, samples: 4}, monitor: {every: 1, samples: 4}, checkpoint: {}}",
    ],
}  # fmt: skip


def settings(folder: Path, **changed: Any) -> str:
    """A board of two small runs on red and blue squares; the path of its file."""
    score = {"train": "fashion-mnist/train/images", "heldout": "fashion-mnist/heldout/images", "samples_per_group": 2}
    (folder / "score.yaml").write_text(
        yaml.safe_dump({"score": {**score, "classifier_networks": 1, "classifier_steps": 40}})
    )
    entry = {"recipe": "dit/tiny_fashion_mnist", "overrides": OVERRIDES, "draws": [{"steps": 4}, {"steps": 1}]}
    board = {
        "score": str(folder / "score.yaml"),
        "teraflops": 4e-5,
        "cluster": "in_process",
        "entries": [{**entry, "run": "one"}, {**entry, "run": "two", "compute": 2.0}, AT_ONCE],
        "claims": [
            {"claim": "straighter", "of": "one", "than": "two", "steps": 4},
            {"claim": "follows", "of": "at_once", "metric": "diversity", "other": "diversity", "correlation": 0.0},
        ],
    }
    (folder / "board.yaml").write_text(yaml.safe_dump({"scoreboard": {**board, **changed}}))
    return str(folder / "board.yaml")


def test_a_board_trains_draws_scores_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.zeros((24, 16, 16, 3), np.uint8)
    labels = np.arange(24) % 2
    colours[labels == 0, ..., 0] = colours[labels == 1, ..., 2] = 200
    split = LabelledImages(colours + np.arange(24, dtype=np.uint8)[:, None, None, None], labels)
    data = tmp_path / "board/data/fashion-mnist"
    write_splits(data, {"train": split, "heldout": split}, ["red", "blue"], licence="CC0-1.0", attribution="none")
    small = functools.partial(classifier.train_classifier, num_filters=16, num_components=16, width=8, views=3)
    monkeypatch.setattr(evaluate.classifiers, "train_classifier", small)
    told: list[str] = []
    rows, outcomes = scoreboard.scoreboard(settings(tmp_path), tmp_path / "board", told.append)
    ways = [*((run, {"steps": steps}) for run in ("one", "two") for steps in (4, 1)), ("at_once", {})]
    assert [(row["run"], row["draws"]) for row in rows] == ways
    assert len(told) == 5 and told[0].startswith("one (steps 4): ") and rows[0]["accuracy_of_real"] == 1.0
    assert rows[4]["accuracy"] is None and told[4].startswith("at_once (as the recipe says): Fréchet distance"), (
        "nobody asked it for a group"
    )
    assert rows[2]["train_steps"] == 2 * rows[0]["train_steps"] > 2, "twice the compute"
    assert abs(rows[0]["train_teraflops"] - 4e-5) <= 4e-5 / rows[0]["train_steps"]
    assert rows[0]["distance_to_most_steps"] == 0 < rows[1]["distance_to_most_steps"]
    assert all(Path(row["strip"]).stat().st_size > 0 for row in rows) and rows[0]["frechet"] > rows[0]["frechet_real"]
    assert [one.holds for one in outcomes] == [False, True] and outcomes[0].figures == [0.0, 0.0]
    kept = json.loads((tmp_path / "board/scoreboard.json").read_text())
    assert [row["run"] for row in kept["rows"]] == ["one", "one", "two", "two", "at_once"] and len(kept["claims"]) == 2
    written = (tmp_path / "board/runs/two/validation.jsonl").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(scoreboard, "rows_of", None)  # nothing is drawn twice
        again, outcomes = scoreboard.scoreboard(settings(tmp_path, claims=[]), tmp_path / "board")
    assert again == rows and outcomes == []
    assert (tmp_path / "board/runs/two/validation.jsonl").stat().st_mtime_ns == written, "nothing is trained twice"

    board = scoreboard.read_board(settings(tmp_path))
    place = scoreboard.resolved(board.entries[0], board, tmp_path / "board").place
    trained = Trained(place.run, place)
    reference = evaluate.Reference.read(place, evaluate.score_settings(board.score), trained.decoded_shape)
    named = evaluate.drawn_of(trained, reference, steps=1)
    trained.conditioned.label = LabelConditioner({}, 2)  # as where data name no classes: samples that a reflow learns
    assert torch.equal(evaluate.drawn_of(trained, reference, steps=1), named)


ONE = {"recipe": "dit/tiny_fashion_mnist", "run": "one"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teraflops": -1}, "teraflops"),
        ({"entries": [ONE, ONE]}, "two entries are the run 'one'"),
        ({"claims": [{"claim": "better", "of": "one", "than": "tow", "steps": 1}]}, "about the run 'tow'.*two"),
        (
            {"claims": [{"claim": "better", "of": "one", "than": "two", "steps": 2}]},
            "one in 2 steps; it is drawn in 1, 4",
        ),
        ({"claims": [{"claim": "nicer", "of": "one", "than": "two"}]}, "better"),
        ({"entries": [{**ONE, "draws": [{"sampler": "nothing"}]}]}, "nothing"),
        ({"entries": [{"recipe": "gan/tiny_fashion_mnist", "draws": [{"steps": 3}]}]}, "draws.steps"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        scoreboard.scoreboard(settings(tmp_path, **{"claims": [], **changed}), tmp_path / "board")
    assert not (tmp_path / "board").exists()


def test_compute_counts_every_network_that_a_loss_calls() -> None:
    def sample(batch: int = 1) -> Batch:
        place = torch.arange(batch)
        return Batch(
            {"image": torch.zeros(batch, 3, 28, 28), "label": torch.zeros(batch, dtype=torch.int64)}, place, place
        )

    dit = load_recipe("dit/tiny_fashion_mnist")
    forward = costs(dit)["flops_per_sample"] / 3 * dit.global_batch
    # Three forwards, but for what the first layers need no gradient of: their inputs.
    assert 2.8 * forward < flops_of_step(dit, sample()) <= 3 * forward
    consistency = load_recipe("consistency/tiny_fashion_mnist")
    assert 3.8 * forward < flops_of_step(consistency, sample()) <= 4 * forward, "the target's forward"
    assert flops_of_step(load_recipe("gan/tiny_fashion_mnist"), sample()) > 0, "gradients that a loss takes itself"


def test_what_claims_say() -> None:
    curves = {
        "fast": [{"step": 0, "loss": 1.0}, {"step": 10, "loss": 0.5}],
        "slow": [{"step": s, "loss": 1 - s / 40} for s in (0, 10, 20)],
    }
    earlier = claims.Earlier(claim="earlier", of="fast", than="slow", part=1.0)
    assert earlier.outcome([], curves) == claims.Outcome(earlier.outcome([], curves).claim, True, [10.0, 20.0])
    assert not claims.Earlier(claim="earlier", of="slow", than="fast").outcome([], curves).holds
    assert (
        claims.first_below(curves["fast"], "loss", 0.75) == 5.0
        and claims.first_below(curves["slow"], "loss", 0.1) is None
    )
    rows = [{"run": run, "draws": {"steps": 1}, "frechet": value} for run, value in (("fast", 2.0), ("slow", 3.0))]
    assert claims.Better(claim="better", of="fast", than="slow", steps=1).outcome(rows, {}).holds
    assert not claims.Better(claim="better", of="slow", than="fast", steps=1).outcome(rows, {}).holds
    with pytest.raises(UserError, match="fast in 2 steps; it is drawn in 1"):
        claims.Better(claim="better", of="fast", than="slow", steps=2).outcome(rows, {})
    with pytest.raises(UserError, match="fast without steps; it is drawn in 1"):
        claims.Better(claim="better", of="fast", than="slow").outcome(rows, {})
    at_once = [{"run": run, "draws": {}, "frechet": value} for run, value in (("fast", 2.0), ("slow", 3.0))]
    assert claims.Better(claim="better", of="fast", than="slow").outcome(at_once, {}).holds
    assert claims.Lower(claim="lower", of="fast", than="slow", metric="loss").outcome([], curves).figures == [0.5, 0.5]
    near = claims.Near(claim="near", of="fast", metric="loss", value=0.6, within=0.2)
    assert near.outcome([], curves).holds and near.outcome([], curves).figures == [0.5, 0.6]
    assert not near.model_copy(update={"within": 0.05}).outcome([], curves).holds
    with pytest.raises(UserError, match=r"'kl' of fast, which its validations do not have; they have \['loss'\]"):
        claims.Lower(claim="lower", of="fast", than="slow", metric="kl").outcome([], curves)


def test_a_claim_that_figures_go_together_is_spearmans_correlation() -> None:
    x, y = [3.0, 1.0, 2.0, 2.0, 9.0], [0.1, 0.5, 0.4, 0.2, 0.0]
    assert claims.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert (
        claims.rank_correlation(x, [v**3 for v in x]) == pytest.approx(1.0)
        and claims.rank_correlation([1, 1], [1, 2]) == 0.0
    )
    rows = [{"step": s, "loss": -(9.0 - s), "frechet": 90.0 - s} for s in range(9)] + [{"step": 9, "loss": 0.0}]
    curves = {"critic": [{"step": -1, "loss": 50.0, "frechet": 99.0}, *rows]}
    falls = claims.Follows(claim="follows", of="critic", metric="loss", correlation=-0.8, after=0)
    assert falls.outcome([], curves).holds and falls.outcome([], curves).figures == pytest.approx([-1.0, -0.8])
    assert not claims.Follows(claim="follows", of="critic", metric="loss", after=0).outcome([], curves).holds
    with pytest.raises(UserError, match="about the run 'critc'; did you mean 'critic'"):
        claims.Follows(claim="follows", of="critc", metric="loss").check({"critic": []}, "board")


@pytest.mark.parametrize(
    ("shipped", "jobs"),
    [
        ("scoreboard", {"fetch_fashion_mnist", "generate_samples"}),
        ("scoreboard_latent", {"fetch_fashion_mnist", "train_classifier"}),
    ],
)
def test_a_shipped_board_can_be_trained_and_drawn(shipped: str, jobs: set[str]) -> None:
    board = scoreboard.read_board(shipped)
    targets = [scoreboard.checked(entry, board, Path("board")) for entry in board.entries]
    names = [target.place.run.path.name for target in targets]
    assert len(set(names)) == len(names) > 8 and len(board.claims) > 2
    drawn = {name: [way.asked for way in entry.draws] for name, entry in zip(names, board.entries, strict=True)}
    for claim in board.claims:
        claim.check(drawn, shipped)
    prepared = {job.job for target in targets for job in target.recipe.prepare}
    assert prepared == jobs, "what the board trains itself is no recipe's own job"
    trained = json.loads(pythae_trained.FILE.read_text())
    steps = {name: entry.steps for name, entry in zip(names, board.entries, strict=True)}
    for claim in board.claims:
        if isinstance(claim, claims.Near):
            assert steps[claim.of] == trained["steps"] and claim.value == round(trained[claim.metric], 1)
