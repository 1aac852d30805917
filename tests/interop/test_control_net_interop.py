"""A ControlNet over Stable Diffusion's published folder: it begins with its weights, learns, and draws what diffusers' pipeline draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import precompute_controls
from nexus_scale.config.recipe import network_class
from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import Batch, UserError
from nexus_scale.evaluate.filling import FillingSettings, score_filling
from nexus_scale.evaluate.following import FollowingSettings, score_following
from nexus_scale.generate import export
from nexus_scale.generate.controls import control_named, controls_of
from nexus_scale.generate.given import Given, given_of
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.init_from import opened
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.pictures import to_uint8
from tests.interop import test_stable_diffusion as sd
from tests.media.test_latent_space import recipe_of, start

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_it_learns_over_published_weights_and_its_folder_draws_the_same_in_diffusers(tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline(**sd.parts_of(tmp_path, ("clip_plain",)), **sd.UNGUARDED)
    pipeline.save_pretrained(tmp_path / "published")
    first = sd.trained_from(tmp_path, {"name": "denoising", "conditions": ["text"]})
    precompute_controls.run(output="edges", input="images", workers=0, data_root=tmp_path, runs_root=tmp_path)
    published = {"format": "diffusers", "path": "published"}
    base = {key: value for key, value in network_class(first.recipe.networks["model"])[1].items() if value is not None}
    data = first.recipe.model_dump(mode="json")["data"]
    data["train"]["sources"][0]["named"] = {"control": "edges"}
    data["validation"] = {"sources": data["train"]["sources"]}
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={
            "base": {**base, "name": "unet_condition", "frozen": True, "init_from": published},
            "model": {"adapts": "base", "name": "unet_control_net", "condition_widths": [4, 6], "init_from": published},
            "ema": {"average_of": "model"},
        },
        objective={
            "path": sd.PATH, "target": "eps", "times": "discrete", "name": "denoising", "conditions": ["text", "control"],
            "condition_drop": {"text": 0.5},
        },
        sample=sd.DDIM,
        optimizer={"name": "adamw", "lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 0}},
        data=data,
    )  # fmt: skip
    place = start(recipe, tmp_path, "controlled")
    trained = Trained(place.run, place)
    edges = np.random.default_rng(1).integers(0, 2, (16, 16, 1), np.uint8).repeat(3, 2) * 255
    Image.fromarray(edges).save(tmp_path / "edges.png")
    cond = controls_of(trained, trained.shape, [f"{tmp_path / 'edges.png'}:scale=0.7"])
    noise, told = sd.noise_of(trained), {"negative_prompt": [sd.NEGATIVE] * 2}
    ours, plain = sd.drawn(trained, Given({}, cond, 1.0)), sd.drawn(first)
    assert float((ours - plain).norm() / plain.norm()) > 0.02, "it has learnt something"
    unheard = controls_of(trained, trained.shape, [f"control={tmp_path / 'edges.png'}:scale=1,interval=[1.5,2]"])
    torch.testing.assert_close(sd.drawn(trained, Given({}, unheard, 1.0)), plain)  # at no time it is the base
    _keeps_what_is_not_masked(first, pipeline, tmp_path)
    folder = export.export_run(place, None, tmp_path / "export")
    net = diffusers.ControlNetModel.from_pretrained(folder)
    controlled = diffusers.StableDiffusionControlNetPipeline(**{**pipeline.components, **sd.UNGUARDED}, controlnet=net)
    given = {"image": [Image.fromarray(edges)] * 2, "controlnet_conditioning_scale": 0.7}
    sd.close(ours, sd.theirs(controlled, latents=noise, **told, **given), noise)

    found = score_following(place, FollowingSettings(samples=4, steps=2))
    assert 0 < found["overlap_decoded"] <= 1 and found["overlap"] != found["overlap_base"] and found["samples"] == 4
    alone = score_following(place, FollowingSettings(samples=4, steps=2, alone=True))
    assert alone["overlap_base"] != found["overlap_base"] and alone["overlap_decoded"] == found["overlap_decoded"]
    assert (place.run.path / "following.png").is_file()
    filled = score_filling(place, FillingSettings(samples=8, steps=2, draws=2))
    assert (
        filled["changed"] == 0
        and filled["error_mean_of_draws"] < 1.05 * filled["error"]
        and filled["error_mean"] < filled["error_others"]
    )
    assert (place.run.path / "filling.png").is_file()
    with opened(InitFrom.model_validate({**published, "path": "export"}), trained.adapters["model"], tmp_path) as read:
        for name, parameter in trained.adapters["model"].named_parameters():
            assert torch.equal(read(name, 0, parameter.numel()).view(parameter.shape), parameter), name


def _keeps_what_is_not_masked(trained: Trained, pipeline: Any, root: Path) -> None:
    """A network that knows no masks draws into a picture as diffusers' pipeline does, and its latents outside come back to the bit."""
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = np.zeros((16, 16), np.uint8)
    mask[4:13, 3:10] = 255
    picture.save(root / "in.png")
    Image.fromarray(mask).save(root / "mask.png")
    inpainting = diffusers.StableDiffusionInpaintPipeline(**{**pipeline.components, **sd.UNGUARDED})
    noise = sd.noise_of(trained)
    for strength in (1.0, 0.6):
        given = given_of(trained, trained.shape, root / "in.png", root / "mask.png", strength)
        ours = sd.drawn(trained, given)
        rng = ProgressRng(3, 0, "sample", torch.arange(2), torch.device("cpu"))
        x0 = trained.objective.clean(Batch(sd.of_two(given.given), rng.positions, rng.positions), rng)
        outside = (given.given["mask"] < 0.5).expand_as(ours)
        assert torch.equal(ours[outside], x0[outside]) and not torch.equal(ours[~outside], x0[~outside])
        assert given.kept is not None
        seen = given.kept.around(trained.decoded(ours)[0])
        assert (to_uint8(seen[None])[0].numpy()[mask == 0] == np.array(picture)[mask == 0]).all()
        if strength == 1.0:
            told = {
                "negative_prompt": [sd.NEGATIVE] * 2,
                "image": picture,
                "mask_image": Image.fromarray(mask),
                "strength": 1.0,
            }
            sd.close(ours, sd.theirs(inpainting, latents=noise, **told), noise)

    grown = given_of(trained, trained.shape, root / "in.png", None, None, grow="0,4,2,0")
    assert grown.kept is not None and grown.strength == 1.0
    assert grown.kept.drawn[0, 0, :14, :12].sum() == 0 and grown.kept.drawn.sum() == 16 * 16 - 14 * 12
    for wrong in ("0,0,0,0", "1,2,3", "9,0,9,0"):
        with pytest.raises(UserError, match="--grow"):
            given_of(trained, trained.shape, root / "in.png", None, None, grow=wrong)


def test_the_option_says_which_picture_how_much_and_when(tmp_path: Path) -> None:
    assert control_named("a b.png") == ("", Path("a b.png"), 1.0, None, False)
    assert control_named("sketch=c:/a.png:scale=0.5,interval=[0.1,1],make=true") == (
        "sketch",
        Path("c:/a.png"),
        0.5,
        (0.1, 1.0),
        True,
    )
    for wrong in ("a.png:size=2", "a.png:scale=big", "a.png:make=3", ""):
        with pytest.raises(UserError, match="--control"):
            control_named(wrong)
