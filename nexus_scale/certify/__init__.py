"""`nexus certify`: whether a recipe, on this cluster, loses anything to kills and to other numbers of workers.

Three legs of the same recipe, with a digest of every step (callbacks/digest.py):

    reference  uninterrupted
    twin       the same number of workers, killed at random moments: every step, redone ones included, equals the reference's to the bit
    rescaled   other numbers of workers in turn within its last steps: the same samples at the same places of every global batch,
               and the loss within 1e-6

and, where asked for, one control for each piece of state: a resume without it, which the comparison must find.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_scale import main_job, train
from nexus_scale.certify import ledger
from nexus_scale.certify.kills import Kill, as_faults, plan_kills
from nexus_scale.certify.left_out import ITEMS, leave_out
from nexus_scale.config import recipe
from nexus_scale.contracts import SAFE_ENVIRONMENT, Preempted, RunFolder, UserError
from nexus_scale.engine.checkpoint import Checkpoint, newest
from nexus_scale.io import faults
from nexus_scale.io.durable import atomic_write
from nexus_scale.orchestration.cluster import connected
from nexus_scale.orchestration.train import launch
from nexus_scale.run.resume import versions
from nexus_scale.run.runs import locked, prepare_run

log = logging.getLogger(__name__)

LOSS_LIMIT = {"float32": 1e-6, "bf16": 1e-2}
"""Relative deviation of the loss on another number of workers, whose order of sums is another, by precision."""

RESCALED_STEPS = 20
"""The loss is held to the limit over so many steps: later, training itself amplifies any last bit."""

LEAVING_STEPS = 5
"""A run that is asked to leave is gone within so many steps: the request passes a thread, and the ranks agree a step later."""

RESTART_S = 10.0
"""For the estimate alone."""

STEPS_BETWEEN_CHECKPOINTS = 5


@dataclass(frozen=True)
class Leg:
    """What was found of one leg. `wrong`: differences in words, the first of them."""

    name: str
    workers: list[int]
    seconds: float
    steps_compared: int
    differing: int
    wrong: list[str]


@dataclass(frozen=True)
class Certificate:
    """The result.

    Attributes:
        passed: all that is promised holds; the other fields say what does not.
        equal_bits: every step of the twin and its last checkpoint are the reference's, to the bit.
        same_samples: twin and rescaled leg took each position of each global batch once, by the same sample.
        largest_deviation: of the rescaled leg's loss, relative.
        lost_steps: the most steps that had to be done again after one kill; of them `lost_behind_a_save` were trained
            while the checkpoint that the kill tore was being written.
        lost_to_preemption: the same after SIGTERM; 0 is promised.
        recovery_seconds: from SIGKILL to the end of the next new process's first step: `median` and `worst`.
        kills: that struck, of `kills_planned`.
        controls: whether the comparison found that the item was left out, by item.
    """

    recipe: str
    passed: bool
    equal_bits: bool
    same_samples: bool
    largest_deviation: float | None
    lost_steps: int
    lost_behind_a_save: int
    lost_to_preemption: int
    checkpoint_every: int
    recovery_seconds: dict[str, float] | None
    kills: int
    kills_planned: int
    kills_inside_a_save: int
    kills_by_kind: dict[str, int]
    steps: int
    steps_compared: int
    steps_redone: int
    workers: list[int]
    left_out: str | None
    controls: dict[str, bool]
    failures: list[str]
    legs: list[Leg]
    seed: int
    seconds: float
    versions: dict[str, Any]
    deviations: list[tuple[int, float]] = field(repr=False)
    kill_table: list[dict[str, Any]] = field(repr=False)


def settings(steps: int, every: int) -> list[str]:
    """Overrides of a recipe for its legs: what they do beside training is to be saved and to be compared."""
    return [
        f"steps={steps}",
        f"callbacks.checkpoint={{every: {every}, keep: 3}}",
        "callbacks.metrics={every: 10, wandb: false}",
        "callbacks.validate=null",
        "callbacks.samples=null",
        "callbacks.throughput=null",
    ]


def certify(
    name: str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    kills: int = 20,
    workers: Sequence[int] = (2, 1, 4),
    steps: int | None = None,
    every: int = STEPS_BETWEEN_CHECKPOINTS,
    seed: int = 0,
    tiny: bool = False,
    folder: Path | None = None,
    left_out: str | None = None,
    controls: bool = False,
    quiet: bool = False,
) -> tuple[Certificate, Path]:
    """Trains all legs and compares them.

    Args:
        name, overrides, cluster, tiny: as for `nexus train`.
        kills: of the twin.
        workers: the first number is that of reference and twin; the rescaled leg goes through all of them in turn.
        steps: of each leg; enough that each kill has a step of its own unless given.
        every: steps between checkpoints.
        folder: new; below the root of the runs unless given.
        left_out: one of ITEMS: the twin resumes once without it, and the certificate fails.
        quiet: what the workers print goes to stderr.
        controls: also resumes once without each of ITEMS, and fails where a comparison does not find it.
    Returns:
        the certificate, and its folder with `certificate.html`, `certificate.json` and a run folder for each leg.
    Raises:
        UserError: before anything starts: a recipe, a cluster or a number of workers that cannot be.
    """
    begun = time.monotonic()
    if left_out is not None and left_out not in ITEMS:
        raise UserError(f"--leave-out {left_out!r}: expected one of {', '.join(ITEMS)}")
    steps = max(60, 2 * kills) if steps is None else steps
    work = _resolved(name, overrides, cluster, tiny, workers, steps, every, folder)
    _estimate(kills, len(workers), len(ITEMS) if controls else 0)
    folder = work.folder
    with (
        contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext(),
        connected(nodes=work.target.cluster.nodes),
    ):
        seconds = {}
        at = time.monotonic()
        work.uninterrupted("reference")
        reference = ledger.Digests.read(folder / "reference")
        seconds["reference"] = time.monotonic() - at

        life_s = _seconds_of(reference) / max(1, kills) + 2.0
        planned = plan_kills(kills, steps=steps, every=every, workers=workers[0], seed=seed, life_s=life_s)
        log.info("reference: %.0f s; now the twin with %d kills", seconds["reference"], kills)
        at = time.monotonic()
        work.killed("twin", planned, left_out)
        seconds["twin"] = time.monotonic() - at

        log.info("twin: %.0f s; now on %s workers in turn", seconds["twin"], ", ".join(map(str, workers)))
        at = time.monotonic()
        changes = changes_of_workers(seed, steps, len(workers))
        if changes:
            work.rescaled("rescaled", workers, changes)
        seconds["rescaled"] = time.monotonic() - at

        found_out = {}
        for item in ITEMS if controls else ():
            log.info("control: a resume without %s", item)
            work.control(item)
            control = ledger.Digests.read(folder / f"without_{item}")
            found_out[item] = not ledger.same_bits(
                reference, control, range(1, steps + 1), range(workers[0])
            ).equal and control.last == steps  # fmt: skip

    certificate = _compared(work, reference, planned, changes, seconds, found_out, left_out, seed, begun)
    _write(folder, certificate)
    return certificate, folder


def _resolved(
    name: str, overrides: Sequence[str], cluster: str | None, tiny: bool, workers: Sequence[int], steps: int, every: int,
    folder: Path | None,
) -> Work:  # fmt: skip
    if not workers or min(workers) < 1:
        raise UserError(f"--workers: got {list(workers)}; expected numbers of at least 1, like 2,1,4")
    if steps < 4 * every:
        raise UserError(f"--steps {steps}: expected at least {4 * every}, four checkpoints")
    if steps <= LEAVING_STEPS * len(workers):
        raise UserError(
            f"--steps {steps}: expected more than {LEAVING_STEPS * len(workers)} for {len(workers)} numbers of workers"
        )
    target = main_job.resolve(
        name, [*overrides, *settings(steps, every), f"cluster.workers={workers[0]}"], cluster=cluster, tiny=tiny
    )
    # Before all others: one that ends the run after a step would leave that step without a digest.
    callbacks = {"digest": {}, **target.recipe.callbacks}
    target = replace(target, recipe=target.recipe.model_copy(update={"callbacks": callbacks}))
    where = target.cluster
    for count in workers:
        recipe.accumulation(target.recipe.global_batch, count, where.micro_batch)
    if where.nodes == 1 and not where.gpus_per_worker and not os.environ.get("RAY_ADDRESS"):
        # On this machine alone, more workers than cores share them.
        share = len(os.sched_getaffinity(0)) / max(workers)
        where = where.model_copy(update={"cpus_per_worker": min(where.cpus_per_worker, share)})
    if folder is None:
        folder = target.place.runs_root / f"certify_{target.recipe.name}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; --output wants a new folder", code=5)
    as_faults([], folder)
    return Work(replace(target, cluster=where), folder, list(workers), steps, every)


def _estimate(kills: int, resizes: int, controls: int) -> None:
    starts = 2 + resizes + (1 + controls if controls else 0)
    seconds = RESTART_S * (2 * starts + kills)
    log.info(
        "%d starts and %d kills: about %.0f minutes where a restart takes %.0f s, and the steps of %d legs",
        starts, kills, seconds / 60, RESTART_S, 3 + controls,
    )  # fmt: skip


def changes_of_workers(seed: int, steps: int, counts: int) -> list[int]:
    """Random steps, in order, at which the number of workers changes: within the last RESCALED_STEPS where so many fit there, and
    LEAVING_STEPS or more apart and from the end, so that each of them ends a start of the run."""
    if counts == 1:
        return []
    first = max(1, steps - max(RESCALED_STEPS, LEAVING_STEPS * counts))
    widened = LEAVING_STEPS - 1  # between two steps, after a draw from a window that is as much shorter
    last = steps - LEAVING_STEPS - widened * (counts - 2)
    drawn = sorted(random.Random(seed + 1).sample(range(first, last + 1), counts - 1))
    return [step + widened * i for i, step in enumerate(drawn)]


def _seconds_of(reference: ledger.Digests) -> float:
    times = [row["at"] for row in reference.ranks.get(0, [])]
    return max(times) - min(times) if times else 0.0


# ------------------------------------------------------------------------------------------------- legs


@dataclass(frozen=True)
class Work:
    """How the legs are trained: one target, a folder for all of them."""

    target: main_job.Target
    folder: Path
    workers: Sequence[int]
    steps: int
    every: int

    def at(self, leg: str, workers: int) -> main_job.Target:
        place = train.Place(RunFolder(self.folder / leg), self.target.place.data_root, self.target.place.runs_root)
        return replace(self.target, cluster=self.target.cluster.model_copy(update={"workers": workers}), place=place)

    def uninterrupted(self, leg: str) -> None:
        main_job.train_target(self.at(leg, self.workers[0]))

    def launched(self, leg: str, workers: int, orders: str = "", restarts: int = 0) -> None:
        """One supervised start; Preempted and RuntimeError are the caller's."""
        target = self.at(leg, workers)
        cluster = target.cluster
        with locked(target.place.run):
            prepare_run(target.place.run, target.recipe, cluster, target.place.data_root)
            launch(
                "nexus_scale.orchestration.worker:work",
                main_job.worker_config(target),
                workers=workers,
                cpus_per_worker=cluster.cpus_per_worker,
                gpus_per_worker=cluster.gpus_per_worker,
                run_folder=target.place.run.path,
                environment={**SAFE_ENVIRONMENT, **({faults.VARIABLE: orders} if orders else {})},
                max_failures=restarts,
                backoff_s=0.0,  # the failures are our own, and nobody else's machine needs a rest
                start_deadline_s=cluster.start_deadline_s,
                timeout_s=cluster.collective_timeout_s,
                threads_per_worker=cluster.threads_per_worker,
                nodes=cluster.nodes,
            )

    def marks(self, leg: str) -> Path:
        folder = self.folder / leg / "faults"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def stopped(self, leg: str, workers: int, step: int, action: str) -> None:
        """Trains to `step` and stops there: SIGKILL leaves the newest checkpoint before it, SIGTERM one of that step."""
        mark = self.marks(leg) / f"stop-{step:06d}"
        try:
            self.launched(leg, workers, f"rank:0,step:{step},phase:data,action:{action},once:{mark}")
        except (Preempted, RuntimeError):
            if not mark.exists():
                raise
            return
        raise RuntimeError(f"{leg}: {action} at step {step} did not end the run")

    def killed(self, leg: str, kills: Sequence[Kill], left_out: str | None) -> None:
        marks = self.marks(leg)
        if left_out is not None:
            self.stopped(leg, self.workers[0], self.steps // 2, "SIGKILL")
            leave_out(left_out, self.folder / leg / "checkpoints")
        orders = as_faults(kills, marks)
        while True:
            try:
                # A kill of all ranks may be seen as more than one failure.
                self.launched(leg, self.workers[0], orders, restarts=2 * len(kills) * self.workers[0] + 3)
                return
            except Preempted as left:
                log.info("%s: %s; started again", leg, left)

    def rescaled(self, leg: str, workers: Sequence[int], changes: Sequence[int]) -> None:
        for number, (count, step) in enumerate(zip(workers, changes, strict=False)):
            self.stopped(leg, count, step, ("SIGKILL", "SIGTERM")[number % 2])
        self.launched(leg, workers[-1])

    def control(self, item: str) -> None:
        """A copy of the reference as it was at half of its steps, without the item, trained to its end."""
        half = self.folder / "half"
        if not half.exists():
            self.stopped("half", self.workers[0], self.steps // 2, "SIGKILL")
        leg = f"without_{item}"
        shutil.copytree(half, self.folder / leg)
        leave_out(item, self.folder / leg / "checkpoints")
        self.launched(leg, self.workers[0])


# ------------------------------------------------------------------------------------------------- what came of it


def recoveries(digests: ledger.Digests, struck: Sequence[float]) -> list[float]:
    """Seconds from each kill to the end of the first step of a process that was not there before; of kills without a step in
    between, the last."""
    rows = sorted((row["at"], row["process"]) for of_rank in digests.ranks.values() for row in of_rank)
    found = []
    times = sorted(struck)
    for number, kill in enumerate(times):
        before = {process for at, process in rows if at <= kill}
        after = next((at for at, process in rows if at > kill and process not in before), None)
        if after is not None and (number + 1 == len(times) or times[number + 1] > after):
            found.append(after - kill)
    return found


def _preempted(restart: ledger.Restart, struck: Sequence[tuple[float, Kill]]) -> bool:
    """Whether nothing but SIGTERM struck while the process that a restart replaced was there."""
    kinds = {kill.kind for at, kill in struck if restart.since < at < restart.at}
    return kinds == {"preemption"}


def _final(run: Path, steps: int) -> Checkpoint | None:
    found = newest(RunFolder(run).checkpoints)
    return found if found is not None and found.step == steps else None


def _compared(
    work: Work,
    reference: ledger.Digests,
    planned: Sequence[Kill],
    changes: Sequence[int],
    seconds: dict[str, float],
    controls: dict[str, bool],
    left_out: str | None,
    seed: int,
    begun: float,
) -> Certificate:
    steps, every, first = range(1, work.steps + 1), work.every, work.workers[0]
    failures: list[str] = []

    twin = ledger.Digests.read(work.folder / "twin")
    bits = ledger.same_bits(reference, twin, steps, range(first))
    samples = ledger.same_samples(reference, twin, steps, work.target.recipe.global_batch)
    last = ledger.Findings()
    ours, theirs = (_final(work.folder / leg, work.steps) for leg in ("reference", "twin"))
    if ours is None or theirs is None:
        last.add(f"no checkpoint of step {work.steps} that verifies")
    else:
        last = ledger.same_tensors(ours, theirs)
    equal_bits = bits.equal and last.equal
    if not bits.equal:
        failures.append(f"the twin's digests differ from the reference's at {bits.differing} places")
    if not last.equal:
        failures.append("the twin's last checkpoint is not the reference's")

    marks = work.marks("twin")
    struck = sorted(((at, kill) for kill in planned if (at := kill.struck_at(marks))), key=lambda pair: pair[0])
    restarts = twin.restarts()
    lost = max(restarts, key=lambda restart: restart.lost_steps, default=None)
    lost_steps = lost.lost_steps if lost else 0
    # A save is written behind the training; the next one waits for it.
    behind = max(0, lost_steps - every)
    if lost_steps >= 2 * every:
        failures.append(f"{lost_steps} steps were lost after one kill, with a checkpoint every {every}")
    to_preemption = max((restart.lost_steps for restart in restarts if _preempted(restart, struck)), default=0)
    if to_preemption:
        failures.append(f"{to_preemption} steps were lost after SIGTERM; 0 is promised")

    legs = [
        _leg("reference", [first], seconds, ledger.Findings(compared=reference.last)),
        _leg("twin", [first], seconds, bits, samples, last),
    ]
    deviations: list[tuple[int, float]] = []
    if changes:
        rescaled = ledger.Digests.read(work.folder / "rescaled")
        before = ledger.same_bits(reference, rescaled, range(1, changes[0] - 2 * every), range(first))
        again = ledger.same_samples(reference, rescaled, steps, work.target.recipe.global_batch)
        deviations = list(zip(steps, ledger.deviations(reference, rescaled, steps), strict=True))
        worst = max(value for _, value in deviations)
        limit = LOSS_LIMIT["float32" if work.target.cluster.precision == "float32" else "bf16"]
        if not before.equal:
            failures.append(
                "before its first change of workers, the rescaled leg's digests differ from the reference's"
            )
        if not again.equal:
            failures.append("the rescaled leg took other samples than the reference")
        if not worst <= limit:
            failures.append(f"the rescaled leg's loss deviates by {worst:.1e}; the limit is {limit:.0e}")
        legs.append(_leg("rescaled", list(work.workers), seconds, again, before))
        samples.differing += again.differing
    if not samples.equal:
        failures.append("samples are missing, or there twice, or at other places")
    failures += [f"a resume without {item} went unnoticed" for item, found in controls.items() if not found]

    took = recoveries(twin, [at for at, kill in struck if kill.kind != "preemption"])
    kinds = [kill.kind for _, kill in struck]
    return Certificate(
        recipe=work.target.recipe.name,
        passed=not failures,
        equal_bits=equal_bits,
        same_samples=samples.equal,
        largest_deviation=max((value for _, value in deviations), default=None),
        lost_steps=lost_steps,
        lost_behind_a_save=behind,
        lost_to_preemption=to_preemption,
        checkpoint_every=every,
        recovery_seconds={"median": statistics.median(took), "worst": max(took)} if took else None,
        kills=len(struck),
        kills_planned=len(planned),
        kills_inside_a_save=kinds.count("save"),
        kills_by_kind={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        steps=work.steps,
        steps_compared=bits.compared + (len(deviations) if changes else 0),
        steps_redone=twin.redone(),
        workers=list(work.workers),
        left_out=left_out,
        controls=controls,
        failures=failures,
        legs=legs,
        seed=seed,
        seconds=time.monotonic() - begun,
        versions=versions(),
        deviations=deviations,
        kill_table=[
            {"kind": kill.kind, "where": kill.where, "struck": kill.struck_at(marks) is not None} for kill in planned
        ],
    )


def _leg(name: str, workers: list[int], seconds: dict[str, float], *findings: ledger.Findings) -> Leg:
    wrong = [words for found in findings for words in found.wrong]
    differing = sum(found.differing for found in findings)
    return Leg(name, workers, seconds.get(name, 0.0), findings[0].compared, differing, wrong)


def summary(certificate: Certificate) -> str:
    """The verdict in a few lines."""
    recovery, deviation = certificate.recovery_seconds, certificate.largest_deviation
    lines = [
        "passed: nothing was lost" if certificate.passed else "failed: " + "; ".join(certificate.failures),
        f"bits {'equal' if certificate.equal_bits else 'different'} in {certificate.steps_compared} compared steps, "
        f"{certificate.kills} kills ({certificate.kills_inside_a_save} inside a save), at most {certificate.lost_steps} steps lost",
    ]
    if recovery is not None:
        lines.append(f"recovery {recovery['median']:.1f} s (median), {recovery['worst']:.1f} s (worst)")
    if deviation is not None:
        lines.append(f"on {certificate.workers} workers in turn the loss deviates by {deviation:.1e} at most")
    lines += [f"without {item}: {'found' if found else 'unnoticed'}" for item, found in certificate.controls.items()]
    return "\n".join(lines)


def as_json(certificate: Certificate) -> dict[str, Any]:
    """Plain values; a deviation that is not finite is null, as JSON has no word for it."""
    values = asdict(certificate)
    values["deviations"] = [(step, value if math.isfinite(value) else None) for step, value in certificate.deviations]
    if values["largest_deviation"] is not None and not math.isfinite(values["largest_deviation"]):
        values["largest_deviation"] = None
    return values


def _write(folder: Path, certificate: Certificate) -> None:
    from nexus_scale.certify.page import page

    atomic_write(folder / "certificate.json", json.dumps(as_json(certificate), indent=1, allow_nan=False))
    atomic_write(folder / "certificate.html", page(certificate))
