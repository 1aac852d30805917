"""Whether recipes draw: samplers against paths and targets, several sizes and text encoders, tiny runs, and what is refused at once."""

from __future__ import annotations

import inspect
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines import precompute_text
from nexus_scale import main_job
from nexus_scale.config import recipe as recipes
from nexus_scale.config import registry
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import MaskSampler, NoiseSampler, RunFolder, TokenSampler, UserError, Word
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.generate import drawing
from nexus_scale.generate.drawing import check_sampling
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives import denoising
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.gaussian import TARGETS, coefficients
from nexus_scale.processes.paths import PATHS, find_path
from nexus_scale.rehearsal.batches import check_numbers, rehearse_validation
from nexus_scale.train import Place, make_objective, open_data, rehearse, train
from tests.config.test_every_recipe import distinct
from tests.config.test_recipe import RECIPES
from tests.data.test_aspect_ratios import SIZES, write_data
from tests.tiny_encoders import save_text_encoder

IN_PROCESS = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")


def tiny(name: str = "mmdit/tiny_openmoji", **changed: Any) -> Recipe:
    return recipes.load_recipe(name, changed, tiny=True)


def other(recipe: Recipe, **parts: Any) -> Recipe:
    """A recipe with whole parts replaced."""
    return recipes.recipe_from({**recipes.dump(recipe), **parts}, "test")


# ------------------------------------------------------------------------------------------------- what fits

WALKS: tuple[dict[str, Any], ...] = (
    *({"name": "ode", "method": m, "spacing": s} for m in ("euler", "heun") for s in ("linspace", "trailing")),
    *({"name": "ancestral", "variance": v, "spacing": s} for v in ("small", "large", "none") for s in ("linspace", "leading", "trailing")),
    *({"name": "dpm", "spacing": s} for s in ("linspace", "leading", "trailing")),
)  # fmt: skip
PROCESSES: tuple[dict[str, Any], ...] = (
    # gvp and the sigmoid end as vp_cosine does, the other chains as ddpm_linear
    *({"name": name} for name in PATHS if name not in ("gvp", "vp_sigmoid", "ddpm_cosine", "ddpm_sigmoid")),
    {"name": "scaled_linear", "zero_terminal_snr": False},
)
GUIDANCES: tuple[Any, ...] = (1.0, 0.0, 3.0, {"scale": 3.0, "channels": 2})
DATA = 0.7
"""All data are this number: the exact network then knows eps, and what is drawn is this number."""


def exact(objective: Denoising) -> Any:
    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        time = (4 * t).exp() if objective.path.t_max != 1 else t  # EDM's networks see log sigma / 4, and x scaled
        a, b = (value.view(-1, 1, 1, 1) for value in coefficients(objective.path, objective.target, time))
        alpha, sigma = (f(time).view(-1, 1, 1, 1) for f in (objective.path.alpha, objective.path.sigma))
        x_t = x * (time.square() + 0.25).sqrt().view(-1, 1, 1, 1) if objective.path.t_max != 1 else x
        return a * DATA + b * (x_t - alpha * DATA) / sigma

    return network


def drawn(objective: Denoising, recipe: Recipe) -> Tensor:
    rng = ProgressRng(0, 0, "draw", torch.arange(2), torch.device("cpu"))
    cond = {"label": torch.zeros(2)}
    request = replace(drawing.request_of(recipe, objective), shape=(4, 2, 2))
    return objective.generate({"model": exact(objective)}, cond, request, rng).samples


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: "-".join(map(str, p.values())))
def test_whatever_passes_the_checks_draws_what_it_should_and_all_else_is_refused_with_what_fits(
    process: dict[str, Any],
) -> None:
    base = tiny()
    drew = refused = 0
    for target, walk in itertools.product(TARGETS, WALKS):
        if target == "edm" and process["name"] != "edm":
            with pytest.raises(UserError, match="needs path 'edm'"):
                Denoising(path=process, target=target, conditions=("label",))
            continue
        times = "log_normal" if process["name"] == "edm" else "discrete"
        objective = Denoising(path=process, target=target, conditions=("label",), times=times)
        for guidance in GUIDANCES if walk["spacing"] == "trailing" else GUIDANCES[:1]:
            recipe = other(base, sample={**walk, "steps": 7, "guidance": guidance})
            try:
                check_sampling(recipe, objective)
            except UserError as error:
                refused += 1
                words = str(error)
                assert repr(target) in words and walk["name"] in words and type(objective.path).__name__ in words
                assert "what fits: sample:" in words, "there is a sampler for every target on every path"
                with pytest.raises((UserError, ValueError)):
                    drawn(objective, recipe)
            else:
                drew += 1
                assert (drawn(objective, recipe) - DATA).abs().max() < 2e-2, (process, target, walk)
    path = find_path(process)
    ends_in_noise = path.t_max != 1 or bool(path.alpha(torch.ones(1)) == 0)
    assert drew and bool(refused) == ends_in_noise


def test_samplers_named_as_fitting_fit() -> None:
    objective = Denoising(path="vp_cosine", target="eps", conditions=("label",))
    with pytest.raises(UserError) as caught:
        check_sampling(other(tiny(), sample={"name": "ode", "steps": 25}), objective)
    offers = str(caught.value).split("what fits: sample: ")[1].split(";")[0].split(" or ")
    assert offers and all("leading" in offer for offer in offers), "these alone begin below t = 1"
    for offer in offers:
        fields = dict(part.split(": ") for part in offer.strip("{}").split(", "))
        check_sampling(other(tiny(), sample={**fields, "steps": 25}), objective)


@pytest.mark.parametrize(
    ("objective", "sample", "said"),
    [
        ({}, {"name": "autoregressive"}, "ancestral or .*ddim or dpm or .* ode"),
        ({}, {"name": "ancestral", "variance": "none", "steps": 1001}, "1 to 1000"),
        ({}, {"name": "ode", "steps": 10**9}, "less than or equal to 10000"),
        ({"conditions": [], "condition_noise": None}, {"name": "ode", "guidance": 2.0}, "no conditions"),
        ({"times": "log_normal"}, {"name": "ode"}, "objective.times"),
        ({"path": "ddpm_linear"}, {"name": "ancestral", "variance": "learned"}, "objective.variance: learned"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_data_are_looked_at(objective: Any, sample: Any, said: str) -> None:
    recipe = tiny()
    arguments = {**recipes.dump(recipe)["objective"], **objective}
    with pytest.raises(UserError, match=said):
        main_job.check_recipe(other(recipe, sample=sample, objective=arguments))


@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), True, {"scale": float("nan")}, {"scale": 1.0, "channels": 0}]
)
def test_guidance_is_a_finite_number(wrong: Any) -> None:
    with pytest.raises(UserError, match="finite number"):
        drawing.guidance_of(wrong)


def test_a_sampler_of_noise_does_not_speak() -> None:
    with pytest.raises(UserError, match=r"sample\.name: ode cannot draw.*autoregressive"):
        main_job.check_recipe(other(tiny("valle/tiny_speech"), sample={"name": "ode"}))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_the_rehearsal_of_its_sampler(name: str) -> None:
    recipe = recipes.load_recipe(name)
    check_sampling(recipe, make_objective(recipe, None))


@pytest.mark.parametrize("name", sorted(distinct()))
def test_every_recipe_rehearses_a_step_of_sampling_on_the_meta_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a validation, at one of its eight times, which are alike."""
    monkeypatch.setattr(denoising, "NUM_VALIDATION_TIMES", 1)
    recipe = recipes.load_recipe(name, tiny=True)
    objective = make_objective(recipe, None)
    drawing.rehearse_drawing(recipe, objective, open_data(recipe, Path()))
    rehearse_validation(recipe, objective, open_data(recipe, Path()))
    if recipe.sample is not None and hasattr(objective, "predictor"):
        wrong = other(recipe, data={**recipes.dump(recipe)["data"]})
        fields = wrong.data.synthetic.fields  # type: ignore[union-attr]
        for name in {"image", "moments", "latents", "noise", "codes"} & set(fields):  # what is drawn, and pairs of it
            fields[name]["shape"][-1 if name == "codes" else 0] *= 2
        with pytest.raises(UserError, match="cannot be drawn"):
            drawing.rehearse_drawing(wrong, objective, open_data(wrong, Path()))


# ------------------------------------------------------------------------------------------------- data that do not fit


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("mmdit/tiny_openmoji", {"objective": {"conditions": ["pooled"], "condition_noise": None, "mirror": False}}, "reads 'text'"),
        ("dit/tiny_cifar10", {"objective": {"conditions": []}}, "reads 'label'"),
        ("dit/tiny_cifar10", {"data": {"synthetic": {"fields": {"label": {"shape": [2]}}}}}, "cannot train"),
        ("dit/tiny_cifar10", {"data": {"synthetic": {"fields": {"image": {"shape": [3, 8]}}}}}, "cannot train"),
        ("mmdit/tiny_openmoji", {"data": {"synthetic": {"fields": {"text": {"shape": [6], "lengths": True}}}}}, "cannot train"),
        ("cogvideox/2b", {"data": {"synthetic": {"fields": {"moments": {"shape": [8, 3, 4]}}}}}, "cannot train"),
        ("valle/tiny_speech", {"data": {"synthetic": {"fields": {"codes": {"shape": [10]}}}}}, "cannot train"),
    ],
)  # fmt: skip
def test_data_without_what_a_network_reads_are_refused_with_a_message(name: str, changed: Any, said: str) -> None:
    recipe = recipes.load_recipe(name, changed, tiny=True)
    with pytest.raises(UserError, match=said):
        rehearse(recipe, make_objective(recipe, None), open_data(recipe, Path()))


@pytest.mark.parametrize(
    ("name", "field", "said"),
    [
        ("dit/tiny_cifar10", "label", r"networks\.model\.num_classes is 10"),
        ("valle/tiny_speech", "phonemes", r"num_phonemes is 12"),
        ("valle/tiny_speech", "codes", r"codebook_size is 16"),
    ],
)
def test_numbers_without_an_embedding_are_refused(name: str, field: str, said: str) -> None:
    recipe = recipes.load_recipe(name, tiny=True)
    objective = make_objective(recipe, None)
    check_numbers(recipe, objective, open_data(recipe, Path()))
    high = {"data": {"synthetic": {"fields": {field: {"high": 1000}}}}}
    wrong = recipes.load_recipe(name, high, tiny=True)
    with pytest.raises(UserError, match=said):
        check_numbers(wrong, objective, open_data(wrong, Path()))


# ------------------------------------------------------------------------------------------------- sizes, counts, encoders

BUCKETED = {
    "objective": {"mirror": False},
    "data": {"synthetic": None, "train": {"sources": [{"folders": ["latents", "text"]}]}},
}


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run on latents of three sizes, in pixels since nothing decodes them, that drew seven samples on its way."""
    root = tmp_path_factory.mktemp("bucketed")
    write_data(root / "data", decoder=True)
    changed = {
        **BUCKETED,
        "steps": 2,
        "callbacks": {
            "checkpoint": {"every": 2},
            "samples": {"every": 2, "count": 7},
            "validate": None,
            "metrics": None,
        },
    }
    recipe = tiny(**changed)
    recipe = other(recipe, data={**recipes.dump(recipe)["data"], "encoders": {"moments": {"folder": "kl"}}})
    place = Place(RunFolder(root / "runs" / "run"), root / "data", root / "runs")
    train(recipe, IN_PROCESS, place, make_draw)
    (place.run.path / "recipe.yaml").write_text(json.dumps(recipes.dump(recipe)))
    (place.run.path / "cluster.yaml").write_text(json.dumps(recipes.dump(IN_PROCESS)))
    return place


def test_each_sample_of_a_bucket_is_drawn_in_its_own_size(bucketed: Place) -> None:
    described = json.loads((bucketed.run.samples / "step_00000002.json").read_text())
    assert len(described["captions"]) == 7
    assert (described["height"], described["width"]) == (24, 32), (
        "cells as large as the largest of 8x8, 4x16 and 12x4 latents"
    )
    trained = Trained(bucketed.run, bucketed)
    assert {size.shape for size in trained.sizes} == {(4, *size) for size in SIZES}
    assert sum(size.samples for size in trained.sizes) == 60


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (30, 30), (100, 60)])
def test_as_many_samples_are_drawn_as_are_asked_for(bucketed: Place, count: int, expected: int) -> None:
    trained = Trained(bucketed.run, bucketed)
    draw = make_draw(trained.recipe, bucketed, trained.objective, trained.dataset)
    asked: list[int] = []

    class OneRank:
        rank, world_size, device, nets = 0, 1, torch.device("cpu"), trained.nets

        def weights(self, name: str) -> Any:
            return torch.no_grad()

    original = trained.objective.predictor  # type: ignore[attr-defined]
    trained.objective.predictor = lambda nets, cond, **given: (
        asked.append(len(next(iter(cond.values())))) or original(nets, cond, **given)
    )  # type: ignore[attr-defined]
    assert draw is not None
    samples = draw(OneRank(), count)
    assert len(samples) == expected
    assert sum(asked) == 2 * expected, "with guidance twice as many forwards, and no more"


CAPTIONS = [
    "red heart",
    "a big blue dog of the cat",
    "flag",
    "the red flag of a big red cat and a blue heart and more",
    "",
]


def test_prompts_take_the_road_of_captions_through_all_encoders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three text encoders, cut where the data were cut: what a prompt becomes is what the same caption became, to the bit."""
    data = tmp_path / "data"
    for name, kind in (("clip", "clip"), ("clip_2", "clip_plain"), ("t5", "t5")):
        save_text_encoder(data / name, kind, seed=len(name))
    specs = [{"folder": "clip"}, {"folder": "clip_2"}, {"folder": "t5"}]
    fields = [Field("caption", "txt", "text"), Field("moments", "moments.npy", "float32", (8, 8, 8))]
    with ShardWriter(data / "images" / "00000.tar", fields) as writer:
        for number, caption in enumerate(CAPTIONS):
            writer.write(f"{number:03d}", {"caption": caption, "moments": np.zeros((8, 8, 8), np.float32)})
    finish_folder(data / "images")
    places = {"data_root": data, "runs_root": tmp_path / "runs"}
    precompute_text.run(input="images", output="text", encoders=specs, max_tokens=7, workers=0, **places)

    base = recipes.load_recipe("mmdit/sd3_2b", tiny=True)
    values = recipes.dump(base)
    values["networks"]["model"].update(text_dim=20, pooled_dim=14)
    values["data"] = {
        "train": {"sources": [{"folders": ["images", "text"]}]}, "text_tokens": 9, "encoders": {"text": specs},
    }  # fmt: skip
    values |= {"steps": 1, "callbacks": {"checkpoint": {"every": 1}}, "global_batch": 2}
    recipe = recipes.recipe_from(values, "test")
    place = Place(RunFolder(tmp_path / "runs" / "run"), data, tmp_path / "runs")
    train(recipe, IN_PROCESS, place, make_draw)
    (place.run.path / "recipe.yaml").write_text(json.dumps(recipes.dump(recipe)))
    (place.run.path / "cluster.yaml").write_text(json.dumps(recipes.dump(IN_PROCESS)))

    trained = Trained(place.run, place)
    cond = trained.conditions(CAPTIONS)
    (batch,) = trained.dataset.fixed(len(CAPTIONS), batch=len(CAPTIONS))
    at, given = batch.samples, batch.on("cpu")
    names = {"text", "text_2", "text_3", "pooled", "pooled_2"}
    assert set(cond) == names | {"text_mask", "text_2_mask", "text_3_mask"}
    for name, value in cond.items():
        assert torch.equal(value[at], given[name]), name
    assert int(cond["text_3_mask"][3].sum()) == 7, "the data were cut at seven tokens"
    assert "of 5 texts are longer than the 7 tokens that are read as text_3: cut" in caplog.text
    drawn = trained.latents(cond, seed=0, steps=1, guidance=3.0)
    assert drawn.shape == (5, 4, 8, 8) and bool(drawn.isfinite().all())

    save_text_encoder(data / "t5", "t5", seed=9)
    with pytest.raises(UserError, match="data of encoder"):
        Trained(place.run, place).conditions(["red heart"])


def test_labels_of_shards_are_looked_at_before_a_run(tmp_path: Path) -> None:
    fields = [Field("image", "image.npy", "float32", (3, 8, 8)), Field("label", "cls", "int64", ())]
    with ShardWriter(tmp_path / "data/set/00000.tar", fields) as writer:
        for number in range(300):
            writer.write(
                f"{number:03d}", {"image": np.zeros((3, 8, 8), np.float32), "label": number % 10 + (number == 299)}
            )
    finish_folder(tmp_path / "data/set")
    values = recipes.dump(recipes.load_recipe("dit/tiny_cifar10", tiny=True))
    values["data"] = {"train": {"sources": [{"folders": ["set"]}]}}
    recipe = recipes.recipe_from(values, "test")
    dataset = open_data(recipe, tmp_path / "data")
    with pytest.raises(
        UserError, match=r"'label' has the number 10, and networks\.model\.num_classes is 10: expected 0 to 9"
    ) as caught:
        check_numbers(recipe, make_objective(recipe, None), dataset)
    assert caught.value.code == 3
    assert [size.shape for size in drawing.sizes_of(dataset, make_objective(recipe, None))] == [(3, 8, 8)]


def test_sizes_that_a_network_cannot_take_are_found_before_training(tmp_path: Path) -> None:
    """The first samples fit; one of a rarer bucket has an odd side."""
    fields = [Field("image", "image.npy", "float32", (3, None, None)), Field("label", "cls", "int64", ())]
    with ShardWriter(tmp_path / "data/set/00000.tar", fields) as writer:
        for number in range(60):
            size = (3, 16, 10) if number == 59 else (3, 16, 16)
            writer.write(f"{number:03d}", {"image": np.zeros(size, np.float32), "label": 0})
    finish_folder(tmp_path / "data/set")
    values = recipes.dump(recipes.load_recipe("vae/tiny_openmoji", tiny=True))
    values["data"] = {"train": {"sources": [{"folders": ["set"]}]}}
    recipe = recipes.recipe_from(values, "test")
    with pytest.raises(UserError, match=r"cannot train 'model' on these data \(image \(1, 3, 16, 10\)"):
        rehearse(recipe, make_objective(recipe, None), open_data(recipe, tmp_path / "data"))


def test_held_out_data_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    write_data(tmp_path / "data", decoder=True)
    write_data(tmp_path / "data" / "other", text_dim=20)
    data = {**BUCKETED["data"], "encoders": {"moments": {"folder": "kl"}}}
    for folders, said in (
        (["other/latents", "other/text"], r"data\.validation: .* cannot validate on these data .*text \(2, 6, 20\)"),
        (["latents"], r"data\.validation: .* reads \['text', 'pooled'\], which these data lack"),
    ):
        recipe = tiny(objective={"mirror": False}, data={**data, "validation": {"sources": [{"folders": folders}]}})
        place = Place(RunFolder(tmp_path / "runs" / "run"), tmp_path / "data", tmp_path / "runs")
        data_of = open_data(recipe, place.data_root, "validation")
        with pytest.raises(UserError, match=said):
            rehearse_validation(recipe, make_objective(recipe, None), data_of)


# ------------------------------------------------------------------------------------------------- what is declared


@pytest.mark.parametrize("name", sorted(registry.names("samplers")))
def test_every_sampler_has_what_the_protocol_says(name: str) -> None:
    sampler = drawing.sampler_of(tiny(), named=drawing.sampler_named(name))
    assert sampler.steps >= 1
    expected = {"denoise": NoiseSampler, "logits": TokenSampler, "masks": MaskSampler}[sampler.walks]
    own, declared = (inspect.signature(one.sample).parameters for one in (type(sampler), expected))
    assert list(own) == list(declared), "any of them can take another's place"
    assert sampler.walks != "denoise" or isinstance(sampler.learns_variance, bool)


@pytest.mark.parametrize(
    "name", ["mmdit/tiny_openmoji", "flux/dev", "vae/tiny_openmoji", "codec/tiny_speech", "valle/tiny_speech"]
)
def test_every_family_declares_what_it_draws(name: str) -> None:
    recipe = tiny(name)
    draws = make_objective(recipe, None).draws
    assert draws is not None
    assert draws.takes <= set(get_args(Word)) and draws.makes in (*recipe.data.synthetic.fields, "moments")
    assert bool(draws.conditions) == ("prompt" in draws.takes)
    assert (draws.walks != "") == ("sampler" in draws.takes) == (recipe.sample is not None)
    for word in get_args(Word):
        if word in draws.takes:
            drawing.refuse(recipe, draws, {f"--{word}": word})
            continue
        with pytest.raises(UserError, match=f"^--{word}: recipe {recipe.name} .*; leave it out$"):
            drawing.refuse(recipe, draws, {f"--{word}": word})
