"""`nexus finetune`: every pipeline that diffusers saves and this program reads begins as it was published, learns, and draws; a LoRA of it
loads in its own pipeline."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexus_scale import cli
from nexus_scale.config.recipe import recipe_from
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.generate.begun import begun_of
from nexus_scale.generate.given import given_of
from nexus_scale.generate.prompts import Wishes
from nexus_scale.generate.trained import Trained
from nexus_scale.interop import tuning
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.animations import encode_animation
from nexus_scale.train import Place
from tests.interop import test_stable_diffusion as sd
from tests.tiny_encoders import save_autoencoder_kl, save_text_encoder

diffusers = pytest.importorskip("diffusers")

PROMPTS, STEPS = ["a red heart", "blue cat"], 3
SIZED = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def texts(root: Path, *kinds: str, width: int = 12) -> dict[str, Any]:
    import transformers as hf

    classes = {"clip_plain": "CLIPTextModel", "clip": "CLIPTextModelWithProjection", "t5": "T5EncoderModel"}
    found: dict[str, Any] = {}
    for number, kind in enumerate(kinds, start=1):
        folder, name = root / "made" / f"text{number}", "" if number == 1 else f"_{number}"
        save_text_encoder(folder, kind, seed=number, t5_width=width)
        found[f"text_encoder{name}"] = getattr(hf, classes[kind]).from_pretrained(folder)
        found[f"tokenizer{name}"] = hf.AutoTokenizer.from_pretrained(folder)
    return found


def autoencoder(root: Path, **factors: Any) -> Any:
    vae = diffusers.AutoencoderKL.from_pretrained(save_autoencoder_kl(root / "made" / "vae"))
    vae.register_to_config(**factors)
    return vae


def stable_diffusion(root: Path) -> Any:
    return diffusers.StableDiffusionPipeline(**sd.parts_of(root, ("clip_plain",)), **sd.UNGUARDED)


def stable_diffusion_xl(root: Path) -> Any:
    parts = sd.parts_of(
        root, ("clip_plain", "clip"), addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=16,
        projection_class_embeddings_input_dim=6 + 6 * 8, transformer_layers_per_block=(2, 1), use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def stable_diffusion_3(root: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(root, scaling_factor=1.5305, shift_factor=0.0609), **texts(root, "clip", "clip", "t5", width=16),
    )  # fmt: skip


def flux(root: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
        pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder(root, scaling_factor=0.3611, shift_factor=0.1159), **texts(root, "clip_plain", "t5"),
    )  # fmt: skip


def pixart(root: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16, sample_size=8,
        caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=autoencoder(root),
        **texts(root, "t5"),
    )


def cogvideox(root: Path, name: str = "CogVideoXPipeline", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 12,
        "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6,
    }  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(**{**sizes, **more})
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(4, 4, 4, 4),
        latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64, sample_width=64,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    return getattr(diffusers, name)(transformer=transformer, scheduler=scheduler, vae=vae, **texts(root, "t5"))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (stable_diffusion, {"guidance_scale": 7.5, **SIZED}),
    "sdxl": (stable_diffusion_xl, {"guidance_scale": 5.0, **SIZED}),
    "sd3": (stable_diffusion_3, {"guidance_scale": 7.0, **SIZED}),
    "flux": (flux, {"guidance_scale": 3.5, **SIZED}),
    "pixart": (pixart, {"guidance_scale": 4.5, "use_resolution_binning": False, **SIZED}),
    "cogvideox": (
        cogvideox,
        {"guidance_scale": 6.0, "max_sequence_length": 6, "height": 64, "width": 64, "num_frames": 5},
    ),
}


def pictures(folder: Path, clips: bool) -> None:
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 20, 18, 3), dtype=np.uint8)
        if clips:
            (folder / f"{i}.webp").write_bytes(encode_animation(pixels, 0.125))
        else:
            Image.fromarray(pixels[0]).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("a big dog")


def command(root: Path, *options: str) -> int:
    """The exit code of `nexus finetune`, in this process."""
    roots = [f"cluster.paths.data={root / 'data'}", f"cluster.paths.runs={root / 'runs'}"]
    common = ["--name", "tuned", "--output", str(root / "tuned.yaml"), "--cluster", "in_process", "--batch", "2"]
    arguments = ["finetune", str(root / "published"), str(root / "mine"), *roots, *common, *options]
    try:
        cli.app(arguments, standalone_mode=False)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def trained_of(root: Path) -> Trained:
    place = Place(RunFolder(root / "runs" / "tuned"), root / "data", root / "runs")
    return Trained(place.run, place)


def noise_of(trained: Trained) -> Tensor:
    return ProgressRng(3, 0, "sample", torch.arange(2), torch.device("cpu")).normal("noise", trained.shape)


def theirs(kind: str, pipeline: Any, noise: Tensor, options: dict[str, Any]) -> Tensor:
    """Latents that the pipeline draws of the same noise, as ours are laid out."""
    pipeline.set_progress_bar_config(disable=True)
    given = noise
    if kind == "flux":
        given = pipeline._pack_latents(noise, 2, 4, 8, 8)
    elif kind == "cogvideox":
        given = noise.transpose(1, 2)
    drawn = pipeline(prompt=PROMPTS, num_inference_steps=STEPS, output_type="latent", latents=given, **options)
    found: Tensor = drawn.frames if kind == "cogvideox" else drawn.images
    if kind == "flux":
        return pipeline._unpack_latents(found, 16, 16, 2)
    return found.transpose(1, 2) if kind == "cogvideox" else found


MORE = [
    "--keep",
    "cat",
    "--keep-images",
    "3",
    "--validate",
    "red heart",
    "--validate",
    "blue dog",
    "callbacks.validate.samples=2",
]


@pytest.mark.parametrize(
    "kind", ["sd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CASES if kind != "sd")]
)
def test_every_pipeline_begins_as_published_and_learns(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them with pictures that it draws beforehand, of a captioner's captions."""
    make, options = CASES[kind]
    pipeline = make(tmp_path)
    pipeline.save_pretrained(tmp_path / "published")
    pictures(tmp_path / "mine", clips=kind == "cogvideox")
    told = ["--trigger", "big red", "--steps", "2", "--rank", "2", f"sample.steps={STEPS}", "callbacks.goodput=null"]
    if whole := kind == "sd":
        script = tmp_path / "captioner.py"
        script.write_text("import pathlib, sys\nprint('a flag', pathlib.Path(sys.argv[1]).stem)\n")
        told += [*MORE, "--captioner", f"{sys.executable} {script}"]
    if kind == "flux":  # whose config names no size
        told += ["--resolution", "16"]
    if kind == "sdxl":
        pictures(tmp_path / "masks", clips=False)
        told += ["--masks", str(tmp_path / "masks")]
    assert command(tmp_path, *told, "--rate", "1e-12") == 0
    said = capsys.readouterr().out
    assert f"recipe in {tmp_path / 'tuned.yaml'}" in said and "memory" in said and "done: 2 steps" in said
    trained = trained_of(tmp_path)
    found = set(trained.dataset.texts("caption", range(trained.dataset.samples)))
    flags = {f"big red a flag {i}" for i in (0, 2, 3)}
    assert found == {"big red a big dog", *({"cat", *flags} if whole else {"big red"})}
    noise, cond = noise_of(trained), trained.conditions(PROMPTS)
    ours = trained.latents(cond, seed=3)
    expected = theirs(kind, pipeline, noise, options)
    assert float((ours - noise).norm() / noise.norm()) > 0.05, "the network does something"
    assert float((ours - expected).norm() / (expected - noise).norm()) < 2e-3
    shown = tmp_path / "runs" / "tuned" / "samples" / "step_00000002"
    assert shown.with_suffix(".png").is_file()
    if whole:  # the base's to the left of its own, of the same noise: nothing was learnt at this rate
        assert json.loads(shown.with_suffix(".json").read_text())["captions"] == ["red heart", "blue dog"]
        pixels = np.array(Image.open(shown.with_suffix(".png")))
        halves = [(pixels[o : o + 16, o : o + 16], pixels[o : o + 16, o + 16 : o + 32]) for o in (0, 2)]
        assert any(np.array_equal(left, right) for left, right in halves)


def test_folders_that_say_how_often_they_are_shown_and_all_weights_in_sizes_of_a_table(tmp_path: Path) -> None:
    """The recipe's values alone: `--full`, a table of aspect ratios, and folders as kohya's scripts want them."""
    stable_diffusion(tmp_path).save_pretrained(tmp_path / "published")
    for name in ("10_sks dog", "1_dog"):
        pictures_of = tmp_path / "mine" / name
        pictures_of.parent.mkdir(exist_ok=True)
        pictures(pictures_of, clips=False)
    base = tuning.open_base(tmp_path / "published", tmp_path / "runs", tmp_path / "data")
    wish = tuning.Wish("tuned", tmp_path / "mine", full=True, resolution="33_of_512", recipe=tmp_path / "tuned.yaml")
    values = tuning.recipe_of(base, wish)
    made = recipe_from({key: value for key, value in values.items() if key != "base"}, "made")
    assert list(made.trained()) == ["model"] and not made.adapters() and made.optimizer.lr == tuning.FULL_RATE
    assert values["data"]["train"]["sources"] == [
        {"folders": ["tuned/part_1/train/latents", "tuned/part_1/train/text"], "weight": 10.0},
        {"folders": ["tuned/part_2/train/latents", "tuned/part_2/train/text"]},
    ]
    ingests = [job for job in values["prepare"] if job["job"] == "ingest_images"]
    assert [(job["source"]["prefix"], job["resolution"]) for job in ingests] == [
        ("sks dog", "33_of_512"),
        ("dog", "33_of_512"),
    ]
    with pytest.raises(
        UserError, match=r"folders called by how often they are shown, 10_sks dog, 1_dog; expected 1 or more, and no"
    ):
        tuning.recipe_of(base, replace(wish, captioner="true"))


@pytest.mark.slow
def test_all_weights_learn_from_pictures(tmp_path: Path) -> None:
    """A run of `--full`: what it draws is no longer the pipeline's."""
    pipeline = stable_diffusion(tmp_path)
    pipeline.save_pretrained(tmp_path / "published")
    pictures(tmp_path / "mine", clips=False)
    told = ["--full", "--resolution", "16", "--steps", "2", "--trigger", "big red", "--rate", "0.01"]
    assert command(tmp_path, *told, f"sample.steps={STEPS}", "callbacks.goodput=null", "callbacks.samples=null") == 0
    trained = trained_of(tmp_path)
    assert not trained.adapters
    before = theirs("sd", pipeline, noise_of(trained), {"guidance_scale": 7.5, **SIZED})
    ours = trained.latents(trained.conditions(PROMPTS), seed=3)
    assert float((ours - before).norm() / before.norm()) > 1e-3, "it has learnt"


@pytest.mark.slow
def test_a_picture_becomes_a_clip_as_in_its_pipeline(tmp_path: Path) -> None:
    """CogVideoX's image to video: a LoRA of it learns from clips alone, whose first frames are the pictures."""
    more = {"in_channels": 8, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    pipeline = cogvideox(tmp_path, "CogVideoXImageToVideoPipeline", **more)
    with torch.no_grad():  # the posterior has almost no deviation: whoever draws from it draws its mean
        pipeline.vae.encoder.conv_out.conv.weight[4:] = 0
        pipeline.vae.encoder.conv_out.conv.bias[4:] = -30
    pipeline.save_pretrained(tmp_path / "published")
    pictures(tmp_path / "mine", clips=True)
    told = [
        "--trigger",
        "big red",
        "--steps",
        "2",
        "--rank",
        "2",
        f"sample.steps={STEPS}",
        "callbacks.goodput=null",
        "--rate",
        "1e-12",
    ]
    assert command(tmp_path, *told) == 0
    trained = trained_of(tmp_path)
    assert trained.recipe.objective.name == "first_frame"
    assert (tmp_path / "runs" / "tuned" / "samples" / "step_00000002.png").is_file()
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    given = given_of(trained, trained.shape, tmp_path / "first.png", None, None)
    cond = trained.conditions(PROMPTS) | {name: value.expand(2, *value.shape[1:]) for name, value in given.cond.items()}
    ours, noise = trained.latents(cond, seed=3), noise_of(trained)
    options = {**CASES["cogvideox"][1], "image": [Image.fromarray(pixels)] * 2}
    expected = theirs("cogvideox", pipeline, noise, options)
    assert float((ours - noise).norm() / noise.norm()) > 0.05, "the network does something"
    assert float((ours - expected).norm() / (expected - noise).norm()) < 2e-3
    with pytest.raises(UserError, match="draws clips that begin as a picture: give --image FILE"):
        given_of(trained, trained.shape, None, None, None)
    going_on = begun_of(trained, trained.shape, Wishes(begin=tmp_path / "mine" / "0.webp"))
    first, clip = going_on.cond["first_moments"], going_on.given["moments"]
    assert (
        torch.equal(clip[:, :, :1], first)
        and first.shape[2] == 1
        and going_on.given["mask"].flatten().tolist() == [0.0, 1.0]
    )
