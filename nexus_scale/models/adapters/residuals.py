"""Networks beside a frozen one, whose answers are added at places within it: what ControlNets of all families share.

Source: Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Adapter, Cond, Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.patches import patchify


class ResidualAdapter(Adapter):
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
                raise ValueError(
                    f"{name}: the adapter is for {tuple(parameter.shape)}; the base has {tuple(there[name])}"
                )
        self.keep(base)

    def residuals(self, x: Tensor, t: Tensor, cond: Cond) -> Sequence[Tensor | None]:
        """What is added, in the order of the base's places; None: nothing."""
        raise NotImplementedError

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def controlled(x: Tensor, t: Tensor, cond: Cond, residuals: Sequence[Tensor | None] = ()) -> Any:
            own = self.residuals(x, t, cond)
            strength = cond.get(f"{self.condition}_scale")
            if strength is not None:
                own = [_times(part, strength) for part in own]
            if residuals:
                own = [_sum(a, b) for a, b in zip(own, residuals, strict=True)]
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


class OnTokens(ResidualAdapter):
    """A ControlNet of a transformer: the picture's latents join those of x as tokens, through a layer that starts at zero; what each copied
    block gives goes through another, and is added behind as many of the base's blocks as come to one of its own.
    """

    def __init__(self, base: Network, twin: Any, condition: str, condition_channels: int, projs: Mapping[str, int]):
        """
        Args:
            base: on the meta device.
            twin: its first blocks.
            condition_channels: of the picture's latents.
            projs: layers behind the twin's blocks, by the name of their list.
        """
        super().__init__()
        if condition_channels < 1:
            raise UserError(f"condition_channels: got {condition_channels}; expected at least 1")
        self.condition, self.condition_channels, self.twin = condition, condition_channels, twin
        self.patch_size, self.hidden_size = twin.patch_size, twin.hidden_size
        self.condition_embed = Linear(condition_channels * self.patch_size**2, self.hidden_size)
        for name, count in projs.items():
            self.add_module(name, nn.ModuleList(Linear(self.hidden_size, self.hidden_size) for _ in range(count)))
        self.projs = tuple(projs)
        self.keep(base)

    def proj(self, number: int, img: Tensor) -> Tensor:
        """What a block of the twin's, by its number, gives to the base."""
        layers = [layer for name in self.projs for layer in self.get_submodule(name).children()]
        out: Tensor = layers[number](img)
        return out

    def joined(self, img: Tensor, x: Tensor, cond: Cond) -> Tensor:
        """The tokens of x (B, L, D) with those of the condition.

        Raises:
            ValueError: no condition, or not of the latents' size.
        """
        given = self.given(cond)
        if given.shape[1:] != (self.condition_channels, *x.shape[2:]):
            raise ValueError(
                f"condition {self.condition!r} is {tuple(given.shape[1:])} for latents of {tuple(x.shape[1:])}; expected latents of the "
                f"same size with condition_channels, {self.condition_channels}"
            )
        return img + self.condition_embed(patchify(given.to(img.dtype), self.patch_size))

    def init_weights(self) -> None:
        """The copy as its network has it; what is added starts as zero."""
        self.twin.init_weights()
        for layer in (
            self.condition_embed,
            *(one for name in self.projs for one in self.get_submodule(name).children()),
        ):
            assert isinstance(layer, Linear)
            init.zero_(layer)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.twin.blocks())

    def example_condition(self, batch_size: int, device: torch.device | str) -> Tensor:
        side = self.twin.latent_size
        return torch.zeros(batch_size, self.condition_channels, side, side, device=device)


def _times(part: Tensor | None, strength: Tensor) -> Tensor | None:
    return None if part is None else part * strength.to(part.dtype).view(-1, *[1] * (part.ndim - 1))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
