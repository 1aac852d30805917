"""The words that the rooms of the house exchange. Shapes and meanings; no behaviour.

Letters are the same everywhere: B batch, C channels, F frames, H W height and width, T audio or token
time, L sequence, D hidden, N heads, E head dim, K codebooks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nexus_scale.contracts.data import (
    SIZES,
    Batch,
    Cond,
    CondField,
    Conditioner,
    Rng,
    keep_on_host,
    on_both,
    on_host,
)
from nexus_scale.contracts.generation import (
    OF_LATENTS,
    Draws,
    Generated,
    Guidance,
    Latent,
    MaskSampler,
    NoiseSampler,
    Predictor,
    Request,
    Sampler,
    Start,
    TokenSampler,
    Word,
)
from nexus_scale.contracts.networks import Adapter, Follower, Network

__all__ = [
    "Adapter",
    "SIZES",
    "Batch",
    "Cond",
    "CondField",
    "Conditioner",
    "Rng",
    "keep_on_host",
    "on_both",
    "on_host",
    "Draws",
    "Generated",
    "Guidance",
    "Latent",
    "MaskSampler",
    "NoiseSampler",
    "OF_LATENTS",
    "Predictor",
    "Request",
    "Sampler",
    "Start",
    "TokenSampler",
    "Word",
    "Loss",
    "Follower",
    "Network",
    "Nets",
    "Objective",
    "Phase",
    "SumOverRanks",
    "Engine",
    "ReadShard",
    "Shard",
    "Callback",
    "Preempted",
    "Progress",
    "Rollback",
    "RunFolder",
    "Stage",
    "StepInfo",
    "UserError",
    "SAFE_ENVIRONMENT",
]

# ------------------------------------------------------------------------------------ networks and losses


Nets = Mapping[str, Any]
"""Networks by the name that the recipe gives them, ready to be called; and those averages that the objective `needs`, which answer in
eval mode and without gradients with the values that they have (a consistency target, an EMA teacher)."""


@dataclass(frozen=True)
class Loss:
    """`total`: what is minimised, a float32 scalar, mean over the micro-batch. `metrics`: detached scalars by name, or a
    pair of tensors (sum, count) where a mean over samples needs its own weight (for example a loss per time bucket)."""

    total: Tensor
    metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)


Trains = str | tuple[str, ...]
"""What a phase trains: a network, or several."""


@dataclass(frozen=True)
class Phase:
    """One optimizer step of one network, or of several that one loss teaches (two generators, a text encoder with its network), each by
    its own optimizer. `draws`: whether it takes new batches, or reuses those of the phase before."""

    name: str
    trains: Trains
    draws: bool = True

    @property
    def networks(self) -> tuple[str, ...]:
        return names_of(self.trains)


def names_of(trains: Trains) -> tuple[str, ...]:
    return (trains,) if isinstance(trains, str) else trains


SumOverRanks = Callable[[Tensor], Tensor]
"""`sum_over_ranks(value)`: the sum of all ranks' tensors of one shape, equal to the bit on all of them. A collective."""


class Objective:
    """The family's mathematics, in float32. Never calls backward, never touches an optimizer, rank, device or file.

    A family is a subclass; what it leaves out has the default that stands here.

    `loss` may take gradients itself (`torch.autograd.grad`) with respect to what goes into a network or comes out of it. A network
    through which such a gradient is differentiated again (`create_graph=True`: R1, a gradient penalty), or with respect to whose
    parameters it is taken (an adaptive weight), stands in `needs_whole`: it cannot be sharded, which is checked before a worker starts.
    """

    needs_whole: Sequence[str] = ()
    """Names of the networks that must be whole on each rank."""

    together: int = 1
    """Neighbours in the global batch that a loss takes together: micro-batches must be multiples of it, which is checked before a worker
    starts."""

    empty_texts: Sequence[str] = ()
    """Conditions that are texts, and for which the empty text stands where training drops them: it is encoded before a start."""

    # ---- what it reads

    @property
    def needs(self) -> Sequence[str]:
        """Names of the networks and averages it calls; the recipe must give them. An average that is not named here costs nothing
        beside its values."""
        raise NotImplementedError

    @property
    def fields(self) -> Sequence[str]:
        """Names of the batch fields it reads; the data must have them."""
        raise NotImplementedError

    def mismatch(self, nets: Nets, batch: Batch | None) -> str | None:
        """Why networks of these settings cannot learn from a few samples, beyond fields and shapes: such as two fields at other rates than
        it is told. None: they can. Asked before a worker starts; of made-up data without a batch."""
        return None

    # ---- training

    def phases(self, step: int) -> Sequence[Phase]:
        """The phases of a step, counted from 0: a function of the step alone, which anyone may ask for any step. A name may occur
        several times in a step (five critic updates); each occurrence has random draws of its own."""
        raise NotImplementedError

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        raise NotImplementedError

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """What is learned of the global batch beside gradients: codebooks, running norms. Returns metrics, as `Loss` has them.

        The loop calls it on all ranks after the step of each phase, also where the engine skipped it: it adds up over ranks what `loss`
        left over this rank's micro-batches, updates buffers of networks and the objective's own state. Of `rng` only `shared` has a
        meaning here. So two workers learn what one learns, and all hold the same.
        """
        return {}

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """The family's validation on fixed noise: (B,) float32 tensors by name, one value per sample. `loss` is among them;
        `loss_zero` is that of a predictor which always answers zero. A tensor (B, n) is a row of each sample, for `figures`."""
        raise NotImplementedError

    def figures(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is said of the validation set as a whole, and is no mean over samples: scalars by name.

        Args:
            rows: what `validate` gave as rows, of all samples in their order, (N, n) float64; the same on all ranks.
        """
        return {}

    def likelihood(
        self, nets: Nets, batch: Batch, rng: Rng, *, exact: bool, tolerance: float, earliest: float
    ) -> Mapping[str, Tensor]:
        """How probable the network finds data: (B,) float64 tensors by name, one value per sample; `bits` of each of its values is among
        them.

        Args:
            exact: nothing is estimated, whatever it costs.
            tolerance: absolute and relative, of a solver.
            earliest: time at which the data are taken to be, as a part of the whole.
        """
        raise UserError(f"objective {type(self).__name__} knows no likelihood")

    # ---- generation

    @property
    def draws(self) -> Draws | None:
        """What it draws, and what it takes to do so; None: it draws nothing."""
        return None

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """One sample for each of the rng's positions. Networks are called without a surrounding `no_grad`: the caller has one.

        Args:
            cond: conditions by name, each (B, ...), as batches have them.
        """
        raise UserError(f"objective {type(self).__name__} draws nothing")

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """What drawing the like of a batch takes: its conditions, and `request` with its shape, its lengths and what it gives."""
        return {}, request

    def unconditional(self, cond: Cond) -> Cond:
        """What the network is told instead of `cond` to answer without conditions."""
        return {}

    def misfit(self, sampler: Sampler, guidance: Guidance) -> str | None:
        """Why the sampler cannot draw what the network predicts, such as `with target x0 on path P: ...`; None: it can."""
        return None

    def refitted(self, sampler: Sampler) -> Sequence[str]:
        """Settings of the objective that would fit the sampler, in words; for messages."""
        return ()

    def sampler_of(self, request: Request) -> Any:
        """The request's sampler, of the kind that `draws.walks` names: a `NoiseSampler` or a `TokenSampler`.

        Raises:
            UserError: the request has none, one of the other kind, or something else, such as a sampler's name.
        """
        walks, sampler = self.draws.walks if self.draws else "", request.sampler
        if not isinstance(sampler, Sampler) or sampler.walks != walks:
            got = "none" if sampler is None else f"{sampler!r}, which is no sampler"
            if isinstance(sampler, Sampler):
                got = f"{type(sampler).__name__}, for {sampler.walks!r}"
            raise UserError(
                f"objective {type(self).__name__} draws with a sampler for {walks!r} (see samplers/); request.sampler: got {got}"
            )
        return sampler

    # ---- state

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """What it remembers from step to step beside networks, by name: a pool of images, a running norm, a probability.

        The constructor puts each tensor here, and none changes its shape or type later. They are equal on all ranks: `loss` reads them,
        `after_phase` replaces them (`self.kept["pool"] = ...`) by what `sum_over_ranks` and `rng.shared` say. Checkpoints keep them; a
        resume and a rollback give them back, on the CPU: take them to where they are used by `kernels.transfer.to_device`."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What checkpoints keep of it, equal on all ranks: `kept`, where a family has no state of another form."""
        return dict(self.kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave. A family that holds something of an unfinished step drops it here."""
        if (own := _shapes(self.kept)) != (given := _shapes(state)):
            raise ValueError(f"objective {type(self).__name__} keeps {own}; got {given}")
        self.kept.update({name: state[name].to(held.dtype) for name, held in self.kept.items()})


def _shapes(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items())) or "nothing"


# ----------------------------------------------------------------------------------------------- engine


@dataclass(frozen=True)
class Shard:
    """A rank's part of one logical tensor, as checkpoints store it: they know tensors and not workers.

    Attributes:
        local: the values, flat, (n,).
        start: index of local[0] in the flattened logical tensor.
        shape: shape of the logical tensor.
    """

    local: Tensor
    start: int
    shape: tuple[int, ...]


ReadShard = Callable[[str, int, int], Tensor]
"""`read(name, start, stop)`: values [start, stop) of the flattened logical tensor of that name, on the CPU."""


class Engine(Protocol):
    """All that knows there is more than one process, a precision or an optimizer.

    All ranks make the same calls in the same order, in validation and sampling too.
    """

    nets: Nets
    device: torch.device
    rank: int
    world_size: int

    def training(self, trains: Trains) -> AbstractContextManager[None]:
        """Within it these networks learn and all others rest (`requires_grad` off)."""
        ...

    def backward(self, trains: Trains, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss`, which the loop has divided by the accumulation; `last` ends the accumulation."""
        ...

    def step(self, trains: Trains, step: int, last: bool = False) -> Mapping[str, Tensor | float]:
        """Clips, guards against non-finite values, updates. Returns `lr`, `grad_norm`, and `skipped` (1.0 where the update
        was left out because a gradient was not finite on some rank); the last two may be scalars on the device, which nobody reads
        before the next step is queued.

        Of several networks each is clipped, guarded and updated by itself: `grad_norm` is that of all of them, `skipped` that of any,
        `lr` the first one's; `lr_<network>`, `grad_norm_<network>` are each one's own. `last`: these networks learn no more in this step,
        and their averages may move at once."""
        ...

    def update_averages(self, step: int) -> None: ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape, on the device they came from; `value` stays as it is. A collective."""
        ...

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Within it the trained networks compute with their average called `name` (or, where `name` is a trained network,
        with what they have), in eval mode without gradients. Afterwards the trained weights are back to the bit."""
        ...

    def shards(self) -> dict[str, Shard]:
        """This rank's part of all state: `<net>/<parameter>.fp32`, `.exp_avg`, `.exp_avg_sq`, `<average>/<parameter>.ema`,
        `<net>/<buffer>.buffer`, and `<net>.optimizer_steps`. The tensors are live: copy before the next step. Frozen networks are no
        part of it: they come from where they came from (`fill`)."""
        ...

    def load_shards(self, read: ReadShard) -> None:
        """Takes this rank's part of all state back, whatever number of workers wrote it."""
        ...

    def fill(self, name: str, read: ReadShard) -> None:
        """Gives a network, frozen or not, and its averages other weights. Each rank reads its own part, whatever is sharded.

        Args:
            read: of parameters and of the buffers in the state by their names in the network; it raises KeyError for one that is not
                there, which stays as it is.
        """
        ...

    def regather(self) -> None:
        """Copies masters and averages anew to where they compute. A collective."""
        ...

    def parameters(self, name: str) -> Iterable[tuple[str, Tensor]]:
        """Full float32 tensors of a network or of an average, one at a time, on the CPU. A collective: all ranks iterate."""
        ...


# --------------------------------------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run is: all that order and randomness depend on. `step` steps are done, `draws` global batches were drawn.
    Global batches whose draw number lies in one of `skipped` ([first, last], inclusive) are passed over."""

    step: int = 0
    draws: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class StepInfo:
    """What callbacks get after each step.

    Attributes:
        step: number of steps done, this one included.
        steps: where the run ends.
        metrics: sums of this step by name, as (sum, count). Names are `<phase>/<metric>`; with one phase, `<metric>`. In `after_reading`
            they are numbers. In `after_step` they may be tensors of the device, which computes still: to read one is to wait for it.
        engine, progress: live; nothing may be kept of them past the call.
        batches: this rank's micro-batches of all global batches that the step drew.
        settle: has the metrics of all steps so far read and handed to `after_reading` before it returns. For callbacks that wait for the
            device anyway; a save calls it first, so that a checkpoint holds no step that nobody has judged. All ranks call it alike.
        waited: seconds so far for which the host waited for the device to read metrics.
    """

    step: int
    steps: int
    metrics: Mapping[str, tuple[Any, Any]]
    engine: Engine
    progress: Progress
    batches: Sequence[Batch] = ()
    settle: Callable[[], None] = lambda: None
    waited: float = 0.0


class Callback:
    """Something that happens every N steps. All methods are called on all ranks, in the recipe's order."""

    @classmethod
    def check_files(cls, arguments: Mapping[str, Any], data_root: Path) -> None:
        """Raises a UserError where data that it reads, with these arguments of its constructor, are not there; before a worker starts."""
        return None

    def before_run(self, engine: Engine, progress: Progress) -> None:
        return None

    def after_step(self, info: StepInfo) -> None:
        """Called after each step, when the engine has its state; a device may still be computing it."""
        return None

    def after_reading(self, info: StepInfo) -> None:
        """Called once for each step, in order, when its metrics are on the host: `info.metrics` are numbers.

        On a CPU and at the last step before `after_step`; where a device computes by itself, when the next step's work is queued there,
        or when `settle` asks for it. `info.step` is the step that was read; engine and progress may be a step further.
        """
        return None

    def after_run(self, engine: Engine, progress: Progress) -> None:
        """Called when the last step is done, not when the run fails."""
        return None

    def close(self) -> None:
        """Called however the run ended: stop threads, close files."""
        return None


Stage = Callable[[str], None]
"""The one hook of the watchdog: loader, engine and loop report `start`, `data`, `forward`, `backward`, `step`, `save`."""


class Rollback(Exception):
    """A callback or the engine asks to go back to a checkpoint and to pass over global batches [first, last].

    `before`: the newest checkpoint of at most so many steps will do; None: the newest. Raised on all ranks after the same step.
    """

    def __init__(self, reason: str, first: int, last: int, before: int | None = None):
        super().__init__(reason)
        self.first, self.last, self.before = first, last, before


class Preempted(Exception):
    """The run stopped on request; its state is saved. `step`: steps done."""

    def __init__(self, step: int):
        super().__init__(f"stopped on request after step {step}; the state is saved")
        self.step = step


class UserError(Exception):
    """A mistake of the user's: what was got, what was expected, what to change. Shown without a stack trace.

    `code` is the exit code (documented in the README): 2 usage or recipe, 3 data, 4 cluster resources, 5 run folder, 6 disk.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.code)


SAFE_ENVIRONMENT = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "WDS_SECURE": "1"}
"""Set in every process of ours: libraries below us, too, read weights as weights and shards without decoders that run code."""


@dataclass(frozen=True)
class RunFolder:
    """The layout of `runs/<name>`."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def cluster(self) -> Path:
        return self.path / "cluster.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def results(self) -> Path:
        return self.path / "results.json"
