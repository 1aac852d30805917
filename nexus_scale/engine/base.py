"""What all engines share: state as shards of logical tensors, averages, and which networks learn.

An engine itself decides how gradients are reduced (backward, step), what a rank holds (`Partition`), and how masters
become the weights that compute (`refresh`).
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_scale.config.schema import Average
from nexus_scale.contracts import Adapter, Follower, Network, ReadShard, Shard, Trains, UserError, names_of
from nexus_scale.engine import blocks, distributed
from nexus_scale.engine.ema import MovingAverage
from nexus_scale.engine.networks import Caller, persistent_buffers, without_gradients
from nexus_scale.engine.settings import EngineSettings, NetSpec

AT_ONCE = 1 << 22
"""Values of a tensor that are read together: 16 MB in float32."""


def part_of(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop), the part of a flat tensor that a rank writes where each holds the whole: ceil(N / W) values."""
    chunk = -(-numel // world_size)
    return min(rank * chunk, numel), min((rank + 1) * chunk, numel)


def _combined(
    values: Iterable[Tensor | float], of_tensors: Callable[[Tensor], Tensor], of_numbers: Callable[..., float]
) -> Tensor | float:
    """One figure of several: on the device if they are there, which is then not waited for."""
    figures = list(values)
    tensors = [value for value in figures if isinstance(value, Tensor)]
    return of_tensors(torch.stack(tensors)) if len(tensors) == len(figures) else of_numbers(*map(float, figures))


@dataclass
class Partition:
    """What a rank holds of one network: flat views, one per parameter, all lists in the same order.

    Attributes:
        masters: values that the optimizer updates, float32; of a parameter that does not learn, the weights themselves.
        starts: index of masters[i][0] in the flattened logical tensor.
        moments: by the optimizer's names for them, None where a parameter does not learn.
        sharded: the views are this rank's parts; otherwise each rank holds everything.
        storages: the tensors that the masters are views of: what optimizers and averages work on.
        places: for each master the number of its storage, and where it lies there.
    """

    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    moments: list[dict[str, Tensor] | None] = field(default_factory=list)
    sharded: bool = False
    storages: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, slice]] = field(default_factory=list)

    def add(
        self, name: str, shape: tuple[int, ...], start: int, master: Tensor, moments: dict[str, Tensor] | None
    ) -> None:
        self.names.append(name)
        self.shapes.append(shape)
        self.starts.append(start)
        self.masters.append(master)
        self.moments.append(moments)
        self.places.append((len(self.storages), slice(0, master.numel())))
        self.storages.append(master)

    def cut(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Views like the masters of tensors like the storages (an average's)."""
        return [values[number][where] for number, where in self.places]

    def wholes(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor whole, flat, in float32, by name. A collective where they are sharded."""
        for name, held in zip(self.names, self.cut(values), strict=True):
            yield name, held.detach().float()


def whole_partition(module: nn.Module) -> Partition:
    """The partition of a frozen network that every rank holds whole."""
    partition = Partition()
    for name, parameter in module.named_parameters():
        partition.add(name, tuple(parameter.shape), 0, parameter.detach().view(-1), None)
    return partition


class BaseEngine(abc.ABC):
    """See contracts.Engine."""

    nets: dict[str, Any]

    def __init__(
        self,
        specs: Mapping[str, NetSpec],
        averages: Mapping[str, Average],
        settings: EngineSettings,
        called: Collection[str] = (),
    ):
        self.settings = settings
        self.device = distributed.resolve_device(settings.device)
        self.rank, self.world_size = distributed.rank_and_world_size()
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.specs = dict(specs)
        self.modules: dict[str, Network] = {}
        self.partitions: dict[str, Partition] = {}
        self.nets = {}
        self._average_specs = dict(averages)
        self.averages: dict[str, MovingAverage] = {}
        self._called = [name for name in averages if name in called]
        self._follow: dict[str, Callable[[], None]] = {}
        self._up_to_date: set[int] = set()  # averages that the optimizer's step has moved in this step, by their id
        self._learning: dict[str, list[nn.Parameter]] = {}
        self._followers: list[Follower] = []
        for name, spec in specs.items():
            if spec.learns and spec.optimizer is None:
                raise UserError(f"network {name!r} is trained but has no optimizer; give it one, or set frozen: true")
        self._adapted = {spec.adapts for spec in specs.values() if spec.adapts}
        for name, average in averages.items():
            if average.average_of not in specs or not specs[average.average_of].learns:
                trained = [n for n, s in specs.items() if s.learns]
                raise UserError(
                    f"average {name!r} is of {average.average_of!r}, which is not a trained network; trained networks: {trained}"
                )

    def _finish(self) -> None:
        """Completes the engine once its networks are built: adapters on their bases, averages, and shared sequences."""
        for name, network in self.modules.items():
            if self.specs[name].adapts:
                self.nets[name] = self._on_its_base(network, self.specs[name])
        self._learning = {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in self.modules.items()
            if self.specs[name].learns
        }
        layers = [layer for name in self._learning for layer in self.modules[name].modules()]
        self._followers = [layer for layer in layers if isinstance(layer, Follower)]
        if self.settings.sequence_parallel > 1:
            self._share_sequences(self.settings.sequence_parallel)
        for name, spec in self._average_specs.items():
            self.averages[name] = MovingAverage(spec, self.partitions[spec.average_of].storages, self.settings.steps)
        for name in self._called:
            self._make_callable(name, self.averages[name])
        self._follow_averages()

    def _on_its_base(self, network: nn.Module, spec: NetSpec) -> Caller:
        """The call of an adapter: its base's, with its changes."""
        assert isinstance(network, Adapter)
        base = self.nets[spec.adapts]
        network.attach(self.modules[spec.adapts])
        for block in self.modules[spec.adapts].blocks():
            vars(block).setdefault(blocks.ADAPTERS, []).append(network)
        caller = base if isinstance(base, Caller) else Caller(base, base, torch.float32)
        return caller.adapted(network)

    def _call_of_average(self, twin: nn.Module, spec: NetSpec) -> Caller:
        """The call of an average, by a copy of its network that holds its values."""
        if spec.adapts:
            return self._on_its_base(twin, spec).without_gradients()
        return Caller(twin, without_gradients(twin), self.dtype)

    def _share_sequences(self, ranks: int) -> None:
        """Tells trained networks which ranks share their sequences. A collective.

        Raises:
            UserError: a network cannot share its sequences.
        """
        group = distributed.neighbours(ranks)
        for name in self._learning:
            module = self.modules[self.specs[name].adapts or name]
            share = module.share_sequence
            if share is None:
                raise UserError(
                    f"network {name!r} ({type(module).__name__}) has no share_sequence, which cluster.sequence_parallel = "
                    f"{ranks} needs; set it to 1"
                )
            share(group)

    # ------------------------------------------------------------------------------------------ learning

    @contextmanager
    def training(self, trains: Trains) -> Iterator[None]:
        names = names_of(trains)
        for name in names:
            if name not in self._learning:
                trained = sorted(self._learning)
                raise UserError(f"phase trains {name!r}, which is not a trained network; trained networks: {trained}")
        resting = [p for other, parameters in self._learning.items() if other not in names for p in parameters]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    @abc.abstractmethod
    def backward(self, trains: Trains, loss: Tensor, last: bool) -> None: ...

    @staticmethod
    def _guarded(loss: Tensor) -> Tensor:
        """The same loss, to the bit, whose gradient is NaN where the loss is not finite. A loss that overflows can leave gradients that
        look sound; NaN reaches all ranks with the gradients, and all skip the step without another message.
        """
        value = loss.detach()
        return loss * (value - value + 1.0)

    def _for_backward(self, loss: Tensor) -> Tensor:
        """The guarded loss, multiplied by the number of ranks that share a sequence. Each has the gradient of its own tokens, and the
        step needs their sum, but takes a mean over ranks."""
        together = self.settings.sequence_parallel
        return self._guarded(loss) * together if together > 1 else self._guarded(loss)

    def step(self, trains: Trains, step: int, last: bool = False) -> Mapping[str, Tensor | float]:
        """See contracts.Engine."""
        said = {name: self._step(name, step, last) for name in names_of(trains)}
        self._follow_batch()
        first = next(iter(said.values()))
        if len(said) == 1:
            return first
        norms = {f"grad_norm_{name}": one["grad_norm"] for name, one in said.items()}
        return {
            "lr": first["lr"],
            "grad_norm": _combined(norms.values(), torch.linalg.vector_norm, math.hypot),
            "skipped": _combined([one["skipped"] for one in said.values()], torch.max, max),
            **{f"lr_{name}": one["lr"] for name, one in said.items()},
            **norms,
        }

    @abc.abstractmethod
    def _step(self, name: str, step: int, last: bool) -> Mapping[str, Tensor | float]:
        """Of one network."""

    @torch.no_grad()
    def _follow_batch(self) -> None:
        """Tells layers that learn beside gradients what the global batch showed them, by one message. A collective."""
        if self._followers:
            seen = [layer.seen() for layer in self._followers]
            total = torch.cat(seen)
            total = self.sum_over_ranks(total) if total.numel() else total
            for layer, part in zip(self._followers, total.split([one.numel() for one in seen]), strict=True):
                layer.follow(part)

    def update_averages(self, step: int) -> None:
        for average in self.averages.values():
            if id(average) not in self._up_to_date:
                average.update(step)
        self._up_to_date.clear()
        self._follow_averages()

    def _averages_beside(self, name: str) -> list[MovingAverage]:
        """Averages of a network that may move with its last update of a step: nothing computes with them before the step ends."""
        return [
            average
            for key, average in self.averages.items()
            if average.spec.average_of == name and key not in self._called
        ]

    def _moved(self, averages: Sequence[MovingAverage], step: int) -> None:
        """Notes that the optimizer's step has moved them."""
        for average in averages:
            average.update_rest(step)
            self._up_to_date.add(id(average))

    def _follow_averages(self) -> None:
        """Brings callable averages up to date. A collective."""
        for follow in self._follow.values():
            follow()

    @abc.abstractmethod
    def _make_callable(self, name: str, average: MovingAverage) -> None:
        """Adds an average to `nets`, and to `_follow` the function that copies its newest values to where they compute."""

    @torch.no_grad()
    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """See contracts.Engine. Travels as gradients do: on the device, however large."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    # ------------------------------------------------------------------------------------------ averages in use

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        if name not in self.averages and name not in self.modules:
            raise UserError(
                f"weights of {name!r}: no such network or average; known: {sorted([*self.modules, *self.averages])}"
            )
        modes = {net: module.training for net, module in self.modules.items()}
        for module in self.modules.values():
            module.eval()
        average = self.averages.get(name)
        try:
            with torch.no_grad():
                if average is None:
                    yield
                else:
                    with self._lent(average):
                        yield
        finally:
            for net, module in self.modules.items():
                module.train(modes[net])

    @abc.abstractmethod
    def _lent(self, average: MovingAverage) -> Any:
        """A context in which the average's values compute in place of the trained weights."""

    @abc.abstractmethod
    def _refresh(self, name: str) -> None:
        """Copies the masters to the weights that compute, after a load."""

    def regather(self) -> None:
        """See contracts.Engine."""
        for name in self.modules:
            self._refresh(name)
        self._follow_averages()

    # ------------------------------------------------------------------------------------------ state

    @abc.abstractmethod
    def _optimizer_steps(self, name: str) -> int: ...

    @abc.abstractmethod
    def _set_optimizer_steps(self, name: str, steps: int) -> None: ...

    @torch.no_grad()
    def shards(self) -> dict[str, Shard]:
        """See contracts.Engine. A collective: it first averages running estimates in buffers over ranks, in place, so that
        a run that continues and a run that resumes have the same."""
        found: dict[str, Shard] = {}
        for net in self._learning:
            partition = self.partitions[net]
            for i, name in enumerate(partition.names):
                self._cut(found, f"{net}/{name}.fp32", partition, i, partition.masters[i].float())
                for key, moment in (partition.moments[i] or {}).items():
                    self._cut(found, f"{net}/{name}.{key}", partition, i, moment)
            if self.rank == 0:
                found[f"{net}.optimizer_steps"] = Shard(torch.tensor([self._optimizer_steps(net)]), 0, (1,))
            self._average_buffers(self.modules[net])
            self._buffer_shards(found, net, net)
        for average_name, average in self.averages.items():
            partition = self.partitions[average.spec.average_of]
            for i, (name, held) in enumerate(zip(partition.names, partition.cut(average.values), strict=True)):
                self._cut(found, f"{average_name}/{name}.ema", partition, i, held.float())
            self._buffer_shards(found, average_name, average.spec.average_of)
        return found

    def _cut(self, found: dict[str, Shard], name: str, partition: Partition, i: int, held: Tensor) -> None:
        """Adds this rank's part of a tensor, of which it may hold the whole."""
        offset = partition.starts[i]
        start, stop = offset, offset + held.numel()
        if not partition.sharded:
            start, stop = part_of(held.numel(), self.rank, self.world_size)
        if stop > start:
            found[name] = Shard(held.detach()[start - offset : stop - offset], start, partition.shapes[i])

    def _buffer_shards(self, found: dict[str, Shard], prefix: str, net: str) -> None:
        if self.rank == 0:
            for name, buffer in persistent_buffers(self.modules[net]):
                found[f"{prefix}/{name}.buffer"] = Shard(buffer.detach().reshape(-1), 0, tuple(buffer.shape))

    def _average_buffers(self, module: nn.Module) -> None:
        """Averages buffers over ranks, in place: rank 0's value plus the mean deviation from it. A table that is equal on all ranks
        keeps its bits, where sum / W would round."""
        floating = [buffer for _, buffer in persistent_buffers(module) if buffer.is_floating_point() and buffer.numel()]
        if self.world_size == 1 or not floating:
            return
        own = torch.cat([buffer.reshape(-1).double().cpu() for buffer in floating])
        first = distributed.sum_over_ranks(own if self.rank == 0 else torch.zeros_like(own))
        mean = first + distributed.sum_over_ranks(own - first) / self.world_size
        for buffer, part in zip(floating, mean.split([b.numel() for b in floating]), strict=True):
            buffer.copy_(part.view(buffer.shape))

    @torch.no_grad()
    def load_shards(self, read: ReadShard) -> None:
        for net in self._learning:
            partition = self.partitions[net]
            for i, name in enumerate(partition.names):
                self._take(read, f"{net}/{name}.fp32", partition, i, partition.masters[i])
                for key, moment in (partition.moments[i] or {}).items():
                    self._take(read, f"{net}/{name}.{key}", partition, i, moment)
            self._set_optimizer_steps(net, int(read(f"{net}.optimizer_steps", 0, 1).item()))
            for name, buffer in persistent_buffers(self.modules[net]):
                buffer.copy_(read(f"{net}/{name}.buffer", 0, buffer.numel()).view(buffer.shape))
            self._refresh(net)
        for average_name, average in self.averages.items():
            partition = self.partitions[average.spec.average_of]
            for i, (name, held) in enumerate(zip(partition.names, partition.cut(average.values), strict=True)):
                self._take(read, f"{average_name}/{name}.ema", partition, i, held)
            for name, buffer in persistent_buffers(self.modules[average.spec.average_of]):
                # Its network's own, loaded already; read again, since a load must read every tensor.
                read(f"{average_name}/{name}.buffer", 0, buffer.numel())
        self._follow_averages()

    @torch.no_grad()
    def fill(self, name: str, read: ReadShard) -> None:
        """See contracts.Engine."""
        partition = self.partitions[name]
        copies = [partition.cut(a.values) for a in self.averages.values() if a.spec.average_of == name]
        for i, parameter_name in enumerate(partition.names):
            for values in (partition.masters, *copies):
                with contextlib.suppress(KeyError):  # what the reader does not have starts fresh
                    self._take(read, parameter_name, partition, i, values[i])
        for buffer_name, buffer in persistent_buffers(self.modules[name]):
            with contextlib.suppress(KeyError):  # what the network computes by itself is not read
                buffer.copy_(read(buffer_name, 0, buffer.numel()).view(buffer.shape))
        self._refresh(name)
        self._follow_averages()

    @staticmethod
    def _take(read: ReadShard, name: str, partition: Partition, i: int, held: Tensor) -> None:
        start = partition.starts[i]
        for at in range(0, held.numel(), AT_ONCE):
            part = held[at : at + AT_ONCE]
            part.copy_(read(name, start + at, start + at + part.numel()))

    def parameters(self, name: str) -> Iterable[tuple[str, Tensor]]:
        if name in self.averages:
            partition, values = self.partitions[self.averages[name].spec.average_of], self.averages[name].values
        elif name in self.partitions:
            partition, values = self.partitions[name], self.partitions[name].storages
        else:
            raise UserError(
                f"parameters of {name!r}: no such network or average; known: {sorted([*self.partitions, *self.averages])}"
            )
        shapes = dict(zip(partition.names, partition.shapes, strict=True))
        for parameter_name, whole in partition.wholes(values):
            yield parameter_name, whole.cpu().clone().view(shapes[parameter_name])
