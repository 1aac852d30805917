"""Recipe + cluster -> data, networks, engine, callbacks -> Trainer. The work of one worker from its start to the end of the run.

run/resume.py decides where a run continues. Callbacks get what they need by the names in SERVICES.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nexus_scale.callbacks.made import asks_for, make_callbacks
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.conditioners.conditions import with_no_text
from nexus_scale.conditioners.opening import on_the_fly
from nexus_scale.config import registry
from nexus_scale.config.recipe import GIVEN, Adapter, Cluster, Computing, Frozen, Network, Recipe, Split, dump
from nexus_scale.contracts import (
    Batch,
    Engine,
    Nets,
    Objective,
    Phase,
    Progress,
    ReadShard,
    Rollback,
    RunFolder,
    UserError,
)
from nexus_scale.data.bad import BadData
from nexus_scale.data.dataset import Dataset
from nexus_scale.data.encoded import MEASURED, measured
from nexus_scale.data.loader import Loader
from nexus_scale.data.splits import open_split
from nexus_scale.data.synthetic import SyntheticDataset
from nexus_scale.engine import blocks, build_engine, compiler, distributed, memory
from nexus_scale.engine.hardware import DTYPES, Hardware
from nexus_scale.engine.networks import (
    Caller,
    build_network,
    count_parameters,
    on_second_derivative,
    persistent_buffers,
    without_gradients,
)
from nexus_scale.engine.settings import WHOLE_NUMEL, EngineSettings, NetSpec, stays_whole
from nexus_scale.interop.init_from import fingerprint, opened
from nexus_scale.io import faults, incidents
from nexus_scale.kernels import choice, determinism
from nexus_scale.kernels.memory import keep_freed_memory
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.latent_space import check_normalisation, keep_normalisation
from nexus_scale.processes.latents import LatentStats
from nexus_scale.rehearsal import flops
from nexus_scale.rehearsal.batches import (
    batches_to_rehearse,
    explained,
    maker,
    networks_on_meta,
    phases_to_check,
    specs_of,
)
from nexus_scale.rehearsal.costs import costs
from nexus_scale.rehearsal.micro_batch import Size, built
from nexus_scale.rehearsal.warm_up import FirstSteps, warm_up
from nexus_scale.run.choices import add_to_record, choose, micro_batch_of, record, try_kernels
from nexus_scale.run.resume import open_store, other_frozen, resume, state_of
from nexus_scale.run.skipped import SkippedRange, all_skipped, skip, skipped_ranges
from nexus_scale.trainer import Trainer

log = logging.getLogger(__name__)

Draw = Callable[[Engine, int], Any]
"""`draw(engine, count)`: `count` samples of the run in its current state, a collective; rank 0 gets them. Made by generate/trained.py."""

MakeDraw = Callable[..., Draw | None]
"""`make_draw(recipe, place, objective, dataset, hardware) -> draw`, or None if nothing can be drawn."""

RECORDED = ("name", "seed", "steps", "global_batch", "networks", "objective", "optimizer", "sample")
"""Sections of a recipe that may be sent to an experiment tracker; paths and encoders stay here."""


@dataclass(frozen=True)
class Place:
    """Absolute roots of this run's files."""

    run: RunFolder
    data_root: Path
    runs_root: Path


class FaultyClock(StageClock):
    """A clock that causes the faults of NEXUS_FAULT as stages begin. Without that variable it is not in the loop."""

    def __call__(self, name: str) -> None:
        super().__call__(name)
        faults.at(name)


class LastBatch:
    """The batch that the loop was given last, for the record of a stall; it keeps nothing alive."""

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


def train(
    recipe: Recipe, cluster: Cluster, place: Place, make_draw: MakeDraw, sizes: Sequence[Size] = ()
) -> dict[str, Any]:
    """Runs one worker from the current position of the run to its end.

    Args:
        make_draw: what makes the drawer of the callback that draws samples while training.
        sizes: for `micro_batch: auto`, what to try in the run's first start; all that divide, where there are none.
    Returns:
        steps, seconds, workers, rank; figures of the run are in its folder.
    """
    begun = time.monotonic()
    progress = Progress()
    micro = partial(micro_batch_of, place.run, recipe.global_batch, cluster)
    with determinism.repeating(cluster.deterministic), memory.explained(cluster, micro, progress):
        worker = Worker(recipe, cluster, place, make_draw, sizes, progress)
        while True:
            try:
                worker.train_on()
                break
            except Rollback as rollback:
                worker.go_back(rollback)
        worker.store.close()
        distributed.barrier()
    seconds = time.monotonic() - begun
    return {"steps": progress.step, "seconds": seconds, "workers": worker.world_size, "rank": worker.rank}


class Worker:
    """One worker of a run: what it keeps while it trains, also where it goes back to a checkpoint. Joins the other workers, and is
    where the newest checkpoint left the run, when it is made.

    Args:
        make_draw, sizes: see `train`.
        progress: of the run, advanced in place.
    """

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        place: Place,
        make_draw: MakeDraw,
        sizes: Sequence[Size],
        progress: Progress,
    ):
        self.recipe, self.cluster, self.place, self.make_draw = recipe, cluster, place, make_draw
        self.clock = FaultyClock() if faults.asked_for() else StageClock()
        self.progress = progress
        device = _join(cluster)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        faults.arm(self.rank, lambda: self.progress.step)
        self.clock("start")

        self.chosen = choose(cluster, place.run, device)
        self.dataset = open_data(recipe, place.data_root, device=device, runs_root=place.runs_root)
        check_normalisation(place.run, self.dataset)
        if self.rank == 0:
            keep_normalisation(place.run, self.dataset)  # before anything marks the run as begun
        self.objective = make_objective(recipe, self.dataset.latent_stats, self.dataset.no_text)
        check_fields(recipe, self.objective, self.dataset)
        if cluster.compile:
            self.compiler = compiler.tools(device.type)
        self.chosen = try_kernels(self.chosen, cluster, device, partial(rehearse_anew, recipe, self.dataset))
        build = partial(_engine, recipe, cluster, place, self.objective, self.chosen["precision"], device, self.clock)
        self.engine, size = built(
            self.chosen, sizes, recipe, cluster, self.objective, self.dataset, build, self._first_steps
        )
        self.micro_batch = size.micro_batch
        if self.rank == 0:
            record(place.run, cluster, self.chosen, device)
        self.hardware = Hardware(self.engine.device, DTYPES[self.chosen["precision"]])
        self.frozen = fill_frozen(recipe, self.engine, place)
        if cluster.compile:
            self._warm_up()
        self.store = open_store(recipe, place.run, self.rank, self.world_size)
        resume(place.run, recipe, self.engine, self.objective, self.progress, frozen=self.frozen)
        if self.progress.step == 0:
            begin_from(recipe, self.engine, place)
        self.progress.skipped = all_skipped(self.progress.skipped, skipped_ranges(place.run))

    def _first_steps(self, micro_batch: int, validates: bool = False) -> FirstSteps:
        recipe = self.recipe
        objective = make_objective(recipe, self.dataset.latent_stats, self.dataset.no_text)
        return FirstSteps(objective, recipe.seed, recipe.steps, micro_batch, validates)

    def _warm_up(self) -> None:
        """Compiles the blocks for each size of the data, and writes to environment.json what was compiled."""
        first = self._first_steps(self.micro_batch, validates=self.recipe.callbacks.get("validate") is not None)
        figures = warm_up(self.engine, first, self.dataset)
        if self.rank == 0:
            facts = {
                "compiler": self.compiler,
                "cache": os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""),
                "blocks": blocks.compiled_blocks(self.engine.nets),
            }
            add_to_record(self.place.run, {"compile": {**facts, **figures}})

    def train_on(self) -> None:
        """Trains from the current position to the end, with its own loader and callbacks.

        Raises:
            Rollback: a callback asks to go back to a checkpoint.
        """
        recipe, progress = self.recipe, self.progress
        with contextlib.ExitStack() as closing:
            closing.enter_context(blocks.warm())
            loader = self._loader()
            closing.callback(loader.close)
            last_batch = LastBatch(loader.next_batches)
            callbacks = make_callbacks(recipe.callbacks, self._services(last_batch))
            for callback in reversed(callbacks):
                closing.callback(callback.close)
            Trainer(
                steps=recipe.steps, seed=recipe.seed, objective=self.objective, engine=self.engine, next_batches=last_batch,
                callbacks=callbacks, progress=progress, stage=self.clock,
            ).run()  # fmt: skip

    def _loader(self) -> Loader:
        recipe, together = self.recipe, self.cluster.sequence_parallel  # neighbouring ranks share samples
        return Loader(
            self.dataset, seed=recipe.seed, global_batch=recipe.global_batch, micro_batch=self.micro_batch,
            rank=self.rank // together, world_size=self.world_size // together, progress=self.progress, stage=self.clock,
            device=self.engine.device, note=partial(incidents.note, self.place.run.path, rank=self.rank),
        )  # fmt: skip

    def _services(self, last_batch: LastBatch) -> dict[str, Any]:
        """The services of callbacks, by the names in SERVICES."""
        recipe, place, dataset, peak = self.recipe, self.place, self.dataset, self.cluster.peak_tflops
        wants_draw = asks_for(recipe.callbacks, "draw")
        return {
            "run": place.run,
            "stage": self.clock,
            "batch": last_batch.first,
            "context": {},
            "objective": self.objective,
            "validation": validation_of(recipe, place.data_root, dataset, self.micro_batch, self.rank, self.world_size),
            "checkpoints": self.store,
            "state": lambda: state_of(
                recipe, self.progress, self.world_size, self.chosen, dataset.latent_stats, self.frozen
            ),
            "draw": self.make_draw(recipe, place, self.objective, dataset, self.hardware) if wants_draw else None,
            "record": {key: dump(recipe)[key] for key in RECORDED},
            "data_root": place.data_root,
            **{name: getattr(recipe, name) for name in ("global_batch", "steps", "seed")},
            "averages": tuple(recipe.averages()),
            "peak_flops": peak * 1e12 * self.world_size if peak else None,
            **costs(recipe),
        }

    def go_back(self, rollback: Rollback) -> None:
        """Rolls back to the requested checkpoint, and permanently skips the batches that the rollback names."""
        self.clock("start")
        run, progress = self.place.run, self.progress
        entry = SkippedRange(progress.step, rollback.first, rollback.last, str(rollback))
        if self.rank == 0:
            skip(run, entry)  # first of all, so that the decision survives a kill
        self.store.wait()
        resume(run, self.recipe, self.engine, self.objective, progress, before=rollback.before, frozen=self.frozen)
        progress.skipped = all_skipped(progress.skipped, [*skipped_ranges(run), entry])
        if self.rank == 0:
            words = f"{rollback}: back to step {progress.step}, past global batches {entry.first} to {entry.last}"
            log.warning("%s", words)
            facts = {"step": entry.step, "back_to": progress.step, "passed_over": [entry.first, entry.last]}
            incidents.note(run.path, "rolled_back", words, **facts)


def _join(cluster: Cluster) -> torch.device:
    """This worker's device, with threads, memory and process group as the cluster file says."""
    if cluster.threads_per_worker:
        torch.set_num_threads(cluster.threads_per_worker)
    on_gpu = bool(cluster.gpus_per_worker)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if not on_gpu:
        keep_freed_memory()
    if cluster.max_workers:
        distributed.init(device, timeout_s=cluster.collective_timeout_s)
    return device


# ------------------------------------------------------------------------------------------------- data


def open_data(
    recipe: Recipe,
    data_root: Path,
    split: str = "train",
    beside: Any = None,
    device: torch.device | str = "cpu",
    runs_root: Path | None = None,
) -> Any:
    """The recipe's data: shards under the data root, or synthetic samples.

    Args:
        beside: another split of the same recipe, whose encoders serve here, too, where `data.on_the_fly` asks for some.
        device: where those encode.
        runs_root: where runs lie that they are; `runs` beside the data without it.
    """
    if recipe.data.synthetic is not None:
        made_up = recipe.data.synthetic
        synthetic = SyntheticDataset(made_up.samples, made_up.fields, made_up.seed)
        return with_no_text(synthetic, recipe, make_objective(recipe, None).empty_texts, data_root, device)
    part: Split | None = getattr(recipe.data, split)
    if part is None:
        raise UserError(f"data.{split}: not given", code=3)
    bad = BadData(**recipe.data.bad.model_dump())
    runs_root = data_root.parent / "runs" if runs_root is None else runs_root
    encoded = on_the_fly(recipe, data_root, runs_root, str(device)) if beside is None else beside.encoded
    lengths: dict[str, Any] = {"text_tokens": recipe.data.text_tokens, "tokens": recipe.data.tokens}
    dataset = open_split(part, data_root, **lengths, bad=bad, encoded=encoded)
    for one in encoded:
        if "moments" in one.fields and one.latent_stats is None:
            some = dataset.only(["moments"]).fixed(min(MEASURED, dataset.samples))
            one.latent_stats = measured(batch["moments"] for batch in some)
    if encoded:
        dataset = dataset.only(_worth_reading(recipe, dataset))
    if beside is not None:
        dataset.no_text = beside.no_text
        return dataset
    return with_no_text(dataset, recipe, make_objective(recipe, None).empty_texts, data_root, device)


def _worth_reading(recipe: Recipe, dataset: Dataset) -> list[str]:
    """The fields without unused images, which come with captions that are encoded while reading."""
    read = make_objective(recipe, None).fields
    images = {part.name for part in dataset.parts if part.field.is_image and part.name not in read}
    return [name for name in dataset.fields if name not in images]


def validation_of(
    recipe: Recipe, data_root: Path, train_data: Any, micro: int, rank: int, world_size: int
) -> Callable[[int], Iterator[Batch]]:
    """`validation(count)`: this rank's batches of the first `count` samples, in a fixed order, of the validation split.

    Without such a split they are of the training data, with a note in the log.
    """
    if recipe.data.synthetic is None and recipe.data.validation is None:
        log.info("no data.validation in the recipe: the validation loss uses training samples")
    held_out = train_data
    if recipe.data.validation is not None:
        held_out = open_data(recipe, data_root, "validation", beside=train_data)

    def validation(count: int) -> Iterator[Batch]:
        return held_out.fixed(count, rank=rank, world_size=world_size, batch=micro)

    return validation


def make_objective(
    recipe: Recipe, latents: LatentStats | None, no_text: Mapping[str, torch.Tensor] | None = None
) -> Objective:
    """The recipe's objective, with the statistics of the latents, and the empty text's conditions, where the data have them."""
    cls = registry.find("objectives", recipe.objective.name)
    arguments = registry.check_arguments(cls, recipe.objective.arguments, "objective", GIVEN)
    given = {"latents": latents, "no_text": no_text, "global_batch": recipe.global_batch}
    arguments |= {name: value for name, value in given.items() if name in inspect.signature(cls.__init__).parameters}
    objective: Objective = registry.made(cls, arguments, "objective")
    return objective


def check_fields(recipe: Recipe, objective: Objective, dataset: Any) -> None:
    """Checks that every network and field that the objective needs is there, and that what it trains can learn.

    Raises:
        UserError: names what is missing and what there is.
    """
    for role in objective.needs:
        if role not in recipe.networks:
            raise UserError(
                f"objective {recipe.objective.name} needs a network {role!r}; networks has {sorted(recipe.networks)}"
            )
    trained = sorted(recipe.trained())
    for step, phases in phases_to_check(objective, recipe.steps):
        for name in (name for phase in phases for name in phase.networks):
            if name not in trained:
                raise UserError(
                    f"objective {recipe.objective.name} trains {name!r}{_from_step(step)}; the trained networks are {trained}"
                )
    missing = [field for field in objective.fields if field not in dataset.fields]
    if missing:
        raise UserError(
            f"objective {recipe.objective.name} reads {missing}, which the data do not have; they have {sorted(dataset.fields)}",
            code=3,
        )


def _from_step(step: int) -> str:
    return f" (at step {step})" if step else ""


def check_sharding(recipe: Recipe, cluster: Cluster, names: Iterable[str]) -> None:
    """Checks that none of these networks, which the objective needs whole on each rank, will be sharded.

    Raises:
        UserError: names the network and the settings that would do.
    """
    if cluster.engine != "deepspeed" or cluster.max_workers == 0:
        return
    for name in sorted(set(names) & set(recipe.trained())):
        network = recipe.trained()[name]
        numel = count_parameters(NetSpec(maker(network)))
        if not stays_whole(numel, network.engine == "sharded"):
            raise UserError(
                f"networks.{name}: objective {recipe.objective.name} differentiates it twice (R1, a gradient penalty) or takes "
                f"gradients with respect to its weights, which ZeRO-3 cannot while they are sharded: {numel:,} parameters, and above "
                f"{WHOLE_NUMEL:,} they are. Set networks.{name}.engine: replicated to keep it whole on each rank, or cluster.engine to "
                "replicated"
            )


def rehearse(recipe: Recipe, objective: Objective, dataset: Any) -> set[str]:
    """Computes the objective's losses of a few samples on the meta device, to find shapes that do not fit before anything starts.
    A loss that needs values, not only shapes, is rehearsed up to that point.

    Returns:
        The networks that the objective was seen to need whole on each rank (`contracts.Objective.needs_whole`).
    Raises:
        UserError: the data, the networks and the objective do not fit each other.
    """
    nets: dict[str, Any] = {}
    whole: set[str] = set()
    for name, module in networks_on_meta(recipe, objective).items():
        if name in recipe.averages():
            nets[name] = Caller(module, without_gradients(module), torch.float32)
            continue
        seen = partial(whole.add, name)
        nets[name] = Caller(module, on_second_derivative(module, seen), torch.float32)
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient, seen=seen: seen())  # no backward pass is run here otherwise
    begin = list(phases_to_check(objective, recipe.steps))
    with choice.plain():
        for batch in batches_to_rehearse(dataset):
            given = batch.on("meta")
            for step, phases in begin:
                _rehearse_step(recipe, objective, nets, given, step, phases)
    return whole


def rehearse_anew(recipe: Recipe, dataset: Any) -> set[str]:
    """`rehearse` with an objective of its own, since one may count what it is called with."""
    return rehearse(recipe, make_objective(recipe, dataset.latent_stats, dataset.no_text), dataset)


def _rehearse_step(
    recipe: Recipe, objective: Objective, nets: Nets, batch: Batch, step: int, phases: Sequence[Phase]
) -> None:
    """One step's losses, up to the first that needs values."""
    for phase in phases:
        rng = ProgressRng(recipe.seed, step, phase.name, batch.positions, "meta")
        trained = " and ".join(map(repr, phase.networks))
        what = f"objective {recipe.objective.name} cannot train {trained} on these data{_from_step(step)}"
        with explained(what, objective, batch.fields) as cut_short, flops.Bounded():
            objective.loss(phase.name, nets, batch, rng, step)
        if cut_short:
            break  # a later phase may depend on the result of this one


# ------------------------------------------------------------------------------------------------- first weights


@contextlib.contextmanager
def weights_from(entry: Network | Frozen | Adapter, place: Place) -> Iterator[tuple[torch.nn.Module, ReadShard]]:
    """A context with a network on the meta device and the reader of its `init_from` weights. A collective.

    Raises:
        UserError: no such file or run, weights of other sizes; names what differs.
    """
    assert entry.init_from is not None
    with torch.device("meta"):
        network = maker(entry)()
    with opened(entry.init_from, network, place.data_root, place.runs_root) as read:
        yield network, read


def check_first_weights(recipe: Recipe, place: Place) -> None:
    """Raises a UserError if a network's `init_from` weights are missing or do not fit it."""
    for entry in recipe.built().values():
        if entry.init_from is not None:
            with weights_from(entry, place):
                pass


def names_given(entry: Network | Frozen | Adapter, place: Place) -> set[str]:
    """Names of the parameters that a network's `init_from` brings. A collective."""
    with weights_from(entry, place) as (network, read):
        return {name for name, _ in network.named_parameters() if _is_there(read, name)}


def _is_there(read: ReadShard, name: str) -> bool:
    try:
        read(name, 0, 0)
    except KeyError:
        return False
    return True


def fill_frozen(recipe: Recipe, engine: Engine, place: Place) -> dict[str, str]:
    """Loads frozen networks from their `init_from`, each rank its own part; done in every start. A collective.

    Returns:
        their fingerprints, by name; without those of networks that come from nowhere, whose weights are the seed's.
    """
    found = {}
    for name, entry in recipe.frozen().items():
        if entry.init_from is not None:
            with weights_from(entry, place) as (network, read):
                engine.fill(name, read)
                found[name] = fingerprint(network, read)
    return found


@torch.no_grad()
def frozen_network(name: str, recipe: Recipe, place: Place, state: Mapping[str, Any]) -> torch.nn.Module:
    """A frozen network, whole, in this process.

    Args:
        state: what a checkpoint of the run stores beside its tensors.
    Raises:
        UserError: its weights are not there any more, or others than the run was trained with.
    """
    entry = recipe.frozen()[name]
    network = build_network(name, NetSpec(maker(entry), frozen=True), recipe.seed)
    if entry.init_from is not None:
        with weights_from(entry, place) as (_, read):
            for key, held in (*network.named_parameters(), *persistent_buffers(network)):
                with contextlib.suppress(KeyError):  # a buffer that the network computes itself
                    held.copy_(read(key, 0, held.numel()).view(held.shape))
            changed = other_frozen(recipe, state, {name: fingerprint(network, read)})
        if changed:
            raise UserError(f"{place.run.path}: was trained with different weights; restore them: {changed[0]}", code=5)
    return network


def begin_from(recipe: Recipe, engine: Engine, place: Place) -> None:
    """Fills trained networks and their averages with the recipe's initial weights. A collective."""
    for name, entry in recipe.trained().items():
        if entry.init_from is not None:
            with weights_from(entry, place) as (_, read):
                engine.fill(name, read)


# ------------------------------------------------------------------------------------------------- engine


def _engine(
    recipe: Recipe,
    cluster: Cluster,
    place: Place,
    objective: Objective,
    precision: str,
    device: torch.device,
    stage: Any,
    size: Size,
    accumulated: int,
) -> Engine:
    nets = specs_of(recipe, objective)
    for name, entry in recipe.built().items():
        if entry.init_from is not None:
            nets[name] = replace(nets[name], given=partial(names_given, entry, place))
    computing = {name: getattr(cluster, name) for name in Computing.model_fields}
    computing |= {"engine": "local"} if cluster.max_workers == 0 else {}
    settings = EngineSettings(
        **{**computing, "activation_checkpointing": size.recompute},
        precision="bf16" if precision == "bf16" else "float32",
        micro_batch=size.micro_batch,
        accumulation=accumulated,
        steps=recipe.steps,
        seed=recipe.seed,
        device=device,
    )
    return build_engine(nets, recipe.averages(), settings, stage, recipe.called(objective.needs))
