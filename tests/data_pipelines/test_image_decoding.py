"""One decoder for all images: upright, sRGB, opaque, 8 bits, within bounds of memory; damaged ones are refused with a reason."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipelines import fitting, image_decoding
from data_pipelines.fitting import fit, fit_image
from data_pipelines.image_decoding import ImageError, colour_of, decode
from nexus_scale.contracts import UserError
from nexus_scale.data import images

WHITE = (255, 255, 255)
RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))  # (8, 64)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, **options: Any) -> np.ndarray:
    return np.asarray(decode(data, **options).pixels)


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int) -> bytes:
    """A grey PNG of a few bytes, whatever its size: what is declared must be refused or cut before it is unpacked."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_every_format_is_read_whatever_its_name(kind: str) -> None:
    grey = Image.fromarray(RAMP).convert("RGB")
    exact = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "AVIF") else {}
    found = pixels(saved(grey, kind, **exact))
    assert found.shape == (8, 64, 3)
    assert np.abs(found.astype(int) - np.asarray(grey)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_in_every_format(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255, 0, 0
    upright[8:, :16] = 0, 0, 255
    undo = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: np.rot90(upright.transpose(1, 0, 2), 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(
        Image.fromarray(np.ascontiguousarray(undo)), kind, exif=exif, **({"quality": 95} if kind != "PNG" else {})
    )
    decoded = decode(data)
    assert decoded.size == (16, 32)
    assert np.abs(np.asarray(decoded.pixels).astype(int) - upright)[2:6, 2:14].max() < 40
    assert np.abs(np.asarray(decoded.pixels).astype(int) - upright)[10:14, 2:14].max() < 40


def grey_profile(gamma: float) -> bytes:
    """An ICC v2 profile of one tone curve, a power."""
    return matrix_profile((0, 0, 0), gamma, b"GRAY")


def matrix_profile(red: tuple[float, float, float], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A display whose red is another one, and its tone curve a power: an ICC v2 profile of three colourants, put together by hand."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {
        b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": xyz(0.9642, 1.0, 0.8249), b"rXYZ": xyz(*red),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971), b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"kTRC": curve,
    }  # fmt: skip
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


def test_icc_profiles_are_converted_and_srgb_stays_to_the_bit() -> None:
    patch = Image.new("RGB", (8, 8), (200, 100, 50))
    wide = matrix_profile((0.5151, 0.2412, -0.0011), 2.2)  # Display P3's red
    found = decode(saved(patch, "PNG", icc_profile=wide))
    assert image_decoding.CONVERTED in found.notes and not found.plain
    other = np.asarray(found.pixels)[0, 0].astype(int)
    want = ImageCms.profileToProfile(patch, ImageCms.ImageCmsProfile(io.BytesIO(wide)), ImageCms.createProfile("sRGB"))
    assert want is not None
    assert other.tolist() == list(want.getpixel((0, 0))) and other[0] > 205
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(patch, "PNG", icc_profile=own)
    fitted = fit(data, [(8, 8)], "png")
    assert not isinstance(fitted, str) and fitted.image == data and not fitted.notes
    # grey by a tone curve of its own: linear light 50 % is level 188 of sRGB's
    linear = saved(Image.new("L", (4, 4), 128), "PNG", icc_profile=grey_profile(1.0))
    assert np.abs(pixels(linear).astype(int) - 188).max() <= 1
    assert (
        np.abs(
            pixels(saved(Image.new("LA", (4, 4), (128, 255)), "PNG", icc_profile=grey_profile(1.0))).astype(int) - 188
        ).max()
        <= 1
    )
    # with transparency the colours are converted before they are laid on the background
    clear = patch.convert("RGBA")
    clear.putalpha(0)
    assert (pixels(saved(clear, "PNG", icc_profile=wide), background=(1, 2, 3)) == (1, 2, 3)).all()


@pytest.mark.parametrize(
    "profile",
    [b"x", b"\0" * 200, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()],
    ids=["short", "empty", "of another space"],  # not the bytes, which hold the time of day
)
def test_profiles_that_cannot_be_used_are_passed_over_and_noted(profile: bytes) -> None:
    found = decode(saved(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG", icc_profile=profile))
    assert (np.asarray(found.pixels) == (9, 8, 7)).all()
    assert found.notes == (image_decoding.UNUSABLE_PROFILE,)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(4, 0)
    want = np.rint(ramp / 257).astype(int)
    for data in (saved(Image.fromarray(ramp), "PNG"), saved(Image.fromarray(ramp), "TIFF")):
        assert np.abs(pixels(data)[..., 0] - want).max() <= 1
    pgm = b"P5 64 4 65535\n" + ramp.astype(">u2").tobytes()
    assert np.abs(pixels(pgm)[..., 0] - want).max() <= 1
    clear = saved(Image.fromarray(ramp), "PNG", transparency=65535)
    assert pixels(clear, background=(7, 7, 7))[0, -1, 0] == 7 and pixels(clear, background=(7, 7, 7))[0, -2, 0] > 240


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_fractions_and_wide_numbers_by_the_least_range_that_holds_them(top: float) -> None:
    ramp = np.linspace(0, top, 64, dtype=np.float32)[None].repeat(4, 0)
    assert np.abs(pixels(saved(Image.fromarray(ramp), "TIFF"))[..., 0] - np.linspace(0, 255, 64)).max() <= 1
    if top > 1:
        whole = pixels(saved(Image.fromarray(ramp.astype(np.int32)), "TIFF"))[..., 0]
        assert np.abs(whole - np.linspace(0, 255, 64)).max() <= 1.5
    for value in (-1.0, np.nan, np.inf, 1e9):
        ramp[0, 0] = value
        with pytest.raises(ImageError, match="pixels from"):
            decode(saved(Image.fromarray(ramp), "TIFF"))


def test_transparency_lies_on_the_background_that_is_asked_for() -> None:
    half = np.zeros((4, 4, 4), np.uint8)
    half[:2] = 255, 0, 0, 255
    palette = Image.fromarray(half[..., :3]).convert("P")
    grey = Image.merge("LA", (Image.new("L", (4, 4), 90), Image.fromarray(half[..., 3])))
    cases = {
        "rgba": (saved(Image.fromarray(half), "PNG"), (255, 0, 0)),
        "webp": (saved(Image.fromarray(half), "WEBP", lossless=True, exact=True), (255, 0, 0)),
        "palette": (saved(palette, "PNG", transparency=palette.getpixel((0, 3))), (255, 0, 0)),
        "gif": (saved(palette, "GIF", transparency=palette.getpixel((0, 3))), (255, 0, 0)),
        "grey": (saved(grey, "PNG"), (90, 90, 90)),
        "colour": (saved(Image.fromarray(half[..., :3]), "PNG", transparency=(0, 0, 0)), (255, 0, 0)),
    }
    row = b"\0" + struct.pack(">3H", 65535, 0, 0) * 4, b"\0" + struct.pack(">3H", 0, 32768, 0) * 4
    head, body = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), zlib.compress(row[0] * 2 + row[1] * 2)
    chunks = (b"IHDR", head), (b"tRNS", struct.pack(">3H", 0, 32768, 0)), (b"IDAT", body), (b"IEND", b"")
    cases["16 bits"] = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks), (255, 0, 0)
    for name, (data, above) in cases.items():
        for background in (WHITE, (0, 128, 64)):
            decoded = decode(data, background=background)
            found = np.asarray(decoded.pixels)
            assert (found[:2] == above).all() and (found[2:] == background).all(), name
            assert image_decoding.ON_BACKGROUND in decoded.notes and not decoded.plain
    for value, want in (("white", WHITE), ("#102030", (16, 32, 48)), ([1, 2, 3], (1, 2, 3))):
        assert colour_of(value) == want
    for value in ("whitish", [1, 2], [1, 2, 256], None, 5, "#12", ["a", "b", "c"]):
        with pytest.raises(UserError, match="expected a colour"):
            colour_of(value)


def test_cmyk_is_converted() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        red = pixels(saved(ink, kind))[4, 4].astype(int)
        assert red[0] > 200 and red[1:].max() < 60


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    exact = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **exact))
    assert np.abs(np.asarray(decoded.pixels)[0, 0].astype(int) - (250, 0, 0)).max() <= 4
    assert decoded.notes == (image_decoding.FIRST_FRAME,) and not decoded.plain


def test_an_image_far_longer_than_its_bucket_is_cut_before_it_is_scaled() -> None:
    """107 bytes of PNG took 2.5 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((8000, 1), (1, 8000), (300_000, 1), (1, 300_000)):
        fitted = fit(png(*size), [(512, 512)], "png")
        assert not isinstance(fitted, str) and fitted.bucket == "512x512" and fitted.original == size[::-1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    # What is cut first is the same middle as what is scaled first.
    noise = np.random.default_rng(0).integers(0, 256, (16, 256, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "PNG")
    scaled = fit_image(data, [(32, 32)], "png", WHITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "OVERHANG", 10**6)
        whole = fit_image(data, [(32, 32)], "png", WHITE)
    assert np.abs(pixels(scaled.image).astype(int) - pixels(whole.image)).max() <= 1


def test_too_many_pixels_are_refused_by_the_header_and_jpegs_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = png(1, 1)
    huge = head.replace(head[16:24], struct.pack(">II", 60_000, 60_000))
    huge = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    with pytest.raises(ImageError, match=r"60000 x 60000|exceeds limit"):
        decode(huge)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64)
    photo = Image.linear_gradient("L").convert("RGB")  # 256 x 256
    with pytest.raises(ImageError, match="256 x 256 pixels"):
        decode(saved(photo, "JPEG"))
    fitted = fit_image(saved(photo, "JPEG", quality=95), [(32, 32)], "png", WHITE)
    assert fitted.original == (256, 256)
    want = np.asarray(photo.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels(fitted.image) - want).max() <= 4
    with pytest.raises(ImageError, match="256 x 256 pixels"):
        fit_image(saved(photo, "JPEG"), [(200, 200)], "png", WHITE)


def test_threads_wait_where_their_images_together_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "PIXELS_AT_ONCE", 100)
    taken: list[int] = []
    decoded = image_decoding._decoded

    def slowly(*given: Any) -> Any:
        taken.append(image_decoding._ROOM.taken)
        time.sleep(0.01)
        return decoded(*given)

    monkeypatch.setattr(image_decoding, "_decoded", slowly)
    sizes = [(5, 8)] * 8 + [(20, 20)] * 2 + [(10, 9)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda size: decode(png(*size)).size, sizes))
    assert found == [size[::-1] for size in sizes]
    assert max(count for count in taken if count != 400) <= 100 and 80 in taken and taken.count(400) == 2
    assert image_decoding._ROOM.taken == 0
