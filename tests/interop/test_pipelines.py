"""A run's export is a whole pipeline: diffusers loads it offline and draws the same, with guidance too, as its README says."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipelines import precompute_latents, precompute_text
from nexus_scale.contracts import UserError
from nexus_scale.data.shards import Field, ShardWriter, finish_folder
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.autoencoders import OwnAutoencoder, open_vae
from nexus_scale.interop.published import family
from nexus_scale.interop.schedulers import flow_match
from nexus_scale.io.durable import umask
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.layers.text import compose_text
from nexus_scale.train import Place
from tests.data_pipelines.test_precompute import save_run
from tests.media.test_latent_space import (
    CALLBACKS,
    OBJECTIVE,
    latents,
    recipe_of,
    save_kl,
    save_video_vae,
    start,
    write_clips,
    write_images,
)
from tests.tiny_encoders import save_text_encoder

diffusers = pytest.importorskip("diffusers")

CAPTIONS = ("red heart", "a big blue flag", "cat", "the big red dog")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_text(root: Path, encoders: list[dict[str, Any]], count: int) -> None:
    with ShardWriter(root / "captions" / "0.tar", [Field("caption", "txt", "text")]) as shard:
        for i in range(count):
            shard.write(f"{i}", {"caption": CAPTIONS[i % 4]})
    finish_folder(root / "captions")
    precompute_text.run(input="captions", output="text", encoders=encoders, workers=0, data_root=root, runs_root=root)


FLOW = {"name": "denoising", "path": "rectified_flow", "target": "velocity"}
SIZES = {"latent_channels": 4, "latent_size": 8, "hidden_size": 16, "num_heads": 2}


def stable_diffusion_3(
    root: Path, vae: dict[str, Any] | None = None, encoders: list[dict[str, Any]] | None = None, **changes: Any
) -> Place:
    """An MMDiT after two steps on latents of an autoencoder that states SD3's factors, and texts of two CLIPs and a T5."""
    write_images(root / "images")
    save_kl(root / "vae", scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True)
    latents(root, "images", "latents", "vae", **changes)
    for number in (0, 1):
        save_text_encoder(root / f"clip{number}", "clip", seed=number)
    save_text_encoder(root / "t5", "t5")
    encoders = encoders or [{"folder": "clip0"}, {"folder": "clip1"}, {"folder": "t5"}]
    write_text(root, encoders, 8)
    text = encoders if len(encoders) > 1 else encoders[0]
    three = len(encoders) == 3
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={"model": {"name": "mmdit", **SIZES, "depth": 2, "text_dim": 16 if three else 8, "pooled_dim": 12 if three else 6,
                            "pos_embed_max_size": 8}},
        objective={**FLOW, "conditions": ["text", "text_2", "text_3", "pooled", "pooled_2"] if three else ["text", "pooled"]},
        sample={"name": "ode", "steps": 4, "guidance": 4.0, "shift": 3.0},
        optimizer={"name": "adamw", "lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 0}},
        data={"train": {"sources": [{"folders": ["latents", "text"]}]}, "text_tokens": 8,
              "encoders": {"moments": {"folder": "vae"}, "text": text}},
    )  # fmt: skip
    return start(recipe, root, "sd3")


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def as_the_readme_says(folder: Path, without_code: bool = False) -> Any:
    """The pipeline as the README's own code loads it; with `without_code` as the section of that name does."""
    names: dict[str, Any] = {"folder": str(folder)}
    found = blocks(folder)
    exec(found[-1] if without_code else found[0], names)  # our own file, written a moment ago
    pipeline = names["plain" if without_code else "pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(trained: Trained) -> torch.Tensor:
    rng = ProgressRng(3, 0, "sample", torch.arange(1), torch.device("cpu"))
    return rng.normal("noise", trained.shape)


def prompt_of(trained: Trained) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A sample's conditions, and as a pipeline is given them: real tokens alone."""
    batch = next(iter(trained.dataset.fixed(1, batch=1))).on("cpu")
    family: Any = trained.objective
    cond = family.condition(batch)
    text, mask, pooled = compose_text(cond, 16)
    assert mask is not None and int(mask.sum()) > 2
    return cond, {"prompt_embeds": text[mask][None], "pooled_prompt_embeds": pooled}


def close(ours: torch.Tensor, theirs: torch.Tensor, noise: torch.Tensor) -> None:
    assert float((ours - noise).norm() / noise.norm()) > 0.05, "the network does something"
    assert float((ours - theirs).norm() / (theirs - noise).norm()) < 1e-4


def test_stable_diffusion_3_draws_the_same_at_guidance_4(tmp_path: Path) -> None:
    place = stable_diffusion_3(tmp_path)
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor) == (1.5305, 0.0609)
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    # each part is found in it, too
    assert open_vae({"folder": "export"}, tmp_path, root=tmp_path).stated == Trained(place.run, place).objective.latents  # type: ignore[attr-defined]
    # the network's own folder is still one by itself
    assert diffusers.SD3Transformer2DModel.from_pretrained(folder, local_files_only=True) is not None

    trained = Trained(place.run, place)
    noise = noise_of(trained)
    cond, prompt = prompt_of(trained)
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    own = as_the_readme_says(folder)
    assert "2 tokens of zeros" in (folder / "README.md").read_text(), "CLIP's one token and T5's"
    ours = trained.latents(cond, seed=3)
    close(ours, own(**prompt, **options).images, noise)
    # what the README warns of: zeros as long as the prompt
    plain = as_the_readme_says(folder, without_code=True)
    zeros = {f"negative_{name}": torch.zeros_like(value) for name, value in prompt.items()}
    drawn = plain(**prompt, **zeros, guidance_scale=4.0, **options).images
    assert float((ours - drawn).norm() / (ours - noise).norm()) > 1e-3
    drawn = plain(**prompt, guidance_scale=1.0, **options).images
    close(trained.latents(cond, seed=3, guidance=1.0), drawn, noise)
    # of prompts, of several lengths, with another to be guided away from; and their pixels
    texts = ["red heart", "the big red dog"]
    away = trained.conditions(["a big blue flag"] * 2)
    ours = trained.latents(trained.conditions(texts), seed=3, negative=away)
    theirs = own(texts, "a big blue flag", seed=3, output_type="latent").images
    close(ours, theirs, noise)
    ours = trained.latents(trained.conditions(texts), seed=3)
    images = own(texts, seed=3, output_type="pt").images
    assert float((trained.decoded(ours) - (images * 2 - 1)).abs().max()) < 1.01 / 127.5
    assert len(own(texts, seed=3).images) == 2
    twice = own(texts, seed=3, num_images_per_prompt=2, output_type="latent").images
    close(trained.latents(trained.conditions([text for text in texts for _ in range(2)]), seed=3), twice, noise)


def test_flux_draws_the_same_at_guidance_4(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", scaling_factor=0.3611, shift_factor=0.1159)
    latents(tmp_path, "images", "latents", "vae")
    save_text_encoder(tmp_path / "clip", "clip_plain")
    save_text_encoder(tmp_path / "t5", "t5")
    encoders: list[dict[str, Any]] = [{"folder": "t5"}, {"folder": "clip"}]
    write_text(tmp_path, encoders, 8)
    sizes = {"latent_channels": 4, "latent_size": 8, "hidden_size": 16, "num_heads": 2, "text_dim": 12, "pooled_dim": 8}
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={"model": {"name": "flux", **sizes, "depth_double": 1, "depth_single": 1, "rope_dims": [4, 2, 2]}},
        objective={**FLOW, "conditions": ["text", "pooled_2"]},
        sample={"name": "ode", "steps": 4, "guidance": 4.0, "spacing": "trailing"},
        optimizer={"name": "adamw", "lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 0}},
        data={"train": {"sources": [{"folders": ["latents", "text"]}]}, "text_tokens": 8,
              "encoders": {"moments": {"folder": "vae"}, "text": encoders}},
    )  # fmt: skip
    place = start(recipe, tmp_path, "flux")
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    assert diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True).text_encoder_2 is not None
    trained = Trained(place.run, place)
    noise = noise_of(trained)
    family: Any = trained.objective
    cond = family.condition(next(iter(trained.dataset.fixed(1, batch=1))).on("cpu"))
    prompt = {"prompt_embeds": cond["text"][cond["text_mask"]][None], "pooled_prompt_embeds": cond["pooled_2"]}
    packed = diffusers.FluxPipeline._pack_latents(noise, 1, 4, 8, 8)
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "latents": packed, "output_type": "latent"}
    own = as_the_readme_says(folder)
    theirs = diffusers.FluxPipeline._unpack_latents(own(**prompt, **options).images, 16, 16, 2)
    close(trained.latents(cond, seed=3), theirs, noise)
    theirs = diffusers.FluxPipeline._unpack_latents(own("red heart", seed=3, output_type="latent").images, 16, 16, 2)
    close(trained.latents(trained.conditions(["red heart"]), seed=3), theirs, noise)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_cogvideox_draws_the_same_at_guidance_4_and_says_how_many_frames(tmp_path: Path, positions: str) -> None:
    write_clips(tmp_path / "clips", 9)
    save_video_vae(tmp_path / "vae", scaling_factor=0.7)
    latents(tmp_path, "clips", "latents", "vae")
    save_text_encoder(tmp_path / "t5", "t5")
    write_text(tmp_path, [{"folder": "t5"}], 4)

    def run(frames: int, name: str) -> Place:
        network = {"name": "cogvideox", "latent_channels": 4, "latent_frames": 3, "latent_height": 4, "latent_width": 4, "depth": 1,
                   "hidden_size": 32, "num_heads": 2, "text_dim": 12, "text_tokens": 6, "time_dim": 8, "positions": positions}  # fmt: skip
        recipe = recipe_of(
            "latents", None, (4, 4), networks={"model": network},
            objective={"name": "denoising", "path": {"name": "scaled_linear", "zero_terminal_snr": True}, "target": "v",
                       "times": "discrete", "conditions": ["text"]},
            sample={"name": "ancestral", "variance": "none", "spacing": "trailing", "steps": 4, "guidance": 4.0},
            optimizer={"name": "adamw", "lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 0}}, callbacks=CALLBACKS,
            data={"train": {"sources": [{"folders": ["latents" if frames == 9 else "five", "text"]}]}, "text_tokens": 6,
                  "encoders": {"moments": {"folder": "vae"}, "text": {"folder": "t5"}}},
        )  # fmt: skip
        return start(recipe, tmp_path, name)

    place = run(9, "nine")
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.7
    assert diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True).text_encoder is not None
    trained = Trained(place.run, place)
    noise = noise_of(trained)
    family: Any = trained.objective
    cond = family.condition(next(iter(trained.dataset.fixed(1, batch=1))).on("cpu"))
    prompt = {"prompt_embeds": cond["text"][cond["text_mask"]][None]}
    options = {
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "num_inference_steps": 4,
        "latents": noise.transpose(1, 2),
        "output_type": "latent",
    }
    own = as_the_readme_says(folder)
    close(trained.latents(cond, seed=3), own(**prompt, **options).frames.transpose(1, 2), noise)
    theirs = own("red heart", seed=3, output_type="latent").frames.transpose(1, 2)
    close(trained.latents(trained.conditions(["red heart"]), seed=3), theirs, noise)
    assert "1 + 8k frames" not in (folder / "README.md").read_text()

    write_clips(tmp_path / "clips-5", 5)
    latents(tmp_path, "clips-5", "five", "vae")
    folder = evaluate.export_run(run(5, "five"), "diffusers", tmp_path / "export-5")
    assert as_the_readme_says(folder).told["shape"][1] == 2
    again = own("red heart", seed=3, output_type="latent").frames.transpose(1, 2)
    assert torch.equal(again, theirs), "the pipeline of another folder changes nothing"
    assert "clips of 5 frames, which are 2 latent frames" in (folder / "README.md").read_text()
    assert "decodes 2 to 8 frames" in (folder / "README.md").read_text()
    assert "Draw clips of 1 + 8k frames (9, 17, ...)" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "factors", [{"scaling_factor": 0.18215}, {"scaling_factor": 1.5305, "shift_factor": 0.0609}, None]
)
def test_dit_is_a_pipeline_whatever_normalises_its_latents(tmp_path: Path, factors: dict[str, float] | None) -> None:
    """DiTPipeline knows a factor and no shift, and none by channel: those go into the exported autoencoder."""
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", **(factors or {"scaling_factor": None}))
    made = latents(tmp_path, "images", "latents", "vae")
    recipe = recipe_of(
        "latents",
        {"folder": "vae"},
        (4, 8),
        sample={"name": "ancestral", "variance": "none", "steps": 3, "guidance": 2.0},
    )
    place = start(recipe, tmp_path, "dit")
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "DiTPipeline"
    trained = Trained(place.run, place)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
        ours = trained.medium.pixels(x)  # type: ignore[attr-defined]
        assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
        pixels = torch.rand(1, 3, 16, 16) * 2 - 1
        posterior = pipeline.vae.encode(pixels).latent_dist
        mean, logvar = open_vae({"folder": "vae"}, tmp_path, root=tmp_path).encode(pixels).chunk(2, dim=1)
    assert made.latent is not None
    std = torch.tensor(made.latent.std).view(1, 4, 1, 1)
    scaled = posterior.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(
        scaled, (mean - torch.tensor(made.latent.mean).view(1, 4, 1, 1)) / std, rtol=1e-4, atol=1e-4
    )
    spread = (0.5 * logvar).exp() / std
    torch.testing.assert_close(posterior.std * pipeline.vae.config.scaling_factor, spread, rtol=1e-4, atol=1e-4)
    pipeline([1], num_inference_steps=3, guidance_scale=2.0)


def test_dit_is_a_pipeline_with_an_autoencoder_of_our_own(tmp_path: Path) -> None:
    """Its code lies in the folder, and it normalises by channel itself."""
    write_images(tmp_path / "images")
    save_run(tmp_path / "runs")
    made = precompute_latents.run(
        input="images", output="latents", vae={"run": "vae"}, workers=0, data_root=tmp_path, runs_root=tmp_path / "runs"
    )
    sample = {"name": "ancestral", "variance": "none", "steps": 3, "guidance": 2.0}
    place = start(recipe_of("latents", {"run": "vae"}, (3, 4), sample=sample), tmp_path, "dit")
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    pipeline = as_the_readme_says(folder)
    assert type(pipeline).__name__ == "DiTPipeline" and type(pipeline.vae).__name__ == "PatchAutoencoder"
    assert made.latent is not None and len(made.latent.std) == 3
    trained, x = Trained(place.run, place), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    ours = trained.medium.pixels(x)  # type: ignore[attr-defined]
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    assert pipeline([1], num_inference_steps=3, guidance_scale=2.0).images[0].size == (16, 16)


def test_the_datas_statistics_go_into_the_exported_autoencoder(tmp_path: Path) -> None:
    """Asked for against what the autoencoder states: one factor into its config, those by channel into its convolutions."""
    for statistics in ("whole", "channel"):
        root = tmp_path / statistics
        place = stable_diffusion_3(root, encoders=[{"folder": "clip0"}], statistics=statistics)
        folder = evaluate.export_run(place, "diffusers", root / "export")
        trained = Trained(place.run, place)
        stats = trained.objective.latents  # type: ignore[attr-defined]
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
        if statistics == "whole":
            assert vae.config.scaling_factor == pytest.approx(1 / stats.std[0]) and vae.config.shift_factor == 0.0
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            theirs = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        ours = trained.medium.pixels(x)  # type: ignore[attr-defined]
        assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
        assert vae.config.force_upcast


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_run(tmp_path / "runs")
    encoders: list[dict[str, Any]] = [{"folder": "clip0"}]
    place = stable_diffusion_3(tmp_path, encoders=encoders)
    recipe = (place.run.path / "recipe.yaml").read_text()
    (place.run.path / "recipe.yaml").write_text(recipe.replace("folder: vae", "run: vae"))
    folder = tmp_path / "export"
    with caplog.at_level(logging.INFO):
        evaluate.export_run(place, "diffusers", folder)
    assert (
        "without text_encoder_2, text_encoder_3, tokenizer_2, tokenizer_3: the run's text encoders are CLIP"
        in caplog.text
    )
    loaded = as_the_readme_says(folder)
    assert type(loaded.vae).__name__ == "PatchAutoencoder" and loaded.text_encoder is not None
    assert as_the_readme_says(folder, without_code=True).vae is None
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    (folder / "README.md").write_text("mine")
    (folder / "text_encoder_2").mkdir()
    evaluate.export_run(place, "diffusers", folder)  # again, over the first
    assert (folder / "README.md").read_text() == "mine"
    assert np.array_equal(
        load_file(folder / "diffusion_pytorch_model.safetensors")["proj_out.bias"].numpy(),
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.bias"].numpy(),
    )


@pytest.mark.parametrize(
    ("objective", "sample", "words"),
    [
        ({"path": "rectified_flow", "target": "velocity"}, {"name": "ode", "shift": 3.0}, None),
        ({"path": "rectified_flow", "target": "v"}, {"name": "ode"}, r"target velocity; this recipe has .* and v$"),
        (
            {"path": "vp_cosine", "target": "eps"},
            {"name": "ode"},
            r"target velocity; this recipe has VPCosine.* and eps",
        ),
        ({"path": "rectified_flow", "target": "velocity"}, {"name": "dpm"}, "draws with dpm"),
    ],
)
def test_a_flow_scheduler_is_for_flows_alone(
    objective: dict[str, Any], sample: dict[str, Any], words: str | None
) -> None:
    """It takes the network's answer for a velocity, whatever it is."""
    assert {family(name).pipeline.scheduler for name in ("mmdit", "flux")} == {flow_match}  # type: ignore[union-attr]
    if words is None:
        assert flow_match(objective, sample, (1, 4, 8, 8))["shift"] == 3.0
        return
    with pytest.raises(UserError, match=words):
        flow_match(objective, sample, (1, 4, 8, 8))


def test_the_readme_says_what_the_pipeline_does_otherwise(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae")
    latents(tmp_path, "images", "latents", "vae")
    sample = {
        "name": "ancestral",
        "variance": "none",
        "steps": 2,
        "guidance": {"scale": 4.0, "channels": 3, "interval": [0.2, 0.8]},
    }
    objective = {**OBJECTIVE, "condition_drop": 0.0}
    place = start(recipe_of("latents", {"folder": "vae"}, (4, 8), sample=sample, objective=objective), tmp_path, "dit")
    words = (evaluate.export_run(place, "diffusers") / "README.md").read_text()
    assert "guides the first 3 channels; the pipeline guides all" in words
    assert (
        "guides at times from 0.2 to 0.8; the pipeline guides at all times" in words
        and "without dropping conditions" in words
    )
    assert "x = (z - 0) * 0.18215" in words


def test_autoencoders_have_an_export_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clips(tmp_path / "clips", 5)
    network = {"name": "causal_vae3d", "num_frames": 5, "image_size": [16, 16], "latent_channels": 4, "channels": [4, 4, 4], "depth": 1,
               "num_groups": 2}  # fmt: skip
    recipe = recipe_of(
        "clips", None, (4, 4), networks={"model": network}, objective={"name": "elbo", "latent_shape": [4, 2, 4, 4], "input": "video"},
        sample=None,
    )  # fmt: skip
    place = start(recipe, tmp_path, "video")
    with caplog.at_level(logging.INFO):
        folder = evaluate.export_run(place, "diffusers", tmp_path / "exported")
    assert diffusers.AutoencoderKLCogVideoX.from_pretrained(folder).config.scaling_factor is None
    assert "scaling_factor is null" in caplog.text
    clips: dict[str, Any] = {"folder": folder}
    exec(blocks(folder)[0], clips)  # our own file, written a moment ago
    assert clips["again"].shape == clips["clips"].shape
    made = latents(tmp_path, "clips", "latents", "exported")
    assert made.encoder is not None and made.encoder["normalisation"] == "channel"

    write_images(tmp_path / "images")
    network = {"name": "vae", "image_size": 16, "latent_channels": 4, "hidden_size": 8, "depth": 1}
    recipe = recipe_of(
        "images",
        None,
        (4, 4),
        networks={"model": network},
        objective={"name": "elbo", "latent_shape": [4, 4, 4]},
        sample=None,
    )
    place = start(recipe, tmp_path, "image")
    folder = evaluate.export_run(place, "diffusers", tmp_path / "image")
    ours, again = open_vae({"run": "image"}, place.runs_root), open_vae({"folder": str(folder)}, place.runs_root)
    assert isinstance(again, OwnAutoencoder) and again.stated is None and again.family == "vae"
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    names: dict[str, Any] = {"folder": folder}
    exec(blocks(folder)[0], names)  # our own file, written a moment ago
    theirs = names["autoencoder"]
    assert names["again"].shape == names["images"].shape == (1, 3, 16, 16)
    with torch.no_grad():
        moments, posterior = ours.encode(pixels), theirs.encode(pixels).latent_dist
        assert torch.equal(moments, again.encode(pixels))
        torch.testing.assert_close(posterior.mean, moments[:, :4], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, moments[:, 4:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            theirs.decode(posterior.mean).sample, ours.decode(moments[:, :4]), rtol=1e-5, atol=1e-5
        )
