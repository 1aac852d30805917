"""Lists of shards as WebDataset's users write them: `laion/{00000..00041}.tar`, several lists joined by `::`, patterns with `*`.

The `webdataset` package expands the notation, which is its own. It does not open the shards: it also takes `pipe:` URLs, which run
commands, and passes over what it cannot read. `tars.py` reads them: there every member is used, or dropped with its place and reason, a
damaged tar gives what stands before the damage, and no decoder runs.
"""

from __future__ import annotations

import glob
import math
import re
from pathlib import Path

from nexus_scale.contracts import UserError
from nexus_scale.data.tar_members import TAR_SUFFIXES

MOST_SHARDS = 1_000_000

_URL = re.compile(r"(?i)(pipe:|[a-z][a-z0-9+.-]*://)")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def is_list(text: str) -> bool:
    """Whether a path is a list of shards, or a pattern of their names."""
    return "::" in text or any(sign in text for sign in "*?[{") or _URL.match(text) is not None


def shards_of(text: str, data_root: Path) -> list[Path]:
    """The files of a list, in its order; those of a pattern are sorted.

    Raises:
        UserError: a URL; too many files; a file that is no tar, or is not there; or the webdataset package is missing.
    """
    found: list[Path] = []
    for name in _expanded(text) if "::" in text or "{" in text or _URL.match(text) else [text]:
        if _URL.match(name):
            said = "which would run a command" if name.lower().startswith("pipe:") else "which is read by no job"
            raise UserError(f"source {text}: got a URL, {said}; download the shards and name their files.", 3)
        path = data_root / Path(name).expanduser()
        # A path that is there is itself, whatever signs are in its name.
        found += [path] if path.exists() else sorted(Path(each) for each in glob.glob(_pattern(path), recursive=True))
        if not found or (not path.exists() and not any(sign in name for sign in "*?[")):
            raise UserError(f"{path}: no such shard (of {text}); correct the list.", 3)
    if not all(path.name.lower().endswith(TAR_SUFFIXES) for path in found):
        raise UserError(f"{text}: got {len(found)} files, expected tars; correct the pattern.", 3)
    return found


def _expanded(text: str) -> list[str]:
    """WebDataset's notation without its variables, as a recipe is no place that reads the environment."""
    # Fifteen digits are more than any number of shards, and fewer than int refuses.
    sizes = [1 + abs(int(last[:15]) - int(first[:15])) for first, last in _RANGE.findall(text)]
    if math.prod(sizes) * 2 ** (text.count("{") - len(sizes)) > MOST_SHARDS or "$" in text:
        raise UserError(f"source {text[:200]}: got variables or more than {MOST_SHARDS:,} shards.", 3)
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise UserError(
            f"source {text}: lists of shards need the webdataset package: pip install 'nexus-scale[webdataset]'; "
            "patterns such as 'shards/*.tar' do not.",
            3,
        ) from None
    try:
        return list(expand_urls(text))
    except ValueError as error:  # unbalanced braces
        raise UserError(f"source {text}: {error}; expected for example shards/{{000..009}}.tar.", 3) from None


def _pattern(path: Path) -> str:
    """The path as a pattern in which the folders that are there stand for themselves, brackets in their names and all."""
    known = next(folder for folder in path.parents if folder.exists())
    return str(Path(glob.escape(str(known))) / path.relative_to(known))
