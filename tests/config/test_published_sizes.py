"""The large recipes have the parameters and the FLOPs of the released models: those of diffusers' classes, counted on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import network_class
from nexus_scale.interop.published import family
from nexus_scale.rehearsal.costs import costs
from nexus_scale.rehearsal.flops import count

diffusers = pytest.importorskip("diffusers")

# recipe, diffusers' class, billions of parameters
RELEASED = [
    ("mmdit/sd3_2b", "SD3Transformer2DModel", 2.03),
    ("flux/dev", "FluxTransformer2DModel", 11.90),
    ("cogvideox/2b", "CogVideoXTransformer3DModel", 1.69),
    ("cogvideox/5b", "CogVideoXTransformer3DModel", 5.57),
    ("pixart/512", "PixArtTransformer2DModel", 0.61),
    ("pixart/1024", "PixArtTransformer2DModel", 0.61),
    ("stable_diffusion/sd15", "UNet2DConditionModel", 0.86),
    ("stable_diffusion/sd21", "UNet2DConditionModel", 0.87),
    ("stable_diffusion/sdxl", "UNet2DConditionModel", 2.57),
]


def theirs_on_inputs(model: torch.nn.Module, net: Any, text_tokens: int) -> int:
    """FLOPs of diffusers' model on what our recipe's network is counted on."""
    x, t, cond = net.example_inputs(1, text_tokens, torch.device("meta"))
    text = cond["text"]
    if isinstance(model, diffusers.CogVideoXTransformer3DModel):
        frames, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        turns = net.rotation(frames, height, width, torch.device("meta")) if net.positions == "rotary" else None
        # they turn whole pairs: each angle stands twice
        turned = None if turns is None else tuple(part.repeat_interleave(2, dim=1) for part in turns)
        given: dict[str, Any] = {"image_rotary_emb": turned}
        return count(
            lambda *_: model(x.transpose(1, 2), text, t, return_dict=False, **given), x
        ).flops  # fmt: skip
    if isinstance(model, diffusers.UNet2DConditionModel):
        told = (
            {"text_embeds": cond["pooled"], "time_ids": torch.zeros(1, 6, device="meta")} if "pooled" in cond else None
        )
        return count(lambda *_: model(x, t, text, added_cond_kwargs=told, return_dict=False), x).flops
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return count(lambda *_: model(x, text, cond["pooled"], t, return_dict=False), x).flops
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        sizes, ratio = (
            (cond[name].float() for name in ("original_size", "target_size")) if net.micro_conditions else (None, None)
        )
        added = {"resolution": sizes, "aspect_ratio": None if ratio is None else ratio[:, :1]}
        return count(lambda *_: model(x, text, t, added_cond_kwargs=added, return_dict=False), x).flops
    places = (x.shape[2] // 2) * (x.shape[3] // 2)
    guidance = t if net.guidance_embed else None
    return count(
        lambda *_: model(
            torch.zeros(1, places, 4 * x.shape[1], device="meta"), text, cond["pooled"], t,
            torch.zeros(places, 3, device="meta"), torch.zeros(text_tokens, 3, device="meta"), guidance, return_dict=False,
        ),
        x,
    ).flops  # fmt: skip


@pytest.mark.parametrize(("name", "class_name", "billions"), RELEASED, ids=[name for name, _, _ in RELEASED])
def test_recipes_have_the_released_parameters_and_flops(name: str, class_name: str, billions: float) -> None:
    recipe = recipes.load_recipe(name)
    spec = recipe.trained()["model"]
    cls, arguments = network_class(spec)
    with torch.device("meta"):
        net = cls(**arguments)
    parameters = sum(p.numel() for p in net.parameters())
    assert round(parameters / 1e9, 2) == billions
    config, _ = family(spec.name).formats["diffusers"].to_theirs(net.state_dict(), arguments)
    with torch.device("meta"):
        model = getattr(diffusers, class_name).from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    tokens = recipe.data.text_tokens or 77
    ours = costs(recipe)["flops_per_sample"] / 3
    assert ours == pytest.approx(theirs_on_inputs(model, net, tokens), rel=1e-3)


def test_the_autoencoders_recipe_is_the_released_network() -> None:
    spec = recipes.load_recipe("vae/cogvideox").trained()["model"]
    cls, arguments = network_class(spec)
    with torch.device("meta"):
        net = cls(**arguments)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 215.6
    assert recipes.load_recipe("vae/cogvideox").objective.arguments["latent_shape"] == list(net.latent_shape)


def test_the_recipe_of_stable_diffusions_autoencoder_fits_its_latents() -> None:
    recipe = recipes.load_recipe("vae/sd_f8")
    cls, arguments = network_class(recipe.trained()["model"])
    with torch.device("meta"):
        net = cls(**arguments)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 83.65
    assert recipe.objective.arguments["latent_shape"] == list(net.latent_shape)
