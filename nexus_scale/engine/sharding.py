"""Networks cut into flat shards that DeepSpeed makes, and a rank's part of their tensors as checkpoints know it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_scale.config.schema import Optimizer
from nexus_scale.contracts import Network
from nexus_scale.engine import deepspeed_internals, distributed, optim
from nexus_scale.engine.base import Partition
from nexus_scale.engine.flat import Flat, Sharded, all_gather, grouped, lay_out, runs_of
from nexus_scale.engine.networks import build_network, build_to_be_filled, count_parameters, give_memory, place_buffers
from nexus_scale.engine.settings import EngineSettings, NetSpec


class Tag(NamedTuple):
    """What an optimizer tells apart among parameters."""

    learns: bool
    weight_decay: float
    lr_multiplier: float

    @classmethod
    def of(cls, parameter: nn.Parameter, spec: Optimizer | None) -> Tag:
        """The tag of a parameter, which was born with its `nexus_decay` and `nexus_lr_multiplier` (engine/optim.py)."""
        if spec is None or not parameter.requires_grad:
            return cls(False, 0.0, 1.0)
        (decay,), (multiplier,) = optim.tags_of([parameter], spec)
        return cls(True, decay, multiplier)


class FlatPartition(Partition):
    """A rank's part of a network over flat tensors.

    Attributes:
        runs: where the parts of one tag lie, in the order of `storages`.
    """

    def __init__(self, module: nn.Module, sharded: Sharded, masters: Tensor):
        super().__init__(sharded=True)
        self._layout, self._world_size = sharded.layout, sharded.world_size
        self.runs: list[tuple[slice, Tag]] = runs_of(sharded.layout, sharded.rank)
        self.storages = [masters[run] for run, _ in self.runs]
        held = {s.name: (start, where) for flat in self._layout for s, start, where in flat.held_by(sharded.rank)}
        for name, parameter in module.named_parameters():
            start, where = held[name]
            self.names.append(name)
            self.shapes.append(tuple(parameter.shape))
            self.starts.append(start)
            self.masters.append(masters[where])
            self.moments.append(None)
            self.places.append(self._place(where))

    def _place(self, where: slice) -> tuple[int, slice]:
        for number, (run, _) in enumerate(self.runs):
            if run.start <= where.start and where.stop <= run.stop:
                return number, slice(where.start - run.start, where.stop - run.start)
        return 0, slice(0, 0)  # nothing of it lies here

    def learn(self, moments: Mapping[str, Sequence[Tensor]]) -> None:
        """Takes the optimizer's moments of the runs that learn."""
        number = {i: n for n, i in enumerate(i for i, (_, tag) in enumerate(self.runs) if tag.learns)}
        for i, (run, where) in enumerate(self.places):
            if run in number:
                self.moments[i] = {key: values[number[run]][where] for key, values in moments.items()}

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Values of all runs, as the shards lie."""
        return torch.cat(list(values)) if len(values) > 1 else values[0]

    def wholes(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor whole, flat, in float32. A collective."""
        if not self.names:
            return
        mine = self.joined(values).detach().float()
        places = {segment.name: (flat, segment) for flat in self._layout for segment in flat.segments}
        last = {flat: name for name in self.names for flat in (places[name][0],)}
        gathered: dict[Flat, Tensor] = {}
        for name in self.names:  # in the network's order: a block is held from its first parameter to its last
            flat, segment = places[name]
            if flat not in gathered:
                gathered[flat] = mine.new_empty(flat.chunk * self._world_size)
                all_gather(gathered[flat], mine[flat.begin : flat.begin + flat.chunk])
            yield name, gathered[flat][segment.offset : segment.stop]
            if name == last[flat]:
                del gathered[flat]


class _Holder(nn.Module):
    def __init__(self, numel: int):
        super().__init__()
        self.flat = nn.Parameter(torch.empty(numel), requires_grad=False)


def shard_network(
    library: ModuleType,
    name: str,
    spec: NetSpec,
    settings: EngineSettings,
    device: torch.device,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype | None,
) -> tuple[Network, Sharded]:
    """A network with its first weights, sharded; no device ever holds more of a large one than a block.

    Args:
        gradient_dtype: of its gradients; None: it does not learn.
    """
    rank, world_size = distributed.rank_and_world_size()
    numel = count_parameters(spec)
    whole, large = settings.stays_whole(numel, spec.sharded and not spec.adapts), numel >= settings.partition_at_birth
    to_be_filled = build_to_be_filled(name, spec, settings)
    module = to_be_filled or (_on_meta(spec) if large else build_network(name, spec, settings.seed))
    groups = [] if whole else grouped(module.blocks(), settings.message_numel)
    # An average that computes lies as its network does, whose optimizer tells apart what decays: it is given values as they lie.
    layout = lay_out(module, groups, world_size, lambda parameter: Tag.of(parameter, spec.optimizer))
    if gradient_dtype is None:
        module.requires_grad_(False).eval()
    flats = _born(library, layout, world_size, dtype)
    shards = torch.zeros(sum(flat.chunk for flat in layout), dtype=dtype, device=device)
    for flat, parameter in zip(layout, flats, strict=True):
        if parameter is not None:
            deepspeed_internals.move_slice(parameter, shards[flat.begin : flat.begin + flat.chunk])
    if large:
        give_memory(module, lambda parameter: torch.empty(0, device=device))  # views of their flat tensor, later
    else:
        _write(layout, rank, dict(module.named_parameters()), shards)
    if large and to_be_filled is None:
        place_buffers(module, lambda buffer: torch.empty_like(buffer, device=device))
        _hand_out(library, name, spec, settings.seed, layout, flats, module)
    else:
        place_buffers(module, lambda buffer: buffer.to(device))
    return module, Sharded(
        module, groups, layout, shards, rank=rank, world_size=world_size, whole=whole,
        stays=numel <= settings.resident_numel, gradient_dtype=gradient_dtype,
    )  # fmt: skip


def _born(
    library: ModuleType, layout: Sequence[Flat], world_size: int, dtype: torch.dtype
) -> list[nn.Parameter | None]:
    """The flat tensors as DeepSpeed makes them, each sharded before the next is made; None where a unit has no parameters."""
    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # Its linear map would take torch's place in the whole process; torch 2.11 compiles it with gradient zero where it has a bias.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
    # The precision is in the configuration: given as an argument too, 0.19.8 takes bf16 for it where it finds no float16 support.
    with library.zero.Init(config_dict_or_path=config):
        return [_Holder(flat.chunk * world_size).flat if flat.chunk else None for flat in layout]


@torch.no_grad()
def _write(layout: Sequence[Flat], rank: int, named: Mapping[str, Tensor], shards: Tensor) -> None:
    """Writes a rank's part of whole tensors into its shards."""
    for flat in layout:
        for segment, start, where in flat.held_by(rank):
            shards[where] = (
                named[segment.name].detach().reshape(-1)[start : start + where.stop - where.start].to(shards)
            )


@torch.no_grad()
def _hand_out(
    library: ModuleType,
    name: str,
    spec: NetSpec,
    seed: int,
    layout: Sequence[Flat],
    flats: Sequence[nn.Parameter | None],
    module: nn.Module,
) -> None:
    """Gives all ranks the values of `build_network`, which rank 0 alone computes, in host memory. A collective."""
    original = build_network(name, spec, seed) if distributed.rank() == 0 else None
    named = {} if original is None else dict(original.named_parameters())
    for flat, parameter in zip(layout, flats, strict=True):
        if parameter is not None:
            with library.zero.GatheredParameters([parameter], modifier_rank=0):
                if original is not None:
                    parameter.zero_()
                    for segment in flat.segments:
                        parameter[segment.offset : segment.stop] = (
                            named[segment.name].detach().reshape(-1).to(parameter)
                        )
    buffers = {} if original is None else dict(original.named_buffers())
    for buffer_name, buffer in module.named_buffers():
        if original is not None:
            buffer.copy_(buffers[buffer_name])
        if dist.get_world_size() > 1:
            dist.broadcast(buffer, src=0)


def _on_meta(spec: NetSpec) -> Network:
    """A network that takes no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return spec.make()
