"""Networks beside a frozen one, whose answers are added at places within it: what ControlNets of all families share.

Source: Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Adapter, Cond, Network


class Residuals(Adapter):
    """An adapter that computes `residuals(x, t, cond)` beforehand, which its base takes under this name.

    Several of them may stand one before another: their residuals add up.

    Attributes:
        condition: what it follows, by its name in `cond`. `<condition>_scale` (B,), where it is there, is how much of it counts.
        twin: the copy of some of the base's layers, by the same names, that it begins with.
        base: not a part of it: its parameters are its own.
    """

    condition: str
    twin: Any

    def keep(self, base: Network) -> None:
        """Takes a base to compute with."""
        vars(self)["base"] = base
        self.num_classes, self.together = base.num_classes, base.together

    def attach(self, base: Network) -> None:
        there = {name: parameter.shape for name, parameter in base.named_parameters()}
        for name, parameter in self.twin.named_parameters():
            if name in there and there[name] != parameter.shape:
                raise ValueError(f"{name}: the adapter is for {tuple(parameter.shape)}; the base has {tuple(there[name])}")
        self.keep(base)

    def residuals(self, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """What is added, in the order of the base's places."""
        raise NotImplementedError

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def controlled(x: Tensor, t: Tensor, cond: Cond, residuals: Sequence[Tensor] = ()) -> Any:
            own = self.residuals(x, t, cond)
            strength = cond.get(f"{self.condition}_scale")
            if strength is not None:
                own = [part * strength.to(part.dtype).view(-1, *[1] * (part.ndim - 1)) for part in own]
            if residuals:
                own = [a + b for a, b in zip(own, residuals, strict=True)]
            with self.at_work():
                return call(x, t, cond, residuals=own)

        return controlled

    def given(self, cond: Cond) -> Tensor:
        """The condition that it follows.

        Raises:
            ValueError: it is not there.
        """
        if self.condition not in cond:
            raise ValueError(
                f"no {self.condition!r} among the conditions {sorted(cond)}; add it to objective.conditions and to the data"
            )
        return cond[self.condition]

    def example_condition(self, batch_size: int, device: torch.device | str) -> Tensor:
        """The condition at the configured size."""
        raise NotImplementedError

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...] | None:
        found = self.base.example_inputs(batch_size, text_tokens, device, lengths)
        if found is None:
            return None
        x, t, cond = found
        return x, t, {**cond, self.condition: self.example_condition(batch_size, device)}
