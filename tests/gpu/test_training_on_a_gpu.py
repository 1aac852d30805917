"""Every family on a GPU, under every engine: it learns what the CPU learns, resumes to the bit, draws, decodes, and waits for nothing.

What is selected of an engine trains in one process, one recipe after another; several calls with some names each may run side by side. The
same lines run on a CPU for one family, so that they are known to work.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.engine import compiler
from tests import gpu_training
from tests.config.test_every_recipe import families
from tests.distributed import run_ranks
from tests.engine.test_nothing_waits import RECIPES
from tests.gpu_training import cluster_on, trained_on
from tests.training_ranks import assert_same_end, rows

LOSS, NORM = 0.02, 0.1
"""Losses and norms of gradients in bf16 may differ from float32's by such parts. On a CPU they differ by 0.6 % and 2.3 % at most."""

EXACT = 2e-3
"""Part by which they may differ in float32."""

DIFFERENCES = ("consistency/cd", "cyclegan", "gan", "pix2pix", "r3gan", "vae/sd", "wgan")
"""Recipes, by how their names begin, whose losses are differences of nearly equal answers, or weighted by them: in bf16 they are off by
what the answers are rounded by. These are compared in float32."""

COMPILED = (
    "cogvideox/tiny_emoji", "consistency/tiny_fashion_mnist", "cyclegan/tiny_emoji", "ddpm/tiny_fashion_mnist", "flux/tiny_openmoji",
    "gan/tiny_fashion_mnist", "lcm/tiny_fashion_mnist", "lora/tiny_line_art", "masked/tiny_speech", "mean_flow/tiny_fashion_mnist",
    "mmdit/tiny_openmoji", "musicgen/small", "pixart/512", "stable_diffusion/tiny_openmoji", "vq_vae/tiny_openmoji", "wgan_gp/cifar10",
)  # fmt: skip
"""Recipes whose blocks, and what goes on around them, differ for the compiler."""

ENGINES = {
    "local": sorted({*RECIPES, "r3gan/cifar10"}),
    "deepspeed": [*families(), "waits"],
    "local+compile": list(COMPILED),
    "local+compile+graphs": ["mmdit/tiny_openmoji"],
    "local+float32": [name for name in sorted({*families(), *RECIPES}) if name.startswith(DIFFERENCES)],
    "deepspeed+compile": ["dit/tiny_cifar10", "gradients"],
}
"""What each trains."""


def check(name: str, found: dict[str, Any], engine: str) -> None:
    assert "error" not in found, found["error"]
    exactly = engine.endswith("float32")
    loose = name.startswith(DIFFERENCES) and not exactly
    assert len(found["losses"]) == 3
    for step, (got, expected) in enumerate(zip(found["losses"], found["expected"], strict=True), start=1):
        assert got.keys() == expected.keys() and len(got) > 1
        for key, value in expected.items():
            part = EXACT if exactly else NORM if key.endswith("grad_norm") else LOSS
            assert math.isfinite(got[key])
            assert loose or got[key] == pytest.approx(value, rel=part, abs=1e-6), f"{name}: {key} of step {step}"
    assert found["changed"] == [], f"{name}: resumed, with other bits"
    assert any(file.endswith(".png") for file in found["drawn"]), found["drawn"]


@pytest.fixture(scope="module")
def on_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """What an engine's process found, by engine and name; each engine's runs once, with the names that this call of pytest selects."""
    items = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {(params.get("engine"), params.get("name")) for params in items}
    done: dict[str, dict[str, Any]] = {}

    def found(engine: str, name: str) -> Any:
        if engine not in done:
            names = [one for one in ENGINES[engine] if (engine, one) in asked]
            done[engine] = trained_on("cuda", engine, tmp_path_factory.mktemp("gpu"), names)
        return done[engine][name]

    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine, names in ENGINES.items() for name in names if "/" in name]
)
def test_a_gpu_learns_what_the_cpu_learns_resumes_to_the_bit_and_draws(
    on_gpu: Callable[[str, str], Any], engine: str, name: str
) -> None:
    check(name, on_gpu(engine, name), engine)


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "name"), [("deepspeed", "waits")])
def test_a_step_of_zero3_does_not_wait_for_the_gpu(on_gpu: Callable[[str, str], Any], engine: str, name: str) -> None:
    """Of the local engine tests/engine/test_nothing_waits.py says it."""
    found = on_gpu(engine, name)
    assert "error" not in found, found["error"]
    assert len(found) == 4
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "name"), [("deepspeed+compile", "gradients")])
def test_compiled_blocks_give_every_parameter_its_gradient(
    on_gpu: Callable[[str, str], Any], engine: str, name: str
) -> None:
    found = on_gpu(engine, name)
    assert "error" not in found, found["error"]
    assert len(found) == 4
    assert {name: apart for name, apart in found.items() if apart} == {}


def _on_a_cpu(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    gpu_training.prepare_engines()
    compiler.BACKEND = "aot_eager"
    name = "dit/tiny_cifar10"
    return {
        "gradients": gpu_training.compiled_gradients("cpu", ["dit_zero3"]),
        name: gpu_training.learned(name, "cpu", "deepspeed", Path(folder)),
        "waits": gpu_training.waits("cpu", "local", ["valle_zero3"]),
    }


def test_the_lines_of_the_tests_on_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _on_a_cpu, str(tmp_path))
    assert found.pop("waits") == {"valle_zero3": ""}
    assert found.pop("gradients") == {"dit_zero3": {}}
    ((name, learned),) = found.items()
    check(name, learned, "deepspeed")
    wrong = [{key: value * 1.2 for key, value in row.items()} for row in learned["expected"]]
    with pytest.raises(AssertionError, match="of step 1"):
        check(name, {**learned, "expected": wrong}, "deepspeed")


def under_ray(root: Path, run: str, cluster: dict[str, Any], fault: str = "") -> None:
    """Eight steps of `nexus train` under a Ray of its own."""
    write_yaml(root / "one.yaml", {"name": "one", **cluster})
    command = [
        sys.executable,
        "-m",
        "nexus_scale.cli",
        "train",
        "mmdit/tiny_openmoji",
        "--tiny",
        "--cluster",
        "one.yaml",
    ]
    command += [
        f"run={run}",
        "steps=8",
        "callbacks.checkpoint.every=2",
        "callbacks.metrics.every=1",
        "callbacks.samples=null",
    ]
    roots = {"NEXUS_RUNS_ROOT": str(root / "runs"), "NEXUS_DATA_ROOT": str(root / "data")}
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **roots, "PYTHONPATH": path, **({"NEXUS_FAULT": fault} if fault else {})}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def killed_and_whole(root: Path, device: str) -> None:
    """A worker killed in its fifth step is started again, and the run ends with the bits of one that nothing befell."""
    cluster = cluster_on(device, "deepspeed")
    under_ray(root, "whole", cluster)
    struck = root / "struck"
    under_ray(root, "killed", cluster, fault=f"step:5,phase:backward,action:SIGKILL,once:{struck}")
    assert struck.exists()
    killed = root / "runs" / "killed"
    assert_same_end(root / "runs" / "whole", killed)
    assert [row["step"] for row in rows(killed)] == list(range(1, 9))


@pytest.mark.gpu
@pytest.mark.ray
def test_a_worker_with_a_gpu_is_killed_under_ray_and_the_run_has_the_same_bits(tmp_path: Path) -> None:
    killed_and_whole(tmp_path, "cuda")
