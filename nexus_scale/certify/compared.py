"""The comparison of a proof's legs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_scale.certify import ledger
from nexus_scale.certify.certificate import Certificate, Leg
from nexus_scale.certify.kills import Kill
from nexus_scale.certify.legs import Work
from nexus_scale.contracts import RunFolder
from nexus_scale.engine.checkpoint import Checkpoint, newest
from nexus_scale.run.resume import versions

LOSS_LIMIT = {"float32": 1e-6, "bf16": 1e-2}
"""Allowed relative deviation of the loss on another number of workers, which sums in another order; by precision."""


def recoveries(digests: ledger.Digests, struck: Sequence[float]) -> list[float]:
    """Seconds from each kill to the end of the first step of a new process; of kills without a step between them, for the last."""
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
    """Whether only SIGTERM struck during the life of the process that a restart replaced."""
    kinds = {kill.kind for at, kill in struck if restart.since < at < restart.at}
    return kinds == {"preemption"}


def _final(run: Path, steps: int) -> Checkpoint | None:
    found = newest(RunFolder(run).checkpoints)
    return found if found is not None and found.step == steps else None


@dataclass(frozen=True)
class Events:
    """What was done to the legs.

    Attributes:
        kills: of the twin, as planned.
        changes: steps at which the rescaled leg's number of workers changed.
        seconds: of each leg.
        controls: whether the comparison found that an item was left out, by item.
        left_out: the item that the twin resumed without.
        begun: monotonic time of the start of the proof.
    """

    kills: Sequence[Kill]
    changes: Sequence[int]
    seconds: Mapping[str, float]
    controls: dict[str, bool]
    left_out: str | None
    seed: int
    begun: float


@dataclass(frozen=True)
class _Twin:
    """The twin against the reference. `struck`: kills with their times; `lost`, `preempted`: steps lost at most, and after SIGTERM."""

    bits: ledger.Findings
    samples: ledger.Findings
    last: ledger.Findings
    struck: list[tuple[float, Kill]]
    lost: int
    preempted: int
    redone: int
    recoveries: list[float]

    def failures(self, every: int) -> Iterator[str]:
        if not self.bits.equal:
            yield f"the twin's digests differ from the reference's at {self.bits.differing} places"
        if not self.last.equal:
            yield "the twin's last checkpoint is not the reference's"
        if self.lost >= 2 * every:
            yield f"{self.lost} steps were lost after one kill, with a checkpoint every {every}"
        if self.preempted:
            yield f"{self.preempted} steps were lost after SIGTERM; 0 is promised"


@dataclass(frozen=True)
class _Rescaled:
    """The rescaled leg against the reference; `before`: its bits until the first change."""

    before: ledger.Findings
    samples: ledger.Findings
    deviations: list[tuple[int, float]]

    def failures(self, limit: float) -> Iterator[str]:
        if not self.before.equal:
            yield "before its first change of workers, the rescaled leg's digests differ from the reference's"
        if not self.samples.equal:
            yield "the rescaled leg took other samples than the reference"
        worst = max(value for _, value in self.deviations)
        if not worst <= limit:
            yield f"the rescaled leg's loss deviates by {worst:.1e}; the limit is {limit:.0e}"


def compare(work: Work, reference: ledger.Digests, events: Events) -> Certificate:
    """The certificate: all legs held against the reference."""
    first = work.workers[0]
    twin = _twin(work, reference, events.kills)
    legs = [
        _leg("reference", [first], events.seconds, ledger.Findings(compared=reference.last)),
        _leg("twin", [first], events.seconds, twin.bits, twin.samples, twin.last),
    ]
    failures, same_samples = list(twin.failures(work.every)), twin.samples.equal
    deviations: list[tuple[int, float]] = []
    if events.changes:
        rescaled = _rescaled(work, reference, events.changes[0])
        failures += rescaled.failures(LOSS_LIMIT["float32" if work.target.cluster.precision == "float32" else "bf16"])
        legs.append(_leg("rescaled", list(work.workers), events.seconds, rescaled.samples, rescaled.before))
        deviations, same_samples = rescaled.deviations, same_samples and rescaled.samples.equal
    if not same_samples:
        failures.append("samples are missing, repeated, or at other positions")
    failures += [f"a resume without {item} went unnoticed" for item, found in events.controls.items() if not found]
    took, kinds = twin.recoveries, [kill.kind for _, kill in twin.struck]
    marks = work.marks("twin")
    return Certificate(
        recipe=work.target.recipe.name,
        passed=not failures,
        equal_bits=twin.bits.equal and twin.last.equal,
        same_samples=same_samples,
        largest_deviation=max((value for _, value in deviations), default=None),
        lost_steps=twin.lost,
        lost_behind_a_save=max(0, twin.lost - work.every),  # written behind the training; the next save waits for it
        lost_to_preemption=twin.preempted,
        checkpoint_every=work.every,
        recovery_seconds={"median": statistics.median(took), "worst": max(took)} if took else None,
        kills=len(twin.struck),
        kills_planned=len(events.kills),
        kills_inside_a_save=kinds.count("save"),
        kills_by_kind={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        steps=work.steps,
        steps_compared=twin.bits.compared + len(deviations),
        steps_redone=twin.redone,
        workers=list(work.workers),
        left_out=events.left_out,
        controls=events.controls,
        failures=failures,
        legs=legs,
        seed=events.seed,
        seconds=time.monotonic() - events.begun,
        versions=versions(),
        deviations=deviations,
        kill_table=[
            {"kind": kill.kind, "where": kill.where, "struck": kill.struck_at(marks) is not None}
            for kill in events.kills
        ],
    )


def _twin(work: Work, reference: ledger.Digests, kills: Sequence[Kill]) -> _Twin:
    twin, steps = ledger.Digests.read(work.folder / "twin"), range(1, work.steps + 1)
    marks = work.marks("twin")
    struck = sorted(((at, kill) for kill in kills if (at := kill.struck_at(marks))), key=lambda pair: pair[0])
    restarts = twin.restarts()
    return _Twin(
        bits=ledger.same_bits(reference, twin, steps, range(work.workers[0])),
        samples=ledger.same_samples(reference, twin, steps, work.target.recipe.global_batch),
        last=_last(work),
        struck=struck,
        lost=max((restart.lost_steps for restart in restarts), default=0),
        preempted=max((restart.lost_steps for restart in restarts if _preempted(restart, struck)), default=0),
        redone=twin.redone(),
        recoveries=recoveries(twin, [at for at, kill in struck if kill.kind != "preemption"]),
    )


def _last(work: Work) -> ledger.Findings:
    """The last checkpoints of reference and twin."""
    ours, theirs = (_final(work.folder / leg, work.steps) for leg in ("reference", "twin"))
    if ours is not None and theirs is not None:
        return ledger.same_tensors(ours, theirs)
    missing = ledger.Findings()
    missing.add(f"no checkpoint of step {work.steps} that verifies")
    return missing


def _rescaled(work: Work, reference: ledger.Digests, first_change: int) -> _Rescaled:
    rescaled, steps = ledger.Digests.read(work.folder / "rescaled"), range(1, work.steps + 1)
    before = range(1, first_change - 2 * work.every)
    return _Rescaled(
        before=ledger.same_bits(reference, rescaled, before, range(work.workers[0])),
        samples=ledger.same_samples(reference, rescaled, steps, work.target.recipe.global_batch),
        deviations=list(zip(steps, ledger.deviations(reference, rescaled, steps), strict=True)),
    )


def _leg(name: str, workers: list[int], seconds: Mapping[str, float], *findings: ledger.Findings) -> Leg:
    wrong = [words for found in findings for words in found.wrong]
    differing = sum(found.differing for found in findings)
    return Leg(name, workers, seconds.get(name, 0.0), findings[0].compared, differing, wrong)
