"""What to do after a failure: whether to restart, when and how often; and a record of every attempt.

An attempt is one start of the workers. `attempts/<attempt>/attempt.json` has its times, number of workers, steps and outcome;
`incidents.jsonl` has a line for each failure and each decision.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nexus_scale.io import incidents, leaving
from nexus_scale.io.durable import atomic_write

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 300.0

_PEER_IS_GONE = re.compile(
    r"(?i)connection (closed|reset)|broken pipe|connection refused|remote process exited|socket (closed|timeout)|"
    r"recv error|read error|NCCL.*(remote|unhandled system)|ncclRemoteError|actor.*unavailable"
)

_PEER_IS_SILENT = re.compile(r"(?i)timed out waiting \d+ms for (recv|send) operation")
"""A cut network, a hanging peer, or a collective that only one rank makes, which may be a bug."""


@dataclass(frozen=True)
class Limits:
    """`failures`: restarts without a new checkpoint between them. `preemptions`: of a whole launch, None for any number. `backoff_s`: the
    wait before the second restart in a row, which doubles from there; the first comes at once."""

    failures: int = 3
    preemptions: int | None = None
    backoff_s: float = 2.0


@dataclass(frozen=True)
class Failure:
    """What ended an attempt.

    Attributes:
        kind: `lost`: a process ended without a message; `failed`: a worker raised; `stalled`: its watchdog ended it; `controller`: Ray
            itself failed; `left`: the workers left when asked, to be restarted.
        message: one line for people.
        error: type and message of the exception, equal for equal mistakes.
        details: a traceback, for the log.
    """

    kind: Literal["lost", "failed", "stalled", "controller", "left"]
    message: str
    rank: int | None = None
    error: str = ""
    details: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether to restart, and after how many seconds; or why not, in words."""

    restart: bool
    wait_s: float = 0.0
    words: str = ""


def failure_of(errors: Mapping[int, tuple[str, str, bool]], details: str = "") -> Failure:
    """The cause among the reports of several ranks: when one dies, the others fail in their next collective.

    Args:
        errors: by rank: the error's type, its text, and whether the process is gone.
        details: tracebacks, for the user.
    """

    def weight(item: tuple[int, tuple[str, str, bool]]) -> tuple[int, int]:
        rank, (_, text, gone) = item
        return (0 if gone else 3 if _PEER_IS_GONE.search(text) else 2 if _PEER_IS_SILENT.search(text) else 1), rank

    rank, (name, text, gone) = min(errors.items(), key=weight)
    line = last_line(text)
    if gone:
        return Failure("lost", f"the process of rank {rank} is gone", rank)
    if _PEER_IS_GONE.search(text):
        return Failure("lost", f"rank {rank} lost a peer: {line}", rank)
    if _PEER_IS_SILENT.search(text):
        words = f"rank {rank} waited in vain for another: {line}"
        return Failure("lost", words, rank, normalised(f"{name}: {line}"), details)
    return Failure("failed", f"rank {rank} raised {name}: {line}", rank, normalised(f"{name}: {line}"), details)


def is_collateral(text: str) -> bool:
    """Whether an error only says that another process is gone or silent."""
    return bool(_PEER_IS_GONE.search(text) or _PEER_IS_SILENT.search(text))


def normalised(text: str) -> str:
    """A message without its numbers and addresses, which differ from one time to the next."""
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", text)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "(no message)"


@dataclass
class Supervisor:
    """Judges failures and keeps the record of attempts.

    Args:
        run: the run's folder.
        limits: how often to restart.
        name: of the launch; restarts append a number.
    """

    run: Path
    limits: Limits
    name: str = field(default_factory=lambda: time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3))

    def __post_init__(self) -> None:
        self.starts = 0
        self.gave_up: Verdict | None = None
        self._failures = self._preemptions = 0
        self._step_before = -1
        self._committed = 0
        self._last: tuple[str, int] = ("", -1)
        self._attempt: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------ attempts

    @property
    def attempt(self) -> str:
        """The id of the current attempt, or of the next."""
        return self.name if self.starts <= 1 else f"{self.name}.{self.starts - 1}"

    def begin(self, workers: int) -> str:
        """The id of a new attempt, whose workers are about to start."""
        before = self._attempt.get("workers")
        request = leaving.asked(self.run)
        if request is not None and request.restart:
            leaving.withdraw(self.run)  # this start is the answer to it
        self.starts += 1
        self._attempt = {
            "attempt": self.attempt,
            "begin": round(time.time(), 3),  # as the times of incidents, which are compared with it
            "workers": workers,
            "first_step": self.committed(),
        }
        self._record()
        if self.starts > 1:
            incidents.note(
                self.run,
                "restarted",
                f"restart {self.starts - 1} with {workers} workers from step {self.committed()}",
                attempt=self.attempt,
                step=self.committed(),
                workers=workers,
            )
        if before not in (None, workers):
            incidents.note(
                self.run,
                "resized",
                f"{before} workers before, {workers} now",
                attempt=self.attempt,
                before=before,
                workers=workers,
            )
        return self.attempt

    def end(self, outcome: str, error: str = "") -> None:
        """Records the end of the attempt. `outcome`: finished, failed or left."""
        if self._attempt and "end" not in self._attempt:
            self._attempt |= {"end": time.time(), "outcome": outcome, "error": error, "last_step": self.step()}
            self._record()

    def _record(self) -> None:
        path = self.run / "attempts" / self._attempt["attempt"] / "attempt.json"
        try:
            atomic_write(path, json.dumps(self._attempt), synced=False)
        except OSError as error:  # costs the record and not the run
            logger.error("%s: is not written: %s", path, error)

    # ------------------------------------------------------------------------------------ failures

    def judge(self, failure: Failure) -> Verdict:
        """Whether to restart. A new checkpoint resets the count of failures."""
        step, committed = self.step(), self.committed()
        failure = self._with_stall(failure)
        if failure.kind == "left":
            return self._judge_preemption(failure)
        self.end("failed", failure.message)
        kind = {"lost": "worker_lost", "stalled": None}.get(failure.kind, "worker_failed")  # the watchdog noted its own
        if kind is not None:
            incidents.note(self.run, kind, failure.message, attempt=self.attempt, rank=failure.rank, step=step)
        if committed > self._step_before:
            self._failures = 0
        self._step_before = committed
        self._failures += 1
        again = bool(failure.error) and (failure.error, step) == self._last
        self._last = (failure.error, step)
        if again:
            return self._give_up(
                f"{failure.message}\nThe same error came twice at step {step}: a restart would not help.", failure
            )
        if self._failures > self.limits.failures:
            return self._give_up(
                f"the workers failed {self._failures} times without a new checkpoint, the last time: {failure.message}",
                failure,
            )
        wait = 0.0 if self._failures == 1 else min(LONGEST_WAIT_S, self.limits.backoff_s * 2 ** (self._failures - 2))
        logger.warning(
            "%s; restart %d of %d%s",
            failure.message,
            self._failures,
            self.limits.failures,
            f" in {wait:g} s" if wait else "",
        )
        return Verdict(True, wait)

    def _judge_preemption(self, failure: Failure) -> Verdict:
        self.end("left", failure.message)
        self._preemptions += 1
        if self.limits.preemptions is not None and self._preemptions > self.limits.preemptions:
            return self._give_up(f"the run was asked to leave {self._preemptions} times: {failure.message}", failure)
        logger.warning("%s; resuming on the machines that are left", failure.message)
        return Verdict(True)

    def _give_up(self, words: str, failure: Failure) -> Verdict:
        incidents.note(
            self.run, "gave_up", words.splitlines()[-1], attempt=self.attempt, rank=failure.rank, step=self.step()
        )
        self.gave_up = Verdict(False, words=f"{words}\n{failure.details}".strip())
        return self.gave_up

    def _with_stall(self, failure: Failure) -> Failure:
        """The failure as a stall, where the process's own watchdog ended it and left an incident."""
        if failure.kind != "lost":
            return failure
        for row in reversed(incidents.read(self.run)):
            if row["kind"] == "stalled" and row["at"] >= self._attempt.get("begin", 0.0):
                return Failure("stalled", str(row["message"]), row.get("rank"))
        return failure

    # ------------------------------------------------------------------------------------ progress

    def committed(self) -> int:
        """The step of the newest committed checkpoint, or 0; where their store does not answer, the last known one."""
        from nexus_scale.contracts import RunFolder
        from nexus_scale.run.runs import newest_step

        try:
            self._committed = newest_step(RunFolder(self.run))
        except OSError as error:
            logger.warning("%s; assuming that the newest checkpoint is that of step %d", error, self._committed)
        return self._committed

    def step(self) -> int:
        """The step that the current attempt has reached, by its heartbeats and checkpoints."""
        return max([self.committed(), *(int(beat["step"]) for beat in self.beats())])

    def beats(self) -> list[dict[str, Any]]:
        """The newest readable heartbeat of each rank of the current attempt."""
        from nexus_scale.run.files import read_beats

        begin = self._attempt.get("begin", 0.0)
        return [dict(beat) for beat in read_beats(self.run).values() if beat["at"] >= begin]
