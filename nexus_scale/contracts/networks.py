"""What a network has, and what adapts one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A network, whose `forward` is the family's own: `forward(x, t, cond) -> y`, `forward(tokens, cond) -> logits`, `encode` / `decode`,
    generator, discriminator. What it leaves out of the members below has the default that stands here.
    """

    serves_as: Literal["", "autoencoder", "codec", "tokenizer"] = ""
    """What other runs may use a trained one as (`data.encoders: {moments: {run: name}}`, or `codes`): an autoencoder of images or clips, a
    codec of sound, a tokenizer of clips; empty: none of them."""

    num_classes: int = 0
    """Class numbers that it has an embedding of are below this; 0: it is told no classes."""

    share_sequence: Callable[[Any], None] | None = None
    """`share_sequence(group)`: from then on, while it trains, the ranks of the group are given the same samples and each computes a part of
    their tokens. Every rank returns the whole; the gradients that its parameters get are of its part, and the group's sum is the whole's.
    In eval mode each rank computes by itself. None: it cannot."""

    compiled: bool = False
    """Whether its blocks are compiled, which the engine says: what differs from batch to batch beside the values of tensors (lengths;
    whether something is padded at all) then comes to blocks in tensors (kernels/lengths.py), or not at all."""

    together: int = 1
    """Neighbours in the global batch that it computes together, as batch norms do: micro-batches must be multiples of it, which is checked
    before a worker starts."""

    differentiated_twice: bool = False
    """Whether a gradient through it is itself differentiated (`Objective.needs_whole`), which compiled blocks cannot. Set by its maker."""

    def init_weights(self) -> None:
        """Initialises all parameters from torch's global generator, in place. Never called by `__init__`."""
        raise NotImplementedError

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks: activation checkpointing, compilation and sharding need no other knowledge."""
        return ()

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...] | None:
        """Arguments of `forward` at the configured size, on any device, meta too. FLOPs, the dry run's activations and its time a step come
        from them. `lengths`: of sequences, by the name of their batch field. None: these figures are missing."""
        return None

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int | None:
        """Tokens of one sample, for tokens a second in the metrics; `sequence_parallel` must divide them. None: the figure is missing."""
        return None


@runtime_checkable
class Follower(Protocol):
    """A layer that learns of the global batch beside gradients, in buffers: running norms, the vectors of a spectral norm.

    The engine calls it after each optimizer step, whichever network the step trained, and on all ranks alike: so two workers learn what
    one learns. What `forward` keeps for it in training mode may not depend on how often a sample is computed, since blocks are computed
    again where activations are not kept.
    """

    def seen(self) -> Tensor:
        """What this rank saw since the last `follow`, (n,) float32 that add up over ranks; n may be 0. Nothing seen is zeros."""
        ...

    def follow(self, total: Tensor) -> None:
        """Updates the buffers by the sum of all ranks' `seen`, which it forgets. Where a batch was not finite nothing moves."""
        ...


class Adapter(Network):
    """A small network that changes what another one, its base, computes: `adapter(x, t, cond)` is the base's forward with the changes.

    It is made beside a base of its own on the meta device, which gives the shapes; `attach` puts the one that computes in its place. The
    base's other users see no changes: they apply within `at_work` alone. Changes are of two kinds: of what layers compute, for which an
    adapter hooks into them (`models/adapters/lora.py`); and tensors that it computes beforehand and that the base takes as arguments of
    its `forward` beside the conditions (`through` gives them): `residuals`, added at places that the base names; `image`, tokens that
    adapters of its attentions read.
    """

    at_works: bool = False
    base: Network

    def attach(self, base: Network) -> None:
        """Takes a base that computes; its parameters do not become the adapter's. Raises a ValueError for one of other layers."""
        raise NotImplementedError

    def merge(self) -> Network:
        """What draws: the base, with the changes in its own weights, in place; itself, where they are none of weights."""
        return self

    def unmerge(self) -> None:
        """Takes merged changes out of the base's weights again, up to rounding."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A context in which the base computes with the changes."""
        before, self.at_works = self.at_works, True
        try:
            yield
        finally:
            self.at_works = before

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call of the base, with the changes."""

        def adapted(*args: Any, **kwargs: Any) -> Any:
            with self.at_work():
                return call(*args, **kwargs)

        return adapted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, with the changes."""
        return self.through(self.base)(*args, **kwargs)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...] | None:
        return self.base.example_inputs(batch_size, text_tokens, device, lengths)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int | None:
        return self.base.tokens(text_tokens, lengths)
