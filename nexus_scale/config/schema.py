"""The sections of a recipe (what is trained) and of a cluster file (where it runs): keys, types, bounds, defaults.

Bounds are wide: they keep out what is no number of workers, steps or seconds, and what takes longer to count than to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from nexus_scale.config.kinds import OneOf, Undecided, by_name

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""A name of a recipe, a run or a network; folders are named by it."""

MAX_STEPS = 10**12
MAX_WORKERS = 100_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Tokens = Annotated[int, Field(ge=1, le=10**7)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]
Named = Annotated[str, Field(pattern=NAME)]


class Component(BaseModel):
    """`{name: mmdit, depth: 28}`: a registered class and its constructor's arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Schedule(_Section):
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


class _Optimizer(_Section):
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


class PowerDecay(_Section):
    """The average whose profile is a power of time, (1 - 1/n)^(gamma + 1) after n steps: as wide at any length of the run.

    `sigma_rel`: the profile's relative width, its standard deviation as a part of the run. Source: Karras et al. 2024 (EDM2), section 3.
    """

    name: Literal["power"] = "power"
    sigma_rel: float = Field(0.1, gt=0, lt=0.2886)


class ConsistencyDecay(_Section):
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


class CosineDecay(_Section):
    """1 - (1 - base)(cos(pi k / K) + 1) / 2 at step k of K: from `base` to 1. Source: Grill et al. 2020 (BYOL), section 3.3."""

    name: Literal["cosine"] = "cosine"
    base: Share = 0.996


class HalfLifeDecay(_Section):
    """0.5^(1 / half-life): an old value counts half after `steps` steps. With `ramp`, at step k the half-life is at most `ramp` times k, so
    that the first weights are forgotten. EDM's half-life is 0.5 million images, 977 steps at its batch of 512.

    Source: Karras et al. 2022 (EDM), appendix F.2 and the published training loop; Karras et al. 2020 (StyleGAN2-ADA) for the ramp."""

    name: Literal["half_life"] = "half_life"
    steps: Positive = 977.0
    ramp: float | None = Field(0.05, gt=0, le=1000)


_decay_by_name = by_name(PowerDecay, ConsistencyDecay, CosineDecay, HalfLifeDecay)


class Average(_Section):
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


class InitFrom(_Section):
    """Where a network's first weights come from (for a frozen network, its only ones); see interop/init_from.py. `path` is absolute,
    begins with `~`, or lies below the data root, a run of ours below the runs root. `weights`: which network or average of that run."""

    format: Literal["run", "diffusers", "original", "safetensors"]
    path: str
    weights: Named | None = None

    @model_validator(mode="after")
    def _of_a_run(self) -> InitFrom:
        if self.weights is not None and self.format != "run":
            raise ValueError(f"weights needs format: run, whose networks have names; got format: {self.format}")
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


class Network(_Built):
    """A network that is trained, by the recipe's optimizer or its own."""

    optimizer: Optimizer | None = None

    @field_serializer("optimizer")
    def _its_own(self, optimizer: BaseModel | None, info: SerializationInfo) -> Any:
        return None if optimizer is None else optimizer.model_dump(mode=info.mode, exclude_unset=True)


class Frozen(_Built):
    """`frozen: true`: a network that only computes, in eval mode. Its weights come from `init_from` in every start of the run, which
    knows them by their fingerprint; checkpoints do not hold them."""


def _entry(value: Any) -> type[BaseModel]:
    """The kind of entry of `networks` that a mapping is. Later kinds (adapters) are recognised here."""
    if not isinstance(value, Mapping):
        raise Undecided("", "a mapping")
    if "average_of" in value:
        return Average
    if "name" in value:
        return Frozen if value.get("frozen") is True else Network
    raise Undecided("", "`name:` (a family) or `average_of:` (a network) with its keys")


Entry = Annotated[Network | Frozen | Average, OneOf(_entry)]


class Source(_Section):
    """Dataset folders joined sample by sample (for example latents and text embeddings of the same images), relative to the data root.

    `balance`: 0 draws samples as they are, 1 draws all classes of their `label` alike.
    """

    folders: list[Text] = Field(min_length=1)
    weight: Positive = 1.0
    balance: float = Field(0.0, ge=0, le=1)


class Split(_Section):
    sources: list[Source] = Field(min_length=1)


class SyntheticField(_Section):
    """One field of synthetic samples; data/synthetic.py checks which settings combine."""

    shape: list[Annotated[int, Field(ge=1, le=10**6)]] = Field(max_length=8)
    dtype: Literal["float32", "int64", "bool"] = "float32"
    lengths: bool = False
    high: int = Field(0, ge=0)
    bounds: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1)


class SyntheticData(_Section):
    """Synthetic samples instead of files: fields by name, each `{shape, dtype, lengths, high}`."""

    samples: int = Field(64, ge=1, le=10**7)
    fields: dict[str, dict[str, Any]] = Field(min_length=1, max_length=100)
    seed: int = Field(0, ge=0, lt=2**63)


class TrainedEncoder(_Section):
    """An autoencoder or a codec as an entry of `data.encoders`: a run of ours, or a folder."""

    run: Named | None = None
    folder: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> TrainedEncoder:
        if (self.run is None) == (self.folder is None):
            raise ValueError("expected either `run` or `folder`")
        return self


class TextEncoder(_Section):
    """A text encoder as an entry of `data.encoders`; see interop/encoders.py."""

    package: Text | None = None
    folder: Text | None = None
    tokenizer: Text | None = None
    max_tokens: Tokens | None = None
    pad_to: Tokens | None = None
    dtype: Literal["float16", "float32"] | None = None
    states: Literal["last", "penultimate"] | None = None

    @model_validator(mode="after")
    def _one(self) -> TextEncoder:
        if (self.package is None) == (self.folder is None):
            raise ValueError("expected either `package` or `folder`")
        return self


class PhonemeEncoder(_Section):
    """How text is spoken, as an entry of `data.encoders`."""

    language: Text = "en-us"


ENCODERS: dict[str, type[BaseModel]] = {"moments": TrainedEncoder, "codes": TrainedEncoder, "phonemes": PhonemeEncoder}
"""Fields that conditioners other than text encoders make."""


class BadData(_Section):
    """What happens to samples that are found damaged during training: `stop` at the first, or `replace` them by others of
    their bucket, up to `limit`, a share of all samples."""

    action: Literal["stop", "replace"] = "replace"
    limit: float = Field(0.001, ge=0, le=1)


class Data(_Section):
    """`text_tokens`: what sequences are cut or padded to; `tokens`: the same for some fields by name, `{codes: 300, phonemes: 96}`.

    `on_the_fly`: those of `encoders` that read the captions, or for `moments` the images, of the folders while training, so that nothing is
    precomputed; for small sets and small encoders, of which every worker has its own.
    """

    train: Split | None = None
    validation: Split | None = None
    text_tokens: Tokens | None = None
    tokens: dict[str, Tokens] = {}
    encoders: dict[str, dict[str, Any] | list[dict[str, Any]]] = {}
    on_the_fly: list[Literal["text", "phonemes", "moments"]] = []
    bad: BadData = BadData()
    synthetic: SyntheticData | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Data:
        if self.synthetic is None and self.train is None:
            raise ValueError("needs `train` (folders of shards) or `synthetic`")
        return self


class Job(BaseModel):
    """A job that makes missing data: `{job: precompute_text, input: ..., output: ...}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    job: Text

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Recipe(_Section):
    """What is trained. `networks` maps names to a component, to `{average_of: model, decay: 0.999}`, or to a component with
    `frozen: true`; a trained network may bring its own `optimizer`."""

    name: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(ge=1, le=MAX_STEPS)
    global_batch: int = Field(ge=1, le=10**9)
    networks: dict[Named, Entry] = Field(min_length=1, max_length=64)
    objective: Component
    optimizer: Optimizer = AdamW()
    data: Data
    prepare: list[Job] = []
    sample: Component | None = None
    callbacks: dict[str, dict[str, Any] | None] = {}
    tiny: dict[str, Any] = {}

    def averages(self) -> dict[str, Average]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Average)}

    def trained(self) -> dict[str, Network]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Network)}

    def frozen(self) -> dict[str, Frozen]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Frozen)}

    def built(self) -> dict[str, Network | Frozen]:
        """All but the averages."""
        return {name: entry for name, entry in self.networks.items() if not isinstance(entry, Average)}

    def called(self, needs: Iterable[str]) -> frozenset[str]:
        """Networks and averages that compute: those that the objective needs, and the one that guides what is drawn
        (`sample.guidance.by`)."""
        guidance = self.sample.arguments.get("guidance") if self.sample else None
        guide = guidance.get("by", "") if isinstance(guidance, Mapping) else ""
        return frozenset(needs) | ({guide} if isinstance(guide, str) and guide else frozenset())

    def average_of(self, network: str) -> str | None:
        """The first average of a network."""
        return next((name for name, average in self.averages().items() if average.average_of == network), None)


class Paths(_Section):
    """Roots of data and runs; relative paths start in the working directory. None: from the environment, or the default."""

    data: Text | None = None
    runs: Text | None = None

    @field_validator("data", "runs")
    @classmethod
    def _of_somebody(cls, value: str | None) -> str | None:
        try:
            Path(value or "").expanduser()
        except RuntimeError:
            raise ValueError("the home directory of this user is not known") from None
        return value


class Computing(_Section):
    """How networks compute: the settings that a cluster file passes to engines.

    `engine`: `deepspeed` shards over ranks by ZeRO-3, `replicated` keeps everything on each rank and averages gradients, `local` is one
    process. `sequence_parallel`: this many neighbouring ranks share the tokens of each sample in training. `offload`: `cpu` keeps
    optimizer state (and masters) in host memory under DeepSpeed. `compile`: torch compiles blocks, for each size of the data before the
    first step, and keeps what it compiled in the root of runs. `cuda_graphs`: of those, blocks whose weights stay in one place (engines
    `local` and `replicated`, networks that ZeRO-3 keeps whole) learn as CUDA graphs, in bf16: for networks so small that a GPU waits for
    the launches; each block keeps memory of its own. `deterministic`: on a GPU, only kernels that repeat to the bit
    (kernels/determinism.py); a CPU repeats anyway.
    """

    engine: Literal["deepspeed", "local", "replicated"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 3
    sequence_parallel: int = Field(1, ge=1, le=MAX_WORKERS)
    offload: Literal["none", "cpu"] = "none"
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False

    @model_validator(mode="after")
    def _graphs(self) -> Self:
        if self.cuda_graphs and (not self.compile or self.activation_checkpointing or self.sequence_parallel > 1):
            raise ValueError(
                "cuda_graphs: expected compile: true, activation_checkpointing: false and sequence_parallel: 1 beside it; change them, or "
                "set cuda_graphs: false"
            )
        return self


class Cluster(Computing):
    """Where it runs; nothing here changes the curve beyond the order of floating-point sums.

    `workers`: 0 runs in this process; a number; or [min, max] for elastic training. `micro_batch`: samples a worker takes at
    once (None: its whole share of the global batch; in elastic training, what serves at every number of workers that divides it; auto:
    the largest that fits, found by the planner and by trial in the run's first start, with recomputation of blocks where even 1 does not).
    `sequence_parallel`: this many neighbouring workers share the tokens of each sample in training (Ulysses), for samples too
    large or slow for one worker; networks must support it. The figures of memory, `peak_tflops`, `gpu` (H100, H200)
    and the bandwidth of links, in one direction and for each GPU (within a node; between nodes), serve `nexus plan` and the dry run alone.

    `max_failures`: restarts in a row without a new checkpoint between them; `backoff_s`: the wait before the second of them, doubled
    from there. `max_preemptions`: restarts because machines were taken away (None: any number). `standby`: a process for each
    worker waits beside it with everything imported, so that a restart takes seconds; it costs some 0.5 GB of memory each. Workers
    with GPUs have none.
    """

    name: str = "local_cpu"
    workers: int | tuple[int, int] = 2
    micro_batch: int | Literal["auto"] | None = None
    precision: Literal["float32", "bf16", "auto"] = "float32"
    kernels: dict[str, str] = {}
    threads_per_worker: int | None = Field(None, ge=1, le=4096)
    cpus_per_worker: float = Field(1, gt=0, le=4096)
    gpus_per_worker: float = Field(0, ge=0, le=1024)
    nodes: int = Field(1, ge=1, le=MAX_WORKERS)
    node_memory_gib: Positive | None = None
    gpu_memory_gib: Positive | None = None
    peak_tflops: Positive | None = None
    gpu: Text | None = None
    node_link_gb_per_second: Positive | None = None
    network_gb_per_second: Positive | None = None
    paths: Paths = Paths()
    max_failures: int = Field(3, ge=0)
    max_preemptions: int | None = Field(None, ge=0)
    backoff_s: float = Field(2.0, ge=0, le=86400)
    standby: bool = True
    start_deadline_s: Seconds = 120.0
    collective_timeout_s: Seconds = 600.0

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if least < 0 or most < least or (isinstance(value, tuple) and least < 1) or most > MAX_WORKERS:
            raise ValueError(
                f"expected 0, a positive number, or [min, max] with 1 <= min <= max, and at most {MAX_WORKERS:,} workers"
            )
        return value

    @field_validator("micro_batch")
    @classmethod
    def _micro_batch(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and not 1 <= value <= 10**9:
            raise ValueError("expected auto, or a number from 1 to 1,000,000,000")
        return value

    @model_validator(mode="after")
    def _sequences(self) -> Cluster:
        if self.sequence_parallel > 1 and (isinstance(self.workers, tuple) or self.ranks % self.sequence_parallel):
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel}: expected a fixed number of workers that it divides, got workers "
                f"{self.workers}"
            )
        return self

    @model_validator(mode="after")
    def _machines(self) -> Cluster:
        if self.nodes > self.ranks:
            raise ValueError(
                f"nodes {self.nodes}: expected at most one machine for each worker, got workers {self.workers}; set nodes to the "
                "number of machines, or raise workers"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Cluster:
        if self.max_workers and self.engine == "local":
            raise ValueError("engine local is one process; set workers to 0, or engine to deepspeed or replicated")
        if self.max_workers and self.engine == "deepspeed" and self.zero_stage != 3:
            raise ValueError(
                f"zero_stage {self.zero_stage}: the deepspeed engine supports only ZeRO-3, whose shards make up the checkpoints; "
                "set zero_stage to 3, or engine to replicated"
            )
        return self

    @property
    def max_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def ranks(self) -> int:
        """Processes that train: `workers: 0` is one process, this one."""
        return max(1, self.max_workers)

    @property
    def fixed_micro_batch(self) -> int | None:
        """The micro-batch where the file says a number."""
        return None if self.micro_batch == "auto" else self.micro_batch

    @property
    def sharers(self) -> int:
        """The number of parts of a global batch: ranks, or groups of ranks that share each sample."""
        return self.ranks // self.sequence_parallel
