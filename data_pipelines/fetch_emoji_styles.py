"""Emoji in two styles, for networks that translate one into the other: OpenMoji's line drawings and its coloured ones, from npm.

    python data_pipelines/fetch_emoji_styles.py --output emoji-styles --size 32
    python data_pipelines/fetch_emoji_styles.py --output emoji-styles --package openmoji-17.0.0.tgz

Needs `npm`, which downloads openmoji 17.0.0 (4.3 MB) from its registry, or the package from `npm pack`; and resvg-py, which draws it
(`pip install resvg-py`). Writes `<output>/black.tar` and `<output>/color.tar`: an emoji has one key in both, its hexcode, and its name as a
caption. Each is a source for `ingest_images`, which holds the same emoji out of both. Left out: flags, which lines do not tell apart, skin
tones, and emoji that Unicode does not have. They are under CC BY-SA 4.0.
"""

from __future__ import annotations

import io
import logging
import tarfile
import tempfile
from pathlib import Path

from data_pipelines.class_images import fetch
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.rasterise_openmoji import VERSION, add_member, drawn, png_of, read_package
from data_pipelines.signatures import RECORD, Record, package_record, refuse_foreign
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write

log = logging.getLogger(__name__)

STYLES = ("black", "color")
LEFT_OUT = ("flags", "component", "extras-")
"""Groups that begin so."""

NOTICE = """\
The images in black.tar and color.tar were made from OpenMoji {version} (https://openmoji.org/).

All emojis designed by OpenMoji (https://openmoji.org/) - the open-source emoji and icon project.
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)

Changes: rasterised to {size} x {size} pixels on a white background; flags, skin tones and extras were left out. These images
are under the same licence, whose text follows.

"""


class Options(JobOptions):
    """How large the emoji are drawn, and where they come from."""

    output: str = option("emoji-styles", description="folder to make, below the data root")
    size: int = option(32, ge=8, le=512, description="height and width in pixels")
    package: str | None = option(
        None, description=f"openmoji-{VERSION}.tgz, or a folder it was unpacked to; without it npm downloads it"
    )


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes the two tars of images and captions.

    Raises:
        UserError: no npm or no network, no resvg-py, a package that is missing or was altered.
    """
    if is_made(options, roots):
        return
    folder, record = roots.data_root / options.output, _record(options, roots)
    refuse_foreign(folder, RECORD)
    record.refuse_others(_there(folder))
    with tempfile.TemporaryDirectory(prefix="emoji-styles-") as temporary:
        drawings, catalogue, licence = read_package(_package(options, roots, Path(temporary)), STYLES)
    chosen = [
        entry
        for entry in catalogue
        if not entry["group"].startswith(LEFT_OUT)
        and not entry["skintone_base_hexcode"]
        and all(entry["hexcode"] in drawings[style] for style in STYLES)
    ]
    tars = {style: io.BytesIO() for style in STYLES}
    for number, (style, tar) in enumerate(tars.items()):
        with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for count, entry in enumerate(chosen, start=1):
                key = entry["hexcode"]
                add_member(archive, f"{key}.png", png_of(drawn(drawings[style][key], options.size)))
                add_member(archive, f"{key}.txt", entry["annotation"].encode())
                if progress is not None:
                    progress(number * len(chosen) + count, len(STYLES) * len(chosen))
    for style, tar in tars.items():
        atomic_write(folder / f"{style}.tar", tar.getvalue())
    atomic_write(folder / "LICENSE.txt", NOTICE.format(size=options.size, version=VERSION).encode() + licence)
    record.write()
    log.info("fetch_emoji_styles: %d emoji in %s, CC-BY-SA-4.0", len(chosen), " and ".join(STYLES))


def is_made(options: Options, roots: Roots) -> bool:
    """Whether both tars are there, drawn in this size from this package."""
    return _there(roots.data_root / options.output) and _record(options, roots).fits()


def _there(folder: Path) -> bool:
    return all((folder / f"{style}.tar").is_file() for style in STYLES)


def _record(options: Options, roots: Roots) -> Record:
    inside = ("package.json", "LICENSE.txt", "data/openmoji.json", *(f"{style}/svg/*.svg" for style in STYLES))
    folder = roots.data_root / options.output
    return package_record(folder, roots.data_root, options.package, options={"size": options.size}, inside=inside)


def _package(options: Options, roots: Roots, temporary: Path) -> Path:
    if options.package is None:
        advice = f"fetch it elsewhere with `npm pack openmoji@{VERSION}` and give the .tgz as `package`"
        return fetch(("npm", "pack", f"openmoji@{VERSION}", "--silent"), temporary, "*.tgz", advice)
    source = roots.data_root / options.package
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; make it with `npm pack openmoji@{VERSION}`", 3)
    return source


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
