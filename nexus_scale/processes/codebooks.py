"""Where the codes of K parallel codebooks stand in one sequence of steps: patterns as data, which put codes in order and take them out.

A sequence (B, S, K) has one token of each stream a step. Step 0 is the begin, and holds no code; what a step has no code for is the
special token. T frames of codes (B, T, K) become so many steps:

    parallel        T + 1                    all codes of a frame at once
    delay           T + 1 + largest delay    codebook k comes `delays[k]` steps after the first
    flat            G T + 1                  a frame's codes one after another, in G groups
    coarse_to_fine  2 T + 1 + largest delay  the first codebook of all frames, then the others

Source: Copet et al. 2023, "Simple and Controllable Music Generation", section 2.2 and figure 1; Wang et al. 2023 (VALL-E) for the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels.transfer import constant
from nexus_scale.processes.paths import find_named

Delay = Annotated[int, Field(ge=0, le=10_000)]


class Arranged(NamedTuple):
    """A sequence of steps: `tokens` (B, S, K), and which of them are codes, `filled` (B, S, K) bool."""

    tokens: Tensor
    filled: Tensor


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One order of codes. Subclasses say where each code stands."""

    needs_length: ClassVar[bool] = False
    """Whether where a code stands depends on how many frames there are, so that none can be drawn before that is known."""

    def check(self, num_codebooks: int) -> None:
        """Raises a UserError where it is a pattern of another number of codebooks."""

    def places(self, lengths: Tensor, num_frames: int, num_codebooks: int) -> Tensor:
        """The step at which each code stands, at least 1: (B, T, K) int64, or (1, T, K) where it is the same for all lengths.

        Args:
            lengths: frames of each sample, (B,) int64.
        """
        raise NotImplementedError

    def steps(self, num_frames: int, num_codebooks: int) -> int:
        """Steps S of T frames, the begin included."""
        return 1 + self.last(num_frames, num_codebooks) if num_frames else 1

    def last(self, num_frames: int, num_codebooks: int) -> int:
        """The last step that has a code, of T frames, at least one."""
        raise NotImplementedError

    def apply(self, codes: Tensor, special: int | bool, real: Tensor | None = None) -> Arranged:
        """Puts codes into their order.

        Args:
            codes: (B, T, K), of any type.
            special: what stands where no code does.
            real: (B, T) bool, the frames before each sample's end; None: all. Codes of others are left out.
        """
        (B, T, K), S = codes.shape, self.steps(codes.shape[1], codes.shape[2])
        real = torch.ones(B, T, dtype=torch.bool, device=codes.device) if real is None else real
        places = torch.where(real[..., None], self.places(real.sum(1), T, K), S)  # what is left out goes behind the end
        tokens = codes.new_full((B, S + 1, K), special).scatter(1, places, codes)
        filled = torch.zeros(B, S + 1, K, dtype=torch.bool, device=codes.device).scatter(
            1, places, torch.ones_like(places, dtype=torch.bool)
        )
        return Arranged(tokens[:, :S], filled[:, :S])

    def revert(
        self, values: Tensor, num_frames: int, lengths: Tensor | None = None, *, ahead: int = 0, fill: float = 0
    ) -> Tensor:
        """What a sequence has for each code.

        Args:
            values: (B, S, K, ...): tokens, or with `ahead` 1 what is predicted at each step of the next, such as logits.
            num_frames: T.
            lengths: frames of each sample, (B,); None: T.
            fill: what stands after them.
        Returns:
            (B, T, K, ...).
        """
        (B, S, K), T = values.shape[:3], num_frames
        lengths = torch.full((B,), T, device=values.device) if lengths is None else lengths
        real = torch.arange(T, device=values.device) < lengths[:, None]
        places = (self.places(lengths, T, K) - ahead).clamp(max=S - 1).expand(B, T, K)
        rest = values.shape[3:]
        index = places.reshape(B, T, K, *[1] * len(rest)).expand(B, T, K, *rest)
        return torch.where(real.view(B, T, 1, *[1] * len(rest)), values.gather(1, index), fill)


def _frames(lengths: Tensor, num_frames: int) -> Tensor:
    """(T, 1), counted from 1."""
    return torch.arange(1, num_frames + 1, device=lengths.device)[:, None]


def _on(like: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return constant(numbers, torch.int64, like.device)


@dataclass(frozen=True, kw_only=True)
class Parallel(Pattern):
    """All codes of a frame at one step."""

    def places(self, lengths: Tensor, num_frames: int, num_codebooks: int) -> Tensor:
        return _frames(lengths, num_frames).expand(-1, num_codebooks)[None]

    def last(self, num_frames: int, num_codebooks: int) -> int:
        return num_frames


@dataclass(frozen=True, kw_only=True)
class Delayed(Pattern):
    """Codebook k stands `delays[k]` steps after its frame; without `delays`, k steps."""

    delays: tuple[Delay, ...] | None = None

    def check(self, num_codebooks: int) -> None:
        _check_each("delays", self.delays, num_codebooks)

    def places(self, lengths: Tensor, num_frames: int, num_codebooks: int) -> Tensor:
        return (_frames(lengths, num_frames) + _on(lengths, self._each(num_codebooks)))[None]

    def last(self, num_frames: int, num_codebooks: int) -> int:
        return num_frames + max(self._each(num_codebooks))

    def _each(self, num_codebooks: int) -> tuple[int, ...]:
        return self.delays or tuple(range(num_codebooks))


@dataclass(frozen=True, kw_only=True)
class Flat(Pattern):
    """A frame's codes one after another; codebooks with one number in `groups` (0, 1, ...) at one step. Without it, each by itself."""

    groups: tuple[Delay, ...] | None = None

    def check(self, num_codebooks: int) -> None:
        _check_each("groups", self.groups, num_codebooks)
        if self.groups is not None and set(self.groups) != set(range(max(self.groups) + 1)):
            raise UserError(f"pattern.groups: got {list(self.groups)}; expected numbers from 0 on without a gap")

    def places(self, lengths: Tensor, num_frames: int, num_codebooks: int) -> Tensor:
        groups = self._each(num_codebooks)
        first = (_frames(lengths, num_frames) - 1) * (max(groups) + 1) + 1
        return (first + _on(lengths, groups))[None]

    def last(self, num_frames: int, num_codebooks: int) -> int:
        return num_frames * (max(self._each(num_codebooks)) + 1)

    def _each(self, num_codebooks: int) -> tuple[int, ...]:
        return self.groups or tuple(range(num_codebooks))


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(Pattern):
    """The first codebook of all frames, then the others, codebook k `delays[k - 1]` steps late; without `delays`, all at once."""

    needs_length: ClassVar[bool] = True
    delays: tuple[Delay, ...] | None = None

    def check(self, num_codebooks: int) -> None:
        _check_each("delays", self.delays, num_codebooks - 1)

    def places(self, lengths: Tensor, num_frames: int, num_codebooks: int) -> Tensor:
        frames = _frames(lengths, num_frames)  # (T, 1)
        fine = lengths[:, None, None] + (frames + _on(lengths, self._each(num_codebooks)))[None]  # (B, T, K - 1)
        return torch.cat([frames[None].expand(len(lengths), -1, -1), fine], dim=2)

    def last(self, num_frames: int, num_codebooks: int) -> int:
        return num_frames + max((num_frames + delay for delay in self._each(num_codebooks)), default=0)

    def _each(self, num_codebooks: int) -> tuple[int, ...]:
        return self.delays or (0,) * (num_codebooks - 1)


PATTERNS: dict[str, type[Pattern]] = {
    "parallel": Parallel,
    "delay": Delayed,
    "flat": Flat,
    "coarse_to_fine": CoarseToFine,
}


def _check_each(name: str, values: tuple[int, ...] | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise UserError(f"pattern.{name}: got {len(values)}, {list(values)}; expected {count}, one for each codebook")


def find_pattern(spec: str | Mapping[str, Any], num_codebooks: int) -> Pattern:
    """A pattern by its name in `PATTERNS`, such as `delay`, or {name: delay, delays: [0, 1, 2, 3]}.

    Raises:
        UserError: unknown name or argument, or a pattern of another number of codebooks.
    """
    pattern: Pattern = find_named(PATTERNS, spec, "pattern")
    pattern.check(num_codebooks)
    return pattern
