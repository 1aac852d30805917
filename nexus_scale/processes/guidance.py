"""Guidance: extrapolates away from a worse prediction by `scale`, the unconditional one (classifier-free guidance) or a weaker network's.

Every target is linear in x0 and eps at fixed x_t, and the weights scale and 1 - scale sum to one: guiding x0 and eps is the
same as guiding the network's output.
Source: Ho & Salimans 2022, equation 6, written as scale = 1 + w; Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of
Itself".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, Predictor, on_both
from nexus_scale.processes.gaussian import coefficients, expand, recover
from nexus_scale.processes.paths import Path

Answer = tuple[Tensor, ...]
"""x0, eps, and what else a predictor answers."""

Rescaled = Callable[[Answer, Answer, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`rescaled(guided, cond, x_t, t)`: the guided x0 and eps, rescaled."""


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
    return {name: on_both(_joined, cond[name], null[name].to(cond[name].dtype)) for name in cond}


def _joined(told: Tensor, null: Tensor) -> Tensor:
    return torch.cat([told, null])


def guide_batched(
    make: Callable[[Cond], Predictor],
    cond: Cond,
    null: Cond,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    rescaled: Rescaled | None = None,
    weaker: Predictor | None = None,
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
        rescaled: see `rescaled_to`; None: the guided prediction stays as it is.
        weaker: what is guided away from in the place of the unconditional prediction; it is called by itself.
    Returns:
        A predictor; what it answers beside x0 and eps (a learned variance) is the conditional one's, at scale 0 the unconditional's.
    """
    if scale == 1:
        return make(cond)
    if scale == 0 and channels is None and rescaled is None and interval is None:
        return make(null) if weaker is None else weaker
    pairs = _pairs(make(concatenate(cond, null))) if weaker is None else _called_apart(make(cond), weaker)

    def denoise(x_t: Tensor, t: Tensor) -> Answer:
        of_cond, of_worse = pairs(x_t, t)
        guided = tuple(_combine(*pair, scale, channels) for pair in zip(of_cond[:2], of_worse[:2], strict=True))
        if rescaled is not None:
            guided = rescaled(guided, of_cond, x_t, t)
        return (*guided, *of_cond[2:])

    return denoise if interval is None else _within(interval, denoise, make(cond))


def guide_apart(make: Callable[[Cond], Predictor], told: Sequence[tuple[Cond, float]]) -> Predictor:
    """The sum of predictions under several conditions, each times its weight, in one call; weights sum to 1.

    What is answered beside x0 and eps is the first prediction's.
    """
    together: Cond = told[0][0]
    for cond, _ in told[1:]:
        together = concatenate(together, cond)
    all_of_them, weights = make(together), [weight for _, weight in told]

    def denoise(x_t: Tensor, t: Tensor) -> Answer:
        answers = all_of_them(torch.cat([x_t] * len(told)), torch.cat([t] * len(told)))
        parts = [value.chunk(len(told)) for value in answers]
        guided = (sum(w * part for w, part in zip(weights, one, strict=True)) for one in parts[:2])
        return (*guided, *(one[0] for one in parts[2:]))  # type: ignore[arg-type]  # a sum of tensors is one

    return denoise


def _pairs(both: Predictor) -> Callable[[Tensor, Tensor], tuple[Answer, Answer]]:
    """What a predictor for 2B samples answers of B: under the first conditions, and under the second."""

    def answers(x_t: Tensor, t: Tensor) -> tuple[Answer, Answer]:
        halves = [value.chunk(2) for value in both(torch.cat([x_t, x_t]), torch.cat([t, t]))]
        return tuple(first for first, _ in halves), tuple(second for _, second in halves)

    return answers


def _called_apart(strong: Predictor, weak: Predictor) -> Callable[[Tensor, Tensor], tuple[Answer, Answer]]:
    def answers(x_t: Tensor, t: Tensor) -> tuple[Answer, Answer]:
        return strong(x_t, t), weak(x_t, t)

    return answers


def rescaled_to(share: float, target: str, path: Path) -> Rescaled | None:
    """Brings the guided output of a network back to the standard deviation, over a sample, of the conditional one; None for a share of 0.

    Args:
        share: of the rescaled output in the mean with the guided one; the paper has 0.7.
        target: what the network predicts on `path`: it is that whose deviation is compared.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", equations 14 to 16.
    """
    if share == 0:
        return None

    def rescaled(guided: Answer, cond: Answer, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (expand(value, x_t) for value in coefficients(path, target, t))
        output, like = (a * answer[0] + b * answer[1] for answer in (guided, cond))
        ratio = like.flatten(1).std(1) / output.flatten(1).std(1).clamp_min(1e-12)  # (B,)
        return recover(x_t, output * expand(share * ratio + (1 - share), x_t), target, path, t)

    return rescaled


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
