"""How many bytes of tensors live at once, on any device, the meta device too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Within it `peak` is the most that storages made within it took at once; `own` are those that do not count."""

    def __init__(self, own: Sequence[Tensor]):
        super().__init__()
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._held: dict[int, Any] = {}  # weak references, whose end says that a storage is freed
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._own or key in self._held:
            return

        def freed(_: Any) -> None:
            self._held.pop(key, None)
            self.now -= size

        self.now += size
        self._held[key] = weakref.ref(storage, freed)


def peak_of_passes(network: nn.Module, call: Callable[[], Any], inputs: Sequence[Tensor]) -> int:
    """The most bytes that live at once in a forward and a backward pass of a network, without its own tensors and the gradients of its
    parameters, each of which is dropped as it comes."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in network.parameters() if p.requires_grad]
    live = Live([*network.parameters(), *network.buffers(), *inputs])
    try:
        with torch.enable_grad(), live:
            roots = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, Tensor) and leaf.requires_grad]
            torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    finally:
        for hook in hooks:
            hook.remove()
    return live.peak
