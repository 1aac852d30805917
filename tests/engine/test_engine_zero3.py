"""ZeRO-3 with two real gloo ranks: resumes to the bit, on other numbers of ranks, averages, bad gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nexus_scale.contracts import Engine, UserError
from nexus_scale.engine import compiler, distributed
from nexus_scale.engine.checkpoint import newest
from nexus_scale.kernels import linear
from nexus_scale.kernels.choice import choose
from tests.distributed import run_ranks
from tests.engine_networks import POISONS, batch, build, copies, differences, differing, load, save, train

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, gathered per block": {"whole_numel": 0},
    "bf16": {"precision": "bf16"},
    "bf16, gathered per block": {"precision": "bf16", "whole_numel": 0},
    "float32, offloaded": {"offload": "cpu"},
    "bf16, offloaded, gathered per block": {"precision": "bf16", "offload": "cpu", "whole_numel": 0},
}


def _resume(root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """4 steps, a checkpoint, 3 more; another engine goes on from the checkpoint and must come to the same bits."""
    found: dict[str, Any] = {}
    engine = build("deepspeed", engine_world(), **settings)
    train(engine, 0, 4)
    save(engine, root, 4)
    at_save = copies(engine)
    train(engine, 4, 7)
    unbroken = copies(engine)
    found["moved"] = bool(differing(at_save, unbroken))

    other = build("deepspeed", engine_world(), **{**settings, "seed": 99})
    found["seeds_differ"] = bool(differing(at_save, copies(other)))
    load(other, root)
    found["after_load"] = differing(at_save, copies(other))
    train(other, 4, 7)
    found["after_steps"] = differing(unbroken, copies(other))

    # The average computes, and the trained weights come back to the bit.
    x, _ = batch(100)
    model = other.nets["model"]
    with other.weights("model"):
        trained = model(x)
        doubled = model.twice(x)
    with other.weights("ema"):
        averaged = model(x)
        assert not averaged.requires_grad
    with other.weights("model"):
        again = model(x)
    found["restored"] = torch.equal(trained, again) and not differing(unbroken, copies(other))
    found["average_differs"] = not torch.equal(trained, averaged)
    found["float32_out"] = trained.dtype == averaged.dtype == torch.float32
    found["method"] = bool(torch.isfinite(doubled).all()) and not torch.equal(doubled, trained)
    found["whole"] = {name: float(value.double().sum()) for name, value in other.parameters("ema")}

    found["poisons"] = {poison: _poisoned(other, poison) for poison in POISONS}
    return found


def _poisoned(engine: Engine, poison: str) -> dict[str, Any]:
    """What is not finite on one rank leaves out the update on all."""
    before = copies(engine)
    said = train(engine, 7, 8, poison=poison if engine.rank == 1 else "")
    after = copies(engine)
    on = train(engine, 8, 9)[0]
    later = copies(engine)
    return {
        "skipped": said[0]["skipped"],
        "weights_after_skip": [n for n in differing(before, after) if not n.endswith((".ema", ".buffer"))],
        "steps_on": on["skipped"] == 0.0 and bool(differing(after, later)),
        "optimizer_steps": [int(c["model.optimizer_steps"]) for c in (before, later)] if engine.rank == 0 else [0, 1],
        "lr": on["lr"],
    }


def engine_world() -> int:
    return torch.distributed.get_world_size()


def zero3_worker(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    choose({"linear": "onednn"}, "cpu")
    linear.SMALLEST = 0  # also under ZeRO-3, where weights come and go; the one process computes by torch's products
    root = Path(folder)
    found: dict[str, Any] = {
        name: _resume(root / name.replace(" ", "_"), settings) for name, settings in VARIANTS.items()
    }

    # What one process wrote goes on here; with accumulation, and gathered per block or whole, it is the same curve.
    for name, settings, accumulation in (
        ("whole", {}, 1),
        ("blocks", {"whole_numel": 0, "activation_checkpointing": True}, 2),
        ("offloaded", {"offload": "cpu"}, 1),
    ):
        engine = build("deepspeed", world_size, accumulation=accumulation, **settings)
        load(engine, root / "local")
        train(engine, 4, 7, accumulation)
        save(engine, root / f"from_local_{name}", 7)

    # Blocks that are compiled give the same curve, and the names of their parameters stay. The backend traces and differentiates as
    # every other; what it leaves out is the making of machine code, which wants a C++ compiler and half a minute.
    found["compiled"] = {}
    for name, settings in (("whole", {}), ("blocks", {"whole_numel": 0})):
        before = compiler.work()
        with mock.patch.object(compiler, "BACKEND", "aot_eager"):
            engine = build("deepspeed", world_size, compile=True, **settings)
        load(engine, root / "local")
        train(engine, 4, 7)
        done = compiler.work().since(before)
        found["compiled"][name] = done.graphs, done.breaks
        save(engine, root / f"from_local_compiled_{name}", 7)

    # DeepSpeed would put a map of its own in its place, whose compiled gradient torch 2.11 takes for zero.
    found["linear"] = torch.nn.functional.linear is torch._C._nn.linear

    # Construction in shards gives the values of construction whole.
    whole, sharded = build("deepspeed", world_size), build("deepspeed", world_size, partition_at_birth=1)
    found["born"] = [n for n in differing(copies(whole), copies(sharded)) if not n.startswith("teacher")]
    # Ranks agree on what verifies, though each looks at its own share of the files; and on small values.
    token = distributed.shared_token()
    for step in (1, 2):
        save(whole, root / "damaged", step, token)
        distributed.barrier()
    if rank == 0:
        path = root / "damaged" / "step_00000002" / "rank00001-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    distributed.barrier()
    found["newest"] = load(whole, root / "damaged").step
    found["token"] = token
    found["mean"] = float(distributed.mean_over_ranks({"x": torch.tensor(float(rank))})["x"])
    gathered = distributed.gather(torch.tensor([rank, 10 * rank]))
    found["gathered"] = None if gathered is None else gathered.tolist()

    replicated = build("replicated", world_size)
    found["replicated"] = {"poisons": {poison: _poisoned(replicated, poison) for poison in POISONS}}
    load(replicated, root / "local")
    train(replicated, 4, 7)
    save(replicated, root / "replicated", 7)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One pair of processes for all tests here: starting them costs more than what they do."""
    root = tmp_path_factory.mktemp("zero3")
    engine = build("local")
    train(engine, 0, 4)
    save(engine, root / "local", 4)
    train(engine, 4, 7)
    save(engine, root / "local_7", 7)
    return root, run_ranks(2, zero3_worker, str(root), timeout=420)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_on_two_ranks_is_exact_to_the_bit(ranks: tuple[Path, list[dict[str, Any]]], variant: str) -> None:
    for found in ranks[1]:
        assert found[variant]["moved"]
        assert found[variant]["seeds_differ"]
        assert found[variant]["after_load"] == []
        assert found[variant]["after_steps"] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_averaged_weights_compute_and_trained_ones_come_back(
    ranks: tuple[Path, list[dict[str, Any]]], variant: str
) -> None:
    for found in ranks[1]:
        assert found[variant]["restored"]
        assert found[variant]["average_differs"]
        assert found[variant]["float32_out"]
        assert found[variant]["method"]
    assert ranks[1][0][variant]["whole"] == ranks[1][1][variant]["whole"]
    assert len(ranks[1][0][variant]["whole"]) == 10


@pytest.mark.parametrize("variant", [*VARIANTS, "replicated"])
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_on_one_rank_skips_the_update_on_all(
    ranks: tuple[Path, list[dict[str, Any]]], variant: str, poison: str
) -> None:
    for found in ranks[1]:
        result = found[variant]["poisons"][poison]
        assert result["skipped"] == 1.0
        assert result["weights_after_skip"] == []
        assert result["steps_on"]
        before, after = result["optimizer_steps"]
        assert after == before + 1, "the step that was left out is none of the optimizer's"
        assert result["lr"] == ranks[1][0]["float32"]["poisons"]["loss"]["lr"], "the schedule goes on with the step"


CURVES = [
    "from_local_whole",
    "from_local_blocks",
    "from_local_offloaded",
    "from_local_compiled_whole",
    "from_local_compiled_blocks",
    "replicated",
]


@pytest.mark.parametrize("folder", CURVES)
def test_one_process_to_two_ranks_is_the_same_curve(ranks: tuple[Path, list[dict[str, Any]]], folder: str) -> None:
    alone, together = newest(ranks[0] / "local_7"), newest(ranks[0] / folder)
    assert alone is not None
    assert together is not None
    found = differences(alone, together)
    if folder == "from_local_blocks":  # a running estimate depends on the micro-batch by nature
        del found["model/seen.buffer"], found["ema/seen.buffer"]
    assert {name: value for name, value in found.items() if value > 1e-6} == {}
    assert int(together.tensor("model.optimizer_steps")) == 7


def test_two_ranks_to_one_process_is_the_same_curve(ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    engine = build("local")
    load(engine, ranks[0] / "float32")
    train(engine, 4, 7)
    save(engine, tmp_path / "one", 7)
    reference = newest(ranks[0] / "local_7")
    resumed = newest(tmp_path / "one")
    assert reference is not None
    assert resumed is not None
    assert {name: value for name, value in differences(reference, resumed).items() if value > 1e-6} == {}


def test_networks_born_in_shards_have_the_same_weights(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["born"] for found in ranks[1]] == [[], []]


def test_ranks_agree_on_the_newest_checkpoint_and_on_small_values(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["newest"] for found in ranks[1]] == [1, 1]
    assert (ranks[0] / "damaged" / "step_00000002.corrupt-0").is_dir()
    assert ranks[1][0]["token"] == ranks[1][1]["token"]
    assert [found["mean"] for found in ranks[1]] == [0.5, 0.5]
    assert [found["gathered"] for found in ranks[1]] == [[0, 0, 1, 10], None]


def test_compiled_blocks_were_compiled(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in ranks[1]:
        graphs, breaks = found["compiled"]["whole"]
        assert graphs > 0 and not breaks
        assert found["compiled"]["blocks"] == [0, 0], "gathering lies around what is compiled, which is the same code"


def test_torchs_linear_map_stays_torchs(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["linear"] for found in ranks[1]] == [True, True]


def test_other_stages_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"zero_stage 2.*set zero_stage to 3"):
        build("deepspeed", zero_stage=2)
