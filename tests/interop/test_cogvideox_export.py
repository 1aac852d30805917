"""From a few animations to a trained CogVideoX, and from its export to the same clips in diffusers' own pipeline; scores of clips."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipelines import load_job
from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Progress, RunFolder, UserError
from nexus_scale.data.loader import Loader
from nexus_scale.data.manifest import Manifest
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.interop.encoders import OwnAutoencoder, open_vae
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.latent_space import LATENTS_FILE
from nexus_scale.media.pictures import to_uint8
from nexus_scale.metrics import classifier
from nexus_scale.run.runs import open_run
from nexus_scale.train import Place, open_data, train
from tests.tiny_encoders import save_text_encoder

diffusers = pytest.importorskip("diffusers")

FRAMES, SIDE, TOKENS = 9, 16, 5
CAPTIONS = ("red heart", "blue flag", "big cat", "the dog")
CALLBACKS = {"validate": None, "samples": None, "checkpoint": {"every": 2}, "throughput": None, "goodput": None}
CLUSTER = {"workers": 0, "threads_per_worker": 1}


def animation(number: int) -> bytes:
    """A square that moves, red or blue by the group."""
    colour = ((200, 30, 30), (30, 30, 200))[number % 2]
    frames = []
    for f in range(FRAMES + 1):
        frame = Image.new("RGB", (SIDE, SIDE), "white")
        x = (f + number) % (SIDE - 4)
        frame.paste(colour, (x, 4 + number % 5, x + 5, 9 + number % 5))
        frames.append(frame)
    buffer = io.BytesIO()
    frames[0].save(buffer, "webp", save_all=True, append_images=frames[1:], duration=125, loop=0, lossless=True)
    return buffer.getvalue()


def run_of(name: str, recipe: str, changes: dict[str, Any], root: Path, **encoders: dict[str, Any]) -> Place:
    values = recipes.dump(recipes.load_recipe(recipe, {"callbacks": CALLBACKS, "steps": 2, "prepare": [], **changes}))
    values["data"]["encoders"] = encoders
    made = recipes.recipe_from(values, "test")
    place = Place(RunFolder(root / "runs" / name), root / "data", root / "runs")
    place.run.path.mkdir(parents=True)
    cluster = recipes.cluster_from(CLUSTER, "test")
    for path, part in ((place.run.recipe, made), (place.run.cluster, cluster)):
        plain_yaml.write_yaml(path, recipes.dump(part))
    train(made, cluster, place, make_draw)
    return place


def latents(root: Path, statistics: str) -> None:
    for split in ("train", "heldout"):
        load_job("precompute_latents").run(
            input=f"clips/{split}/clips", output=f"clips/{split}/latents", vae={"run": "vae"}, batch=4, mirror=True,
            statistics=statistics, workers=0, data_root=root / "data", runs_root=root / "runs",
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A CogVideoX after two steps, on latents of an autoencoder after two steps."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cogvideox")
    videos = root / "data" / "videos"
    videos.mkdir(parents=True)
    with (root / "data" / "videos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("path", "caption", "group"))
        writer.writeheader()
        for i in range(24):
            (videos / f"{i:02d}.webp").write_bytes(animation(i))
            row = {"path": f"videos/{i:02d}.webp", "caption": CAPTIONS[i % 4], "group": ("red", "blue")[i % 2]}
            writer.writerow(row)
    places = {"data_root": root / "data", "runs_root": root / "runs"}
    load_job("ingest_clips").run(
        source={"path": "videos.csv", "label_column": "group"}, output="clips", size=f"{SIDE}x{SIDE}", frames=FRAMES, fps=8,
        heldout=0.3, shard_videos=8, workers=0, **places,
    )  # fmt: skip
    sizes: dict[str, Any] = {"latent_channels": 4, "channels": [4, 4, 4], "num_groups": 2}
    split = {
        name: {"sources": [{"folders": [f"clips/{kind}/clips"]}]}
        for name, kind in (("train",) * 2, ("validation", "heldout"))
    }
    vae: dict[str, Any] = {
        "global_batch": 4,
        "networks": {"model": {**sizes, "num_frames": FRAMES, "image_size": [SIDE, SIDE]}},
        "objective": {"latent_shape": [4, 3, 4, 4]},
        "data": split,
    }
    run_of("vae", "vae/tiny_clips", vae, root)
    latents(root, "whole")
    save_text_encoder(root / "data" / "t5", "t5")
    for kind in ("train", "heldout"):
        load_job("precompute_text").run(
            input=f"clips/{kind}/clips", output=f"clips/{kind}/text", encoders=[{"folder": "t5"}], workers=0, **places
        )
    both = {name: {"sources": [{"folders": [f"clips/{kind}/{what}" for what in ("latents", "text")], "balance": 0.5}]}
            for name, kind in (("train",) * 2, ("validation", "heldout"))}  # fmt: skip
    network: dict[str, Any] = {"latent_channels": 4, "latent_frames": 3, "latent_height": 4, "latent_width": 4}
    changes: dict[str, Any] = {
        "global_batch": 4,
        "networks": {
            "model": {**network, "depth": 2, "hidden_size": 32, "num_heads": 2, "text_dim": 12, "text_tokens": TOKENS}
        },
        "objective": {"times": {"name": "stratified", "intervals": 4, "of": "discrete"}},
        "optimizer": {"lr": 0.02, "schedule": {"warmup_steps": 0}},
        "data": {**both, "text_tokens": TOKENS},
        "sample": {"steps": 5, "guidance": 1.0},
    }
    return run_of("cogvideox", "cogvideox/tiny_emoji", changes, root, moments={"run": "vae"}, text={"folder": "t5"})


def test_diffusers_pipeline_draws_the_same_clips_from_the_export(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer, scheduler and autoencoder as the run's folder has them, from the same noise to the same pixels."""
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    trained = Trained(place.run, place)
    cond = trained.conditions(["red heart"])
    real = int(cond["text_mask"].sum())
    ours = trained.latents(cond, seed=3)
    assert recipes.load_recipe("cogvideox/tiny_emoji").sample.name == "dpm"  # type: ignore[union-attr]

    transformer, report = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    vae, report = diffusers.AutoencoderKLCogVideoX.from_pretrained(
        folder / "vae", local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    scheduler = diffusers.CogVideoXDPMScheduler.from_pretrained(folder / "scheduler")
    pipeline = diffusers.CogVideoXPipeline(None, None, vae.eval(), transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    rng = ProgressRng(3, 0, "sample", torch.arange(1), torch.device("cpu"))
    noise = rng.normal("noise", trained.shape)
    # a second-order step draws twice and uses the second draw: give it the same twice
    draws = iter([i for i in range(5) for _ in range(1 if i in (0, 4) else 2)])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
        lambda *_, **__: rng.normal(f"noise_{next(draws)}", noise.shape[1:]).transpose(1, 2),
    )
    kept: list[torch.Tensor] = []

    def keep(_: Any, step: int, __: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.append(given["latents"])
        return {}

    drawn = pipeline(
        prompt_embeds=cond["text"][:, :real], height=SIDE, width=SIDE, num_frames=FRAMES, num_inference_steps=5, guidance_scale=1.0,
        latents=noise.transpose(1, 2), output_type="pt", max_sequence_length=real, callback_on_step_end=keep,
    ).frames  # fmt: skip
    theirs = kept[-1].transpose(1, 2)
    # relative to the way from the noise, which after two steps of training is short
    assert float((ours - theirs).norm() / (theirs - noise).norm()) < 1e-4
    assert float((ours - noise).norm() / noise.norm()) > 0.05, "the network does something"
    pixels = trained.decoded(ours)[0].transpose(0, 1)  # (F, 3, H, W) in [-1, 1], of eight bits
    assert drawn.shape == (1, FRAMES, 3, SIDE, SIDE)
    assert float((pixels - (drawn[0] * 2 - 1)).abs().max()) < 1.01 / 127.5


def test_an_autoencoder_folder_of_diffusers_serves_as_one(place: Place, tmp_path: Path) -> None:
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    own, theirs = open_vae({"run": "vae"}, place.runs_root), open_vae({"folder": str(folder / "vae")}, place.runs_root)
    assert isinstance(own, OwnAutoencoder) and isinstance(theirs, OwnAutoencoder)
    clips = torch.rand(2, 3, FRAMES, SIDE, SIDE) * 2 - 1
    assert torch.equal(own.encode(clips), theirs.encode(clips))
    with pytest.raises(UserError, match=r"takes 1 \+ 4k frames.*cut it to 5 or pad it to 9"):
        theirs.encode(clips[:, :, :6])


def test_a_frame_count_that_the_autoencoder_cannot_take_ends_the_job_with_what_to_set(place: Place) -> None:
    places = {"data_root": place.data_root, "runs_root": place.runs_root}
    load_job("ingest_clips").run(
        source="videos.csv", output="odd", size=f"{SIDE}x{SIDE}", frames=6, fps=8, workers=0, heldout=0.0, **places
    )
    with pytest.raises(UserError, match=r"6 frames.*`frames` of ingest_clips"):
        load_job("precompute_latents").run(
            input="odd/train/clips", output="odd/latents", vae={"run": "vae"}, workers=0, **places
        )


def test_latents_that_no_single_factor_scales_leave_the_autoencoder_out(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latents(place.data_root.parent, "channel")
    with pytest.raises(UserError, match="was trained on latents normalised as"):
        evaluate.export_run(place, "diffusers", tmp_path / "export")
    kept = (place.run.path / LATENTS_FILE).read_text()
    stats = Manifest.load(place.data_root / "clips/train/latents").latent
    assert stats is not None
    (place.run.path / LATENTS_FILE).write_text(
        json.dumps({"mean": stats.mean, "std": stats.std})
    )  # as a run begun on them
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    assert (folder / "config.json").is_file() and not (folder / "vae").exists()
    assert "statistics: whole" in caplog.text
    latents(place.data_root.parent, "whole")
    (place.run.path / LATENTS_FILE).write_text(kept)


def test_prompts_become_animations(place: Place, tmp_path: Path) -> None:
    folder = evaluate.draw_prompts(place, ["red heart", "big cat"], steps=2, output=tmp_path / "drawn")
    assert sorted(file.name for file in folder.iterdir()) == ["000_red-heart.webp", "001_big-cat.webp", "grid.png"]
    trained = Trained(place.run, place)
    clip = trained.decoded(trained.latents(trained.conditions(["red heart", "big cat"]), seed=0, steps=2))[1]
    with Image.open(folder / "001_big-cat.webp") as animation:
        assert animation.n_frames == FRAMES and animation.size == (SIDE, SIDE)  # type: ignore[attr-defined]
        for number in range(FRAMES):
            animation.seek(number)
            shown = torch.tensor(list(animation.convert("RGB").tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
            assert torch.equal(shown, to_uint8(clip[None, :, number])[0])


def test_clips_are_scored(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(classifier.train_classifier, num_filters=16, num_components=16, width=8, views=3)
    monkeypatch.setattr(evaluate.classifiers, "train_classifier", small)
    settings = evaluate.ScoreSettings(
        train="clips/train/clips",
        heldout="clips/heldout/clips",
        samples_per_group=3,
        least_per_group=4,
        steps=2,
        classifier_networks=1,
        classifier_steps=60,
    )
    scores = evaluate.score_groups(place, settings)
    assert scores["samples"] == 6 and set(scores["groups"]) == {"red", "blue"}
    assert scores["real_accuracy"] == 1.0, "red is not blue"
    assert scores["frechet_real"] < min(scores["frechet"], scores["frechet_noise"], scores["frechet_grey"])
    assert (place.run.path / "scored.png").stat().st_size > 0
    with pytest.raises(UserError, match="0 of them have 99 and held-out ones"):
        evaluate.score_groups(place, settings.model_copy(update={"least_per_group": 99}))
    with pytest.raises(UserError, match="scores need `image` or `video`"):
        evaluate.score_groups(place, settings.model_copy(update={"train": "clips/train/latents"}))


def test_images_are_videos_of_one_frame_and_are_trained_on_beside_clips(place: Place, tmp_path: Path) -> None:
    """A source of their own: each global batch is of one length, on all ranks alike."""
    places = {"data_root": place.data_root, "runs_root": place.runs_root}
    images = place.data_root / "stills"
    images.mkdir(exist_ok=True)
    for i in range(8):
        Image.new("RGB", (SIDE + i, SIDE), (30 * i, 0, 200)).save(images / f"{i}.{('png', 'jpg')[i % 2]}")
        (images / f"{i}.json").write_text(json.dumps({"caption": CAPTIONS[i % 4], "label": i % 2}))
    load_job("ingest_clips").run(
        source="stills", output="stills-1", size=f"{SIDE}x{SIDE}", frames=1, fps=8, heldout=0.0, shard_videos=4, workers=0, **places
    )  # fmt: skip
    with pytest.raises(UserError, match=r"no such files .*mp4"):
        load_job("ingest_clips").run(
            source="stills", output="stills-2", size=f"{SIDE}x{SIDE}", frames=2, fps=8, workers=0, **places
        )
    load_job("precompute_latents").run(
        input="stills-1/train/clips", output="stills-1/latents", vae={"run": "vae"}, mirror=True,
        statistics="clips/train/latents", workers=0, **places
    )  # fmt: skip
    load_job("precompute_text").run(
        input="stills-1/train/clips", output="stills-1/text", encoders=[{"folder": "t5"}], workers=0, **places
    )
    values = recipes.dump(open_run(place.run.path)[1])
    clips = values["data"]["train"]["sources"][0]
    values["data"]["train"]["sources"] = [
        {**clips, "balance": 0.0}, {"folders": ["stills-1/latents", "stills-1/text"], "weight": 1.0}
    ]  # fmt: skip
    recipe = recipes.recipe_from(values, "test")
    dataset = open_data(recipe, place.data_root)
    loader = Loader(
        dataset, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, progress=Progress(), prefetch=0
    )
    lengths = [tuple(batch["moments"].shape[2:]) for _ in range(8) for batch in loader.next_batches()]
    assert set(lengths) == {(1, 4, 4), (3, 4, 4)}
    cluster = recipes.cluster_from(CLUSTER, "test")
    train(
        recipe.model_copy(update={"steps": 4}), cluster, Place(RunFolder(tmp_path / "run"), *places.values()), make_draw
    )


@pytest.mark.parametrize("name", ["quickstart", "score_cifar10", "score_emoji", "score_fashion_mnist"])
def test_the_settings_that_ship_are_read(name: str) -> None:
    assert evaluate.score_settings(name).samples_per_group >= 10
