"""PixArt-alpha's stages, each begun with the one before; and whole pipelines of diffusers, in and out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import network_class
from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import Guidance, RunFolder, UserError
from nexus_scale.engine.checkpoint import newest
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.interop.init_from import opened
from nexus_scale.interop.pixart import CHOSEN_STEP, DIFFUSERS, scheduler_config
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.diffusion.pixart import PixArt
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.samplers.ancestral import Ancestral
from nexus_scale.train import Place, check_first_weights, train
from tests.interop.test_pipelines import as_the_readme_says, close, noise_of, write_text
from tests.media.test_latent_space import latents, recipe_of, save_kl, start, write_images
from tests.models.test_dit_parity import error
from tests.tiny_encoders import save_text_encoder

diffusers = pytest.importorskip("diffusers")

QUIET = {"checkpoint": {"every": 1}, "samples": None, "validate": None}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def begun(name: str, begins: str | None, **changes: Any) -> recipes.Recipe:
    """A recipe's tiny form; begun with another run, it takes a step of no size."""
    if begins is not None:
        changes |= {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}, "steps": 1}
        source = {"init_from": {"format": "run", "path": begins, "weights": "model"}}
        changes["networks"] = {"model": {**changes.get("networks", {}).get("model", {}), **source}}
    return recipes.load_recipe(name, {"callbacks": QUIET, **changes}, tiny=True)


def stage(name: str, root: Path, begins: str | None = None, **changes: Any) -> tuple[Place, recipes.Recipe]:
    recipe = begun(name, begins, **changes)
    place = Place(RunFolder(root / recipe.name), root / "data", root)
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1, "precision": "float32"}, "test")
    place.run.path.mkdir()
    for path, part in ((place.run.recipe, recipe), (place.run.cluster, cluster)):
        plain_yaml.write_yaml(path, recipes.dump(part))
    train(recipe, cluster, place, make_draw)
    return place, recipe


def network_of(place: Place, recipe: recipes.Recipe, kind: str = "model/{}.fp32") -> Any:
    cls, arguments = network_class(recipe.trained()["model"])
    net = cls(**arguments)
    stored = newest(place.run.checkpoints)
    assert stored is not None
    net.load_state_dict({name: stored.tensor(kind.format(name)) for name in net.state_dict()})
    return net


def test_each_stage_begins_with_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = {"model": {"hidden_size": 24}}
    classes = stage("pixart/class_256", tmp_path, networks=wide, optimizer={"lr": 0.05}, steps=6)
    with caplog.at_level(logging.INFO, "nexus_scale.interop.init_from"):
        aligned = stage("pixart/256", tmp_path, classes[0].run.path.name)
    assert (
        "start fresh: pixart_blocks.#.cross.kv, pixart_blocks.#.cross.proj, pixart_blocks.#.cross.q, text_embed.fc1"
        in caplog.text
    )
    dit, pixart, average = network_of(*classes), network_of(*aligned), network_of(*aligned, "ema/{}.ema")
    x, text = torch.randn(3, 4, 8, 8), {"text": torch.randn(3, 6, 24)}
    t = torch.full((3,), (CHOSEN_STEP + 1) / 1000)
    with torch.no_grad():
        y = dit(x, t, {"label": torch.full((3,), dit.num_classes)})  # of no class
        assert y.abs().max() > 0.1 and (dit.dit_blocks[1].mod.linear.weight).abs().max() > 0.01
        assert error(pixart(x, t, text), y) < 1e-5 and error(average(x, t, text), y) < 1e-5
        assert error(pixart(x, t / 5, text), dit(x, t / 5, {"label": torch.full((3,), dit.num_classes)})) > 1e-4

    caplog.clear()
    with caplog.at_level(logging.INFO, "nexus_scale.interop.init_from"):
        last = stage("pixart/1024", tmp_path, "pixart_256", networks={"model": {"latent_size": 16}})
    assert "8 parameters are not there and start fresh: aspect_embed.fc1" in caplog.text
    grown = network_of(*last)
    for name, value in pixart.named_parameters():
        torch.testing.assert_close(grown.get_parameter(name), value, rtol=0, atol=1e-20, msg=name)
    assert float(grown.size_embed.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    # and so does a folder of diffusers, of a network that was told no sizes
    folder = DIFFUSERS.write(
        tmp_path / "data" / "published", pixart.state_dict(), network_class(aligned[1].trained()["model"])[1]
    )
    with opened(InitFrom(format="diffusers", path=str(folder)), grown, tmp_path) as read:
        assert torch.equal(read("pixart_blocks.1.table", 0, 144).view(6, 24), pixart.pixart_blocks[1].table)
        with pytest.raises(KeyError):
            read("size_embed.fc1.weight", 0, 1)

    for name, begins, changes, words in (
        ("pixart/256", "pixart_256", {"networks": {"model": {"depth": 3}}}, "depth is 2 there and 3 in the recipe"),
        ("pixart/256", "pixart_class_256", {"networks": {"model": {"learn_sigma": False}}, "objective": {"variance": "fixed"}},
         "learn_sigma is True there"),
        ("pixart/class_256", "pixart_256", {}, "is a PixArt and not a DiT"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check_first_weights(begun(name, begins, **changes), last[0])


# ------------------------------------------------------------------------------------------- whole pipelines

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 1,
    "caption_channels": 12,
}


def published(root: Path) -> Path:
    """A PixArtAlphaPipeline that diffusers has saved, with random weights."""
    save_kl(root / "parts" / "vae", scaling_factor=0.18215)
    save_text_encoder(root / "parts" / "t5", "t5")
    import transformers

    torch.manual_seed(5)
    transformer = diffusers.PixArtTransformer2DModel(**SIZES, sample_size=8)
    with torch.no_grad():
        for p in transformer.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(root / "parts" / "t5"),
        text_encoder=transformers.T5EncoderModel.from_pretrained(root / "parts" / "t5"),
        vae=diffusers.AutoencoderKL.from_pretrained(root / "parts" / "vae"),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    )
    pipeline.save_pretrained(root / "published")
    return root / "published"


def test_a_pipeline_is_imported_draws_the_same_trains_a_step_and_goes_out(tmp_path: Path) -> None:
    folder = published(tmp_path)
    write_images(tmp_path / "images")
    latents(tmp_path, "images", "latents", "published")
    encoder = {"folder": "published/text_encoder", "tokenizer": "published/tokenizer", "dtype": "float32"}
    write_text(tmp_path, [encoder], 8)
    network = {"name": "pixart", "latent_size": 8, "hidden_size": 24, "depth": 1, "num_heads": 2, "text_dim": 12}
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={"model": {**network, "init_from": {"format": "diffusers", "path": "published"}}},
        objective={"name": "denoising", "path": "ddpm_linear", "target": "eps", "times": "discrete", "variance": "learned",
                   "conditions": ["text"]},
        sample={"name": "dpm_multistep", "steps": 4, "spacing": "linspace", "guidance": 4.5},
        optimizer={"name": "adamw", "lr": 1e-30, "schedule": {"name": "constant", "warmup_steps": 0}},
        data={"train": {"sources": [{"folders": ["latents", "text"]}]}, "text_tokens": 8,
              "encoders": {"moments": {"folder": "published"}, "text": encoder}},
    )  # fmt: skip
    place = start(recipe, tmp_path, "pixart")
    trained = Trained(place.run, place)
    noise, texts = noise_of(trained), ["the big red dog"]
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    plain = {"use_resolution_binning": False, "clean_caption": False}

    # diffusers' own pipeline, as published, with its own padding and its own empty prompt
    theirs = diffusers.PixArtAlphaPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(texts, **plain, **options).images
    ours = trained.latents(trained.conditions(texts), seed=3, negative=trained.conditions([""]))
    close(ours, drawn, noise)

    exported = evaluate.export_run(place, "diffusers", tmp_path / "export")
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline" and index["text_encoder"] == ["transformers", "T5EncoderModel"]
    again = diffusers.DiffusionPipeline.from_pretrained(exported, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == "PixArtAlphaPipeline"
    close(again(texts, **plain, **options).images, drawn, noise)
    # and as the run was told of no text
    own = as_the_readme_says(exported)
    both = ["red heart", "the big red dog"]
    close(trained.latents(trained.conditions(both), seed=3), own(both, seed=3, output_type="latent").images, noise)
    images = own(both, seed=3, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)


def test_a_pipeline_that_is_told_sizes_draws_the_same(tmp_path: Path) -> None:
    """As the released 1024-pixel one: its network is told the size of what is drawn, as ours is."""
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae")
    save_text_encoder(tmp_path / "t5", "t5")
    network = {
        "latent_size": 128,
        "hidden_size": 24,
        "depth": 1,
        "num_heads": 2,
        "text_dim": 12,
        "micro_conditions": True,
    }
    torch.manual_seed(5)
    net = PixArt(**network)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    folder = DIFFUSERS.write(tmp_path / "export", net.state_dict(), network)
    config = scheduler_config({"path": "ddpm_linear", "target": "eps"}, {"variance": "none", "spacing": "trailing"})
    theirs = diffusers.PixArtAlphaPipeline(
        None, None, diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"),
        diffusers.PixArtTransformer2DModel.from_pretrained(folder), diffusers.DDIMScheduler.from_config(config),
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    text, mask, noise = (
        torch.randn(2, 5, 12),
        torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        torch.randn(1, 4, 8, 12),
    )
    drawn = theirs(
        None, None, prompt_embeds=text[:1], negative_prompt_embeds=text[1:], prompt_attention_mask=mask[:1],
        negative_prompt_attention_mask=mask[1:], height=16, width=24, latents=noise, num_inference_steps=4, guidance_scale=4.5,
        use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    objective = Denoising(
        path="ddpm_linear",
        target="eps",
        times="discrete",
        variance="learned",
        conditions=("text", "original_size", "target_size"),
    )
    sizes = {name: torch.tensor([[16, 24]]) for name in ("original_size", "target_size")}
    cond, away = ({"text": text[i : i + 1], "text_mask": mask[i : i + 1].bool(), **sizes} for i in (0, 1))
    sampler = Ancestral(steps=4, variance="none", spacing="trailing")
    rng = ProgressRng(0, 0, "sample", torch.arange(1), torch.device("cpu"))
    with torch.no_grad():
        ours = objective._walked(
            {"model": net},
            sampler,
            Guidance(4.5),
            objective.condition(cond),
            objective.condition(away),
            noise,
            rng,
            lambda *_: None,
        )
    close(ours, drawn, noise)
    with pytest.raises(UserError, match="leaves the variance out that its network learned"):
        scheduler_config({"path": "ddpm_linear", "target": "eps", "variance": "learned"}, {"name": "ancestral"})
