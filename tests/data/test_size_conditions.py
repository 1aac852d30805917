"""Crops, and where they were made, from raw images through ingest, latents and loader to what a network is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import ingest_images, precompute_text
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import SIZES, UserError
from nexus_scale.data.buckets import TABLES, Bucket, Fit, fit
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import decode, read_samples
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.diffusion.pixart import PixArt
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.train import Place, open_data
from tests.media.test_latent_space import latents, recipe_of, save_kl, start
from tests.tiny_encoders import save_text_encoder

FIELDS = (*SIZES, "crop_top_left_mirrored")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(number: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = {f"{n:02d}": (16, 48) if n % 2 else (40, 24) for n in range(12)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide and tall images, cut at random to squares and to 24 x 24, which need no scaling; their latents, flipped too, and texts."""
    root = tmp_path_factory.mktemp("sizes")
    (root / "photos").mkdir()
    for number, (name, size) in enumerate(PICTURES.items()):
        Image.fromarray(picture(number, *size)).save(root / f"photos/{name}.png")
        (root / f"photos/{name}.txt").write_text(("red heart", "a big blue flag")[number % 2])
    options: dict[str, Any] = {
        "source": "photos",
        "resolution": ["16x32", "24x24"],
        "heldout": 0.0,
        "size_fields": True,
    }
    for name, crop in (("in", "random"), ("again", "random"), ("middle", "centre")):
        ingest_images.run(output=name, crop=crop, data_root=root, runs_root=root, **options)
    save_kl(root / "vae")
    save_text_encoder(root / "t5", "t5")
    latents(root, "in/train/images", "latents", "vae", mirror=True)
    text: dict[str, Any] = {"input": "in/train/images", "output": "text", "encoders": [{"folder": "t5"}]}
    precompute_text.run(workers=0, data_root=root, runs_root=root, **text)
    return root


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each sample its image or moments and its sizes, by its key."""
    manifest = Manifest.load(folder)
    manifest.verify(deep=True)
    return {
        sample.key: {field.name: decode(field.extension, sample.members[field.extension]) for field in manifest.fields.values()}
        for shard in manifest.shards
        for sample in read_samples(folder / shard.file)
    }  # fmt: skip


def test_crops_lie_where_they_say_flipped_ones_too(root: Path) -> None:
    found, again, middle = (stored(root / name / "train/images") for name in ("in", "again", "middle"))
    corners = set()
    for number, (key, size) in enumerate(PICTURES.items()):
        one, pixels = found[key], picture(number, *size)
        assert one["original_size"].tolist() == list(size) and one["original_size"].dtype == np.int64
        height, width = one["target_size"].tolist()
        assert one["image"].shape == (height, width, 3) and (height, width) in ((16, 32), (24, 24))
        for image, name, corner in (
            (pixels, "image", "crop_top_left"),
            (pixels[:, ::-1], "mirrored", "crop_top_left_mirrored"),
        ):
            top, left = one[corner].tolist()
            seen = one["image"] if name == "image" else one["image"][:, ::-1]
            assert np.array_equal(image[top : top + height, left : left + width], seen)
        corners.add(tuple(one["crop_top_left"].tolist()))
        assert all(np.array_equal(one[name], again[key][name]) for name in ("image", *FIELDS)), (
            "a crop is the seed's and the key's"
        )
        free = size[0] - height, size[1] - width
        assert middle[key]["crop_top_left"].tolist() == [side // 2 for side in free]
    assert len(corners) > 6
    made = stored(root / "latents")
    assert all(np.array_equal(made[key][name], found[key][name]) for key in found for name in FIELDS)


def test_a_crop_may_lie_anywhere() -> None:
    bucket = Bucket(16, 16)
    places = {fit(48, 16, bucket, (part / 100, 0.5)).left for part in range(100)}
    assert places == set(range(33)) and fit(48, 16, bucket) == Fit(48, 16, 16, 0)


def test_tables_are_the_published_ones(tmp_path: Path) -> None:
    released = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    for size in (1024, 512, 256):
        theirs = {tuple(map(int, pair)) for pair in getattr(released, f"ASPECT_RATIO_{size}_BIN").values()}
        assert {(bucket.height, bucket.width) for bucket in TABLES[f"33_of_{size}"]} == theirs and len(theirs) == 33
    # SDXL, appendix I: height, width; the landscapes of each height, and as many portraits but one
    sdxl = {(bucket.height, bucket.width) for bucket in TABLES["40_of_1024"]}
    assert len(TABLES["40_of_1024"]) == len(sdxl) == 40 and (704, 1344) in sdxl and (1344, 704) not in sdxl
    assert {
        (512, 2048),
        (512, 1984),
        (576, 1664),
        (640, 1536),
        (832, 1152),
        (960, 1024),
        (1024, 1024),
        (1984, 512),
    } < sdxl
    assert all(h % 64 == w % 64 == 0 and 0.85 < h * w / 2**20 < 1.07 for h, w in sdxl)
    options = ingest_images.Options(source="photos", output="x", resolution="40_of_1024")
    assert set(options.sizes) == sdxl
    with pytest.raises(UserError, match="or a table: 40_of_1024, 33_of_1024"):
        _ = ingest_images.Options(source="photos", output="x", resolution="41_of_1024").sizes


def recipe(conditions: list[str]) -> recipes.Recipe:
    network = {"name": "pixart", "latent_size": 8, "hidden_size": 24, "depth": 1, "num_heads": 2, "text_dim": 12,
               "learn_sigma": False, "micro_conditions": True}  # fmt: skip
    return recipe_of(
        "latents", None, (4, 8),
        networks={"model": network},
        objective={"name": "denoising", "path": "ddpm_linear", "target": "v", "times": "discrete", "mirror": True,
                   "conditions": ["text", *conditions]},
        sample={"name": "ancestral", "steps": 2, "variance": "none", "guidance": 4.0},
        data={"train": {"sources": [{"folders": ["latents", "text"]}]}, "text_tokens": 6,
              "encoders": {"moments": {"folder": "vae"}, "text": {"folder": "t5"}}},
    )  # fmt: skip


class Heard:
    """A network that keeps what it was told, and answers zero."""

    def __init__(self) -> None:
        self.cond: list[dict[str, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        self.cond.append(dict(cond))
        return torch.zeros_like(x)


def test_a_mirrored_sample_is_told_its_mirrored_corner_and_sizes_are_never_dropped(root: Path) -> None:
    chosen = recipe([*SIZES])
    data = open_data(chosen, root)
    objective = Denoising(
        path="ddpm_linear", target="v", times="discrete", mirror=True, conditions=("text", *SIZES), condition_drop=0.9,
        latents=data.latent_stats,
    )  # fmt: skip
    assert objective.fields[-1] == "crop_top_left_mirrored"
    for batch in data.fixed(12, batch=12):
        heard, batch = Heard(), batch.on("cpu")
        rng = ProgressRng(0, 3, "main", batch.positions, torch.device("cpu"))
        objective.loss("main", {"model": heard}, batch, rng, 3)  # type: ignore[dict-item]
        (cond,) = heard.cond
        flipped = rng.uniform("mirror") < 0.5
        assert flipped.any() and not flipped.all()
        expected = torch.where(flipped[:, None], batch["crop_top_left_mirrored"], batch["crop_top_left"])
        assert torch.equal(cond["crop_top_left"], expected) and "crop_top_left_mirrored" not in cond
        assert all(
            torch.equal(cond[name], batch[name]) and (cond[name] > 0).all() for name in ("original_size", "target_size")
        )
        assert cond["drop"].any() and not cond["text"][cond["drop"]].any()
        objective.validate({"model": heard}, batch, rng)  # type: ignore[dict-item]
        assert torch.equal(heard.cond[-1]["crop_top_left"], batch["crop_top_left"])


def test_a_run_trains_on_sizes_and_draws_as_if_of_whole_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place: Place = start(recipe(["original_size", "target_size"]), root, "sized")
    trained = Trained(place.run, place)
    told: list[dict[str, torch.Tensor]] = []
    forward = PixArt.forward
    monkeypatch.setattr(
        PixArt, "forward", lambda net, x, t, cond: (told.append(dict(cond)), forward(net, x, t, cond))[1]
    )
    folder = evaluate.draw_prompts(place, ["red heart", "a big cat"], size="24x16", steps=2, output=root / "drawn")
    assert Image.open(folder / "000_red-heart.png").size == (16, 24)
    real = [cond for cond in told if not cond["original_size"].is_meta]
    assert real and all(
        cond[name].tolist() == [[24, 16]] * len(cond[name])
        for cond in real
        for name in ("original_size", "target_size")
    )
    assert {len(cond["text"]) for cond in real} == {4}, "two prompts and what each is guided away from"
    cond = trained.conditions(["red heart"])
    assert set(cond) == {"text", "text_mask"}
    told.clear()
    negative = trained.latents(cond, seed=0, negative=trained.conditions(["a big cat"]))
    assert not torch.equal(negative, trained.latents(cond, seed=0))
    height, width = trained.decoded_shape[1:]
    assert told[-1]["target_size"].tolist() == [[height, width]] * 2
    told.clear()
    evaluate.draw_prompts(
        place, ["red heart"], original_size="512x300", negative_prompt="cat", steps=2, output=root / "drawn"
    )
    assert told[-1]["original_size"].tolist() == [[512, 300]] * 2, "also of what is guided away from"
    for wishes, words in (
        ({"crop": "0x1"}, "--crop: the network of recipe .* is not told crop_top_left"),
        ({"original_size": "big"}, "--original-size 'big': expected HEIGHTxWIDTH"),
        ({"original_size": "0x5"}, "expected at least 1x1"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.draw_prompts(place, ["red heart"], output=root / "drawn", **wishes)
