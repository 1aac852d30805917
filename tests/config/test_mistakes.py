"""A user's mistakes: found before any worker starts, named by key, and without a trace in the run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale import main_job, train
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Phase, UserError
from nexus_scale.kernels import choice
from nexus_scale.rehearsal.batches import phases_to_check
from tests.config.test_recipe import RECIPES

IN_PROCESS = ["cluster.workers=0", "steps=2", "callbacks.samples=null"]


def resolved(root: Path, *overrides: str) -> main_job.Target:
    roots = [f"cluster.paths.runs={root / 'runs'}", f"cluster.paths.data={root / 'data'}"]
    return main_job.resolve("mmdit/tiny_openmoji", [*IN_PROCESS, *roots, *overrides], tiny=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["networks.ema.decay=abc"], "networks.ema.decay: input should be a valid number"),
        (["networks.ema.decay=1.5"], "networks.ema.decay: input should be less than 1; got 1.5"),
        (["networks.ema.dcay=0.5"], "did you mean 'decay'"),
        (["networks.model.frozen=maybe"], "networks.model.frozen: input should be a valid boolean"),
        (["networks.model.frozen=true"], "networks.ema.average_of: no trained network 'model'"),
        (["networks.model.optimizer.lr=abc"], "networks.model.optimizer.lr: input should be a valid number"),
        (["networks.model.optimizer.rate=1"], "unknown key 'networks.model.optimizer.rate'"),
        (["networks.model.from=elsewhere"], "networks.model.from: unknown key of MMDiT"),
        (["networks.model.num_heads=3"], "32 is not a multiple of num_heads = 3"),
        (["networks.model.depth=0"], "mmdit.depth: got 0"),
        (["objective.path=straight"], "path: no 'straight'"),
        (["sample.guidance=much"], "sample.guidance: got 'much'"),
        (["sample.steps=0"], "steps"),
        (["callbacks.metrics.every=0"], "callbacks.metrics.every: input should be greater than 0; got 0"),
        (["callbacks.stragglers.every=1"], "callbacks.stragglers.every: input should be greater than or equal to 2"),
        (["callbacks.guard.patience=-1"], "callbacks.guard.patience: input should be greater than 0; got -1"),
        (["callbacks.checkpoint.keep=0"], "callbacks.checkpoint.keep: input should be greater than 0; got 0"),
        (["callbacks.checkpoint.to=ftp://x/y"], "got scheme 'ftp', expected one of s3"),
        (["callbacks.checkpoint.to=s3://key:canary@x/y"], "callbacks.checkpoint.to: looks like a secret"),
        (["cluster.workers=2", "cluster.engine=local"], "engine local is one process; set workers to 0"),
        (["cluster.workers=2", "cluster.zero_stage=2"], "set zero_stage to 3, or engine to replicated"),
        (["cluster.kernels.attention=flsh"], "did you mean 'flash_attn'"),
        (["cluster.kernels.attn=sdpa"], "did you mean 'attention'"),
        (["cluster.micro_batch=0"], "micro_batch: expected auto, or a number from 1 to 1,000,000,000; got 0"),
        (["cluster.micro_batch=automatic"], "micro_batch: input should be a valid integer or 'auto' or null"),
        (["seed=-1"], "seed: input should be greater than or equal to 0"),
        (["run="], "plain name"),
        (["run=.hidden"], "plain name"),
        (["run=two words"], "plain name"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_by_its_key(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolved(tmp_path, *overrides)
    assert words in str(caught.value) and caught.value.code == 2
    assert "canary" not in str(caught.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["networks.model.latent_channels=5"], "latents have 4 channels, the network takes 5; set latent_channels"),
        (["networks.model.text_dim=99"], "text has 24 channels, the network takes 99; set text_dim"),
        (["data.synthetic.fields.moments.shape=[3]"], "moments (2, 3)"),
    ],
    ids=["channels", "text", "axes"],
)
def test_data_and_networks_that_do_not_fit_are_found_without_a_worker(
    overrides: list[str], words: str, tmp_path: Path
) -> None:
    target = resolved(tmp_path, *overrides)
    with pytest.raises(UserError) as caught:
        main_job.train_target(target)
    assert words in str(caught.value) and caught.value.code == 2
    run = target.place.run
    assert not run.recipe.exists() and not run.environment.exists(), "the name is free for the corrected recipe"
    main_job.train_target(resolved(tmp_path))
    assert run.results.is_file()


def distinct() -> list[str]:
    """One recipe for each identity of their tiny form."""
    return sorted({recipes.recipe_hash(recipes.load_recipe(n, tiny=True)): n for n in reversed(RECIPES)}.values())


@pytest.mark.parametrize("name", distinct())
def test_every_recipe_is_rehearsed_to_its_end(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All phases of every family through its networks by shapes alone; what asks for a value would say so."""
    recipe = recipes.load_recipe(name, tiny=True)
    dataset = train.open_data(recipe, tmp_path)
    objective = train.make_objective(recipe, dataset.latent_stats)
    called: list[str] = []
    loss = objective.loss
    monkeypatch.setattr(objective, "loss", lambda phase, *given: called.append(phase) or loss(phase, *given))
    before = choice.report()
    with caplog.at_level(logging.DEBUG, "nexus_scale.train"):
        train.rehearse(recipe, objective, dataset)
    expected = [phase.name for _, phases in phases_to_check(objective, recipe.steps) for phase in phases]
    assert called == expected and not caplog.records
    assert choice.report() == before, "kernels of the training are chosen as if there had been no rehearsal"


def test_what_begins_later_is_checked_before_a_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", {"steps": 1000}, tiny=True)
    dataset = train.open_data(recipe, tmp_path)
    objective = train.make_objective(recipe, dataset.latent_stats)
    main, late = objective.phases(0)[0], Phase("late", trains="critic")
    monkeypatch.setattr(objective, "phases", lambda step: (main, late) if step >= 700 else (main,))
    with pytest.raises(UserError, match=r"trains 'critic' \(at step 999\)"):
        train.check_fields(recipe, objective, dataset)
    late = Phase("late", trains="model")
    loss = objective.loss

    def wrong(phase: str, *given: Any) -> Any:
        if phase == "late":
            raise ValueError("sizes do not fit")
        return loss(phase, *given)

    monkeypatch.setattr(objective, "loss", wrong)
    with pytest.raises(UserError, match=r"cannot train 'model' on these data \(at step 999\).*sizes do not fit"):
        train.rehearse(recipe, objective, dataset)


def test_a_loss_that_asks_for_values_is_rehearsed_as_far_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)
    dataset = train.open_data(recipe, tmp_path)
    objective = train.make_objective(recipe, None)
    monkeypatch.setattr(objective, "loss", lambda phase, nets, batch, rng, step: float(batch["moments"].sum()))
    train.rehearse(recipe, objective, dataset)
    monkeypatch.setattr(objective, "loss", lambda phase, nets, batch, rng, step: torch.zeros(3) + torch.zeros(4))
    with pytest.raises(UserError, match="objective denoising cannot train 'model'"):
        train.rehearse(recipe, objective, dataset)


def test_a_file_that_is_no_text_and_a_run_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\x80\x81")
    with pytest.raises(UserError, match=r"bytes\.yaml: cannot be read as text"):
        main_job.resolve(str(tmp_path / "bytes.yaml"))
    main_job.train_target(resolved(tmp_path))
    with pytest.raises(UserError, match="did you mean 'mmdit_tiny_openmoji_tiny'") as caught:
        main_job.resolve(str(tmp_path / "runs" / "mmdit_tiny"))
    assert caught.value.code == 5


def test_a_warm_up_longer_than_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolved(tmp_path, "steps=60", "optimizer.schedule.warmup_steps=50")
    assert "warmup_steps" not in caplog.text
    resolved(tmp_path, "steps=40", "optimizer.schedule.warmup_steps=50")
    assert "warmup_steps is 50 but the run has 40 steps" in caplog.text


def test_a_tiny_block_is_not_blamed_for_its_few_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resolved(tmp_path).recipe.optimizer.schedule.warmup_steps > resolved(tmp_path).recipe.steps
    assert "warmup_steps" not in caplog.text


def test_a_dry_run_says_what_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus_scale.dry_run import describe

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    words = "cluster.gpus_per_worker"
    assert "code 4" not in describe(resolved(tmp_path, f"{words}=1"))
    assert "local_cpu asks for 2 GPUs per machine, this one has 1" in describe(resolved(tmp_path, f"{words}=2"))


@pytest.mark.parametrize("name", ["text", "layers", "linear", "convnext"])
def test_a_part_of_networks_is_no_network(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no '|a part that networks are made of"):
        resolved(tmp_path, f"networks.model={{name: {name}}}")
