"""An optimizer's step over lists of tensors, with all that follows from it: clipping, the guard, moving averages, and the copies that
compute. One call per network and step, in which nothing is read on the host.

Sources: Kingma & Ba 2015 (Adam); Loshchilov & Hutter 2019 (decoupled weight decay); Tieleman & Hinton 2012 (RMSprop); Sutskever et al.
2013 (momentum, Nesterov's).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_scale.config.schema import Adam, AdamW, Optimizer, RMSprop
from nexus_scale.kernels import transfer

MOMENTS = ("exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer")
"""All that some optimizer keeps for each weight."""


def moments_of(spec: Optimizer) -> tuple[str, ...]:
    """Names of what an optimizer keeps for each weight; torch's names, also in checkpoints."""
    if isinstance(spec, AdamW | Adam):
        return "exp_avg", "exp_avg_sq"
    momentum = ("momentum_buffer",) if spec.momentum else ()
    return ("square_avg", *momentum) if isinstance(spec, RMSprop) else momentum


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all of these tensors, a float32 scalar where they are; bf16 is summed in float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)))


def clip_factor(norm: Tensor, bound: float | None) -> Tensor:
    """What gradients of this norm are multiplied by, a float64 scalar where the norm is: at most 1, so that the norm is at most `bound`
    (None: always 1), and NaN where the norm is not finite, by which `Update` skips the step."""
    if transfer.reads_freely(norm.device):
        value = float(norm)
        scale = bound / (value + 1e-6) if bound is not None and value > bound else 1.0
        return torch.tensor(scale if math.isfinite(value) else math.nan, dtype=torch.float64)
    return device_clip_factor(norm, bound)


def device_clip_factor(norm: Tensor, bound: float | None) -> Tensor:
    """The same, not read on the host."""
    exact = norm.double()
    factor = torch.ones_like(exact) if bound is None else torch.where(exact > bound, bound / (exact + 1e-6), 1.0)
    return torch.where(torch.isfinite(exact), factor, math.nan)


class Update(abc.ABC):
    """An optimizer over lists of tensors that are given once; each call is one step of it, with averages and copies.

    How an engine uses it, with whole tensors or with a rank's flat shards (a flat tensor for each block and weight decay):

        update = optim.make_update(spec, masters, weight_decays=..., lr_multipliers=..., copies=shards_in_bf16)
        update.follow([average.values for average in averages])  # once, in the order of `decays` below
        ...
        norm = update.norm(gradients)  # where ranks hold parts: its square, summed over ranks, and the root
        update(gradients, lr=lr, factor=update.clip_factor(norm), decays=[0.999])
        return {"grad_norm": norm, "skipped": ~torch.isfinite(norm)}

    Args:
        masters: float32, contiguous, all on one device; updated in place.
        weight_decays, lr_multipliers: of each master.
        copies: of each master the tensor that computes with it, of its shape in bf16 and contiguous; None where masters compute.

    Attributes:
        moments: what the optimizer keeps, by `moments_of(spec)`, for each master: of its shape, float32. Live: checkpoints use it.
        takes_bf16: whether it takes gradients in bf16 as they are; otherwise it makes float32 copies of them.
        waits: whether each call reads `factor` on the host.
    """

    takes_bf16 = False
    waits = False

    moments: dict[str, list[Tensor]]

    def __init__(
        self,
        spec: Optimizer,
        masters: Sequence[Tensor],
        *,
        weight_decays: Sequence[float],
        lr_multipliers: Sequence[float],
        copies: Sequence[Tensor] | None = None,
    ):
        self.spec = spec
        self.masters = list(masters)
        self.weight_decays, self.lr_multipliers = list(weight_decays), list(lr_multipliers)
        self.copies = None if copies is None else [copy.detach() for copy in copies]
        self.averages: list[list[Tensor]] = []

    def follow(self, averages: Sequence[Sequence[Tensor]]) -> None:
        """Says which moving averages move with a call that has `decays`: lists of float32 tensors, one for each master."""
        self.averages = [
            [value.view(master.shape) for value, master in zip(values, self.masters, strict=True)]
            for values in averages
        ]

    @abc.abstractmethod
    def __call__(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: float,
        factor: Tensor | None = None,
        decays: Sequence[float] = (),
    ) -> None:
        """One step.

        Args:
            gradients: of each master, of its shape, all float32 or all bf16. They may be overwritten.
            lr: the learning rate, before multipliers.
            factor: a scalar on the device, by which gradients are multiplied. Where it is not finite the step is skipped: masters, moments,
                copies and the count of steps stay, and averages still move.
            decays: part of each average that stays; none: no average moves.
        """

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The L2 norm over all gradients of a call, a float32 scalar where they are. bf16 is summed in float32."""
        return gradient_norm(gradients)

    def clip_factor(self, norm: Tensor) -> Tensor:
        """The factor of a call whose gradients have this norm, by the recipe's `clip_grad_norm`."""
        return clip_factor(norm, self.spec.clip_grad_norm)

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """The number of updates made so far, which Adam's bias correction reads. To read it is to wait for the device."""

    @steps.setter
    @abc.abstractmethod
    def steps(self, steps: int) -> None: ...


class DeviceUpdate(Update):
    """An update that is skipped on the device. `count` is the number of steps, a float32 scalar there."""

    def __init__(
        self,
        spec: Optimizer,
        masters: Sequence[Tensor],
        *,
        weight_decays: Sequence[float],
        lr_multipliers: Sequence[float],
        copies: Sequence[Tensor] | None = None,
    ):
        super().__init__(spec, masters, weight_decays=weight_decays, lr_multipliers=lr_multipliers, copies=copies)
        self.masters = [master.detach() for master in self.masters]
        self.moments = {name: [torch.zeros_like(master) for master in self.masters] for name in moments_of(spec)}
        device = self.masters[0].device
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)
        betas = spec.betas if isinstance(spec, AdamW | Adam) else (0.0, 0.0)
        self._betas = torch.tensor(betas, dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: float,
        factor: Tensor | None = None,
        decays: Sequence[float] = (),
    ) -> None:
        if decays and len(decays) != len(self.averages):
            raise ValueError(f"{len(decays)} decays of {len(self.averages)} averages; call follow() with the averages")
        factor = self._one if factor is None else factor
        self._apply(gradients, lr, factor, self._counted(factor), decays)

    def _counted(self, factor: Tensor) -> Tensor:
        """Counts the step unless `factor` skips it, and returns 1 - beta^t of Adam's two moments, (2,) float64: at the first step
        1 - 0.999 has lost three digits of float32's seven."""
        self.count += torch.isfinite(factor)
        return 1.0 - self._betas**self.count

    @abc.abstractmethod
    def _apply(
        self, gradients: Sequence[Tensor], lr: float, factor: Tensor, corrections: Tensor, decays: Sequence[float]
    ) -> None:
        """One step. `corrections`: see `_counted`."""

    @property
    def steps(self) -> int:
        return int(self.count)

    @steps.setter
    def steps(self, steps: int) -> None:
        self.count.fill_(steps)


class PlainUpdate(DeviceUpdate):
    """The formulas in plain torch, tensor by tensor: what the fused kernels are held to, and what runs where there is none."""

    takes_bf16 = True

    def _apply(
        self, gradients: Sequence[Tensor], lr: float, factor: Tensor, corrections: Tensor, decays: Sequence[float]
    ) -> None:
        sound, scale = torch.isfinite(factor), factor.float()
        kept = list(self.moments.values())
        for i, (master, gradient) in enumerate(zip(self.masters, gradients, strict=True)):
            olds = [moments[i] for moments in kept]
            rate, decay = lr * self.lr_multipliers[i], self.weight_decays[i]
            updated, news = stepped(self.spec, gradient.float() * scale, master, olds, rate, decay, corrections)
            if self.spec.clip_weights is not None:
                updated = updated.clamp(-self.spec.clip_weights, self.spec.clip_weights)
            for old, new in zip((master, *olds), (updated, *news), strict=True):
                old.copy_(torch.where(sound, new, old))
            for decay_of, average in zip(decays, self.averages, strict=bool(decays)):
                average[i].lerp_(master, 1.0 - decay_of)
            if self.copies is not None:
                self.copies[i].copy_(master)


def stepped(
    spec: Optimizer,
    gradient: Tensor,
    weight: Tensor,
    moments: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    corrections: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """A weight and its moments after one step of an optimizer, in their own precision. Nothing is written."""
    if isinstance(spec, AdamW):
        weight = weight * (1.0 - lr * weight_decay)
    elif weight_decay:
        gradient = gradient + weight_decay * weight
    if isinstance(spec, AdamW | Adam):
        mean = torch.lerp(moments[0], gradient, 1.0 - spec.betas[0])
        square = spec.betas[1] * moments[1] + (1.0 - spec.betas[1]) * gradient * gradient
        first, second = corrections.to(weight.dtype)
        return weight - lr * (mean / first) / ((square / second).sqrt() + spec.eps), [mean, square]
    news: list[Tensor] = []
    if isinstance(spec, RMSprop):
        news.append(spec.alpha * moments[0] + (1.0 - spec.alpha) * gradient * gradient)
        gradient = gradient / (news[0].sqrt() + spec.eps)
    if spec.momentum:
        news.append(spec.momentum * moments[-1] + gradient)
        nesterov = not isinstance(spec, RMSprop) and spec.nesterov
        gradient = gradient + spec.momentum * news[-1] if nesterov else news[-1]
    return weight - lr * gradient, news
