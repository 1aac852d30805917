"""Mutated command lines of every command: a message and its code, or what was asked for, in bounded time and memory.

Nothing is trained: `train` is always a dry run, and what `certify` and `bench` are given holds one thing that must be refused.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import typer

from nexus_scale import cli, main_job
from nexus_scale.cli.runs import runs_app
from nexus_scale.cli.study import study_app
from nexus_scale.contracts import UserError
from nexus_scale.run.runs import prepare_run
from tests.fuzz import fuzz, nexus

RECIPE = "vae/tiny_openmoji"
NUMBERS = (
    "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e9", "1e400", "9" * 400, "0x1F", "1:30", "1_000", "", " ", "٣", "two", "true", "None",
)  # fmt: skip
TEXTS = (
    "", " ", "-", "--", "---", "=", "a=b=c", ".", "..", "../..", "/", "/dev/zero", "/dev/full", "/etc/passwd", "~nobody_of_that_name", "~",
    "a" * 300, "a" * 5000, "é🍕", "\udcff", "\x1b[31mred", "a\nb", "%s%n", "{0}", "$HOME", "*", "null", "no", "5", "[]", "{}", "here/run",
    "run", "nowhere", "cluster", "configs", "s3://bucket/run", "-h", "--version", "--help", RECIPE, "quickstart", "vae",
)  # fmt: skip
KEYS = (
    "steps", "seed", "global_batch", "optimizer.lr", "optimizer.betas", "networks.model.depth", "networks.model.name", "networks.ema",
    "callbacks.validate", "data.synthetic.samples", "cluster.workers", "cluster.nodes", "cluster.paths.data", "cluster", "cluster.", "run",
    "run.x", "name", "sample.steps", "", ".", "a..b", "tiny.steps", "prepare", "base", "optimizer", "callbacks.metrics.wandb.api_key",
    "x." * 400 + "y",
)  # fmt: skip
VALUES = (
    *NUMBERS,
    *TEXTS,
    "[",
    "{a: b}",
    "!!set {a}",
    "&a [*a]",
    "[" * 200,
    "'",
    '"\\0"',
    "1e-4",
    "[0.9, 0.99]",
    ".nan",
    "yes",
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "train": ("--cluster", "--run", "--tiny", "--allow-change", "--dry-run", "--debug=no", "--no-tiny"),
    "finetune": (
        "--trigger", "--name", "--full", "--dora", "--rank", "--steps", "--rate", "--batch", "--resolution", "--mirror", "--fps", "--seed",
        "--captioner", "--keep", "--keep-images", "--keep-weight", "--validate", "--output", "--cluster", "--dry-run",
    ),
    "plan": ("--cluster", "--tiny", "--search", "--price", "--node-hours", "--output", "--json"),
    "sample": (
        "--prompt", "--prompts", "--negative-prompt", "--label", "--per-prompt", "--size", "--steps", "--guidance", "--true-guidance",
        "--seed",
        "--output", "--voice", "--voice-text", "--speaker",
    ),
    "samplers": ("--json",),
    "score": ("--settings",),
    "report": (),
    "export": ("--output", "--format"),
    "runs list": ("--root", "--json"),
    "runs follow": ("--root", "--lines"),
    "runs stop": ("--root", "--deadline"),
    "runs delete": ("--root",),
    "study new": (
        "--output", "--prompts", "--question", "--judgements", "--per-rater", "--check", "--check-every", "--check-passed", "--count",
        "--size", "--length", "--seed", "--no-ties",
    ),
    "study serve": ("--host", "--port", "--token-file", "--name"),
    "study report": ("--json",),
    "board": ("--root", "--host", "--port", "--token-file", "--name"),
    "doctor": (),
    "certify": ("--cluster", "--kills", "--workers", "--steps", "--every", "--seed", "--tiny", "--leave-out", "--output", "--json"),
    "bench": ("--json", "--rounds", "--minutes", "--compiled", "--tiny", "--output"),
}  # fmt: skip
REFUSED: dict[str, tuple[tuple[str, ...], ...]] = {
    "certify": (
        ("--kills", "-1"),
        ("--every", "0"),
        ("--workers", "2,x"),
        ("--seed", "-1"),
        ("--leave-out", "all"),
        ("steps=many",),
    ),
    "bench": (("--rounds", "0"), ("--minutes", "nan"), ("--minutes", "-1"), ("--rounds", "many"), ("--seed", "1")),
    "board": (("--port", "-1"), ("--host", ""), ("--nowhere",), ("--root", "/proc/self/status"), ("--help",)),
    "doctor": (("--nowhere",), ("--json", "more"), ("--help",)),
}
"""What keeps these commands from beginning."""


def command_line(rng: random.Random, folder: Path) -> Sequence[str]:
    name = rng.choice(list(OPTIONS))
    arguments = list(name.split()) if rng.random() > 0.03 else [rng.choice(TEXTS)]
    if name.startswith("runs") or name in ("sample", "score", "report", "export"):
        ready = folder.parent / "ready"
        if rng.random() < 0.6:
            shutil.copytree(ready, folder / "runs" / "run")
        if name != "runs list" and rng.random() < 0.9:
            arguments.append("run" if rng.random() < 0.5 else rng.choice(TEXTS))
    elif name == "bench":
        arguments.append(rng.choice(("storm", "step", "model", rng.choice(TEXTS))))
    elif name != "doctor":
        arguments.append(RECIPE if rng.random() < 0.7 else rng.choice(TEXTS))
        arguments += [
            f"{rng.choice(KEYS)}{rng.choice(('=', '=', '=', ''))}{rng.choice(VALUES)}" for _ in range(rng.randrange(4))
        ]
    for _ in range(rng.randrange(4)):
        option = rng.choice(OPTIONS[name] or ("--nothing",))
        arguments += [option, rng.choice(NUMBERS if rng.random() < 0.5 else TEXTS)]
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(TEXTS))
    if name == "train":
        arguments += ["--dry-run", *(["--tiny"] if rng.random() < 0.8 else [])]
    if name in REFUSED:
        arguments += rng.choice(REFUSED[name])
    return arguments


def test_fuzz_commands(tmp_path: Path) -> None:
    roots = [f"cluster.paths.runs={tmp_path}", f"cluster.paths.data={tmp_path / 'data'}"]
    target = main_job.resolve(RECIPE, [*roots, "cluster.workers=0", "run=ready"], tiny=True)
    prepare_run(target.place.run, target.recipe, target.cluster)
    fuzz("command", command_line, tmp_path)


# ------------------------------------------------------------------------------------------------- what went wrong once


def options() -> list[tuple[str, Any, Any]]:
    """Command and name, type, and declaration of each option of every command."""
    found = []
    for app in (cli.app, runs_app, study_app):
        for command in app.registered_commands:
            assert command.callback is not None
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                if get_origin(hint) is Annotated:
                    kind, declared = get_args(hint)
                    found.append((f"{command.callback.__name__} --{name}", kind, declared))
    return found


def test_every_number_of_a_command_line_has_bounds() -> None:
    numbers = [(name, kind, declared) for name, kind, declared in options() if {int, float} & {kind, *get_args(kind)}]
    assert len(numbers) > 10
    for name, kind, declared in numbers:
        assert declared.min is not None and declared.max is not None and math.isfinite(declared.max), name
        if float in (kind, *get_args(kind)):
            with pytest.raises(typer.BadParameter):
                declared.callback(math.nan)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "storm", "--minutes", "-1"], "Invalid value for '--minutes'"),
        (["bench", "storm", "--minutes", "nan"], "Invalid value for '--minutes'"),
        (["bench", "step", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["bench", "stom"], "did you mean 'storm'"),
        (["certify", RECIPE, "--workers", "1,1000000000"], "expected numbers, like 2,1,4"),
        (["train", RECIPE, "--dry-run", "run=a", "--run", "b"], "the run has 2 names: 'b', 'a'"),
        (["train", RECIPE, "--dry-run", "run.x=a"], "unknown key 'run'"),
        (["train", RECIPE, "--dry-run", "cluster=local_cpu"], "unknown key 'cluster'"),
        (["train", RECIPE, "--dry-run", "optimizer.lr=1", "optimizer={}"], "is given both a value and keys of its own"),
        (["train", RECIPE, "--dry-run", "seed=1:30"], "seed: input should be a valid integer; got '1:30'"),
        (["train", RECIPE, "--dry-run", "seed=0x1F"], "seed: input should be a valid integer; got '0x1F'"),
        (["sample", "nowhere", "--guidance", "nan"], "Invalid value for '--guidance'"),
        (["runs", "stop", "nowhere", "--deadline", "inf"], "Invalid value for '--deadline'"),
        (["brew"], "No such command 'brew'"),
        (["train", RECIPE, "--brew"], "No such option"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_is_told(
    arguments: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_RUNS_ROOT", str(tmp_path / "runs"))
    assert nexus(*arguments) == 2
    assert words in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert not os.listdir(tmp_path)


def test_a_run_is_named_by_text(tmp_path: Path) -> None:
    roots = [f"cluster.paths.runs={tmp_path}", "cluster.workers=0"]
    for name in ("no", "5", "2026-11-26", "1e5"):
        assert main_job.resolve(RECIPE, [*roots, f"run={name}"], tiny=True).place.run.path.name == name
    assert main_job.resolve(RECIPE, [*roots, "run=a"], run="a", tiny=True).place.run.path.name == "a"


def test_a_benchmark_without_its_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from nexus_scale import bench

    found = importlib.util.find_spec
    for name, peer in bench.PEERS.items():
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda wanted, peer=peer: None if wanted == peer else found(wanted)
        )
        with pytest.raises(UserError, match=rf"bench {name}: compares with {peer}.*nexus-scale\[bench\]"):
            bench.measure(name)
