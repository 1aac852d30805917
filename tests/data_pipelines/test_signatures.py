"""A rerun sees what was edited in anything that a job reads, makes it again, and reads no file where nothing was."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import fetch_fashion_mnist, ingest_clips, ingest_images, signatures
from data_pipelines.signatures import MEMORY, Signatures, differences
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import read_samples


def image(number: int) -> bytes:
    """An uncompressed picture, so that all have one size."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def replace_keeping_time(path: Path, data: bytes) -> None:
    """What a copy tool does that keeps times: another inode, the same size and time."""
    stat = path.stat()
    assert len(data) == stat.st_size, (len(data), stat.st_size)
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The same six pictures as a folder, a table and a tar."""
    photos = tmp_path / "photos"
    photos.mkdir()
    with (tmp_path / "table.csv").open("w", newline="") as file, tarfile.open(tmp_path / "set.tar", "w") as tar:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        for number in range(6):
            (photos / f"{number}.png").write_bytes(image(number))
            (photos / f"{number}.txt").write_text(f"word {number}")
            rows.writerow([f"photos/{number}.png", f"word {number}"])
            for suffix, data in (("png", image(number)), ("txt", f"word {number}".encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (photos / "5.txt").unlink()
    (photos / "5.json").write_text(json.dumps({"caption": "word 5"}))
    return tmp_path


def ingest(root: Path, source: str, **options: Any) -> dict[str, list[bytes]]:
    """Each caption with its picture."""
    ingest_images.run(output="out", source=source, heldout=0.0, data_root=root, runs_root=root, **options)
    folder = root / "out/train/images"
    found = [s for shard in Manifest.load(folder).shards for s in read_samples(folder / shard.file)]
    return {sample.members["txt"].decode(): sample.members["png"] for sample in found}


def is_done(root: Path, source: str) -> bool:
    return ingest_images.done(output="out", source=source, heldout=0.0, data_root=root, runs_root=root)


def edit_tar(root: Path) -> None:
    data = (root / "set.tar").read_bytes()
    (root / "set.tar").write_bytes(data.replace(b"word 3", b"WORD 3"))


EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a caption of the same length": ("photos", lambda root: (root / "photos/3.txt").write_text("WORD 3"), "WORD 3"),
    "a caption in JSON": (
        "photos",
        lambda root: (root / "photos/5.json").write_text('{"caption": "WORD 5"}'),
        "WORD 5",
    ),
    "an image of the same size": ("photos", lambda root: (root / "photos/3.png").write_bytes(image(33)), "word 3"),
    "an image of the same size and time": (
        "photos",
        lambda root: replace_keeping_time(root / "photos/3.png", image(33)),
        "word 3",
    ),
    "a row of a table": (
        "table.csv",
        lambda root: (root / "table.csv").write_text((root / "table.csv").read_text().replace("word 3", "WORD 3")),
        "WORD 3",
    ),
    "an image that a table names": ("table.csv", lambda root: (root / "photos/3.png").write_bytes(image(33)), "word 3"),
    "a caption within a tar": ("set.tar", edit_tar, "WORD 3"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_seen_and_the_data_are_made_again(root: Path, edit: str, caplog: pytest.LogCaptureFixture) -> None:
    source, change, caption = EDITS[edit]
    before = ingest(root, source)
    assert is_done(root, source)
    change(root)
    assert not is_done(root, source)
    with caplog.at_level("INFO"):
        after = ingest(root, source)
    assert "1 edited" in caplog.text and "made again" in caplog.text
    assert caption in after and len(after) == 6
    assert after[caption] != before.get(caption), "the old picture or caption was kept"
    assert is_done(root, source)


def test_what_came_and_went_is_seen(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    ingest(root, "photos")
    (root / "photos/6.png").write_bytes(image(6))
    (root / "photos/6.txt").write_text("word 6")
    (root / "photos/0.png").unlink()
    with caplog.at_level("INFO"):
        after = ingest(root, "photos")
    assert set(after) == {f"word {number}" for number in range(1, 7)}
    assert "2 added" in caplog.text and "2 removed" in caplog.text


def test_a_rerun_reads_nothing_and_a_touch_or_a_copy_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(root, "photos")
    before = {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*.tar")}
    read: list[Path] = []
    real = signatures.hash_file
    monkeypatch.setattr(signatures, "hash_file", lambda path: (read.append(path), real(path))[1])
    ingest(root, "photos")
    assert not read, "nothing is new"
    os.utime(root / "photos/3.png")
    os.utime(root / "photos/3.txt")
    assert is_done(root, "photos") and len(read) == 2
    ingest(root, "photos")
    assert len(read) == 2, "what was touched is read once"
    assert before == {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*.tar")}, "and not made again"
    moved = root / "moved"
    shutil.copytree(root / "photos", moved / "photos", copy_function=shutil.copyfile)
    shutil.copytree(root / "out", moved / "out")
    assert is_done(moved, "photos"), "a data root that was copied is the same"


def test_other_options_over_edited_files_are_refused(root: Path) -> None:
    before = ingest(root, "photos")
    (root / "photos/3.txt").write_text("WORD 3")
    with pytest.raises(UserError, match=r"made with other options \(seed differ\)"):
        ingest(root, "photos", seed=1)
    folder = root / "out/train/images"
    found = {
        s.members["txt"].decode() for shard in Manifest.load(folder).shards for s in read_samples(folder / shard.file)
    }
    assert found == set(before)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"photos/0.png": 5}', b'{"photos/0.png": [1, 2, 3, null]}'])
def test_a_memory_that_is_damaged_costs_no_more_than_reading(root: Path, damage: bytes) -> None:
    ingest(root, "photos")
    (root / "out" / MEMORY).write_bytes(damage)
    assert is_done(root, "photos")


def test_files_that_are_not_there_have_contents_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    kept = Signatures(tmp_path / "out", tmp_path)
    of = kept.of([tmp_path / "a", tmp_path / "b", tmp_path / "c\0", tmp_path])
    assert of["a"] and of["b"] == "" and of["c\0"] == ""
    assert differences(of, {**of, "a": "other"}) == "1 edited (such as a)"


def test_data_of_an_older_version_are_kept_and_signed(root: Path) -> None:
    """Its report listed names and sizes, and knew fewer options."""
    ingest(root, "photos")
    path = root / "out/ingest_report.json"
    report = json.loads(path.read_text())
    contents = report.pop("contents")
    for key in ("captions", "background", "ignore"):
        report["options"].pop(key, None)
    known = (
        "path",
        "weight",
        "path_column",
        "caption_column",
        "label_column",
        "group_key",
        "root",
        "licence",
        "attribution",
    )
    report["options"]["sources"] = [{key: spec[key] for key in known} for spec in report["options"]["sources"]]
    report["files"] = [[[file.name, file.stat().st_size] for file in sorted((root / "photos").glob("*.png"))]]
    path.write_text(json.dumps(report))
    (root / "out" / MEMORY).unlink()
    before = {shard: shard.stat().st_mtime_ns for shard in (root / "out").rglob("*.tar")}
    assert not is_done(root, "photos"), "it is looked at once"
    ingest(root, "photos")
    assert is_done(root, "photos") and json.loads(path.read_text())["contents"] == contents
    assert before == {shard: shard.stat().st_mtime_ns for shard in (root / "out").rglob("*.tar")}
    path.write_text(json.dumps(report))
    (root / "photos/9.png").write_bytes(image(9) + b"longer")
    (root / "photos/9.txt").write_text("word 9")
    assert len(ingest(root, "photos")) == 7, "what it did not list is new"


def test_data_of_another_job_are_not_replaced(root: Path) -> None:
    given: dict[str, Any] = {"output": "out", "data_root": root, "runs_root": root}
    ingest(root, "photos")
    kept = Manifest.load(root / "out/train/images").hash
    clips = {"source": "photos", "size": "8x8", "frames": 1, "fps": 1, "heldout": 0.0}
    with pytest.raises(UserError, match="made with other options"):
        ingest_clips.run(**clips, workers=0, **given)
    with pytest.raises(UserError, match=r"another job \(ingest_report\.json\)"):
        fetch_fashion_mnist.run(package="photos", **given)
    assert is_done(root, "photos") and Manifest.load(root / "out/train/images").hash == kept
    (root / "fetched").mkdir()
    (root / "fetched/made_from.json").write_text('{"options": {}, "contents": {}}')
    for job, options in ((ingest_clips, {**clips, "workers": 0}), (ingest_images, {"source": "photos"})):
        with pytest.raises(UserError, match=r"another job \(made_from\.json\)"):
            job.run(**{**given, **options, "output": "fetched"})
