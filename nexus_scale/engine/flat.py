"""A network's parameters in flat tensors, one per block, sharded over ranks and gathered while the block computes.

To the network its parameters stay what they are: each is a view of its block's flat tensor, whose memory is there only
while the block computes. Hooks stand at the blocks and at the network, none within, so what a block does may be compiled;
one message gathers a block, and one reduces its gradients. Blocks so small that a message costs more than what it carries
share one.

Source: Rajbhandari et al. 2020 (ZeRO-3); Zhao et al. 2023, "PyTorch FSDP" (flat parameters, memory that is resized).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

ALIGN = 64
"""Parameters begin at multiples of so many values: 128 bytes in bf16, which vectorised kernels and matrix products want."""

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# torch 2.13 renamed them, and warns in each call by the old name


class Segment(NamedTuple):
    """A parameter in its flat tensor: values [offset, stop)."""

    name: str
    shape: torch.Size
    offset: int
    tag: Any

    @property
    def stop(self) -> int:
        return self.offset + self.shape.numel()


@dataclass(frozen=True)
class Flat:
    """The flat tensor of one unit: its parameters by tag, each at a multiple of ALIGN, padded to a multiple of the ranks.

    Attributes:
        chunk: values of a rank: rank r holds [r * chunk, (r + 1) * chunk).
        begin: where a rank's chunk lies among its chunks of all units.
    """

    segments: tuple[Segment, ...]
    chunk: int
    begin: int

    def held_by(self, rank: int) -> Iterator[tuple[Segment, int, slice]]:
        """Each parameter with the number of its first value on a rank, and where the rank has its values, among those of all units."""
        first = rank * self.chunk
        for segment in self.segments:
            start = min(max(segment.offset, first), segment.stop, first + self.chunk)
            stop = max(start, min(segment.stop, first + self.chunk))
            at = self.begin + max(start - first, 0)
            yield segment, max(0, min(start - segment.offset, segment.shape.numel())), slice(at, at + stop - start)

    def runs(self, rank: int) -> Iterator[tuple[int, Any]]:
        """Where parameters of another tag begin in a rank's chunk, among its chunks of all units, and their tag."""
        for segment, _, where in self.held_by(rank):
            if where.stop > where.start:
                yield where.start, segment.tag

    def gaps(self, world_size: int) -> list[slice]:
        """Where no parameter lies."""
        found, at = [], 0
        for segment in self.segments:
            found.append(slice(at, segment.offset))
            at = segment.stop
        return [gap for gap in (*found, slice(at, self.chunk * world_size)) if gap.stop > gap.start]


Group = Sequence[nn.Module]
"""Blocks that share a flat tensor, in the order in which they compute."""


def grouped(blocks: Sequence[nn.Module], least: int) -> list[Group]:
    """Blocks that follow each other, together until they have `least` parameters."""
    groups: list[list[nn.Module]] = []
    numel = least
    for block in blocks:
        if numel >= least:
            groups.append([])
            numel = 0
        groups[-1].append(block)
        numel += sum(parameter.numel() for parameter in block.parameters())
    return list(groups)


def lay_out(
    network: nn.Module, groups: Sequence[Group], world_size: int, tag_of: Callable[[nn.Parameter], Any]
) -> list[Flat]:
    """The flat tensors of a network: the first has what is outside of blocks or shared by groups, then there is one for each group.

    Args:
        tag_of: what the optimizer tells apart; parameters of one tag lie together.
    """
    owner: dict[int, int] = {}
    within: set[int] = set()
    for number, group in enumerate(groups, 1):
        for block in group:
            within.update(map(id, block.modules()))
            for parameter in block.parameters():
                owner[id(parameter)] = number if owner.get(id(parameter), number) == number else 0
    for module in network.modules():
        if id(module) not in within:
            owner.update({id(parameter): 0 for parameter in module.parameters(recurse=False)})
    parts: list[dict[Any, list[tuple[str, torch.Size]]]] = [{} for _ in range(len(groups) + 1)]
    for name, parameter in network.named_parameters():
        parts[owner[id(parameter)]].setdefault(tag_of(parameter), []).append((name, parameter.shape))
    flats: list[Flat] = []
    begin = 0
    for part in parts:
        segments, offset = [], 0
        for tag, named in part.items():
            for name, shape in named:
                segments.append(Segment(name, shape, offset, tag))
                offset += -(-shape.numel() // ALIGN) * ALIGN
        chunk = -(-offset // (ALIGN * world_size)) * ALIGN
        flats.append(Flat(tuple(segments), chunk, begin))
        begin += chunk
    return flats


def runs_of(layout: Sequence[Flat], rank: int) -> list[tuple[slice, Any]]:
    """What a rank holds of all units, cut where the tag changes; padding goes with what is before it."""
    total = layout[-1].begin + layout[-1].chunk
    cuts: list[tuple[int, Any]] = []
    for flat in layout:
        for start, tag in flat.runs(rank):
            if not cuts or cuts[-1][1] != tag:
                cuts.append((start if cuts else 0, tag))
    held = {tag for _, tag in cuts}
    everyones = dict.fromkeys(segment.tag for flat in layout for segment in flat.segments)
    cuts += [(total if cuts else 0, tag) for tag in everyones if tag not in held]  # nothing of it lies here
    stops = [start for start, _ in cuts[1:]] + [total]
    return [(slice(start, stop), tag) for (start, tag), stop in zip(cuts, stops, strict=False)]


_PLAIN = (int, float, str, type(None), torch.Size, torch.dtype, torch.device)
"""What holds no tensors; anything else that a unit returns (a dataclass, a distribution) may."""


class _AfterBackward(torch.autograd.Function):
    """The identity, whose backward says that a block's inputs have their gradients: its weights have served."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        # Returned as they are they would be views, which a block could not change in place.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.unit.after_backward()
        return None, *gradients


class Unit:
    """What is gathered together: the parameters of a block or of a group of small ones, or those outside of blocks (number 0).

    Args:
        modules: the group's blocks; of number 0 the network.
        shard: this rank's chunk, live, in the precision that computes.
        named: the network's parameters; those of this unit become views of its flat tensor.
    """

    def __init__(
        self,
        sharded: Sharded,
        number: int,
        modules: Group,
        flat: Flat,
        shard: Tensor,
        named: dict[str, nn.Parameter],
    ):
        self.sharded, self.number, self.flat, self.shard = sharded, number, flat, shard
        self._last = modules[-1]
        self.gaps = flat.gaps(sharded.world_size)
        alone = not flat.chunk or (
            sharded.whole and sharded.world_size == 1
        )  # nothing to gather: the chunk is all there is
        self.memory = shard if alone else shard.new_empty(flat.chunk * sharded.world_size)
        self._storage = self.memory.untyped_storage()
        self._bytes = self._storage.nbytes()
        self.parameters = [named[segment.name] for segment in flat.segments]
        for segment, parameter in zip(flat.segments, self.parameters, strict=True):
            parameter.data = self.memory[segment.offset : segment.stop].view(segment.shape)
        if not alone:
            self._storage.resize_(0)  # until it is gathered for the first time
        self.gathered = self._alone = alone
        self._coming: Any = None
        self.reset()
        for module in modules if not sharded.whole else ():
            module.register_forward_pre_hook(self.before_forward, with_kwargs=True)
            module.register_forward_hook(self.after_forward, with_kwargs=True)

    # ------------------------------------------------------------------------------------------ weights

    def fetch(self) -> None:
        """Begins to gather, unless that is done. A collective."""
        if not self.gathered:
            self.gathered = True
            if self._storage.nbytes() != self._bytes:
                self._storage.resize_(self._bytes)
            self._coming = self.sharded.gather(self.memory, self.shard)

    def ready(self) -> None:
        """Has the weights there. A collective."""
        self.fetch()
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def release(self) -> None:
        """Gives the memory back; views of it stay, and see what is gathered next."""
        if self.gathered and not self._alone:
            self.ready()
            self.gathered = False
            self._storage.resize_(0)

    def renew(self) -> None:
        """Gathers anew. A collective."""
        self.gathered = self._alone
        self.ready()

    def reset(self) -> None:
        """Forgets calls that have begun: forwards that have not ended, and those whose backward has not."""
        self._depth = self._awaited = 0
        self._in_backward = self._hidden = False

    # ------------------------------------------------------------------------------------------ hooks

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.ready()
        if not self._in_backward:  # else it is computed again, and stays
            self._depth += 1
            self.sharded.fetch(self.number + 1)
        return self._watched(args, kwargs) if torch.is_grad_enabled() else None

    def _watched(self, args: Any, kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not where:
            return None
        self._awaited += not self._in_backward
        for i, tensor in zip(where, _AfterBackward.apply(self, *(leaves[i] for i in where)), strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, form)

    def after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._in_backward:
            return
        self._depth -= 1
        to_learn = hidden = False
        if torch.is_grad_enabled():
            for tensor in (output,) if isinstance(output, Tensor) else tree_flatten(output)[0]:
                if not isinstance(tensor, Tensor):
                    hidden = hidden or not isinstance(tensor, _PLAIN)
                elif tensor.requires_grad:
                    to_learn = True
                    tensor.register_hook(self.before_backward)
        # What is hidden stays until `finish`: nothing would gather it for its backward.
        self._hidden = self._hidden or hidden
        if self._depth == 0 and module is self._last and not self._hidden:
            self.sharded.computed(self, to_learn)

    def before_backward(self, gradient: Tensor) -> None:
        if not self._in_backward:
            self._in_backward = True
            # What is outside of blocks is there by now where the network's own output has a gradient, which a critic on its blocks has not.
            self.sharded.units[0].ready()
            self.ready()
            self.sharded.fetch(self.number - 1)

    def after_backward(self) -> None:
        self._awaited -= 1
        if self._awaited <= 0 and self.number:
            self.reset()
            self.sharded.reduce(self)
            self.release()


class Sharded:
    """A network over flat tensors, and this rank's chunks of them.

    Attributes:
        shards: this rank's chunks, one after the other, in the precision that computes.
        gradients: of the chunks, as means over ranks, after `finish`; None of a network that does not learn.
        whole: everything stays gathered, and `refresh` brings it up to date.
        stays: blocks that have computed stay until their backward, where there will be one.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[Group],
        layout: Sequence[Flat],
        shards: Tensor,
        *,
        rank: int,
        world_size: int,
        whole: bool,
        stays: bool = False,
        gradient_dtype: torch.dtype | None = None,
    ):
        self.shards, self.layout, self.rank, self.world_size = shards, list(layout), rank, world_size
        self.whole, self.stays = whole, stays
        self.gradients = None if gradient_dtype is None else torch.zeros_like(shards, dtype=gradient_dtype)
        self._reduced: set[int] = set()
        self._sent: list[tuple[Any, Unit, Tensor, Tensor]] = []
        named = dict(network.named_parameters())
        self.units = [
            Unit(self, number, modules, flat, shards[flat.begin : flat.begin + flat.chunk], named)
            for number, (modules, flat) in enumerate(zip([[network], *groups], layout, strict=True))
        ]
        self.refresh()

    def gather(self, whole: Tensor, mine: Tensor) -> Any:
        """Begins to gather a flat tensor; what to wait for, None where it is there. A collective, of several ranks."""
        if self.world_size == 1:
            whole.copy_(mine)
            return None
        return all_gather(whole, mine, async_op=True)

    def fetch(self, number: int) -> None:
        """Begins to gather a unit, where there is one of that number. A collective."""
        if 0 <= number < len(self.units):
            self.units[number].fetch()

    def computed(self, unit: Unit, to_learn: bool) -> None:
        """A unit has computed forward: releases what is not needed next."""
        last = unit.number == len(self.units) - 1
        if unit.number:
            if not (to_learn and (self.stays or last)):
                unit.release()
        elif not to_learn:
            self._release()

    def _release(self) -> None:
        if not self.whole:
            for unit in self.units:
                unit.release()

    @torch.no_grad()
    def refresh(self) -> None:
        """Lets what computes follow the shards: released, or gathered anew where everything stays. A collective."""
        for unit in self.units:
            unit.reset()
        self._release()
        for unit in self.units if self.whole else ():
            unit.renew()

    @torch.no_grad()
    def compute_with(self, values: Tensor) -> None:
        """Lets other values compute, this rank's part of them. A collective."""
        self.shards.copy_(values)
        self.refresh()

    # ------------------------------------------------------------------------------------------ gradients

    @torch.no_grad()
    def reduce(self, unit: Unit) -> None:
        """Sends a unit's gradients, where it has any, to the ranks whose chunks they are of. A collective."""
        flat, places, given = unit.flat, [], []
        if self.gradients is None or not any(parameter.grad is not None for parameter in unit.parameters):
            return
        sent = unit.shard.new_empty(flat.chunk * self.world_size)
        for gap in unit.gaps:
            sent[gap].zero_()
        for segment, parameter in zip(flat.segments, unit.parameters, strict=True):
            place = sent[segment.offset : segment.stop]
            if parameter.grad is None:
                place.zero_()
            else:
                places.append(place.view(segment.shape))
                given.append(parameter.grad)
                parameter.grad = None
        torch._foreach_copy_(places, given)
        if self.world_size == 1:
            self._add(unit, sent)
            return
        received = unit.shard.new_empty(flat.chunk)
        self._sent.append((reduce_scatter(received, sent, async_op=True), unit, sent, received))
        while len(self._sent) > 2:
            self._receive()

    def _receive(self) -> None:
        work, unit, _, received = self._sent.pop(0)
        work.wait()
        self._add(unit, received)

    def _add(self, unit: Unit, received: Tensor) -> None:
        """Adds to this rank's gradients the sum over ranks of a backward's, as a mean."""
        assert self.gradients is not None
        mine = self.gradients[unit.flat.begin : unit.flat.begin + unit.flat.chunk]
        if unit.number in self._reduced:
            mine.add_(received, alpha=1 / self.world_size)
        else:
            self._reduced.add(unit.number)
            torch.div(received, self.world_size, out=mine) if mine.dtype == received.dtype else mine.copy_(
                received
            ).div_(self.world_size)

    @torch.no_grad()
    def finish(self) -> None:
        """Completes a backward: sends the gradients that no hook has sent, and receives all. A collective."""
        for unit in reversed(self.units):
            self.reduce(unit)
            unit.reset()
        self._release()
        while self._sent:
            self._receive()

    @torch.no_grad()
    def taken(self) -> Tensor:
        """The gradients of all backwards since the last call; zero where there was none."""
        assert self.gradients is not None
        for unit in self.units:
            if unit.number not in self._reduced:
                self.gradients[unit.flat.begin : unit.flat.begin + unit.flat.chunk].zero_()
        self._reduced.clear()
        return self.gradients
