"""Low-rank adaptation: beside each adapted layer W of a frozen network a product B A of low rank learns.

Sources: Hu et al. 2021, "LoRA"; Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA" (rsLoRA); Hayou et al.
2024, "LoRA+" (the learning rate of B); Liu et al. 2024, "DoRA" (weights as a magnitude and a direction, of which the direction changes so).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus_scale.contracts import Adapter, Network, UserError
from nexus_scale.models.layers.tags import KeepsTags, tag_param

Layers = Literal["all", "blocks"]


class Delta(KeepsTags):
    """What is changed in one layer: W x becomes W x + scale * B A x, for a convolution A with the layer's kernel and B with a kernel of 1.
    With a magnitude, W + scale * B A is a direction alone, whose rows are as long as W's times the magnitude.

    Attributes:
        lora_A, lora_B: (r, in) and (out, r), or (r, in, k, k) and (out, r, 1, 1).
        magnitude: (out,), of DoRA: lengths of rows as multiples of W's; None without.
        scale: alpha / r, or of rsLoRA alpha / sqrt(r).
        grown: of DoRA, what rows were multiplied by as the change was merged, (out,).
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        rank: int,
        scale: float,
        dropout: float,
        lr_ratio: float,
        decomposed: bool = False,
    ):
        super().__init__()
        out, into, *kernel = layer.weight.shape
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.lora_A = tag_param(nn.Parameter(torch.empty(rank, into, *kernel)), decay=True)
        self.lora_B = tag_param(
            nn.Parameter(torch.empty(out, rank, *(1 for _ in kernel))), decay=True, lr_multiplier=lr_ratio
        )
        self.magnitude = tag_param(nn.Parameter(torch.empty(out)), decay=False) if decomposed else None
        self.grown: Tensor | None = None
        self.conv = (
            None if isinstance(layer, nn.Linear) else partial(F.conv2d, stride=layer.stride, padding=layer.padding)
        )

    def forward(self, x: Tensor, layer: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        """What the layer gives with the change, where it gives `out` of `x` without."""
        dropped = F.dropout(x, self.dropout, self.training)
        if self.conv is None:
            low = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale
        else:
            low = F.conv2d(self.conv(dropped, self.lora_A), self.lora_B) * self.scale
        if self.magnitude is None:
            return out + low
        sides = (1,) * (0 if self.conv is None else 2)
        factor = self.factor(layer.weight).to(out.dtype).view(-1, *sides)
        plain = out if layer.bias is None else out - layer.bias.view(-1, *sides)
        if dropped is not x:
            plain = F.linear(dropped, layer.weight) if self.conv is None else self.conv(dropped, layer.weight)
        return out + (factor - 1) * plain + factor * low

    def factor(self, weight: Tensor) -> Tensor:
        """What the rows of W + scale * B A are multiplied by, (out,) float32. No gradient goes through their lengths, as in the paper."""
        assert self.magnitude is not None
        with torch.no_grad():
            was, now = _lengths(weight), _lengths(_wide(weight) + self.product())
            ratio = was / now
        return _wide(self.magnitude) * ratio

    def product(self) -> Tensor:
        """scale * B A, of the layer's shape, float32."""
        a, b = _wide(self.lora_A), _wide(self.lora_B)
        return (b.flatten(1) @ a.flatten(1)).unflatten(1, a.shape[1:]) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the change, float32, on its device."""
        changed = _wide(weight) + self.product().to(weight.device)
        if self.magnitude is None:
            return changed
        self.grown = _wide(self.magnitude).to(weight.device) * _lengths(weight) / _lengths(changed)
        return changed * self.grown.view(-1, *(1,) * (weight.ndim - 1))

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor | None:
        """Of DoRA, of the rows of the changed weight, (out,) float32, of W or of what `merged` made of it; None without a magnitude."""
        if self.magnitude is None:
            return None
        there = _lengths(weight)
        return there * (self.magnitude.float() if self.grown is None else self.magnitude.float().sign()).to(
            there.device
        )

    def unmerged(self, weight: Tensor) -> Tensor:
        """The weight that `merged` was given, of what it gave, float32."""
        grown = 1.0 if self.grown is None else self.grown.view(-1, *(1,) * (weight.ndim - 1))
        self.grown = None
        return _wide(weight) / grown - self.product().to(weight.device)


def _wide(value: Tensor) -> Tensor:
    """In float32, or in float64 where it is; of a weight in 8 bits what it stands for."""
    if is_traceable_wrapper_subclass(value):
        value = value.dequantize()
    return value if value.dtype == torch.float64 else value.float()


def _lengths(weight: Tensor) -> Tensor:
    """Of rows, (out,)."""
    return _wide(weight).flatten(1).norm(dim=1)


class Lora(Adapter):
    """Low-rank changes of a frozen network's linear layers and convolutions; at the start they are zero."""

    def __init__(
        self,
        *,
        base: Callable[[], Network],
        layers: Layers | tuple[str, ...] = "blocks",
        rank: Annotated[int, Field(ge=1, le=65536)] = 16,
        alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None,
        ranks: Mapping[str, int] | None = None,
        alphas: Mapping[str, float] | None = None,
        rank_stabilized: bool = False,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        lr_ratio: Annotated[float, Field(gt=0, le=1000)] = 1.0,
        decomposed: bool = False,
    ):
        """
        Args:
            base: makes the adapted network; the program gives it.
            layers: which are adapted: `blocks`: all linear layers of the repeated blocks; `all`: of the whole network, with its
                convolutions; or the ends of their names: `qkv` is every layer of that name, `dit_blocks.0.proj` one.
            rank, alpha: r, and the numerator of the scale; alpha is r unless given.
            ranks, alphas: other ones of some layers, by the ends of their names.
            rank_stabilized: the scale is alpha / sqrt(r) and not alpha / r.
            dropout: of what A is given.
            lr_ratio: of B's learning rate to A's (LoRA+).
            decomposed: each layer learns the lengths of its weight's rows besides, and low-rank changes turn them alone (DoRA).
        """
        super().__init__()
        with torch.device("meta"):
            made = base()
        self.rank, self.rank_stabilized = rank, rank_stabilized
        own_ranks, own_alphas = dict(ranks or {}), dict(alphas or {})
        chosen = _chosen(made, layers)
        for argument, given in (("ranks", own_ranks), ("alphas", own_alphas)):
            for end in given:
                if not any(_ends(path, end) for path in chosen):
                    raise UserError(f"{argument}: no adapted layer ends in {end!r}; they are {_some(chosen)}")
        self.deltas: dict[str, Delta] = {}
        for path, layer in chosen.items():
            r = next((own_ranks[end] for end in own_ranks if _ends(path, end)), rank)
            a = next((own_alphas[end] for end in own_alphas if _ends(path, end)), r if alpha is None else alpha)
            delta = Delta(layer, r, a / (math.sqrt(r) if rank_stabilized else r), dropout, lr_ratio, decomposed)
            self.deltas[path] = delta
            _place(self, path, delta)
        self._hold(made)

    def _hold(self, base: Network) -> None:
        vars(self)["base"] = base  # not a part of this network: its parameters are its own
        for path, delta in self.deltas.items():
            base.get_submodule(path).register_forward_hook(partial(_added, self, delta))
        self.num_classes = (
            base.num_classes
        )  # not `together`: a frozen base's batch norms have learnt, and part no samples

    def attach(self, base: Network) -> None:
        for path, delta in self.deltas.items():
            there, here = base.get_parameter(f"{path}.weight").shape, (len(delta.lora_B), *delta.lora_A.shape[1:])
            if tuple(there) != here:
                raise ValueError(f"{path}: the adapter is for {here}; the base has {tuple(there)}")
        self._hold(base)

    def init_weights(self) -> None:
        """A from a uniform distribution as in PyTorch's linear layers, B zero, magnitudes one."""
        for delta in self.deltas.values():
            nn.init.kaiming_uniform_(delta.lora_A, a=math.sqrt(5))
            nn.init.zeros_(delta.lora_B)
            if delta.magnitude is not None:
                nn.init.ones_(delta.magnitude)

    @torch.no_grad()
    def merge(self) -> Network:
        for path, delta in self.deltas.items():
            weight = self.base.get_parameter(f"{path}.weight")
            weight.copy_(delta.merged(weight).to(weight.dtype))
        return self.base

    @torch.no_grad()
    def unmerge(self) -> None:
        for path, delta in self.deltas.items():
            weight = self.base.get_parameter(f"{path}.weight")
            weight.copy_(delta.unmerged(weight).to(weight.dtype))

    def __getattr__(self, name: str) -> Any:
        """What is asked of a network beside its forward: the base's, whose methods compute with the changes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in vars(self):
                raise
            found = getattr(vars(self)["base"], name)
            return self.through(found) if inspect.ismethod(found) and not name.startswith("_") else found


def _added(adapter: Lora, delta: Delta, layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    return delta(inputs[0], layer, out) if adapter.at_works else None


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def _chosen(base: Network, layers: Layers | Sequence[str]) -> dict[str, Any]:
    """The layers of a network that are adapted, by their paths.

    Raises:
        UserError: a name that no layer has, or that of what cannot be adapted.
    """
    modules = dict(base.named_modules())
    able = {path: module for path, module in modules.items() if _able(module)}
    if layers == "all":
        return able
    if layers == "blocks":
        inside = {id(part) for block in base.blocks() for part in block.modules()}
        found = {path: m for path, m in able.items() if id(m) in inside and isinstance(m, nn.Linear)}
        if not found:
            raise UserError(
                f"layers: {type(base).__name__} has no linear layers in blocks; name some, or set layers: all; it has {_some(able)}"
            )
        return found
    for end in layers:
        if not any(_ends(path, end) for path in able):
            what = "is none that can be adapted" if any(_ends(path, end) for path in modules) else "is none"
            raise UserError(f"layers: {end!r} {what} of {type(base).__name__}'s layers; they are {_some(able)}")
    return {path: module for path, module in able.items() if any(_ends(path, end) for end in layers)}


def _able(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.groups == 1 and module.dilation == (1, 1)
    )


def _some(paths: Mapping[str, Any]) -> str:
    names = sorted({".".join("#" if part.isdecimal() else part for part in path.split(".")) for path in paths})
    return ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")


def _place(root: nn.Module, path: str, delta: Delta) -> None:
    """Puts a delta where its layer lies, so that parameters are called as the layer is."""
    *groups, last = path.split(".")
    for name in groups:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        inner = root._modules[name]
        assert inner is not None
        root = inner
    root.add_module(last, delta)
