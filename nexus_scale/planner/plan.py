"""The cost of a recipe on a cluster: memory, FLOP/s, time per step, and the numbers of workers that divide its batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nexus_scale.config.recipe import Cluster, Recipe, accumulation, divisors
from nexus_scale.contracts import Batch, UserError
from nexus_scale.planner.ceilings import Ceilings, Rate, ceilings_of
from nexus_scale.planner.fitting import Fit, Fitting
from nexus_scale.planner.holdings import is_resident, is_sharding, precision_of
from nexus_scale.planner.memory import GIB, WEIGHT, in_tensors, on_device, on_host
from nexus_scale.planner.roofline import Layout, StepTime, step_time
from nexus_scale.planner.work import Work
from nexus_scale.rehearsal.costs import costs
from nexus_scale.rehearsal.peaks import peak_tflops

ASSUMED_MFU = 0.4
"""Part of the peak that dense transformers reach in training on H100s (published: 0.35 to 0.5): what is assumed of a GPU whose rates are
not known, and said so."""


@dataclass(frozen=True)
class Plan:
    """Figures of one recipe on one cluster.

    Attributes:
        parameters: trained parameters.
        workers, nodes: ranks that train, and on how many machines; on an elastic cluster, the most that divide the global batch.
        micro_batch, accumulation: samples that a rank takes at once, and how many times per step.
        fit: bytes per rank by part, and whether they fit.
        largest: the largest micro-batch that fits; None where none does, or the limit is unknown.
        flops_per_step: model FLOPs of one step (three times the forward's); recomputation is not counted.
        step: its time by part, from `ceilings`; both None where the cluster file names no GPU of known rates.
        seconds_per_step: that time, or that at ASSUMED_MFU of the peak; None where the peak is unknown, too.
        peak_flops: of all workers, None where unknown.
        steps: of the whole run, None where not given.
        possible_workers: numbers of workers up to the cluster's that divide the global batch.
        possible_micro_batches: micro-batches that divide a worker's share.
    """

    parameters: int
    cluster: str
    global_batch: int
    workers: int
    nodes: int
    micro_batch: int
    accumulation: int
    precision: str
    zero_stage: int
    fit: Fit
    largest: Fit | None
    flops_per_step: float
    step: StepTime | None
    ceilings: Ceilings | None
    seconds_per_step: float | None
    peak_flops: float | None
    steps: int | None
    possible_workers: list[int]
    possible_micro_batches: list[int]
    notes: tuple[str, ...] = ()

    @property
    def samples_per_second(self) -> float | None:
        return self.global_batch / self.seconds_per_step if self.seconds_per_step else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs of a second over the peak."""
        if not self.seconds_per_step or not self.peak_flops:
            return None
        return self.flops_per_step / self.seconds_per_step / self.peak_flops

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


def plan(recipe: Recipe, cluster: Cluster, *, data_root: Path | None = None, sample: Batch | None = None) -> Plan:
    """The figures of one recipe on one cluster.

    Args:
        data_root: where relative folders of text encoders start.
        sample: of the data; see `Fitting`.
    Raises:
        UserError: the global batch does not divide among the workers or the micro-batch.
    Source: Chowdhery et al. 2022 (PaLM), appendix B: MFU counts forward and backward (twice the forward), no recomputation.
    """
    workers = workers_of(cluster, recipe.global_batch)
    most = cluster.workers[1] if isinstance(cluster.workers, tuple) else cluster.ranks
    together = cluster.sequence_parallel
    fitting = Fitting(recipe, cluster, data_root=data_root, sample=sample)
    auto = _found(fitting) if cluster.micro_batch == "auto" else None
    asked = cluster.fixed_micro_batch if auto is None else auto.micro_batch
    if asked is None and isinstance(cluster.workers, tuple):
        asked = fitting.sizes()[-1]  # what divides at every number of workers
    micro, repeats = accumulation(recipe.global_batch, workers // together, asked)
    fit = fitting.at(micro, workers=workers, checkpointing=None if auto is None else auto.activation_checkpointing)
    ceilings = ceilings_of(cluster)
    works = {} if ceilings is None else fitting.work()
    step = None if ceilings is None else _step(fitting, works, fit, workers, repeats, ceilings)
    counted = costs(recipe)["flops_per_sample"] if step is None else 3 * sum(work.flops for work in works.values())
    flops_per_step = counted * recipe.global_batch
    tflops = cluster.peak_tflops or (peak_tflops(ceilings.card) if ceilings else None)
    peak = tflops * 1e12 * workers if tflops else None
    seconds = None if step is None else step.seconds
    if step is None and peak and flops_per_step:
        seconds = flops_per_step * (4 / 3 if fit.activation_checkpointing else 1) / (peak * ASSUMED_MFU)
    return Plan(
        parameters=fitting.held.parameters,
        cluster=cluster.name,
        global_batch=recipe.global_batch,
        workers=workers,
        nodes=min(cluster.nodes, workers),
        micro_batch=micro,
        accumulation=repeats,
        precision=precision_of(cluster),
        zero_stage=cluster.zero_stage if cluster.engine == "deepspeed" else 0,
        fit=fit,
        largest=fit if fit.fits else next((one for one in fitting.candidates() if one.fits), None),
        flops_per_step=flops_per_step,
        step=step,
        ceilings=ceilings,
        seconds_per_step=seconds,
        peak_flops=peak,
        steps=recipe.steps,
        possible_workers=[w * together for w in divisors(recipe.global_batch) if w * together <= max(most, 1)],
        possible_micro_batches=micro_batches(recipe.global_batch, workers // together),
        notes=(*fitting.held.uncounted, *_of_several(recipe, sample)),
    )


def _found(fitting: Fitting) -> Fit:
    """What workers begin to try: the largest that fits, or the smallest."""
    sizes = list(fitting.candidates())
    return next((size for size in sizes if size.fits is not False), sizes[-1])


def _of_several(recipe: Recipe, sample: Batch | None) -> tuple[str, ...]:
    """What is not counted where several networks learn."""
    if len(recipe.trained()) == 1:
        return ()
    memory = "" if sample else "activations are those of the network that needs most, until the data are there: "
    return (
        f"{memory}a loss that goes through several networks at once takes more {'time' if sample else 'memory and time'}",
    )


def _step(
    fitting: Fitting, works: Mapping[str, Work], fit: Fit, workers: int, repeats: int, ceilings: Ceilings
) -> StepTime | None:
    """Time of a step; None where the work of a network cannot be counted."""
    recipe, cluster, precision = fitting.recipe, fitting.cluster, precision_of(fitting.cluster)
    if len(works) < len(recipe.trained()):
        return None
    layout = Layout(
        workers=workers,
        nodes=min(cluster.nodes, workers),
        degree=workers if is_sharding(cluster, workers) else 1,
        micro_batch=fit.micro_batch / cluster.sequence_parallel,
        accumulation=repeats,
        parameters=fitting.held.parameters,
        weight_bytes=WEIGHT[precision],
        recomputes=fit.activation_checkpointing,
        compiled=cluster.compile,
        resident=is_resident(fitting.held),
    )
    return step_time(works, layout, ceilings)


def workers_of(cluster: Cluster, global_batch: int) -> int:
    """The ranks that train; on an elastic cluster, the most that divide the global batch."""
    least, most = cluster.workers if isinstance(cluster.workers, tuple) else (cluster.ranks, cluster.ranks)
    return largest_workers(global_batch, least, most) if most > least else most


def as_json(planned: Plan) -> dict[str, Any]:
    """The figures as one object: bytes, seconds, FLOPs. Rates say where they are from; all else is modelled."""
    fit, step = planned.fit, planned.step
    return {
        "cluster": planned.cluster,
        "workers": planned.workers,
        "micro_batch": planned.micro_batch,
        "accumulation": planned.accumulation,
        "parameters": planned.parameters,
        "origin": "modelled",
        "memory": fit.memory,
        "memory_in_tensors": in_tensors(fit.memory),
        "memory_on_device": on_device(fit.memory),
        "device_limit": fit.device_limit,
        "fits": fit.fits,
        "largest_micro_batch": planned.largest and planned.largest.micro_batch,
        "with_recomputation": planned.largest and planned.largest.activation_checkpointing,
        "flops_per_step": planned.flops_per_step,
        "seconds_per_step": planned.seconds_per_step,
        "step": None if step is None else {**asdict(step), "bound": step.bound},
        "samples_per_second": planned.samples_per_second,
        "mfu": planned.mfu,
        "run_hours": planned.run_hours,
        "rates": {}
        if planned.ceilings is None
        else {name: r._asdict() for name, r in planned.ceilings.rates().items()},
        "uncounted": [*fit.uncounted, *planned.notes],
    }


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

    memory = planned.fit.memory
    rows = [(f"memory per rank, {name.replace('_', ' ')}", _size(size)) for name, size in memory.items()]
    device, host = on_device(memory), on_host(memory)
    rows.append(("memory per rank, in tensors", _size(in_tensors(memory))))
    rows.append(("memory per rank, in all", f"{within(device, planned.fit.device_limit)}: {_verdict(planned)}"))
    if host:
        rows.append(("memory per rank, on the host", within(host, planned.fit.host_limit)))
    return rows


def _verdict(planned: Plan) -> str:
    fit, largest = planned.fit, planned.largest
    if fit.fits:
        return "fits"
    if fit.fits is None:
        names = ", ".join(fit.uncounted)
        return f"not known: activations of {names} are not counted" if names else "limit unknown"
    if largest is None:
        return "does NOT fit; no micro-batch does"
    also = largest.activation_checkpointing and not fit.activation_checkpointing
    return f"does NOT fit; set cluster.micro_batch={largest.micro_batch}" + (
        " cluster.activation_checkpointing=true" if also else ""
    )


def _time_rows(planned: Plan) -> list[tuple[str, str]]:
    seconds, rate, step = planned.seconds_per_step, planned.samples_per_second, planned.step
    if not planned.flops_per_step:
        return [("time per step", UNCOUNTED)]
    if not seconds or not rate:
        return [("time per step", "unknown: the cluster file gives neither gpu nor peak_tflops")]
    if step is None:
        rows = [
            (
                "time per step",
                f"{_time(seconds)}, at an assumed MFU of {ASSUMED_MFU:.0%}: the cluster file names no gpu",
            )
        ]
    else:
        rows = [
            ("time per step, modelled", f"{_time(seconds)}: {_parts(step)}; bound by the {step.bound}"),
        ]
    rows += [
        ("samples per second", f"{rate:,.1f}"),
        ("model FLOP/s", _count(planned.flops_per_step / seconds, "FLOP/s")),
    ]
    if planned.mfu and step is not None:
        rows.append(("MFU, modelled", f"{planned.mfu:.1%}"))
    if step is not None and step.messages and planned.ceilings is not None:
        rows.append(("messages per step, modelled", _messages(step, planned.workers, planned.nodes, planned.ceilings)))
    if planned.steps:
        rows.append((f"time of {planned.steps:,} steps", _time(seconds * planned.steps)))
    if planned.ceilings is not None and step is not None:
        rows += [(f"{planned.ceilings.card}: {name}", _rate(rate)) for name, rate in planned.ceilings.rates().items()]
    return rows


def _messages(step: StepTime, workers: int, nodes: int, ceilings: Ceilings) -> str:
    links = [f"{ceilings.nvlink.value:g} GB/s within a node"] if workers > nodes else []
    links += [f"{ceilings.network.value:g} GB/s for each GPU between {nodes} nodes"] if nodes > 1 else []
    return f"{_time(step.messages)}, of which {_time(step.exposed)} is not hidden; {', '.join(links)}"


def _parts(step: StepTime) -> str:
    parts = {
        "matrix products": step.products,
        "attention": step.attention,
        "element-wise": step.elementwise,
        "recomputed": step.recomputed,
        "optimizer": step.optimizer,
        "messages that nothing hides": step.exposed,
        "host, beside": step.host,
    }
    return ", ".join(f"{name} {_time(seconds)}" for name, seconds in parts.items() if seconds)


def _rate(rate: Rate) -> str:
    """A rate with where it is from; several of one source have no number of their own."""
    return f"{f'{rate.value:g}, ' if rate.value else ''}{rate.origin} ({rate.source})"
