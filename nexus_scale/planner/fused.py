"""What torch.compile would make of a network's blocks: which tensors the backward pass is left, and what the fused kernels read and write.

Nothing is compiled: AOTAutograd traces a block on the meta device, its min-cut partitioner says what is kept and what is computed again,
as it does in front of inductor, and operations that inductor would fuse are counted as one kernel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

PLAIN_ARGUMENTS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)
"""Arguments of a block, beside tensors, that become constants of its graph; a block that is given others is not traced."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


KERNELS_OF_THEIR_OWN = _names(
    "mm addmm bmm baddbmm convolution convolution_backward attention attention_backward embedding_dense_backward sort topk index_put "
    "cumsum _fft_r2c _fft_c2r"
)
"""Operations that nothing is fused into."""

VIEWS = _names(
    "view reshape permute transpose t expand slice select unsqueeze squeeze as_strided alias detach split split_with_sizes unbind getitem "
    "_unsafe_view diagonal unfold"
)
REDUCTIONS = _names("sum mean amax amin var var_mean prod any argmax")


@dataclass(frozen=True)
class Kernels:
    """The work of one pass through a graph.

    Attributes:
        bytes: what fused element-wise kernels read and write; products and attention are not among them.
        count: kernels that are launched.
        workspace: bytes that live at once within the pass and are neither given to it nor come out of it.
    """

    bytes: int = 0
    count: int = 0
    workspace: int = 0

    def __add__(self, other: Kernels) -> Kernels:
        return Kernels(self.bytes + other.bytes, self.count + other.count, max(self.workspace, other.workspace))


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet or node.target, "__name__", str(node.target))


def _bytes(node: fx.Node) -> int:
    return sum(
        leaf.numel() * leaf.element_size() for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)
    )


def _base(node: fx.Node) -> fx.Node:
    while _name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


class _Graph:
    """A graph's operations by what inductor does with them: a level is how many kernels of their own lie below an operation."""

    def __init__(self, graph: fx.Graph):
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.level: dict[fx.Node, int] = {}
        for node in graph.nodes:
            below = max((self.level[given] for given in node.all_input_nodes), default=0)
            self.level[node] = below + (_name(node) in KERNELS_OF_THEIR_OWN)
        self.fusible = [n for n in self.nodes if _name(n) not in VIEWS and _name(n) not in KERNELS_OF_THEIR_OWN]
        self.group = self._groups()

    def readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Who uses a node's values, through views."""
        for user in node.users:
            if _name(user) in VIEWS:
                yield from self.readers(user)
            else:
                yield user

    def _groups(self) -> dict[fx.Node, fx.Node]:
        """A representative of the kernel that each fusible operation is in: neighbours of one level."""
        parent = {node: node for node in self.fusible}

        def root(node: fx.Node) -> fx.Node:
            while parent[node] is not node:
                node = parent[node]
            return node

        for node in self.fusible:
            for given in map(_base, node.all_input_nodes):
                if given in parent and self.level[given] == self.level[node]:
                    parent[root(node)] = root(given)
        return {node: root(node) for node in self.fusible}

    def is_written(self, node: fx.Node) -> bool:
        """Whether a fusible operation's result goes to memory: something outside of its kernel reads it."""
        return any(self.group.get(reader) is not self.group[node] for reader in self.readers(node))


def kernels_of(module: fx.GraphModule) -> Kernels:
    """What fused kernels of a graph read and write, how many there are, and what lives between them."""
    graph = _Graph(module.graph)
    members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.fusible:
        members[graph.group[node]].append(node)
    total = 0
    for group, nodes in members.items():
        read: dict[tuple[fx.Node, int], int] = {}
        for given in (given for node in nodes for given in node.all_input_nodes):
            if graph.group.get(_base(given)) is not group and _bytes(given):
                whole = _bytes(_base(given))
                read[_base(given), min(_bytes(given), whole)] = min(_bytes(given), whole)
        # sums over different dimensions are different kernels, each of which reads all again
        passes = max(1, len({str(node.args[1:2]) for node in nodes if _name(node) in REDUCTIONS}))
        total += passes * sum(read.values()) + sum(_bytes(node) for node in nodes if graph.is_written(node))
    own = sum(_name(node) in KERNELS_OF_THEIR_OWN for node in graph.nodes)
    return Kernels(total, len(members) + own, _workspace(module.graph, graph))


def _workspace(order: fx.Graph, graph: _Graph) -> int:
    nodes = list(order.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    changes: dict[int, int] = defaultdict(int)
    for node in graph.nodes:
        own = _name(node) in KERNELS_OF_THEIR_OWN
        if not own and (node not in graph.group or not graph.is_written(node)):
            continue
        readers = list(graph.readers(node))
        if readers and not any(reader.op == "output" for reader in readers):
            changes[place[node]] += _bytes(node)
            changes[max(map(place.__getitem__, readers)) + 1] -= _bytes(node)
    alive = most = 0
    for i in sorted(changes):
        alive += changes[i]
        most = max(most, alive)
    return most


@dataclass
class Traced:
    """`graphs`: a block's forward and backward; empty where nothing of it learns."""

    call: Callable[..., Any]
    graphs: list[fx.GraphModule] = field(default_factory=list)

    @cached_property
    def kernels(self) -> tuple[Kernels, ...]:
        """The kernels of the forward and the backward graph."""
        return tuple(kernels_of(graph) for graph in self.graphs)


Traces = dict[Any, Traced]
"""The traced blocks of one recipe, by their structure and what they are called with: a block is traced once."""


@contextmanager
def as_compiled(blocks: Sequence[nn.Module], made: Traces) -> Iterator[Counter[Any]]:
    """Within it the blocks keep for their backward pass what compiled ones keep; yields how often each entry of `made` is called.

    Blocks of one structure that are called alike share a graph. A block that is given something else than tensors and plain values
    stays as it is: torch.compile would guard on it or break there.
    """
    calls: Counter[Any] = Counter()
    for block in blocks:
        block.forward = _stand_in(block, made, calls)
    try:
        yield calls
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _stand_in(block: nn.Module, made: Traces, calls: Counter[Any]) -> Callable[..., Any]:
    original = block.forward
    weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    structure = type(block), str(block), tuple((name, tuple(weight.shape)) for name, weight in weights.items())

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if not all(isinstance(leaf, (Tensor, *PLAIN_ARGUMENTS)) for leaf in leaves):
            return original(*args, **kwargs)
        key = structure, str(spec), tuple(map(_kind, leaves))
        if key not in made:
            made[key] = _trace(block, original, list(weights), spec, leaves)
        calls[key] += 1
        with _disable_current_modes():  # what counts operations would count those of the tracing
            return made[key].call(list(weights.values()), [leaf for leaf in leaves if isinstance(leaf, Tensor)])

    return call


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)


def _trace(block: nn.Module, original: Any, names: list[str], spec: Any, leaves: list[Any]) -> Traced:
    # Private to torch, and what inductor itself is called through; tests hold what they answer against autograd's own count.
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compute(weights: list[Tensor], tensors: list[Tensor]) -> Any:
        stand_in, given = block.forward, iter(tensors)
        args, kwargs = tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        block.forward = original
        try:
            return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), args, kwargs)
        finally:
            block.forward = stand_in

    def partition(*args: Any, **kwargs: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(*args, **{**kwargs, "compiler": "inductor"})
        made.graphs += [forward, backward]
        return forward, backward

    made = Traced(lambda *_: None)
    made.call = aot_function(
        compute, lambda graph, _: graph, partition_fn=partition, decompositions=select_decomp_table()
    )
    return made
