"""The `networks:` and `optimizer:` of a recipe: what is trained, averaged and kept frozen, and how it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializationInfo,
    field_serializer,
    model_serializer,
    model_validator,
)

from nexus_scale.config.kinds import OneOf, Undecided, by_name
from nexus_scale.config.sections import MAX_STEPS, Named, Positive, Section, Share, Text


class Schedule(Section):
    """Learning rate as a function of the step, as a factor of the peak.

    `constant`; `cosine` and `linear` fall to `final_ratio` at the last step; `wsd` (warm-up, stable, decay) stays at the peak and
    falls linearly to `final_ratio` over the last `decay_steps`. All of them first rise linearly over `warmup_steps`.
    """

    name: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=MAX_STEPS)
    final_ratio: float = Field(0.0, ge=0, le=1)
    decay_steps: int | None = Field(None, ge=1, le=MAX_STEPS)


def _written(entry: BaseModel, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """An entry of `networks` as the recipe writes it, without defaults; its identity."""
    values = dump(entry)
    return {key: values[key] for key in values if key in entry.model_fields_set or key not in type(entry).model_fields}


class _Optimizer(Section):
    """Settings that all optimizers share.

    `clip_grad_norm`: the gradients' total L2 norm is scaled down to at most this; null: never. `clip_weights`: after each step every
    weight is moved into [-clip_weights, clip_weights] (Arjovsky et al. 2017, WGAN).
    """

    lr: float = Field(1e-4, gt=0, le=1000)
    weight_decay: float = Field(0.0, ge=0, le=1000)
    clip_grad_norm: float | None = Field(1.0, gt=0)
    clip_weights: float | None = Field(None, gt=0)
    schedule: Schedule = Schedule()

    @model_serializer(mode="wrap")
    def _as_it_was(self, dump: Any) -> dict[str, Any]:
        """Leaves out a null clip_weights, so that recipes older than the key keep their identity."""
        values: dict[str, Any] = dump(self)
        return {key: value for key, value in values.items() if key != "clip_weights" or value is not None}


class AdamW(_Optimizer):
    """Adam with decoupled weight decay. Source: Loshchilov & Hutter 2019."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0, le=1)


class Adam(_Optimizer):
    """Weight decay is added to the gradient. Source: Kingma & Ba 2015."""

    name: Literal["adam"] = "adam"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0, le=1)


class RMSprop(_Optimizer):
    """Weight decay is added to the gradient; `alpha`: part of the mean square that stays after a step. Source: Tieleman & Hinton 2012."""

    name: Literal["rmsprop"] = "rmsprop"
    alpha: Share = 0.99
    eps: float = Field(1e-8, gt=0, le=1)
    momentum: Share = 0.0


class SGD(_Optimizer):
    """Weight decay is added to the gradient. Source: Sutskever et al. 2013 (momentum, Nesterov's)."""

    name: Literal["sgd"] = "sgd"
    momentum: Share = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum; set momentum, for example to 0.9")
        return self


Optimizer = Annotated[AdamW | Adam | RMSprop | SGD, OneOf(by_name(AdamW, Adam, RMSprop, SGD, default="adamw"))]


class PowerDecay(Section):
    """The average whose profile is a power of time, (1 - 1/n)^(gamma + 1) after n steps: as wide at any length of the run.

    `sigma_rel`: the profile's relative width, its standard deviation as a part of the run. Source: Karras et al. 2024 (EDM2), section 3.
    """

    name: Literal["power"] = "power"
    sigma_rel: float = Field(0.1, gt=0, lt=0.2886)


class ConsistencyDecay(Section):
    """A consistency target's: exp(s0 ln(mu0) / N(k)) with N(k) discretisation steps at step k, from s0 = `start_scales` to
    `end_scales` + 1; mu0 = `start_decay`. Source: Song et al. 2023, "Consistency models", section 5 and appendix C."""

    name: Literal["consistency"] = "consistency"
    start_decay: float = Field(0.9, gt=0, lt=1)
    start_scales: int = Field(2, ge=2, le=10**6)
    end_scales: int = Field(150, ge=2, le=10**6)

    @model_validator(mode="after")
    def _grows(self) -> ConsistencyDecay:
        if self.end_scales < self.start_scales:
            raise ValueError(f"end_scales {self.end_scales}: expected at least start_scales {self.start_scales}")
        return self


class CosineDecay(Section):
    """1 - (1 - base)(cos(pi k / K) + 1) / 2 at step k of K: from `base` to 1. Source: Grill et al. 2020 (BYOL), section 3.3."""

    name: Literal["cosine"] = "cosine"
    base: Share = 0.996


class HalfLifeDecay(Section):
    """0.5^(1 / half-life): an old value counts half after `steps` steps. With `ramp`, at step k the half-life is at most `ramp` times k, so
    that the first weights are forgotten. EDM's half-life is 0.5 million images, 977 steps at its batch of 512.

    Source: Karras et al. 2022 (EDM), appendix F.2 and the published training loop; Karras et al. 2020 (StyleGAN2-ADA) for the ramp."""

    name: Literal["half_life"] = "half_life"
    steps: Positive = 977.0
    ramp: float | None = Field(0.05, gt=0, le=1000)


_decay_by_name = by_name(PowerDecay, ConsistencyDecay, CosineDecay, HalfLifeDecay)


class Average(Section):
    """A moving average of a trained network, as an entry of `networks`.

    `decay`: part of the old average that stays after a step, a number or a function of the step by its name. `warmup`: with a number,
    it is at most (1 + step) / (10 + step), so that the first weights are forgotten at once.
    """

    average_of: Text
    decay: Annotated[
        float | PowerDecay | ConsistencyDecay | CosineDecay | HalfLifeDecay,
        OneOf(lambda value: _decay_by_name(value) if isinstance(value, Mapping) else Share),
    ] = 0.9999
    warmup: bool = True

    @model_serializer(mode="wrap")
    def _as_written(self, dump: Any) -> dict[str, Any]:
        return _written(self, dump)

    @model_validator(mode="after")
    def _one_beginning(self) -> Average:
        if "warmup" in self.model_fields_set and self.warmup and isinstance(self.decay, BaseModel):
            raise ValueError(f"warmup needs a decay that is a number; {self.decay.name} defines its own start")
        return self


class InitFrom(Section):
    """Where a network's first weights come from (for a frozen network, its only ones); see interop/init_from.py. `path` is absolute,
    begins with `~`, or lies below the data root, a run of ours below the runs root. `weights`: which network or average of that run; of a
    file of low-rank changes the part of a pipeline that they are of, such as text_encoder_2."""

    format: Literal["run", "diffusers", "transformers", "original", "safetensors"]
    path: str
    weights: Named | None = None

    @model_validator(mode="after")
    def _of_a_run(self) -> InitFrom:
        if self.weights is not None and self.format not in ("run", "diffusers"):
            raise ValueError(
                f"weights needs format: run, whose networks have names, or diffusers; got format: {self.format}"
            )
        return self


class _Built(BaseModel):
    """A network to build: its family, the settings that all networks share, and its constructor's arguments.

    `engine`: under ZeRO-3 the weights of a large network are `sharded` and gathered part by part where they compute; `replicated`
    keeps them whole on each rank, as a gradient penalty needs. Small ones are whole anyway. `sharded: false` is the older spelling.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    frozen: bool = False
    engine: Literal["sharded", "replicated"] = "sharded"
    sharded: bool | None = Field(None, exclude=True)
    init_from: InitFrom | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("sharded") is None:
            return values
        engine = "sharded" if values["sharded"] else "replicated"
        if values.get("engine", engine) != engine:
            raise ValueError(
                f"sharded: {str(values['sharded']).lower()} and engine: {values['engine']} contradict; keep engine"
            )
        return {**{key: value for key, value in values.items() if key != "sharded"}, "engine": engine}

    @model_serializer(mode="wrap")
    def _as_written(self, dump: Any) -> dict[str, Any]:
        return _written(self, dump)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self.model_extra or {})


class _Learns(BaseModel):
    """What learns: `optimizer` is its own, in place of the recipe's."""

    optimizer: Optimizer | None = None

    @field_serializer("optimizer")
    def _its_own(self, optimizer: BaseModel | None, info: SerializationInfo) -> Any:
        return None if optimizer is None else optimizer.model_dump(mode=info.mode, exclude_unset=True)


class Network(_Built, _Learns):
    """A network that is trained, by the recipe's optimizer or its own."""


class Frozen(_Built):
    """`frozen: true`: a network that only computes, in eval mode. Its weights come from `init_from` in every start of the run, which
    knows them by their fingerprint; checkpoints do not hold them. `bits: 8`: each rank holds the linear layers of its blocks in 8 bits,
    which ZeRO-3 does not shard (engine/eight_bits.py)."""

    bits: Literal[8] | None = None


class Adapter(_Learns):
    """`{adapts: base, name: lora, rank: 16}`: a small trained network over a frozen one of the same recipe, under whose name it is called;
    its family and its constructor's arguments, as of any network. Each rank has it whole."""

    model_config = ConfigDict(extra="allow", frozen=True)
    adapts: Named
    name: str
    init_from: InitFrom | None = None
    _base: Frozen | None = PrivateAttr(None)

    @model_serializer(mode="wrap")
    def _as_written(self, dump: Any) -> dict[str, Any]:
        return _written(self, dump)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, without the base."""
        return dict(self.model_extra or {})

    @property
    def engine(self) -> Literal["replicated"]:
        return "replicated"

    @property
    def base(self) -> Frozen:
        """The entry of the network that it adapts."""
        assert self._base is not None, "entries of a recipe are told their base"
        return self._base


def _entry(value: Any) -> type[BaseModel]:
    """The kind of entry of `networks` that a mapping is."""
    if not isinstance(value, Mapping):
        raise Undecided("", "a mapping")
    if "average_of" in value:
        return Average
    if "adapts" in value:
        return Adapter
    if "name" in value:
        return Frozen if value.get("frozen") is True else Network
    raise Undecided("", "`name:` (a family), `adapts:` or `average_of:` (a network) with its keys")


Entry = Annotated[Network | Frozen | Adapter | Average, OneOf(_entry)]
