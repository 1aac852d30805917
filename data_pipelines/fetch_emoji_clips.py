"""Animated emoji with captions: Microsoft's Fluent emoji as webp, 256 x 256 pixels, from npm.

    python data_pipelines/fetch_emoji_clips.py --output emoji-clips --parts 1
    python data_pipelines/fetch_emoji_clips.py --output emoji-clips --packages lobehub-fluent-emoji-anim-1-1.0.0.tgz

Needs `npm`, which downloads @lobehub/fluent-emoji-anim-1 .. -4 1.0.0 (165, 182, 197 and 186 MB) from its registry, or the packages from
`npm pack`. Keeps the files that move and have a name in OpenMoji's list, unchanged, in `<output>/emoji/`. The table `<output>/emoji.csv`
(path, caption, base, group) is a source for `ingest_clips`: `group_key: base` keeps the skin tones of one emoji together, `label_column:
group` makes OpenMoji's groups the classes. The packages are not kept. They and the emoji are under the MIT licence.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import logging
import re
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from data_pipelines.class_images import fetch
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import Record, package_record, read_record
from data_pipelines.sources import OPENMOJI
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write

log = logging.getLogger(__name__)

VERSION = "1.0.0"
MEGABYTES = {1: 165, 2: 182, 3: 197, 4: 186}
INTEGRITY = {
    1: "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
    2: "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
    3: "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
    4: "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
}
"""npm's sha512 of each package, base64."""
MEMBER_LIMIT = 16 << 20
LICENCE = "MIT"
ATTRIBUTION = "Fluent emoji, Microsoft, https://github.com/microsoft/fluentui-emoji; packed by LobeHub"
TABLE, REPORT = "emoji.csv", "emoji.json"
COLUMNS = ("path", "caption", "base", "group")


class Options(JobOptions):
    """Which packages, and where they come from."""

    output: str = option("emoji-clips", description="folder to make, below the data root")
    parts: Sequence[int] = option((1, 2, 3, 4), description="which of the four packages")
    packages: Sequence[str] = option(
        (), description="their .tgz files, in the order of `parts`; without them npm downloads"
    )

    def check(self) -> None:
        if unknown := set(self.parts) - set(INTEGRITY):
            raise UserError(f"got parts {sorted(unknown)}; there are {sorted(INTEGRITY)}")
        if self.packages and len(self.packages) != len(self.parts):
            raise UserError(f"got {len(self.packages)} packages for parts {list(self.parts)}; give one for each")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes the folder of animations and its table.

    Raises:
        UserError: no npm or no network, a package that is missing or was altered.
    """
    if is_made(options, roots):
        return
    folder, names = roots.data_root / options.output, _names()
    record = _record(options, roots)
    record.refuse_others((folder / TABLE).is_file())
    if not options.packages:
        log.info(
            "fetch_emoji_clips: npm downloads %d package(s) @lobehub/fluent-emoji-anim, %d MB, %s; what moves is kept, nearly as "
            "much, in %s",
            len(options.parts), sum(MEGABYTES[part] for part in options.parts), LICENCE, folder,
        )  # fmt: skip
    rows: list[dict[str, str]] = []
    left_out = {"stills": 0, "without a name": 0, "too large": 0}
    for i, part in enumerate(options.parts):
        if progress is not None:
            progress(i, len(options.parts))
        with tempfile.TemporaryDirectory(prefix="emoji-") as temporary:
            packed = roots.data_root / options.packages[i] if options.packages else _packed(part, Path(temporary))
            rows += _unpack(packed, part, folder, names, left_out)
    if not rows:
        raise UserError(
            f"fetch_emoji_clips: no animation with a name in parts {list(options.parts)}; pack them again", 3
        )
    atomic_write(folder / TABLE, _table(rows))
    report = {
        "parts": list(options.parts),
        "clips": len(rows),
        "left_out": left_out,
        "licence": LICENCE,
        "by": ATTRIBUTION,
    }
    atomic_write(folder / REPORT, json.dumps(report, indent=1).encode())
    record.write()
    log.info("fetch_emoji_clips: %d animations; left out: %s", len(rows), left_out)


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the table of these parts and all files that it lists are there, made from these packages and names."""
    folder = roots.data_root / options.output
    if not _record(options, roots).fits():
        return False
    try:
        report = read_record(folder / REPORT)
        with (folder / TABLE).open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != COLUMNS:
                return False
            paths = [folder / row["path"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    same = report.get("parts") == list(options.parts) and len(paths) == report.get("clips")
    return same and all(path.is_file() for path in paths)


def _record(options: Options, roots: Roots) -> Record:
    """The record of what is read: the packages, and OpenMoji's list, which gives the captions."""
    folder, parts = roots.data_root / options.output, {"parts": list(options.parts)}
    return package_record(folder, roots.data_root, options.packages, options=parts, also=[OPENMOJI])


def _packed(part: int, folder: Path) -> Path:
    """The package of a part, downloaded into a folder."""
    name = f"@lobehub/fluent-emoji-anim-{part}@{VERSION}"
    advice = f"fetch it elsewhere with `npm pack {name}` and give the .tgz in `packages`"
    return fetch(("npm", "pack", name, "--silent"), folder, "*.tgz", advice)


def _table(rows: Iterable[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["path"]))
    return text.getvalue().encode()


def _unpack(
    packed: Path, part: int, folder: Path, names: dict[str, tuple[str, str, str]], left_out: dict[str, int]
) -> list[dict[str, str]]:
    """The rows of the table for one package. Names in the package are only looked up; no path from it is written to."""
    if not packed.is_file():
        raise UserError(
            f"{packed}: no such file; make it with `npm pack @lobehub/fluent-emoji-anim-{part}@{VERSION}`", 3
        )
    digest = hashlib.sha512()
    with packed.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            digest.update(chunk)
    if (got := base64.b64encode(digest.digest()).decode()) != INTEGRITY[part]:
        raise UserError(f"{packed}: sha512 is {got}, npm's for part {part} is {INTEGRITY[part]}; pack it again", 3)
    rows = []
    with tarfile.open(packed, mode="r:gz") as archive:
        for member in archive:
            match = re.fullmatch(r"package/assets/([0-9a-f]+(?:-[0-9a-f]+)*)\.webp", member.name)
            if match is None or not member.isreg():
                continue  # a licence, or whatever else the package holds
            if member.size > MEMBER_LIMIT:
                left_out["too large"] += 1
                continue
            stream = archive.extractfile(member)
            assert stream is not None, member.name
            data = stream.read()
            if not _moves(data):
                left_out["stills"] += 1
                continue
            named = names.get(_code(match[1]))
            if named is None:
                left_out["without a name"] += 1
                continue
            path = f"emoji/{match[1]}.webp"
            atomic_write(folder / path, data)
            rows.append(dict(zip(COLUMNS, (path, *named), strict=True)))
    return rows


def _moves(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _names() -> dict[str, tuple[str, str, str]]:
    """Caption, base emoji and group by code points, from the OpenMoji list in this package."""
    names = {}
    with tarfile.open(OPENMOJI) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                stream = archive.extractfile(member)
                assert stream is not None, member.name
                said = json.loads(stream.read())
                names[_code(said["hexcode"])] = (said["caption"], said["base"], said["group"])
    return names


def _code(code_points: str) -> str:
    """The code points without the variation selector, which lists use inconsistently."""
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
