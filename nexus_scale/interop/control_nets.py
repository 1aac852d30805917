"""What ControlNets' formats share: settings and tensors of the copy are those of the network that it copies, in that network's format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from nexus_scale.contracts import ReadShard
from nexus_scale.interop.formats import Format, Key, Table
from nexus_scale.interop.published import Begin, Readers, begins_alike

TWIN = "twin."


def settings_of(network: Format, without: Collection[str]) -> dict[str, Key]:
    """The settings of a network's config, but some, as its copy has them."""

    def of_twin(key: Key) -> Callable[[Any], Any]:
        return lambda net: getattr(net.twin, key.ours) if isinstance(key.ours, str) else key.ours(net.twin)

    return {
        name: Key(key.default, of_twin(key), key.valid) for name, key in network.config.items() if name not in without
    }


def table_of(network: Format, own: Table) -> Callable[[Any], Table]:
    """The network's table for the layers that its copy has, and the rows beside it."""

    def table(net: Any) -> Table:
        copied = {ours: row for ours, row in network.table(net.twin).items() if hasattr(net.twin, ours.split(".")[0])}
        return {**{f"{TWIN}{ours}": row for ours, row in copied.items()}, **own}

    return table


def from_base(may_differ: Collection[str]) -> Begin:
    """A ControlNet begins with the weights of the network that it copies; what is added starts fresh.

    Args:
        may_differ: arguments of the network in which the copy may differ.
    """

    def begin(ours: Any, theirs: Any, read: ReadShard, what: str) -> Readers:
        copied: Mapping[str, Any] = begins_alike(may_differ=tuple(may_differ))(ours.twin, theirs, read, what)
        return {f"{TWIN}{name}": reads for name, reads in copied.items()}

    return begin
