"""Folders of Stable Diffusion's pipelines come in, draw what diffusers draws, train a step, and go out whole again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexus_scale.contracts import SIZES, UserError
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.given import Given, given_of
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.unet_condition import DIFFUSERS
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.conditions import null_condition
from tests.interop.test_pipelines import write_text
from tests.media.test_latent_space import latents, recipe_of, start
from tests.tiny_encoders import save_autoencoder_kl, save_text_encoder

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATH = {"name": "scaled_linear", "zero_terminal_snr": False}
UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}  # fmt: skip
PROMPTS, NEGATIVE = ["a red heart", "blue cat"], ""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def parts_of(root: Path, kinds: tuple[str, ...], **unet: Any) -> dict[str, Any]:
    """Components with random weights: those of a pipeline with as many text encoders."""
    import transformers as hf

    parts: dict[str, Any] = {"vae": diffusers.AutoencoderKL.from_pretrained(save_autoencoder_kl(root / "made" / "vae"))}
    with torch.no_grad():  # the posterior has almost no deviation: whoever draws from it draws its mean
        parts["vae"].quant_conv.weight[4:] = 0
        parts["vae"].quant_conv.bias[4:] = -30
    for number, kind in enumerate(kinds, start=1):
        folder, name = root / "made" / f"text{number}", "" if number == 1 else f"_{number}"
        save_text_encoder(folder, kind, seed=number)
        cls = hf.CLIPTextModel if kind == "clip_plain" else hf.CLIPTextModelWithProjection
        parts[f"text_encoder{name}"] = cls.from_pretrained(folder)
        parts[f"tokenizer{name}"] = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    parts["unet"] = diffusers.UNet2DConditionModel(**{**UNET, **unet})
    parts["scheduler"] = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return parts


def write_images(folder: Path) -> None:
    """Eight pictures of 16 x 16, each all of its original."""
    fields = [
        Field("image", "png", "uint8", (16, 16, 3)),
        *(Field(name, f"{name}.npy", "int64", (2,)) for name in SIZES),
    ]
    with ShardWriter(folder / "0.tar", fields) as shard:
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            told = zip(SIZES, ([16, 16], [0, 0], [16, 16]), strict=True)
            shard.write(f"{i}", {"image": pixels, **{name: np.array(size) for name, size in told}})
    finish_folder(folder)


STEPS = 5
DDIM = {"name": "ddim", "steps": STEPS, "spacing": "leading", "offset": 1, "final": "first", "guidance": 4.0}
ONE = [("text_encoder", {"states": "last"})]
TWO = [("text_encoder", {}), ("text_encoder_2", {})]


def trained_from(
    root: Path, objective: dict[str, Any], text: list[tuple[str, dict[str, str]]] = ONE, sample: dict[str, Any] = DDIM
) -> Trained:
    """A run that begins with the pipeline in `root`/published, after two steps of no size."""
    write_images(root / "images")
    latents(root, "images", "latents", "published", masks=objective["name"] == "inpainting")
    encoders = [{"folder": f"published/{name}", "pad_to": 10, "dtype": "float32", **more} for name, more in text]
    write_text(root, encoders, 8)
    arguments = DIFFUSERS.model_args(json.loads((root / "published/unet/config.json").read_text()))
    network = {"name": "unet_condition", **{key: value for key, value in arguments.items() if value is not None}}
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={"model": {**network, "init_from": {"format": "diffusers", "path": "published"}}},
        objective={"path": PATH, "target": "eps", "times": "discrete", **objective},
        sample=sample,
        optimizer={"name": "adamw", "lr": 1e-30, "weight_decay": 0.0, "schedule": {"name": "constant", "warmup_steps": 0}},
        data={"train": {"sources": [{"folders": ["latents", "text"]}]}, "text_tokens": 10,
              "encoders": {"moments": {"folder": "published"}, "text": encoders if len(encoders) > 1 else encoders[0]}},
    )  # fmt: skip
    place = start(recipe, root, "run")
    return Trained(place.run, place)


def noise_of(trained: Trained, name: str = "noise") -> Tensor:
    """What ours draws two samples from."""
    rng = ProgressRng(3, 0, "sample", torch.arange(2), torch.device("cpu"))
    return rng.normal(name, trained.shape)


def close(ours: Tensor, theirs: Tensor, noise: Tensor) -> None:
    assert float((ours - noise).norm() / noise.norm()) > 0.05, "the network does something"
    assert float((ours - theirs).norm() / (theirs - noise).norm()) < 1e-4


def of_two(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.expand(2, *value.shape[1:]) for name, value in values.items()}


def drawn(trained: Trained, given: Given | None = None) -> Tensor:
    """Latents of the two prompts, guided away from an empty one."""
    beside = {} if given is None else of_two(given.cond)
    cond = trained.conditions(PROMPTS)
    negative = None
    if "guidance" not in trained.draws.constants:
        negative = {**trained.conditioned.negative(NEGATIVE, cond), **beside}
    begun = {} if given is None else {"given": of_two(given.given), "strength": given.strength}
    return trained.latents({**cond, **beside}, negative=negative, seed=3, **begun)


def theirs(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    told = {
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        **options,
    }
    images: Tensor = pipeline(PROMPTS, **told).images
    return images


def exported(trained: Trained, published: Any, folder: Path, **settings: Any) -> Any:
    """The pipeline that the run's export is, by its own index, whose networks are the published ones."""
    evaluate.export_run(trained.place, "diffusers", folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == type(published).__name__
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(loaded) is type(published) and type(loaded.scheduler) is type(published.scheduler)
    for name in ("unet", "vae"):
        for key, value in getattr(published, name).state_dict().items():
            torch.testing.assert_close(getattr(loaded, name).state_dict()[key], value, rtol=1e-6, atol=1e-20)
    return loaded


def zeros(cond: Any) -> dict[str, Tensor]:
    return null_condition(cond, ["text"])


class Dropped(ProgressRng):
    """Drops the first of two samples."""

    def uniform(self, name: str) -> Tensor:
        return torch.tensor([0.0, 0.9])


UNGUARDED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def test_stable_diffusion_comes_in_draws_trains_and_goes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = diffusers.StableDiffusionPipeline(**parts_of(tmp_path, ("clip_plain",)), **UNGUARDED)
    pipeline.save_pretrained(tmp_path / "published")
    trained = trained_from(tmp_path, {"name": "denoising", "conditions": ["text"]})
    noise, told = noise_of(trained), {"negative_prompt": [NEGATIVE] * 2}
    ours, expected = drawn(trained), theirs(pipeline, latents=noise, **told)
    close(ours, expected, noise)
    close(theirs(exported(trained, pipeline, tmp_path / "export"), latents=noise, **told), expected, noise)
    image = theirs(pipeline, latents=noise, **told, output_type="pt")
    torch.testing.assert_close(trained.decoded(ours) / 2 + 0.5, image, atol=0.01, rtol=0)

    # image to image, from the same picture: what is encoded, noised and drawn
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "in.png")
    begun = given_of(trained, trained.shape, tmp_path / "in.png", None, 0.6)
    parts = {name: part for name, part in pipeline.components.items() if name not in UNGUARDED}
    redraws = diffusers.StableDiffusionImg2ImgPipeline(**parts, **UNGUARDED)
    redraws.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys.modules[type(redraws).__module__], "randn_tensor", lambda *given, **more: noise)
    again = redraws(
        PROMPTS, image=[picture, picture], strength=0.6, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent", **told
    ).images  # fmt: skip
    close(drawn(trained, begun), again, noise)
    assert float((again - expected).norm() / expected.norm()) > 0.05


def test_guidance_may_lead_away_from_the_empty_text_as_published_weights_know_it(tmp_path: Path) -> None:
    """In training, in drawing, and in the export, as the pipeline without a negative prompt."""
    pipeline = diffusers.StableDiffusionPipeline(**parts_of(tmp_path, ("clip_plain",)), **UNGUARDED)
    pipeline.save_pretrained(tmp_path / "published")
    trained = trained_from(
        tmp_path, {"name": "denoising", "conditions": ["text"], "null": "empty", "condition_drop": 0.5}
    )
    noise, cond = noise_of(trained), trained.conditions(PROMPTS)
    ours, expected = trained.latents(cond, seed=3), theirs(pipeline, latents=noise)
    close(ours, expected, noise)
    assert float((trained.latents(cond, seed=3, negative=zeros(cond)) - ours).norm() / (ours - noise).norm()) > 1e-3
    close(theirs(exported(trained, pipeline, tmp_path / "export"), latents=noise), expected, noise)
    own = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "export", custom_pipeline=str(tmp_path / "export/pipeline.py"), trust_remote_code=True
    )
    close(theirs(own, latents=noise), expected, noise)
    objective: Any = trained.objective
    empty = trained.conditions([""])
    dropped = objective.condition_drop(
        {"text": cond["text"], "text_mask": cond["text_mask"]}, Dropped(0, 0, "main", torch.arange(2))
    )
    assert torch.equal(dropped["text"][0], empty["text"][0]) and torch.equal(
        dropped["text_mask"][0], empty["text_mask"][0]
    )
    assert torch.equal(dropped["text"][1], cond["text"][1]) and dropped["drop"].tolist() == [True, False]


def test_sdxl_is_told_sizes_and_two_texts(tmp_path: Path) -> None:
    parts = parts_of(
        tmp_path, ("clip_plain", "clip"), addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=16,
        projection_class_embeddings_input_dim=6 + 6 * 8, transformer_layers_per_block=(2, 1), use_linear_projection=True,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.save_pretrained(tmp_path / "published")
    conditions = ["text", "text_2", "pooled_2", *SIZES]
    trained = trained_from(tmp_path, {"name": "denoising", "conditions": conditions}, TWO)
    noise, told = noise_of(trained), {"negative_prompt": [NEGATIVE] * 2}
    ours, expected = drawn(trained), theirs(pipeline, latents=noise, **told)
    close(ours, expected, noise)
    close(theirs(exported(trained, pipeline, tmp_path / "export"), latents=noise, **told), expected, noise)


def test_inpainting_is_told_the_mask_and_what_it_leaves(tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        **parts_of(tmp_path, ("clip_plain",), in_channels=9, out_channels=4), **UNGUARDED
    )
    pipeline.save_pretrained(tmp_path / "published")
    trained = trained_from(tmp_path, {"name": "inpainting", "conditions": ["text"]})
    noise = noise_of(trained)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = np.zeros((16, 16), np.uint8)
    mask[4:13, 3:10] = 255
    picture.save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = given_of(trained, trained.shape, tmp_path / "in.png", tmp_path / "mask.png", None)
    assert given.strength == 1.0 and not given.given
    told = {
        "negative_prompt": [NEGATIVE] * 2, "image": picture, "mask_image": Image.fromarray(mask), "strength": 1.0, "latents": noise,
    }  # fmt: skip
    ours, expected = drawn(trained, given), theirs(pipeline, **told)
    close(ours, expected, noise)
    close(theirs(exported(trained, pipeline, tmp_path / "export"), **told), expected, noise)
    with pytest.raises(UserError, match="give --image FILE and --mask FILE"):
        given_of(trained, trained.shape, None, None, None)
    with pytest.raises(UserError, match="draws into pictures"):  # as scores and `nexus generate` ask for it
        trained.latents(trained.conditions(PROMPTS), seed=3)
    folder = draw_prompts(
        trained.place, PROMPTS, image=tmp_path / "in.png", mask=tmp_path / "mask.png", seed=3, negative_prompt="", output=tmp_path / "drawn"
    )  # fmt: skip
    files = sorted(folder.glob("00*.png"))
    images = [torch.from_numpy(np.array(Image.open(file))) for file in files]
    inside = torch.from_numpy(mask > 0)[None, :, :, None]
    assert torch.equal(
        torch.stack(images), torch.where(inside, trained.images(ours), torch.from_numpy(np.array(picture)))
    )


def test_a_latent_consistency_model_is_told_its_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tmp_path, ("clip_plain",), time_cond_proj_dim=16)
    parts["scheduler"] = diffusers.LCMScheduler(**BETAS)
    pipeline = diffusers.LatentConsistencyModelPipeline(**parts, **UNGUARDED)
    pipeline.save_pretrained(tmp_path / "published")
    trained = trained_from(
        tmp_path,
        {"name": "denoising", "conditions": ["text"], "constants": {"guidance": 4.0}},
        sample={"name": "lcm", "steps": 4},
    )
    noise, names = noise_of(trained), iter(range(100))
    module = sys.modules[diffusers.LCMScheduler.__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *given, **more: noise_of(trained, f"noise_{next(names) % 3}"))
    ours, expected = drawn(trained), theirs(pipeline, latents=noise, num_inference_steps=4)
    close(ours, expected, noise)
    close(
        theirs(exported(trained, pipeline, tmp_path / "export"), latents=noise, num_inference_steps=4), expected, noise
    )
