"""Recipes and clusters: what is merged over what, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexus_scale.callbacks.made import SERVICES
from nexus_scale.config import plain_yaml, registry
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import UserError

CONFIGS = recipes.configs_root()
RECIPES = sorted(
    p.relative_to(CONFIGS).with_suffix("").as_posix()
    for p in CONFIGS.rglob("*.yaml")
    if p.parent.name not in ("_base", "cluster", "data", "suites") and p.parent != CONFIGS
)


def said(action, *arguments, **options) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert caught.value.code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_its_check_and_reads_back(name: str) -> None:
    for tiny in (False, True):
        recipe = recipes.load_recipe(name, tiny=tiny)
        recipes.check(recipe, SERVICES)
        assert recipes.recipe_from(recipes.dump(recipe), "dumped") == recipe
        assert recipes.recipe_hash(recipes.recipe_from(recipes.dump(recipe), "dumped")) == recipes.recipe_hash(recipe)


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_cluster_reads(path: Path) -> None:
    assert recipes.load_cluster(path.stem).name == path.stem


def test_merge_order_and_replacement_of_a_renamed_component() -> None:
    below = {"objective": {"name": "a", "x": 1}, "steps": 3, "optimizer": {"lr": 1, "eps": 2}}
    merged = recipes.merge(below, {"objective": {"name": "b", "y": 2}, "optimizer": {"lr": 5}})
    assert merged == {"objective": {"name": "b", "y": 2}, "steps": 3, "optimizer": {"lr": 5, "eps": 2}}
    assert below["optimizer"] == {"lr": 1, "eps": 2}


def test_overrides_go_to_the_recipe_and_the_cluster() -> None:
    recipe, cluster = recipes.overrides_of(
        ["steps=200", "optimizer.lr=1e-4", "cluster.workers=1", "cluster.paths.data=/d"]
    )
    assert recipe == {"steps": 200, "optimizer": {"lr": 1e-4}}
    assert cluster == {"workers": 1, "paths": {"data": "/d"}}


def test_mistakes_name_the_file_the_key_and_the_nearest(tmp_path: Path) -> None:
    name = "mmdit/tiny_openmoji"
    assert "did you mean 'global_batch'" in said(recipes.load_recipe, name, {"globl_batch": 3})
    assert "'optimizer.schedule.warmup'" in said(recipes.load_recipe, name, {"optimizer": {"schedule": {"warmup": 3}}})
    assert "steps" in said(recipes.load_recipe, name, {"steps": "many"})
    assert "did you mean" in said(recipes.load_recipe, "mmdit/tiny_openmojy")
    assert "key=value" in said(recipes.overrides_of, ["steps"])
    wrong = recipes.load_recipe(name, {"networks": {"model": {"name": "mmdti"}}})
    assert "'mmdit'" in said(recipes.check, wrong, SERVICES)
    wrong = recipes.load_recipe(name, {"networks": {"model": {"dept": 2}}})
    assert "networks.model.dept" in said(recipes.check, wrong, SERVICES) and "depth" in said(
        recipes.check, wrong, SERVICES
    )
    wrong = recipes.load_recipe(name, {"networks": {"model": {"depth": "deep"}}})
    assert "networks.model.depth" in said(recipes.check, wrong, SERVICES)
    wrong = recipes.load_recipe(name, {"networks": {"ema": {"average_of": "modle"}}})
    assert "'model'" in said(recipes.check, wrong, SERVICES)
    wrong = recipes.load_recipe(name, {"callbacks": {"metrics": {"evry": 3}}})
    assert "did you mean 'every'" in said(recipes.check, wrong, SERVICES)
    wrong = recipes.load_recipe(name, {"callbacks": {"checkpont": {}}})
    assert "'checkpoint'" in said(recipes.check, wrong, SERVICES)


def test_yaml_takes_no_tag_and_no_key_twice(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"name: !!python/object/apply:os.mkdir ['{canary}']\n")
    assert "not plain YAML" in said(plain_yaml.read_yaml, bad) and not canary.exists()
    bad.write_text("a: 1\na: 2\n")
    assert "given twice" in said(plain_yaml.read_yaml, bad)
    bad.write_text("- 1\n")
    assert "expected a mapping" in said(plain_yaml.read_yaml, bad)


def test_numbers_without_a_dot_are_numbers() -> None:
    assert plain_yaml.parse_yaml("[1e-4, 1.5, 3, -2E+3, abc, 1e, '1e-4']", "x") == [
        1e-4,
        1.5,
        3,
        -2000.0,
        "abc",
        "1e",
        "1e-4",
    ]


def test_a_batch_that_does_not_divide_lists_what_does() -> None:
    assert recipes.accumulation(128, 2, None) == (64, 1)
    assert recipes.accumulation(128, 2, 16) == (16, 4)
    assert "[1, 2, 4, 8]" in said(recipes.accumulation, 128, 3, None)
    assert "[1, 2, 4, 8, 16, 32, 64]" in said(recipes.accumulation, 128, 2, 48)


def test_differences_name_the_values() -> None:
    assert recipes.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: '(absent)' -> 4",
    ]


def test_empty_prompt_file(tmp_path: Path) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n \n")
    assert "contains no prompts" in said(recipes.prompts_of, empty)


def test_registry_finds_by_file_name() -> None:
    assert registry.find("models", "mmdit").__name__ == "MMDiT"
    assert registry.find("objectives", "elbo").__name__ == "ELBO"


TYPED = {
    "critic": {
        "name": "conv_critic",
        "optimizer": {"name": "rmsprop", "lr": 5e-5, "clip_weights": 0.01},
        "engine": "replicated",
    },
    "teacher": {"name": "mmdit", "frozen": True, "depth": 2},
    "target": {"average_of": "model", "decay": {"name": "power", "sigma_rel": 0.05}},
}


def test_networks_are_read_as_what_they_are_and_written_as_they_were() -> None:
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", {"networks": TYPED})
    kinds = {name: type(entry).__name__ for name, entry in recipe.networks.items()}
    assert kinds == {
        "model": "Network",
        "ema": "Average",
        "critic": "Network",
        "teacher": "Frozen",
        "target": "Average",
    }
    critic = recipe.trained()["critic"]
    assert critic.optimizer is not None and critic.optimizer.name == "rmsprop" and critic.optimizer.clip_weights == 0.01
    written = recipes.dump(recipe)["networks"]
    assert {name: written[name] for name in TYPED} == TYPED, "and not a key more"
    assert recipes.recipe_from(recipes.dump(recipe), "again") == recipe


def test_an_older_word_for_a_replicated_network_is_read_and_where_it_lies_is_no_identity() -> None:
    made = {
        word: recipes.load_recipe("mmdit/tiny_openmoji", {"networks": {"model": given}})
        for word, given in {
            "new": {"engine": "replicated"},
            "old": {"sharded": False},
            "none": {},
            "default": {"sharded": True},
        }.items()
    }
    assert made["old"].networks == made["new"].networks != made["none"].networks
    assert len({recipes.recipe_hash(recipe) for recipe in made.values()}) == 1


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        (
            {"model": {"engine": "replicated", "sharded": True}},
            "sharded: true and engine: replicated contradict; keep engine",
        ),
        ({"model": {"engine": "whole"}}, "networks.model.engine: input should be one of 'sharded', 'replicated'"),
        (
            {"model": {"optimizer": {"name": "sgd", "betas": [0.9, 0.99]}}},
            "unknown key 'networks.model.optimizer.betas'",
        ),
        (
            {"model": {"optimizer": {"name": "adan"}}},
            "networks.model.optimizer.name: input should be one of 'adamw', 'adam', 'rmsprop'",
        ),
        ({"model": {"optimizer": {"name": "sgd", "nesterov": True}}}, "nesterov needs momentum"),
        (
            {"model": {"optimizer": {"clip_weights": 0}}},
            "networks.model.optimizer.clip_weights: input should be greater than 0",
        ),
        (
            {"ema": {"average_of": "model", "decay": {"name": "ramp"}}},
            "networks.ema.decay.name: input should be one of 'power'",
        ),
        ({"ema": {"average_of": "model", "decay": {"name": "power", "sigma": 1}}}, "did you mean 'sigma_rel'"),
        ({"ema": {"decay": {"name": "power"}, "warmup": True}}, "power defines its own start"),
        (
            {"other": {"depth": 3}},
            "networks.other: input should be `name:` (a family), `adapts:` or `average_of:` (a network)",
        ),
        ({"other": 3}, "networks.other: input should be a mapping; got 3"),
    ],
)
def test_entries_of_networks_that_cannot_be_are_named(networks: dict[str, Any], words: str) -> None:
    found = said(recipes.load_recipe, "mmdit/tiny_openmoji", {"networks": networks})
    assert words in found, found
