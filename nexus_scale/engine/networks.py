"""Networks as engines hold them: built from a seed, called in one precision, buffers by name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nexus_scale.contracts import Adapter, Network
from nexus_scale.engine.settings import EngineSettings, NetSpec

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

NOT_COMPUTING = frozenset({"blocks", "init_weights"})
"""Public methods of networks that compute nothing: they are answered without a forward."""


def seed_of(seed: int, name: str) -> int:
    """Seed of a network's initial weights: a function of the recipe's seed and the network's name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") & (2**63 - 1)


def build_network(name: str, spec: NetSpec, seed: int) -> Network:
    """A network with its first weights, on the CPU in float32: the same values on every rank, for any number of ranks.

    torch's global generator keeps its state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, name))
        network = spec.make()
        network.init_weights()
        if spec.fill is not None:
            spec.fill(network)
    if spec.frozen:
        network.requires_grad_(False).eval()
    return network


def build_bare(name: str, spec: NetSpec, seed: int) -> Network | None:
    """The network with parameters that have no values, on the meta device, one of them in memory at a time; its buffers are those of
    `build_network`. None where they are drawn, since each draw follows from those before it, or computed of parameters, which is said."""
    with torch.random.fork_rng(devices=[]), _parameters_without_values():
        torch.manual_seed(seed_of(seed, name))
        begun = torch.get_rng_state()
        network = spec.make()
        try:
            network.init_weights()
        except RuntimeError as error:  # what has no values was asked for them
            log.info(
                "network %r gets first values, though all are given elsewhere: %s", name, str(error).splitlines()[0]
            )
            return None
        if not torch.equal(begun, torch.get_rng_state()):
            return None
    return network.requires_grad_(False).eval() if spec.frozen else network


def build_to_be_filled(name: str, spec: NetSpec, settings: EngineSettings) -> Network | None:
    """A large network of which all is given elsewhere, without first values (`build_bare`); None for any other. A collective."""
    if spec.given is None:
        return None
    shapes = parameter_shapes(spec)
    if sum(map(torch.Size.numel, shapes.values())) < settings.partition_at_birth:
        return None
    return build_bare(name, spec, settings.seed) if set(shapes) <= set(spec.given()) else None


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Parameters that modules take within go to the meta device."""

    def taken(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if parameter.is_meta else like(parameter, parameter.detach().to("meta"))

    hook = register_module_parameter_registration_hook(taken)  # type: ignore[arg-type]  # torch's own says None
    try:
        yield
    finally:
        hook.remove()


def like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of other values, with the same tags."""
    made: Any = nn.Parameter(values, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def give_memory(network: nn.Module, memory_of: Callable[[nn.Parameter], Tensor]) -> None:
    """Puts another parameter, with this memory, in place of each; what modules share they go on sharing."""
    made: dict[int, nn.Parameter] = {}
    for owner in network.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = like(parameter, memory_of(parameter))
                owner._parameters[key] = made[id(parameter)]


def place_buffers(network: nn.Module, placed: Callable[[Tensor], Tensor]) -> None:
    """Puts another in place of each buffer; what modules share they go on sharing."""
    made = {id(buffer): placed(buffer) for buffer in network.buffers()}
    for owner in network.modules():
        held = owner._buffers
        held.update({key: made[id(value)] for key, value in held.items() if value is not None})


def place(network: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """The network on its device, with parameters in the precision that computes. Buffers stay in float32, as under
    DeepSpeed: running estimates and position tables would lose too much. Networks cast what they read of them."""
    network.to(device)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def parameter_shapes(spec: NetSpec) -> dict[str, torch.Size]:
    """Shapes of a network's parameters by name, found on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in spec.make().named_parameters()}


def count_parameters(spec: NetSpec) -> int:
    """The number of a network's parameters; nothing is allocated."""
    return sum(shape.numel() for shape in parameter_shapes(spec).values())


def persistent_buffers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state: those that `state_dict` has."""
    for prefix, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def cast(value: Any, dtype: torch.dtype, min_dims: int = 0) -> Any:
    """Floating tensors of at least `min_dims` dimensions in another precision, inside tuples, lists and mappings
    too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dim() >= min_dims else value
    if isinstance(value, Mapping):
        return {key: cast(item, dtype, min_dims) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(item, dtype, min_dims) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(cast(item, dtype, min_dims) for item in value)
    return value


def on_second_derivative(call: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
    """The same call, which also calls `tell()` when a gradient through its outputs is itself to be differentiated."""

    def hook(gradient: Tensor) -> None:
        if torch.is_grad_enabled():  # in a backward: whether it was asked to create a graph
            tell()

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        for tensor in _tensors_of(out):
            if tensor.requires_grad:
                tensor.register_hook(hook)
        return out

    return watched


def without_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, under `torch.no_grad()`."""

    def rested(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return rested


def twin_of(spec: NetSpec) -> Network:
    """A network of the same structure on the CPU, in eval mode, with uninitialised weights."""
    with torch.random.fork_rng(devices=[]):
        return spec.make().requires_grad_(False).eval()


def share_buffers(twin: nn.Module, network: nn.Module) -> None:
    """Gives a twin the buffers of its network: running estimates and tables are not averaged."""
    for prefix, owner in twin.named_modules():
        owner._buffers.update(network.get_submodule(prefix)._buffers)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_of(item)


class Caller:
    """A network as objectives see it, where they may not call the module itself.

    Each public method (`encode`, `decode`) goes through `call`, with the method standing in for `forward`: hooks, by
    which ZeRO-3 gathers parameters, run for it too. In reduced precision inputs are cast on the way in and outputs come
    back in float32; (B,) tensors stay as they are, because a time in bf16 would have 8 bits.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any], dtype: torch.dtype):
        self.module, self._call, self._dtype = module, call, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._dtype == torch.float32:
            return self._call(*args, **kwargs)
        out = self._call(*cast(args, self._dtype, min_dims=2), **cast(kwargs, self._dtype, min_dims=2))
        return cast(out, torch.float32)

    def adapted(self, adapter: Adapter) -> Caller:
        """The same network with the changes of an adapter, which is attached to it."""
        return Caller(self.module, adapter.through(self._call), self._dtype)

    def without_gradients(self) -> Caller:
        return Caller(self.module, without_gradients(self._call), self._dtype)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        own = (
            callable(getattr(type(self.module), name, None))
            and not hasattr(nn.Module, name)
            and name not in NOT_COMPUTING
        )
        if not own or name.startswith("_"):
            return value

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            del self.module.forward  # the method may call the module itself
            return value(*args, **kwargs)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.module.forward = stand_in
            try:
                return self(*args, **kwargs)
            finally:
                vars(self.module).pop("forward", None)

        return method
