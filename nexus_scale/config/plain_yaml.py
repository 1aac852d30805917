"""Plain YAML, in and out: text, numbers, truth values, lists and mappings, so that no file can run code or expand without bound.

Numbers are decimal, as in YAML 1.2's core: `1:30`, `0x1F`, `017` and `1_000`, numbers to YAML 1.1, are text here, and so are dates.
`yes`, `no`, `on` and `off` are truth values, as in YAML 1.1: old recipes have them.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write

LONGEST = 256 * 1024
"""Characters of a file. The longest recipe here has 5,000; PyYAML reads some 100,000 a second."""
DEEPEST = 48
"""Levels of nested lists and mappings."""
MOST_VALUES = 20_000
"""Values in a file, counted after aliases are expanded."""
LONGEST_NUMBER = 40

_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+]?[0-9]+)?|[-+]?(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags, keys are text, and a key given twice is an error instead of a silent choice."""

    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _wrong(f"the tag {event.tag}: tags are not allowed", event)
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > DEEPEST:
            raise _wrong(f"nested more than {DEEPEST} levels deep", event)
        if self.values > MOST_VALUES:
            raise _wrong(f"more than {MOST_VALUES:,} values", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _wrong(words: str, at: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, words, at.start_mark)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            shown = f"{key_node.value!r:.60}" if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
            raise _wrong(f"the key {shown}: keys are text; put it in quotes", key_node)
        if key in seen:
            raise _wrong(f"key {key!r} is given twice", key_node)
        seen.add(key)
    made = loader.construct_mapping(node, deep=True)
    for key in made:  # including those merged by `<<`
        if not isinstance(key, str):
            raise _wrong(f"the key {key!r:.60}: keys are text; put it in quotes", node)
    return made


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > LONGEST_NUMBER:
        raise _wrong(f"a number of {len(node.value)} digits", node)
    return int(node.value)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    if found := _NO_TEXT.search(node.value):
        raise _wrong(f"the character {found.group()!r} in text", node)
    return str(node.value)


_RESOLVED = {
    letter: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] in ("bool", "null", "merge")]
    for letter, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _RESOLVED
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:str", _text)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that _Loader and other readers read back: text that either would take for another type is quoted."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _measure(node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values and levels of a node after its aliases are expanded.

    Composed nodes are a graph. Each is visited once; one that is reached while still being visited contains itself.
    """
    known = sizes.get(id(node))
    if known == (0, 0):
        raise _wrong("an alias inside its own anchor", node)
    if known is not None:
        return known
    sizes[id(node)] = (0, 0)
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [one for pair in node.value for one in pair]
    values, levels = 1, 0
    for child in children:
        more, deeper = _measure(child, sizes)
        values, levels = values + more, max(levels, deeper)
        if values > MOST_VALUES or levels >= DEEPEST:
            raise _wrong(f"unfolds to more than {MOST_VALUES:,} values or {DEEPEST} levels", node)
    sizes[id(node)] = (values, levels + 1)
    return sizes[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Plain YAML values.

    Raises:
        UserError: not YAML, a tag, a key that is no text or is given twice, text with control characters; or more of it than a recipe
            can be: too long, too deep, anchors that unfold to too many values.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where}: {len(text):,} characters; expected at most {LONGEST:,}")
    try:
        return copy.deepcopy(_document(text))
    except yaml.YAMLError as error:
        words = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise UserError(f"{where}: not plain YAML: {words}") from None


@functools.lru_cache(maxsize=512)
def _document(text: str) -> Any:
    """The values in a text; of one that was read before, the same, since PyYAML takes a twentieth of a second for a recipe."""
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _measure(node, {})
    return loader.construct_document(node)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not plain YAML, or not a mapping.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        got = "nothing" if value is None else type(value).__name__
        raise UserError(f"{path}: expected a mapping of keys to values, got {got}")
    return value


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that parse_yaml reads back."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping atomically."""
    atomic_write(path, dump_yaml(values))
