"""`nexus certify`: a proof that a recipe, on this cluster, loses nothing to kills and to changes of the number of workers.

Three legs train the same recipe, with a digest of every step (callbacks/digest.py):

    reference  without interruption
    twin       with the same number of workers, killed at random moments: every step, also a repeated one, equals the reference's to the bit
    rescaled   on other numbers of workers in its last steps: the same samples at the same positions of every global batch, and the loss
               within 1e-6

On request there is a control for each piece of state: a resume without it, which the comparison must find.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nexus_scale.certify import ledger, page
from nexus_scale.certify.certificate import Certificate, as_json, summary
from nexus_scale.certify.compared import Events, compare
from nexus_scale.certify.kills import plan_kills
from nexus_scale.certify.left_out import ITEMS
from nexus_scale.certify.legs import Work, changes_of_workers, resolved
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.orchestration.cluster import connected

log = logging.getLogger(__name__)

RESTART_S = 10.0
"""Of one restart, for the estimate."""

STEPS_BETWEEN_CHECKPOINTS = 5


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
    """The certificate of a recipe on a cluster.

    Args:
        name, overrides, cluster, tiny: as for `nexus train`.
        kills: of the twin.
        workers: the first is for reference and twin; the rescaled leg trains on all of them in turn.
        steps: of each leg; by default enough for a step of its own for each kill.
        every: steps between checkpoints.
        folder: a new one; by default below the root of the runs.
        left_out: one of ITEMS that the recipe's checkpoints hold: the twin resumes once without it, and the certificate fails.
        quiet: whether the workers' output goes to stderr.
        controls: whether to resume once without each of ITEMS that they hold, too, and to fail where the comparison does not find it.
    Returns:
        The certificate, and its folder with `certificate.html`, `certificate.json` and a run folder for each leg.
    Raises:
        UserError: an impossible recipe, cluster or number of workers, before anything starts.
    """
    begun = time.monotonic()
    if left_out is not None and left_out not in ITEMS:
        raise UserError(f"--leave-out {left_out!r}: expected one of {', '.join(ITEMS)}")
    steps = max(60, 2 * kills) if steps is None else steps
    work = resolved(name, overrides, cluster, tiny, workers, steps, every, folder)
    _estimate(kills, len(workers), len(ITEMS) if controls else 0)
    with (
        contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext(),
        connected(nodes=work.target.cluster.nodes),
    ):
        reference, events = _trained(work, kills, left_out, controls, seed)
    certificate = compare(work, reference, replace(events, begun=begun))
    _write(work.folder, certificate)
    return certificate, work.folder


def _trained(work: Work, kills: int, left_out: str | None, controls: bool, seed: int) -> tuple[ledger.Digests, Events]:
    """The reference's digests, and what was done to the other legs, once all are trained."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "reference"):
        work.uninterrupted("reference")
    reference = ledger.Digests.read(work.folder / "reference")
    life_s = _seconds_of(reference) / max(1, kills) + 2.0
    planned = plan_kills(kills, steps=work.steps, every=work.every, workers=work.workers[0], seed=seed, life_s=life_s)
    log.info("reference: %.0f s; now the twin with %d kills", seconds["reference"], kills)
    with _timed(seconds, "twin"):
        work.killed("twin", planned, left_out)
    log.info("twin: %.0f s; now on %s workers in turn", seconds["twin"], ", ".join(map(str, work.workers)))
    changes = changes_of_workers(seed, work.steps, len(work.workers))
    with _timed(seconds, "rescaled"):
        if changes:
            work.rescaled("rescaled", work.workers, changes)
    noticed = {item: _noticed(work, reference, item) for item in (work.controls() if controls else ())}
    return reference, Events(planned, changes, seconds, noticed, left_out, seed, begun=time.monotonic())


@contextlib.contextmanager
def _timed(seconds: dict[str, float], leg: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[leg] = time.monotonic() - begun


def _noticed(work: Work, reference: ledger.Digests, item: str) -> bool:
    """Whether the comparison finds that a resume went without an item."""
    log.info("control: a resume without %s", item)
    work.control(item)
    control = ledger.Digests.read(work.folder / f"without_{item}")
    same = ledger.same_bits(reference, control, range(1, work.steps + 1), range(work.workers[0]))
    return not same.equal and control.last == work.steps


def _estimate(kills: int, resizes: int, controls: int) -> None:
    starts = 2 + resizes + (1 + controls if controls else 0)
    seconds = RESTART_S * (2 * starts + kills)
    log.info(
        "%d starts and %d kills: about %.0f minutes where a restart takes %.0f s, and the steps of %d legs",
        starts, kills, seconds / 60, RESTART_S, 3 + controls,
    )  # fmt: skip


def _seconds_of(reference: ledger.Digests) -> float:
    times = [row["at"] for row in reference.ranks.get(0, [])]
    return max(times) - min(times) if times else 0.0


def _write(folder: Path, certificate: Certificate) -> None:
    atomic_write(folder / "certificate.json", json.dumps(as_json(certificate), indent=1, allow_nan=False))
    atomic_write(folder / "certificate.html", page.page(certificate))


__all__ = ["STEPS_BETWEEN_CHECKPOINTS", "Certificate", "as_json", "certify", "summary"]
