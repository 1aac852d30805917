"""What is asked of a family that draws, what it draws with, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from nexus_scale.contracts.data import Cond, Rng

Predictor = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""`denoise(x_t, t) -> (x0, eps)`: x_t (B, ...), t (B,); what samplers and guidance see instead of a network. For a sampler that
asks for it, (x0, eps, v) with a learned variance (`processes.reverse.learned_log_variance`)."""


@runtime_checkable
class Sampler(Protocol):
    """What `Objective.generate` draws with: a registered class of samplers/."""

    @property
    def walks(self) -> str:
        """`denoise`: from noise to data with a predictor (`NoiseSampler`); `logits`: token by token (`TokenSampler`); `masks`: from hidden
        tokens to known ones (`MaskSampler`)."""
        ...

    @property
    def steps(self) -> int:
        """How many steps a walk takes; of tokens, at most."""
        ...


@dataclass(frozen=True)
class Start:
    """Where a walk begins in place of noise alone: at `x0` (B, ...), noised as it is where the last `strength` of the steps begin.

    Source: Meng et al. 2022, "SDEdit"; image-to-image of latent diffusion's code.
    """

    x0: Tensor
    strength: float


class NoiseSampler(Sampler, Protocol):
    """Noise becomes a sample, step by step."""

    @property
    def learns_variance(self) -> bool:
        """Whether its predictor must answer (x0, eps, v)."""
        ...

    def sample(
        self,
        denoise: Predictor,
        x_T: Tensor,
        *,
        path: Any,
        rng: Rng | None = None,
        callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """x0, (B, ...) float32 in model space, from standard normal noise x_T (B, ...). `path` is the one that `denoise` recovers
        with, `rng` gives noise on the way, `callback(step, t, x, x0)` is called after each step; with `start` x_T noises its samples."""
        ...


class TokenSampler(Sampler, Protocol):
    """Tokens, one after another, until each row has ended."""

    def sample(
        self,
        logits: Callable[[Tensor | None], Tensor],
        *,
        end: int | None,
        rng: Rng,
        finished: Callable[[bool], bool] = bool,
        steps: range | None = None,
    ) -> Any:
        """`tokens` (B, T) or (B, T, K), `lengths` (B,), `ended` (B,) bool; see `samplers.autoregressive`."""
        ...


class MaskSampler(Sampler, Protocol):
    """Hidden tokens become known, level by level, many at a time."""

    def sample(
        self,
        logits: Callable[[Tensor, int], Tensor],
        codes: Tensor,
        hidden: Tensor,
        *,
        mask: int,
        levels: Sequence[int],
        rng: Rng,
        progress: Callable[[int, int], None] = lambda done, steps: None,
    ) -> Tensor:
        """Codes (B, T, K) of which none is hidden; see `samplers.masked`."""
        ...


@dataclass(frozen=True)
class Guidance:
    """Guidance away from a prediction without conditions, or from a weaker one.

    Attributes:
        scale: two forwards a step unless it is 0 or 1; 1 is no guidance, 0 unconditional.
        channels: only so many of the first channels are guided; None: all.
        interval: (low, high): guided at times t in (low, high] alone, conditional elsewhere at the cost of one forward; on EDM's path t is
            sigma. None: always. Source: Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval".
        rescale: share of the guided prediction that is brought back to the spread of the conditional one; see
            `processes.guidance.rescaled_to`.
        by: the network or average that is guided away from, told the same conditions (autoguidance: a weaker version of the one that
            draws); empty: the one that draws, without conditions. Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad
            Version of Itself".
        embedded: the scale that a distilled network is told; None: what its objective says.
        image: away from a prediction without the picture that is told beside a text, where `Draws.guides_pictures`. Source: Brooks et al.
            2023, "InstructPix2Pix".
    """

    scale: float = 1.0
    channels: int | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    by: str = ""
    embedded: float | None = None
    image: float = 1.0

    @property
    def is_double(self) -> bool:
        """Whether a step costs two forwards, or more."""
        return self.scale not in (0.0, 1.0) or self.image != 1


def _no_progress(done: int, steps: int) -> None:
    return None


@dataclass(frozen=True)
class Request:
    """What is asked of `Objective.generate` beside conditions. A family reads what its `Draws.takes` names.

    Attributes:
        shape: of one sample in model space, such as (C, H, W) or (C, F, H, W); () where the family itself decides.
        lengths: (B,) frames of each sample that are real, where samples of many lengths share `shape`; None: all are.
        sampler: None where the family needs none.
        negative: conditions to be guided away from, each (B, ...); None: the unconditional ones.
        given: what the samples are made of or go on from, by name, each (B, ...): the family's own field to rebuild, a voice's codes.
        strength: of samples that are given to be drawn anew (`Draws.makes` among `given`): the share of the walk that they go through.
        continues: `given` is the beginning of the samples, and comes back as their beginning.
        known: (B, T, k) codes of the first k levels of whole samples, of `lengths`, where finer ones alone are drawn (`Draws.levels`).
        everywhere: whether all ranks are done, given whether this one is: where ranks share a network none may stop before the others.
        progress: told (steps done, steps) as drawing goes on.
    """

    shape: tuple[int, ...] = ()
    lengths: Tensor | None = None
    sampler: Sampler | None = None
    guidance: Guidance = Guidance()
    negative: Cond | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    strength: float = 1.0
    continues: bool = False
    known: Tensor | None = None
    everywhere: Callable[[bool], bool] = bool
    progress: Callable[[int, int], None] = _no_progress


@dataclass(frozen=True)
class Generated:
    """Samples in model space (B, ...). `lengths` (B,): how much of each is real along its first axis of time, None: all.
    `ended` (B,) bool: the network itself ended it, None where nothing ends."""

    samples: Tensor
    lengths: Tensor | None = None
    ended: Tensor | None = None


Word = Literal[
    "prompt",
    "label",
    "sampler",
    "steps",
    "guidance",
    "true_guidance",
    "negative",
    "size",
    "sizes",
    "length",
    "voice",
    "prosody",
    "timbre",
    "edit",
    "begin",
    "melody",
    "image",
    "control",
    "reverse",
    "mask",
    "strength",
    "interpolate",
    "walk",
    "mix",
    "traverse",
    "truncate",
]
"""What may be asked of drawing, as the command line calls it."""

OF_LATENTS: frozenset[Word] = frozenset({"interpolate", "walk", "mix", "traverse", "truncate"})
"""What may be asked of every family that draws from a `Latent`."""


@dataclass(frozen=True)
class Latent:
    """The standard normal draw that a sample is made of: `rng.normal(name, shape)` in `Objective.generate`."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Draws:
    """What a family draws, and what it takes to draw it.

    Attributes:
        makes: the batch field in whose place its samples are: `moments` (latents of an autoencoder), `image`, `video`, `audio`, `codes`.
        takes: what may be asked of it; everything else is refused by name.
        conditions: names of what its network is told, for which prompts are encoded.
        encoded: those of `conditions` that are pictures as `moments`.
        given: names that `Request.given` must have.
        walks: which samplers draw it, by `Sampler.walks`; empty: it needs none.
        constants: numbers that the network is told throughout, by name; `guidance` is the scale that it was distilled to obey.
        drops: training shows the network samples without conditions, so that guidance means something.
        draws_into: its network is told a mask and what it leaves of a picture, and draws nothing without.
        begins: what it draws begins as a picture that is given, which its network is told as this condition, moments; empty: it needs none.
        guides_pictures: guidance has a scale of its own for the picture that is told.
        prompt_frames: how long the voices are, in frames, that training gives at most.
        levels: of the codes that it draws level by level, of which the first ones may be given (`Request.known`); 0: it does not.
        sample_rate_hz: of waveforms; 0 where samples are none.
        latent: what samples are made of, where that is one draw for each: `takes` then has `OF_LATENTS`, which generate/ alone knows of.
    """

    makes: str
    takes: frozenset[Word] = frozenset()
    conditions: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    walks: Literal["denoise", "logits", "masks", ""] = ""
    constants: Mapping[str, float] = field(default_factory=dict)
    drops: bool = False
    draws_into: bool = False
    begins: str = ""
    guides_pictures: bool = False
    prompt_frames: int = 0
    levels: int = 0
    sample_rate_hz: int = 0
    latent: Latent | None = None

    def __post_init__(self) -> None:
        if self.latent is not None:
            object.__setattr__(self, "takes", self.takes | OF_LATENTS)

    @property
    def translates(self) -> bool:
        """Whether a picture that is given becomes another one: `given` names what goes in, `makes` what comes out."""
        return bool(self.given) and "image" in self.takes

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network was distilled to obey a guidance scale, and is told it."""
        return "guidance" in self.constants
