"""A prompt is drawn as diffusers' pipelines draw it, from the same encoders, noise and weights: SD3 by three of them, FLUX by two."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import precompute_text
from nexus_scale.config import recipe as recipes
from nexus_scale.data.shards import Field, ShardWriter, finish_folder
from nexus_scale.generate.export import export_run
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.train import Place
from tests.media.test_latent_space import CALLBACKS, latents, save_kl, start
from tests.tiny_encoders import WORDS, save_text_encoder

diffusers = pytest.importorskip("diffusers")

PROMPTS = ["grinning face with big eyes", "red heart"]
NEGATIVE = "a sad cat"
STEPS, SEED = 3, 7


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_openmoji(folder: Path, count: int = 8) -> set[str]:
    """The first pictures of OpenMoji with their captions, as ingest_images makes them; the words of the captions."""
    words: set[str] = set()
    packed = Path(__file__).parents[2] / "data_pipelines/openmoji/openmoji-32.tar"
    fields = [Field("image", "png", "uint8", (32, 32, 3)), Field("caption", "txt", "text")]
    with tarfile.open(packed) as tar, ShardWriter(folder / "0.tar", fields) as shard:
        for number in range(1, count + 1):
            png, about = (tar.extractfile(f"{number:04d}.{kind}").read() for kind in ("png", "json"))  # type: ignore[union-attr]
            caption = json.loads(about)["caption"]
            shard.write(
                f"{number:04d}", {"image": np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), "caption": caption}
            )
            words |= set(caption.split())
    finish_folder(folder)
    return words


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    words = [*WORDS, *sorted(write_openmoji(root / "images") - set(WORDS))]
    save_kl(root / "vae", scaling_factor=1.5305, shift_factor=0.0609)
    latents(root, "images", "latents", "vae")
    for name, kind, seed in (("clip_l", "clip", 0), ("clip_g", "clip", 1), ("clip", "clip_plain", 2), ("t5", "t5", 3)):
        save_text_encoder(root / name, kind, seed, words, t5_width=16)
    return root


SD3 = {
    "text": [{"folder": "clip_l", "pad_to": 10}, {"folder": "clip_g", "pad_to": 10}, {"folder": "t5", "pad_to": 12}],
    "network": {"latent_channels": 4, "latent_size": 16, "hidden_size": 16, "num_heads": 2, "depth": 2, "text_dim": 16, "pooled_dim": 12,
                "pos_embed_max_size": 8},
    "tokens": {"text": 10, "text_2": 10, "text_3": 12},
}  # fmt: skip
FLUX = {
    "text": [{"folder": "t5", "pad_to": 12}, {"folder": "clip", "pad_to": 10}],
    "network": {"latent_channels": 4, "latent_size": 16, "hidden_size": 16, "num_heads": 2, "depth_double": 1, "depth_single": 1,
                "rope_dims": [4, 2, 2], "text_dim": 16, "pooled_dim": 8},
    "tokens": {"text": 12, "text_2": 10},
}  # fmt: skip


def run_of(root: Path, name: str, sizes: dict[str, Any], dtype: str) -> Place:
    """Six steps of a published recipe, its networks and encoders made tiny, on pictures of OpenMoji."""
    text = [{**spec, "dtype": dtype} for spec in sizes["text"]]
    folder = f"{name.replace('/', '-')}-{dtype}"
    precompute_text.run(input="images", output=folder, encoders=text, workers=0, data_root=root, runs_root=root)
    recipe = recipes.load_recipe(
        name,
        {"steps": 6, "global_batch": 4, "networks": {"model": sizes["network"]}, "callbacks": CALLBACKS,
         "optimizer": {"lr": 0.1, "schedule": {"name": "constant", "warmup_steps": 0}},
         "sample": {"steps": STEPS},
         "data": {"train": {"sources": [{"folders": ["latents", folder]}]}, "validation": None, "tokens": sizes["tokens"],
                  "encoders": {"moments": {"folder": "vae"}, "text": text}}},
    )  # fmt: skip
    return start(recipe, root, folder)


def pipeline_of(place: Place, folder: Path) -> Any:
    export_run(place, "diffusers", folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def difference(ours: torch.Tensor, theirs: torch.Tensor, noise: torch.Tensor) -> float:
    assert float((theirs - noise).norm() / noise.norm()) > 0.05, "the network does something"
    return float((ours - theirs).norm() / (theirs - noise).norm())


def noise_of(trained: Trained, count: int) -> torch.Tensor:
    return ProgressRng(SEED, 0, "sample", torch.arange(count), torch.device("cpu")).normal("noise", trained.shape)


def pixels_apart(folder: Path, theirs: np.ndarray) -> int:
    """The largest difference, of 255, between what `nexus sample` wrote of each prompt and a pipeline's images (n, H, W, 3) in [0, 1]."""
    files = sorted(file for file in folder.glob("*.png") if file.name != "grid.png")
    ours = np.stack([np.asarray(Image.open(file)) for file in files])
    assert ours.shape == theirs.shape and ours.std() > 1
    return int(np.abs(ours.astype(int) - np.rint(theirs * 255).astype(int)).max())


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 1e-3)])
def test_stable_diffusion_3(root: Path, dtype: str, bound: float) -> None:
    """Two CLIPs, pooled and joined on channels, and a T5; guidance away from a negative prompt."""
    place = run_of(root, "mmdit/sd3_2b", SD3, dtype)
    pipeline = pipeline_of(place, root / f"sd3-{dtype}")
    words = (root / f"sd3-{dtype}" / "README.md").read_text()
    assert "of the run's encoders" not in words and "`max_sequence_length=12`" in words
    trained = Trained(place.run, place)
    noise = noise_of(trained, len(PROMPTS))
    options = {
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "max_sequence_length": 12,
    }
    theirs = pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, guidance_scale=5.0, latents=noise, **options).images
    cond, negative = trained.conditions(PROMPTS), trained.conditions([NEGATIVE] * 2)
    ours = trained.latents(cond, negative=negative, guidance=5.0, seed=SEED)
    assert difference(ours, theirs, noise) < bound
    assert difference(trained.latents(cond, guidance=5.0, seed=SEED), theirs, noise) > 1e-2, (
        "the negative prompt does something"
    )

    empty = pipeline(PROMPTS, guidance_scale=5.0, latents=noise, **options).images
    ours = trained.latents(cond, negative=trained.conditioned.negative("", cond), guidance=5.0, seed=SEED)
    assert difference(ours, empty, noise) < bound, (
        "an empty negative prompt is what the pipeline takes where none is given"
    )

    options["output_type"] = "np"
    images = pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, guidance_scale=5.0, latents=noise, **options).images
    folder = draw_prompts(place, PROMPTS, negative_prompt=NEGATIVE, guidance=5.0, seed=SEED)
    assert pixels_apart(folder, images) <= 1


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 1e-3)])
def test_flux(root: Path, dtype: str, bound: float) -> None:
    """A T5's tokens and a CLIP's pooled text; the scale that the network is told, and true guidance beside it."""
    place = run_of(root, "flux/dev", FLUX, dtype)
    pipeline = pipeline_of(place, root / f"flux-{dtype}")
    trained = Trained(place.run, place)
    noise = noise_of(trained, len(PROMPTS))
    packed = pipeline._pack_latents(noise, 2, 4, 16, 16)
    options = {
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "max_sequence_length": 12,
    }

    def drawn(**guided: Any) -> torch.Tensor:
        made = pipeline(PROMPTS, latents=packed, **guided, **options).images
        return pipeline._unpack_latents(made, 32, 32, 2)

    cond, negative = trained.conditions(PROMPTS), trained.conditions([NEGATIVE] * 2)
    told = drawn(guidance_scale=6.0)
    assert difference(trained.latents(cond, guidance=trained.guidance(6.0), seed=SEED), told, noise) < bound
    theirs = drawn(guidance_scale=6.0, negative_prompt=[NEGATIVE] * 2, true_cfg_scale=3.0)
    ours = trained.latents(cond, negative=negative, guidance=trained.guidance(6.0, 3.0), seed=SEED)
    assert difference(ours, theirs, noise) < bound
    assert difference(theirs, told, noise) > 5e-3, "true guidance does something"

    options["output_type"] = "np"
    asked = {"guidance_scale": 6.0, "negative_prompt": [NEGATIVE] * 2, "true_cfg_scale": 3.0}
    images = pipeline(PROMPTS, latents=packed, **asked, **options).images
    folder = draw_prompts(place, PROMPTS, negative_prompt=NEGATIVE, guidance=6.0, true_guidance=3.0, seed=SEED)
    assert pixels_apart(folder, images) <= 1
