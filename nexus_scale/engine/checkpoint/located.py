"""The location of a run's checkpoints: its own folder, or the object store named there."""

from __future__ import annotations

import re
from pathlib import Path

from nexus_scale.contracts import UserError
from nexus_scale.engine.checkpoint.folder import Folder
from nexus_scale.engine.checkpoint.objects import ObjectStore
from nexus_scale.engine.checkpoint.places import Place
from nexus_scale.io.durable import atomic_write

ELSEWHERE = "ELSEWHERE"


def place_at(root: Path | str) -> Place:
    """The place of a run's checkpoints.

    Args:
        root: a path, or any URL that fsspec knows.
    """
    if isinstance(root, str) and re.match(r"\w+:", root):
        return ObjectStore(root)
    elsewhere = Path(root) / ELSEWHERE
    if elsewhere.is_file():
        return ObjectStore(_url_in(elsewhere))
    return Folder(Path(root))


def _url_in(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if re.fullmatch(r"\w[\w+.-]*:[^\s\0]+", text) is None:
        raise UserError(
            f"{file}: is damaged: it should contain the URL of this run's checkpoints, as in the recipe's "
            "callbacks.checkpoint.to; write it there",
            code=5,
        )
    return text


def send_elsewhere(root: Path, url: str) -> None:
    """Records in a run's folder that its checkpoints are at a URL."""
    if Folder(root).commits():
        raise UserError(
            f"{root}: already contains checkpoints, so new ones cannot go to {url}; resume without callbacks.checkpoint.to, "
            "or choose another run",
            code=5,
        )
    atomic_write(root / ELSEWHERE, url + "\n")
