"""Tars, tables, folders and images with damage of every kind end in data that account for all of it, or in one message.

`NEXUS_FUZZ=20000 pytest tests/data_pipelines/test_fuzz_sources.py` for the long version.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageCms

from data_pipelines import ingest_images
from tests.fuzz import exit_code, fuzz

TEXTS = [
    "a cat", "", " ", "\ufeffmarked", "two\nlines", "\u2028", "nul\0", '"', 'say "hi"', '""', "tab\there", "a,b,c", "\r", "é" * 9,
    "\ud83d", "x" * 140_000, "\x1b[31m", "NaN", "null", "٣", "²", "--5", "-1", "9" * 25, "../up", ".", "/", "~", "~nobody/x", "\u202e",
]  # fmt: skip
NAMES = [
    "a.png", "b.jpg", "c.v1.png", "c.v1.txt", "c.v2.png", "._a.png", ".DS_Store", "README", "Thumbs.db", "x.url", "d.gif", "e.cls",
    "f.json", "a.txt", "b.txt", "sub/g.png", "sub/g.txt", ".", "/", "..", "../h.png", "/abs.png", "a" * 300 + ".png", "i.PNG", "i.png",
    "é.png", "j .png", "k.npy", "l.heic", "m.png.txt", "[n].png", "n\n.png", "o.txt", "p.jpg.png",
]  # fmt: skip
VALUES: list[Any] = [
    *TEXTS, None, True, 0, -1, 3, 3.5, 2**63, 2**70, float("nan"), float("inf"), -float("inf"), [], ["a"], {}, {"a": {"b": [1]}},
]  # fmt: skip


def act(*arguments: str) -> int:
    """The command; a run that ends well must have accounted for all that it read."""
    code = exit_code(lambda: exit_with(ingest_images.main([*arguments, "--data-root", ".", "--threads", "1"])))
    if code == 0:
        report = json.loads(Path("out/ingest_report.json").read_text())
        account = report["account"]
        if account["read"] != account["used"] + sum(account["dropped"].values()):
            print(f"does not add up: {account}")
            return 1
        if sum(report["samples"].values()) != account["used"]:
            print(f"not what was written: {report}")
            return 1
    return code


def exit_with(code: int) -> None:
    raise SystemExit(code)


def options(rng: random.Random, source: str) -> list[str]:
    more = [
        [], ["--resolution", "8"], ["--resolution", "8x6", "--resolution", "4"], ["--captions", "none"], ["--heldout", "0.5"],
        ["--ignore", "*.gif"], ["--encoding", rng.choice(["cp1252", "utf-16", "shift_jis"])], ["--format", "jpg"],
        ["--background", "#102030"], ["--captions", "required"],
    ]  # fmt: skip
    return [
        "--source",
        source,
        "--output",
        "out",
        "--max-bad",
        rng.choice(["1", "1", "1", "0.3", "0"]),
        *rng.choice(more),
    ]


def picture(rng: random.Random) -> bytes:
    """A small image of any format, mode and kind of metadata."""
    side = (rng.randint(1, 9), rng.randint(1, 9))
    noise = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (*side, 4), dtype=np.uint8)
    mode = rng.choice(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F"])
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(noise[..., 0].astype(dtype) * rng.choice([1, 257]))
    else:
        image = Image.fromarray(noise).convert(mode if mode != "LA" else "L")
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]
    exif = Image.Exif()
    exif[0x0112] = rng.choice([1, 2, 6, 8, 99])
    extra: dict[str, Any] = rng.choice(
        [{}, {"exif": exif}, {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}]
    )
    first = rng.choice(kinds)
    if rng.random() < 0.2 and first != "AVIF":  # whose writer (libavif 1.3) dies of small animations
        extra |= {"save_all": True, "append_images": [image.copy()]}
    for kind in (first, "PNG", "TIFF"):
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **extra)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not every format has every mode
        return buffer.getvalue()
    raise AssertionError(mode)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one or several kinds of damage."""
    body = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not body:
            break
        place = rng.randrange(len(body))
        match rng.randrange(7):
            case 0 | 1:
                body[place] ^= 1 << rng.randrange(8)
            case 2:
                del body[place:]
            case 3:
                del body[place : place + rng.randrange(1, 40)]
            case 4:
                body[place:place] = rng.randbytes(rng.randrange(1, 40))
            case 5:
                body[place : place + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
            case 6:
                body += body[: rng.randrange(1, 600)]
    return bytes(body)


# ----------------------------------------------------------------------------------------------------- tars


def tar(rng: random.Random, folder: Path) -> Sequence[str]:
    """Members of every name and kind, pax headers that lie, packed, several in a row, and then damaged or not."""
    packs: list[tuple[str, Callable[[bytes], bytes]]] = [
        (".tar", bytes), (".tar", bytes), (".tar.gz", gzip.compress), (".tgz", gzip.compress), (".tar.bz2", bz2.compress),
        (".tar.xz", lzma.compress), (".tar.zst", zstd),
    ]  # fmt: skip
    for number in range(rng.choice([1, 1, 2])):
        suffix, pack = rng.choice(packs)
        whole = b"".join(one_tar(rng) for _ in range(rng.choice([1, 1, 1, 2])))
        if rng.random() < 0.3:
            whole = damaged(rng, whole)
        packed = pack(whole)
        (folder / f"w{number}{suffix}").write_bytes(damaged(rng, packed) if rng.random() < 0.4 else packed)
    return options(rng, rng.choice([f"w0{suffix}", "w*", ".", "w[0]*"]) if number else next(folder.glob("w0*")).name)


def one_tar(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for n in range(rng.randrange(4)):
            add(rng, archive, f"{n:04d}.png", picture(rng))
            add(rng, archive, f"{n:04d}.txt", rng.choice(TEXTS).encode("utf-8", "replace"))
        for _ in range(rng.randrange(6)):
            body = rng.choice(
                [picture(rng), rng.choice(TEXTS).encode("utf-8", "replace"), b"7", b'{"caption": NaN}', b"[" * 9000]
            )
            add(rng, archive, rng.choice(NAMES), body)
    return buffer.getvalue()


def add(rng: random.Random, archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    if rng.random() < 0.08:
        member.type, member.size, member.linkname = (
            rng.choice([b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"V"]),
            0,
            "a.png",
        )
    if rng.random() < 0.08:
        key = rng.choice(["size", "path", "GNU.sparse.major", "uid", "mtime"])
        member.pax_headers = {key: rng.choice(["²", "-1", "9" * 30, "", "x", "/", ".", "12", "a\0b.png", "nan"])}
    try:
        archive.addfile(member, io.BytesIO(data))
    except ValueError:
        return  # a name that this format cannot hold


def zstd(data: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as out:
        out.write(data)
    packed: bytes = stream.getvalue().to_pybytes()
    return packed


# ----------------------------------------------------------------------------------------------------- tables


def table(rng: random.Random, folder: Path) -> Sequence[str]:
    """Rows of every value in CSV, TSV, JSONL and Parquet, in several encodings, and then damaged or not."""
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(picture(rng))
    paths = ["a.png", "b.png", "c.png"]
    columns = (
        rng.sample(["path", "caption", "label", "group", "é", ""], rng.randint(2, 6)) if rng.random() < 0.2 else None
    )
    columns = columns or ["path", "caption", "label"]
    rows = [
        {name: rng.choice(paths if name == "path" and rng.random() < 0.9 else VALUES) for name in columns}
        for _ in range(rng.randrange(8))
    ]
    kind = rng.choice(["csv", "csv", "tsv", "jsonl", "parquet"])
    path = folder / f"t.{kind}"
    if kind == "parquet":
        texts = {name: [str(row[name]).encode("utf-8", "replace").decode() for row in rows] for name in columns}
        numbers = [rng.choice([None, 1.0, float("nan"), float("inf")]) for _ in rows]
        pa.parquet.write_table(
            pa.table({**texts, "n": numbers, "when": pa.array([1] * len(rows), pa.timestamp("ns"))}), path
        )
        data = path.read_bytes()
    elif kind == "jsonl":
        lines = [json.dumps({k: v for k, v in row.items() if rng.random() < 0.9}) for row in rows]
        lines += rng.choices(["", "[]", "{", "[" * 20_000, '{"path": 1}', "\u2028", '{"a":' * 3000], k=rng.randrange(3))
        rng.shuffle(lines)
        data = rng.choice(["\n", "\r\n"]).join(lines).encode()
    else:
        out = io.StringIO()
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        writer = csv.writer(
            out,
            delimiter="\t" if kind == "tsv" else ",",
            quoting=quoting,
            lineterminator=rng.choice(["\n", "\r\n", "\r"]),
        )
        writer.writerow(columns)
        writer.writerows([row[name] for name in columns] for row in rows)
        text = out.getvalue()
        for _ in range(rng.choice([0, 0, 1, 3])):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(['"', ",", "\t", "\n", "\r", '""', '\n"', "\u2028", "\0"]) + text[place:]
        data = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]), "replace")
    path.write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
    return options(rng, path.name)


# ----------------------------------------------------------------------------------------------------- images


def image(rng: random.Random, folder: Path) -> Sequence[str]:
    """A folder of images of every format, damaged, under every name, with texts beside them."""
    place = folder / rng.choice(["photos", "photos [1]", "ph*", "~x"])
    place.mkdir()
    for number in range(rng.randint(1, 6)):
        data = picture(rng)
        stem, suffix = rng.choice(
            [(f"i{number}", ".png"), (f"i{number}", ".jpg"), *((name.rpartition(".")[0], ".png") for name in NAMES)]
        )
        name = f"{stem.replace('/', '_').replace(chr(10), '_')[:100] or 'x'}{suffix}"
        (place / name).write_bytes(damaged(rng, data) if rng.random() < 0.7 else data)
        text = rng.choice(TEXTS).encode(rng.choice(["utf-8", "utf-16", "cp1252"]), "replace")
        beside = rng.choice(
            [("txt", text), ("json", damaged(rng, b'{"caption": "x", "label": 3}')), ("cls", text), ("url", b"x"), None]
        )
        if beside:
            (place / f"{name.rpartition('.')[0]}.{beside[0]}").write_bytes(beside[1])
    if rng.random() < 0.3:
        (place / "loop").symlink_to(place)
        (place / "gone.png").symlink_to("nowhere")
    return options(rng, place.name)


def test_tars_of_every_kind(tmp_path: Path) -> None:
    fuzz("tar", tar, tmp_path, act)


def test_tables_of_every_kind(tmp_path: Path) -> None:
    fuzz("table", table, tmp_path, act)


def test_images_of_every_kind(tmp_path: Path) -> None:
    fuzz("image", image, tmp_path, act)
