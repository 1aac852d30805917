"""Clusters of 1 to 16,384 GPUs for one recipe: how each would divide the work, how long it would take, and what failures would cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nexus_scale.config.recipe import Cluster, Recipe
from nexus_scale.contracts import UserError
from nexus_scale.planner.ceilings import Ceilings, Rate, ceilings_of
from nexus_scale.planner.failures import (
    NODE_HOURS_BETWEEN_FAILURES,
    Faults,
    Saving,
    daly,
    measured_saving,
    slowdown,
)
from nexus_scale.planner.fitting import Fit, Fitting
from nexus_scale.planner.holdings import is_resident, precision_of
from nexus_scale.planner.memory import WEIGHT, on_device
from nexus_scale.planner.roofline import Layout, StepTime, step_time
from nexus_scale.planner.work import Work
from nexus_scale.rehearsal.peaks import peak_tflops

MOST_GPUS = 16_384
IN_A_NODE = 8


@dataclass(frozen=True)
class Row:
    """The fastest way found to train on a number of GPUs.

    Attributes:
        degree: ranks that share one copy of the states. `built`: whether an engine of this project shards so: over all ranks, or not.
        fit: memory of a rank.
        hours: of the steps alone. hours_in_all: with saves, failures and what they make to be done again, expected.
        save_every_s: of training between saves. failures: expected in the run.
        cost: of all GPUs for `hours_in_all`, None without a price.
    """

    gpus: int
    nodes: int
    degree: int
    built: bool
    accumulation: int
    fit: Fit
    step: StepTime
    mfu: float
    samples_per_second: float
    hours: float
    hours_in_all: float
    save_every_s: float
    failures: float
    cost: float | None


@dataclass(frozen=True)
class Left:
    """A number of GPUs that cannot train the recipe, and why."""

    gpus: int
    why: str


class Search:
    """Rows for one recipe.

    Args:
        cluster: its precision, its settings of compilation and its cards; workers and nodes are searched.
        node_hours: mean hours between failures of one node.
        price: of one GPU for an hour, in any currency.
    Raises:
        UserError: the cluster file names no GPU of known rates, or no network's work can be counted.
    """

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        *,
        node_hours: Rate = NODE_HOURS_BETWEEN_FAILURES,
        price: float | None = None,
        data_root: Path | None = None,
        in_a_node: int | None = None,
    ):
        ceilings = ceilings_of(cluster)
        if ceilings is None:
            raise UserError(f"{cluster.name}: --search needs to know the GPU; set cluster.gpu=H100 or H200")
        if cluster.sequence_parallel > 1:
            raise UserError("--search divides no samples among ranks; set cluster.sequence_parallel=1")
        self.ceilings: Ceilings = ceilings
        self.peak = 1e12 * (cluster.peak_tflops or peak_tflops(ceilings.card) or math.nan)
        self.recipe, self.price, self.node_hours = recipe, price, node_hours
        self.in_a_node = in_a_node or max(IN_A_NODE, cluster.ranks // cluster.nodes)
        self.saving: Saving = measured_saving()
        alone = cluster.model_copy(update={"workers": 1, "nodes": 1, "micro_batch": None})
        self._fitting = Fitting(recipe, alone, data_root=data_root)
        self.works: dict[str, Work] = self._fitting.work()
        if len(self.works) < len(recipe.trained()):
            raise UserError(
                "--search: the work of some networks cannot be counted, as they offer no example_inputs or take too long: "
                f"{', '.join(sorted(set(recipe.trained()) - set(self.works)))}; leave out --search, or see CONTRIBUTING.md"
            )

    def rows(self, most: int = MOST_GPUS) -> Iterator[Row | Left]:
        """For 1, 2, 4, ... GPUs."""
        for power in range(most.bit_length()):
            yield self.row(1 << power)

    def row(self, gpus: int) -> Row | Left:
        """The fastest way to train on so many GPUs, or why there is none."""
        if self.recipe.global_batch % gpus:
            return Left(gpus, f"global batch {self.recipe.global_batch:,} does not divide among them")
        found = [row for degree in self._degrees(gpus) if (row := self._best(gpus, degree)) is not None]
        return min(found, key=lambda row: row.hours_in_all) if found else Left(gpus, "no micro-batch fits")

    def _degrees(self, gpus: int) -> list[int]:
        return sorted({1, min(gpus, self.in_a_node), gpus})

    def _best(self, gpus: int, degree: int) -> Row | None:
        """The fastest of micro-batches and of recomputing blocks or not, sharded over `degree` ranks."""
        nodes = max(1, gpus // self.in_a_node)
        share = {"engine": "replicated"} if degree == 1 else {"engine": "deepspeed", "zero_stage": 3}
        cluster = self._fitting.cluster.model_copy(update={"workers": gpus, "nodes": nodes, **share})
        fitting = self._fitting.on(cluster)
        largest: dict[bool, Fit] = {}
        for size in fitting.sizes()[::-1]:
            for recomputes in (False, True) if fitting.can_recompute else (False,):
                fit = fitting.at(size, checkpointing=recomputes, workers=degree)
                if fit.fits is not False and recomputes not in largest:
                    largest[recomputes] = fit
        rows = [self._row(cluster, degree, fit) for fit in largest.values()]
        return min(rows, key=lambda row: row.hours_in_all) if rows else None

    def _row(self, cluster: Cluster, degree: int, fit: Fit) -> Row:
        gpus, held = cluster.ranks, self._fitting.held
        accumulation = self.recipe.global_batch // (gpus * fit.micro_batch)
        layout = Layout(
            gpus, cluster.nodes, degree, fit.micro_batch, accumulation, held.parameters, WEIGHT[precision_of(cluster)],
            fit.activation_checkpointing, cluster.compile, is_resident(held),
        )  # fmt: skip
        step = step_time(self.works, layout, self.ceilings)
        hours = step.seconds * self.recipe.steps / 3600
        state = 4.0 * (held.parameters + held.moments + held.averaged) / cluster.nodes
        faults = Faults(
            self.node_hours.value * 3600 / cluster.nodes, self.saving.block_s(state), self.saving.recover_s(state)
        )
        interval = max(
            daly(faults), self.saving.save_s(state), step.seconds
        )  # one save is not begun before the last is done
        in_all = hours * slowdown(interval, faults)
        flops = 3 * sum(work.flops for work in self.works.values())
        rate = self.recipe.global_batch / step.seconds
        return Row(
            gpus=gpus,
            nodes=cluster.nodes,
            degree=degree,
            built=degree in (1, gpus),
            accumulation=accumulation,
            fit=fit,
            step=step,
            mfu=flops * rate / (gpus * self.peak),
            samples_per_second=rate,
            hours=hours,
            hours_in_all=in_all,
            save_every_s=interval,
            failures=in_all * 3600 / faults.mean_s,
            cost=None if self.price is None else in_all * gpus * self.price,
        )


def as_json(rows: Sequence[Row | Left], search: Search) -> dict[str, Any]:
    """The rows, and where what they are made of is from."""
    saving = search.saving
    return {
        "origin": "modelled",
        "rows": [asdict(row) for row in rows if isinstance(row, Row)],
        "left_out": [asdict(row) for row in rows if isinstance(row, Left)],
        "price_per_gpu_hour": search.price,
        "node_hours_between_failures": search.node_hours._asdict(),
        "rates": {name: rate._asdict() for name, rate in search.ceilings.rates().items()},
        "saving": {name: getattr(saving, name)._asdict() for name in ("blocking", "written", "read", "restart")},
    }


def sources(search: Search) -> str:
    """Where what the rows are made of is from, a line each."""
    rates = {
        **{f"{search.ceilings.card}: {name}": rate for name, rate in search.ceilings.rates().items()},
        "hours between failures of a node": search.node_hours,
        "a save stops training, bytes a second of a node": search.saving.blocking,
        "a save is written, bytes a second of a node": search.saving.written,
        "a load, bytes a second of a node": search.saving.read,
        "from a failure to training, without the load, s": search.saving.restart,
    }
    return "\n".join(
        f"{name}: {rate.value:.4g}, {rate.origin} ({rate.source})" for name, rate in rates.items() if rate.value
    )


def search_table(rows: list[Row | Left], price: float | None) -> str:
    """The rows as aligned text."""
    header = [
        "GPUs",
        "sharded over",
        "micro-batch",
        "recompute",
        "GiB",
        "ms a step",
        "bound by",
        "MFU",
        "samples/s",
        "hours",
        "failures",
        "save every",
        "hours in all",
        "GPU hours",
    ]
    lines = [[*header, *(["cost"] if price is not None else [])]]
    told = []
    for row in rows:
        if isinstance(row, Left):
            told.append(f"{row.gpus:,} GPUs: {row.why}")
            continue
        lines.append(
            [
                f"{row.gpus:,}",
                f"{row.degree:,}{'' if row.built else ' *'}",
                f"{row.fit.micro_batch} x {row.accumulation}",
                "yes" if row.fit.activation_checkpointing else "no",
                f"{on_device(row.fit.memory) / 2**30:.1f}",
                f"{row.step.seconds * 1e3:,.1f}",
                row.step.bound,
                f"{row.mfu:.1%}",
                f"{row.samples_per_second:,.0f}",
                f"{row.hours:,.1f}",
                f"{row.failures:,.2f}",
                f"{row.save_every_s / 60:,.1f} min",
                f"{row.hours_in_all:,.1f}",
                f"{row.hours_in_all * row.gpus:,.0f}",
                *([f"{row.cost:,.0f}"] if row.cost is not None else []),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    if any(isinstance(row, Row) and not row.built for row in rows):
        told.append("* no engine of this project shards within groups: what one would gain")
    return "\n".join([*shown, *told])
