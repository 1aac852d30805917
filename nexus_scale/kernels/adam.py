"""The optimizers of torch and Apex: Adam and AdamW by torch's fused kernel, Apex's, or over lists of tensors; RMSprop and SGD over lists.

Source: Kingma & Ba 2015; Loshchilov & Hutter 2019 (decoupled weight decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_scale.config.schema import Adam, AdamW, Optimizer, RMSprop
from nexus_scale.kernels.update import DeviceUpdate, Update, moments_of


class CountedSGD(torch.optim.SGD):
    """torch's SGD with a count of its updates, which checkpoints hold of every optimizer."""

    def step(self, closure: Any = None) -> Any:
        said = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"][:1]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
        return said


def make_optimizer(groups: list[dict[str, Any]], spec: Optimizer, kernel: str) -> torch.optim.Optimizer:
    """The optimizer of a recipe over groups of tensors on one device.

    Args:
        kernel: of Adam: `apex` on a GPU, `torch_foreach`, or any other for torch's fused one where that serves the device. Optimizers other
            than Adam run over lists of tensors.
    """
    common: dict[str, Any] = {"lr": 0.0, "weight_decay": spec.weight_decay}
    if isinstance(spec, AdamW | Adam):
        return _adam(groups, isinstance(spec, AdamW), kernel, betas=spec.betas, eps=spec.eps, **common)
    common |= {"momentum": spec.momentum, "foreach": True}
    if isinstance(spec, RMSprop):
        return torch.optim.RMSprop(groups, alpha=spec.alpha, eps=spec.eps, **common)
    return CountedSGD(groups, nesterov=spec.nesterov, **common)


def _adam(groups: list[dict[str, Any]], decoupled: bool, kernel: str, **given: Any) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device.type
    if kernel == "apex" and device == "cuda":
        from apex.optimizers import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=decoupled, **given)
        return optimizer
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    fused = kernel != "torch_foreach" and device in ("cpu", "cuda")
    return kind(groups, **given, fused=True) if fused else kind(groups, **given, foreach=True)


@torch.no_grad()
def clip_weights(weights: list[Tensor], bound: float) -> None:
    """Moves each weight into [-bound, bound], in place."""
    torch._foreach_clamp_min_(weights, -bound)
    torch._foreach_clamp_max_(weights, bound)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the moments of any optimizer exist from the start, as zeros, so that live views of them can be kept.

    One step with zero gradients and learning rate leaves parameters as they are; what weight decay put into the moments is zeroed.
    Gradients remain the same objects: under offloading DeepSpeed writes into them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    given = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.zero_()
    set_steps(optimizer, 0)


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Sets the count of updates, which Adam's bias correction reads: per parameter in torch, per group in Apex."""
    for group in optimizer.param_groups:
        if "step" in group:
            if isinstance(group["step"], Tensor):
                group["step"].fill_(steps)
            else:
                group["step"] = steps
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(float(steps))
            elif "step" in state:
                state["step"] = steps


def get_steps(optimizer: torch.optim.Optimizer) -> int:
    """The number of updates that an optimizer has made."""
    for group in optimizer.param_groups:
        if "step" in group:
            return int(group["step"])
        for parameter in group["params"]:
            if "step" in optimizer.state.get(parameter, {}):
                return int(optimizer.state[parameter]["step"])
    return 0


def made_ready(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """`optimizer.step` for good: its parameters stay the ones they are, have their moments, and all have a gradient whenever it is called.

    For torch's fused kernel it has its lists made once, and one count of steps for all parameters of a group. torch rebuilds them at
    each step: 158 us of CPU on 40 small tensors, and 51 without. The bits are the same.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not optimizer.defaults["fused"]:
        return optimizer.step
    kernel: Any = torch._fused_adamw_ if isinstance(optimizer, torch.optim.AdamW) else torch._fused_adam_
    groups = []
    for group in optimizer.param_groups:
        parameters = list(group["params"])
        states = [optimizer.state[parameter] for parameter in parameters]
        count = states[0]["step"]
        for state in states:
            state["step"] = count
        moments = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        groups.append((group, parameters, moments, count, [count] * len(states)))

    @torch.no_grad()
    def step() -> None:
        for group, parameters, moments, count, counts in groups:
            count += 1
            beta1, beta2 = group["betas"]
            kernel(
                parameters, [parameter.grad for parameter in parameters], *moments, [], counts, lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip

    return step


def groups_of(
    tensors: Sequence[Tensor], weight_decays: Sequence[float], lr_multipliers: Sequence[float]
) -> list[dict[str, Any]]:
    """Optimizer groups of tensors with the same weight decay and multiplier, in order of first appearance.

    Their lr is 0 until a step sets it, so an optimizer that takes a trial step when it is made changes nothing.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for tensor, decay, multiplier in zip(tensors, weight_decays, lr_multipliers, strict=True):
        empty = {"params": [], "lr": 0.0, "weight_decay": decay, "lr_multiplier": multiplier}
        groups.setdefault((decay, multiplier), empty)["params"].append(tensor)
    return list(groups.values())


class TorchUpdate(Update):
    """An optimizer of torch or Apex as it comes, and after it the copies and the averages. It reads `factor` on the host: on a CPU that
    costs nothing, and a device is waited for.

    Args:
        kernel: see `make_optimizer`.
    """

    waits = True

    def __init__(
        self,
        spec: Optimizer,
        masters: Sequence[Tensor],
        *,
        weight_decays: Sequence[float],
        lr_multipliers: Sequence[float],
        copies: Sequence[Tensor] | None = None,
        kernel: str = "torch_fused",
    ):
        super().__init__(spec, masters, weight_decays=weight_decays, lr_multipliers=lr_multipliers, copies=copies)
        groups = groups_of(self.masters, weight_decays, lr_multipliers)
        self._multipliers = [float(group.pop("lr_multiplier")) for group in groups]
        self.optimizer = make_optimizer(groups, spec, kernel)
        allocate_state(self.optimizer)
        self._step = made_ready(self.optimizer)
        self._lr = 0.0
        self.moments = {
            name: [self.optimizer.state[master][name] for master in self.masters] for name in moments_of(spec)
        }

    @torch.no_grad()
    def __call__(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: float,
        factor: Tensor | None = None,
        decays: Sequence[float] = (),
    ) -> None:
        scale = 1.0 if factor is None else float(factor)
        if math.isfinite(scale):
            self._update([gradient.float() for gradient in gradients], lr, scale)
        for decay, average in zip(decays, self.averages, strict=bool(decays)):
            torch._foreach_lerp_(average, self.masters, 1.0 - decay)

    def _update(self, gradients: list[Tensor], lr: float, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        if lr != self._lr:
            self._lr = lr
            for group, multiplier in zip(self.optimizer.param_groups, self._multipliers, strict=True):
                group["lr"] = lr * multiplier
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self._step()
        for master in self.masters:
            master.grad = None
        if self.spec.clip_weights is not None:
            clip_weights(self.masters, self.spec.clip_weights)
        if self.copies is not None:
            torch._foreach_copy_(self.copies, self.masters)

    @property
    def steps(self) -> int:
        return get_steps(self.optimizer)

    @steps.setter
    def steps(self, steps: int) -> None:
        set_steps(self.optimizer, steps)


class FusedUpdate(DeviceUpdate):
    """torch's fused Adam with its guard for non-finite gradients, and after it the averages and the copies, each a pass of its own."""

    def _apply(
        self, gradients: Sequence[Tensor], lr: float, factor: Tensor, corrections: Tensor, decays: Sequence[float]
    ) -> None:
        spec = self.spec
        assert isinstance(spec, AdamW | Adam)
        kernel: Any = torch._fused_adamw_ if isinstance(spec, AdamW) else torch._fused_adam_
        sound = torch.isfinite(factor)
        divisor, found_inf = factor.reciprocal().float(), (~sound).float()
        floats = [gradient.float() for gradient in gradients]
        first, second = self.moments["exp_avg"], self.moments["exp_avg_sq"]
        for decay, multiplier, of in self._groups():
            kernel(
                [self.masters[i] for i in of], [floats[i] for i in of], [first[i] for i in of], [second[i] for i in of], [],
                [self.count] * len(of), lr=lr * multiplier, beta1=spec.betas[0], beta2=spec.betas[1], weight_decay=decay, eps=spec.eps,
                amsgrad=False, maximize=False, grad_scale=divisor, found_inf=found_inf,
            )  # fmt: skip
        if spec.clip_weights is not None:
            bound = torch.where(sound, spec.clip_weights, math.inf).float()
            for master in self.masters:
                master.clamp_(-bound, bound)
        for decay, average in zip(decays, self.averages, strict=bool(decays)):
            torch._foreach_lerp_(average, self.masters, 1.0 - decay)
        if self.copies is not None:
            torch._foreach_copy_(self.copies, self.masters)

    def _groups(self) -> list[tuple[float, float, list[int]]]:
        """Weight decay, multiplier, and which masters have them."""
        groups: dict[tuple[float, float], list[int]] = {}
        for i, key in enumerate(zip(self.weight_decays, self.lr_multipliers, strict=True)):
            groups.setdefault(key, []).append(i)
        return [(*key, of) for key, of in groups.items()]
