"""Fashion-MNIST: 60,000 grey images of 28 x 28 pixels in ten classes for training, 10,000 held out.

    python data_pipelines/fetch_fashion_mnist.py --output fashion-mnist
    python data_pipelines/fetch_fashion_mnist.py --output fashion-mnist --package dataset-fashion-mnist_....deb

Needs `apt-get` and `dpkg-deb` of Debian or Ubuntu, but not root. `apt-get download` fetches dataset-fashion-mnist (31 MB) from the
distribution's mirror and checks its signature; `dpkg-deb` unpacks it into a temporary folder. The package can also be given as a file.
Writes the images as PNG into shards of about 340 MB. Expat (MIT) licence, Zalando SE 2017.
"""

from __future__ import annotations

import gzip
import logging
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np

from data_pipelines.class_images import LabelledImages, fetch, finished, write_splits
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import RECORD, Record, package_record, refuse_foreign
from nexus_scale.contracts import UserError

log = logging.getLogger(__name__)

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PACKAGE = "dataset-fashion-mnist"
INSIDE = "usr/share/datasets/fashion-mnist"
SPLITS = {"train": ("train", 60_000), "heldout": ("t10k", 10_000)}
SIDE = 28
IMAGES_HEADER, LABELS_HEADER = 16, 8
LICENCE = "MIT"
ATTRIBUTION = "Fashion-MNIST, copyright 2017 Zalando SE, https://github.com/zalandoresearch/fashion-mnist"


class Options(JobOptions):
    """Where the images come from and go to."""

    output: str = option("fashion-mnist", description="folder to make, below the data root")
    package: str | None = option(
        None, description=f"{PACKAGE}_*.deb, or a folder with its four `*-ubyte.gz`; without it apt-get downloads it"
    )


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/train/images` and `<output>/heldout/images`, the set's own test images.

    Raises:
        UserError: no apt-get or no network, or the package is missing or damaged.
    """
    if is_made(options, roots):
        return
    folder = roots.data_root / options.output
    refuse_foreign(folder, RECORD)
    record = _record(options, roots)
    with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as temporary:
        if options.package is not None:
            source = roots.data_root / options.package
            if not source.exists():
                raise UserError(f"{source}: no such file or folder; make it with `apt-get download {PACKAGE}`", 3)
        else:
            log.info(
                "fetch_fashion_mnist: apt-get downloads %s (31 MB, %s licence); some 340 MB are kept in %s",
                PACKAGE, LICENCE, folder,
            )  # fmt: skip
            advice = f"fetch it elsewhere with `apt-get download {PACKAGE}` and give the .deb as `package`"
            source = fetch(("apt-get", "download", PACKAGE), Path(temporary), "*.deb", advice)
        splits = _read(source if source.is_dir() else _unpack(source, Path(temporary)))
    write_splits(folder, splits, CLASSES, licence=LICENCE, attribution=ATTRIBUTION, progress=progress)
    record.write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether both splits are there, made from this package where one is given."""
    counts = {split: count for split, (_, count) in SPLITS.items()}
    return _record(options, roots).fits() and finished(roots.data_root / options.output, counts)


def _record(options: Options, roots: Roots) -> Record:
    folder = roots.data_root / options.output
    return package_record(folder, roots.data_root, options.package, inside=("*-ubyte.gz",))


def _unpack(deb: Path, temporary: Path) -> Path:
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"dpkg-deb: not installed; unpack {deb} elsewhere and give its {INSIDE} as `package`", 3)
    ended = subprocess.run(
        ("dpkg-deb", "-x", str(deb), str(temporary / "unpacked")), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise UserError(f"{deb}: dpkg-deb cannot unpack it: {' '.join(ended.stderr.split())[-400:]}", 3)
    return temporary / "unpacked" / INSIDE


def _read(folder: Path) -> dict[str, LabelledImages]:
    """The splits in a folder, with the grey values repeated for three channels."""
    splits = {}
    for split, (name, count) in SPLITS.items():
        grey = _idx(folder / f"{name}-images-idx3-ubyte.gz", IMAGES_HEADER, count * SIDE * SIDE)
        labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", LABELS_HEADER, count)
        images = grey.reshape(count, SIDE, SIDE, 1).repeat(3, axis=3)
        splits[split] = LabelledImages(images, labels.astype(np.int64))
    return splits


def _idx(file: Path, header: int, size: int) -> np.ndarray:
    """The bytes behind an IDX header, (size,) uint8."""
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); fetch {PACKAGE} again", 3) from None
    if len(data) != header + size:
        raise UserError(f"{file}: holds {len(data)} bytes, expected {header + size}; fetch {PACKAGE} again", 3)
    return np.frombuffer(data, np.uint8, offset=header)


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
