"""Gaussian processes: noising along a path, and the one linear solve.

Every prediction target is y = a*x0 + b*eps; with x_t = alpha_t * x0 + sigma_t * eps that is a 2x2 system, and nothing else converts
predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_scale.config.registry import nearest
from nexus_scale.kernels import transfer
from nexus_scale.processes.paths import EDM, Path

# ---------------------------------------------------------------------------------------------- targets

TARGETS = ("eps", "x0", "v", "velocity", "edm")

_SMALLEST_DET = 1e-6
"""Below it, float32's rounding of x_t and y is amplified to more than a tenth of the answer."""


def expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def coefficients(path: Path, target: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (a, b) of y = a*x0 + b*eps, each of the shape of t.

    eps (0, 1); x0 (1, 0); v (-sigma, alpha); velocity (alpha', sigma'), SD3's eps - x0 on the straight line;
    edm ((1 - c_skip*alpha) / c_out, -c_skip*sigma / c_out), infinite at t = 0.
    Raises:
        ValueError: unknown target, or `edm` on a path without preconditioning.
    Source: Salimans & Ho 2022 (v); Karras et al. 2022, equation 7 (EDM).
    """
    if target == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if target == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if target == "v":
        return -path.sigma(t), path.alpha(t)
    if target == "velocity":
        return path.alpha_dot(t), path.sigma_dot(t)
    if target == "edm":
        if not isinstance(path, EDM):
            raise ValueError(f"target 'edm' needs path 'edm'; got {path}; choose target velocity, v, eps or x0")
        c = path.preconditioning(t)
        return (1 - c.c_skip) / c.c_out, -c.c_skip * t / c.c_out
    raise ValueError(f"target {target!r} is unknown; {nearest(target, list(TARGETS))}")


def add_noise(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t * x0 + sigma_t * eps.

    Args:
        x0, eps: clean sample and noise, each (B, ...).
        t: time in [0, path.t_max], (B,).
    """
    return torch.addcmul(expand(path.alpha(t), x0) * x0, expand(path.sigma(t), x0), eps)


def target_of(path: Path, name: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The network's training target, y = a*x0 + b*eps, (B, ...); arguments as for `add_noise` and `coefficients`."""
    a, b = coefficients(path, name, t)
    return torch.addcmul(expand(a, x0) * x0, expand(b, x0), eps)


def recover(x_t: Tensor, y: Tensor, target: str, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Clean sample and noise from a network output, whatever it predicts.

    Args:
        x_t: noised sample, (B, ...).
        y: network output, same shape; a*x0 + b*eps for the pair (a, b) of `target`.
        t: time in [0, path.t_max], (B,); 0 is data, t_max is noise.
    Returns:
        x0, eps: each (B, ...), float32 (float64 where x_t is).
    Raises:
        ValueError: `target` does not determine x0 and eps at this t (for example eps at alpha_t = 0, x0 at sigma_t = 0). On a CPU alone,
            where a sampler is tried before it draws: a GPU would have to be waited for, at every step of a walk.
    Source: Salimans & Ho 2022 (v); Karras et al. 2022, table 1 (EDM).
    """
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    x_t, y, t = x_t.to(dtype), y.to(dtype), t.to(dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    a, b = coefficients(path, target, t)
    det = alpha * b - sigma * a
    if transfer.reads_freely(det.device) and not bool((det.abs() >= _SMALLEST_DET).all() & det.isfinite().all()):
        bad = t[~((det.abs() >= _SMALLEST_DET) & det.isfinite())][:4].tolist()
        raise ValueError(
            f"target {target!r} does not determine x0 and eps on {path} at t = {bad}; "
            "expected |alpha*b - sigma*a| of at least 1e-6: keep t off that end, or predict v or velocity"
        )
    a, b, alpha, sigma = (expand(value / det, x_t) for value in (a, b, alpha, sigma))
    return b * x_t - sigma * y, alpha * y - a * x_t


def network_input(path: Path, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A network's input for (x_t, t): the pair itself, or on EDM's path (c_in * x_t, c_noise), where t > 0."""
    if isinstance(path, EDM):
        c = path.preconditioning(t)
        return expand(c.c_in, x_t) * x_t, c.c_noise
    return x_t, t
