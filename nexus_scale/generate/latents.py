"""Ways through a family's latents: between draws, from step to step, of pairs, along one number at a time.

A family names the draw that its samples are made of (`Draws.latent`). A way gives other values to that draw; what the family does with
them is its own affair, and nothing here knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nexus_scale.contracts import Latent, Rng, UserError

Draw = Callable[[Tensor], Tensor]
"""Draws of a sample's prompt by their numbers, (B,) -> (B, *shape)."""

SPAN = 3.0
"""A traversal goes from so many standard deviations below the mean to as many above. Source: Higgins et al. 2017, "beta-VAE", figure 1."""


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Latents on the arcs from a to b, (B, ...): a where t (B,) is 0, b where it is 1. What lies between is as long as the two are, as a
    straight line's middle is not; where they have one direction, or opposite ones, the line is straight.

    Source: White 2016, "Sampling Generative Networks".
    """
    flat_a, flat_b, t = a.flatten(1).double(), b.flatten(1).double(), t.to(a.device).double()[:, None]
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1)[:, None].clamp(-1, 1)
    angle, sine = torch.acos(cosine), (1 - cosine.square()).sqrt()
    straight = sine < 1e-6
    sine = torch.where(straight, torch.ones_like(sine), sine)
    of_a = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    of_b = torch.where(straight, t, torch.sin(t * angle) / sine)
    return (of_a * flat_a + of_b * flat_b).view_as(a).to(a.dtype)


@dataclass(frozen=True)
class Way:
    """`count` draws of each prompt become `each` samples of it: here, as they are.

    Attributes:
        columns: of samples in a picture of them all; None: as they fit.
    """

    count: int

    @property
    def each(self) -> int:
        return self.count

    @property
    def columns(self) -> int | None:
        return None

    def nearest(self, sample: Tensor) -> Tensor:
        """The draw that a sample has all but its latent from, by numbers in their prompt, (B,) -> (B,)."""
        return sample

    def latents(self, draw: Draw, sample: Tensor) -> Tensor:
        """Latents of samples, by their numbers in their prompt, (B,) -> (B, *shape)."""
        return draw(sample)


@dataclass(frozen=True)
class Interpolated(Way):
    """From each draw to the next in `steps` samples, both ends among them, along the arc between the two."""

    steps: int

    @property
    def each(self) -> int:
        return (self.count - 1) * (self.steps - 1) + 1

    @property
    def columns(self) -> int:
        return min(self.each, 100)

    def _part(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The draw before each sample, and how far it is on the way to the next."""
        before = (sample // (self.steps - 1)).clamp(max=self.count - 2)
        return before, (sample - before * (self.steps - 1)) / (self.steps - 1)

    def nearest(self, sample: Tensor) -> Tensor:
        before, part = self._part(sample)
        return before + (part > 0.5).long()

    def latents(self, draw: Draw, sample: Tensor) -> Tensor:
        before, part = self._part(sample)
        return slerp(draw(before), draw(before + 1), part)


@dataclass(frozen=True)
class Mixed(Way):
    """All pairs of draws, a row of samples for each first: `share` of the arc from the first to the second. The diagonal is the draws."""

    share: float

    @property
    def each(self) -> int:
        return self.count**2

    @property
    def columns(self) -> int:
        return self.count

    def nearest(self, sample: Tensor) -> Tensor:
        return sample // self.count if self.share <= 0.5 else sample % self.count

    def latents(self, draw: Draw, sample: Tensor) -> Tensor:
        return slerp(
            draw(sample // self.count), draw(sample % self.count), torch.full((len(sample),), float(self.share))
        )


@dataclass(frozen=True)
class Walked(Way):
    """From the first draw on, `stride` of each sample's latent is the next draw and the rest is the sample's before: each is as probable
    as a draw, and neighbours are as alike as sqrt(1 - stride^2) says. A stride of 1 gives the draws."""

    stride: float
    _reached: list[tuple[Tensor, int, Tensor]] = field(default_factory=list, repr=False, compare=False)
    """Of the last walk: its first latent, which tells it from others, the number of a sample, and that one's latent. Samples come in
    batches, one after another, and the next goes on from there."""

    def latents(self, draw: Draw, sample: Tensor) -> Tensor:
        z = first = draw(torch.zeros_like(sample))
        begun = torch.zeros_like(sample)
        for known, number, latent in self._reached:
            there = (first == known).flatten(1).all(1).to(sample.device) & (sample >= number)
            z, begun = torch.where(_beside(there, z), latent, z), begun.masked_fill(there, number)
        for number in range(int(begun.min()) + 1, int(sample.max()) + 1):
            moved = (1 - self.stride**2) ** 0.5 * z + self.stride * draw(torch.full_like(sample, number))
            z = torch.where(_beside((begun < number) & (number <= sample), z), moved, z)
        self._reached[:] = [(first[-1:], int(sample[-1]), z[-1:])]
        return z


def _beside(flags: Tensor, z: Tensor) -> Tensor:
    """Flags of samples, (B,), as z (B, ...) takes them."""
    return flags.view(-1, *[1] * (z.ndim - 1)).to(z.device)


@dataclass(frozen=True)
class Traversed(Way):
    """Of each draw a row of `steps` samples for each of its `size` numbers, which goes from -SPAN to SPAN while the others stay."""

    steps: int
    size: int

    @property
    def each(self) -> int:
        return self.count * self.size * self.steps

    @property
    def columns(self) -> int:
        return self.steps

    def nearest(self, sample: Tensor) -> Tensor:
        return sample // (self.size * self.steps)

    def latents(self, draw: Draw, sample: Tensor) -> Tensor:
        z = draw(self.nearest(sample)).clone()
        values = torch.linspace(-SPAN, SPAN, self.steps)[sample % self.steps]
        z.view(len(z), -1)[torch.arange(len(z)), sample // self.steps % self.size] = values.to(z)
        return z


@dataclass(frozen=True)
class Latents:
    """What is asked of a run's latents.

    Attributes:
        truncate: psi, by which latents are drawn in towards their mean, which is zero: 1 leaves them, 0 leaves the mean alone.
            Source: Karras et al. 2019, "A Style-Based Generator Architecture", appendix B.
    """

    latent: Latent
    way: Way
    truncate: float = 1.0

    def rng(self, at: Callable[[Tensor], Rng], positions: Sequence[int]) -> Rng:
        """The random numbers of samples.

        Args:
            at: those of draws at positions.
            positions: of samples: their prompt's number times `way.each`, and their own in it.
        """
        return _Along(self, at, torch.tensor(positions))


class _Along:
    """Random numbers of draws, but for the latent."""

    def __init__(self, asked: Latents, at: Callable[[Tensor], Rng], samples: Tensor):
        self.asked, self.at = asked, at
        self.first, self.number = samples // asked.way.each * asked.way.count, samples % asked.way.each

    @cached_property
    def _near(self) -> Rng:
        return self.at(self.positions)

    @property
    def positions(self) -> Tensor:
        return self.first + self.asked.way.nearest(self.number)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        latent = self.asked.latent
        if name != latent.name:
            return self._near.normal(name, shape)
        assert tuple(shape) == latent.shape, f"{name}: drawn as {tuple(shape)}, declared as {latent.shape}"
        return self.asked.way.latents(
            lambda number: self.at(self.first + number).normal(name, shape) * self.asked.truncate, self.number
        )

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self._near.uniform(name, shape)

    def shared(self, name: str) -> torch.Generator:
        return self._near.shared(name)


def latents_of(
    latent: Latent | None,
    count: int,
    *,
    interpolate: int | None = None,
    walk: float | None = None,
    mix: float | None = None,
    traverse: int | None = None,
    truncate: float | None = None,
) -> Latents | None:
    """What these options ask for; None where they ask for nothing.

    Args:
        latent: of the family, which takes what is asked.
        count: draws of each prompt.
    Raises:
        UserError: ways that exclude each other, or that need more draws; values out of range.
    """
    given = {"interpolate": interpolate, "walk": walk, "mix": mix, "traverse": traverse}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)}: each is a way through the latents; give one")
    name, value = next(iter(asked.items()), ("", 0))
    if name in ("interpolate", "mix") and count < 2:
        raise UserError(f"--{name}: goes from one draw of a prompt to another; give --count 2 or more")
    if name in ("interpolate", "traverse") and not 2 <= value <= 10_000:
        raise UserError(f"--{name} {value}: expected 2 to 10,000 samples on the way")
    if name in ("walk", "mix") and not (0 <= value <= 1 and (value or name == "mix")):
        above = "above 0, which stays where it is, to 1" if name == "walk" else "0, the first of a pair, to 1"
        raise UserError(f"--{name} {value:g}: expected {above}")
    if truncate is not None and not -10 <= truncate <= 10:
        raise UserError(f"--truncate {truncate:g}: expected -10 to 10, such as 0.7; 1 leaves the latents")
    if latent is None or (not asked and truncate is None):
        return None
    ways: dict[str, Callable[[], Way]] = {
        "": lambda: Way(count),
        "interpolate": lambda: Interpolated(count, int(value)),
        "walk": lambda: Walked(count, value),
        "mix": lambda: Mixed(count, value),
        "traverse": lambda: Traversed(count, int(value), latent.size),
    }
    return Latents(latent, ways[name](), 1.0 if truncate is None else truncate)
