"""Plain YAML, in and out: values without tags, so that no file of a user can run code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nexus_scale.contracts import UserError
from nexus_scale.durable import write_whole


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags beyond YAML's own, and a key given twice is an error instead of a silent choice."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 reads 1e-4 as text for want of a dot; in a recipe it is always a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Plain YAML values.

    Raises:
        UserError: not YAML, a tag, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not plain YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: no such file, not plain YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(value).__name__}")
    return value


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping, whole or not at all."""
    write_whole(path, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
