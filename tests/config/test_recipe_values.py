"""What recipes, cluster files and the command line may say: plain YAML, values of the right kind and size, bases, home directories."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.config.kinds import check_kind
from nexus_scale.contracts import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe_hashes.json"
TINY = "mmdit/tiny_openmoji"


def said(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert caught.value.code == 2
    return str(caught.value)


def test_the_identity_of_every_recipe_is_what_it_was() -> None:
    """Of 2026-11-26. A run goes on only with the recipe of this hash: one that is changed by intent gets a new line."""
    for name, known in json.loads(GOLDEN.read_text()).items():
        recipe = recipes.load_recipe(name.removesuffix(" --tiny"), tiny=name.endswith(" --tiny"))
        assert recipes.recipe_hash(recipe) == known, name


# ------------------------------------------------------------------------------------------------- YAML


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!binary aGk=", "tags are not allowed"),
        ("a: !!set {b}", "tags are not allowed"),
        ("a: !x b", "tags are not allowed"),
        ("a: !!int x", "tags are not allowed"),
        ("{[a]: 1}", "keys are text"),
        ("{{a: 1}: 1}", "keys are text"),
        ("no: 1", "the key 'no': keys are text; put it in quotes"),
        ("5: 1", "keys are text"),
        ("~: 1", "keys are text"),
        ("a: {<<: {5: 1}}", "keys are text"),
        ("[" * 3000, "48 levels deep"),
        ("- " * 3000, "48 levels deep"),
        ("{a: " * 400 + "}" * 400, "48 levels deep"),
        (LAUGHS, "unfolds to more than 20,000"),
        (MERGES, "unfolds to more than 20,000"),
        ("&a [*a]", "an alias inside its own anchor"),
        ("&a {b: {c: *a}}", "an alias inside its own anchor"),
        ("[" + "1," * 30_000 + "]", "more than 20,000 values"),
        ("#" * 300_000, "300,000 characters"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ('a: "\\0"', "the character '\\x00'"),
        ('a: "\\ud800"', "the character '\\ud800'"),
        ('a: "\\e[31m"', "the character '\\x1b'"),
        ("a: 1\n---\nb: 1", "single document"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_is_not_plain_is_refused_at_once(text: str, words: str) -> None:
    begun = time.process_time()
    assert words in said(plain_yaml.parse_yaml, text, "recipe.yaml")
    assert time.process_time() - begun < 5


def test_numbers_are_decimal_and_dates_are_text() -> None:
    text = ["1:30", "0x1F", "017", "1_000", "2026-11-26", "2026-11-26 10:00:00", "0o17", "0b1", "1e", "="]
    assert plain_yaml.parse_yaml(f"[{', '.join(text)}]", "x") == text
    assert plain_yaml.parse_yaml("[1e-4, 1.5, +3, -2E+3, 0, .5, 1., yes, off, null]", "x") == [
        1e-4, 1.5, 3, -2000.0, 0, 0.5, 1.0, True, False, None,
    ]  # fmt: skip
    assert plain_yaml.parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "x")["b"] == {"x": 1, "y": 2}


def test_values_of_a_text_that_was_read_before_are_the_readers_own() -> None:
    first = plain_yaml.parse_yaml("a: {b: [1, 2]}", "one.yaml")
    first["a"]["b"].append(3)
    assert plain_yaml.parse_yaml("a: {b: [1, 2]}", "another.yaml") == {"a": {"b": [1, 2]}}


def test_what_is_written_reads_back() -> None:
    for value in (
        "1e5",
        "1e-4",
        "0x1F",
        "no",
        "5",
        "1:30",
        "2026-11-26",
        "",
        "~",
        "- a",
        "a: b",
        "🍕",
        "1_000",
        "=",
        "<<",
        "017",
    ):
        assert plain_yaml.parse_yaml(plain_yaml.dump_yaml({"a": value}), "x") == {"a": value}
    for number in (1e-5, 0.1, 1e300, 2**62, 1e22, -3, True, None):
        assert plain_yaml.parse_yaml(plain_yaml.dump_yaml({"a": number}), "x") == {"a": number}


# ------------------------------------------------------------------------------------------------- kinds and bounds


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=.inf", "optimizer.lr: input should be a valid number; got inf (infinity and nan are no numbers here)"),
        ("optimizer.lr=1e999", "optimizer.lr: input should be a valid number; got inf (infinity and nan are no numbers here)"),
        ("optimizer.lr=true", "optimizer.lr: input should be a valid number; got true"),
        ("optimizer.lr='1'", "optimizer.lr: input should be a valid number; got '1' (numbers are plain decimals, without quotes)"),
        ("optimizer.lr=0", "optimizer.lr: input should be greater than 0"),
        ("optimizer.betas=[-1, .nan]", "optimizer.betas.1: input should be a valid number; got nan (infinity and nan are no numbers here)"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: input should be less than 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay"),
        ("optimizer.eps=.inf", "optimizer.eps"),
        ("optimizer.clip_grad_norm=.nan", "optimizer.clip_grad_norm"),
        ("optimizer.schedule={name: wsd}", "decay_steps"),
        ("optimizer.schedule.warmup_steps=1.5", "optimizer.schedule.warmup_steps: input should be a valid integer"),
        ("steps=true", "steps: input should be a valid integer; got true"),
        ("steps=1_000", "steps: input should be a valid integer; got '1_000' (numbers are plain decimals"),
        ("global_batch=yes", "global_batch: input should be a valid integer; got true"),
        ("global_batch=1000000000000", "global_batch: input should be less than or equal to"),
        ("seed=1:30", "seed: input should be a valid integer; got '1:30'"),
        ("seed=0x1F", "seed: input should be a valid integer; got '0x1F'"),
        ("name=no", "name: input should be text; got false (yes, no, on and off are truth values; put the word in quotes)"),
        ("name=5", "name: input should be text; got 5 (put it in quotes)"),
        ("networks.model.name=[a]", "networks.model.name: input should be text; got ['a']"),
        ("networks.model.name={a: b}", "networks.model.name: input should be text"),
        ("networks.model.frozen=1", "networks.model.frozen: input should be a valid boolean"),
        ("networks.ema.average_of=[model]", "networks.ema.average_of: input should be text"),
        ("networks.ema.decay=.nan", "networks.ema.decay: input should be a valid number"),
        ("networks.ema.dekay=1", "unknown key 'networks.ema.dekay'"),
        ("networks={../x: {name: mmdit}}", "networks.../x"),
        ("networks=3", "networks: input should be a mapping; got 3"),
        ("data=null", "data: input should be a mapping; got null"),
        ("data.train.sources=[{folders: [5]}]", "data.train.sources.0.folders.0: input should be text; got 5"),
        ("data.text_tokens=.inf", "data.text_tokens"),
        ("data.synthetic={fields: {x: {shape: [8.0]}}}", "fields.x.shape.0: expected a whole number without a decimal point; got 8.0"),
        ("data.synthetic={fields: {x: {shape: [10000, 10000]}}}", "a sample has 100,000,000 values; expected at most 60,000,000"),
        ("callbacks.metrics=3", "callbacks.metrics: input should be a mapping or null; got 3"),
        ("prepare=[5]", "prepare.0: input should be a mapping; got 5"),
        ("tiny=[1]", "tiny: input should be a mapping"),
    ],
)  # fmt: skip
def test_a_value_of_a_recipe_is_of_the_right_kind(override: str, words: str) -> None:
    overrides, _ = recipes.overrides_of([override])
    message = said(recipes.load_recipe, TINY, overrides)
    assert words in message and "tiny_openmoji.yaml" in message, message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("workers=true", "workers: input should be a valid integer or a list; got true"),
        ("workers=[1, 1000000000]", "at most 100,000 workers"),
        (
            "workers=[1, .inf]",
            "workers.1: input should be a valid integer; got inf (infinity and nan are no numbers here)",
        ),
        ("backoff_s=.inf", "backoff_s: input should be a valid number"),
        ("collective_timeout_s=.inf", "collective_timeout_s: input should be a valid number"),
        ("node_memory_gib=-1", "node_memory_gib: input should be greater than 0"),
        ("peak_tflops=0", "peak_tflops: input should be greater than 0"),
        ("nodes=5", "nodes 5: expected at most one machine for each worker"),
        ("zero_stage=true", "zero_stage: input should be one of 0, 1, 2, 3; got true"),
        ("standby=1", "standby: input should be a valid boolean; got 1"),
        ("paths.data=~nobody_of_that_name/x", "paths.data: the home directory of this user is not known"),
        ('paths.runs="a\\0b"', "the character '\\x00'"),
        ("paths=here", "paths: input should be a mapping; got 'here'"),
        ("name=no", "name: input should be text"),
        ("kernels.attention=true", "kernels.attention: input should be text"),
    ],
)
def test_a_value_of_a_cluster_is_of_the_right_kind(override: str, words: str) -> None:
    def load() -> None:
        _, cluster = recipes.overrides_of([f"cluster.{override}"])
        recipes.load_cluster("local_cpu", cluster)

    assert words in said(load)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("score: 5", "score: input should be a mapping; got 5"),
        (
            "score: {train: a, heldout: b, classifier_steps: true}",
            "score.classifier_steps: input should be a valid integer; got true",
        ),
        ("score: {train: a, heldout: b, guidance: .inf}", "score.guidance: input should be a valid number"),
        ("score: {train: a, heldout: 5}", "score.heldout: input should be text; got 5"),
        (
            "score: {train: a, heldout: b, classifier_steps: 1000000000000}",
            "score.classifier_steps: input should be less than",
        ),
        ("speech: {clips: a, prompt: yes}", "speech.prompt: input should be one of 'other', 'own'; got true"),
        ("", "expected a mapping of keys to values, got nothing"),
    ],
)
def test_a_value_of_a_score_settings_file_is_of_the_right_kind(text: str, words: str, tmp_path: Path) -> None:
    from nexus_scale.evaluate.scores import read_settings

    (tmp_path / "score.yaml").write_text(text)
    assert words in said(read_settings, str(tmp_path / "score.yaml"))


def test_a_tiny_block_without_data_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {TINY}\ntiny: {{data: null}}\n")
    assert "tiny block: data: input should be a mapping; got null" in said(recipes.load_recipe, str(path), tiny=True)


def test_kinds_through_unions_lists_and_mappings() -> None:
    check_kind(int | tuple[int, int], [1, 2], "x")
    check_kind(float | dict[str, Any], {"name": "a", "mean": 0.5}, "x")
    check_kind(int, 1e3, "x")
    assert said(check_kind, int | tuple[int, int], [1, True], "x") == "x.1: input should be a valid integer; got true"
    assert said(check_kind, int | None, "a", "x") == "x: input should be a valid integer or null; got 'a'"
    assert (
        said(check_kind, Any, {"a": [1, {"b": float("nan")}]}, "x")
        == "x.a.1.b: input should be a valid number; got nan (infinity and nan are no numbers here)"
    )
    assert len(said(check_kind, int, "a" * 10_000, "x")) < 200


def test_large_batches_are_divided_in_no_time() -> None:
    begun = time.process_time()
    assert "[1]" in said(recipes.accumulation, 999_999_937, 2, None)
    assert recipes.accumulation(999_999_937, 1, None) == (999_999_937, 1)
    assert time.process_time() - begun < 1


# ------------------------------------------------------------------------------------------------- bases, homes, names


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {TINY}\nname: mine\nsteps: 7\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "his.yaml").write_text("base: ../mine.yaml\nname: his\noptimizer: {lr: 0.5}\n")
    his = recipes.load_recipe(str(tmp_path / "deeper" / "his.yaml"))
    assert (his.name, his.steps, his.optimizer.lr) == ("his", 7, 0.5)
    assert his.networks == recipes.load_recipe(TINY).networks and "watchdog" in his.callbacks


def test_bases_in_a_circle_are_named(tmp_path: Path) -> None:
    for mine, other in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{mine}.yaml").write_text(f"base: {other}.yaml\nname: {mine}\n")
    message = said(recipes.load_recipe, str(tmp_path / "a.yaml"))
    assert "circle" in message and message.index("b.yaml ->") < message.index("c.yaml ->")
    (tmp_path / "d.yaml").write_text("base: [a, b]\n")
    assert "base: input should be text or null; got ['a', 'b']" in said(recipes.load_recipe, str(tmp_path / "d.yaml"))
    (tmp_path / "e.yaml").write_text("base: nowhere\n")
    assert "e.yaml: base: nowhere: no such file" in said(recipes.load_recipe, str(tmp_path / "e.yaml"))
    for i in range(20):
        (tmp_path / f"f{i}.yaml").write_text(f"base: f{i + 1}.yaml\n")
    assert "more than 16 bases" in said(recipes.load_recipe, str(tmp_path / "f0.yaml"))


def test_paths_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    overrides, _ = recipes.overrides_of(
        ["data.train.sources=[{folders: [~/latents, b]}]", "prepare=[{job: x, input: ~/a}]"]
    )
    recipe = recipes.load_recipe(TINY, overrides)
    assert recipe.data.train is not None and recipe.data.train.sources[0].folders == ["/home/ada/latents", "b"]
    assert recipe.prepare[0].options == {"input": "/home/ada/a"}
    overrides, _ = recipes.overrides_of(["data.train.sources=[{folders: [~nobody_of_that_name/a]}]"])
    assert "data.train.sources.0.folders.0: the home directory of this user is not known" in said(
        recipes.load_recipe, TINY, overrides
    )


def test_names_that_no_file_can_have_are_told() -> None:
    for name in ("a" * 5000, "a\0b", "/nowhere/at/all.yaml"):
        message = said(recipes.load_recipe, name)
        assert "no such file" in message and len(message) < 1000 and "\0" not in message
    assert len(said(recipes.overrides_of, ["a." * 5000 + "b=1"])) < 300


def test_keys_of_score_settings_may_have_their_old_names(tmp_path: Path) -> None:
    from nexus_scale.evaluate.scores import score_settings

    file = tmp_path / "old.yaml"
    file.write_text("score: {train: a, heldout: b, judge_steps: 7, judge_networks: 2, features: [judge]}")
    settings = score_settings(str(file))
    assert (settings.classifier_steps, settings.classifier_networks, settings.features) == (7, 2, ("classifier",))
