"""A consistency model to and from diffusers' ConsistencyModelPipeline: a folder comes in, draws the same, trains a step, and goes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.callbacks.made import SERVICES
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import UserError
from nexus_scale.generate.export import export_run
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.schedulers import consistency
from nexus_scale.interop.unet import DIFFUSERS, FAMILY
from nexus_scale.models.diffusion.unet import UNet
from tests.media.test_latent_space import start

diffusers = pytest.importorskip("diffusers")

RECIPE = "consistency/cd_imagenet64"
L2: dict[str, Any] = {"objective": {"distance": "l2", "distils": False}}


def published(folder: Path) -> Any:
    """A pipeline of diffusers with random weights, small as the tiny recipe, saved there."""
    args = recipes.load_recipe(RECIPE, tiny=True).trained()["model"].arguments
    torch.manual_seed(0)
    net = UNet(**args)
    state = {name: 0.2 * torch.randn(p.shape) for name, p in net.state_dict().items()}
    DIFFUSERS.write(folder / "alone", state, args)
    unet = diffusers.UNet2DModel.from_pretrained(folder / "alone", local_files_only=True)
    pipeline = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
    pipeline.save_pretrained(folder / "published")
    return pipeline


def drawn_by(pipeline: Any, noises: list[Tensor], labels: list[int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Samples in [-1, 1] of given noise: the first, and that of each step beside."""
    from diffusers.schedulers import scheduling_consistency_models as module

    rest = iter([*noises[1:], torch.zeros_like(noises[0])])
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(rest))
    pipeline.set_progress_bar_config(disable=True)
    made: Tensor = pipeline(
        batch_size=len(labels),
        class_labels=labels,
        num_inference_steps=len(noises),
        latents=noises[0],
        output_type="pt",
    ).images
    return made * 2 - 1


def test_a_folder_comes_in_draws_the_same_and_goes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = published(tmp_path)
    source = {"init_from": {"format": "diffusers", "path": "published"}}
    changes: dict[str, Any] = {
        **L2,
        "networks": {"model": source},
        "optimizer": {"lr": 1e-30, "weight_decay": 0.0},
        "steps": 1,
        "callbacks": {"checkpoint": {"every": 1}, "samples": None, "validate": None},
    }
    recipe = recipes.load_recipe(RECIPE, changes, tiny=True)
    recipes.check(recipe, SERVICES)
    place = start(recipe, tmp_path, "run")

    back = diffusers.ConsistencyModelPipeline.from_pretrained(export_run(place), local_files_only=True)
    for name, value in theirs.unet.state_dict().items():
        torch.testing.assert_close(back.unet.state_dict()[name], value, rtol=1e-6, atol=0, msg=name)
    assert back.scheduler.config.num_train_timesteps == 40 and back.scheduler.config.clip_denoised

    trained, labels = Trained(place.run, place), [3, 0]
    for steps in (1, 2, 4):
        noises: dict[str, Tensor] = {}
        original = trained.objective.generate

        def recorded(
            nets: Any, cond: Any, request: Any, rng: Any, noises: Any = noises, original: Any = original
        ) -> Any:
            draw = rng.normal

            def normal(name: str, shape: Any) -> Tensor:
                return noises.setdefault(name, draw(name, shape))

            monkeypatch.setattr(rng, "normal", normal)
            return original(nets, cond, request, rng)

        monkeypatch.setattr(trained.objective, "generate", recorded)
        ours = trained.latents({"label": torch.tensor(labels)}, seed=3, steps=steps)
        monkeypatch.setattr(trained.objective, "generate", original)
        assert len(noises) == steps
        for pipeline in (theirs, back):
            drawn = drawn_by(pipeline, list(noises.values()), labels, monkeypatch)
            assert float((ours.clamp(-1, 1) - drawn).abs().max()) < 2e-5


def test_what_the_pipeline_cannot_draw_is_refused() -> None:
    assert consistency({"scales": 10, "scales_end": 80, "double_every": 5}, {})["num_train_timesteps"] == 80
    with pytest.raises(UserError, match="sampler consistency; this recipe draws with heun"):
        consistency({}, {"name": "heun"})
    prepared = FAMILY.pipelines["consistency"].prepared
    assert prepared is not None
    with pytest.raises(UserError, match="counts_steps: false"):
        prepared({}, {})
