"""The planner's figures against the papers' and against arithmetic done by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.config.recipe import Cluster, Recipe, load_cluster, load_recipe, network_class
from nexus_scale.contracts import UserError
from nexus_scale.kernels import choice
from nexus_scale.planner import (
    GIB,
    Fitting,
    activations_of,
    candidates,
    divisors,
    largest_micro_batch,
    largest_workers,
    memory_per_rank,
    micro_batches,
    plan,
    saved_bytes,
    table,
)
from nexus_scale.planner.holdings import limits_of
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

    counted = activations_of(recipe, precision="float32")
    # The CPU's attention keeps copies of queries and keys where GPUs' keep views: 8 % here.
    assert counted.each == pytest.approx(kept(2) - kept(1), rel=0.1) and not counted.uncounted
    assert activations_of(recipe, precision="bf16").each < 0.6 * counted.each


def on_gpus(**changed: object) -> Cluster:
    given = {"name": "gpus", "workers": 1, "gpus_per_worker": 1, "precision": "bf16", "gpu_memory_gib": 80}
    return Cluster(**given | changed)  # type: ignore[arg-type]


def small(**changed: object) -> Recipe:
    """Six blocks of width 64."""
    network = {"depth": 6, "hidden_size": 64, "num_heads": 4, "latent_size": 8}
    return load_recipe("dit/s8_imagenet", {"global_batch": 64, "networks": {"model": network}} | changed)


def test_a_micro_batch_that_is_too_large_is_told_with_one_that_fits() -> None:
    recipe, cluster = load_recipe("mmdit/sd3_2b"), load_cluster("h100x8")
    planned = plan(recipe, cluster)
    assert planned.micro_batch == 512 and planned.fit.fits is False and planned.largest is not None
    assert planned.largest.micro_batch == 32 and not planned.largest.activation_checkpointing
    assert "does NOT fit; set cluster.micro_batch=32\n" in table(planned)
    assert plan(recipe, cluster.model_copy(update={"micro_batch": 32})).fit.fits is True


def test_the_largest_micro_batch_recomputes_blocks_only_where_one_sample_does_not_fit() -> None:
    recipe = small()
    tried = list(Fitting(recipe, on_gpus(gpu_memory_gib=4)).candidates())
    assert [fit.micro_batch for fit in tried] == [64, 32, 16, 8, 4, 2, 1] * 2
    assert [fit.activation_checkpointing for fit in tried] == [False] * 7 + [True] * 7
    taken = [on_device(fit.memory) for fit in tried]
    for n, wanted in ((0, (64, False)), (3, (8, False)), (6, (1, False))):
        fit = largest_micro_batch(recipe, on_gpus(), device_limit=taken[n] + 1)
        assert (fit.micro_batch, fit.activation_checkpointing) == wanted
    # below what one sample takes, the largest that fits with recomputation
    fit = largest_micro_batch(recipe, on_gpus(), device_limit=taken[6] - 1)
    assert fit.activation_checkpointing and fit.micro_batch > 1
    assert candidates(recipe, on_gpus(), device_limit=taken[6] - 1)[0] == fit
    with pytest.raises(
        UserError, match=r"gpus: no micro-batch fits: with one sample and recomputed blocks a worker takes 0\.6"
    ) as refused:
        largest_micro_batch(recipe, on_gpus(), device_limit=taken[-1] - 1)
    assert refused.value.code == 4


def test_the_largest_micro_batch_divides_at_every_number_of_workers_of_an_elastic_cluster() -> None:
    recipe, elastic = small(), on_gpus(workers=[4, 8])
    fit = largest_micro_batch(recipe, elastic)
    assert fit.micro_batch == 8, "of 4 and of 8 workers"
    assert on_device(fit.memory) == on_device(Fitting(recipe, elastic).at(8, workers=4).memory), "with the fewest"
    assert largest_micro_batch(recipe, Cluster(workers=2)).fits is None, "no limit is known: the whole share"


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
    recipe, cluster = small(steps=3600), on_gpus(workers=2, peak_tflops=100)
    planned = plan(recipe, cluster, mfu=0.5)
    assert planned.seconds_per_step == pytest.approx(planned.flops_per_step / 100e12)  # two GPUs at 50 %
    assert planned.samples_per_second == pytest.approx(64 / planned.seconds_per_step)
    assert planned.run_hours == pytest.approx(planned.seconds_per_step)
    recomputed = plan(recipe, on_gpus(workers=2, peak_tflops=100, activation_checkpointing=True), mfu=0.5)
    assert recomputed.flops_per_step == planned.flops_per_step
    assert recomputed.seconds_per_step == pytest.approx(planned.seconds_per_step * 4 / 3)


def test_fits_or_not_or_not_known() -> None:
    """SD3's 8.06 B parameters with one average: 150 GiB of states, 180 with gradients in float32."""
    counted = Fitting(load_recipe("mmdit/sd3_8b", {"global_batch": 8}), on_gpus(activation_checkpointing=True))

    def of(**changed: object) -> bool | None:
        fitting = copy.copy(counted)
        fitting.cluster = on_gpus(activation_checkpointing=True, **changed)
        fitting.device_limit, fitting.host_limit = limits_of(fitting.cluster)
        return fitting.at(1).fits

    assert of(gpu_memory_gib=139) is False
    assert of(workers=8) is True
    assert of(gpu_memory_gib=None) is None
    assert of(gpu_memory_gib=80, offload="cpu", node_memory_gib=256) is True  # 120 GiB there, 45 and activations here
    assert of(gpu_memory_gib=80, offload="cpu", node_memory_gib=64) is False
    assert of(gpu_memory_gib=80, offload="cpu") is None


def test_a_cpu_worker_shares_its_nodes_memory() -> None:
    planned = plan(small(), Cluster(workers=2, node_memory_gib=4))
    assert planned.fit.device_limit == 2 * GIB and planned.fit.fits is True
    assert planned.seconds_per_step is None
    assert "unknown" in table(planned)


def test_table_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without example inputs: whether it fits, and how long a step takes, is not known."""
    recipe = small()
    monkeypatch.setattr(network_class(recipe.trained()["model"])[0], "example_inputs", lambda *_: None)
    planned = plan(recipe, load_cluster("one_h200"))
    assert planned.fit.fits is None and planned.fit.uncounted == ("model",)
    text = table(planned)
    assert "not known: activations of model are not counted" in text
    assert "peak_tflops" not in text  # the cluster file gives it
    assert text.count("unknown: the networks offer no example_inputs") == 2


def test_table_shows_every_figure_once() -> None:
    text = table(plan(load_recipe("mmdit/sd3_2b", {"global_batch": 256}), load_cluster("h100x8")))
    lines = text.splitlines()
    assert len(lines) == len({line.split("  ")[0] for line in lines})
    for expected in (
        "2.03 G",
        "256 = 8 workers x 1 x micro-batch 32",
        "averages",
        "MFU of 40%",
        "500,000 steps",
        "fits",
    ):
        assert expected in text
