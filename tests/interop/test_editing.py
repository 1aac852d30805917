"""InstructPix2Pix: an 8-channel U-Net from diffusers learns, and draws what diffusers' pipeline draws under two guidance scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nexus_scale.contracts import UserError
from nexus_scale.generate.controls import controls_of
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.unet_condition import DIFFUSERS
from tests.interop import test_stable_diffusion as sd
from tests.media.test_latent_space import latents, recipe_of, start

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_edits_under_two_guidance_scales_are_the_pipelines(tmp_path: Path) -> None:
    parts = sd.parts_of(tmp_path, ("clip_plain",), in_channels=8, out_channels=4)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, **sd.UNGUARDED)
    pipeline.save_pretrained(tmp_path / "published")
    sd.write_images(tmp_path / "images")
    for name in ("latents", "sources"):
        latents(tmp_path, "images", name, "published")
    encoders = {"folder": "published/text_encoder", "pad_to": 10, "dtype": "float32", **sd.ONE[0][1]}
    sd.write_text(tmp_path, [{**encoders}], 8)
    arguments = DIFFUSERS.model_args(json.loads((tmp_path / "published/unet/config.json").read_text()))
    network = {"name": "unet_condition", **{key: value for key, value in arguments.items() if value is not None}}
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={"model": {**network, "init_from": {"format": "diffusers", "path": "published"}}},
        objective={
            "name": "editing", "path": sd.PATH, "target": "eps", "times": "discrete", "conditions": ["text", "source"],
            "condition_drop": {"text": 0.3, "source": 0.3, "text+source": 0.3},
        },
        sample=sd.DDIM,
        optimizer={"name": "adamw", "lr": 1e-30, "weight_decay": 0.0, "schedule": {"name": "constant", "warmup_steps": 0}},
        data={"train": {"sources": [{"folders": ["latents", "text"], "named": {"source": "sources"}}]}, "text_tokens": 10,
              "encoders": {"moments": {"folder": "published"}, "text": encoders}},
    )  # fmt: skip
    place = start(recipe, tmp_path, "edits")
    trained = Trained(place.run, place)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "in.png")
    source = sd.of_two(controls_of(trained, trained.shape, [str(tmp_path / "in.png")]))
    cond = trained.conditions(sd.PROMPTS)
    negative = {**trained.conditioned.negative(sd.NEGATIVE, cond), **source}
    noise = sd.noise_of(trained)
    found = {}
    for image in (1.0, 1.5):
        guidance = trained.guidance({"scale": 4.0, "image": image})
        found[image] = trained.latents({**cond, **source}, seed=3, guidance=guidance, negative=negative)
        expected = sd.theirs(
            pipeline, image=picture, image_guidance_scale=image, latents=noise, negative_prompt=[sd.NEGATIVE] * 2,
            height=None, width=None,
        )  # fmt: skip
        sd.close(found[image], expected, noise)
    assert float((found[1.0] - found[1.5]).norm() / found[1.0].norm()) > 1e-3
    assert request_of(trained.recipe, trained.objective, guidance=guidance).guidance.is_double
    with pytest.raises(UserError, match="give --control FILE"):
        controls_of(trained, trained.shape, [])
    folder = sd.exported(trained, pipeline, tmp_path / "export")
    assert type(folder).__name__ == "StableDiffusionInstructPix2PixPipeline"
