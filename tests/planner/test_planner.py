"""The planner's figures against the papers' and against arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.config.recipe import Cluster, load_cluster, load_recipe, network_class
from nexus_scale.contracts import UserError
from nexus_scale.kernels import choice
from nexus_scale.planner import (
    GIB,
    activations_per_sample,
    divisors,
    largest_workers,
    memory_per_rank,
    micro_batches,
    plan,
    saved_bytes,
    table,
)
from nexus_scale.planner.memory import on_device, on_host


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_memory_is_that_of_zero_figure_1(stage: int, gigabytes: float) -> None:
    """7.5 B parameters on 64 devices, mixed precision: the figure's own numbers, in 1e9 bytes."""
    parts = memory_per_rank(7_500_000_000, world_size=64, zero_stage=stage, precision="bf16")
    assert on_device(parts) / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_sixteen_bytes_a_parameter_and_four_for_each_average(precision: str) -> None:
    assert on_device(memory_per_rank(1000, world_size=1, precision=precision)) == 16_000  # type: ignore[arg-type]
    assert on_device(memory_per_rank(1000, world_size=4, precision=precision, averaged=2000)) == 24 * 250  # type: ignore[arg-type]


def test_offload_moves_optimizer_and_averages_and_loses_nothing() -> None:
    here = memory_per_rank(1 << 20, world_size=8, averaged=1 << 20, largest_block=1 << 10)
    there = memory_per_rank(1 << 20, world_size=8, averaged=1 << 20, largest_block=1 << 10, offload="cpu")
    assert on_host(here) == 0
    assert on_host(there) == (12 + 4) * (1 << 17)
    assert on_device(there) + on_host(there) == on_device(here)


def test_optimizers_that_keep_less_than_adam_take_less() -> None:
    assert memory_per_rank(1000, world_size=1, moments=1000)["optimizer"] == 8_000, "a float32 master and one moment"
    assert "optimizer" not in memory_per_rank(1000, world_size=1, precision="float32", moments=0), "plain sgd"


def test_the_last_rank_has_padding() -> None:
    assert memory_per_rank(10, world_size=4, precision="float32")["weights"] == 3 * 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": 0},
        {"world_size": 0},
        {"zero_stage": 4},
        {"precision": "fp8"},
        {"offload": "nvme"},
        {"averaged": -1},
    ],
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, object]) -> None:
    arguments: dict[str, object] = {"parameters": 10, "world_size": 1} | wrong
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        memory_per_rank(**arguments)  # type: ignore[arg-type]


class Counting(nn.Module):
    """Two blocks between two layers; what each keeps can be said by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()) for _ in range(2))
        self.back = nn.Linear(4 * width, width)

    def blocks(self) -> list[nn.Module]:
        return list(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.inner:
            x = x + self.back(block(x))
        return x


def test_activations_are_what_autograd_saves() -> None:
    """Of rows of width 8: the input (8), and in each block its input (8), that of GELU (32) and of the layer behind it (32)."""
    with torch.device("meta"):
        network, x = Counting(8), torch.zeros(3, 8)
    assert saved_bytes(network, [x]) == 4 * 3 * (8 + 2 * (8 + 32 + 32))
    recomputed = saved_bytes(network, [x], checkpointing=True)
    # Of a block its input alone; what lies behind it (32 each) is kept, and one block (8 + 32) at a time is computed again. The
    # result of its GELU is an input of the layer behind it, and counted there.
    assert recomputed == 4 * 3 * (8 + 2 * (8 + 32) + (8 + 32))


def test_the_meta_device_counts_what_a_cpu_keeps() -> None:
    """The same forward with real tensors: storages that autograd really holds."""
    recipe = load_recipe("dit/s8_imagenet", {"networks": {"model": {"depth": 2}}})
    cls, arguments = network_class(recipe.trained()["model"])
    network = cls(**arguments)
    held: dict[int, Tensor] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def kept(samples: int) -> int:
        held.clear()
        with choice.plain(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            network(*network.example_inputs(samples, 0, "cpu"))
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    counted, uncounted = activations_per_sample(recipe, precision="float32")
    # The CPU's attention keeps copies of queries and keys where GPUs' keep views: 8 % here.
    assert counted == pytest.approx(kept(2) - kept(1), rel=0.1) and not uncounted
    assert activations_per_sample(recipe, precision="bf16")[0] < 0.6 * counted


def test_dit_xl_2_needs_what_it_took_on_an_h100() -> None:
    """31.9 GiB at micro-batch 64 on one H100 80GB with torch 2.11, where the states are 12.6 GiB: bf16, compiled blocks."""
    recipe = load_recipe("dit/xl2_imagenet")
    each, _ = activations_per_sample(recipe, precision="bf16")
    assert 64 * each / GIB == pytest.approx(31.9 - 12.6, rel=0.1)
    recomputed, _ = activations_per_sample(recipe, precision="bf16", checkpointing=True)
    assert recomputed < 0.15 * each


def test_a_micro_batch_that_is_too_large_is_told_with_one_that_fits() -> None:
    cluster = load_cluster("h100x8")
    sizes = {
        "parameters": 2_028_000_000,
        "forward_flops_per_sample": 6e12,
        "global_batch": 4096,
        "averaged": 2_028_000_000,
    }
    planned = plan(**sizes, cluster=cluster, activation_bytes_per_sample=1.6 * GIB)  # type: ignore[arg-type]
    assert planned.micro_batch == 512 and planned.fits is False and planned.largest_fitting_micro_batch == 32
    assert (
        "does NOT fit; set cluster.micro_batch=32; cluster.activation_checkpointing=true needs less per sample"
        in table(planned)
    )
    kept = plan(**sizes, cluster=cluster.model_copy(update={"micro_batch": 32}), activation_bytes_per_sample=1.6 * GIB)  # type: ignore[arg-type]
    assert kept.fits is True
    none = plan(**sizes, cluster=cluster, activation_bytes_per_sample=100.0 * GIB)  # type: ignore[arg-type]
    assert "no micro-batch does" in table(none)


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    for number in range(1, 200):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    with pytest.raises(ValueError, match="0"):
        divisors(0)


def test_elastic_takes_the_most_workers_that_divide() -> None:
    assert largest_workers(128, 1, 6) == 4
    assert largest_workers(120, 1, 6) == 6
    with pytest.raises(UserError, match=r"\[5, 7\].*\[4, 8\]"):
        largest_workers(128, 5, 7)


def test_micro_batches_divide_a_workers_share() -> None:
    assert micro_batches(128, 4) == [1, 2, 4, 8, 16, 32]
    with pytest.raises(UserError, match="does not divide among 3"):
        micro_batches(128, 3)


def test_step_time_is_flops_over_what_the_cluster_gives() -> None:
    cluster = Cluster(name="two", workers=2, gpus_per_worker=1, gpu_memory_gib=80, peak_tflops=100, precision="bf16")
    planned = plan(
        parameters=10**9, forward_flops_per_sample=1e12, global_batch=64, cluster=cluster, steps=3600, mfu=0.5
    )
    assert planned.flops_per_step == 3 * 64e12
    assert planned.seconds_per_step == pytest.approx(192 / 100)  # 192 TFLOP on 2 x 100 TFLOP/s at 50 %
    assert planned.samples_per_second == pytest.approx(64 / 1.92)
    assert planned.run_hours == pytest.approx(1.92)
    again = Cluster(**cluster.model_dump() | {"activation_checkpointing": True})
    recomputed = plan(parameters=10**9, forward_flops_per_sample=1e12, global_batch=64, cluster=again, mfu=0.5)
    assert recomputed.flops_per_step == planned.flops_per_step
    assert recomputed.seconds_per_step == pytest.approx(1.92 * 4 / 3)


def test_fits_or_not_or_not_known() -> None:
    def of(parameters: int, **cluster: object) -> bool | None:
        given = {"workers": 1, "gpus_per_worker": 1, "precision": "bf16"} | cluster
        return plan(parameters=parameters, forward_flops_per_sample=1.0, global_batch=8, cluster=Cluster(**given)).fits  # type: ignore[arg-type]

    assert of(10**9, gpu_memory_gib=80) is True  # 15 GiB
    assert of(8 * 10**9, gpu_memory_gib=80) is False  # 119 GiB
    assert of(10**9) is None
    assert of(8 * 10**9, gpu_memory_gib=80, offload="cpu", node_memory_gib=256) is True  # 30 GiB there, 89 here
    assert of(8 * 10**9, gpu_memory_gib=80, offload="cpu", node_memory_gib=64) is False
    assert of(8 * 10**9, gpu_memory_gib=80, offload="cpu") is None


def test_sd3_8b_on_the_committed_clusters() -> None:
    """8.06 B parameters with one average need 150 GiB of state: not on one H200, easily on eight H100s."""
    sizes = {
        "parameters": 8_057_000_000,
        "forward_flops_per_sample": 3e13,
        "global_batch": 256,
        "averaged": 8_057_000_000,
    }
    assert plan(**sizes, cluster=load_cluster("one_h200")).fits is False  # type: ignore[arg-type]
    eight = plan(**sizes, cluster=load_cluster("h100x8"))  # type: ignore[arg-type]
    assert eight.fits is True
    assert on_device(eight.memory) == pytest.approx(20 * 8_057_000_000 / 8, rel=1e-6)
    elastic = plan(**sizes, cluster=load_cluster("h100x64"))  # type: ignore[arg-type]
    assert elastic.workers == 64


def test_a_cpu_worker_shares_its_nodes_memory() -> None:
    cluster = Cluster(workers=2, node_memory_gib=4)
    planned = plan(parameters=1000, forward_flops_per_sample=1e6, global_batch=8, cluster=cluster)
    assert planned.device_limit == 2 * GIB
    assert planned.seconds_per_step is None
    assert "unknown" in table(planned)


def test_table_says_what_it_leaves_out() -> None:
    sizes = {"parameters": 1000, "forward_flops_per_sample": 1e6, "global_batch": 8, "cluster": Cluster(workers=2)}
    assert "activations not counted" in table(plan(**sizes))  # type: ignore[arg-type]
    assert "not counted" not in table(plan(**sizes, activation_bytes_per_sample=10))  # type: ignore[arg-type]
    none = plan(parameters=1000, forward_flops_per_sample=0.0, global_batch=8, cluster=load_cluster("h100x8"))
    assert "peak_tflops" not in table(none)  # the cluster file gives it
    assert table(none).count("unknown: the networks offer no example_inputs") == 2


def test_table_shows_every_figure_once() -> None:
    text = table(
        plan(
            parameters=2_030_000_000,
            forward_flops_per_sample=6e12,
            global_batch=256,
            cluster=load_cluster("h100x8"),
            steps=500_000,
            averaged=2_030_000_000,
        )
    )
    lines = text.splitlines()
    assert len(lines) == len({line.split("  ")[0] for line in lines})
    assert "2.03 M" not in text
    for expected in (
        "2.03 G",
        "256 = 8 workers x 1 x micro-batch 32",
        "averages",
        "MFU of 40%",
        "500,000 steps",
        "fits",
    ):
        assert expected in text
