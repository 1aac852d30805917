"""The cost of a recipe on a cluster: memory, FLOP/s, time per step, and the numbers of workers that divide its batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nexus_scale.config.recipe import Cluster, accumulation, divisors
from nexus_scale.contracts import UserError
from nexus_scale.planner.memory import GIB, Precision, memory_per_rank, on_device, on_host

ASSUMED_MFU = 0.4
"""Part of the peak that dense transformers reach in training on H100s (published: 0.35 to 0.5): an assumption, which the table names."""

RESERVED = 0.08
"""Part of the device's memory that CUDA's context, NCCL's buffers and fragmentation take: an assumption."""


@dataclass(frozen=True)
class Plan:
    """Figures of one recipe on one cluster.

    Attributes:
        parameters: trained parameters.
        workers: ranks that train; on an elastic cluster, the most that divide the global batch.
        micro_batch, accumulation: samples that a rank takes at once, and how many times per step.
        memory: bytes per rank by part (planner.memory).
        device_limit, host_limit: available bytes per rank; None where the cluster file does not say.
        flops_per_step: model FLOPs of one step (three times the forward's); recomputation is not counted.
        seconds_per_step: at `mfu` of the peak; None where the peak is unknown.
        steps: of the whole run, None where not given.
        possible_workers: numbers of workers up to the cluster's that divide the global batch.
        possible_micro_batches: micro-batches that divide a worker's share.
        recomputes: whether activations are recomputed in the backward pass.
    """

    parameters: int
    cluster: str
    global_batch: int
    workers: int
    micro_batch: int
    accumulation: int
    precision: str
    zero_stage: int
    memory: Mapping[str, float]
    device_limit: float | None
    host_limit: float | None
    flops_per_step: float
    seconds_per_step: float | None
    mfu: float
    steps: int | None
    possible_workers: list[int]
    possible_micro_batches: list[int]
    recomputes: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether the parts fit; None where a limit that matters is unknown."""
        pairs = [(on_device(self.memory), self.device_limit), (on_host(self.memory), self.host_limit)]
        needed = [(size, limit) for size, limit in pairs if size > 0]
        if any(limit is not None and size > limit for size, limit in needed):
            return False
        return None if any(limit is None for _, limit in needed) else True

    @property
    def largest_fitting_micro_batch(self) -> int | None:
        """The largest possible micro-batch that fits; None where none does, or the limit is unknown."""
        if self.device_limit is None:
            return None
        activations = self.memory.get("activations", 0.0)
        rest = on_device(self.memory) - activations
        each = activations / self.micro_batch
        fitting = [micro for micro in self.possible_micro_batches if rest + micro * each <= self.device_limit]
        return max(fitting, default=None)

    @property
    def samples_per_second(self) -> float | None:
        return self.global_batch / self.seconds_per_step if self.seconds_per_step else None

    @property
    def run_hours(self) -> float | None:
        return self.seconds_per_step * self.steps / 3600 if self.seconds_per_step and self.steps else None


def largest_workers(global_batch: int, least: int, most: int) -> int:
    """The largest number of workers within [least, most] that divides the global batch.

    Raises:
        UserError: none does; lists the nearest below and above.
    """
    fits = divisors(global_batch)
    inside = [w for w in fits if least <= w <= most]
    if inside:
        return inside[-1]
    near = [w for w in fits if w < least][-1:] + [w for w in fits if w > most][:1]
    raise UserError(
        f"global_batch {global_batch} does not divide among any number of workers in [{least}, {most}]; the nearest that do: {near}"
    )


def micro_batches(global_batch: int, workers: int) -> list[int]:
    """Micro-batches that divide each worker's share of the global batch."""
    accumulation(global_batch, workers, None)  # raises, with the numbers that do, where the workers do not divide
    return divisors(global_batch // workers)


def precision_of(cluster: Cluster) -> Precision:
    """The precision of the computation. `auto` is assumed to be bf16 on GPUs and float32 elsewhere, as only the device knows."""
    assumed = "bf16" if cluster.gpus_per_worker else "float32"
    return "bf16" if cluster.precision == "bf16" or (cluster.precision == "auto" and assumed == "bf16") else "float32"


def plan(
    *,
    parameters: int,
    forward_flops_per_sample: float,
    global_batch: int,
    cluster: Cluster,
    steps: int | None = None,
    moments: int | None = None,
    averaged: int = 0,
    frozen_parameters: int = 0,
    largest_block: int = 0,
    activation_bytes_per_sample: float = 0.0,
    mfu: float = ASSUMED_MFU,
) -> Plan:
    """The figures of one recipe on one cluster.

    Args:
        parameters: trained parameters; `frozen_parameters`: those that are not trained; `largest_block`: those of the largest block.
        forward_flops_per_sample: as nexus_scale.rehearsal.flops counts them.
        moments, averaged: values that the optimizers keep, and parameters of all EMA copies; see `memory_per_rank`.
        activation_bytes_per_sample: what the backward pass needs of one sample (planner.activations).
        mfu: model FLOPs utilisation that the step time assumes.
    Raises:
        UserError: the global batch does not divide among the workers or the micro-batch.
    Source: Chowdhery et al. 2022 (PaLM), appendix B: MFU counts forward and backward (twice the forward), no recomputation.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu {mfu}: expected a part of the peak, in (0, 1]")
    workers = workers_of(cluster, global_batch)
    most = cluster.workers[1] if isinstance(cluster.workers, tuple) else cluster.ranks
    together = cluster.sequence_parallel
    micro, repeats = accumulation(global_batch, workers // together, cluster.micro_batch)
    precision = precision_of(cluster)
    zero_stage = cluster.zero_stage if cluster.engine == "deepspeed" else 0
    memory = memory_per_rank(
        parameters,
        world_size=workers,
        zero_stage=zero_stage,
        precision=precision,
        moments=moments,
        averaged=averaged,
        frozen_parameters=frozen_parameters,
        largest_block=largest_block,
        activation_bytes=activation_bytes_per_sample * micro / together,
        offload=cluster.offload if cluster.gpus_per_worker else "none",  # on a CPU there is nowhere to offload to
    )
    device_limit, host_limit = limits_of(cluster)
    flops_per_step = 3.0 * forward_flops_per_sample * global_batch
    seconds = None
    if cluster.peak_tflops:
        computed = flops_per_step * (4 / 3 if cluster.activation_checkpointing else 1)  # one more forward pass
        seconds = computed / (workers * cluster.peak_tflops * 1e12 * mfu)
    return Plan(
        parameters=parameters,
        cluster=cluster.name,
        global_batch=global_batch,
        workers=workers,
        micro_batch=micro,
        accumulation=repeats,
        precision=precision,
        zero_stage=zero_stage,
        memory=memory,
        device_limit=device_limit,
        host_limit=host_limit,
        flops_per_step=flops_per_step,
        seconds_per_step=seconds,
        mfu=mfu,
        steps=steps,
        possible_workers=[w * together for w in divisors(global_batch) if w * together <= max(most, 1)],
        possible_micro_batches=micro_batches(global_batch, workers // together),
        recomputes=cluster.activation_checkpointing,
    )


def workers_of(cluster: Cluster, global_batch: int) -> int:
    """The ranks that train; on an elastic cluster, the most that divide the global batch."""
    least, most = cluster.workers if isinstance(cluster.workers, tuple) else (cluster.ranks, cluster.ranks)
    return largest_workers(global_batch, least, most) if most > least else most


def limits_of(cluster: Cluster) -> tuple[float | None, float | None]:
    """Bytes that a rank may use on its device and on its host; None where the cluster file does not say."""
    ranks_per_node = max(1, -(-cluster.ranks // cluster.nodes))
    host = cluster.node_memory_gib * GIB / ranks_per_node if cluster.node_memory_gib else None
    if not cluster.gpus_per_worker:
        return host, host
    whole = cluster.gpu_memory_gib * GIB * cluster.gpus_per_worker if cluster.gpu_memory_gib else None
    return None if whole is None else whole * (1 - RESERVED), host


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _count(number: float, unit: str = "") -> str:
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def table(planned: Plan) -> str:
    """The figures as aligned text, one per line."""
    batch = f"{planned.global_batch} = {planned.workers} workers x {planned.accumulation} x micro-batch {planned.micro_batch}"
    where = f"{planned.cluster}: {planned.workers} worker(s), {planned.precision}, ZeRO stage {planned.zero_stage}"
    rows = [
        ("trained parameters", _count(planned.parameters)),
        ("cluster", where),
        ("batch", batch),
        ("numbers of workers that divide", ", ".join(map(str, planned.possible_workers))),
        ("micro-batches that divide", ", ".join(map(str, planned.possible_micro_batches))),
        *_memory_rows(planned),
        ("model FLOPs per step", _count(planned.flops_per_step, "FLOP") if planned.flops_per_step else UNCOUNTED),
        *_time_rows(planned),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


UNCOUNTED = "unknown: the networks offer no example_inputs, or counting takes too long"


def _memory_rows(planned: Plan) -> list[tuple[str, str]]:
    def within(size: float, limit: float | None) -> str:
        return _size(size) + (f" of {_size(limit)}" if limit else "")

    rows = [(f"memory per rank, {name.replace('_', ' ')}", _size(size)) for name, size in planned.memory.items()]
    device, host = on_device(planned.memory), on_host(planned.memory)
    rows.append(("memory per rank, in all", f"{within(device, planned.device_limit)}: {_verdict(planned)}"))
    if host:
        rows.append(("memory per rank, on the host", within(host, planned.host_limit)))
    return rows


def _verdict(planned: Plan) -> str:
    verdict = {True: "fits", False: "does NOT fit", None: "limit unknown"}[planned.fits]
    if "activations" not in planned.memory:
        return f"{verdict}, activations not counted"
    if planned.fits is not False:
        return verdict
    fitting = planned.largest_fitting_micro_batch
    advice = f"set cluster.micro_batch={fitting}" if fitting else "no micro-batch does"
    more = "" if planned.recomputes else "; cluster.activation_checkpointing=true needs less per sample"
    return f"{verdict}; {advice}{more}"


def _time_rows(planned: Plan) -> list[tuple[str, str]]:
    seconds, rate = planned.seconds_per_step, planned.samples_per_second
    if not planned.flops_per_step:
        return [("time per step", UNCOUNTED)]
    if not seconds or not rate:
        return [("time per step", "unknown: the cluster file gives no peak_tflops")]
    rows = [
        (f"time per step, at an assumed MFU of {planned.mfu:.0%}", _time(seconds)),
        ("samples per second", f"{rate:,.1f}"),
        ("model FLOP/s", _count(planned.flops_per_step / seconds, "FLOP/s")),
    ]
    if planned.steps:
        rows.append((f"time of {planned.steps:,} steps", _time(seconds * planned.steps)))
    return rows
