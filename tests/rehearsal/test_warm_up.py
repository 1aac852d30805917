"""Compiled blocks: every family trains without a graph break, and after the warm-up without compiling anything more.

The backend here is torch's `eager`, which runs each graph as dynamo traced it: what makes a graph break or another graph be compiled is
decided before a backend sees it. The slow test at the end runs Inductor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine import compiler
from nexus_scale.generate.trained import make_draw
from nexus_scale.orchestration.compiled import keep_graphs
from nexus_scale.rehearsal.warm_up import warm_up
from nexus_scale.run import doctor
from nexus_scale.train import Place, train
from tests.config.test_every_recipe import CALLBACKS, assert_same_bits, families, tensors, without_the_last
from tests.distributed import run_ranks


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def run_once(name: str, root: Path, *, compiled: bool = True, workers: int = 0, **sections: Any) -> dict[str, Any]:
    """Trains a recipe's tiny form, draws and validates; what environment.json says of compilation."""
    recipe = recipes.load_recipe(name, {"callbacks": CALLBACKS, **sections}, tiny=True)
    cluster = recipes.cluster_from({"workers": workers, "threads_per_worker": 1, "compile": compiled}, "test")
    train(recipe, cluster, Place(RunFolder(root), root / "data", root.parent), make_draw)
    said: dict[str, Any] = json.loads((root / "environment.json").read_text()).get("compile", {})
    return said


def losses(root: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (root / "metrics.jsonl").read_text().splitlines()]


OWN_FORM = ("cogvideox", "consistency", "ddpm", "dit", "flux", "lcm", "mean_flow", "mmdit", "pixart")
"""Families whose blocks have hand-written gradients for a CPU, which stand aside for the compiler: the sums' order is another."""


def compiled_apart() -> list[str]:
    """One family of those that train the same networks by the same objective: what is compiled does not know its settings."""
    found: dict[str, str] = {}
    for name in families():
        recipe = recipes.load_recipe(name, tiny=True)
        networks = sorted((role, network.name) for role, network in recipe.built().items())
        found.setdefault(repr((networks, recipe.objective.name)), name)
    return list(found.values())


@pytest.mark.parametrize("name", compiled_apart())
def test_every_family_trains_in_the_graphs_of_the_warm_up(
    name: str, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    said = run_once(name, tmp_path / "compiled")
    assert said["graphs"] and not said["graph_breaks"], said
    assert counters["stats"]["unique_graphs"] == said["graphs"], "compiled again after the warm-up"
    assert not counters["graph_break"]
    plain = whole_run(name)
    if name.startswith(OWN_FORM):
        assert losses(tmp_path / "compiled") == pytest.approx(losses(plain), rel=1e-4)
    else:  # and the warm-up leaves no trace: weights, moments, averages, buffers
        assert_same_bits(tensors(tmp_path / "compiled"), tensors(plain))


def test_each_bucket_is_compiled_once(tmp_path: Path) -> None:
    fields = {"codes": {"shape": [10, 4], "dtype": "int64", "high": 16, "lengths": True, "bounds": [4, 10]}}
    data = {"synthetic": {"samples": 16, "fields": fields}}
    said = run_once("valle/overfit_speech", tmp_path / "run", data=data, steps=8)
    # two networks, each in training and in evaluation
    assert (said["sizes"], said["graphs"]) == (2, 2 * 4) and counters["stats"]["unique_graphs"] == said["graphs"]


def test_a_compiled_run_resumes_to_the_bit(tmp_path: Path) -> None:
    run_once("dit/tiny_cifar10", tmp_path / "whole")
    without_the_last(tmp_path / "whole", tmp_path / "resumed")
    run_once("dit/tiny_cifar10", tmp_path / "resumed")
    assert_same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed"))


def test_what_the_compiler_lacks_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"(?s)'no-such-compiler' is not here.*cluster\.compile=false") as refused:
        compiler.tools("cpu")
    assert refused.value.code == 4
    (finding,) = doctor.compilation()
    assert finding.what == "compile" and "no-such-compiler" in finding.detail


def test_a_compiler_that_fails_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(compiler, "BACKEND", fails)
    with pytest.raises(UserError, match=r"(?s)no such operation.*cluster\.compile=false") as refused:
        run_once("dit/tiny_cifar10", tmp_path / "run")
    assert refused.value.code == 4


# ------------------------------------------------------------------------------------------------ the cache


def test_compiled_graphs_are_kept_in_the_root_of_runs_for_this_user_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment: dict[str, str] = {}
    folder = keep_graphs(tmp_path / "runs", tmp_path / "here", environment)
    assert folder.is_relative_to(tmp_path / "runs" / ".compiled") and not list(folder.iterdir())
    assert environment == {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert keep_graphs(tmp_path / "other", tmp_path / "here", {"TORCHINDUCTOR_CACHE_DIR": "/mine"}) == Path("/mine")

    # Where it cannot be there, or somebody else could have put something there, the machine's own folder serves.
    folder.parent.rename(tmp_path / "elsewhere")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "runs", tmp_path / "file"):
        caplog.clear()
        assert keep_graphs(root, tmp_path / "here", {}).is_relative_to(tmp_path / "here")
        assert "cannot be kept in" in caplog.text
    assert keep_graphs(tmp_path / "file", tmp_path / "file", {}) == Path(default_cache_dir()), "no reason to fail a run"


RESTART = """
import json, sys
from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import dump
from nexus_scale.orchestration.worker import work
from tests.config.test_every_recipe import CALLBACKS

root, run = sys.argv[1:]
recipe = recipes.load_recipe("dit/tiny_cifar10", {"callbacks": CALLBACKS}, tiny=True)
cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1, "compile": True}, "test")
config = {"recipe": dump(recipe), "cluster": dump(cluster), "run": f"{root}/{run}", "data_root": root, "runs_root": root}
work(config)
print(open(f"{root}/{run}/environment.json").read())
"""


@pytest.mark.slow
def test_a_restart_finds_its_graphs_and_comes_to_the_same_bits(
    tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    """With Inductor: a minute for the first start."""

    def start(run: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", RESTART, str(tmp_path), run], capture_output=True, text=True, check=True
        )
        said: dict[str, Any] = json.loads(done.stdout[done.stdout.index("\n{") :])["compile"]
        return said

    first = start("whole")
    assert first["graphs"] == 2 and first["compiled"] and not first["from_cache"]
    without_the_last(tmp_path / "whole", tmp_path / "resumed")
    again = start("resumed")
    assert again["graphs"] == 2 and again["from_cache"] == first["compiled"] and not again["compiled"]
    assert_same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed"))
    assert losses(tmp_path / "whole") == pytest.approx(losses(whole_run("dit/tiny_cifar10")), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dit/tiny_cifar10", "flux/tiny_openmoji"])
def test_a_gpu_trains_in_the_graphs_of_the_warm_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Inductor, in bf16, recomputed: half a minute each."""
    monkeypatch.setattr(compiler, "BACKEND", "inductor")
    recipe = recipes.load_recipe(name, {"callbacks": CALLBACKS}, tiny=True)
    settings = {
        "workers": 0,
        "gpus_per_worker": 1,
        "precision": "bf16",
        "activation_checkpointing": True,
        "compile": True,
    }
    place = Place(RunFolder(tmp_path / "run"), tmp_path / "data", tmp_path)
    before: list[int] = []  # graphs of the trials of kernels

    def counted(*arguments: Any) -> Any:
        before.append(compiler.graphs())
        return warm_up(*arguments)

    monkeypatch.setattr("nexus_scale.train.warm_up", counted)
    train(recipe, recipes.cluster_from(settings, "test"), place, make_draw)
    said = json.loads((tmp_path / "run" / "environment.json").read_text())["compile"]
    assert said["graphs"] and not said["graph_breaks"], said
    assert counters["stats"]["unique_graphs"] == before[0] + said["graphs"], "compiled again after the warm-up"


def worker(rank: int, world_size: int, name: str, root: str) -> dict[str, int]:
    compiler.BACKEND = "eager"
    said = run_once(name, Path(root), workers=world_size)
    return {"breaks": said["graph_breaks"], "more": counters["stats"]["unique_graphs"] - said["graphs"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit/tiny_cifar10", "gan/tiny_fashion_mnist"])
def test_two_workers_train_in_the_graphs_of_the_warm_up(name: str, tmp_path: Path) -> None:
    said = run_ranks(2, worker, name, str(tmp_path / "whole"), timeout=600)
    assert said == [{"breaks": 0, "more": 0}] * 2
    without_the_last(tmp_path / "whole", tmp_path / "resumed")
    run_ranks(2, worker, name, str(tmp_path / "resumed"), timeout=600)
    assert_same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed"))
