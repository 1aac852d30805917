"""Tars of every kind are read to their end, or said to be damaged: compressed, several in a row, with headers that lie."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from nexus_scale.data.manifest import DataError
from nexus_scale.data.shards import read_samples
from nexus_scale.data.tar_members import read_members


def tar_of(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, **pax: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), pax
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


SMALL = {"a.txt": b"one", "b.txt": b"two" * 500}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compressed_tars_by_their_first_bytes(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(pack(tar_of(SMALL)))
    assert {one.name: one.data for one in read_members(path)} == SMALL
    whole = path.read_bytes()
    path.write_bytes(whole[: min(len(whole) // 2, 1500)])
    with pytest.raises(DataError, match="cut"):
        list(read_members(path))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_flipped_byte_of_a_compressed_tar_is_a_data_error_or_harmless(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    whole, path = pack(tar_of(SMALL)), tmp_path / "x.tar"
    failed = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            list(read_members(path))
        except DataError:
            failed += 1
    assert failed > len(whole) // 2


def test_archives_in_a_row_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(SMALL) + tar_of({"c.txt": b"three"}) + bytes(512))
    assert [(one.archive, one.name) for one in read_members(path)] == [(0, "a.txt"), (0, "b.txt"), (1, "c.txt")]
    assert [one.key for one in read_samples(path)] == ["a", "b", "c"]
    path.write_bytes(tar_of(SMALL) + b"no tar".ljust(512, b"."))
    with pytest.raises(DataError, match=r"octal|checksum"):
        list(read_members(path))


def test_links_and_other_names_are_told_and_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE), ("d.txt", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "k" * 150
            archive.addfile(member)
        for name in ("/abs.txt", "../up.txt", ".", "/", "good.txt"):
            archive.addfile(tarfile.TarInfo(name))
    path = tmp_path / "x.tar"
    path.write_bytes(buffer.getvalue())
    found = list(read_members(path))
    assert [bool(one.problem) for one in found] == [True] * 5 + [False, True, False]
    assert found[-1] == (0, "good.txt", b"", "")


@pytest.mark.parametrize("size", ["²", "-1", "9" * 30, "x", str(1 << 31)])
def test_sizes_that_lie_are_told_and_take_no_memory(tmp_path: Path, size: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a.txt": b"one"}, tarfile.PAX_FORMAT, size=size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        list(read_members(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
