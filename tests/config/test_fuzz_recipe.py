"""Mutated recipes and cluster files through `nexus train --dry-run`: a message and its code, or a dry run, in bounded time and memory."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import dump_yaml
from tests.fuzz import fuzz

RECIPES = (
    "mmdit/tiny_openmoji", "dit/tiny_fashion_mnist", "flux/tiny_openmoji", "cogvideox/tiny_emoji", "vae/tiny_clips", "vae/tiny_openmoji",
    "codec/tiny_speech", "valle/tiny_speech",
)  # fmt: skip

NUMBERS = (
    0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e-9, 1e300, 10**6, 10**9, 999_999_937, 10**12, 2**31, 2**63, 2**64, 10**30, -(10**12),
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "no", "yes", "null", "~", "5", "1:30", "0x1F", "1_000", "2026-11-26", "auto", "none", "true", "../../etc/passwd",
    "/dev/zero", "~nobody_of_that_name/x", "~/x", "a/b", "a\\b", "a" * 5000, "é🍕", "%s", "{name}", "\u2028", "mmdit", "model", "ema",
    "linear", "layers", "text", "convnext", "__init__", "s3://a/b", "file:///etc/passwd", "-1", "--help", "*", "[", "{", "name: x",
)  # fmt: skip
RAW = (
    "!!binary aGk=", "!!set {a}", "!!python/name:os.system ''", "!!int x", "!x y", "&a [*a]", "*nowhere", "0b11", "017", ".inf", ".nan",
    "1e999", "2026-11-26 10:00:00", '"\\0"', '"\\ud800"', '"\\e[31m"', "? [a]\n: 1", "{[a]: b}", "{1: 2}", "{null: 1}", "{no: 1}",
    "[" * 300, "[" * 60 + "]" * 60, "9" * 5000, "'", '"', "|", "{<<: 1}", "{<<: {5: 1}}", "<<",
    "[&a [1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c], [*d,*d,*d,*d,*d]]",
)  # fmt: skip
"""Text that is put into a file as it is."""
MARK = "replaced-as-it-is"


def value_of(rng: random.Random, depth: int = 0) -> Any:
    """Any value that YAML can hold."""
    match rng.randrange(9):
        case 0 | 1 | 2:
            return rng.choice(NUMBERS)
        case 3 | 4:
            return rng.choice(TEXTS)
        case 5:
            return rng.choice((True, False, None))
        case 6:
            return [] if depth > 2 else [value_of(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 7:
            return {} if depth > 2 else {rng.choice(TEXTS): value_of(rng, depth + 1) for _ in range(rng.randrange(3))}
        case _:
            return MARK


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value may be replaced: every key and every item below it."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        found += places(below, (*path, key))
    return found


def mutated(rng: random.Random, values: dict[str, Any]) -> str:
    """YAML with one to three values replaced, removed, added, renamed or moved, and now and then its text damaged."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.choice(places(values) or [("x",)])
        holder = functools.reduce(lambda inner, key: inner[key], place[:-1], values)
        change: Callable[[], Any] = rng.choice(
            (
                lambda holder=holder, key=place[-1]: holder.__setitem__(key, value_of(rng)),
                lambda holder=holder, key=place[-1]: holder.__setitem__(key, value_of(rng)),
                lambda holder=holder, key=place[-1]: holder.__setitem__(key, near(rng, holder[key])),
                lambda holder=holder, key=place[-1]: holder.__setitem__(key, near(rng, holder[key])),
                lambda holder=holder, key=place[-1]: holder.pop(key),
                lambda holder=holder: (
                    holder.update({rng.choice(TEXTS): value_of(rng)}) if isinstance(holder, dict) else holder.append(1)
                ),
            )
        )
        change()
    text = dump_yaml(values)
    while MARK in text:
        text = text.replace(MARK, rng.choice(RAW), 1)
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(("\t", ":", "\n", "'", "&a ", "*a", "- ", "\x00", "\ufeff", "#", "", "<<: "))
            + text[at + rng.randrange(3) :]
        )
    return text


def near(rng: random.Random, value: Any) -> Any:
    """A value that differs a little."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value).lower()))
    if isinstance(value, int | float):
        return rng.choice((-value, value + 1, value * 10, value / 3, value * 1e9, str(value), [value], value == 1))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), [value], {"name": value}, value + "\n", " " + value))
    if isinstance(value, list):
        return rng.choice((value * 2, value[:1], [], value * 3000, [value], value[0] if value else None))
    if isinstance(value, dict):
        return rng.choice(([value], {}, None, {**value, "name": "x"}, list(value)))
    return 0


@functools.cache
def plain(name: str) -> dict[str, Any]:
    """A recipe's tiny form, with all its defaults."""
    return recipes.dump(recipes.load_recipe(name, tiny=True))


@functools.cache
def cluster() -> dict[str, Any]:
    return recipes.dump(recipes.load_cluster("local_cpu"))


def recipe_file(rng: random.Random, folder: Path) -> Sequence[str]:
    path = folder / "recipe.yaml"
    if rng.random() < 0.25:  # a recipe as people write it, over a base, with its own tiny block
        name = rng.choice(RECIPES)
        values = {
            "base": name,
            "name": "mine",
            "tiny": copy.deepcopy(recipes.load_recipe(name).tiny),
            "networks": {"model": {"depth": 2}},
        }
        path.write_text(mutated(rng, values), encoding="utf-8")
        return ["train", str(path), "--dry-run", "--tiny"]
    path.write_text(mutated(rng, plain(rng.choice(RECIPES))), encoding="utf-8")
    return ["train", str(path), "--dry-run"]


def cluster_file(rng: random.Random, folder: Path) -> Sequence[str]:
    path = folder / "cluster.yaml"
    path.write_text(mutated(rng, cluster()), encoding="utf-8")
    return ["train", "vae/tiny_openmoji", "--tiny", "--dry-run", "--cluster", str(path)]


def test_fuzz_recipes(tmp_path: Path) -> None:
    fuzz("recipe", recipe_file, tmp_path)


def test_fuzz_clusters(tmp_path: Path) -> None:
    fuzz("cluster", cluster_file, tmp_path)
