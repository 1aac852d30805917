"""Networks on the meta device, where they cost no memory: what a recipe asks for is looked at before anything is made of it.

A recipe may ask for a billion blocks, so that making them is bounded too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from nexus_scale.config.kinds import shown
from nexus_scale.config.registry import made
from nexus_scale.contracts import Network, UserError
from nexus_scale.rehearsal.flops import TooManyOperations

MOST_PARTS = 20_000
"""Modules and parameters of one network. SD3's 8 B have some 1,500."""
MOST_PARAMETERS = 10**14


def network_on_meta(cls: type[Any], arguments: Mapping[str, Any], where: str) -> Network:
    """A network of checked arguments, on the meta device.

    Raises:
        UserError: what its constructor refuses, or sizes that no machine holds: too many blocks, a tensor too large or without elements.
    """
    if not issubclass(cls, Network):
        raise UserError(f"{where}.name: {cls.__name__} is a part that networks are made of, not a network")
    with torch.device("meta"), _bounded(where):
        network: Network = made(cls, arguments, where)
    total = 0
    for name, parameter in network.named_parameters():
        total += parameter.numel()
        if not parameter.numel():
            raise UserError(f"{where}: {name} would have the shape {tuple(parameter.shape)}; every size is at least 1")
    if not 1 <= total <= MOST_PARAMETERS:
        raise UserError(f"{where}: would have {total:.3g} parameters; expected 1 to {MOST_PARAMETERS:.0e}")
    return network


@contextmanager
def _bounded(where: str) -> Iterator[None]:
    parts = 0

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > MOST_PARTS:
            raise UserError(f"{where}: has more than {MOST_PARTS:,} modules and parameters; expected a smaller depth")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refused(where: str, action: Callable[[], Any]) -> Any:
    """What `action` computes on the meta device; shapes that do not fit, or that no machine holds, are the recipe's mistake.

    Raises:
        UserError: names the place and what torch said.
        TooManyOperations: shapes may fit, but what computes does not end soon.
    """
    try:
        return action()
    except (UserError, TooManyOperations):
        raise
    except Exception as error:
        raise UserError(
            f"{where}: {shown(str(error).splitlines()[0] if str(error) else type(error).__name__)}"
        ) from error
