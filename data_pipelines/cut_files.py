"""Whether an audio or video file is shorter than it declares: an interrupted download or copy.

Most decoders read such a file to its end without an error, and its transcript then says more than can be heard. The declared size of a
container is compared with the bytes that are there: RIFF, RF64 and Wave64 (wav, avi, webp), AIFF, GIF, PNG, MP4 and MOV, Matroska and
WebM, Ogg, MP3 (by its Xing header, or its last frame). FLAC declares samples instead of bytes; its decoder counts them. Nothing can be
known of a stream that was written without knowing its length, or of an MP3 without a Xing header that is cut between two frames.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

TOLERATED_BYTES = 64
"""Some writers miscount by a header, or leave out the padding of the last chunk."""
UNKNOWN_FROM = 0x7FFFF000
"""RIFF sizes from here on come from streams, whose writers did not know them."""
OGG_PAGE = 27 + 255 + 255 * 255
"""Bytes of the largest Ogg page."""


def is_cut(file: BinaryIO) -> bool:
    """Whether the file has fewer bytes than it declares. Its position is at the start afterwards."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    try:
        return _declared(file, head, size) > size + TOLERATED_BYTES
    except (struct.error, IndexError):
        return False  # a truncated header: the decoder decides
    finally:
        file.seek(0)


def _declared(file: BinaryIO, head: bytes, size: int) -> int:
    """Bytes that the file declares; 0 where it declares none."""
    if head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX"):
        return _wav(file, size) if head[8:12] == b"WAVE" else _riff(head)
    if head[:4] == b"riff":  # Sony Wave64: names of 16 bytes
        return int.from_bytes(file.read(8), "little")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return 8 + int.from_bytes(head[4:8], "big")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return _boxes(file, size)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _matroska(file)
    if head[:4] == b"OggS":
        return _ogg(file, size)
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(file)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(file, size)
    return _mp3(file, head, size)


def _riff(head: bytes) -> int:
    declared = int.from_bytes(head[4:8], "little")
    return 0 if declared >= UNKNOWN_FROM else 8 + declared


def _wav(file: BinaryIO, size: int) -> int:
    """The end of the chunk of samples; nothing behind it is audible."""
    order = ">" if file.seek(0) == 0 and file.read(4) == b"RIFX" else "<"
    position, long = 12, 0
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        if name == b"ds64":
            long = struct.unpack("<QQ", file.read(16))[1]
        if name == b"data":
            if length == 0xFFFFFFFF and long:
                length = long
            elif length >= UNKNOWN_FROM:
                return 0
            return int(position + 8 + length)
        position += 8 + length + length % 2
    return position if position > size else 0


def _boxes(file: BinaryIO, size: int) -> int:
    """The end of the last box."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8))
        if not all(32 <= sign < 127 or sign == 0xA9 for sign in name):
            return 0  # padding behind the last box
        if length == 1:
            length = struct.unpack(">Q", file.read(8))[0]
        if length == 0:  # to the end of the file
            return 0
        if length < 8:
            return 0
        position += length
    return position


def _gif(file: BinaryIO) -> int:
    """The end of the last block; players do not need the trailer."""
    file.seek(10)
    flags = file.read(3)[0]
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        file.seek(position)
        mark = file.read(1)
        if mark == b"!":
            position += 2  # and the kind of extension
        elif mark == b",":
            flags = file.read(9)[8]
            position += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        else:
            return position
        while True:  # blocks of up to 255 bytes, the last of none
            file.seek(position)
            length = file.read(1)
            if not length:
                return position + TOLERATED_BYTES + 1
            position += 1 + length[0]
            if not length[0]:
                break


def _png(file: BinaryIO, size: int) -> int:
    """The end of the IEND chunk."""
    position = 8
    while position + 8 <= size:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8))
        position += 12 + length
        if name == b"IEND":
            return position
    return size + TOLERATED_BYTES + 1


def _matroska(file: BinaryIO) -> int:
    """The end of the first segment."""
    file.seek(4)
    position = 4 + sum(_number(file.read(8)))
    file.seek(position)
    data = file.read(12)
    if data[:4] != b"\x18S\x80g":
        return 0
    length, digits = _number(data[4:])
    return 0 if length == (1 << 7 * digits) - 1 else position + 4 + digits + length


def _number(data: bytes) -> tuple[int, int]:
    """An EBML number and its length in bytes."""
    digits = 9 - data[0].bit_length()
    if digits > 8 or len(data) < digits:
        raise IndexError("no EBML number")
    return int.from_bytes(data[:digits], "big") & ((1 << 7 * digits) - 1), digits


def _ogg(file: BinaryIO, size: int) -> int:
    """The end of the last page; beyond the file where that page is cut or not marked as the last."""
    file.seek(max(0, size - 2 * OGG_PAGE))
    begin, tail = file.tell(), file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0 or at + 27 > len(tail):
        return size + TOLERATED_BYTES + 1
    segments = tail[at + 26]
    end = at + 27 + segments + sum(tail[at + 27 : at + 27 + segments])
    complete = at + 27 + segments <= len(tail) and end <= len(tail)
    return begin + end if complete and tail[at + 5] & 4 else size + TOLERATED_BYTES + 1


def _mp3(file: BinaryIO, head: bytes, size: int) -> int:
    """The end that the Xing header of the first frame declares; without one, the end of the last frame."""
    start = 0
    if head[:3] == b"ID3":
        start = 10 + sum((digit & 0x7F) << 7 * place for place, digit in enumerate(reversed(head[6:10])))
    file.seek(start)
    frame = file.read(512)
    for mark in (b"Xing", b"Info"):
        at = frame.find(mark, 4, 48)
        if at >= 0 and _mp3_frame(frame[:4]):
            flags = int.from_bytes(frame[at + 4 : at + 8], "big")
            if flags & 2:
                place = at + 8 + (4 if flags & 1 else 0)
                return start + int(struct.unpack(">I", frame[place : place + 4])[0])
    end = start
    while end < size:
        file.seek(end)
        length = _mp3_frame(file.read(4))
        if not length:
            return 0  # a tag behind the last frame, or not an MP3
        end += length
    return end if end == size else size + TOLERATED_BYTES + 1


BIT_RATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
"""In kbit/s, of layer III of MPEG 1 and of MPEG 2 and 2.5: ISO 11172-3, 2.4.2.3, and 13818-3."""


def _mp3_frame(head: bytes) -> int:
    """Bytes of the layer III frame with this header; 0 for anything else."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or head[2] >> 4 in (0, 15) or head[2] & 12 == 12:
        return 0
    version = head[1] >> 3 & 3  # 3: MPEG 1; 2: MPEG 2; 0: MPEG 2.5
    if version == 1:
        return 0
    rate_hz = (44100, 48000, 32000)[head[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]
    bit_rate = 1000 * BIT_RATES[version != 3][head[2] >> 4]
    return (144 if version == 3 else 72) * bit_rate // rate_hz + (head[2] >> 1 & 1)
