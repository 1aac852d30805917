"""VALL-E from raw recordings to speech, by the recipe's own jobs, at sizes that say nothing; and every recipe's chain of jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import load_job
from nexus_scale import main_job
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.evaluate import scores as evaluate
from tests.config.test_recipe import RECIPES

CLIPS = Path(__file__).parents[1] / "fixtures" / "speech" / "clips.csv"
SMALL = {"hidden_size": 16, "depth": 1, "num_heads": 2, "codebook_size": 16, "num_codebooks": 3}
EVERY = {
    "callbacks": {
        "checkpoint": {"every": 1},
        "samples": {"every": 2, "count": 1},
        "validate": {"every": 2, "samples": 2},
    }
}
CODEC = {
    "steps": 2,
    "global_batch": 2,
    "networks": {
        "model": {"hidden_channels": 8, "mlp_channels": 16, "encoder_depth": 1, "decoder_depth": 1, "latent_channels": 8,
                  "num_codebooks": 3, "codebook_size": 16, "kmeans_iterations": 1},
    },
    "objective": {"books_begin": 0},
    "data": {"validation": None},
    "prepare": [],  # the recordings are there; its own would be other ones
    **EVERY,
}  # fmt: skip


def outputs(recipe: recipes.Recipe, root: Path) -> list[str]:
    """What the jobs of a recipe make, and those of recipes that a job trains."""
    made = []
    for job in recipe.prepare:
        if job.job == "train":
            trained = recipes.load_recipe(job.options["recipe"])
            assert trained.name == job.options.get("run")
            made += outputs(trained, root)
            continue
        assert not load_job(job.job).done(**job.options, data_root=root, runs_root=root)
        made.append(str(job.options["output"]))
    return made


@pytest.mark.parametrize("name", [name for name in RECIPES if recipes.load_recipe(name).prepare])
def test_the_jobs_of_a_recipe_take_their_options_and_make_what_it_reads(name: str, tmp_path: Path) -> None:
    recipe = recipes.load_recipe(name)
    made = outputs(recipe, tmp_path)
    for split in (recipe.data.train, recipe.data.validation):
        for source in split.sources if split else []:
            for folder in source.folders:
                assert any(folder == output or folder.startswith(f"{output}/") for output in made), folder


SIZES = {"latent_channels", "num_codebooks", "codebook_size", "num_mels"}
"""What a recipe's networks share with what encodes its data."""


def learns_what_a_job_encodes(name: str) -> bool:
    """Whether a job of the recipe trains its data's encoder, and not a teacher that draws them."""
    recipe = recipes.load_recipe(name)
    trained = {job.options["run"] for job in recipe.prepare if job.job == "train"}
    return any(isinstance(spec, dict) and spec.get("run") in trained for spec in recipe.data.encoders.values())


@pytest.mark.parametrize("name", [name for name in RECIPES if learns_what_a_job_encodes(name)])
def test_a_recipe_fits_the_encoder_that_its_jobs_train(name: str) -> None:
    recipe = recipes.load_recipe(name)
    encoders = {
        job.options["run"]: recipes.load_recipe(job.options["recipe"]) for job in recipe.prepare if job.job == "train"
    }
    compared = 0
    objective = recipe.objective.arguments
    given = [network.arguments for network in recipe.built().values()] + [
        objective,
        *objective.get("streams", {}).values(),
    ]
    for spec in recipe.data.encoders.values():
        if isinstance(spec, dict) and spec.get("run") in encoders:
            its = dict(encoders[spec["run"]].trained()["model"].arguments)
            its |= {"codebook_size": 2 ** its["bits"]} if "bits" in its else {}
            for key in SIZES & set(its):
                values = [arguments[key] for arguments in given if key in arguments]
                first = key == "num_codebooks" and objective.get(key, its[key]) < its[key]  # of codes that have more
                assert not values or its[key] in values or first, f"{key}: {values}, its encoder's is {its[key]}"
                compared += len(values)
    assert compared, "nothing of its networks is its encoder's"


def reading(job: recipes.Job) -> recipes.Job | None:
    """A job of the recipe for five recordings of three speakers, of which none is held out."""
    options = dict(job.options)
    if job.job == "synthesise_speech" or "heldout" in str(options.get("input", "")):
        return None
    if job.job == "ingest_speech":
        options |= {"source": {"path": str(CLIPS)}, "heldout": 0}
    if job.job == "train":
        options["set"] = CODEC
    return recipes.Job.model_validate({"job": job.job, **options})


@pytest.mark.slow
@pytest.mark.ray
def test_recordings_become_speech(tmp_path: Path) -> None:
    """Every job of the recipe, both trainings, VALL-E's by two workers, too, samples; a second start makes nothing again, a codec that
    changed is refused."""
    places = [f"cluster.paths.{kind}={tmp_path / kind}" for kind in ("data", "runs")]
    target = main_job.resolve("valle/tiny_speech", [*places, "cluster.workers=0"])
    jobs = [kept for job in target.recipe.prepare if (kept := reading(job)) is not None]
    small: dict[str, Any] = {
        "steps": 2,
        "global_batch": 2,
        "networks": {"ar": {k: v for k, v in SMALL.items() if k != "num_codebooks"}, "nar": SMALL},
        "objective": {"num_codebooks": 3, "codebook_size": 16},
        "data": {"validation": None},
        "sample": {"max_tokens": 12},
        **EVERY,
    }
    values = recipes.merge(recipes.dump(target.recipe.model_copy(update={"prepare": jobs})), small)
    target = dataclasses.replace(target, recipe=recipes.recipe_from(values, "test"))
    main_job.train_target(target)
    two = dataclasses.replace(
        target,
        recipe=recipes.recipe_from(recipes.merge(values, {"callbacks": {"validate": None}}), "test"),
        cluster=target.cluster.model_copy(update={"workers": 2}),
        place=dataclasses.replace(target.place, run=RunFolder(tmp_path / "runs" / "two")),
    )
    main_job.train_target(two)
    assert len(list(two.place.run.samples.glob("step_00000002*.wav"))) == 1, "drawn by both, written by one"
    assert sorted(file.suffix for file in target.place.run.samples.glob("step_00000002*")) == [".json", ".png", ".wav"]
    assert "<audio" in target.place.run.report.read_text()

    before = {p: p.stat().st_mtime_ns for p in target.place.data_root.rglob("*") if p.is_file()}
    main_job.prepare(target)
    assert {p: p.stat().st_mtime_ns for p in target.place.data_root.rglob("*") if p.is_file()} == before and before

    said = evaluate.draw_prompts(target.place, ["It was a quiet day."], speaker="2", output=tmp_path / "said")
    assert (said / "000_it-was-a-quiet-day.wav").stat().st_size > 44
    other = recipes.merge(recipes.dump(target.recipe), {"data": {"encoders": {"phonemes": {"language": "en-gb"}}}})
    with pytest.raises(UserError, match="field 'phonemes'"):
        main_job.check_data(dataclasses.replace(target, recipe=recipes.recipe_from(other, "test")))
