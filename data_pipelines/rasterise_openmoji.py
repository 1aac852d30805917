"""OpenMoji's drawings as a small WebDataset tar: the job that made `data_pipelines/openmoji/openmoji-32.tar`.

    npm pack openmoji@17.0.0
    python data_pipelines/rasterise_openmoji.py --package openmoji-17.0.0.tgz --size 32 --output openmoji

Keeps six groups (the drawings of Unicode's emoji in them, with skin tones) and leaves out the `extras-*` groups. Of drawings with equal
pixels (several islands fly their country's flag) the one with the fewest words in its name is kept. Each drawing is rendered eight times
too large on white and reduced by the mean of 8 x 8 pixels. The caption is OpenMoji's annotation, the label its group. `base` is the emoji
without its skin tone; data are split by it, so that twins stay together.

The same versions of resvg-py and Pillow make the same tar, bit for bit. Needs resvg-py (`pip install resvg-py`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import RECORD, Record, package_record
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write

log = logging.getLogger(__name__)

GROUPS = ("flags", "smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places")
"""The groups in the order of their labels."""

VERSION = "17.0.0"
INTEGRITY = "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w=="
"""npm's sha512 of openmoji-17.0.0.tgz, base64."""

SUPERSAMPLING = 8
MEMBER_LIMIT = 64 << 20

NOTICE = """\
The images in openmoji-{size}.tar were made from OpenMoji {version} (https://openmoji.org/).

All emojis designed by OpenMoji (https://openmoji.org/) - the open-source emoji and icon project.
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)

Changes: rasterised to {size} x {size} pixels on a white background; six groups of the collection were kept; drawings
that look the same at this size were left out. These images are under the same licence, whose text follows.

"""


class Options(JobOptions):
    """What is drawn, and how large."""

    package: str = option(
        description=f"openmoji-{VERSION}.tgz from `npm pack` (nothing of it is written to disk), or a folder it was unpacked to"
    )
    size: int = option(32, ge=8, le=512, description="height and width in pixels")
    output: str = option("openmoji", description="folder for the tar and its licence, below the data root")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Writes `openmoji-<size>.tar` and `LICENSE.txt` into the output folder.

    Raises:
        UserError: the package is missing, of another version, or was altered.
    """
    if is_made(options, roots):
        return
    record = _record(options, roots)
    drawings, catalogue, licence = read_package(roots.data_root / options.package, ("color",))
    chosen = [entry for entry in catalogue if entry["group"] in GROUPS]
    pictures: dict[bytes, tuple[dict[str, Any], np.ndarray]] = {}
    for count, entry in enumerate(chosen, start=1):
        pixels = drawn(drawings["color"][entry["hexcode"]], options.size)
        first = pictures.get(pixels.tobytes())
        if first is None or len(entry["annotation"].split()) < len(first[0]["annotation"].split()):
            pictures[pixels.tobytes()] = entry, pixels
        if progress is not None:
            progress(count, len(chosen))
    log.info(
        "openmoji: kept %d of %d drawings; the others have the same pixels as one kept", len(pictures), len(chosen)
    )
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (entry, pixels) in enumerate(sorted(pictures.values(), key=lambda one: one[0]["order"]), start=1):
            add_member(archive, f"{number:04d}.png", png_of(pixels))
            add_member(archive, f"{number:04d}.json", _described(entry))
    folder = roots.data_root / options.output
    atomic_write(folder / f"openmoji-{options.size}.tar", tar.getvalue())
    atomic_write(folder / "LICENSE.txt", NOTICE.format(size=options.size, version=VERSION).encode() + licence)
    record.write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the tar is there, made from this package."""
    tar = roots.data_root / options.output / f"openmoji-{options.size}.tar"
    return tar.is_file() and _record(options, roots).fits()


def _record(options: Options, roots: Roots) -> Record:
    inside = ("package.json", "LICENSE.txt", "data/openmoji.json", "color/svg/*.svg")
    folder, name = roots.data_root / options.output, f"openmoji-{options.size}.{RECORD}"
    return package_record(folder, roots.data_root, options.package, inside=inside, name=name)


def read_package(
    source: Path, styles: Sequence[str]
) -> tuple[dict[str, dict[str, bytes]], list[dict[str, Any]], bytes]:
    """The drawings by style (`color`, `black`) and hexcode, the catalogue in OpenMoji's order, and the text of the licence.

    Raises:
        UserError: the package is missing, of another version, or was altered.
    """
    folders = tuple(f"{style}/svg/" for style in styles)
    if source.is_file():
        packed = source.read_bytes()
        digest = base64.b64encode(hashlib.sha512(packed).digest()).decode()
        if digest != INTEGRITY:
            raise UserError(
                f"{source}: sha512 is {digest}, npm's for openmoji {VERSION} is {INTEGRITY}; pack it again.", 3
            )
        files = {}
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                if (
                    (name.startswith(folders) or name in ("data/openmoji.json", "LICENSE.txt"))
                    and member.isreg()
                    and member.size <= MEMBER_LIMIT
                ):
                    stream = archive.extractfile(member)
                    assert stream is not None, member.name
                    files[name] = stream.read()
    elif (source / "data" / "openmoji.json").is_file():
        found = json.loads((source / "package.json").read_text(encoding="utf-8")).get("version")
        if found != VERSION:
            raise UserError(f"{source}: openmoji {found}, expected {VERSION}.", 3)
        svgs = sorted(path for folder in folders for path in (source / folder).glob("*.svg"))
        paths = [source / "data" / "openmoji.json", source / "LICENSE.txt", *svgs]
        files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
    else:
        raise UserError(
            f"{source}: no OpenMoji package. This needs openmoji {VERSION} (4.3 MB from the npm registry, "
            f"CC-BY-SA-4.0); fetch it with `npm pack openmoji@{VERSION}` and give the .tgz as --package.",
            3,
        )
    drawings: dict[str, dict[str, bytes]] = {style: {} for style in styles}
    for name, content in files.items():
        if name.endswith(".svg"):
            drawings[name.partition("/")[0]][Path(name).stem] = content
    return drawings, json.loads(files["data/openmoji.json"]), files["LICENSE.txt"]


def drawn(svg: bytes, size: int) -> np.ndarray:
    """A drawing on white, (size, size, 3) uint8: each pixel is the rounded mean of 8 x 8."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("openmoji: resvg-py is not installed, which draws it; `pip install resvg-py`.", 3) from error
    large = size * SUPERSAMPLING
    # System fonts would make the result depend on the machine; no drawing holds text.
    png = resvg_py.svg_to_bytes(
        svg_string=svg.decode("utf-8"), width=large, height=large, background="#ffffff", skip_system_fonts=True
    )
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"), dtype=np.uint32)  # (8*size, 8*size, 3)
    assert pixels.shape == (large, large, 3), pixels.shape
    cells = pixels.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).sum(axis=(1, 3))  # (size, size, 3)
    area = SUPERSAMPLING**2
    return ((cells + area // 2) // area).astype(np.uint8)


def png_of(pixels: np.ndarray) -> bytes:
    """The smaller of an RGB PNG and, up to 256 colours, a palette PNG; both are lossless."""
    image = Image.fromarray(pixels)
    images = [image]
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) <= 256:
        palette = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
        palette.putpalette(colours.astype(np.uint8).tobytes())
        assert np.array_equal(np.asarray(palette.convert("RGB")), pixels)
        images.append(palette)
    return min((_encoded(each) for each in images), key=len)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _described(entry: dict[str, Any]) -> bytes:
    description = {
        "caption": entry["annotation"],
        "group": entry["group"],
        "label": GROUPS.index(entry["group"]),
        "hexcode": entry["hexcode"],
        "base": entry["skintone_base_hexcode"] or entry["hexcode"],
    }
    return json.dumps(description, ensure_ascii=False).encode()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0 and no owner, for the same bytes on every machine
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
