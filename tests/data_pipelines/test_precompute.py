"""Precompute jobs: right values, one shard for one shard, nothing redone, the same bits however and by whom."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from data_pipelines import ingest_images, precompute_latents, precompute_text
from nexus_scale.contracts import Shard, UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.images import decode_image, encode_png
from nexus_scale.data.manifest import DataError, Manifest
from nexus_scale.data.shards import decode, read_samples
from nexus_scale.engine.checkpoint import CheckpointStore
from nexus_scale.interop.encoders import TextEncoder, open_vae
from nexus_scale.models.vae.vae import VAE
from nexus_scale.orchestration.data_jobs import Made, encoder_share
from tests.tiny_encoders import save_autoencoder_kl, save_text_encoder

COLOURS = ("red", "blue", "big", "the")
THINGS = ("heart", "flag", "cat", "dog")
VAE_ARGUMENTS = {"image_size": 16, "latent_channels": 3, "patch_size": 4, "hidden_size": 8, "depth": 1}


def save_run(runs: Path, seed: int = 0) -> VAE:
    """A run of an autoencoder as training leaves it; its averaged weights are those of the returned network."""
    torch.manual_seed(seed)
    average, trained = VAE(**VAE_ARGUMENTS), VAE(**VAE_ARGUMENTS)  # type: ignore[arg-type]
    average.init_weights()
    run = runs / "vae"
    run.mkdir(parents=True, exist_ok=True)
    recipe = {
        "name": "vae",
        "steps": 1,
        "global_batch": 1,
        "networks": {"model": {"name": "vae", **VAE_ARGUMENTS}, "ema": {"average_of": "model", "decay": 0.9}},
        "objective": {"name": "elbo", "latent_shape": [3, 4, 4]},
        "data": {"synthetic": {"fields": {"image": {"shape": [3, 16, 16]}}}},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    shards = {}
    for role, kind, network in (("model", "fp32", trained), ("ema", "ema", average)):
        for name, parameter in network.named_parameters():
            shards[f"{role}/{name}.{kind}"] = Shard(parameter.detach().flatten(), 0, tuple(parameter.shape))
    store = CheckpointStore(run / "checkpoints", rank=0, world_size=1, attempt="0")
    store.save(seed + 1, shards, {})
    store.wait()
    return average.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 captioned images of 16 x 16 in eight shards, a run of an autoencoder, and folders of encoders."""
    root = tmp_path_factory.mktemp("precompute")
    (root / "in").mkdir()
    rows = []
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (root / f"in/{number}.png").write_bytes(encode_png(pixels))
        caption = f"{COLOURS[number % 4]} {THINGS[number // 4 % 4]}" + " a" * (number % 3)
        rows.append({"path": f"{number}.png", "caption": caption, "label": number % 4})
    (root / "in/t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest_images.run(
        source="in/t.jsonl", output="set", heldout=0.0, shard_samples=8, resolution=16, data_root=root, runs_root=root
    )
    save_run(root / "runs")
    for kind in ("t5", "clip", "clip_plain"):
        save_text_encoder(root / kind, kind)
    return root


def text(root: Path, output: str = "text", **options: Any) -> Manifest:
    options = {"encoders": [{"folder": "clip"}], "workers": 0, **options}
    return precompute_text.run(
        input="set/train/images", output=output, data_root=root, runs_root=root / "runs", **options
    )


def latents(root: Path, output: str = "latents", **options: Any) -> Manifest:
    options = {"vae": {"run": "vae"}, "workers": 0, "batch": 3, **options}
    return precompute_latents.run(
        input="set/train/images", output=output, data_root=root, runs_root=root / "runs", **options
    )


def rows(manifest: Manifest) -> dict[str, dict[str, bytes]]:
    manifest.verify(deep=True)
    return {one.key: one.members for shard in manifest.shards for one in read_samples(manifest.folder / shard.file)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_captions_that_are_cut_are_counted_once_for_all_shards(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = text(images, "uncut")
    assert json.loads((whole.folder / "report.json").read_text()) == {"samples": 64, "counts": {}}
    lengths = [decode("npy", members["text.npy"]).shape[0] for members in rows(whole).values()]
    cap = sorted(lengths)[len(lengths) // 2]
    longer = sum(length > cap for length in lengths)
    assert 0 < longer < 64 and cap >= 3
    with caplog.at_level("WARNING"):
        made = text(images, "cut", encoders=[{"folder": "clip", "max_tokens": cap}, {"folder": "t5"}])
    report = json.loads((made.folder / "report.json").read_text())
    assert report == {"samples": 64, "counts": {f"text: captions longer than {cap} tokens, which are cut": longer}}
    said = [record.message for record in caplog.records if "captions longer" in record.message]
    assert len(said) == 1 and f"{longer} of 64" in said[0]
    (made.folder / "shard-000002.tar").unlink()
    text(images, "cut", encoders=[{"folder": "clip", "max_tokens": cap}, {"folder": "t5"}])
    assert json.loads((made.folder / "report.json").read_text()) == report, "also of shards that were there from before"
    data = Dataset.open([Source([whole.folder])], ["text"], text_tokens=cap)
    assert data.cut() == {"text": longer} and not Dataset.open([Source([whole.folder])], ["text"], text_tokens=64).cut()


def test_masks_come_with_the_moments_of_what_they_leave(images: Path) -> None:
    made = latents(images, "masked", masks=True, seed=3)
    first = rows(made)
    size = made.fields["moments"].shape
    assert (
        size is not None and made.fields["mask"].shape == (1, *size[1:]) and made.fields["masked_moments"].shape == size
    )
    covered = []
    for members in first.values():
        mask, left, whole = (decode("npy", members[f"{name}.npy"]) for name in ("mask", "masked_moments", "moments"))
        assert set(np.unique(mask)) <= {0.0, 1.0} and left.shape == whole.shape
        assert not mask.any() or np.abs(left - whole).max() > 0.05, "what is covered is not told"
        covered.append(float(mask.mean()))
    assert 0 < sum(covered) / len(covered) < 1 and len(set(covered)) > 3
    assert rows(latents(images, "masked_again", masks=True, seed=3)) == first
    assert rows(latents(images, "masked_otherwise", masks=True, seed=4)) != first


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_edited_file_of_an_encoder_is_seen_by_its_contents(images: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(images / "clip", tmp_path / "clip")
    given: dict[str, Any] = {"encoders": [{"folder": str(tmp_path / "clip")}]}
    text(images, "edited", **given)
    given |= {"input": "set/train/images", "output": "edited", "data_root": images, "runs_root": images}
    file = tmp_path / "clip" / name
    before = file.read_bytes()
    edited = {
        "config.json": before.replace(b"1e-05", b"1e-06"),
        "tokenizer.json": before.replace(b'"big"', b'"pig"'),
        "model.safetensors": before[:-1] + bytes([before[-1] ^ 1]),
    }[name]
    file.write_bytes(edited)
    assert file.read_bytes() != before and file.stat().st_size == len(before)
    assert not precompute_text.done(**given)
    file.write_bytes(before)
    assert precompute_text.done(**given), "restored, with another time"


def test_latents_are_the_averaged_networks_moments(images: Path) -> None:
    source, made = Manifest.load(images / "set/train/images"), latents(images)
    assert [(s.file, s.samples) for s in made.shards] == [(s.file, s.samples) for s in source.shards]
    assert len(made.shards) == 8
    assert list(rows(made)) == list(rows(source))
    assert made.fields["moments"].shape == (6, 4, 4)
    assert made.source == source.hash
    vae = open_vae({"run": "vae"}, images / "runs")
    assert made.fingerprint == vae.fingerprint
    made.check_encoder(vae.fingerprint)
    average = save_run(images / "again")
    stored = []
    for key, members in rows(source).items():
        image = torch.from_numpy(decode_image(members["png"])).permute(2, 0, 1).float() / 127.5 - 1
        with torch.no_grad():
            expected = average.encode(image[None])[0]
        moments = decode("npy", rows(made)[key]["moments.npy"])
        assert moments.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(moments).float(), expected, atol=2e-3, rtol=2e-3)
        assert rows(made)[key]["cls"] == members["cls"]
        stored.append(moments.astype(np.float64))
    mean, logvar = np.split(np.stack(stored), 2, axis=1)  # (64, C, h, w) each
    assert made.latent is not None
    np.testing.assert_allclose(made.latent.mean, mean.mean((0, 2, 3)), rtol=1e-12)
    variance = mean.var((0, 2, 3)) + np.exp(logvar).mean((0, 2, 3))
    np.testing.assert_allclose(made.latent.std, np.sqrt(variance), rtol=1e-10)


def test_one_factor_for_all_channels_changes_the_manifest_alone(images: Path) -> None:
    """As published autoencoders have it: no shift, and the deviation of all channels together."""
    by_channel = latents(images, "factor")
    shards = {name: data for name, data in contents(by_channel.folder).items() if name.endswith(".tar")}
    places = {"data_root": images, "runs_root": images / "runs"}
    job = {"input": "set/train/images", "output": "factor", "vae": {"run": "vae"}, "batch": 3}
    assert precompute_latents.done(**job, **places)
    assert not precompute_latents.done(**job, statistics="whole", **places)
    whole = latents(images, "factor", statistics="whole")
    assert precompute_latents.done(**job, statistics="whole", **places) and not precompute_latents.done(**job, **places)
    assert shards == {name: data for name, data in contents(whole.folder).items() if name.endswith(".tar")}
    assert by_channel.latent is not None and whole.latent is not None
    mean, std = (torch.tensor(values).double() for values in (by_channel.latent.mean, by_channel.latent.std))
    assert whole.latent.mean == (0.0,) * len(mean)
    expected = float((std.square().mean() + mean.square().mean() - mean.mean().square()).sqrt())
    assert whole.latent.std == pytest.approx((expected,) * len(mean), rel=1e-6)
    other = latents(images, "others", statistics="factor")
    assert other.latent == whole.latent, "taken over"
    with pytest.raises(DataError, match="has no latent statistics"):
        latents(images, "others", statistics="set/train/images")
    with pytest.raises(UserError, match="expected channel or whole, or a folder of latents"):
        latents(images, "factor", statistics="chanel")


def test_text_of_three_encoders(images: Path) -> None:
    specs = [{"folder": "clip"}, {"folder": "clip_plain"}, {"folder": "t5"}]
    made = text(images, "text3", encoders=specs)
    assert set(made.fields) == {"caption", "text", "pooled", "text_2", "pooled_2", "text_3"}
    assert made.fields["text"].shape == (None, 8)
    assert made.fields["pooled"].shape == (6,)
    assert made.fields["text_3"].shape == (None, 12)
    encoders = [TextEncoder.open(spec, images) for spec in specs]
    for members in list(rows(made).values())[:10]:
        caption = members["txt"].decode()
        for number, encoder in enumerate(encoders, start=1):
            ending = "" if number == 1 else f"_{number}"
            tokens = decode("npy", members[f"text{ending}.npy"])
            assert len(tokens) == len(caption.split()) + (1 if number == 3 else 2)
            np.testing.assert_allclose(tokens, encoder.encode([caption])[0].tokens, atol=4e-3)
    alone = text(images, "text1", encoders=[{"folder": "clip"}])
    assert alone.fingerprint == encoders[0].fingerprint
    assert made.fingerprint not in {each.fingerprint for each in encoders}


def test_max_tokens_cuts_and_is_remembered(images: Path) -> None:
    made = text(images, "short", max_tokens=3)
    assert max(len(decode("npy", members["text.npy"])) for members in rows(made).values()) == 3
    assert made.encoder is not None
    assert made.encoder["encoders"][0]["max_tokens"] == 3
    places = {"data_root": images, "runs_root": images}
    options = {"input": "set/train/images", "output": "short", "encoders": [{"folder": "clip"}], **places}
    assert precompute_text.done(max_tokens=3, **options)  # type: ignore[arg-type]
    assert not precompute_text.done(max_tokens=4, **options)  # type: ignore[arg-type]
    assert not precompute_text.done(max_tokens=3, **{**options, "input": "nowhere"})  # type: ignore[arg-type]


def test_a_second_run_writes_nothing_and_reports_progress_to_the_end(images: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = latents(images, "twice", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (64, 64)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    before = {path: path.stat().st_mtime_ns for path in (images / "twice").iterdir()}
    assert latents(images, "twice").hash == first.hash
    assert before == {path: path.stat().st_mtime_ns for path in (images / "twice").iterdir()}


def test_a_damaged_or_lost_shard_alone_is_made_again(images: Path) -> None:
    latents(images, "hurt")
    whole = contents(images / "hurt")
    times = {path.name: path.stat().st_mtime_ns for path in (images / "hurt").iterdir()}
    (images / "hurt/shard-000003.tar").unlink()
    os.truncate(images / "hurt/shard-000005.tar", 1000)
    latents(images, "hurt")
    assert contents(images / "hurt") == whole
    redone = {p.name for p in (images / "hurt").iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert {name for name in redone if name.endswith(".tar")} == {"shard-000003.tar", "shard-000005.tar"}


def test_another_autoencoder_makes_all_again_and_the_old_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "set").symlink_to(images / "set")
    save_run(tmp_path / "runs")
    first = latents(tmp_path)
    save_run(tmp_path / "runs", seed=1)  # a newer checkpoint of the same run
    options = {"input": "set/train/images", "output": "latents", "vae": {"run": "vae"}}
    assert not precompute_latents.done(**options, data_root=tmp_path, runs_root=tmp_path / "runs")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="got data of encoder"):
        first.check_encoder(open_vae({"run": "vae"}, tmp_path / "runs").fingerprint)
    second = latents(tmp_path)
    assert {s.xxh3_128 for s in second.shards}.isdisjoint({s.xxh3_128 for s in first.shards})
    assert precompute_latents.done(**options, data_root=tmp_path, runs_root=tmp_path / "runs")  # type: ignore[arg-type]


def test_a_damaged_input_shard_is_refused_and_what_is_finished_stays(images: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(images / "set", tmp_path / "set")
    shutil.copytree(images / "runs", tmp_path / "runs")
    shard = tmp_path / "set/train/images/shard-000004.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000004\.tar: got hash"):
        latents(tmp_path)
    assert len(list((tmp_path / "latents").glob("*.tar"))) == 4
    assert not (tmp_path / "latents/manifest.json").exists()
    assert not list((tmp_path / "latents").glob(".*.tmp"))


def test_a_diffusers_autoencoder_serves_as_vae(images: Path) -> None:
    pytest.importorskip("diffusers")
    save_autoencoder_kl(images / "kl")
    made = latents(images, "kl_latents", vae={"folder": "kl"})
    assert made.fields["moments"].shape == (8, 8, 8)
    assert made.fingerprint == open_vae({"folder": "kl"}, images, root=images).fingerprint


KILLED = """
import sys, time
from pathlib import Path
import nexus_scale.orchestration.data_jobs as jobs
from data_pipelines import precompute_latents

class Slow(precompute_latents.LatentEncoder):
    def encode(self, samples):
        print("encoding", flush=True)
        sys.stdin.readline()
        return super().encode(samples)

precompute_latents.LatentEncoder = Slow
root = Path(sys.argv[1])
precompute_latents.run(input="set/train/images", output="killed", vae={"run": "vae"}, batch=3, workers=0,
                       data_root=root, runs_root=root / "runs")
"""


def test_killed_in_the_middle_and_run_again_equals_an_unbroken_run(images: Path) -> None:
    latents(images, "unbroken")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(images)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    folder = images / "killed"
    try:
        assert process.stdin is not None and process.stdout is not None
        while process.stdout.readline() and len(list(folder.glob("*.tar.json"))) < 3:
            process.stdin.write(b"go on\n")
            process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = {p: p.stat().st_mtime_ns for p in folder.glob("shard-*.tar") if p.with_name(f"{p.name}.json").exists()}
    assert 3 <= len(finished) < 8
    assert not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match="did not finish"):
        Manifest.load(folder)
    latents(images, "killed")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(folder) == contents(images / "unbroken")


def test_bits_do_not_depend_on_how_the_caller_uses_threads(images: Path) -> None:
    before = torch.get_num_threads()
    latents(images, "threads_a")
    try:
        torch.set_num_threads(2)
        latents(images, "threads_b")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(images / "threads_a") == contents(images / "threads_b")


def test_mistakes_are_named(images: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        precompute_text.run(
            input="nowhere", output="x", encoders=[{"folder": "clip"}], data_root=images, runs_root=images
        )
    with pytest.raises(UserError, match="expected 1 to 3"):
        text(images, "x", encoders=[])
    with pytest.raises(UserError, match="train the autoencoder first"):
        latents(images, "x", vae={"run": "nothing"})
    with pytest.raises(UserError, match="one folder"):
        text(images, "set/train/images")
    text(images, "captions_only")
    with pytest.raises(DataError, match="expected an image"):
        precompute_latents.run(
            input="captions_only", output="x", vae={"run": "vae"}, data_root=images, runs_root=images / "runs"
        )


def test_statistics_do_not_depend_on_the_order_of_sums(images: Path) -> None:
    from nexus_scale.orchestration.data_jobs import _Sums

    moments = [np.random.default_rng(n).normal(0, 10.0 ** (n % 9 - 4), (4, 2, 2)).astype(np.float16) for n in range(50)]
    results = []
    for order in (moments, moments[::-1]):
        sums = _Sums()
        for each in order:
            sums.add(each)
        results.append(sums.to_json())
    assert results[0] == results[1]
    assert math.isclose(results[0]["first"][0], math.fsum(float(m[0].astype(np.float64).sum()) for m in moments))


def test_the_time_in_the_encoder_is_told(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    latents(images, "timed")
    (said,) = [record.getMessage() for record in caplog.records if "spent in the encoder" in record.getMessage()]
    assert "64 samples by 1 processes" in said
    caplog.clear()
    latents(images, "timed")
    assert "encoder" not in caplog.text, "nothing was made"
    two = [Made(4, 3.0, 10.0, 14.0, "a:1"), Made(4, 3.0, 16.0, 20.0, "a:1"), Made(4, 9.0, 0.0, 10.0, "a:2")]
    assert encoder_share(two) == pytest.approx(15 / 20), "waiting between two shards counts"


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_makes_the_same_bits_and_goes_on_where_it_was_stopped(images: Path) -> None:
    here = contents(text(images, "here").folder)
    script = """
import os, sys
from pathlib import Path
from data_pipelines import precompute_text
os.umask(0o027)
root = Path(sys.argv[1])
seen = []
precompute_text.run(input="set/train/images", output="by_ray", encoders=[{"folder": "clip"}], workers=2, data_root=root,
                    runs_root=root, progress=lambda done, total: seen.append(done))
assert seen[-1] == 64 and seen == sorted(seen), seen
import ray
assert not ray.is_initialized()
"""
    text(images, "by_ray")
    for number in (1, 6):
        (images / f"by_ray/shard-00000{number}.tar").unlink()
    kept = {p: p.stat().st_mtime_ns for p in (images / "by_ray").glob("*.tar")}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", script, str(images)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(images / "by_ray") == here
    modes = {stat.S_IMODE((images / f"by_ray/shard-00000{number}.tar").stat().st_mode) for number in (1, 6)}
    assert modes == {0o640}, "what Ray's workers write has the user's umask"
