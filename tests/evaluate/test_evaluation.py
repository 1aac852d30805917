"""`nexus evaluate` and `compare`: what is better has better figures, with intervals, between real samples and noise; what is missing is
said before anything is drawn; and evaluations that were not measured alike are not compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.class_images import LabelledImages, write_splits
from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.config.recipe import configs_root
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.sounds import encode_wav
from nexus_scale.evaluate import comparison, drawn, findings
from nexus_scale.evaluate.comparison import NONE_SHOWN
from nexus_scale.evaluate.evaluation import evaluate
from nexus_scale.evaluate.findings import Evaluation, Findings
from nexus_scale.evaluate.sources import Source
from nexus_scale.evaluate.suite import read_suite
from nexus_scale.generate.export import export_run
from nexus_scale.generate.trained import Trained
from nexus_scale.metrics.colours import colour_follows, colour_said, colour_shares
from nexus_scale.metrics.music import NOTES
from nexus_scale.metrics.scenes import Boxes, Scene
from nexus_scale.metrics.statistics import Resampling
from nexus_scale.train import Place
from tests.distributed import nexus
from tests.generate.test_prompts import trained_on_made_up_data
from tests.metrics.test_music import RATE, tune

BETTER = ("pixels/frechet", "pixels/kernel", "pixels/coverage", "following/group")
NEITHER = ("pixels/precision", "pixels/recall", "pixels/density")


def shades(count: int, seed: int, noise: float = 0.0) -> LabelledImages:
    """Dark and light pictures of one blurred blob each, a share of them replaced by noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    coarse = generator.integers(0, 110, (count, 4, 4, 3)) + 130 * labels.reshape(-1, 1, 1, 1)
    clean = coarse.repeat(4, axis=1).repeat(4, axis=2)
    noisy = (1 - noise) * clean + noise * generator.integers(0, 256, clean.shape)
    return LabelledImages(noisy.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation") / "data"
    splits = {"train": shades(64, 0), "heldout": shades(48, 1)}
    splits |= {
        "good": shades(48, 2),
        "alike": shades(48, 3),
        "middle": shades(48, 4, 0.3),
        "early": shades(48, 5, 0.97),
    }
    write_splits(root / "shades", splits, ("dark", "light"), licence="none", attribution="made up")
    write_yaml(root / "suite.yaml", suite())
    return root


def suite(**changed: Any) -> dict[str, Any]:
    figures = ["frechet", "kernel", "precision", "recall", "density", "coverage"]
    section = {
        "reference": "shades/heldout/images", "others": "shades/train/images", "count": 48, "features": {"pixels": figures},
        "following": ["group"], "classifier_steps": 40, "guidance": None, **changed,
    }  # fmt: skip
    return {"samples": {k: v for k, v in section.items() if v is not None}, "resampling": {"halves": 20}}


@pytest.fixture(scope="module")
def evaluated(root: Path) -> dict[str, Path]:
    names = ("good", "alike", "middle", "early")
    return {
        name: evaluate(
            root / "shades" / name / "images", None, str(root / "suite.yaml"), root, output=root / "out" / name
        )[1]
        for name in names
    }


def test_every_figure_of_quality_orders_what_is_better_and_worse(evaluated: dict[str, Path]) -> None:
    found = {name: findings.read(folder)[0] for name, folder in evaluated.items()}
    for name in BETTER:
        values = [found[one].figures[name].value for one in ("good", "middle", "early")]
        sign = 1 if found["good"].figures[name].better == "lower" else -1
        assert sign * values[0] <= sign * values[1] <= sign * values[2] and values[0] != values[2], (name, values)
        figure = found["good"].figures[name]
        assert figure.low <= figure.value <= figure.high and figure.floor is not None and figure.ceiling is not None
        assert sign * figure.floor < sign * figure.ceiling and sign * figure.value < sign * figure.ceiling
        assert figure.samples == 48
    assert found["good"].references["shades/heldout/images"]["samples"] == 48
    assert all(
        found["good"].figures[name].better is None for name in NEITHER
    )  # of samples that are all alike, too, they may be high
    assert set(found["good"].features) == {"pixels", "classifier"}
    table = found["good"].table()
    assert all(word in table for word in ("pixels/frechet", "48 / 48 real", "floor", "ceiling"))


def test_differences_have_intervals_and_equal_sets_show_none(evaluated: dict[str, Path]) -> None:
    found = comparison.compare([evaluated[name] for name in ("good", "alike", "early")])
    alike, early = found.values()
    assert all(one.verdict.startswith(NONE_SHOWN) and one.low <= one.difference <= one.high for one in alike)
    by_name = {one.figure: one for one in early}
    for name in BETTER:
        assert by_name[name].verdict == "worse" and by_name[name].corrected < 0.05 and not by_name[name].paired
    assert {by_name[name].verdict for name in NEITHER} <= {
        "lower",
        "higher",
        NONE_SHOWN,
        f"{NONE_SHOWN} among so many figures",
    }
    assert "early" in comparison.table(found) and json.loads(comparison.as_json(found))


def sounds(folder: Path, tempos: Sequence[float]) -> list[str]:
    """Tunes in C, D, .. major at those tempos, with their captions: what is said of them."""
    captions = [f"a tune in {NOTES[n]} major, {tempo:g} beats a minute" for n, tempo in enumerate(tempos)]
    folder.mkdir(parents=True)
    for number, (tempo, caption) in enumerate(zip(tempos, captions, strict=True)):
        wave = 0.5 * tune(number, "major", tempo)[None].numpy()
        (folder / f"{number}.wav").write_bytes(encode_wav(wave, RATE))
        (folder / f"{number}.txt").write_text(caption)
    return captions


def test_a_folder_of_sounds_is_judged_by_what_stands_beside_each(tmp_path: Path) -> None:
    captions = sounds(tmp_path / "made", (60, 90, 120, 150))
    with ShardWriter(
        tmp_path / "data" / "tunes" / "0.tar",
        [Field("audio", "wav", "int16", (1, None)), Field("caption", "txt", "text")],
    ) as writer:
        for n, caption in enumerate(captions):
            writer.write(str(n), {"audio": (tmp_path / "made" / f"{n}.wav").read_bytes(), "caption": caption})
    finish_folder(tmp_path / "data" / "tunes")
    (tmp_path / "made" / "3.txt").write_text("a tune in C minor, 60 beats a minute")
    write_yaml(tmp_path / "music.yaml", {"music": {"clips": "tunes"}})
    found, folder = evaluate(tmp_path / "made", None, str(tmp_path / "music.yaml"), tmp_path / "data")
    assert {name: (one.value, one.floor) for name, one in found.figures.items()} == {
        "music/key": (0.75, 1.0), "music/tempo": (0.75, 1.0)
    }  # fmt: skip
    assert comparison.compare([folder, folder])  # no noise is known: nothing is paired
    (tmp_path / "made" / "2.txt").unlink()
    with pytest.raises(UserError, match=r"2\.wav: nothing says what it is"):
        evaluate(tmp_path / "made", None, str(tmp_path / "music.yaml"), tmp_path / "data")
    write_yaml(tmp_path / "bits.yaml", {"likelihood": {}})
    with pytest.raises(UserError, match="needs a run"):
        evaluate(tmp_path / "made", None, str(tmp_path / "bits.yaml"), tmp_path / "data")


def test_what_was_not_measured_alike_is_not_compared(evaluated: dict[str, Path], root: Path, tmp_path: Path) -> None:
    write_yaml(tmp_path / "suite.yaml", suite(features={"pixels": ["frechet"]}))
    folder = root / "shades" / "good" / "images"
    other = evaluate(folder, None, str(tmp_path / "suite.yaml"), root, output=tmp_path / "a")[1]
    with pytest.raises(UserError, match="different suites"):
        comparison.compare([evaluated["good"], other])

    def changed(name: str, **values: Any) -> Path:
        evaluation, tensors = findings.read(evaluated["good"])
        findings.write(tmp_path / name, evaluation.model_copy(update=values), tensors)
        return tmp_path / name

    first = findings.read(evaluated["good"])[0]
    references = {**first.references, "shades/heldout/images": {"fingerprint": "other"}}
    with pytest.raises(UserError, match="different reference sets: shades/heldout/images"):
        comparison.compare([evaluated["good"], changed("b", references=references)])
    with pytest.raises(UserError, match="different prompts"):
        comparison.compare([evaluated["good"], changed("c", prompts={"samples": "others"})])
    with pytest.raises(UserError, match="two at least"):
        comparison.compare([evaluated["good"]])
    with pytest.raises(UserError, match=r"no evaluation; make one: nexus evaluate"):
        comparison.folder_of(folder, None)
    (tmp_path / "b" / findings.TENSORS).write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        findings.read(tmp_path / "b")


def test_a_folder_of_picture_files_is_read_and_says_what_it_lacks(root: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(shades(16, 9).images):
        Image.fromarray(picture).save(pictures / f"{number:03d}.png")
    found, folder = evaluate(pictures, None, str(root / "suite.yaml"), root)
    assert folder == tmp_path / "pictures.evaluations" / "suite" and (folder / "evaluation.png").exists()
    assert "following/group" in found.left_out and found.figures["pixels/frechet"].samples == 16
    assert comparison.folder_of(pictures, "suite") == folder
    code, output = nexus(tmp_path, "compare", str(pictures), str(pictures), "--json", NEXUS_DATA_ROOT=str(root))
    assert code == 0 and json.loads(output), output


@pytest.fixture(scope="module")
def mmdit(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return trained_on_made_up_data(tmp_path_factory.mktemp("evaluated"), "mmdit/tiny_openmoji")


def test_a_run_draws_the_captions_of_the_reference(
    mmdit: Place, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(mmdit.run, root, mmdit.runs_root)
    features = {"pixels": ["frechet", "kernel"]}
    write_yaml(tmp_path / "own.yaml", suite(features=features, following=None, count=16, steps=2))
    own = str(tmp_path / "own.yaml")
    found, folder = evaluate(place.run.path, place, own, root, step=1)
    assert folder == place.run.path / "evaluations" / "own-00000001" and found.of["step"] == 1
    other = evaluate(place.run.path, place, own, root, weights="model", output=tmp_path / "model")[1]
    (differences,) = comparison.compare([folder, other]).values()
    assert all(one.paired for one in differences), "the same prompts and noise"
    exported = Place(RunFolder(export_run(mmdit, None, tmp_path / "export")), root, mmdit.runs_root)
    again, of_export = evaluate(exported.run.path, exported, own, root)
    assert again.figures == found.figures and of_export.parent == exported.run.path / "evaluations", "the same weights"
    with pytest.raises(UserError, match="was exported at step 1"):
        evaluate(exported.run.path, exported, own, root, step=2)
    # what is missing is said before anything is drawn
    monkeypatch.setattr(Trained, "latents", lambda *_, **__: pytest.fail("drew"))
    monkeypatch.setattr(drawn, "seen", lambda *_, **__: pytest.fail("looked"))
    for changes, words in (
        ({"reference": "nowhere"}, "no such folder"),
        ({"features": {"inception": ["frechet"]}}, "features inception: no file"),
        ({"features": {"inception": ["frechet"]}, "weights": {"inception": {"file": "nowhere.pth"}}}, "not there"),
        ({"following": ["group"]}, "which the classifier takes"),
        ({"features": {"lips": ["frechet"]}}, "no 'lips'"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"steps": 100_000}, "steps"),
        ({"following": ["colour"], "colours": ["a heart"]}, "'a heart' names no colour"),
    ):
        section: dict[str, Any] = {"features": features, "following": None, "count": 16, "steps": 2, **changes}
        write_yaml(tmp_path / "other.yaml", suite(**section))
        with pytest.raises(UserError, match=words):
            evaluate(place.run.path, place, str(tmp_path / "other.yaml"), root)
    with pytest.raises(UserError, match="no checkpoint of step 7 that verifies; there are 1"):
        evaluate(place.run.path, place, own, root, step=7)


def test_what_an_autoencoder_rebuilds_and_how_likely_data_are(root: Path, tmp_path: Path) -> None:
    vae = trained_on_made_up_data(tmp_path, "vae/tiny_openmoji")
    write_yaml(tmp_path / "rebuilt.yaml", {"reconstruction": {"samples": 12, "features": {"pixels": ["frechet"]}}})
    found, folder = evaluate(vae.run.path, vae, str(tmp_path / "rebuilt.yaml"), root)
    assert set(found.figures) == {"reconstruction/psnr", "reconstruction/ssim", "reconstruction/pixels/frechet"}
    assert found.figures["reconstruction/psnr"].samples == 12
    (again,) = comparison.compare([folder, folder]).values()
    assert all(one.difference == 0 and one.paired and one.verdict == NONE_SHOWN for one in again)
    flow = trained_on_made_up_data(tmp_path, "flow_matching/tiny_fashion_mnist")
    with pytest.raises(UserError, match="rebuilds no pictures"):
        evaluate(flow.run.path, flow, str(tmp_path / "rebuilt.yaml"), root)
    write_yaml(tmp_path / "bits.yaml", {"likelihood": {"samples": 6, "batch": 6, "tolerance": 0.01}})
    found, _ = evaluate(flow.run.path, flow, str(tmp_path / "bits.yaml"), root)
    assert found.figures["likelihood/bits"].better == "lower" and found.figures["likelihood/bits"].error > 0
    with pytest.raises(UserError, match="knows no likelihood"):
        evaluate(vae.run.path, vae, str(tmp_path / "bits.yaml"), root)


def test_suites_that_come_with_the_project_are_read_and_mistakes_are_named(tmp_path: Path) -> None:
    names = [path.stem for path in sorted((configs_root() / "suites").glob("*.yaml"))]
    assert {"emoji", "images_quick", "fid_50k", "reconstruction", "bits", "speech", "music", "video"} <= set(names)
    assert len({read_suite(name).fingerprint for name in names}) == len(names)
    for values, words in (
        ({}, "no section to measure"),
        ({"samples": {"reference": "a", "features": {"pixels": ["fretchet"]}}}, "did you mean 'frechet'"),
        ({"samples": {"reference": "a"}}, "others: missing"),
        ({"samples": {"reference": "a", "others": "b", "following": ["colour"]}}, "go together"),
        ({"samples": {"reference": "a", "features": {}, "scenes": ["two dogs"]}}, "go together"),
        ({"samples": {"reference": "a", "others": "b", "count": "many"}}, "count"),
        ({"sample": {}}, "sample"),
    ):
        write_yaml(tmp_path / "suite.yaml", values)
        with pytest.raises(UserError, match=words):
            read_suite(str(tmp_path / "suite.yaml"))
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        read_suite("emojis")


def test_numbers_and_sides_are_judged_by_what_a_detector_finds() -> None:
    """Of two prompts, twice each, one picture follows another's."""

    class Finds:
        folder, fingerprint = Path("detr"), "f"

        def boxes(self, images: torch.Tensor) -> list[Boxes]:
            counts = [round(float(image.mean())) for image in images]
            return [Boxes(["apple"] * n, torch.ones(n), torch.zeros(n, 4)) for n in counts]

    shown = torch.tensor([2.0, 2.0, 3.0, 2.0]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    source = Source("made", "x", 4, lambda: iter([(torch.arange(4), shown)]))
    two, three = Scene("apple", 2), Scene("apple", 3)
    finder: Any = Finds()
    found = Findings()
    drawn._Scenes(source, [two, two, three, three], finder).add(found, "count", Resampling())
    figure = found.figures["following/count"]
    assert (figure.value, figure.ceiling, figure.better) == (0.75, 0.25, "higher")
    assert found.features["detector"] == {"name": "detr", "fingerprint": "f"}


def test_colours_are_found_by_rules_on_pixels() -> None:
    named = {
        "red": (210, 40, 40), "orange": (240, 140, 30), "yellow": (250, 220, 60), "green": (60, 170, 80), "blue": (60, 110, 220),
        "purple": (140, 60, 200), "pink": (250, 160, 175), "brown": (110, 65, 30), "black": (15, 15, 15), "grey": (130, 130, 130),
    }  # fmt: skip
    images = torch.ones(len(named), 3, 8, 8)
    for row, colour in enumerate(named.values()):
        images[row, :, 2:6, 2:6] = torch.tensor(colour).view(3, 1, 1) / 127.5 - 1
    captions = [f"{name} book" for name in named]
    shares = colour_shares(images)
    assert colour_follows(shares, captions).tolist() == [1.0] * len(named)
    assert colour_follows(shares, [*captions[1:], captions[0]]).sum() == 0
    assert colour_said("Gray cat") == "grey" and colour_said("woman: red hair") is None
    assert colour_said("red and blue") is None and colour_said("colored") is None
    assert (
        bool(colour_follows(shares[:1], ["a book"]).isnan().all()) and colour_shares(torch.ones(1, 3, 4, 4)).sum() == 0
    )
    assert Evaluation.model_fields["figures"].is_required()
