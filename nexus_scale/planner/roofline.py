"""Time of a step from a roofline: what the networks do over what the cards and the links between them reach."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nexus_scale.planner.ceilings import Ceilings
from nexus_scale.planner.work import Work


@dataclass(frozen=True)
class Layout:
    """How a step is divided.

    Attributes:
        workers, nodes: that train.
        degree: ranks that share one copy of the states; 1: each rank has its own; workers: all share one.
        micro_batch, accumulation: samples of a rank at once (a part of one under sequence parallelism), and how many times per step.
        parameters: that are trained; `weight_bytes`: of one.
        resident: whether blocks stay gathered from their forward to their backward pass.
    """

    workers: int
    nodes: int
    degree: int
    micro_batch: float
    accumulation: int
    parameters: int
    weight_bytes: int
    recomputes: bool = False
    compiled: bool = True
    resident: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part.

    Attributes:
        products, attention, elementwise, recomputed, optimizer: of the device.
        host: of Python and launches, beside which the device works.
        messages: between ranks; `exposed`: of them what no computation hides.
        seconds: of the step.
    """

    products: float
    attention: float
    elementwise: float
    recomputed: float
    optimizer: float
    host: float
    messages: float
    exposed: float

    @property
    def passes(self) -> float:
        """Seconds of the device, forward and backward."""
        return self.products + self.attention + self.elementwise + self.recomputed

    @property
    def device(self) -> float:
        """Seconds of the device, which does all it is asked for while the host runs ahead."""
        return self.passes + self.optimizer

    @property
    def seconds(self) -> float:
        return max(self.device, self.host) + self.exposed

    @property
    def bound(self) -> str:
        """What bounds the step: the device, the host, or the links."""
        if self.exposed > max(self.device, self.host):
            return "links"
        return "host" if self.host > self.device else "device"


def step_time(works: Mapping[str, Work], layout: Layout, ceilings: Ceilings) -> StepTime:
    """Time of one step in which each network takes one forward and one backward pass a micro-batch."""
    samples = layout.micro_batch * layout.accumulation
    passes = [_passes(work, ceilings) for work in works.values()]
    products, attention, elementwise, forward = (samples * sum(one[i] for one in passes) for i in range(4))
    recomputed = forward if layout.recomputes else 0.0
    bandwidth = ceilings.copy.value * 1e9
    update = ceilings.optimizer_bytes.value * layout.parameters / layout.degree
    optimizer = update / (bandwidth * ceilings.shares["optimizer"].value)
    host = _host(works.values(), layout, ceilings)
    messages, first = _messages(works.values(), layout, ceilings)
    hidden = ceilings.shares["overlap"].value * max(products + attention + elementwise + recomputed, host)
    return StepTime(
        products, attention, elementwise, recomputed, optimizer, host, messages, max(messages - hidden, first)
    )


def _passes(work: Work, ceilings: Ceilings) -> tuple[float, float, float, float]:
    """Seconds of a sample: products, attention, element-wise kernels, forward and backward; and the forward pass alone, all together."""
    forward_products = work.products / (ceilings.matmul.value * 1e12)
    forward_attention = backward_attention = 0.0
    for call, times in work.attention.items():
        rates = ceilings.attention_rates(call.head_dim, max(call.queries, 1))
        forward_attention += times * call.flops / rates[0]
        backward_attention += times * 2.5 * call.flops / rates[1]  # scores are computed once more
    bandwidth = ceilings.copy.value * 1e9 * ceilings.shares["elementwise"].value
    forward_bytes, both = work.forward_bytes / bandwidth, (work.forward_bytes + work.backward_bytes) / bandwidth
    forward = forward_products + forward_attention + forward_bytes
    return 3 * forward_products, forward_attention + backward_attention, both, forward


def _host(works: Collection[Work], layout: Layout, ceilings: Ceilings) -> float:
    each = ceilings.host["compiled_us" if layout.compiled else "eager_us"].value
    launches = sum((2 if layout.recomputes else 1) * work.forward_kernels + work.backward_kernels for work in works)
    hooks = sum(2 * work.blocks for work in works) * ceilings.host["block_us"].value
    return 1e-6 * layout.accumulation * (each * launches + hooks)


def _messages(works: Collection[Work], layout: Layout, ceilings: Ceilings) -> tuple[float, float]:
    """Seconds of a step's messages, and of the first of them, which nothing hides.

    Within a group that shares one copy, each micro-batch gathers the weights twice, or once where blocks are resident, and reduces the
    gradients once; where there are several groups, they sum their parts of the gradients once a step.
    """
    if layout.workers == 1:
        return 0.0, 0.0
    blocks = max(1, sum(work.blocks for work in works) + 1)
    size = layout.weight_bytes * layout.parameters
    within = _collective(size, blocks, layout.degree, layout, ceilings)
    groups = layout.workers // layout.degree
    between = 2 * _collective(size / layout.degree, blocks, groups, layout, ceilings, spread=layout.degree)
    times = layout.accumulation * (2 if layout.resident else 3)
    return times * within + between, (within if layout.degree > 1 else between / 2) / blocks


def _collective(size: float, count: int, ranks: int, layout: Layout, ceilings: Ceilings, *, spread: int = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes among `ranks`, in `count` messages; of `spread`
    neighbours one is in the group."""
    if ranks == 1:
        return 0.0
    per_node = max(1, layout.workers // layout.nodes)
    members = max(1, min(ranks, per_node // spread))  # of a group in a node, whose adapters it has
    nodes = max(1, ranks // members)
    share = ceilings.shares["links"].value * 1e9
    inside = size * (ranks - 1) / ranks / (ceilings.nvlink.value * share) if members > 1 else 0.0
    across = size * (nodes - 1) / nodes / (members * ceilings.network.value * share) if nodes > 1 else 0.0
    each = ceilings.host["message_us"].value + ceilings.host["hop_us"].value * math.log2(nodes)
    return max(inside, across) + count * each * 1e-6
