"""Latents are normalised as their autoencoder states, and decoded to as many frames as they were encoded from, in every door."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import precompute_latents
from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.interop import causal_vae3d
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.main_job import Target, check_data
from nexus_scale.media.animations import encode_animation
from nexus_scale.media.latent_space import LATENTS_FILE, check_normalisation, decoder_of, encoder_of
from nexus_scale.models.vae.causal_vae3d import CausalVAE3D
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.latents import LatentStats, denormalise, normalise
from nexus_scale.run.runs import newest_step
from nexus_scale.train import Place, open_data, train
from tests.tiny_encoders import save_autoencoder_kl

diffusers = pytest.importorskip("diffusers")

CLUSTER = {"workers": 0, "threads_per_worker": 1}
CALLBACKS = {
    "validate": {"every": 2, "samples": 2},
    "samples": None,
    "checkpoint": {"every": 2},
    "throughput": None,
    "goodput": None,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_images(folder: Path, *, count: int = 8, side: int = 16) -> None:
    fields = [Field("image", "png", "uint8", (side, side, 3)), Field("label", "cls", "int64", ())]
    with ShardWriter(folder / "0.tar", fields) as shard:
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
            shard.write(f"{i}", {"image": pixels, "label": i % 2})
    finish_folder(folder)


def write_clips(folder: Path, frames: int, *, count: int = 4, side: int = 16, rate_hz: float | None = None) -> None:
    fields = [Field("video", "video.npy", "uint8", (3, frames, side, side)), Field("label", "cls", "int64", ())]
    with ShardWriter(folder / "0.tar", fields) as shard:
        for i in range(count):
            video = np.random.default_rng(i).integers(0, 256, (3, frames, side, side), dtype=np.uint8)
            shard.write(f"{i}", {"video": video, "label": i % 2})
    finish_folder(folder, rates=None if rate_hz is None else {"video": rate_hz})


def save_kl(folder: Path, **factors: Any) -> Path:
    """A small AutoencoderKL whose config states `factors`."""
    save_autoencoder_kl(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **factors}))
    return folder


def save_video_vae(folder: Path, **factors: Any) -> Path:
    arguments: dict[str, Any] = {
        "num_frames": 17, "image_size": (16, 16), "latent_channels": 4, "channels": (4, 4, 4), "depth": 1, "num_groups": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    net = CausalVAE3D(**arguments)
    net.init_weights()
    causal_vae3d.DIFFUSERS.write(folder, net.state_dict(), arguments, **factors)
    return folder


def latents(root: Path, source: str, output: str, vae: str, **options: Any) -> Manifest:
    return precompute_latents.run(
        input=source, output=output, vae={"folder": vae}, workers=0, data_root=root, runs_root=root / "runs", **options
    )


OBJECTIVE = {"name": "denoising", "path": "ddpm_linear", "target": "v", "times": "discrete", "conditions": ["label"]}


def recipe_of(folder: str, moments: dict[str, Any] | None, shape: tuple[int, ...], **changes: Any) -> recipes.Recipe:
    values = recipes.dump(recipes.load_recipe("dit/tiny_cifar10", tiny=True))
    network = {"name": "dit", "latent_channels": shape[0], "latent_size": shape[1], "patch_size": 2, "hidden_size": 16, "depth": 1,
               "num_heads": 2, "num_classes": 2, "learn_sigma": False}  # fmt: skip
    split = {"sources": [{"folders": [folder]}]}
    values |= {
        "steps": 2, "global_batch": 2, "callbacks": CALLBACKS, "prepare": [], "objective": OBJECTIVE,
        "networks": {"model": network}, "sample": {"name": "ancestral", "steps": 3, "variance": "none", "guidance": 1.0},
        "data": {"train": split, "encoders": {} if moments is None else {"moments": moments}},
    }  # fmt: skip
    return recipes.recipe_from({**values, **changes}, "test")


def start(recipe: recipes.Recipe, root: Path, name: str) -> Place:
    place = Place(RunFolder(root / "runs" / name), root, root / "runs")
    place.run.path.mkdir(parents=True, exist_ok=True)
    cluster = recipes.cluster_from(CLUSTER, "test")
    plain_yaml.write_yaml(place.run.recipe, recipes.dump(recipe))
    plain_yaml.write_yaml(place.run.cluster, recipes.dump(cluster))
    train(recipe, cluster, place, make_draw)
    return place


# --------------------------------------------------------------------------------------------------- what is stated


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, lambda z: (z - 0.0609) * 1.5305),  # Stable Diffusion 3
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda z: (z - 0.1159) * 0.3611),  # FLUX.1
        ({"scaling_factor": 0.13025}, lambda z: z * 0.13025),  # SDXL
        ({}, lambda z: z * 0.18215),
        (
            {"scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4], "latents_std": [2, 2, 4, 4]},
            lambda z: (
                (z - torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1))
                * 0.5
                / torch.tensor([2.0, 2, 4, 4]).view(1, 4, 1, 1)
            ),
        ),
    ],
)
def test_latents_are_normalised_as_the_autoencoder_states(
    tmp_path: Path, factors: dict[str, Any], expected: Any
) -> None:
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", **factors)
    made = latents(tmp_path, "images", "latents", "vae")
    assert made.encoder is not None and made.encoder["normalisation"] == "stated"
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(normalise(z, made.latent), expected(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denormalise(expected(z), made.latent), z, rtol=1e-5, atol=1e-5)
    # and so it reaches training, through the objective
    dataset = open_data(recipe_of("latents", None, (4, 8)), tmp_path)
    assert Denoising(latents=dataset.latent_stats, conditions=()).latents == made.latent


def test_where_it_states_nothing_the_datas_statistics_serve(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    save_kl(tmp_path / "silent", scaling_factor=None)
    made = latents(tmp_path, "images", "silent-latents", "silent")
    assert made.encoder is not None and made.encoder["normalisation"] == "channel"
    assert made.latent is not None and len(set(made.latent.std)) == 4
    save_kl(tmp_path / "stating", scaling_factor=1.5305, shift_factor=0.0609)
    for asked, origin in (("channel", "channel"), ("whole", "whole"), ("silent-latents", "shared")):
        other = latents(tmp_path, "images", "asked", "stating", statistics=asked)
        assert other.encoder is not None and other.encoder["normalisation"] == origin
        assert other.latent is not None and other.latent != made.latent if asked == "whole" else True
    save_kl(tmp_path / "wrong", scaling_factor="much")
    with pytest.raises(UserError, match=r"wrong/config\.json: its normalisation cannot be used"):
        latents(tmp_path, "images", "wrong-latents", "wrong")
    save_kl(tmp_path / "zero", scaling_factor=0.0)
    with pytest.raises(UserError, match="expected a positive finite number"):
        latents(tmp_path, "images", "wrong-latents", "zero")


def test_latents_of_an_older_version_keep_the_datas_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their manifest does not say where its statistics come from; runs were trained on them."""
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", scaling_factor=1.5305, shift_factor=0.0609)
    job: dict[str, Any] = {
        "input": "images",
        "output": "latents",
        "vae": {"folder": "vae"},
        "data_root": tmp_path,
        "runs_root": tmp_path,
    }
    made = latents(tmp_path, "images", "latents", "vae", statistics="channel")
    assert made.encoder is not None
    old = finish_folder(
        made.folder,
        encoder={key: made.encoder[key] for key in ("kind", "fingerprint")},
        latent=made.latent,
        source=made.source,
    )
    with caplog.at_level(logging.INFO):
        assert precompute_latents.done(**job)
    assert "made by an older version" in caplog.text
    assert latents(tmp_path, "images", "latents", "vae").hash == old.hash, "not touched"
    write_images(tmp_path / "images", count=10)  # the input changed: made again, with the data's statistics as before
    again = latents(tmp_path, "images", "latents", "vae")
    assert again.latent is not None and len(set(again.latent.std)) == 4
    assert precompute_latents.done(**job)
    fresh = latents(tmp_path, "images", "fresh", "vae").latent
    assert fresh == LatentStats.stated(4, 1.5305, 0.0609)


def test_a_run_refuses_latents_that_are_normalised_in_another_way(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", scaling_factor=1.5305, shift_factor=0.0609)
    latents(tmp_path, "images", "latents", "vae")
    recipe = recipe_of("latents", {"folder": "vae"}, (4, 8))
    place = start(recipe, tmp_path, "run")
    kept = json.loads((place.run.path / LATENTS_FILE).read_text())
    assert kept["mean"] == [0.0609] * 4 and kept["normalisation"] == "stated"
    target = Target(recipe, recipes.cluster_from(CLUSTER, "test"), place)
    check_data(target)
    Trained(place.run, place)
    latents(tmp_path, "images", "latents", "vae", statistics="channel")
    for use in (lambda: check_data(target), lambda: Trained(place.run, place), lambda: start(recipe, tmp_path, "run")):
        with pytest.raises(
            UserError, match=r"was trained on latents normalised as \(z - 0\.0609\) \* 1\.5305; the data's"
        ):
            use()
    # a file that is lost or damaged is made good from the newest checkpoint
    file = place.run.path / LATENTS_FILE
    for damage in (file.unlink, lambda: file.write_text("{"), lambda: file.write_text('{"mean": [1], "std": [0]}')):
        damage()
        with pytest.raises(UserError, match=r"was trained on latents normalised as \(z - 0\.0609\)"):
            check_data(target)


def test_a_run_of_an_older_version_goes_on_with_the_datas_statistics_alone(tmp_path: Path) -> None:
    """Neither its folder nor its checkpoints say how its latents were normalised; there was one way."""
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", scaling_factor=1.5305, shift_factor=0.0609)
    latents(tmp_path, "images", "latents", "vae", statistics="channel")
    recipe = recipe_of("latents", {"folder": "vae"}, (4, 8))
    place = Place(RunFolder(tmp_path / "runs" / "run"), tmp_path, tmp_path / "runs")
    place.run.checkpoints.mkdir(parents=True)
    (place.run.checkpoints / "something").touch()
    check_normalisation(place.run, open_data(recipe, tmp_path))
    (place.run.path / LATENTS_FILE).write_text("[]")
    with pytest.raises(UserError, match=r"is damaged.*no checkpoint says how") as caught:
        check_normalisation(place.run, open_data(recipe, tmp_path))
    assert caught.value.code == 5
    (place.run.path / LATENTS_FILE).unlink()
    latents(tmp_path, "images", "latents", "vae")  # remade by this version
    with pytest.raises(UserError, match=r"begun by an older version.*statistics: channel"):
        check_normalisation(place.run, open_data(recipe, tmp_path))


def test_published_weights_on_another_scale_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", scaling_factor=1.5305, shift_factor=0.0609)
    recipe = recipe_of("latents", {"folder": "vae"}, (4, 8))
    values = recipes.dump(recipe)
    values["networks"]["model"]["init_from"] = {"format": "diffusers", "path": "published"}
    target = Target(recipes.recipe_from(values, "test"), recipes.cluster_from(CLUSTER, "test"),
                    Place(RunFolder(tmp_path / "runs/run"), tmp_path, tmp_path / "runs"))  # fmt: skip
    for statistics, said in (("channel", True), ("stated", False)):
        caplog.clear()
        latents(tmp_path, "images", "latents", "vae", statistics=statistics)
        check_data(target)
        assert (
            "published weights read latents as their autoencoder states, (z - 0.0609) * 1.5305" in caplog.text
        ) == said


def test_samples_are_decoded_as_diffusers_decodes_them(tmp_path: Path) -> None:
    """The same latents through our door and by the formula of diffusers' pipelines."""
    write_images(tmp_path / "images")
    save_kl(tmp_path / "vae", scaling_factor=1.5305, shift_factor=0.0609)
    latents(tmp_path, "images", "latents", "vae")
    place = start(recipe_of("latents", {"folder": "vae"}, (4, 8)), tmp_path, "run")
    trained = Trained(place.run, place)
    drawn = trained.latents({"label": torch.tensor([0, 1])}, seed=0)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    with torch.no_grad():
        theirs = vae.decode(drawn / vae.config.scaling_factor + vae.config.shift_factor).sample
    ours = trained.medium.pixels(drawn)  # type: ignore[attr-defined]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


# --------------------------------------------------------------------------------------------------- frames


def test_a_picture_is_encoded_by_what_made_the_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(fingerprint="another")
    monkeypatch.setattr("nexus_scale.media.latent_space.open_vae", lambda *given: other)
    recipe: Any = SimpleNamespace(data=SimpleNamespace(encoders={"moments": {"run": "vae"}}))
    with pytest.raises(UserError, match=r"data\.encoders\.moments: has fingerprint another, .* made with the first"):
        encoder_of(recipe, SimpleNamespace(encoders={"moments": {"fingerprint": "the first"}}), Path(), Path())


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 13, 17])
def test_clips_come_back_with_their_frames(tmp_path: Path, frames: int) -> None:
    write_clips(tmp_path / "clips", frames)
    save_video_vae(tmp_path / "vae", scaling_factor=0.7)
    vae = open_vae({"folder": "vae"}, tmp_path, root=tmp_path)
    x = torch.rand(1, 3, frames, 16, 16) * 2 - 1
    mean = vae.encode(x)[:, :4]
    assert vae.decode(mean, frames=frames).shape == x.shape
    if frames % 4 == 1:
        assert vae.decode(mean).shape == x.shape, "what published weights were trained on is the rule"
    made = latents(tmp_path, "clips", "latents", "vae")
    assert made.encoder is not None and made.encoder["frames"] == frames
    assert made.latent == LatentStats.stated(4, 0.7)
    recipe = recipe_of("latents", {"folder": "vae"}, (4, 4))
    decode = decoder_of(recipe, open_data(recipe, tmp_path), tmp_path, tmp_path)
    assert decode(mean).shape == x.shape
    # folders of older versions do not say: the clips beside them do, and without those the autoencoder's rule
    finish_folder(
        made.folder, encoder={"kind": "vae", "fingerprint": made.fingerprint}, latent=made.latent, source=made.source
    )
    assert decoder_of(recipe, open_data(recipe, tmp_path), tmp_path, tmp_path)(mean).shape == x.shape
    (tmp_path / "clips").rename(tmp_path / "vae" / "clips")
    alone = decoder_of(recipe, open_data(recipe, tmp_path), tmp_path, tmp_path)(mean)
    assert alone.shape[2] == (frames if frames % 4 == 1 else frames - 3)


def test_stills_and_clips_of_several_lengths_decode_each_to_its_own(tmp_path: Path) -> None:
    save_video_vae(tmp_path / "vae")
    for frames in (5, 1, 8):
        write_clips(tmp_path / f"clips-{frames}", frames)
        latents(tmp_path, f"clips-{frames}", f"latents-{frames}", "vae")
    recipe = recipe_of("latents-5", {"folder": "vae"}, (4, 4))
    values = recipes.dump(recipe)
    values["data"]["train"]["sources"].append({"folders": ["latents-1"]})
    both = recipes.recipe_from(values, "test")
    decode = decoder_of(both, open_data(both, tmp_path), tmp_path, tmp_path)
    assert decode(torch.zeros(1, 4, 2, 4, 4)).shape[2] == 5 and decode(torch.zeros(1, 4, 1, 4, 4)).shape[2] == 1
    values["data"]["train"]["sources"].append({"folders": ["latents-8"]})
    both = recipes.recipe_from(values, "test")
    with pytest.raises(UserError, match="clips of 8 frames beside others of 5; both are 2 latent frames"):
        decoder_of(both, open_data(both, tmp_path), tmp_path, tmp_path)


def test_a_run_draws_and_shows_as_many_frames_as_its_clips_have(tmp_path: Path) -> None:
    """Five frames are two latent frames: those that training draws, `nexus sample` and scores alike. They are shown at the clips' rate."""
    write_clips(tmp_path / "clips", 5, rate_hz=20.0)
    save_video_vae(tmp_path / "vae")
    latents(tmp_path, "clips", "latents", "vae")
    network = {"name": "cogvideox", "latent_channels": 4, "latent_frames": 2, "latent_height": 4, "latent_width": 4, "depth": 1,
               "hidden_size": 16, "num_heads": 2, "text_dim": 4, "text_tokens": 2, "time_dim": 8}  # fmt: skip
    with ShardWriter(tmp_path / "text" / "0.tar", [Field("text", "text.npy", "float16", (None, 4))]) as shard:
        for i in range(4):
            shard.write(f"{i}", {"text": np.ones((2, 4), np.float16)})
    finish_folder(tmp_path / "text")
    recipe = recipe_of(
        "latents", {"folder": "vae"}, (4, 4), networks={"model": network},
        objective={"name": "denoising", "path": "scaled_linear", "target": "v", "times": "discrete", "conditions": ["text"]},
        sample={"name": "dpm", "steps": 2}, callbacks={**CALLBACKS, "samples": {"every": 2, "count": 2}},
        data={"train": {"sources": [{"folders": ["latents", "text"]}]}, "text_tokens": 2, "encoders": {"moments": {"folder": "vae"}}},
    )  # fmt: skip
    place = start(recipe, tmp_path, "run")
    described = json.loads(next(place.run.samples.glob("step_*.json")).read_text())
    assert described["width"] == 5 * 16, "a strip of all frames"
    trained = Trained(place.run, place)
    cond = {"text": torch.ones(1, 2, 4), "text_mask": torch.ones(1, 2, dtype=torch.bool)}
    assert trained.decoded(trained.latents(cond, seed=0)).shape == (1, 3, 5, 16, 16)
    assert trained.medium.rate_hz == 20.0
    (clip,) = trained.medium.decode(trained.latents(cond, seed=0))
    with Image.open(io.BytesIO(trained.medium.file(clip))) as animation:
        animation.seek(1)
        animation.load()
        assert animation.info["duration"] == 50


def test_frames_that_look_alike_stay_as_many(tmp_path: Path) -> None:
    """libwebp merges them."""
    frames = np.stack([np.full((5, 7, 3), 40 * (i // 2), np.uint8) for i in range(5)])
    frames[4, 2, 3] = (1, 2, 3)
    with Image.open(io.BytesIO(encode_animation(frames, 0.125))) as animation:
        assert animation.n_frames == 5 and animation.size == (7, 5)  # type: ignore[attr-defined]
        for number, frame in enumerate(frames):
            animation.seek(number)
            assert np.array_equal(np.asarray(animation.convert("RGB")), frame)
            assert animation.info["duration"] == 125
    with pytest.raises(ValueError, match="expected at least one"):
        encode_animation(frames[:0], 0.1)


def test_sizes_that_the_autoencoder_cannot_take_are_refused_before_any_work(tmp_path: Path) -> None:
    save_kl(tmp_path / "vae")
    write_images(tmp_path / "odd", side=15)
    write_images(tmp_path / "even", side=16)
    for frames in (1, 6):
        write_clips(tmp_path / f"clips-{frames}", frames)
    save_video_vae(tmp_path / "video-vae")
    for source, vae, says in (
        ("odd", "vae", r"images of \(15, 15\).*multiples of 2 pixels.*`resolution` of ingest_images"),
        ("clips-6", "video-vae", r"cut it to 5 or pad it to 9; set `size` and `frames` of ingest_clips"),
        ("clips-1", "vae", "got clips; AutoencoderKL is for images"),
        ("even", "video-vae", "make the images with ingest_clips and frames 1"),
    ):
        with pytest.raises(DataError, match=says):
            latents(tmp_path, source, "none", vae)
    assert not (tmp_path / "none").exists(), "nothing was begun"


# --------------------------------------------------------------------------------------------------- without an autoencoder


@pytest.mark.parametrize("samples", [None, {"every": 2, "count": 2}])
def test_latents_made_elsewhere_are_trained_on_without_their_autoencoder(
    tmp_path: Path, samples: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    with ShardWriter(tmp_path / "latents" / "0.tar", [Field("moments", "moments.npy", "float16", (8, 8, 8)),
                                                      Field("label", "cls", "int64", ())]) as shard:  # fmt: skip
        for i in range(4):
            shard.write(f"{i}", {"moments": np.full((8, 8, 8), 0.1 * i, np.float16), "label": i % 2})
    finish_folder(tmp_path / "latents")
    recipe = recipe_of("latents", None, (4, 8), callbacks={**CALLBACKS, "samples": samples})
    check_data(
        Target(
            recipe,
            recipes.cluster_from(CLUSTER, "test"),
            Place(RunFolder(tmp_path / "runs/run"), tmp_path, tmp_path / "runs"),
        )
    )
    with caplog.at_level(logging.INFO):
        place = start(recipe, tmp_path, "run")
    assert caplog.text.count("no samples while training: data.encoders.moments") == (samples is not None)
    assert newest_step(place.run) == 2
    with pytest.raises(UserError, match=r"data\.encoders\.moments is left out"):
        evaluate.draw_prompts(place, ["0"])
    settings = evaluate.ScoreSettings(train="nowhere", heldout="nowhere")
    with pytest.raises(UserError, match=r"data\.encoders\.moments is left out"):
        evaluate.score_groups(place, settings)
    assert (evaluate.export_run(place, "diffusers") / "config.json").is_file()


def test_settings_of_another_type_are_named(tmp_path: Path) -> None:
    for name, save in (("kl", save_kl), ("video", save_video_vae)):
        file = save(tmp_path / name) / "config.json"
        config = json.loads(file.read_text())
        for key, value in (
            ("latent_channels", "x"), ("norm_num_groups", 0), ("block_out_channels", 0.5), ("latents_std", [0, 1, 1, 1]),
            ("latents_mean", "many"), ("scaling_factor", 10**400), ("shift_factor", [1]), ("layers_per_block", [1]),
        ):  # fmt: skip
            file.write_text(json.dumps({**config, key: value}))
            with pytest.raises(UserError):
                open_vae({"folder": name}, tmp_path, root=tmp_path)
