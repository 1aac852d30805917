"""The main job: from a recipe's name, or a run folder, to a trained run with its report.

It resolves recipe and cluster, makes missing data, checks everything that can be checked, and only then starts workers: a user's mistake
is found before any worker starts.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines import check_options, load_job
from data_pipelines.command import progress_bar
from nexus_scale import train
from nexus_scale.callbacks.made import SERVICES, check_callbacks, check_files
from nexus_scale.conditioners.opening import fingerprint_of
from nexus_scale.config import recipe as recipes
from nexus_scale.config.kinds import shown
from nexus_scale.config.recipe import Cluster, Job, Recipe
from nexus_scale.contracts import SAFE_ENVIRONMENT, Objective, RunFolder, UserError
from nexus_scale.engine import eight_bits
from nexus_scale.generate.drawing import check_sampling, rehearse_drawing
from nexus_scale.generate.trained import decoder_of
from nexus_scale.io.plain_json import read_json_or
from nexus_scale.io.stages import note_stage, stage
from nexus_scale.io.terminal import visible
from nexus_scale.kernels import choice, determinism
from nexus_scale.kernels.update import moments_of
from nexus_scale.media.latent_space import check_normalisation, check_scale
from nexus_scale.orchestration import worker
from nexus_scale.orchestration.cluster import connected, data_root_of_run, roots
from nexus_scale.orchestration.elastic import allowed_sizes, common_micro_batch
from nexus_scale.orchestration.preflight import check_machines
from nexus_scale.orchestration.train import launch
from nexus_scale.planner import Fitting
from nexus_scale.planner.losses import largest_sample
from nexus_scale.rehearsal.batches import check_numbers, check_together, rehearse_validation
from nexus_scale.rehearsal.meta import network_on_meta
from nexus_scale.report.page import write_report
from nexus_scale.run.files import curve_before, frozen_choices, is_run, open_run, write_started
from nexus_scale.run.runs import (
    HeldError,
    begun,
    check_disk,
    check_folder,
    check_run,
    locked,
    newest_step,
    owner_of,
    prepare_run,
    room_needed,
)

log = logging.getLogger(__name__)

DEFAULT_CLUSTER = "local_cpu"


@dataclass(frozen=True)
class Target:
    """A recipe, its cluster, and the folders of its files."""

    recipe: Recipe
    cluster: Cluster
    place: train.Place


def resolve(
    target: str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    run: str | None = None,
    tiny: bool = False,
) -> Target:
    """The checked target: a recipe (path or name) or a run folder, with `key=value` overrides.

    Raises:
        UserError: unknown recipe, cluster, family or key; ill-typed value; a batch that does not divide.
    """
    changed, changed_cluster = recipes.overrides_of(pair for pair in overrides if not pair.startswith(RUN))
    run = _named(overrides, run)
    if Path(target).is_dir() or (not Path(target).exists() and _runs_beside(Path(target))):
        folder, kept, kept_cluster = open_run(Path(target))
        if run not in (None, folder.path.name):
            raise UserError(f"run={run}: {folder.path} is an existing run and keeps its name; leave run= out")
        what = f"{folder.recipe} with the command line"
        made = recipes.recipe_from(recipes.at_home(recipes.merge(recipes.dump(kept), changed), what), what)
        where = recipes.load_cluster(cluster) if cluster else kept_cluster
        where = recipes.cluster_from(
            recipes.merge(recipes.dump(where), changed_cluster), f"{folder.cluster} with the command line"
        )
        asked = "data" in (changed_cluster.get("paths") or {}) or (cluster is not None and where.paths.data is not None)
        place = train.Place(folder, data_root_of_run(folder, where, asked=asked), folder.path.parent)
    else:
        made = recipes.load_recipe(target, changed, tiny=tiny)
        where = recipes.load_cluster(cluster or DEFAULT_CLUSTER, changed_cluster)
        data_root, runs_root = roots(where)
        name = _run_name(made, runs_root, tiny) if run is None else run
        place = train.Place(RunFolder(runs_root / checked_name(name, "run=")), data_root, runs_root)
    objective = check_recipe(made)
    train.check_sharding(made, where, objective.needs_whole)
    eight_bits.check({name: one.bits for name, one in made.frozen().items()}, where.ranks, where.engine == "deepspeed")
    choice.check(where.kernels)
    worker_environment(where)
    check_prepared(made, (place.run.path.name,))
    told = not tiny or "optimizer" in changed  # a tiny run is meant to be short
    if told and made.optimizer.schedule.warmup_steps >= made.steps:
        log.warning(
            "optimizer.schedule.warmup_steps is %d but the run has %d steps: it ends before it reaches its learning rate",
            made.optimizer.schedule.warmup_steps, made.steps,
        )  # fmt: skip
    resolved = Target(made, where, place)
    sizes, chosen = sizes_of(resolved), micro_batch_of(resolved)
    if sizes is None:
        recipes.accumulation(made.global_batch, where.sharers, where.fixed_micro_batch)
        sizes = [where.sharers]
    # of `auto` the largest: what it tries parts no neighbours
    for micro in {chosen or made.global_batch // size for size in sizes}:
        _check_together(made, objective.together, micro)
    return resolved


def _check_together(recipe: Recipe, samples: int, micro: int) -> None:
    if micro % samples:
        raise UserError(
            f"objective: takes {samples} neighbours of the global batch together, and a micro-batch has {micro}: set cluster.micro_batch "
            f"to a multiple of {samples}, take fewer workers, or lower what the objective takes (coupling.group) to a divisor of {micro}"
        )
    for name, entry in recipe.trained().items():
        cls, arguments = recipes.network_class(entry)
        if cls.together != 1 and micro % (group := network_on_meta(cls, arguments, f"networks.{name}").together):
            raise UserError(
                f"networks.{name}: normalises {group} neighbours of the global batch together, and a micro-batch has {micro}: set "
                f"cluster.micro_batch to a multiple of {group}, take fewer workers, or lower networks.{name}.norm_group to a "
                f"divisor of {micro}"
            )


RUN = "run="


def _named(overrides: Sequence[str], run: str | None) -> str | None:
    """The run's name in a command, by `run=NAME` or `--run NAME`: plain text, never YAML."""
    named = dict.fromkeys(
        [*([] if run is None else [run]), *(p.removeprefix(RUN) for p in overrides if p.startswith(RUN))]
    )
    if len(named) > 1:
        raise UserError(f"the run has {len(named)} names: {', '.join(map(shown, named))}; expected one")
    return next(iter(named), None)


def checked_name(name: str, what: str) -> str:
    """A run's name, unchanged.

    Raises:
        UserError: it is a path, or no plain name.
    """
    if re.fullmatch(recipes.NAME, name) is None:
        raise UserError(
            f"{what}{name!r}: expected a plain name of at most 100 letters, digits, '.', '_' and '-', without a path"
        )
    return name


TINY = "_tiny"
"""The end of a tiny run's name, so that the full run has the recipe's name."""


def _run_name(recipe: Recipe, runs_root: Path, tiny: bool) -> str:
    if not tiny:
        return recipe.name
    older, newer = RunFolder(runs_root / recipe.name), runs_root / (recipe.name + TINY)
    # Tiny runs of older versions have the recipe's own name.
    if not is_run(newer) and is_run(older.path) and begun(older) and _follows(older, recipe):
        return recipe.name
    return newer.name


def _follows(run: RunFolder, recipe: Recipe) -> bool:
    try:
        return curve_before(run) == recipes.identity(recipe)
    except UserError as error:
        log.info("%s: is not resumed as an older tiny run: %s", run.path, error)
        return False


def check_prepared(recipe: Recipe, runs: tuple[str, ...]) -> None:
    """Checks the jobs of a recipe's `prepare:`, and of the recipes that it trains: options, names, and that no run waits for itself.

    Args:
        runs: names of the runs that wait for this one, the outermost first.
    """
    for job in recipe.prepare:
        check_options(job.job, job.options)
        if job.job != "train":
            continue
        made, name = _prepared(job)
        if name in runs:
            raise UserError(
                f"prepare: train: the run {name!r} waits for itself: {' needs '.join((*runs, name))}; give it "
                "another name (run: NAME), or take the job out"
            )
        try:
            check_recipe(made)
        except UserError as error:
            raise UserError(f"prepare: train: recipe {job.options['recipe']}: {error}") from None
        check_prepared(made, (*runs, name))


def _prepared(job: Job) -> tuple[Recipe, str]:
    """The recipe that a `train` job trains, and the name of its run."""
    made = recipes.load_recipe(job.options["recipe"], job.options.get("set"))
    return made, checked_name(str(job.options.get("run") or made.name), "prepare: train: run=")


def _runs_beside(path: Path) -> bool:
    """Whether a missing path was meant as a run folder: it has runs beside it."""
    return path.parent.is_dir() and any(is_run(other) for other in path.parent.iterdir())


def check_recipe(recipe: Recipe) -> Objective:
    """A recipe's objective, after all checks that need no data: keys, types and constructors; networks are made on the meta device.

    Raises:
        UserError: what is wrong, where, and what would be right.
    """
    for name in recipe.networks:
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name) is None:
            raise UserError(
                f"networks.{name!r}: expected a name of letters, digits, '_' and '-': checkpoints and curves are named by it"
            )
    recipes.check(recipe, SERVICES)
    parameters(recipe)
    objective = train.make_objective(recipe, None)
    check_callbacks(recipe, objective)
    check_sampling(recipe, objective)
    return objective


def sizes_of(target: Target) -> list[int] | None:
    """The numbers of workers that the global batch allows; None where their number is fixed.

    Raises:
        UserError: it allows none.
    """
    workers, batch = target.cluster.workers, target.recipe.global_batch
    if not isinstance(workers, tuple):
        return None
    micro = micro_batch_of(target)
    sizes = allowed_sizes(batch, *workers, micro)
    if not sizes:
        raise UserError(
            f"cluster.workers {list(workers)}: global_batch {batch} does not divide among any of these numbers of workers in "
            f"micro-batches of {micro}; numbers that do: {allowed_sizes(batch, 1, 2 * workers[1], micro)}"
        )
    return sizes


def micro_batch_of(target: Target) -> int | None:
    """The micro-batch: of the run's first start, of the cluster file, or one that fits every number of workers. None where each number
    of workers finds its own."""
    cluster, frozen = target.cluster, frozen_choices(target.place.run)
    if frozen is not None:
        kept: int | None = None if frozen.get("found") else frozen["micro_batch"]
        return kept
    if cluster.micro_batch is None and isinstance(cluster.workers, tuple):
        return common_micro_batch(target.recipe.global_batch, *cluster.workers)
    return cluster.fixed_micro_batch


# ------------------------------------------------------------------------------------------------- data


def prepare(target: Target) -> None:
    """Runs those of the recipe's jobs whose output is missing, in order."""
    for job in target.recipe.prepare:
        if job.job == "train":
            _train_before(job, target)
            continue
        module = load_job(job.job)
        places: dict[str, Any] = {"data_root": target.place.data_root, "runs_root": target.place.runs_root}
        title = f"{job.job} -> {job.options.get('output', '')}"
        if module.done(**job.options, **places):
            continue
        log.info("%s: missing, preparing it now", title)
        with progress_bar(title) as bar, stage(target.place.run.path, title, bar) as progress:
            if target.cluster.max_workers == 0 and "workers" in module.options.model_fields:
                places["workers"] = 0  # in this process, like the training
            module.run(**{**places, **job.options}, progress=progress)


def _train_before(job: Job, target: Target) -> None:
    first = target.cluster
    made, name = _prepared(job)
    place = train.Place(RunFolder(target.place.runs_root / name), target.place.data_root, target.place.runs_root)
    if newest_step(place.run) >= made.steps:
        return
    log.info("%s: %s is not trained yet, training it now", target.recipe.name, name)
    with stage(target.place.run.path, f"train {name}"):
        while True:
            try:
                train_target(Target(made, _alike(first), place))
                break
            except HeldError as error:  # another run is training it
                log.info("%s: waiting: %s", target.recipe.name, error)
                while owner_of(place.run) is not None:
                    time.sleep(1)
            if newest_step(place.run) >= made.steps:
                break


def _alike(cluster: Cluster) -> Cluster:
    """The cluster for another recipe, whose batch is another."""
    return cluster.model_copy(update={"micro_batch": "auto" if cluster.micro_batch == "auto" else None})


def check_data(target: Target) -> None:
    """Checks that the data are complete, made by the recipe's encoders, and fit its objective and networks.

    Raises:
        UserError: a missing or empty folder, a shard of another size, a manifest of another encoder.
    """
    recipe, place = target.recipe, target.place
    expected = {
        field: fingerprint_of(field, spec, place.data_root, place.runs_root)
        for field, spec in recipe.data.encoders.items()
    }
    dataset = train.open_data(recipe, place.data_root, runs_root=place.runs_root)
    if recipe.data.synthetic is None:
        dataset.check_encoders(expected)
        for field, count in dataset.cut().items():
            log.warning(
                "data: %d of %d samples have a longer `%s` than batches keep and are cut off; raise data.text_tokens or data.tokens.%s to "
                "read them whole",
                count, dataset.samples, field, field,
            )  # fmt: skip
    held_out = None
    if recipe.data.validation is not None and recipe.data.synthetic is None:
        held_out = train.open_data(recipe, place.data_root, "validation", beside=dataset)
        held_out.check_encoders(expected)
    check_normalisation(place.run, dataset)
    check_scale(recipe, dataset, place.runs_root, place.data_root)
    objective = train.make_objective(recipe, dataset.latent_stats, dataset.no_text)
    train.check_fields(recipe, objective, dataset)
    check_numbers(recipe, objective, dataset)
    check_together(recipe, objective, dataset)
    check_files(recipe, place.data_root)
    train.check_sharding(recipe, target.cluster, train.rehearse(recipe, objective, dataset))
    rehearse_drawing(recipe, objective, dataset, decoder_of(recipe, place, objective, dataset))
    if held_out is not None:
        if recipe.callbacks.get("validate") is not None or recipe.callbacks.get("samples") is not None:
            rehearse_validation(recipe, objective, held_out)
        if recipe.callbacks.get("samples") is not None:
            rehearse_drawing(recipe, objective, held_out)


# ------------------------------------------------------------------------------------------------- training


def train_target(target: Target) -> dict[str, Any]:
    """Trains a run to its last step, writes its report, and returns its summary."""
    check_folder(target.place.run)
    check_run(target.place.run, target.recipe, target.cluster)  # before hours of data jobs
    if target.cluster.max_workers == 0:
        return _train_target(target)
    with connected(nodes=target.cluster.nodes):  # one Ray for data jobs and training
        return _train_target(target)


def _train_target(target: Target) -> dict[str, Any]:
    recipe, cluster, place = target.recipe, target.cluster, target.place
    log.info("data in %s, runs in %s", place.data_root, place.runs_root)
    prepare(target)
    with locked(place.run):
        check_data(target)
        train.check_first_weights(recipe, place)  # once here instead of in every worker
        elsewhere = (recipe.callbacks.get("checkpoint") or {}).get("to") is not None
        needed = 0 if elsewhere else room_needed(place.run, checkpoint_bytes(recipe))
        check_disk(place.run, needed)
        if cluster.nodes > 1:
            check_machines(None, place.run.path, needed_bytes=needed, timeout_s=cluster.start_deadline_s)
        prepare_run(place.run, recipe, cluster, place.data_root)  # after all checks, the folder belongs to this recipe
        if newest_step(place.run) >= recipe.steps:
            log.info("%s: already trained to step %d", place.run.path, recipe.steps)
        else:
            begun = time.monotonic()
            _work(target)
            if not place.run.recipe.is_file():
                log.warning(
                    "%s: was removed during training; its recipe and cluster file are written again", place.run.path
                )
                write_started(place.run, recipe, cluster, place.data_root)
            note_stage(place.run.path, f"train {place.run.path.name}", time.monotonic() - begun)
    write_report(place.run)
    results = read_json_or(place.run.results, dict[str, Any], {})
    return {**results, "folder": str(place.run.path)}


def _work(target: Target) -> None:
    config = worker_config(target)
    cluster = target.cluster
    if cluster.max_workers == 0:
        worker.work(config)
        return
    launch(
        "nexus_scale.orchestration.worker:work",
        config,
        workers=cluster.workers,
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        run_folder=target.place.run.path,
        environment=worker_environment(cluster),
        sizes=sizes_of(target),
        max_failures=cluster.max_failures,
        max_preemptions=cluster.max_preemptions,
        backoff_s=cluster.backoff_s,
        standby=cluster.standby,
        start_deadline_s=cluster.start_deadline_s,
        timeout_s=cluster.collective_timeout_s,
        threads_per_worker=cluster.threads_per_worker,
        nodes=cluster.nodes,
    )


def worker_environment(cluster: Cluster) -> dict[str, str]:
    """Variables that each worker has before it touches its device."""
    return {**SAFE_ENVIRONMENT, **(determinism.environment() if cluster.deterministic else {})}


def worker_config(target: Target) -> dict[str, Any]:
    """A worker's configuration, as plain values."""
    micro = "auto" if target.cluster.micro_batch == "auto" else micro_batch_of(target)
    return {
        "recipe": recipes.dump(target.recipe),
        "cluster": recipes.dump(target.cluster.model_copy(update={"micro_batch": micro})),
        "sizes": sizes_to_try(target),
        "run": str(target.place.run.path),
        "data_root": str(target.place.data_root),
        "runs_root": str(target.place.runs_root),
    }


def sizes_to_try(target: Target) -> list[tuple[int, bool]]:
    """For `micro_batch: auto`, in a run's first start: micro-batches in the order in which workers try them, each with whether blocks are
    recomputed. Those that do not fit by the planner's estimate are left out; where none does, the smallest decides by trial."""
    if target.cluster.micro_batch != "auto" or frozen_choices(target.place.run) is not None:
        return []
    recipe, root = target.recipe, target.place.data_root
    fitting = Fitting(recipe, target.cluster, data_root=root, sample=largest_sample(recipe, root))
    sizes = list(fitting.candidates())
    found = [fit for fit in sizes if fit.fits is not False] or sizes[-1:]
    first = found[0]
    log.info("cluster.micro_batch auto: the planner's estimate is %d", first.micro_batch)
    return [(fit.micro_batch, fit.activation_checkpointing) for fit in found]


def parameters(recipe: Recipe) -> dict[str, int]:
    """The number of parameters of each network, counted on the meta device."""
    counts = {}
    for name, entry in recipe.built().items():
        network = network_on_meta(*recipes.network_class(entry), f"networks.{name}")
        counts[name] = sum(p.numel() for p in network.parameters())
    return counts


def checkpoint_bytes(recipe: Recipe) -> int:
    """Masters, moments and each average, 4 bytes a value."""
    counts = parameters(recipe)
    trained = sum(
        counts[name] * (1 + len(moments_of(network.optimizer or recipe.optimizer)))
        for name, network in recipe.trained().items()
    )
    averages = sum(counts[average.average_of] for average in recipe.averages().values())
    return 4 * (trained + averages)


def main(target: str, overrides: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Prints and returns the summary of a trained run."""
    summary = train_target(resolve(target, overrides, **options))
    print(visible(summary_line(summary)), flush=True)
    return summary


def summary_line(summary: Mapping[str, Any]) -> str:
    loss = summary.get("loss")
    rate = summary.get("samples_per_s")
    samples = Path(summary["folder"]) / "samples"
    drawn = f"samples in {samples}, " if samples.is_dir() and any(samples.iterdir()) else ""
    return (
        f"done: {summary['steps']} steps, loss {'n/a' if loss is None else f'{loss:.4f}'}, "
        f"{'n/a' if rate is None else f'{rate:.0f}'} samples/s; "
        f"{drawn}report in {summary['folder']}/report.html"
    )
