"""Whatever people have: every file, row and member is used, or counted as dropped with its place and reason; one bad item ends nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipelines import ingest_images, sources
from data_pipelines.sources import SourceSpec, open_source
from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import read_samples


def png(number: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def listed(root: Path, source: str | dict[str, Any], **options: Any) -> tuple[dict[str, str], dict[str, str], int]:
    """Captions by place, reasons by place, and how many were read, of a source whose account adds up."""
    found = open_source(SourceSpec.of(source), root, **options)
    account = found.account
    account.used = len(found.entries)
    account.check("test")
    folder = root / os.path.expanduser(found.spec.path)
    inside = f"{folder.name}/" if folder.is_dir() and not found.tars else ""
    places = [item["place"] for item in account.items] + [entry.place for entry in found.entries]
    assert all(place.startswith(inside) for place in places)
    dropped = {item["place"].removeprefix(inside): item["reason"] for item in account.items}
    assert len(dropped) == sum(account.dropped.values())
    return {entry.place.removeprefix(inside): entry.caption for entry in found.entries}, dropped, account.read


def run(root: Path, **options: Any) -> dict[str, Any]:
    values = {"output": "out", "heldout": 0.0, "max_bad": 1.0, **options}
    ingest_images.run(data_root=root, runs_root=root, **values)
    report = json.loads((root / values["output"] / "ingest_report.json").read_text())
    account = report["account"]
    assert account["read"] == account["used"] + sum(account["dropped"].values())
    assert account["used"] == sum(report["samples"].values())
    return report


def stored(root: Path) -> list[dict[str, bytes]]:
    manifest = Manifest.load(root / "out/train/images")
    return [one.members for shard in manifest.shards for one in read_samples(manifest.folder / shard.file)]


def tar_of(members: dict[str, bytes | str], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            body = data.encode() if isinstance(data, str) else data
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------- tables


def test_an_unclosed_quote_costs_its_own_row(tmp_path: Path) -> None:
    rows = [
        'path,caption', 'a.png,"open', 'b.png,two', 'c.png,"three"', 'd.png,"so ""quoted""\nover two lines"', 'e.png,five', '',
        'f.png,"again', 'g.png,a 5" screw', 'h.png,one,two', 'i.png,nine,,', 'j.png', '"k.png","he said "hi" there"', 'l.png,"end',
    ]  # fmt: skip
    write(tmp_path, {"t.csv": "\n".join(rows)})
    used, dropped, read = listed(tmp_path, "t.csv")
    assert used == {
        "t.csv:3": "two", "t.csv:4": "three", "t.csv:5": 'so "quoted" over two lines', "t.csv:7": "five",
        "t.csv:10": 'a 5" screw', "t.csv:12": "nine",
    }  # fmt: skip
    assert dropped == {
        "t.csv:2": "a row whose quote is not closed", "t.csv:9": "a row whose quote is not closed",
        "t.csv:11": "a row of more columns than the header", "t.csv:13": "an empty or missing caption",
        "t.csv:14": "a row whose quote is not closed", "t.csv:15": "a row whose quote is not closed",
    }  # fmt: skip
    assert read == 12


def test_quotes_of_a_tsv_are_characters(tmp_path: Path) -> None:
    rows = [
        "path\tcaption", 'a.png\t"Hello" she said', 'b.png\t"open', "c.png\tplain", 'd.png\t"all of ""it"""', 'e.png\t5" and 6"',
        'f.png\t"a\ttab"', 'g.png\tone\ttwo',
    ]  # fmt: skip
    write(tmp_path, {"t.tsv": "\r\n".join(rows)})
    used, dropped, _ = listed(tmp_path, "t.tsv")
    assert list(used.values()) == ['"Hello" she said', '"open', "plain", 'all of "it"', '5" and 6"', "a tab"]
    assert dropped == {"t.tsv:8": "a row of more columns than the header"}


def test_rows_end_at_line_ends_alone_and_long_fields_are_read(tmp_path: Path) -> None:
    long = "word " * 40_000
    text = f"path,caption\na.png,one\u2028two\x85three\x0bfour\rb.png,{long}\r\nc.png,last"
    write(tmp_path, {"t.csv": b"\xef\xbb\xbf" + text.encode(), "t.jsonl": '{"path": "a.png", "caption": "x\u2028y"}\n'})
    used, dropped, _ = listed(tmp_path, "t.csv")
    assert used == {"t.csv:2": "one two three four", "t.csv:3": long.strip(), "t.csv:4": "last"} and not dropped
    assert listed(tmp_path, "t.jsonl")[0] == {"t.jsonl:1": "x y"}


def test_columns_are_those_of_all_rows_and_odd_rows_are_dropped(tmp_path: Path) -> None:
    lines: list[bytes] = [
        b'{"path": "a.png", "score": NaN}', b'{"path": "b.png", "caption": "two", "label": 3, "score": Infinity}',
        b'{"path": "c.png", "caption": null}', b'{"path": "d.png", "caption": "cut \\ud83d"}', b"[" * 50_000, b"[1]", b"{", b"",
        b'{"path": ".", "caption": "x"}', b'{"path": "/", "caption": "x"}', b'{"caption": "x"}', b'{"path": 5, "caption": "x"}',
        b'{"path": "e\\u0000.png", "caption": "nul in its path"}', b'{"path": "f.png", "caption": "caf\xe9"}',
        b'{"path": "g.png", "caption": "x", "label": 99999999999999999999}', b'{"path": "h.png", "caption": "a\\u0000b"}',
        b'{"path": "i.png", "caption": ["x"]}', b'{"path": "j.png", "caption": "huge", "size": 1e999}', b'{"a": ' + b"9" * 5000 + b"}",
    ]  # fmt: skip
    write(tmp_path, {"t.jsonl": b"\n".join(lines), "b.png": png(), "d.png": png(1), "j.png": png(2)})
    used, dropped, read = listed(tmp_path, "t.jsonl")
    assert list(used.values()) == ["two", "cut \ufffd", "nul in its path", "huge"] and read == 18
    assert len(dropped) == 14
    report = run(tmp_path, source="t.jsonl")
    said = [json.loads(one["json"]) for one in stored(tmp_path)]
    assert not any("score" in one for one in said) and {one["label"] for one in said if "label" in one} == {3}
    assert report["samples"] == {"train": 3}


def test_parquet_with_nulls_and_values_that_json_cannot_say(tmp_path: Path) -> None:
    table = pa.table(
        {
            "path": pa.array(["a.png", "b.png", None, "c.png", "d.png"]),
            "caption": pa.array([b"one", b"two", b"x", None, b"caf\xe9"], pa.binary()),
            "score": pa.array([float("nan"), float("inf"), 1.0, 2.0, 3.0]),
            "when": pa.array([1, 2, 3, 4, 5], pa.timestamp("ns")),
            "boxes": pa.array([[1], [], None, [2], []]),
            "kind": pa.array(["x", "y", "x", "y", "x"]).dictionary_encode(),
        }
    )
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    write(tmp_path, {"a.png": png(), "b.png": png(1)})
    used, dropped, _ = listed(tmp_path, "t.parquet")
    assert used == {"t.parquet:1": "one", "t.parquet:2": "two"}
    assert dropped == {
        "t.parquet:3": "a row without a path", "t.parquet:4": "an empty or missing caption",
        "t.parquet:5": "a row whose text cannot be decoded",
    }  # fmt: skip
    run(tmp_path, source={"path": "t.parquet", "label_column": "kind"})
    assert not any("score" in json.loads(one["json"]) for one in stored(tmp_path))
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_source(SourceSpec.of("torn.parquet"), tmp_path)


def test_encodings_of_tables(tmp_path: Path) -> None:
    text = "path,caption\na.png,Café\nb.png,two\n"
    write(tmp_path, {"mark.csv": text.encode("utf-16"), "old.csv": text.encode("cp1252")})
    assert listed(tmp_path, "mark.csv")[0] == {"mark.csv:2": "Café", "mark.csv:3": "two"}
    used, dropped, _ = listed(tmp_path, "old.csv")
    assert list(used) == ["old.csv:3"] and dropped == {"old.csv:2": "a row whose text cannot be decoded"}
    assert listed(tmp_path, {"path": "old.csv", "encoding": "cp1252"})[0] == {"old.csv:2": "Café", "old.csv:3": "two"}


def test_labels_that_are_no_numbers_among_numbers_do_not_number_all_anew(tmp_path: Path) -> None:
    rows = "".join(f"{n}.png,c{n},{label}\n" for n, label in enumerate(["7", "--5", "7", "9", "²"]))
    write(tmp_path, {"t.csv": "path,caption,label\n" + rows, **{f"{n}.png": png(n) for n in range(5)}})
    report = run(tmp_path, source="t.csv")
    assert report["labels"] == {"7": 7, "9": 9}
    assert report["skipped"] == {"a label that is no whole number, where most are": 2}
    assert [item["place"] for item in report["account"]["items"]] == ["t.csv:3", "t.csv:6"]


# ----------------------------------------------------------------------------------------------------- folders


def test_everything_in_a_folder_is_read_or_said(tmp_path: Path) -> None:
    kinds = {
        "a.bmp": "BMP",
        "b.gif": "GIF",
        "c.tif": "TIFF",
        "d.avif": "AVIF",
        "e.JPEG": "JPEG",
        "f.webp": "WEBP",
        "g.jfif": "JPEG",
    }
    files: dict[str, bytes | str] = {name: png(n, kind) for n, (name, kind) in enumerate(kinds.items())}
    files |= {name.split(".")[0] + ".txt": f"caption {name}" for name in kinds}
    files |= {
        ".DS_Store": "x", "._a.png": "x", ".hidden/a.png": png(), "Thumbs.db": "x", "README.md": "x", "link.url": "x",
        "notes.txt": "x", "list.csv": "x", "photo.heic": "x", "__MACOSX/a.png": png(), "alone.png": png(), "broken.png": "x",
        "broken.json": "[1",
    }  # fmt: skip
    write(tmp_path / "photos [2024]", files)
    write(tmp_path / "elsewhere", {"deep/z.png": png(9), "deep/z.txt": "far away"})
    photos = tmp_path / "photos [2024]"
    (photos / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "round").symlink_to(photos, target_is_directory=True)
    (photos / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (photos / "again.png").symlink_to(photos / "alone.png")
    os.mkfifo(photos / "pipe.png")
    used, dropped, read = listed(tmp_path, "photos [2024]")
    assert used == {name: f"caption {name}" for name in kinds} | {"linked/deep/z.png": "far away"}
    hidden, foreign = "a hidden file or folder, or one that a system leaves behind", "a file of another kind"
    bare = "no readable .txt or .json beside the image"
    assert dropped == {
        ".DS_Store": hidden, "._a.png": hidden, ".hidden": hidden, "Thumbs.db": hidden, "__MACOSX": hidden,
        "README.md": foreign, "link.url": foreign, "list.csv": "a table beside images (name it as a source, and it is read)",
        "pipe.png": foreign, "notes.txt": "a text or JSON without an image beside it",
        "photo.heic": "an image of a format that is not read", "alone.png": bare, "again.png": bare,
        "broken.png": "a caption, label or JSON that cannot be read", "nowhere.png": "a link that leads nowhere",
        "round": "a folder that was read by another path",
    }  # fmt: skip
    assert read == len(used) + len(dropped)
    report = run(tmp_path, source="photos [2024]", max_bad=0.4)
    assert report["samples"] == {"train": 8} and "photos [2024]/README.md" in {
        item["place"] for item in report["account"]["items"]
    }
    assert hidden not in report["skipped"]


def test_what_is_ignored_is_counted_and_no_fault(tmp_path: Path) -> None:
    files = {"a.png": png(), "a.txt": "a", "a_mask.png": png(1), "drafts/b.png": png(2), "drafts/b.txt": "b"}
    write(tmp_path / "p", files)
    report = run(tmp_path, source="p", ignore=["*_mask.png", "drafts"], max_bad=0)
    assert report["account"]["dropped"] == {"left out by `ignore`": 2} and report["skipped"] == {}
    tar = tar_of({**files})
    table = "path,caption\na.png,a\ndrafts/b.png,b\n"
    write(tmp_path, {"t.tar": tar, "p/t.csv": table})
    spec = {"ignore": ["*_mask*", "drafts"]}
    assert list(listed(tmp_path, {"path": "t.tar", **spec})[0]) == ["t.tar:a.png"]
    assert list(listed(tmp_path, {"path": "p/t.csv", **spec})[0]) == ["t.csv:2"]


def test_the_root_of_the_file_system_is_no_folder_of_images(tmp_path: Path) -> None:
    for source in ("/", "//", "/tmp/.."):
        with pytest.raises(UserError, match="root of the file system"):
            open_source(SourceSpec.of(source), tmp_path)


def test_byte_order_marks_and_encodings_beside_images(tmp_path: Path) -> None:
    texts = {
        "a": b"\xef\xbb\xbfa cat\n",
        "b": "Käse".encode("utf-16"),
        "c": b"\xef\xbb\xbf",
        "d": b"caf\xe9",
        "e": "hi".encode("utf-16-le"),
    }
    files = {f"{name}.txt": text for name, text in texts.items()} | {
        f"{name}.png": png(n) for n, name in enumerate("abcdef")
    }
    files |= {"f.json": b'\xef\xbb\xbf{"caption": "\\ufeffmarked"}', "g.png": png(8), "g.txt": "\u200b \u2028"}
    write(tmp_path / "p", files)
    used, dropped, _ = listed(tmp_path, "p")
    assert used == {"a.png": "a cat", "b.png": "Käse", "f.png": "marked"}
    empty, damaged = "an empty or missing caption", "a caption, label or JSON that cannot be read"
    assert dropped == {"c.png": empty, "d.png": damaged, "e.png": damaged, "g.png": empty}
    write(tmp_path, {"t.tar": tar_of(dict(sorted(files.items())))})
    assert set(listed(tmp_path, "t.tar")[0].values()) == set(used.values())
    assert listed(tmp_path, {"path": "p", "encoding": "latin-1"})[0]["d.png"] == "café"


def test_a_source_may_name_what_stands_before_its_captions_and_its_label(tmp_path: Path) -> None:
    """Not where a caption is damaged: that one is dropped as before."""
    write(
        tmp_path / "in",
        {**{f"{name}.png": png() for name in "abcd"}, "b.txt": "a dog", "c.txt": "sks dog, old", "d.txt": b"\xff"},
    )
    found, dropped, _ = listed(tmp_path, {"path": "in", "prefix": "sks dog", "label": "mine"})
    assert found == {"a.png": "sks dog", "b.png": "sks dog a dog", "c.png": "sks dog, old"} and list(dropped) == [
        "d.png"
    ]
    entries = open_source(SourceSpec.of({"path": "in", "label": "mine"}), tmp_path).entries
    assert {(entry.label, entry.extra["group"]) for entry in entries} == {("mine", "mine")}
    assert SourceSpec.of("in").to_json().keys() == SourceSpec.of({"path": "in", "prefix": "x"}).to_json().keys() - {
        "prefix"
    }


def test_keys_end_at_the_first_dot_everywhere(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "s0.v1.png": png(0), "s0.v1.txt": "own", "s1.png": png(1), "s1.depth.png": png(2), "s1.txt": "plain", "s2.v1.png": png(3),
        "s2.v2.png": png(4), "s2.v1.txt": "one", "s2.v2.txt": "two", "s3.png": png(5), "s3.v1.txt": "whose?",
    }  # fmt: skip
    other = "a caption of another name than its image (keys end at the first dot of the name)"
    several = "one of several images under one key (keys end at the first dot of the name)"
    write(tmp_path, {**{f"p/{name}": data for name, data in files.items()}, "t.tar": tar_of(files)})
    used, dropped, _ = listed(tmp_path, "p")
    assert used == {"s0.v1.png": "own", "s1.png": "plain"}
    assert dropped == {"s1.depth.png": several, "s2.v1.png": several, "s2.v2.png": several, "s3.png": other}
    write(
        tmp_path,
        {"q/a.png": png(), "q/a.png.txt": "behind its suffix", "q/b.png": png(1), "q/b.caption": "another suffix"},
    )
    assert listed(tmp_path, "q")[0] == {"a.png": "behind its suffix", "b.png": "another suffix"}
    used, dropped, _ = listed(tmp_path, "t.tar")
    assert used == {"t.tar:s0.v1.png": "own", "t.tar:s1.png": "plain"}
    assert dropped == {
        "t.tar:s1.depth.png": "a further image of a sample",
        "t.tar:s2.v1.png": several,
        "t.tar:s3.png": other,
    }
    assert open_source(SourceSpec.of("t.tar"), tmp_path).account.bad == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_tars_and_loose_images_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    if streamed:
        monkeypatch.setattr(sources, "IN_MEMORY", 0)
    tar = {"a.png": png(1), "a.txt": "in the tar"}
    files = {"x.tar": tar_of(tar), "sub/y.tgz": gzip.compress(tar_of(tar)), "a.png": png(2), "a.txt": "loose"}
    write(tmp_path / "mixed", files)
    report = run(tmp_path, source="mixed")
    assert sorted(one["txt"].decode() for one in stored(tmp_path)) == ["in the tar", "in the tar", "loose"]
    assert report["account"]["read"] == 3
    assert report["notes"] == {}
    for one in stored(tmp_path):
        assert np.array_equal(decode_image(one["png"]), decode_image(png(2 if one["txt"] == b"loose" else 1)))


# ----------------------------------------------------------------------------------------------------- tars


def test_foreign_members_links_and_repeated_keys_cost_themselves_alone(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, data: bytes | str = b"", kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            body = data.encode() if isinstance(data, str) else data
            member.size, member.type, member.linkname = (len(body) if kind == tarfile.REGTYPE else 0), kind, "a.png"
            archive.addfile(member, io.BytesIO(body))

        for name in ("._a.png", ".DS_Store", "README", "info.url", ".", "__MACOSX/x.png", "extra.npy"):
            add(name, "x")
        add("link.png", kind=tarfile.SYMTYPE)
        add("device.png", kind=tarfile.CHRTYPE)
        add("./a.png", png())
        add("./a.txt", "one")
        add("b.png", png(1))
        add("b.cls", "7")
        add("c.txt", "no image")
        add("a.json", "{}")
        add("d.gif", png(2, "GIF"))
        add("d.json", '{"caption": "two", "score": NaN}')
        add("e.png", png(3))
        add("e.json", "{" * 5000)
        add("f.png", png(3))
        add("f.cls", "--5")
    write(tmp_path, {"t.tar": buffer.getvalue() + tar_of({"a.png": png(4), "a.txt": "after the end"})})
    used, dropped, read = listed(tmp_path, "t.tar")
    assert used == {"t.tar:a.png": "after the end"} | {"t.tar:a.png": "after the end", "t.tar:d.gif": "two"}
    assert len(open_source(SourceSpec.of("t.tar"), tmp_path).entries) == 3  # two of one name, in two archives
    assert read == 3 + len(dropped)
    assert (
        dropped["t.tar:link.png"]
        == dropped["t.tar:device.png"]
        == "a member that is no regular file, or whose name is none"
    )
    assert dropped["t.tar:a.json"] == "a key that came before (members of a sample must be neighbours)"
    assert dropped["t.tar:e.png"] == dropped["t.tar:f.png"] == "a caption, label or JSON that cannot be read"
    assert (
        dropped["t.tar:b.png"] == "an empty or missing caption"
        and dropped["t.tar:c.txt"] == "a sample without an image"
    )


def test_a_label_below_zero_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {name: data for n in range(3) for name, data in ((f"{n}.png", png(n)), (f"{n}.cls", str(n - 1)))}
    write(tmp_path, {"t.tar": tar_of(members)})
    assert run(tmp_path, source="t.tar", max_bad=0)["labels"] is None
    assert "2 of 3 samples have a label; the field is left out" in caplog.text


@pytest.mark.parametrize("where", ["folder", "tar", "csv", "bare csv"])
def test_captions_are_required_only_where_some_sample_has_one(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = {f"{n}.png": png(n) for n in range(4)}
    classes = {f"{n}.cls": str(n % 2) for n in range(4)}
    both = dict(sorted({**images, **classes}.items()))
    rows = "path,label\n" + "".join(f"p/{n}.png,{n % 2}\n" for n in range(4))
    bare = "path\n" + "".join(f"p/{n}.png\n" for n in range(4))
    write(
        tmp_path,
        {**{f"p/{name}": data for name, data in images.items()}, "t.tar": tar_of(both), "t.csv": rows, "b.csv": bare},
    )
    source = {"folder": "p", "tar": "t.tar", "csv": "t.csv", "bare csv": "b.csv"}[where]
    report = run(tmp_path, source=source, max_bad=0)
    assert report["samples"] == {"train": 4} and "no field `caption`" in caplog.text
    fields = set(Manifest.load(tmp_path / "out/train/images").fields)
    assert fields == {"image", "json"} | ({"label"} if where in ("tar", "csv") else set())
    with pytest.raises(UserError, match=r"no image with a caption|no column 'caption'"):
        run(tmp_path, source=source, output="other", captions="required")
    # one caption makes them a requirement, and `none` lifts it
    write(tmp_path, {"p/1.txt": "a caption"})
    if where == "folder":
        assert run(tmp_path, source=source, output="one")["samples"] == {"train": 1}
        assert run(tmp_path, source=source, output="none", captions="none")["samples"] == {"train": 4}


def test_a_damaged_tar_is_a_share_of_the_tars(tmp_path: Path) -> None:
    tar = tar_of({name: data for n in range(3) for name, data in ((f"{n}.png", png(n)), (f"{n}.txt", f"c{n}"))})
    # past the first sample a header is damaged, which no packing notices
    torn = bytearray(tar)
    torn[tar.index(b"1.png") + 150] ^= 1
    write(
        tmp_path,
        {
            "w/0.tar": tar,
            "w/1.tar": bytes(torn),
            "w/2.tar.bz2": bz2.compress(tar),
            "w/3.tgz": gzip.compress(tar)[:-200],
        },
    )
    with pytest.raises(UserError, match=r"2 of 4 tars are damaged.*1\.tar:0\.txt: header 2: checksum"):
        run(tmp_path, source="w", max_bad=0.01)
    report = run(tmp_path, source="w", max_bad=0.5)
    assert report["skipped"]["a damaged tar: what follows in it is lost"] == 2
    assert report["samples"]["train"] >= 3 + 1 + 3


def test_tars_of_any_size_unpacked_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tar_of({name: data for n in range(9) for name, data in ((f"{n}.bmp", png(n, "BMP")), (f"{n}.txt", f"c{n}"))})
    write(tmp_path, {"t.tgz": gzip.compress(tar)})
    size = (tmp_path / "t.tgz").stat().st_size
    monkeypatch.setattr(sources, "IN_MEMORY", size)
    monkeypatch.setattr(sources, "UNPACKED", 2)
    assert not open_source(SourceSpec.of("t.tgz"), tmp_path).streams or size * 2 < 9 * len(png(0, "BMP"))
    monkeypatch.setattr(sources, "UNPACKED", 0.1)
    opened = open_source(SourceSpec.of("t.tgz"), tmp_path)
    assert opened.streams and all(entry.image is None for entry in opened.entries)
    run(tmp_path, source="t.tgz")
    assert [one["txt"].decode() for one in stored(tmp_path)] == [f"c{n}" for n in range(9)]


# ----------------------------------------------------------------------------------------------------- names and options


def test_names_with_signs_tildes_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tar_of({"a.png": png(), "a.txt": "x"})
    write(
        tmp_path,
        {
            "data [v2]/0.tar": tar,
            "data [v2]/1.tar": tar,
            "home/mine/a.png": png(),
            "home/mine/a.txt": "x",
            "star*/a.png": png(),
        },
    )
    write(tmp_path, {"star*/a.txt": "x"})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(listed(tmp_path, "data [v2]/*.tar")[0]) == len(listed(tmp_path, "data [v2]")[0]) == 2
    assert len(listed(tmp_path, "~/mine")[0]) == len(listed(tmp_path, "star*")[0]) == 1
    write(tmp_path, {"home/t.csv": "path,caption\n~/mine/a.png,x\n"})
    assert run(tmp_path, source="~/t.csv")["samples"] == {"train": 1}
    odd = tmp_path / "odd"
    odd.mkdir()
    name = os.fsencode(odd) + b"/caf\xe9"
    for suffix, data in ((b".png", png()), (b".txt", b"x")):
        with open(name + suffix, "wb") as file:
            file.write(data)
    report = run(tmp_path, source="odd", output="odd-out")
    assert report["samples"] == {"train": 1}


def test_files_far_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "a.png": png(),
        "a.txt": "a",
        "b.png": png() + bytes(5000),
        "b.txt": "b",
        "c.png": png(),
        "c.txt": "c" * 3000,
    }
    write(tmp_path / "p", files)
    write(tmp_path, {"t.csv": "path,caption\np/a.png,a\np,b\np/b.png,c\n", "w.tar": tar_of(files)})
    monkeypatch.setattr(sources, "MAX_FILE", 4000)
    monkeypatch.setattr(sources, "MAX_TEXT", 2000)
    monkeypatch.setattr("data_pipelines.tars.MAX_MEMBER", 4000)
    said = {item["place"]: item["detail"] for item in run(tmp_path, source="p")["account"]["items"]}
    size = len(png()) + 5000
    assert said == {
        "p/b.png": f"{size} bytes, expected at most 4000",
        "p/c.png": "c.txt: 3000 bytes, expected at most 2000",
    }
    said = {item["place"]: item["detail"] for item in run(tmp_path, source="t.csv", output="t")["account"]["items"]}
    assert said == {"t.csv:3": "a folder or device", "t.csv:4": f"{size} bytes, expected at most 4000"}
    said = {
        item["place"]: item.get("detail", "") for item in run(tmp_path, source="w.tar", output="w")["account"]["items"]
    }
    assert said == {"w.tar:b.png": f"got {size} bytes, expected at most 4000", "w.tar:b.txt": "txt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "~nobody/x"}, "no such file"),
        ({"source": "/"}, "lies in the job's own input"),
        ({"source": "."}, "lies in the job's own input"),
        ({"source": {"path": "p", "ignore": [5]}}, r"ignore\.0: input should be text; got 5"),
        ({"source": {"path": "p", "encoding": "klingon"}}, "encoding 'klingon'"),
        ({"source": {"path": "p", "caption_column": 5}}, "caption_column: input should be text; got 5"),
        ({"source": {"path": "p", "weight": True}}, "weight: input should be .*; got true"),
        ({"source": 5}, "source: input should be text or a mapping or a list"),
        ({"source": [5]}, "source.0: input should be text or a mapping"),
        ({"source": "a\0b"}, "expected `path`"),
        ({"source": "n" * 5000}, "correct the path"),
        ({"source": "p", "heldout": "x"}, "heldout: input should be a valid number; got 'x'"),
        ({"source": "p", "max_bad": float("nan")}, "max_bad: input should be a valid number; got nan"),
        ({"source": "p", "seed": "x"}, "seed: input should be a valid integer; got 'x'"),
        ({"source": "p", "shard_samples": 1.5}, "shard_samples: input should be .*; got 1.5"),
        ({"source": "p", "resolution": "²"}, "resolution"),
        ({"source": "p", "resolution": 2.5}, "resolution"),
        ({"source": "p", "resolution": [[1, 2, 3]]}, "resolution"),
        ({"source": "p", "resolution": {"a": 1}}, "resolution"),
        ({"source": "p", "captions": "maybe"}, "captions: input should be one of .*; got 'maybe'"),
        ({"source": "p", "background": "whitish"}, "background 'whitish'"),
    ],
)
def test_options_of_other_kinds_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write(tmp_path, {"p/a.png": png(), "p/a.txt": "x"})
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)
