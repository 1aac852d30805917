"""Recipe (what is trained) and Cluster (where it runs): load, merge, check, dump.

A recipe and a cluster are two files. Merge order: defaults, then the file that `base:` names (one level), then the file itself,
then `key=value` from the command line, where `cluster.key=value` goes to the cluster. An unknown key is an error that names the
file, the key and the nearest valid one. The same recipe gives the same curve on any cluster.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nexus_scale import registry
from nexus_scale.contracts import UserError
from nexus_scale.plain_yaml import parse_yaml, read_yaml

# ------------------------------------------------------------------------------------------------- the schema


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Of a recipe or a run: it names folders."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    warmup_steps: int = Field(0, ge=0)
    final_ratio: float = Field(0.0, ge=0, le=1)
    decay_steps: int | None = Field(None, ge=1)


class Optimizer(_Section):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad_norm: float | None = Field(1.0, gt=0)
    schedule: Schedule = Schedule()


class Average(_Section):
    """A moving average of a trained network, as an entry of `networks`."""

    average_of: str
    decay: float = Field(0.9999, ge=0, lt=1)
    warmup: bool = True


class Role(_Section):
    """What an entry of `networks` says beside its family and its constructor's arguments. `init_from`: see interop/init_from.py.

    `sharded: false` keeps a large network whole on each rank under ZeRO-3, as a gradient penalty needs; small ones are anyway.
    """

    frozen: bool = False
    sharded: bool = True
    optimizer: Optimizer | None = None
    init_from: dict[str, Any] | None = None


class Source(_Section):
    """Dataset folders joined sample by sample (for example latents and text embeddings of the same images), relative to the data root.

    `balance`: 0 draws samples as they are, 1 draws all classes of their `label` alike.
    """

    folders: list[str] = Field(min_length=1)
    weight: float = Field(1.0, gt=0)
    balance: float = Field(0.0, ge=0, le=1)


class Split(_Section):
    sources: list[Source] = Field(min_length=1)


class SyntheticData(_Section):
    """Made-up samples instead of files: fields by name, each `{shape, dtype, lengths, high}`."""

    samples: int = Field(64, ge=1)
    fields: dict[str, dict[str, Any]]
    seed: int = 0


class BadData(_Section):
    """What is done about samples that are found damaged during training: `stop` at the first, or `replace` them by others of
    their bucket, up to `limit`, a share of all samples."""

    action: Literal["stop", "replace"] = "replace"
    limit: float = Field(0.001, ge=0, le=1)


class Data(_Section):
    """`text_tokens`: what sequences are cut or padded to; `tokens`: the same for some fields by name, `{codes: 300, phonemes: 96}`."""

    train: Split | None = None
    validation: Split | None = None
    text_tokens: int | None = Field(None, ge=1)
    tokens: dict[str, Annotated[int, Field(ge=1)]] = {}
    encoders: dict[str, dict[str, Any] | list[dict[str, Any]]] = {}
    bad: BadData = BadData()
    synthetic: SyntheticData | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Data:
        if self.synthetic is None and self.train is None:
            raise ValueError("needs `train` (folders of shards) or `synthetic`")
        return self


class Job(BaseModel):
    """A step that makes data where they are not there yet: `{job: precompute_text, input: ..., output: ...}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    job: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Recipe(_Section):
    """What is trained. `networks` maps names to a component, to `{average_of: model, decay: 0.999}`, or to a component with
    `frozen: true`; a trained network may bring its own `optimizer`."""

    name: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    networks: dict[str, dict[str, Any]] = Field(min_length=1)
    objective: Component
    optimizer: Optimizer = Optimizer()
    data: Data
    prepare: list[Job] = []
    sample: Component | None = None
    callbacks: dict[str, dict[str, Any] | None] = {}
    tiny: dict[str, Any] = {}

    def averages(self) -> dict[str, dict[str, Any]]:
        return {name: spec for name, spec in self.networks.items() if "average_of" in spec}

    def trained(self) -> dict[str, dict[str, Any]]:
        return {n: s for n, s in self.networks.items() if "average_of" not in s and not s.get("frozen", False)}


class Paths(_Section):
    """Roots of data and runs; relative ones start where the user stands. None: the environment's, or the default."""

    data: str | None = None
    runs: str | None = None


class Cluster(_Section):
    """Where it runs; nothing here changes the curve beyond the order of floating-point sums.

    `workers`: 0 runs in this process; a number; or [least, most] for elastic training. `micro_batch`: samples a worker takes at
    once (None: its whole share of the global batch; in elastic training, what serves at every number of workers that divides it).
    `sequence_parallel`: so many neighbouring workers share the tokens of each sample in training (Ulysses), where one worker's memory or
    time does not suffice for them; networks must offer it. Memory and FLOP/s figures serve the dry run alone.

    `max_failures`: restarts in a row without a new checkpoint between them; `backoff_s`: the wait before the second of them, doubled
    from there. `max_preemptions`: restarts because machines were taken away (None: any number). `standby`: a process for each
    worker waits beside it with everything imported, so that a restart takes seconds; it costs some 0.5 GB of memory each. Workers
    with GPUs have none.
    """

    name: str = "local_cpu"
    workers: int | tuple[int, int] = 2
    micro_batch: int | None = Field(None, ge=1)
    sequence_parallel: int = Field(1, ge=1)
    engine: Literal["deepspeed", "local", "replicated"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 3
    precision: Literal["float32", "bf16", "auto"] = "float32"
    offload: Literal["none", "cpu"] = "none"
    activation_checkpointing: bool = False
    compile: bool = False
    kernels: dict[str, str] = {}
    threads_per_worker: int | None = Field(None, ge=1)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    nodes: int = Field(1, ge=1)
    node_memory_gib: float | None = None
    gpu_memory_gib: float | None = None
    peak_tflops: float | None = None
    paths: Paths = Paths()
    max_failures: int = Field(3, ge=0)
    max_preemptions: int | None = Field(None, ge=0)
    backoff_s: float = Field(2.0, ge=0)
    standby: bool = True
    start_deadline_s: float = Field(120.0, gt=0)
    collective_timeout_s: float = Field(600.0, gt=0)

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if least < 0 or most < least or (isinstance(value, tuple) and least < 1):
            raise ValueError("expected 0, a positive number, or [least, most] with 1 <= least <= most")
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
    def _engine_fits(self) -> Cluster:
        if self.most_workers and self.engine == "local":
            raise ValueError("engine local is one process; set workers to 0, or engine to deepspeed or replicated")
        if self.most_workers and self.engine == "deepspeed" and self.zero_stage != 3:
            raise ValueError(
                f"zero_stage {self.zero_stage}: the deepspeed engine shards by ZeRO-3 alone, whose shards are what checkpoints hold; "
                "set zero_stage to 3, or engine to replicated"
            )
        return self

    @property
    def most_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def ranks(self) -> int:
        """Processes that train: `workers: 0` is one process, this one."""
        return max(1, self.most_workers)

    @property
    def sharers(self) -> int:
        """Among how many the global batch is shared: ranks, or groups of ranks that share each sample."""
        return self.ranks // self.sequence_parallel


# ------------------------------------------------------------------------------------------------- reading


def configs_root() -> Path:
    """The folder configs/: of the source tree, or the copy that a wheel carries."""
    beside = Path(__file__).resolve().parent.parent / "configs"
    return beside if beside.is_dir() else Path(__file__).resolve().parent / "configs"


def find_config(name: str, kind: str = "") -> Path:
    """Path of a config: an existing file, or a name below configs/ (`mmdit/tiny_openmoji`, `cluster/local_cpu`).

    Raises:
        UserError: there is none; lists the nearest.
    """
    root = configs_root()
    for candidate in (Path(name), root / kind / name, root / kind / f"{name}.yaml", root / name, root / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    folder = root / kind
    known = [
        p.relative_to(folder).with_suffix("").as_posix()
        for p in sorted(folder.rglob("*.yaml"))
        if p.parent.name not in ("_base", *(() if kind else ("cluster",)))
    ]
    raise UserError(f"{name}: no such file, and no such config; {registry.nearest(name, known)}")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping. A component of another `name` (or an average) replaces the whole one."""
    out = dict(copy.deepcopy(dict(below)))
    for key, value in above.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = "name" in value and value["name"] != old.get("name")
            out[key] = copy.deepcopy(dict(value)) if renamed else merge(old, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def overrides_of(pairs: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`key.key=value` pairs as nested mappings: those of the recipe and those of the cluster (`cluster.`)."""
    recipe: dict[str, Any] = {}
    cluster: dict[str, Any] = {}
    for pair in pairs:
        dotted, sign, text = pair.partition("=")
        keys = dotted.split(".")
        if not sign or not all(keys):
            raise UserError(f"{pair!r}: expected key=value, for example steps=200 or cluster.workers=1")
        target = recipe
        if keys[0] == "cluster" and len(keys) > 1:
            target, keys = cluster, keys[1:]
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UserError(f"{pair!r}: {key} is given both a value and keys of its own")
        target[keys[-1]] = parse_yaml(text, pair)
    return recipe, cluster


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section class in a type annotation, and whether the value is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for choice in get_args(annotation):
            section, many = _section_of(choice)
            if section:
                return section, many
    if origin is list:
        section, _ = _section_of(get_args(annotation)[0])
        return section, section is not None
    return None, False


def _refuse_unknown(section: type[BaseModel], values: Any, where: str, prefix: str = "") -> None:
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in section.model_fields:
            if section.model_config.get("extra") == "allow":
                continue
            raise UserError(
                f"{where}: unknown key {dotted!r}; {registry.nearest(str(key), list(section.model_fields))}"
            )
        inner, many = _section_of(section.model_fields[key].annotation)
        if inner:
            for item in value if many and isinstance(value, list) else [value]:
                _refuse_unknown(inner, item, where, f"{dotted}.")


def _with_base(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    below = read_yaml(find_config(str(base)))
    if "base" in below:
        raise UserError(f"{base}: a base may not have a base of its own (named by {path})")
    return merge(below, values)


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """Checks keys and types.

    Raises:
        UserError: an unknown, missing or ill-typed key.
    """
    _refuse_unknown(Recipe, values, where)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in registry.explain(error, ""))) from None
    for name, spec in recipe.networks.items():
        if "average_of" not in spec and "name" not in spec:
            raise UserError(
                f"{where}: networks.{name}: expected `name:` (a family) or `average_of:` (a network); got {sorted(spec)}"
            )
    return recipe


def cluster_from(values: Mapping[str, Any], where: str) -> Cluster:
    """Checks keys and types, as recipe_from does."""
    _refuse_unknown(Cluster, values, where)
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in registry.explain(error, ""))) from None


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None, *, tiny: bool = False) -> Recipe:
    """A recipe by path or by name below configs/. `tiny` lays its `tiny:` block over it, below the overrides."""
    path = find_config(name)
    values = _with_base(path)
    recipe_from(values, str(path))  # so that a mistake in the file is not blamed on the command line
    if tiny:
        values = merge(values, values.get("tiny", {}))
        if "synthetic" in values["data"]:  # made-up data stand in for the files, and need no job and no encoder
            values["data"] = {k: v for k, v in values["data"].items() if k not in ("train", "validation", "encoders")}
            values["prepare"] = []
    if overrides:
        values = merge(values, overrides)
    return recipe_from(values, f"{path} with the command line" if overrides else str(path))


def load_cluster(name: str, overrides: Mapping[str, Any] | None = None) -> Cluster:
    """A cluster by path or by name below configs/cluster/."""
    path = find_config(name, "cluster")
    return cluster_from(
        merge(read_yaml(path), overrides or {}), f"{path} with the command line" if overrides else str(path)
    )


# ------------------------------------------------------------------------------------------------- checking


def check(recipe: Recipe, callbacks_injected: frozenset[str] = frozenset()) -> None:
    """Everything that can be known before any worker starts: families, arguments, roles.

    Raises:
        UserError: what is wrong, where, and what would be right.
    """
    for name, spec in recipe.networks.items():
        where = f"networks.{name}"
        if "average_of" in spec:
            of = spec["average_of"]
            if of not in recipe.trained():
                raise UserError(
                    f"{where}.average_of: no trained network {of!r}; {registry.nearest(str(of), list(recipe.trained()))}"
                )
            _checked(Average, spec, where)
        else:
            _checked(Role, {key: value for key, value in spec.items() if key in Role.model_fields}, where)
            registry.check_arguments(registry.find("models", spec["name"]), network_arguments(spec), where)
    registry.check_arguments(
        registry.find("objectives", recipe.objective.name),
        recipe.objective.arguments,
        "objective",
        frozenset({"latents"}),
    )
    if recipe.sample is not None:
        sampler = {k: v for k, v in recipe.sample.arguments.items() if k != "guidance"}
        registry.check_arguments(registry.find("samplers", recipe.sample.name), sampler, "sample")
    for name, arguments in recipe.callbacks.items():
        if arguments is not None:
            registry.check_arguments(
                registry.find("callbacks", name), arguments, f"callbacks.{name}", callbacks_injected
            )


def _checked(section: type[BaseModel], values: Mapping[str, Any], where: str) -> None:
    _refuse_unknown(section, values, where)
    try:
        section.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(registry.explain(error, where))) from None


def network_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's part of a network's entry: without its family and its role."""
    return {key: value for key, value in spec.items() if key != "name" and key not in Role.model_fields}


def network_class(spec: Mapping[str, Any]) -> tuple[type[Any], dict[str, Any]]:
    """A network's class and checked arguments."""
    cls = registry.find("models", spec["name"])
    return cls, registry.check_arguments(cls, network_arguments(spec), spec["name"])


def accumulation(global_batch: int, workers: int, micro_batch: int | None) -> tuple[int, int]:
    """Micro-batch and number of micro-batches per worker and step.

    Raises:
        UserError: the global batch does not divide; lists what does.
    """
    if global_batch % workers:
        fits = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
        near = [w for w in fits if w <= max(2 * workers, 8)]
        raise UserError(f"global_batch {global_batch} does not divide among {workers} workers; numbers that do: {near}")
    share = global_batch // workers
    micro = micro_batch or share
    if share % micro:
        fits = [m for m in range(1, share + 1) if share % m == 0]
        raise UserError(
            f"micro_batch {micro} does not divide the {share} samples that each of {workers} workers takes of global_batch "
            f"{global_batch}; sizes that do: {fits}"
        )
    return micro, share // micro


# ------------------------------------------------------------------------------------------------- identity


CURVE = ("seed", "global_batch", "networks", "objective", "optimizer", "data")
"""The parts of a recipe that a run may not change on its way: with another one the curve is another run's."""


def identity(recipe: Recipe) -> dict[str, Any]:
    """The parts that make the curve, as plain values. What is done about bad data makes none: a run that stopped at the limit may
    go on with a higher one. Nor does where a network's weights lie."""
    values: dict[str, Any] = json.loads(json.dumps({key: dump(recipe)[key] for key in CURVE}))
    del values["data"]["bad"]
    for spec in values["networks"].values():
        spec.pop("sharded", None)
    return values


def identity_of(written: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An `identity` that another version may have written, as this version would write it: a key that was not there yet has its
    default, which means what was done before there was one.

    Raises:
        UserError: it has keys or values that this version does not know.
    """
    return identity(recipe_from({"name": "written", "steps": 1, **written}, where))


def recipe_hash(recipe: Recipe) -> str:
    """XXH3-128 of the parts that make the curve, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity(recipe), sort_keys=True).encode())


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`key: old -> new`, one line for each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted(set(old) | set(new)):
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{where}.{key}".strip("."))
        return lines
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def dump(section: BaseModel) -> dict[str, Any]:
    """Plain values that read back to an equal recipe or cluster."""
    values: dict[str, Any] = section.model_dump(mode="json", exclude_none=False)
    return values


def prompts_of(path: Path) -> Sequence[str]:
    """Prompts of a text file, one a line.

    Raises:
        UserError: no such file, or none in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; expected one a line")
    return prompts
