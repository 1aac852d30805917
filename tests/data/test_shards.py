"""Shards: the same bits each time, whole or not at all; readers that refuse what is damaged or hostile."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.npy import HEADER_BYTES, decode_npy, encode_npy, parse_header
from nexus_scale.data.shards import (
    Limits,
    ShardWriter,
    decode,
    finish_folder,
    is_finished,
    read_samples,
    sanitise_key,
    side_car,
)

FIELDS = [
    Field("image", "png", "uint8", (4, 6, 3)),
    Field("text", "text.npy", "float16", (None, 3)),
    Field("caption", "txt", "text"),
    Field("meta", "json", "json"),
    Field("label", "cls", "int64", ()),
]


def sample(number: int) -> dict[str, Any]:
    return {
        "image": np.full((4, 6, 3), number, np.uint8),
        "text": np.full((number % 4, 3), number, np.float16),
        "caption": f"café {number}",
        "meta": {"b": 1, "a": number},
        "label": number % 3,
    }


def write(path: Path, count: int = 6, origin: str = "") -> Path:
    with ShardWriter(path, FIELDS, origin) as writer:
        for number in range(count):
            writer.write(f"{number:06d}", sample(number))
    return path


def test_written_samples_come_back(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    for number, (key, members) in enumerate(read_samples(path)):
        got = {name: decode(name, data) for name, data in members.items()}
        want = sample(number)
        assert key == f"{number:06d}" and list(got) == ["png", "text.npy", "txt", "json", "cls"]
        assert np.array_equal(got["png"], want["image"]) and np.array_equal(got["text.npy"], want["text"])
        assert (got["txt"], got["json"], got["cls"]) == (want["caption"], want["meta"], want["label"])
    assert number == 5


def test_tarfile_reads_them_too_and_finds_nothing_of_this_machine(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "00000.tar")) as tar:
        members = tar.getmembers()
        assert len(members) == 30 and all(
            m.isreg() and (m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in members
        )
        file = tar.extractfile("000003.txt")
        assert file is not None and file.read().decode() == "café 3"


def test_same_input_same_bits(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a" / "0.tar"), write(tmp_path / "b" / "0.tar")
    assert one.read_bytes() == two.read_bytes() and side_car(one).read_bytes() == side_car(two).read_bytes()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path / "0.tar", FIELDS) as writer:
            writer.write("a", sample(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_rerun_knows_what_is_finished(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", origin="vae-1")
    assert is_finished(path, "vae-1", deep=True) and not is_finished(path, "vae-2")
    data = path.read_bytes()
    path.write_bytes(data[:700] + b"X" + data[701:])
    assert is_finished(path, "vae-1") and not is_finished(path, "vae-1", deep=True)
    path.write_bytes(data[:-512])
    assert not is_finished(path, "vae-1")
    side_car(path).unlink()
    path.write_bytes(data)
    assert not is_finished(path, "vae-1")
    with pytest.raises(UserError, match="no finished shard"):
        finish_folder(tmp_path)


def test_an_unfinished_rewrite_takes_the_voucher_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "0.tar")

    def no_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("nexus_scale.data.shards.commit_file", no_disk)
    with pytest.raises(OSError, match="disk full"):
        write(path, count=2)
    assert not is_finished(path) and sorted(p.name for p in tmp_path.iterdir()) == ["0.tar"]


def test_a_folder_is_whole_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "00000.tar")
    with pytest.raises(UserError, match=r"00001\.tar: got no finished shard"):
        finish_folder(tmp_path, files=["00000.tar", "00001.tar"])
    write(tmp_path / "00001.tar")
    with pytest.raises(UserError, match="key '000000' twice"):
        finish_folder(tmp_path)
    (tmp_path / ".00002.tar.1-x.tmp").write_bytes(b"left over")
    manifest = finish_folder(tmp_path, files=["00001.tar"])
    assert Manifest.load(tmp_path).samples == manifest.samples == 6 and manifest.buckets == ("4x6",)
    assert not list(tmp_path.glob(".*.tmp"))
    with ShardWriter(tmp_path / "00002.tar", FIELDS[:1]) as writer:
        writer.write("z", {"image": np.zeros((4, 6, 3), np.uint8)})
    with pytest.raises(UserError, match="got fields"):
        finish_folder(tmp_path, files=["00001.tar", "00002.tar"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": np.zeros((2, 3), np.float32)}, "float32"),
        ({"text": np.zeros((2, 4), np.float16)}, r"\(2, 4\)"),
        ({"image": np.zeros((4, 6), np.uint8)}, "uint8"),
        ({"image": b"not an image"}, "image"),
        ({"caption": 3}, "int, which is not written as .txt"),
        ({"label": "x"}, "str, which is not written as .cls"),
        ({"extra": 1}, "extra"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says), ShardWriter(tmp_path / "0.tar", FIELDS) as writer:
        writer.write("a", {**sample(0), **change})
    assert list(tmp_path.iterdir()) == []


def test_keys_are_never_paths() -> None:
    assert sanitise_key("000012") == "000012"
    hostile = ["../../etc/passwd", "/root", "a.b", "a b", "", "..", "ключ", "x" * 500, "a\0b", "a_b"]
    made = [sanitise_key(key) for key in hostile]
    assert len(set(made)) == len(hostile) and all(
        len(k) <= 64 and k.replace("-", "").replace("_", "").isalnum() for k in made
    )
    assert all(key.isascii() for key in made)


def test_npy_is_numpys(tmp_path: Path) -> None:
    for array in (
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.float32(3.0) * np.ones(()),
        np.zeros((0, 5), np.float16),
    ):
        data = encode_npy(array)
        back = np.load(io.BytesIO(data), allow_pickle=False)
        header = parse_header(data[:HEADER_BYTES])
        assert back.dtype == array.dtype and back.shape == array.shape == header.shape and np.array_equal(back, array)
        assert header.data == HEADER_BYTES and header.dtype == array.dtype
    swapped = np.arange(3, dtype=">i4")
    assert np.array_equal(decode_npy(encode_npy(swapped)), swapped)


# ------------------------------------------------------------------------------- tars of other origin


def tar_of(path: Path, members: list[tuple[str, bytes]], **changes: Any) -> Path:
    with tarfile.open(path, "w", format=changes.pop("format", tarfile.PAX_FORMAT)) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]  # makes pax headers, as TarWriter does
            for attribute, value in changes.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))
    return path


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/tmp/nexus_scale_canary", "w")


@pytest.mark.parametrize(
    "name", ["a.pkl", "a.pickle", "a.pyd", "a.pth", "a.b.pkl", "a.PKL", "a.npy.Pkl", "a.sh", "a.npz"]
)
def test_other_extensions_are_refused_by_name_and_never_run(tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "x.tar", [("a.txt", b"ok"), (name, pickle.dumps(Canary()))])
    with pytest.raises(DataError, match=name):
        list(read_samples(path))
    with pytest.raises(DataError, match="extension"):
        decode(name.split(".", 1)[1], b"")
    assert not Path("/tmp/nexus_scale_canary").exists()


def test_an_npy_of_objects_is_not_unpickled() -> None:
    file = io.BytesIO()
    np.save(file, np.array([Canary()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="npy"):
        decode("npy", file.getvalue())
    with pytest.raises(DataError, match="npy"):
        parse_header(file.getvalue()[:HEADER_BYTES])
    assert not Path("/tmp/nexus_scale_canary").exists()


@pytest.mark.parametrize("name", ["../x.txt", "/etc/x.txt", "a/../../x.txt", "a\\..\\x.txt"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="absolute name or one with"):
        list(read_samples(tar_of(tmp_path / "x.tar", [(name, b"x")])))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_only_regular_members(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.txt.*regular file"):
        list(read_samples(tar_of(tmp_path / "x.tar", [("a.txt", b"")], type=kind, linkname="/etc/passwd")))


def test_limits(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", [("a.txt", b"x" * 2000), ("b.txt", b"x" * 2000)])
    for limits in (Limits(member_bytes=1999), Limits(members=1), Limits(total_bytes=3999)):
        with pytest.raises(DataError, match="expected at most"):
            list(read_samples(path, limits))
    assert len(list(read_samples(path, Limits(2000, 4, 4000)))) == 2
    # A header that claims 10 GB.
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + (10**10).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "y.tar").write_bytes(header)
    with pytest.raises(DataError, match="10000000000 bytes"):
        list(read_samples(tmp_path / "y.tar"))


def test_image_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (100, 100), (255, 0, 0, 0)).save(file, format="PNG")
    assert decode_image(file.getvalue()).tolist() == [[[255, 255, 255]] * 100] * 100  # transparent is white
    monkeypatch.setattr("nexus_scale.data.images.MAX_PIXELS", 9999)
    with pytest.raises(DataError, match="100 x 100"):
        decode_image(file.getvalue())
    bmp = io.BytesIO()
    Image.new("RGB", (2, 2)).save(bmp, format="BMP")
    with pytest.raises(DataError, match="cannot be read"):
        decode_image(bmp.getvalue())


def test_each_kind_of_tar(tmp_path: Path) -> None:
    long = "folder_" + "x" * 120 + "/" + "k" * 20
    members = [(f"{long}.{kind}", b"7") for kind in ("txt", "cls")] + [("./b.JSON", b"{}")]
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        path = tar_of(tmp_path / f"{number}.tar", members, format=format, mtime=0)
        assert [(s.key, list(s.members)) for s in read_samples(path)] == [(long, ["txt", "cls"]), ("b", ["json"])]
    with gzip.open(tmp_path / "x.tar.gz", "wb") as file:
        file.write(path.read_bytes())
    assert len(list(read_samples(tmp_path / "x.tar.gz"))) == 2


def test_repeated_keys_and_members_are_refused(tmp_path: Path) -> None:
    for members in ([("a.txt", b""), ("b.txt", b""), ("a.cls", b"1")], [("a.txt", b""), ("a.TXT", b"")]):
        with pytest.raises(DataError, match="a second time"):
            list(read_samples(tar_of(tmp_path / "x.tar", members)))


def test_no_damage_is_read_silently(tmp_path: Path) -> None:
    """Cuts at every kind of place, and damaged headers: other readers drop the rest of the file without a word."""
    path = write(tmp_path / "0.tar")
    data = path.read_bytes()
    starts = json.loads(side_car(path).read_text())["start"]
    for cut in (0, 100, 512, 600, starts[1], starts[3] + 20, len(data) - 1024, len(data) - 512):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match="cut"):
            list(read_samples(path))
    for place in (starts[2] + 3, starts[2] + 130, starts[4] + 257):
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        with pytest.raises(DataError, match="damaged"):
            list(read_samples(path))
    path.write_bytes(data[: starts[2]] + bytes(512) + data[starts[2] + 512 :])
    with pytest.raises(DataError, match="lone block"):
        list(read_samples(path))
