"""`nexus generate`: samples as shards, the same bits however and by whom, nothing redone, and what other jobs read."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import generate_samples
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import decode, read_samples
from nexus_scale.data.sounds import decode_wav
from nexus_scale.generate.export import export_run
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.train import Place
from tests.distributed import nexus, started, until
from tests.generate.test_prompts import trained_on_made_up_data

SMALL = {"shard_samples": 8, "batch": 4, "steps": 2, "workers": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    (root / "data").mkdir()
    (root / "data/prompts.txt").write_text("red heart\ngreen flag\nblue cat\n")
    return root


@pytest.fixture(scope="module")
def by_class(root: Path) -> Place:
    return trained_on_made_up_data(root, "dit/tiny_cifar10")


@pytest.fixture(scope="module")
def by_text(root: Path) -> Place:
    return trained_on_made_up_data(root, "mmdit/tiny_openmoji")


def drawn(place: Place, output: str, **changed: Any) -> Manifest:
    options = {**SMALL, "output": output, "run": place.run.path.name, **changed}
    made: Manifest = generate_samples.run(**options, data_root=place.data_root, runs_root=place.runs_root)
    assert generate_samples.done(**options, data_root=place.data_root, runs_root=place.runs_root)
    return made


def samples_of(folder: Path) -> list[dict[str, bytes]]:
    return [sample.members for path in sorted(folder.glob("*.tar")) for sample in read_samples(path)]


def contents(folder: Path) -> dict[str, bytes]:
    names = ("*.tar", "manifest.json", "index.safetensors")
    return {str(p.relative_to(folder)): p.read_bytes() for name in names for p in folder.rglob(name)}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.tar")}


# ------------------------------------------------------------------------------------------------- what is written


def test_samples_of_every_class_with_their_noise(by_class: Place) -> None:
    """Sample i is the one that the run draws at that seed and position; the folder is read like any other."""
    made = drawn(by_class, "classes", per_class=3, latents=True, seed=5)
    assert made.samples == 30
    assert [shard.samples for shard in made.shards] == [8, 8, 8, 6]
    assert made.encoder is not None
    assert made.encoder["run"] == by_class.run.path.name
    assert (made.encoder["step"], made.encoder["precision"]) == (1, "float32")
    rows = samples_of(made.folder)
    assert [json.loads(row["json"]) for row in rows[9:12]] == [
        {"prompt": str(position % 10), "seed": 5, "position": position} for position in (9, 10, 11)
    ]
    assert [int(row["cls"]) for row in rows] == [position % 10 for position in range(30)]

    dataset = Dataset.open([Source([made.folder])])
    batch = next(iter(dataset.fixed(30, batch=30)))
    order = batch.samples
    trained = Trained(by_class.run, by_class)
    alone = trained.latents({"label": torch.tensor([7])}, seed=5, steps=2, positions=[17])
    place = order.tolist().index(17)
    torch.testing.assert_close(batch["latents"][place], alone[0], atol=1e-5, rtol=1e-5)
    noise = ProgressRng(5, 0, "sample", torch.tensor([17])).normal("noise", trained.shape)
    assert torch.equal(batch["noise"][place], noise[0])
    with Image.open(io.BytesIO(rows[17]["png"])) as image:
        (shown,) = trained.medium.decode(batch["latents"][place][None])
        assert np.array_equal(np.array(image), trained.medium.picture(shown))


def test_prompts_over_and_over_as_nexus_sample_draws_them(by_text: Place, root: Path, tmp_path: Path) -> None:
    made = drawn(by_text, "texts", prompts="prompts.txt", count=10, guidance=3.0, negative="grey", format="webp")
    rows = samples_of(made.folder)
    assert [row["txt"].decode() for row in rows[:4]] == ["red heart", "green flag", "blue cat", "red heart"]
    folder = draw_prompts(
        by_text,
        ["red heart", "green flag", "blue cat"],
        steps=2,
        guidance=3.0,
        negative_prompt="grey",
        output=tmp_path / "a",
    )
    for row, name in zip(rows, ["000_red-heart.png", "001_green-flag.png", "002_blue-cat.png"], strict=False):
        with Image.open(io.BytesIO(row["webp"])) as written, Image.open(folder / name) as sampled:
            assert np.abs(np.array(written, int) - np.array(sampled, int)).max() <= 1


def test_a_larger_count_redoes_nothing_and_what_is_there_is_never_replaced(by_class: Place, root: Path) -> None:
    drawn(by_class, "grown", prompts=str(numbers(root)), count=16)
    before = stamps(root / "data/grown")
    drawn(by_class, "grown", prompts=str(numbers(root)), count=16)
    assert stamps(root / "data/grown") == before
    grown = drawn(by_class, "grown", prompts=str(numbers(root)), count=20)
    after = stamps(root / "data/grown")
    assert grown.samples == 20
    assert {name: after[name] for name in before} == before
    others: dict[str, dict[str, Any]] = {
        r"steps: 2 there, 3 now": {"steps": 3},
        r"seed: 0 there, 1 now": {"seed": 1},
        r"shard_samples: 8 there, 4 now": {"shard_samples": 4},
        r"batch: 4 there, 8 now": {"batch": 8},
        r"count: 20 there, only 16 now": {"count": 16},
        r"latents: the default there, True now": {"latents": True},
        r"other prompts": {"prompts": None, "count": None, "per_class": 4},
    }
    for message, changed in others.items():
        with pytest.raises(UserError, match=message):
            drawn(by_class, "grown", **({"prompts": str(numbers(root)), "count": 20} | changed))
    assert stamps(root / "data/grown") == after
    (root / "data/grown/manifest.json").unlink()  # as where it was killed
    with pytest.raises(UserError, match=r"steps: 2 there, 3 now"):
        drawn(by_class, "grown", prompts=str(numbers(root)), count=20, steps=3)


def test_a_folder_of_something_else_is_left_alone(by_class: Place, root: Path) -> None:
    thesis = root / "data/papers/thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("all of it")
    with pytest.raises(UserError, match=r"papers: holds 'thesis\.tex', which is no sample"):
        drawn(by_class, "papers", per_class=1)
    assert [path.name for path in thesis.parent.iterdir() if not path.name.startswith(".")] == ["thesis.tex"]


def numbers(root: Path) -> Path:
    path = root / "data/classes.txt"
    path.write_text("3\n1\n")
    return path


def test_clips_and_sounds_go_into_shards_at_their_rates(root: Path) -> None:
    pytest.importorskip("av")
    clips = trained_on_made_up_data(root, "cogvideox/tiny_emoji")
    video = drawn(clips, "clips", prompts="prompts.txt", count=2)
    assert video.fields["video"].shape == (3, 3, 4, 4)
    assert "video" in Dataset.open([Source([video.folder])]).fields
    assert b"ftyp" in samples_of(drawn(clips, "films", prompts="prompts.txt", count=1, format="mp4").folder)[0]["mp4"]
    speech = trained_on_made_up_data(root, "valle/tiny_speech")
    sounds = drawn(speech, "sounds", prompts="prompts.txt", steps=None)
    assert sounds.rates == {"audio": 8000.0}
    rows = samples_of(sounds.folder)
    assert [row["txt"].decode() for row in rows] == ["red heart", "green flag", "blue cat"]
    trained = Trained(speech.run, speech)
    said = trained.speak(["green flag"], trained.voices[:1], seed=0, positions=[1])[0]
    assert np.allclose(decode_wav(rows[1]["wav"]).wave[0], said[0].cpu().numpy(), atol=2**-15)


# -------------------------------------------------------------------------------------------- the same bits, however


@pytest.mark.ray
def test_one_actor_two_actors_and_this_process_give_the_same_bits(by_class: Place, root: Path) -> None:
    from nexus_scale.orchestration.cluster import connected

    with connected():
        for workers in (0, 1, 2):
            drawn(by_class, f"by_{workers}", per_class=3, latents=True, workers=workers)
    alone = contents(root / "data/by_0")
    assert len([name for name in alone if name.endswith(".tar")]) == 8, "requests and samples"
    assert contents(root / "data/by_1") == alone
    assert contents(root / "data/by_2") == alone


def slowly(place: Place) -> None:
    """Draws, a moment for each batch, so that a kill comes in the middle."""
    encode = generate_samples.Drawing.encode

    def slow(self: generate_samples.Drawing, samples: Any) -> Any:
        time.sleep(0.2)
        return encode(self, samples)

    generate_samples.Drawing.encode = slow  # type: ignore[method-assign]
    drawn(place, "killed", per_class=4)


def test_killed_in_the_middle_and_run_again_nothing_is_redone(by_class: Place, root: Path, tmp_path: Path) -> None:
    drawn(by_class, "unbroken", per_class=4)
    folder = root / "data/killed"
    process = started(slowly, by_class, log=tmp_path / "log")
    until(lambda: len(list(folder.glob("*.tar.json"))) >= 2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = {p: p.stat().st_mtime_ns for p in folder.glob("*.tar") if p.with_name(f"{p.name}.json").exists()}
    assert 2 <= len(finished) < 5
    assert not (folder / "manifest.json").exists()
    drawn(by_class, "killed", per_class=4)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(folder) == contents(root / "data/unbroken")


@pytest.mark.parametrize("name", ["dit/tiny_cifar10", "mmdit/tiny_openmoji"])
def test_an_exported_folder_draws_what_its_run_draws(name: str, root: Path, by_class: Place, by_text: Place) -> None:
    place, wanted = (by_class, {"per_class": 1}) if name.startswith("dit") else (by_text, {"prompts": "prompts.txt"})
    folder = export_run(place, "diffusers", root / "exports" / place.run.path.name)
    own = drawn(place, f"own_{folder.name}", latents=True, **wanted)
    theirs = drawn(place, f"exported_{folder.name}", latents=True, run=str(folder), **wanted)
    assert theirs.samples == own.samples
    for one, other in zip(samples_of(own.folder), samples_of(theirs.folder), strict=True):
        assert one["json"] == other["json"]
        difference = decode("npy", one["latents.npy"]) - decode("npy", other["latents.npy"])
        assert np.abs(difference).max() < 1e-5
    if name.startswith("dit"):  # in pixels, which no pipeline of diffusers draws
        told = (folder / "README.md").read_text()
        assert "draws pixels" in told and "`nexus sample` draws with this folder" in told
        code: dict[str, Any] = {"folder": folder}
        exec(told.split("```python\n")[1].split("```")[0], code)  # our own file, written a moment ago
        assert type(code["network"]).__name__ == "DiTTransformer2DModel"
    (folder / "nexus.json").write_text("{}")
    with pytest.raises(UserError, match=r"nexus\.json.*export the run again"):
        drawn(place, "damaged", run=str(folder), **wanted)


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected prompts, per_class, or the count"),
        ({"count": 3}, "at least one prompt; give --prompts FILE or --per-class N"),
        ({"per_class": 2, "count": 3}, "both say how many"),
        ({"per_class": 2, "format": "mp4"}, "image is written into shards as png or webp"),
        ({"per_class": 2, "negative": "cat", "guidance": 1.0}, "has no effect at guidance 1"),
        ({"per_class": 2, "speaker": "1"}, "does not speak"),
        ({"per_class": 2, "size": "8"}, "expected HEIGHTxWIDTH"),
        ({"prompts": "nowhere.txt"}, "cannot be read as text"),
        ({"prompts": "prompts.txt"}, "no class 'red heart'"),
        ({"per_class": 2, "run": "nothing"}, "not a run folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(
    by_class: Place, root: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        drawn(by_class, "refused", **options)
    assert not (root / "data/refused").exists()


def test_the_command_takes_paths_of_the_shell(by_class: Place, tmp_path: Path) -> None:
    line = [str(by_class.run.path), "--per-class", "1", "--steps", "2", "--output", str(tmp_path / "out")]
    code, said = nexus(tmp_path, "generate", *line)
    assert code == 0, said
    assert f"samples in {tmp_path / 'out'}" in said
    assert Manifest.load(tmp_path / "out").samples == 10
    code, said = nexus(tmp_path, "generate", "--help")
    assert code == 0
    assert "--per-class" in said and "nexus generate` takes a path of the shell" in " ".join(said.split())
    code, said = nexus(tmp_path, "generate", str(by_class.run.path), "--output", str(tmp_path / "none"))
    assert code == 2
    assert "expected prompts, per_class" in said
    assert "Traceback" not in said
