"""Recipe + cluster -> data, networks, engine, callbacks -> Trainer. What one worker does from its start to the end of the run.

Where a run goes on is resume.py's to say. Callbacks get what they need from other
rooms by the names in SERVICES.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.config import registry
from nexus_scale.config.recipe import (
    Cluster,
    Optimizer,
    Recipe,
    Split,
    accumulation,
    dump,
    network_class,
)
from nexus_scale.contracts import (
    Batch,
    Callback,
    Engine,
    Objective,
    Progress,
    ReadShard,
    Rollback,
    RunFolder,
    UserError,
)
from nexus_scale.data.bad import BadData
from nexus_scale.data.dataset import Dataset
from nexus_scale.data.dataset import Source as DataSource
from nexus_scale.data.loader import Loader
from nexus_scale.data.stores import placed
from nexus_scale.data.synthetic import SyntheticDataset
from nexus_scale.engine import build_engine, distributed
from nexus_scale.engine.networks import Caller, count_parameters, on_second_derivative
from nexus_scale.engine.precision import measured_precision
from nexus_scale.engine.settings import (
    WHOLE_NUMEL,
    AverageSpec,
    EngineSettings,
    NetSpec,
    OptimizerSpec,
    ScheduleSpec,
    stays_whole,
)
from nexus_scale.interop.init_from import InitFrom, first_weights, opened
from nexus_scale.io import faults, incidents
from nexus_scale.io.durable import atomic_write
from nexus_scale.kernels import choice
from nexus_scale.kernels.memory import keep_freed_memory
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.latent_space import check_normalisation, keep_normalisation
from nexus_scale.processes.latents import LatentStats
from nexus_scale.rehearsal import flops
from nexus_scale.rehearsal.batches import batches_to_rehearse, explained, maker, networks_on_meta
from nexus_scale.rehearsal.meta import network_on_meta, refused
from nexus_scale.run.files import frozen_choices
from nexus_scale.run.resume import open_store, resume, state_of, versions
from nexus_scale.run.skipped import SkippedRange, all_skipped, skip, skipped_ranges
from nexus_scale.trainer import Trainer

log = logging.getLogger(__name__)

SERVICES = frozenset(
    {
        "run", "stage", "context", "objective", "validation", "checkpoints", "state", "draw", "record", "flops_per_sample",
        "tokens_per_sample", "peak_flops", "global_batch", "steps", "seed", "averages", "batch",
    }
)  # fmt: skip
"""Constructor arguments of callbacks that the program gives; all others come from the recipe."""

Draw = Callable[[Engine, int], Any]
"""`draw(engine, count)`: so many samples of the run as it is, a collective; rank 0 gets them. Made by generate.py."""

RECORDED = ("name", "seed", "steps", "global_batch", "networks", "objective", "optimizer", "sample")
"""What of a recipe may leave the machine for an experiment tracker; paths and encoders stay."""


@dataclass(frozen=True)
class Place:
    """Absolute roots of this run's files."""

    run: RunFolder
    data_root: Path
    runs_root: Path


class FaultyClock(StageClock):
    """The clock of a process that was asked for faults: they strike as a stage begins. Without NEXUS_FAULT it is not in the loop."""

    def __call__(self, name: str) -> None:
        super().__call__(name)
        faults.at(name)


class LastBatch:
    """What the loop was given last, for the record of a stall; nothing is kept alive by it."""

    def __init__(self, next_batches: Callable[[], Sequence[Batch]]):
        self._next_batches = next_batches
        self._first: weakref.ref[Batch] | None = None

    def __call__(self) -> Sequence[Batch]:
        batches = self._next_batches()
        self._first = weakref.ref(batches[0])
        return batches

    def first(self) -> Batch | None:
        """The first of those micro-batches, while the loop has it."""
        return None if self._first is None else self._first()


def train(recipe: Recipe, cluster: Cluster, place: Place, make_draw: Callable[..., Draw | None]) -> dict[str, Any]:
    """One worker's part of a run, from wherever the run is to its end.

    Args:
        make_draw: `make_draw(recipe, place, objective, dataset) -> draw` for the callback that draws samples while training.
    Returns:
        steps, seconds, workers, rank; figures of the run are in its folder.
    """
    begun = time.monotonic()
    clock = FaultyClock() if faults.asked_for() else StageClock()
    if cluster.threads_per_worker:
        torch.set_num_threads(cluster.threads_per_worker)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cluster.gpus_per_worker else torch.device("cpu")
    )
    if device.type == "cpu":
        keep_freed_memory()
    if cluster.max_workers:
        distributed.init(device, timeout_s=cluster.collective_timeout_s)
    rank, world_size = distributed.rank(), distributed.world_size()
    progress = Progress()
    faults.arm(rank, lambda: progress.step)
    clock("start")

    chosen = _choices(recipe, cluster, place.run, device, rank)
    together = cluster.sequence_parallel  # neighbouring ranks that see the same samples
    micro, accumulated = accumulation(recipe.global_batch, world_size // together, chosen["micro_batch"])
    dataset = open_data(recipe, place.data_root)
    check_normalisation(place.run, dataset)
    if rank == 0:
        keep_normalisation(place.run, dataset)  # before anything says that the run has begun
    objective = make_objective(recipe, dataset.latent_stats)
    check_fields(recipe, objective, dataset)
    engine = _engine(recipe, cluster, chosen["precision"], micro, accumulated, device, clock)
    store = open_store(recipe, place.run, rank, world_size)
    resume(place.run, recipe, engine, objective, progress)
    if progress.step == 0:
        begin_from(recipe, engine, place.data_root)
    progress.skipped = all_skipped(progress.skipped, skipped_ranges(place.run))

    loader: Loader | None = None
    callbacks: list[Callback] = []
    while True:
        try:
            loader = Loader(
                dataset, seed=recipe.seed, global_batch=recipe.global_batch, micro_batch=micro, rank=rank // together,
                world_size=world_size // together, progress=progress, stage=clock,
                note=functools.partial(incidents.note, place.run.path, rank=rank),
            )  # fmt: skip
            given = LastBatch(loader.next_batches)
            services = {
                "run": place.run,
                "stage": clock,
                "batch": given.first,
                "context": {},
                "objective": objective,
                "validation": validation_of(recipe, place.data_root, dataset, micro, rank, world_size),
                "checkpoints": store,
                "state": lambda: state_of(recipe, progress, world_size, chosen, dataset.latent_stats),
                "draw": make_draw(recipe, place, objective, dataset) if asks_for(recipe.callbacks, "draw") else None,
                "record": {key: dump(recipe)[key] for key in RECORDED},
                "global_batch": recipe.global_batch,
                "steps": recipe.steps,
                "seed": recipe.seed,
                "averages": tuple(recipe.averages()),
                "peak_flops": cluster.peak_tflops * 1e12 * world_size if cluster.peak_tflops else None,
                **costs(recipe),
            }
            callbacks = make_callbacks(recipe.callbacks, services)
            Trainer(
                steps=recipe.steps,
                seed=recipe.seed,
                objective=objective,
                engine=engine,
                next_batches=given,
                callbacks=callbacks,
                progress=progress,
                stage=clock,
            ).run()
            break
        except Rollback as rollback:
            clock("start")
            entry = SkippedRange(progress.step, rollback.first, rollback.last, str(rollback))
            if rank == 0:
                skip(place.run, entry)  # before anything else: what is decided stays decided
            store.wait()
            resume(place.run, recipe, engine, objective, progress, before=rollback.before)
            progress.skipped = all_skipped(progress.skipped, [*skipped_ranges(place.run), entry])
            if rank == 0:
                words = f"{rollback}: back to step {progress.step}, past global batches {entry.first} to {entry.last}"
                log.warning("%s", words)
                facts = {"step": entry.step, "back_to": progress.step, "passed_over": [entry.first, entry.last]}
                incidents.note(place.run.path, "rolled_back", words, **facts)
        finally:
            for callback in callbacks:
                callback.close()
            if loader is not None:
                loader.close()
    store.close()
    distributed.barrier()
    return {"steps": progress.step, "seconds": time.monotonic() - begun, "workers": world_size, "rank": rank}


# ------------------------------------------------------------------------------------------------- data


def open_data(recipe: Recipe, data_root: Path, split: str = "train") -> Any:
    """The recipe's data: shards under the data root, or made-up samples."""
    if recipe.data.synthetic is not None:
        made_up = recipe.data.synthetic
        return SyntheticDataset(made_up.samples, made_up.fields, made_up.seed)
    part: Split | None = getattr(recipe.data, split)
    if part is None:
        raise UserError(f"data.{split}: not given", code=3)
    sources = [DataSource([placed(data_root, f) for f in s.folders], s.weight, s.balance) for s in part.sources]
    bad = BadData(**recipe.data.bad.model_dump())
    return Dataset.open(sources, text_tokens=recipe.data.text_tokens, tokens=recipe.data.tokens, bad=bad)


def validation_of(
    recipe: Recipe, data_root: Path, train_data: Any, micro: int, rank: int, world_size: int
) -> Callable[[int], Iterator[Batch]]:
    """`validation(count)`: this rank's batches of the first `count` samples of a fixed order of the validation split; where a recipe
    has none, of the training data, which is said once."""
    if recipe.data.synthetic is None and recipe.data.validation is None:
        log.info("no data.validation in the recipe: the validation loss is of training samples")
    held_out = train_data if recipe.data.validation is None else open_data(recipe, data_root, "validation")

    def validation(count: int) -> Iterator[Batch]:
        return held_out.fixed(count, rank=rank, world_size=world_size, batch=micro)

    return validation


def make_objective(recipe: Recipe, latents: LatentStats | None) -> Objective:
    """The objective, given the statistics of the latents where the data have them."""
    cls = registry.find("objectives", recipe.objective.name)
    arguments = registry.check_arguments(cls, recipe.objective.arguments, "objective", frozenset({"latents"}))
    if "latents" in inspect.signature(cls.__init__).parameters:
        arguments["latents"] = latents
    objective: Objective = registry.made(cls, arguments, "objective")
    return objective


def check_fields(recipe: Recipe, objective: Objective, dataset: Any) -> None:
    """Every network and field that the objective needs is there, and what it trains may learn.

    Raises:
        UserError: names what is missing and what there is.
    """
    for role in objective.needs:
        if role not in recipe.networks:
            raise UserError(
                f"objective {recipe.objective.name} needs a network {role!r}; networks has {sorted(recipe.networks)}"
            )
    trained = sorted(recipe.trained())
    for phase in objective.phases(0):
        if phase.trains not in trained:
            raise UserError(
                f"objective {recipe.objective.name} trains {phase.trains!r}; of networks, {trained} are not frozen and no averages"
            )
    missing = [field for field in objective.fields if field not in dataset.fields]
    if missing:
        raise UserError(
            f"objective {recipe.objective.name} reads {missing}, which the data lack; they have {sorted(dataset.fields)}",
            code=3,
        )


def check_sharding(recipe: Recipe, cluster: Cluster, names: Iterable[str]) -> None:
    """None of these networks, which the objective needs whole on each rank, will be sharded.

    Raises:
        UserError: names the network and the settings that would do.
    """
    if cluster.engine != "deepspeed" or cluster.max_workers == 0:
        return
    for name in sorted(set(names) & set(recipe.trained())):
        spec = recipe.networks[name]
        numel = count_parameters(NetSpec(maker(spec)))
        if not stays_whole(numel, bool(spec.get("sharded", True))):
            raise UserError(
                f"networks.{name}: objective {recipe.objective.name} differentiates it twice (R1, a gradient penalty) or takes "
                f"gradients with respect to its weights, which ZeRO-3 cannot while they are sharded: {numel:,} parameters, and above "
                f"{WHOLE_NUMEL:,} they are. Set networks.{name}.sharded: false to keep it whole on each rank, or cluster.engine: replicated"
            )


def rehearse(recipe: Recipe, objective: Objective, dataset: Any) -> set[str]:
    """The objective's losses of a few samples of the data through the networks, on the meta device: shapes that do not fit are found
    where they cost nothing. What computes with values, not with shapes alone, is rehearsed as far as that.

    Returns:
        The networks that the objective was seen to need whole on each rank (`contracts.Objective.needs_whole`).
    Raises:
        UserError: the data, the networks and the objective do not fit each other.
    """
    nets: dict[str, Any] = {}
    whole: set[str] = set()
    for name, module in networks_on_meta(recipe).items():
        seen = functools.partial(whole.add, name)
        nets[name] = Caller(module, on_second_derivative(module, seen), torch.float32)
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient, seen=seen: seen())  # nothing here goes backward by itself
    with choice.plain():
        for batch in batches_to_rehearse(dataset):
            given = batch.on("meta")
            for phase in objective.phases(0):
                rng = ProgressRng(recipe.seed, 0, phase.name, batch.positions, "meta")
                what = f"objective {recipe.objective.name} cannot train {phase.trains!r} on these data"
                with explained(what, objective, given.fields) as cut_short, flops.Bounded():
                    objective.loss(phase.name, nets, given, rng, 0)
                if cut_short:
                    break  # a later phase may build on what this one leaves
    return whole


# ------------------------------------------------------------------------------------------------- first weights


def init_from(name: str, spec: Mapping[str, Any]) -> InitFrom:
    """Where the first weights of a network come from, as its entry says.

    Raises:
        UserError: an ill-formed `init_from`.
    """
    try:
        return InitFrom.model_validate(spec["init_from"])
    except ValidationError as error:
        lines = registry.explain(error, f"networks.{name}.init_from")
        raise UserError("\n".join(lines)) from None


@contextlib.contextmanager
def first_weights_of(recipe: Recipe, data_root: Path) -> Iterator[dict[str, ReadShard]]:
    """Published weights, by the networks that begin with them (`init_from`), readable while within.

    Raises:
        UserError: an ill-formed `init_from`, no such file, weights of other sizes; names what differs.
    """
    with contextlib.ExitStack() as stack:
        readers = {}
        for name, spec in recipe.networks.items():
            if "init_from" not in spec:
                continue
            source = init_from(name, spec)
            with torch.device("meta"):
                network = maker(spec)()
            readers[name] = stack.enter_context(opened(source, network, data_root))
        yield readers


def begin_from(recipe: Recipe, engine: Engine, data_root: Path) -> None:
    """Fills networks and their averages with published weights where the recipe says so; each rank reads its own part."""
    with first_weights_of(recipe, data_root) as readers:
        if readers:
            averages: dict[str, list[str]] = {name: [] for name in readers}
            for name, spec in recipe.averages().items():
                averages.setdefault(spec["average_of"], []).append(name)
            engine.load_shards(first_weights(engine, readers, averages))


# ------------------------------------------------------------------------------------------------- engine


def _engine(
    recipe: Recipe, cluster: Cluster, precision: str, micro: int, accumulated: int, device: torch.device, stage: Any
) -> Engine:
    nets: dict[str, NetSpec] = {}
    for name, spec in recipe.networks.items():
        if "average_of" in spec:
            continue
        optimizer = (
            None
            if spec.get("frozen")
            else _optimizer(Optimizer.model_validate(spec["optimizer"]) if "optimizer" in spec else recipe.optimizer)
        )
        nets[name] = NetSpec(
            make=maker(spec),
            optimizer=optimizer,
            frozen=bool(spec.get("frozen")),
            sharded=bool(spec.get("sharded", True)),
        )
    averages = {
        name: AverageSpec(
            of=spec["average_of"], decay=float(spec.get("decay", 0.9999)), warmup=bool(spec.get("warmup", True))
        )
        for name, spec in recipe.averages().items()
    }
    settings = EngineSettings(
        kind="local" if cluster.max_workers == 0 else cluster.engine,
        zero_stage=cluster.zero_stage,
        precision="bf16" if precision == "bf16" else "float32",
        micro_batch=micro,
        accumulation=accumulated,
        sequence_parallel=cluster.sequence_parallel,
        steps=recipe.steps,
        seed=recipe.seed,
        offload=cluster.offload,
        activation_checkpointing=cluster.activation_checkpointing,
        compile=cluster.compile,
        device=device,
    )
    return build_engine(nets, averages, settings, stage)


def _optimizer(section: Optimizer) -> OptimizerSpec:
    values = section.model_dump()
    schedule = ScheduleSpec(**values.pop("schedule"))
    return OptimizerSpec(**values, schedule=schedule)


def _choices(recipe: Recipe, cluster: Cluster, run: RunFolder, device: torch.device, rank: int) -> dict[str, Any]:
    """What the program measured and chose by itself: frozen in the run folder by the first start, reused by every later one."""
    frozen = frozen_choices(run)
    distributed.barrier()  # all ranks have looked before rank 0 writes
    if frozen is None:
        precision = cluster.precision
        if precision == "auto":
            measured = measured_precision(device) if rank == 0 else "float32"
            precision = "bf16" if distributed.broadcast_int(int(measured == "bf16")) else "float32"
        frozen = {"precision": precision, "micro_batch": cluster.micro_batch, "kernels": dict(cluster.kernels)}
    else:  # a kernel that the version of the first start did not have was plain torch to it
        frozen = {**frozen, "kernels": {**choice.PLAIN, **frozen["kernels"]}}
    try:
        kernels = choice.choose(frozen["kernels"], device)
    except UserError as error:
        if frozen["kernels"] == dict(cluster.kernels):
            raise
        raise UserError(
            f"{run.path}: what its first start chose cannot serve here ({error}); `auto` stands for that choice: name another, for "
            "example cluster.kernels.attention=sdpa --allow-change cluster.kernels",
            code=5,
        ) from None
    frozen = {**frozen, "kernels": {name: made.kernel for name, made in kernels.items()}}
    if rank == 0:
        environment = {"choices": frozen, "kernels": choice.report(), **versions(), "device": str(device)}
        atomic_write(run.environment, json.dumps(environment, indent=1))
    return frozen


# ------------------------------------------------------------------------------------------------- callbacks


def make_callbacks(wanted: Mapping[str, dict[str, Any] | None], services: Mapping[str, Any]) -> list[Callback]:
    """Callbacks by name and arguments, in their order, with what they ask of the program."""
    made: list[Callback] = []
    for name, arguments in wanted.items():
        if arguments is None:
            continue
        cls = registry.find("callbacks", name)
        asked = set(inspect.signature(cls.__init__).parameters) & set(services)
        checked = registry.check_arguments(cls, arguments, f"callbacks.{name}", SERVICES)
        given = {service: services[service] for service in asked}
        made.append(registry.made(cls, {**checked, **given}, f"callbacks.{name}"))
    return made


def asks_for(wanted: Mapping[str, dict[str, Any] | None], service: str) -> bool:
    """Whether a callback that is not switched off takes this service."""
    names = [name for name, arguments in wanted.items() if arguments is not None]
    return any(service in inspect.signature(registry.find("callbacks", name).__init__).parameters for name in names)


def check_callbacks(recipe: Recipe, objective: Objective) -> None:
    """What the constructors of callbacks refuse, found without a run: they get stand-ins for what the program gives, and do nothing
    before `before_run`.

    Raises:
        UserError: names the callback and its argument.
    """
    stand_ins: dict[str, Any] = {
        **dict.fromkeys(SERVICES),
        "run": RunFolder(Path(os.devnull)),
        "stage": StageClock(),
        "batch": lambda: None,
        "context": {},
        "record": {},
        "objective": objective,
        "validation": lambda count: iter(()),
        "state": dict,
        "global_batch": recipe.global_batch,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "averages": tuple(recipe.averages()),
        "flops_per_sample": 0.0,
        "tokens_per_sample": 0.0,
    }
    make_callbacks(recipe.callbacks, stand_ins)
    validate = recipe.callbacks.get("validate")
    for weights in (validate or {}).get("weights") or ():
        if weights not in recipe.networks:
            words = registry.nearest(weights, list(recipe.networks))
            raise UserError(f"callbacks.validate.weights: no network {weights!r}; {words}")
    if (recipe.callbacks.get("checkpoint") or {}).get("keep_best") is not None and validate is None:
        raise UserError(
            "callbacks.checkpoint.keep_best: goes by figures of callbacks.validate, which this recipe has not"
        )


def example_inputs(network: Any, recipe: Recipe, samples: int) -> tuple[Any, ...]:
    """Arguments of the network's forward for so many samples of the recipe's lengths, on the meta device."""
    text_tokens, lengths = _lengths(network, recipe)
    inputs: tuple[Any, ...] = network.example_inputs(samples, text_tokens, torch.device("meta"), **lengths)
    return inputs


def _lengths(network: Any, recipe: Recipe) -> tuple[int, dict[str, Any]]:
    """Text tokens of a sample, of CLIP's number where the recipe leaves it open; where it has several sequences, the length of each."""
    several = "lengths" in inspect.signature(network.example_inputs).parameters
    return recipe.data.text_tokens or 77, {"lengths": recipe.data.tokens} if several else {}


def costs(recipe: Recipe) -> dict[str, float]:
    """FLOPs of one sample's forward and backward (three forwards) through all networks that are trained, and its tokens, counted
    on the meta device; networks that give no example inputs, or take too long to count, count as nothing."""
    total, tokens = 0.0, 0.0
    for name, spec in recipe.trained().items():
        network: Any = network_on_meta(*network_class(spec), f"networks.{name}")
        if not hasattr(network, "example_inputs"):
            continue

        def forward(network: Any = network) -> int:
            return flops.count(network, *example_inputs(network, recipe, 1)).flops

        try:
            total += 3.0 * refused(f"networks.{name}: a sample cannot be computed", forward)
        except flops.TooManyOperations as error:
            log.warning("FLOPs of networks.%s count as none: a sample takes %s", name, error)
        if hasattr(network, "tokens"):  # one sample's tokens, however many networks read them
            text_tokens, lengths = _lengths(network, recipe)
            tokens = max(tokens, float(network.tokens(text_tokens, **lengths)))
    return {"flops_per_sample": total, "tokens_per_sample": tokens}
