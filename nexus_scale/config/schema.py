"""The sections of a recipe (what is trained) and of a cluster file (where it runs): keys, types, bounds, defaults.

Bounds are wide: they keep out what is no number of workers, steps or seconds, and what takes longer to count than to train.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from nexus_scale.config.networks import (  # re-exported: a recipe is read from here  # noqa: F401
    SGD,
    Adam,
    AdamW,
    Adapter,
    Average,
    ConsistencyDecay,
    CosineDecay,
    Entry,
    Frozen,
    HalfLifeDecay,
    InitFrom,
    Network,
    Optimizer,
    PowerDecay,
    RMSprop,
    Schedule,
)
from nexus_scale.config.sections import (
    MAX_STEPS,
    MAX_WORKERS,
    NAME,
    Component,
    Named,
    Positive,
    Seconds,
    Section,
    Text,
    Tokens,
)


class Source(Section):
    """Dataset folders joined sample by sample (for example latents and text embeddings of the same images), relative to the data root.

    `balance`: 0 draws samples as they are, 1 draws all classes of their `label` alike. `named`: further folders of the same samples, by
    what batches call their image: `{source: sketches/train/images}`.
    """

    folders: list[Text] = Field(min_length=1)
    weight: Positive = 1.0
    balance: float = Field(0.0, ge=0, le=1)
    named: dict[Named, Text] = Field({}, max_length=8)

    @model_serializer(mode="wrap")
    def _as_it_was(self, dump: Any) -> dict[str, Any]:
        """Leaves out what is empty, so that recipes older than the key keep their identity."""
        return {key: value for key, value in dump(self).items() if key != "named" or value}


class Split(Section):
    """`unpaired`: images that have nothing to do with the sample that they stand beside, by what batches call them, each drawn from sources
    of its own: `{source: [{folders: [horses/train/images]}]}`."""

    sources: list[Source] = Field(min_length=1)
    unpaired: dict[Named, Annotated[list[Source], Field(min_length=1)]] = Field({}, max_length=8)

    @model_serializer(mode="wrap")
    def _as_it_was(self, dump: Any) -> dict[str, Any]:
        """As `Source`'s."""
        return {key: value for key, value in dump(self).items() if key != "unpaired" or value}


class SyntheticField(Section):
    """One field of synthetic samples; data/synthetic.py checks which settings combine."""

    shape: list[Annotated[int, Field(ge=1, le=10**6)]] = Field(max_length=8)
    dtype: Literal["float32", "int64", "bool"] = "float32"
    lengths: bool = False
    high: int = Field(0, ge=0)
    bounds: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1)


class SyntheticData(Section):
    """Synthetic samples instead of files: fields by name, each `{shape, dtype, lengths, high}`."""

    samples: int = Field(64, ge=1, le=10**7)
    fields: dict[str, dict[str, Any]] = Field(min_length=1, max_length=100)
    seed: int = Field(0, ge=0, lt=2**63)


class TrainedEncoder(Section):
    """An autoencoder or a codec as an entry of `data.encoders`: a run of ours, or a folder."""

    run: Named | None = None
    folder: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> TrainedEncoder:
        if (self.run is None) == (self.folder is None):
            raise ValueError("expected either `run` or `folder`")
        return self


class TextEncoder(Section):
    """A text encoder as an entry of `data.encoders`; see interop/encoders.py."""

    package: Text | None = None
    folder: Text | None = None
    tokenizer: Text | None = None
    max_tokens: Tokens | None = None
    pad_to: Tokens | None = None
    dtype: Literal["float16", "float32"] | None = None
    states: Literal["last", "penultimate"] | None = None
    ids: bool | None = None
    new_tokens: dict[Text, Annotated[int, Field(ge=1, le=64)]] | None = None

    @model_validator(mode="after")
    def _one(self) -> TextEncoder:
        if (self.package is None) == (self.folder is None):
            raise ValueError("expected either `package` or `folder`")
        return self


class PhonemeEncoder(Section):
    """How text is spoken, as an entry of `data.encoders`."""

    language: Text = "en-us"


class ImageEncoder(Section):
    """An encoder of pictures as prompts as an entry of `data.encoders`; see interop/image_encoders.py."""

    package: Text | None = None
    folder: Text | None = None
    states: bool = False

    @model_validator(mode="after")
    def _one(self) -> ImageEncoder:
        if (self.package is None) == (self.folder is None):
            raise ValueError("expected either `package` or `folder`")
        return self


class SemanticEncoder(Section):
    """The groups of features that semantic tokens are, as an entry of `data.encoders`: a folder of cluster_features."""

    folder: Text


ENCODERS: dict[str, type[BaseModel]] = {
    "moments": TrainedEncoder,
    "codes": TrainedEncoder,
    "video_codes": TrainedEncoder,
    "phonemes": PhonemeEncoder,
    "image_prompt": ImageEncoder,
    "semantic": SemanticEncoder,
}
"""Fields that conditioners other than text encoders make."""


class BadData(Section):
    """What happens to samples that are found damaged during training: `stop` at the first, or `replace` them by others of
    their bucket, up to `limit`, a share of all samples."""

    action: Literal["stop", "replace"] = "replace"
    limit: float = Field(0.001, ge=0, le=1)


class Data(Section):
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


class Recipe(Section):
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

    @model_validator(mode="after")
    def _adapters_have_bases(self) -> Recipe:
        for name, adapter in self.adapters().items():
            base = self.networks.get(adapter.adapts)
            if not isinstance(base, Frozen):
                frozen = ", ".join(self.frozen()) or "none"
                raise ValueError(
                    f"networks.{name}.adapts: {adapter.adapts!r} is no network with frozen: true; those are: {frozen}"
                )
            adapter._base = base
        return self

    def averages(self) -> dict[str, Average]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Average)}

    def trained(self) -> dict[str, Network | Adapter]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Network | Adapter)}

    def adapters(self) -> dict[str, Adapter]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Adapter)}

    def frozen(self) -> dict[str, Frozen]:
        return {name: entry for name, entry in self.networks.items() if isinstance(entry, Frozen)}

    def built(self) -> dict[str, Network | Frozen | Adapter]:
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


class Paths(Section):
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


class Computing(Section):
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
