"""Latents of several aspect ratios, in step across ranks, through networks with tables of positions and with rotary ones; and
three text encoders that drop apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Progress, RunFolder
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.loader import Loader
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.engine.checkpoint import newest
from nexus_scale.generate.trained import make_draw
from nexus_scale.interop.encoders import open_vae
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.diffusion.mmdit import MMDiT
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.latents import LatentStats
from nexus_scale.train import Place, train
from tests.distributed import run_ranks
from tests.tiny_encoders import save_autoencoder_kl

SIZES = ((8, 8), (4, 16), (12, 4))
STEPS, SAMPLES = 6, 60


def write_data(root: Path, decoder: bool = False, text_dim: int = 24) -> None:
    """Latents whose sizes take turns, and texts of several lengths, all of their sample's number. `decoder`: made by an autoencoder
    that lies beside them."""
    fingerprint = "latents"
    if decoder:
        save_autoencoder_kl(root / "kl")
        fingerprint = open_vae({"folder": "kl"}, root, root).fingerprint
    random = np.random.default_rng(0)
    moments = [Field("moments", "moments.npy", "float32", (8, None, None))]
    texts = [Field("text", "text.npy", "float32", (None, text_dim)), Field("pooled", "pooled.npy", "float32", (16,))]
    for folder, fields in (("latents", moments), ("text", texts)):
        with ShardWriter(root / folder / "00000.tar", fields) as writer:
            for number in range(SAMPLES):
                key, size = f"{number:03d}", SIZES[number % len(SIZES)]
                if folder == "latents":
                    writer.write(key, {"moments": random.normal(size=(8, *size)).astype(np.float32)})
                else:
                    length = 1 + number % 6
                    values = random.normal(size=(length, text_dim)).astype(np.float32)
                    writer.write(key, {"text": values, "pooled": random.normal(size=16).astype(np.float32)})
        statistics = {"latent": LatentStats((0.0,) * 4, (1.0,) * 4)} if folder == "latents" else {}
        finish_folder(
            root / folder, encoder={"fingerprint": fingerprint if folder == "latents" else folder}, **statistics
        )


def run(recipe_name: str, data: Path, root: Path, workers: int) -> None:
    changed: dict[str, Any] = {
        "steps": STEPS,
        "objective": {"mirror": False, "time_shift": {"name": "exponential"}},
        "data": {
            "synthetic": None,
            "train": {"sources": [{"folders": ["latents", "text"]}]},
            "encoders": {"moments": {"folder": "kl"}},
        },
        "callbacks": {
            "checkpoint": {"every": STEPS},
            "metrics": {"every": 1},
            "validate": None,
            "samples": {"every": STEPS, "count": 7},
        },
    }
    recipe = recipes.load_recipe(recipe_name, changed, tiny=True)
    cluster = recipes.cluster_from({"workers": workers, "threads_per_worker": 1, "precision": "float32"}, "test")
    train(recipe, cluster, Place(RunFolder(root), data, root.parent), make_draw)


def tensors(root: Path) -> dict[str, Tensor]:
    checkpoint = newest(RunFolder(root).checkpoints)
    assert checkpoint is not None and checkpoint.step == STEPS
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def rank_of(rank: int, world_size: int, recipe_name: str, data: str, root: str) -> None:
    run(recipe_name, Path(data), Path(root), world_size)


@pytest.mark.slow
@pytest.mark.parametrize("recipe_name", ["mmdit/tiny_openmoji", "flux/tiny_openmoji"])
def test_two_ranks_train_on_all_sizes_as_one_does(recipe_name: str, tmp_path: Path) -> None:
    write_data(tmp_path / "data", decoder=True)
    seed, batch = recipes.load_recipe(recipe_name, tiny=True).seed, 4
    dataset = Dataset.open([Source([tmp_path / "data/latents", tmp_path / "data/text"])], text_tokens=6)
    loader = Loader(
        dataset, seed=seed, global_batch=batch, micro_batch=batch, rank=0, world_size=1, progress=Progress()
    )
    sizes = {tuple(part["moments"].shape[2:]) for _ in range(STEPS) for part in loader.next_batches()}
    loader.close()
    assert len(sizes) > 1 and sizes <= set(SIZES), "the order of these steps has several sizes"

    run(recipe_name, tmp_path / "data", tmp_path / "one", workers=0)
    run_ranks(2, rank_of, recipe_name, str(tmp_path / "data"), str(tmp_path / "two"), timeout=300)
    alone, together = (tensors(tmp_path / name) for name in ("one", "two"))
    assert alone.keys() == together.keys()
    moved = 0.0
    for key, value in alone.items():
        if key.endswith((".fp32", ".ema")):
            torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5, msg=key)
        if key.endswith(".exp_avg"):
            moved += float(value.abs().sum())
    assert moved > 0
    name = f"step_{STEPS:08d}"
    drawn = [RunFolder(tmp_path / run).samples for run in ("one", "two")]
    captions, others = (json.loads((folder / f"{name}.json").read_text())["captions"] for folder in drawn)
    assert captions == others and len(captions) == 7, "also where a bucket's samples do not divide by the ranks"
    mine, its = (np.asarray(Image.open(folder / f"{name}.png")).astype(int) for folder in drawn)
    assert np.abs(mine - its).max() <= 2


# ----------------------------------------------------------------------------------- three text encoders

CONDITIONS = ("text", "text_2", "text_3", "pooled", "pooled_2")
GROUPS = {"text": ("text", "pooled"), "text_2": ("text_2", "pooled_2"), "text_3": ("text_3",)}


@pytest.mark.parametrize("attention", ["masked", "packed"])
def test_a_dropped_encoder_is_not_seen_and_the_others_are(attention: Any) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"latent_channels": 4, "latent_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    net = MMDiT(**sizes, text_dim=24, pooled_dim=16, pos_embed_max_size=8, attention=attention)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    fields = {
        "moments": torch.randn(2, 8, 8, 8),
        "text": torch.randn(2, 6, 8), "text_2": torch.randn(2, 6, 12), "text_3": torch.randn(2, 6, 24),
        "text_mask": mask, "text_2_mask": mask, "text_3_mask": torch.arange(6) < torch.tensor([[2], [5]]),
        "pooled": torch.randn(2, 6), "pooled_2": torch.randn(2, 10),
    }  # fmt: skip

    def loss(dropped: str, **changed: Tensor) -> Tensor:
        drop = {"+".join(names): float(name == dropped) for name, names in GROUPS.items()}
        objective = Denoising(conditions=CONDITIONS, condition_drop=drop)
        batch = Batch(fields | changed, torch.arange(2), torch.arange(2))
        rng = ProgressRng(0, 0, "main", torch.arange(2), torch.device("cpu"))
        with torch.no_grad():
            return objective.loss("main", {"model": net}, batch, rng, 0).total

    for dropped, lost in GROUPS.items():
        reference = loss(dropped)
        for name in CONDITIONS:
            same = torch.equal(loss(dropped, **{name: fields[name] + 1}), reference)
            assert same == (name in lost), (dropped, name)
