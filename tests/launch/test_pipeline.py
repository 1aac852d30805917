"""From the shipped images to samples, scores, report and export, in one process and few steps: every joint of the quickstart."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nexus_scale import main_job
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import UserError
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.report.page import write_report

pytestmark = pytest.mark.slow

FEW = {
    "steps": 20,
    "callbacks": {
        "samples": {"every": 20, "count": 4},
        "validate": {"every": 20, "samples": 32},
        "checkpoint": {"every": 20},
    },
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> main_job.Target:
    """The quickstart's recipe after a few steps of each of its two trainings."""
    root = tmp_path_factory.mktemp("pipeline")
    paths = [
        f"cluster.paths.data={root / 'data'}",
        f"cluster.paths.runs={root / 'runs'}",
        "cluster.workers=0",
        "global_batch=16",
    ]
    made = main_job.resolve("mmdit/tiny_openmoji", paths)
    jobs = [
        recipes.Job.model_validate({**job.model_dump(), "set": FEW} if job.job == "train" else job.model_dump())
        for job in made.recipe.prepare
    ]
    recipe = recipes.recipe_from(
        recipes.merge(recipes.dump(made.recipe.model_copy(update={"prepare": jobs})), FEW), "test"
    )
    made = dataclasses.replace(made, recipe=recipe)
    main_job.train_target(made)
    return made


def test_a_second_start_makes_nothing_again(target: main_job.Target) -> None:
    before = {p: p.stat().st_mtime_ns for p in target.place.data_root.rglob("*") if p.is_file()}
    main_job.prepare(target)
    assert {p: p.stat().st_mtime_ns for p in target.place.data_root.rglob("*") if p.is_file()} == before and before


def test_prompts_become_pictures(target: main_job.Target) -> None:
    folder = evaluate.draw_prompts(target.place, ["red heart", "../flag/<b>"], steps=4, seed=1)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["000_red-heart.png", "001_flag-b.png", "grid.png"]
    assert Image.open(folder / names[0]).size == (32, 32)
    again = evaluate.draw_prompts(target.place, ["red heart"], steps=4, seed=1, output=folder / "again")
    assert np.array_equal(np.asarray(Image.open(folder / names[0])), np.asarray(Image.open(again / names[0])))
    with pytest.raises(UserError, match="at least one prompt"):
        evaluate.draw_prompts(target.place, [])


def test_held_out_prompts_were_never_trained_on(target: main_job.Target) -> None:
    data = target.place.data_root / "openmoji-32"
    seen = evaluate._real(target.place.data_root, "openmoji-32/train/images").captions
    real = evaluate._real(target.place.data_root, "openmoji-32/heldout/images")
    prompts, wanted = evaluate.held_out_prompts(real.labels, real.captions, 42)
    assert len(prompts) == 252 and torch.bincount(wanted).tolist() == [42] * 6
    assert len(set(prompts)) >= 6 * 21, "each at most twice"
    assert not set(prompts) & set(seen) and len(set(real.groups)) == 6 and data.is_dir()


def test_scores_and_report(target: main_job.Target, caplog: pytest.LogCaptureFixture) -> None:
    settings = evaluate.ScoreSettings(
        train="openmoji-32/train/images",
        heldout="openmoji-32/heldout/images",
        samples_per_group=4,
        steps=3,
        least_real_accuracy=0.7,
        classifier_networks=1,
        classifier_steps=200,
    )
    with caplog.at_level(logging.INFO, "nexus_scale.evaluate.scores"):
        scores = evaluate.score_groups(target.place, settings)
    assert any("the classifier learns: step " in line for line in caplog.messages), (
        "it says every few seconds how far it is"
    )
    assert scores["samples"] == 24 and scores["real_accuracy"] >= settings.least_real_accuracy and scores["counts"]
    assert 0 <= scores["group_accuracy"] <= 1
    # After 20 steps it draws mud: real images are nearest to real ones, and nothing is nearer than they are.
    assert scores["frechet_real"] < min(scores["frechet"], scores["frechet_grey"], scores["frechet_noise"])
    write_report(target.place.run)
    results = json.loads(target.place.run.results.read_text())
    assert results["group_accuracy"] == scores["group_accuracy"] and results["real_accuracy"] == scores["real_accuracy"]
    assert results["steps"] == 20 and 0 < results["validation_loss_ratio"] < 1.1


def test_diffusers_draws_the_same_latents_from_the_export(target: main_job.Target, tmp_path: Path) -> None:
    folder = evaluate.export_run(target.place, "diffusers", tmp_path / "export")
    trained = Trained(target.place.run, target.place)
    cond = trained.conditions(["grinning face"])
    ours = trained.latents(cond, seed=3, steps=8, guidance=3.0)
    noise = ProgressRng(3, 0, "sample", torch.arange(1), torch.device("cpu")).normal("noise", trained.shape)
    real = int(cond["text_mask"].sum())
    np.savez(
        tmp_path / "in.npz", noise=noise.numpy(), text=cond["text"][:, :real].numpy(), pooled=cond["pooled"].numpy()
    )
    script = f"""
import numpy as np, torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
model = SD3Transformer2DModel.from_pretrained({str(folder)!r}).eval()
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained({str(folder / "scheduler")!r})
given = np.load({str(tmp_path / "in.npz")!r})
x, text, pooled = (torch.from_numpy(given[k]) for k in ("noise", "text", "pooled"))
scheduler.set_timesteps(8)
with torch.no_grad():
    for t in scheduler.timesteps:
        t1 = t.reshape(1)
        v = model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t1, return_dict=False)[0]
        nothing = dict(encoder_hidden_states=torch.zeros(1, 1, text.shape[2]), pooled_projections=torch.zeros_like(pooled))
        null = model(x, **nothing, timestep=t1, return_dict=False)[0]
        x = scheduler.step(null + 3.0 * (v - null), t, x, return_dict=False)[0]
np.save({str(tmp_path / "out.npy")!r}, x.numpy())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    theirs = torch.from_numpy(np.load(tmp_path / "out.npy"))
    # Relative to the way from the noise, which after a few steps of training is short.
    assert float((ours - theirs).norm() / (theirs - noise).norm()) < 1e-4


def test_training_refuses_data_of_another_encoder(target: main_job.Target) -> None:
    other = recipes.merge(
        recipes.dump(target.recipe), {"data": {"encoders": {"moments": {"run": "other_vae"}}}, "prepare": []}
    )
    vae = target.place.runs_root / "vae_tiny_openmoji_8"
    copy = target.place.runs_root / "other_vae"
    job = next(job for job in target.recipe.prepare if job.job == "train")
    changed = recipes.Job.model_validate({**job.model_dump(), "run": "other_vae", "set": {**FEW, "seed": 7}})
    main_job._train_before(changed, target)
    assert vae.is_dir() and copy.is_dir()
    with pytest.raises(UserError, match=r"expected .* of .*moments") as caught:
        main_job.check_data(dataclasses.replace(target, recipe=recipes.recipe_from(other, "test")))
    assert caught.value.code == 3
