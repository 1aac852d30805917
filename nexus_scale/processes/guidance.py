"""Classifier-free guidance: extrapolates away from the unconditional prediction by `scale`.

Every target is linear in x0 and eps at fixed x_t, and the weights scale and 1 - scale sum to one: guiding x0 and eps is the
same as guiding the network's output.
Source: Ho & Salimans 2022, equation 6, written as scale = 1 + w.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, Predictor


def _combine(cond: Tensor, uncond: Tensor, scale: float, channels: int | None = None) -> Tensor:
    if channels is None or channels >= cond.shape[1]:
        return uncond + scale * (cond - uncond)
    guided = _combine(cond[:, :channels], uncond[:, :channels], scale)
    return torch.cat([guided, cond[:, channels:]], dim=1)


def guide(denoise_cond: Predictor, denoise_uncond: Predictor, scale: float) -> Predictor:
    """A predictor of uncond + scale * (cond - uncond), for x0 and eps.

    Args:
        denoise_cond, denoise_uncond: predictors with and without the condition.
        scale: 1 is no guidance (to the bit; the unconditional one is not called), 0 is unconditional (the other one is not).
    """
    if scale == 1:
        return denoise_cond
    if scale == 0:
        return denoise_uncond

    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        (x0, eps), (x0_uncond, eps_uncond) = denoise_cond(x_t, t), denoise_uncond(x_t, t)
        return _combine(x0, x0_uncond, scale), _combine(eps, eps_uncond, scale)

    return denoise


def concatenate(cond: Cond, null: Cond) -> dict[str, Tensor]:
    """Conditions of 2B samples: those of `cond`, then those of `null`; `drop` defaults to False.

    Raises:
        ValueError: they differ in another name.
    """
    batch = len(next(iter(null.values())))
    device = next(iter(null.values())).device
    both = {"drop": torch.zeros(batch, dtype=torch.bool, device=device)} if "drop" in cond or "drop" in null else {}
    cond, null = {**both, **cond}, {**both, **null}
    if set(cond) != set(null):
        raise ValueError(f"conditions {sorted(cond)} and unconditional {sorted(null)}; expected the same names")
    return {name: torch.cat([cond[name], null[name].to(cond[name].dtype)]) for name in cond}


def guide_batched(
    make: Callable[[Cond], Predictor],
    cond: Cond,
    null: Cond,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
) -> Predictor:
    """As `guide`, with one call of twice the batch instead of two: faster where a batch does not fill the device.

    Args:
        make: the predictor for a condition, such as `partial(objective.predictor, nets)`.
        cond, null: conditions of B samples, and their unconditional twins.
        scale: see `guide`.
        channels: how many of the first channels are guided, the others stay conditional; None: all. DiT's published
            numbers guide three of four.
        interval: (low, high): at times outside of (low, high] the conditional predictor answers alone, at half the cost. None: guided at
            all times. Source: Kynkaanniemi et al. 2024, equation 5.
    Returns:
        A predictor; what it answers beside x0 and eps (a learned variance) is the conditional one's, at scale 0 the unconditional's.
    """
    if scale == 1:
        return make(cond)
    if scale == 0 and channels is None:
        return make(null)
    both = make(concatenate(cond, null))

    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        (x0, x0_uncond), (eps, eps_uncond), *others = (
            value.chunk(2) for value in both(torch.cat([x_t, x_t]), torch.cat([t, t]))
        )
        guided = _combine(x0, x0_uncond, scale, channels), _combine(eps, eps_uncond, scale, channels)
        return (*guided, *(of_cond for of_cond, _ in others))

    return denoise if interval is None else _within(interval, denoise, make(cond))


def _within(interval: tuple[float, float], guided: Predictor, unguided: Predictor) -> Predictor:
    """`guided` at times in (low, high], `unguided` at others; if times differ within a batch, each sample uses its own."""
    low, high = interval

    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        inside = (t > low) & (t <= high)  # (B,)
        if t.is_meta or bool(inside.all()):
            return guided(x_t, t)
        if not bool(inside.any()):
            return unguided(x_t, t)
        pairs = zip(guided(x_t, t), unguided(x_t, t), strict=True)
        rows = inside.view(-1, *[1] * (x_t.ndim - 1))
        return tuple(torch.where(rows, one, other) for one, other in pairs)

    return denoise
