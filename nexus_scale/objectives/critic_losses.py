"""What a critic and a generator minimise, from the critic's answers (larger for data), and penalties on the critic's slope.

Source: `logistic`, `saturating`: Goodfellow et al. 2014, "Generative Adversarial Nets", whose generator in practice does not minimise what
the critic maximises; `hinge`: Lim & Ye 2017, "Geometric GAN", equations 15 and 16; `least_squares`: Mao et al. 2017, "Least Squares
Generative Adversarial Networks", equation 9 (a = 0, b = c = 1); `wasserstein`: Arjovsky et al. 2017, "Wasserstein GAN"; pairs:
Jolicoeur-Martineau 2018, "The relativistic discriminator", section 4.1 without averages, and Huang et al. 2024, "The GAN is dead; long
live the GAN!", equation 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Losses = Literal["logistic", "saturating", "hinge", "least_squares", "wasserstein"]
Term = Callable[[Tensor], Tensor]


class Terms(NamedTuple):
    """What the critic pays for its answers to data and to samples, and the generator for those to samples; place by place."""

    data: Term
    samples: Term
    generator: Term


def _squared(answers: Tensor) -> Tensor:
    return 0.5 * answers.square()


TERMS: dict[Losses, Terms] = {
    "logistic": Terms(lambda a: F.softplus(-a), F.softplus, lambda a: F.softplus(-a)),
    "saturating": Terms(lambda a: F.softplus(-a), F.softplus, lambda a: -F.softplus(a)),
    "hinge": Terms(lambda a: F.relu(1 - a), lambda a: F.relu(1 + a), lambda a: -a),
    "least_squares": Terms(lambda a: _squared(a - 1), _squared, lambda a: _squared(a - 1)),
    "wasserstein": Terms(lambda a: -a, lambda a: a, lambda a: -a),
}


def critic_loss(losses: Losses, real: Tensor, fake: Tensor, *, paired: bool = False) -> Tensor:
    """The critic's loss from its answers to data and to samples, place by place; `paired`: to how much larger the first is."""
    terms = TERMS[losses]
    return terms.data(real - fake) if paired else terms.data(real) + terms.samples(fake)


def generator_loss(losses: Losses, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The generator's loss from the critic's answers to samples, place by place, and to the data that each is paired with."""
    terms = TERMS[losses]
    if real is None:
        return terms.generator(fake)
    return -terms.data(real - fake) if losses == "saturating" else terms.data(fake - real)


def slope(answers: Tensor, x: Tensor) -> Tensor:
    """The gradient of each sample's answers at x, (B, all of x) with a graph, so that it can be differentiated again."""
    (gradient,) = torch.autograd.grad(answers.sum(), x, create_graph=True)
    return gradient.flatten(1)


def zero_centred(answers: Tensor, x: Tensor) -> Tensor:
    """|gradient at x|^2 of each sample, (B,): R1 where x are data, R2 where they are samples.

    Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?", equations 9 and 10.
    """
    return slope(answers, x).square().sum(1)


def one_centred(answers: Tensor, x: Tensor) -> Tensor:
    """(|gradient at x| - 1)^2 of each sample, (B,), for x between data and samples; 1 and without gradient where there is no slope.

    Source: Gulrajani et al. 2017, "Improved training of Wasserstein GANs", equation 3.
    """
    return (torch.linalg.vector_norm(slope(answers, x), dim=1) - 1).square()


def between(x: Tensor, x_hat: Tensor, u: Tensor) -> Tensor:
    """Points on the lines from samples to data, u (B, 1) in [0, 1) of the way, ready to be differentiated by."""
    mixed = x_hat + u.view(-1, *[1] * (x.ndim - 1)) * (x - x_hat)
    return mixed.detach().requires_grad_()
