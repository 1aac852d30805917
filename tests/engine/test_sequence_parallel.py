"""A sequence shared among ranks: the network's outputs and gradients, and whole trainings, are those of ranks that share none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nexus_scale.config import recipe as recipes
from nexus_scale.config.schema import AdamW
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.checkpoint import newest
from nexus_scale.engine.distributed import neighbours
from nexus_scale.main_job import resolve
from nexus_scale.models.diffusion.cogvideox import CogVideoX
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.planner.plan import plan
from nexus_scale.train import Place, train
from tests.distributed import run_ranks
from tests.training_ranks import rows

ARGS: dict[str, Any] = {
    "latent_channels": 2,
    "latent_frames": 3,
    "latent_height": 4,
    "latent_width": 6,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
    "text_dim": 8,
    "time_dim": 16,
}
KINDS = ("plain", "lengths", "odd")


def problem(
    kind: str, positions: str
) -> tuple[CogVideoX, torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """A network in float64 and its inputs. `lengths`: clips and texts of many lengths; `odd`: 5 texts and 9 places for 2 or 4 ranks."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    odd = {"latent_frames": 3, "latent_height": 2, "latent_width": 6} if kind == "odd" else {}
    net = CogVideoX(**(ARGS | odd), positions=positions)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * (0.1 if p.dim() == 1 else p[0].numel() ** -0.5))
    x = torch.randn(3, 2, 3, net.latent_height, 6)
    cond = {"text": torch.randn(3, 5 if kind == "odd" else 8, 8)}
    if kind == "lengths":
        cond["text_mask"] = torch.arange(8) < torch.tensor([[8], [1], [5]])
        cond["frame_mask"] = torch.arange(3) < torch.tensor([[3], [1], [2]])
    t, direction = torch.tensor([0.1, 0.5, 1.0]), torch.randn(x.shape)
    torch.set_default_dtype(torch.float32)
    return net, x, t, cond, direction


def results(
    net: CogVideoX, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], direction: torch.Tensor
) -> list[torch.Tensor]:
    """Output, and the gradients of input and parameters."""
    x.requires_grad_()
    y = net(x, t, cond)
    (y * direction).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def shared(rank: int, world_size: int) -> dict[str, float]:
    """Largest difference from one rank's, relative to the largest value of each tensor, by case."""
    group = dist.group.WORLD
    assert group is not None
    worst = {}
    for kind in KINDS:
        for positions in ("sincos", "rotary"):
            alone = results(*problem(kind, positions))
            net, *inputs = problem(kind, positions)
            net.share_sequence(group)
            found = results(net, *inputs)
            for gradient in found[1:]:
                dist.all_reduce(gradient)  # each rank has that of its own tokens
            assert len(found) == len(alone)
            worst[f"{kind} {positions}"] = max(
                float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in zip(found, alone, strict=True)
            )
            net.eval()  # by itself: no other rank is asked
            if rank == 0:
                with torch.no_grad():
                    assert torch.equal(
                        net(*inputs[:3]), problem(kind, positions)[0].eval()(*problem(kind, positions)[1:4])
                    )
    return worst


@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_and_gradients_equal_one_rank(world_size: int) -> None:
    for worst in run_ranks(world_size, shared):
        assert len(worst) == 6 and max(worst.values()) < 1e-9, worst


def test_the_comparison_sees_a_token() -> None:
    net, x, t, cond, _ = problem("lengths", "rotary")
    with torch.no_grad():
        whole = net(x, t, cond)
        cond["text_mask"][0, 7] = False
        assert float((net(x, t, cond) - whole).abs().max() / whole.abs().max()) > 1e-4


# ------------------------------------------------------------------------------------------------- trainings


def training(rank: int, world_size: int, root: str, together: int, engine: str, checkpointing: bool) -> None:
    changes: dict[str, Any] = {
        "steps": 3,
        "global_batch": 4,
        "optimizer": {"lr": 1e-3, "schedule": {"warmup_steps": 0}},
        "networks": {"model": {"depth": 2, "num_heads": 2}},
        "callbacks": {
            "samples": None,
            "validate": {"every": 3, "samples": 8},
            "checkpoint": {"every": 3},
            "metrics": {"every": 1},
        },
    }
    recipe = recipes.load_recipe("cogvideox/tiny_emoji", changes, tiny=True)
    values = {
        "workers": world_size, "sequence_parallel": together, "engine": engine, "threads_per_worker": 1,
        "activation_checkpointing": checkpointing, "micro_batch": 2,
    }  # fmt: skip
    place = Place(RunFolder(Path(root)), Path(root), Path(root).parent)
    train(recipe, recipes.cluster_from(values, "test"), place, lambda *_: None)


def assert_alike(a: Path, b: Path) -> None:
    """Loss, gradient norm, validation and all weights of two trainings."""
    for name, keys in (("metrics.jsonl", ("loss", "grad_norm")), ("validation.jsonl", ("loss",))):
        ours, theirs = rows(a, name), rows(b, name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs] and ours
        for one, other in zip(ours, theirs, strict=True):
            for key in keys:
                assert one[key] == pytest.approx(other[key], rel=1e-5), (name, key)
    one, other = newest(RunFolder(a).checkpoints), newest(RunFolder(b).checkpoints)
    assert one is not None and other is not None and one.names == other.names
    for name in one.names:
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-3, atol=2e-6, msg=name)


def test_two_ranks_that_share_a_sequence_train_as_two_that_do_not(tmp_path: Path) -> None:
    run_ranks(2, training, str(tmp_path / "apart"), 1, "deepspeed", False)
    run_ranks(2, training, str(tmp_path / "together"), 2, "deepspeed", False)
    assert_alike(tmp_path / "together", tmp_path / "apart")


@pytest.mark.slow
def test_four_ranks_in_two_groups_with_what_is_computed_again(tmp_path: Path) -> None:
    run_ranks(2, training, str(tmp_path / "apart"), 1, "replicated", False)
    run_ranks(4, training, str(tmp_path / "together"), 2, "replicated", True)
    run_ranks(4, training, str(tmp_path / "sharded"), 2, "deepspeed", True)
    assert_alike(tmp_path / "together", tmp_path / "apart")
    assert_alike(tmp_path / "sharded", tmp_path / "apart")


# -------------------------------------------------------------------------------------------------- mistakes


def test_clusters_that_cannot_share_are_refused() -> None:
    for values in ({"workers": 3}, {"workers": [2, 4]}, {"workers": 0}):
        with pytest.raises(UserError, match="sequence_parallel 2: expected a fixed number of workers"):
            recipes.cluster_from({**values, "sequence_parallel": 2}, "test")
    with pytest.raises(UserError, match="greater than or equal to 1"):
        recipes.cluster_from({"sequence_parallel": 0}, "test")
    with pytest.raises(UserError, match="global_batch 32 does not divide among 3"):
        resolve("cogvideox/tiny_emoji", ["cluster.workers=6", "cluster.sequence_parallel=2"])


def test_the_plan_counts_groups_and_not_ranks() -> None:
    cluster = recipes.cluster_from({"workers": 8, "sequence_parallel": 4}, "test")
    assert cluster.sharers == 2
    recipe = recipes.load_recipe("cogvideox/tiny_emoji", {"global_batch": 6})
    made, alone = plan(recipe, cluster), plan(recipe, recipes.cluster_from({"workers": 2}, "test"))
    assert (made.workers, made.micro_batch) == (8, 3)
    assert made.fit.memory["activations"] == pytest.approx(alone.fit.memory["activations"] / 4, rel=0.1)
    assert made.possible_workers == [4, 8]


def refused(rank: int, world_size: int) -> list[str]:
    said = []
    dit = {"latent_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2}
    for make in (
        lambda: DiT(**dit),  # type: ignore[arg-type]
        lambda: CogVideoX(**{**ARGS, "num_heads": 1}),
        lambda: CogVideoX(**ARGS, attention="packed"),
    ):
        with pytest.raises(UserError) as error:
            build_engine(
                {"model": NetSpec(make, AdamW())}, {}, EngineSettings(engine="replicated", sequence_parallel=2)
            )
        said.append(str(error.value))
    with pytest.raises(UserError) as error:
        neighbours(3)
    return [*said, str(error.value)]


def test_networks_that_cannot_share_are_refused() -> None:
    for none, heads, packed, ranks in run_ranks(2, refused):
        assert "DiT) has no share_sequence" in none
        assert "2 ranks do not divide the 1 heads" in heads
        assert "set attention: masked" in packed
        assert "2 ranks do not divide into groups of 3" in ranks
