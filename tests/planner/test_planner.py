"""The planner's figures against the papers' and against arithmetic done by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nexus_scale import train
from nexus_scale.config.recipe import Cluster, Recipe, load_cluster, load_recipe, network_class
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.kernels import blocked, choice
from nexus_scale.planner import (
    GIB,
    Fit,
    Fitting,
    activations_of,
    candidates,
    divisors,
    kept,
    largest_micro_batch,
    largest_workers,
    memory_per_rank,
    micro_batches,
    plan,
    table,
)
from nexus_scale.planner.attention import FusedAttention
from nexus_scale.planner.holdings import holdings, limits_of, rank_memory
from nexus_scale.planner.live import peak_of_passes
from nexus_scale.planner.losses import Losses, activations_of_losses, largest_sample, repeated
from nexus_scale.planner.memory import on_device, on_host
from nexus_scale.rehearsal.batches import maker
from nexus_scale.rehearsal.costs import example_inputs
from nexus_scale.rehearsal.micro_batch import Size


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
    here = memory_per_rank(1 << 20, world_size=8, averaged=1 << 20, gathered=1 << 10, reducing=1 << 9)
    there = memory_per_rank(1 << 20, world_size=8, averaged=1 << 20, gathered=1 << 10, reducing=1 << 9, offload="cpu")
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
    assert kept(network, [x]).bytes == 4 * 3 * (8 + 2 * (8 + 32 + 32))
    recomputed = kept(network, [x], checkpointing=True).bytes
    # Of a block its input alone; what lies behind it (32 each) is kept, and one block (8 + 32) at a time is computed again. The
    # result of its GELU is an input of the layer behind it, and counted there.
    assert recomputed == 4 * 3 * (8 + 2 * (8 + 32) + (8 + 32))


FAMILIES = (
    "mmdit/tiny_openmoji",
    "ddpm/tiny_fashion_mnist",
    "dit/tiny_fashion_mnist",
    "cogvideox/tiny_emoji",
    "flux/tiny_openmoji",
    "stable_diffusion/tiny_openmoji",
    "valle/tiny_speech",
    "vae/tiny_clips",
    "magvit2/tiny_clips",
    "videopoet/tiny_emoji",
    "beta_vae/tiny_fashion_mnist",
    "vq_vae/tiny_openmoji",
    "codec/tiny_speech",
    "voicebox/tiny_speech",
    "gan/dcgan_lsun",
    "gan/tiny_acgan_fashion_mnist",
    "gan/tiny_fashion_mnist",
    "cyclegan/tiny_emoji",
    "consistency/tiny_fashion_mnist",
    "pixart/tiny_openmoji",
    "musicgen/small",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_device_counts_what_a_cpu_takes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tensors: the most bytes that live at once in forward and backward, and the states of a real engine, within 5 %."""
    recipe = load_recipe(family, tiny=True)
    cluster = Cluster(workers=0, engine="local", zero_stage=0)
    monkeypatch.setattr(blocked, "_on_cpu", lambda *_: False)  # a CPU's own kernels keep less than those of a GPU
    most = 0
    for spec in recipe.trained().values():
        cls, arguments = network_class(spec)
        network = cls(**arguments)
        network.init_weights()
        inputs = example_inputs(network, recipe, 6, "cpu")
        assert inputs is not None
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        with choice.plain(), FusedAttention():
            most = max(most, peak_of_passes(network.train(), partial(network, *inputs), given))
    assert activations_of(recipe, precision="float32").of(6) == pytest.approx(most, rel=0.05)

    monkeypatch.setattr(train, "rehearse", lambda *_: set())
    nowhere = train.Place(RunFolder(Path()), Path(), Path())
    engine = train._engine(
        recipe, cluster, nowhere, train.make_objective(recipe, None), "float32", torch.device("cpu"), None, Size(1), 1
    )
    states = [
        shard.local for name, shard in engine.shards().items() if not name.endswith((".buffer", ".optimizer_steps"))
    ]
    memory = rank_memory(recipe, cluster, holdings(recipe), workers=1, accumulation=1, activation_bytes=10.0**9)
    assert sum(memory.get(part, 0) for part in ("weights", "optimizer", "averages")) == pytest.approx(
        sum(tensor.numel() * tensor.element_size() for tensor in states), rel=0.05
    )


@pytest.mark.parametrize("family", ["gan/tiny_fashion_mnist", "codec/tiny_speech", "mmdit/tiny_openmoji"])
def test_whole_losses_are_counted_where_the_data_are_there(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator's loss goes through its discriminator: real tensors again, within 5 %."""
    recipe = load_recipe(family, tiny=True)
    monkeypatch.setattr(blocked, "_on_cpu", lambda *_: False)
    sample = largest_sample(recipe, tmp_path)
    assert sample is not None
    objective = train.make_objective(recipe, None)
    networks = {name: maker(spec)() for name, spec in recipe.built().items()}
    for network in networks.values():
        network.init_weights()
    losses, most, batch = Losses(recipe, objective, networks, torch.float32), 0, repeated(sample, 6)
    for phase in losses.phases:
        with choice.plain(), FusedAttention():
            total = partial(losses.total, phase, batch, "cpu")
            most = max(most, peak_of_passes(losses.modules(), total, list(batch.fields.values())))
    found = activations_of_losses(recipe, sample, precision="float32")
    assert found.of(6) == pytest.approx(most, rel=0.05)
    one = activations_of(recipe, precision="float32")
    assert found.of(6) > (1.3 if len(networks) > 1 else 1.0) * one.of(6)
    fitting = Fitting(recipe, Cluster(workers=0, engine="local", zero_stage=0), sample=sample)
    assert fitting.at(2).memory["activations"] == found.of(2)
    data = recipe.data.model_copy(update={"synthetic": None})
    assert largest_sample(recipe.model_copy(update={"data": data}), tmp_path) is None, "the data are not there"


def test_compiled_blocks_keep_what_torch_compile_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partition of the graph that inductor is given, by torch.compile's own front end; inductor keeps the same."""
    monkeypatch.setattr(blocked, "_on_cpu", lambda *_: False)
    cls, arguments = network_class(small().trained()["model"])
    real, meta = cls(**arguments), cls(**arguments).to("meta")
    real.init_weights()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*real.parameters(), *real.buffers()]}
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for block in real.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition")
    with choice.plain(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        real(*real.example_inputs(4, 0, "cpu"))
    found = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    inputs, traces = meta.example_inputs(4, 0, "meta"), {}
    assert kept(meta, inputs, traces=traces).bytes == found < kept(meta, inputs).bytes
    assert len(traces) == 1, "blocks of one structure are traced once"
    recomputed = kept(meta, inputs, checkpointing=True), kept(meta, inputs, checkpointing=True, traces=traces)
    assert recomputed[1].bytes < recomputed[0].bytes < found / 2, "one block at a time, which compiled keeps less"


def on_gpus(**changed: object) -> Cluster:
    given = {"name": "gpus", "workers": 1, "gpus_per_worker": 1, "precision": "bf16", "gpu_memory_gib": 80}
    return Cluster(**given | changed)  # type: ignore[arg-type]


def small(**changed: object) -> Recipe:
    """Six blocks of width 64, 256 tokens."""
    network = {"depth": 6, "hidden_size": 64, "num_heads": 4, "latent_size": 32, "patch_size": 2}
    return load_recipe("dit/s8_imagenet", {"global_batch": 64, "networks": {"model": network}} | changed)


def test_a_micro_batch_that_is_too_large_is_told_with_one_that_fits() -> None:
    recipe, cluster = load_recipe("mmdit/sd3_2b"), load_cluster("h100x8", {"micro_batch": None})
    planned = plan(recipe, cluster)
    assert planned.micro_batch == 512 and planned.fit.fits is False and planned.largest is not None
    assert planned.largest.micro_batch == 32 and not planned.largest.activation_checkpointing
    text = table(planned)
    lines = text.splitlines()
    assert len(lines) == len({line.split("  ")[0] for line in lines}), "every figure once"
    for expected in (
        "2.03 G",
        "4096 = 8 workers x 1 x micro-batch 512",
        "averages",
        "does NOT fit; set cluster.micro_batch=32\n",
        "bound by the device",
        "500,000 steps",
    ):
        assert expected in text


def test_a_plan_of_an_automatic_micro_batch_has_one_that_fits() -> None:
    recipe, gpus = small(), on_gpus(gpu_memory_gib=0.8)
    largest = largest_micro_batch(recipe, gpus)
    found = plan(recipe, on_gpus(gpu_memory_gib=0.8, micro_batch="auto"))
    assert found.micro_batch == largest.micro_batch == 32 and found.fit.fits is True


def test_the_largest_micro_batch_recomputes_blocks_only_where_one_sample_does_not_fit() -> None:
    recipe = small()
    tried = list(Fitting(recipe, on_gpus(gpu_memory_gib=4)).candidates())
    assert [fit.micro_batch for fit in tried] == [64, 32, 16, 8, 4, 2, 1] * 2
    assert [fit.activation_checkpointing for fit in tried] == [False] * 7 + [True] * 7
    taken = [on_device(fit.memory) for fit in tried]
    for n, wanted in ((3, (8, False)), (6, (1, False))):
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
    planned = plan(recipe, cluster)
    assert planned.seconds_per_step == pytest.approx(planned.flops_per_step / 80e12)  # two GPUs at 40 %
    assert "at an assumed MFU of 40%: the cluster file names no gpu" in table(planned)
    assert planned.samples_per_second == pytest.approx(64 / planned.seconds_per_step)
    assert planned.run_hours == pytest.approx(planned.seconds_per_step)
    recomputed = plan(recipe, on_gpus(workers=2, peak_tflops=100, activation_checkpointing=True))
    assert recomputed.flops_per_step == planned.flops_per_step
    assert recomputed.seconds_per_step == pytest.approx(planned.seconds_per_step * 4 / 3)


def test_fits_or_not_or_not_known() -> None:
    """SD3's 8.06 B parameters with one average: 150 GiB of states, and gradients."""
    recipe = load_recipe("mmdit/sd3_8b", {"global_batch": 8})
    held = holdings(recipe)

    def of(uncounted: tuple[str, ...] = (), **changed: object) -> bool | None:
        cluster = on_gpus(**changed)
        memory = rank_memory(
            recipe, cluster, held, workers=cluster.ranks, accumulation=8 // cluster.ranks, activation_bytes=10.0 * GIB
        )
        return Fit(1, False, memory, *limits_of(cluster), uncounted).fits

    assert of(gpu_memory_gib=139) is False
    assert of(workers=8) is True
    assert of(workers=8, uncounted=("model",)) is None
    assert of(gpu_memory_gib=None) is None
    assert of(gpu_memory_gib=80, offload="cpu", node_memory_gib=256) is True  # 120 GiB there, 45 and activations here
    assert of(gpu_memory_gib=80, offload="cpu", node_memory_gib=64) is False
    assert of(gpu_memory_gib=80, offload="cpu") is None


def test_of_an_adapted_network_each_rank_holds_its_part_and_the_blocks_that_compute() -> None:
    """FLUX's widths, with fewer blocks: 2.9 B parameters that learn nothing, and a LoRA of them."""
    sizes = {
        "name": "flux",
        "latent_channels": 16,
        "latent_size": 64,
        "depth_double": 4,
        "depth_single": 10,
        "text_dim": 4096,
    }
    base = {**sizes, "pooled_dim": 768, "frozen": True, "init_from": {"format": "diffusers", "path": "flux"}}
    networks = {"base": base, "model": {"adapts": "base", "name": "lora", "rank": 16}}
    recipe = load_recipe("flux/dev", {"global_batch": 8, "networks": networks})
    held, workers = holdings(recipe), 8
    memory = rank_memory(recipe, on_gpus(workers=workers), held, workers=workers, accumulation=1, activation_bytes=0.0)
    count, adapted, blocks = held.counts["base"], held.counts["model"], held.blocks["base"]
    assert memory["frozen"] == 2 * -(-count // workers) and held.parameters == adapted < count / 100
    assert memory["gathered"] == 2 * (2 * max(blocks) + count - sum(blocks))
    assert memory["optimizer"] == 12 * -(-adapted // workers) and memory["averages"] == 4 * -(-adapted // workers)


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
    assert text.count("unknown: the networks offer no example_inputs") == 2
