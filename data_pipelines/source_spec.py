"""How a recipe, or a command line, names a source of images, videos or recordings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from pydantic.fields import FieldInfo

from data_pipelines.options import Flag
from data_pipelines.text_decoding import check_encoding
from nexus_scale.config.kinds import check_kind
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError


@dataclass(frozen=True)
class SourceSpec:
    """How a recipe names a source.

    Attributes:
        path: `openmoji`; a folder of images with captions beside them (a.png and a.txt or a.json), of tars, or of both; a
            CSV, TSV, JSONL or Parquet table; a WebDataset tar, a pattern (`laion/*.tar`) or a list of them (`laion/{00000..00041}.tar`).
        weight: share of the source in a mix. Without weights everything is taken.
        path_column, caption_column, label_column: columns of a table, or keys of a JSON. The label may be missing.
        group_key: column or JSON key; samples with equal values stay in one split.
        root: folder that the paths in a table are relative to; by default the table's own folder.
        ignore: patterns of names and paths that are left out, such as `*_mask.png` or `drafts`.
        encoding: of captions, tables and JSON without a byte-order mark.
        prefix: what stands before every caption that does not have it, such as words for a style; a sample without a
            caption has it alone.
        label: of all its samples, in place of one of their own, such as the name of a style.
    """

    path: str
    weight: float | None = None
    path_column: str = "path"
    caption_column: str = "caption"
    label_column: str = "label"
    group_key: str | None = None
    root: str | None = None
    licence: str = ""
    attribution: str = ""
    ignore: tuple[str, ...] = ()
    encoding: str = ""
    prefix: str = ""
    label: str = ""

    @classmethod
    def of(cls, value: str | Mapping[str, Any], ignore: Sequence[str] = ()) -> SourceSpec:
        """The source that a recipe's text or mapping names.

        Args:
            ignore: further patterns.
        Raises:
            UserError: an unknown key, no `path`, or a value of another type.
        """
        if not isinstance(value, str | Mapping):
            raise UserError(f"source {value!r}: expected a path, or a mapping with `path`.")
        values: dict[str, Any] = {"path": value} if isinstance(value, str) else dict(value)
        known = [each.name for each in fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"source: unknown key {key!r}; {nearest(str(key), known)}")
        path = values.get("path")
        if not isinstance(path, str) or not path or "\0" in path:
            raise UserError(f"source {value!r}: expected `path`: openmoji, a folder, a table or a tar.")
        where = f"source {path}"
        own = values.pop("ignore", None) or ()
        for name, given in values.items():
            check_kind(get_type_hints(cls)[name], given, f"{where}: {name}")
        if (weight := values.get("weight")) is not None and weight <= 0:
            raise UserError(f"{where}: weight is {weight!r}, expected a positive number.")
        patterns = (own,) if isinstance(own, str) else own
        check_kind(tuple[str, ...], patterns, f"{where}: ignore")
        if not all(patterns := (*patterns, *ignore)):
            raise UserError(f"{where}: ignore is {list(patterns)}, expected patterns such as '*_mask.png'.")
        if values.get("encoding"):
            check_encoding(values["encoding"], where)
        return cls(**values, ignore=patterns)

    def to_json(self) -> dict[str, Any]:
        """The source as reports hold it. Options that older versions did not know are left out while they are off."""
        return {name: value for name, value in vars(self).items() if name not in LATER or value}


LATER = ("ignore", "encoding", "prefix", "label")
"""Options that older versions did not know."""


class SourceFlag(Flag):
    """`--source`, with the columns of a table and the patterns of what is left out.

    Args:
        what: that the source holds, such as videos.
        label: default of the label column; None leaves it to the job.
    """

    def __init__(self, what: str, label: str | None = "label", label_help: str = ""):
        self.what, self.label, self.label_help = what, label, label_help

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        add = command.add_argument
        add("--source", required=True, help=f"folder of {self.what}, or a table (csv, tsv, jsonl, parquet)")
        self._add_columns(command)
        add(
            "--ignore",
            action="append",
            default=[],
            metavar="PATTERN",
            help="names or paths to leave out; may be repeated",
        )

    def _add_columns(self, command: argparse.ArgumentParser) -> None:
        add = command.add_argument
        for name in ("path", "caption"):
            add(f"--{name}-column", default=name, help=f"column of a table, key of JSON (default: {name})")
        words = self.label_help or f"column of a table, key of JSON (default: {self.label})"
        add("--label-column", default=self.label, help=words)
        add("--group-key", help=f"column or JSON key by which {self.what} stay together when data are split")

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        return {"path": arguments.pop("source"), **self._columns(arguments), "ignore": arguments.pop("ignore")}

    def _columns(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: arguments.pop(name) for name in ("path_column", "caption_column", "label_column", "group_key")}


class SourcesFlag(SourceFlag):
    """`--source`, repeated to mix several, each with its `--weight`."""

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        add = command.add_argument
        kinds = "openmoji, a folder, a table (csv, tsv, jsonl, parquet), a tar, a pattern or list of tars"
        add("--source", action="append", required=True, help=f"{kinds}; may be repeated")
        words = "share of the source in the mix; as often as --source, in its order"
        add("--weight", action="append", type=float, help=words)
        self._add_columns(command)
        add("--encoding", default="", help="of captions and tables without a byte-order mark (default: utf-8)")

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        paths, weights = arguments.pop("source"), arguments.pop("weight")
        if weights is not None and len(weights) != len(paths):
            raise UserError(f"got {len(weights)} --weight for {len(paths)} --source")
        columns = {**self._columns(arguments), "encoding": arguments.pop("encoding")}
        pairs = zip(paths, weights or [None] * len(paths), strict=True)
        return [{"path": path, "weight": weight, **columns} for path, weight in pairs]
