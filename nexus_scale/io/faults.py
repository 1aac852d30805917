"""Faults on demand, for tests, `nexus certify` and `nexus bench storm`; inactive unless NEXUS_FAULT is set.

    NEXUS_FAULT="rank:1,step:7,phase:save_mid,action:SIGKILL,once:/tmp/a; after_s:3.5,action:SIGTERM"

Each fault is a list of `key:value` pairs. It strikes the process in which all of them are true:

    rank     of the worker (default: any)
    step     steps done when the phase begins (of a save: the step being saved; default: any)
    phase    `start data forward backward step save` as the loop reports them; within a save `save_begin save_mid save_between
             save_commit save_prune`
    after_s  instead of a phase: seconds after the worker started
    action   SIGKILL SIGTERM SIGSTOP, `raise` (RuntimeError), `oom` (torch.OutOfMemoryError), `enospc` (OSError), `sleep`
    seconds  of a sleep
    once     a path: the fault strikes only if it can create that file, so that it does not strike a restarted worker again
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from nexus_scale.contracts import UserError

VARIABLE = "NEXUS_FAULT"
ACTIONS = ("SIGKILL", "SIGTERM", "SIGSTOP", "raise", "oom", "enospc", "sleep")


@dataclass(frozen=True)
class Fault:
    """See the module."""

    action: str
    rank: int | None = None
    step: int | None = None
    phase: str | None = None
    after_s: float | None = None
    seconds: float = 0.0
    once: str | None = None

    def strikes(self, rank: int, step: int, phase: str) -> bool:
        return (
            self.phase == phase
            and (self.rank is None or self.rank == rank)
            and (self.step is None or self.step == step)
            and self._first()
        )

    def _first(self) -> bool:
        if self.once is None:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def act(self) -> None:
        if self.action == "sleep":
            time.sleep(self.seconds)
        elif self.action == "raise":
            raise RuntimeError("a fault that NEXUS_FAULT asked for")
        elif self.action == "oom":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory: a fault that NEXUS_FAULT asked for")
        elif self.action == "enospc":
            raise OSError(errno.ENOSPC, "No space left on device: a fault that NEXUS_FAULT asked for")
        elif (
            self.action == "SIGSTOP"
        ):  # sent to this thread: sent to the process, another thread may take it while this one runs on
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), getattr(signal, self.action))


def parse(text: str) -> list[Fault]:
    """The faults that a text describes. Raises UserError for anything else, by name."""
    kinds = {field.name: str(field.type) for field in fields(Fault)}
    faults = []
    for one in filter(None, (part.strip() for part in text.split(";"))):
        values: dict[str, object] = {}
        for pair in one.split(","):
            key, colon, value = pair.strip().partition(":")
            if not colon or key not in kinds:
                raise UserError(f"{VARIABLE}: got {pair.strip()!r}; expected key:value with a key of {sorted(kinds)}")
            try:
                values[key] = int(value) if "int" in kinds[key] else float(value) if "float" in kinds[key] else value
            except ValueError:
                raise UserError(f"{VARIABLE}: {key}: got {value!r}, expected a number") from None
        if values.get("action") not in ACTIONS:
            raise UserError(f"{VARIABLE}: action: got {values.get('action')!r}, expected one of {', '.join(ACTIONS)}")
        if ("phase" in values) == ("after_s" in values):
            raise UserError(f"{VARIABLE}: {one!r}: expected either a phase or after_s")
        faults.append(Fault(**values))  # type: ignore[arg-type]
    return faults


class Faults:
    """The faults of this process. The program calls `at` wherever a fault may strike."""

    def __init__(self, faults: list[Fault]):
        self._faults = faults
        self._rank: int = 0
        self._step: Callable[[], int] = int

    def arm(self, rank: int, step: Callable[[], int]) -> None:
        """Sets this worker's rank and how to get its step, and starts the timers of `after_s`."""
        self._rank, self._step = rank, step
        for fault in self._faults:
            if fault.after_s is not None and fault.rank in (None, rank) and fault.action.startswith("SIG"):
                timer = threading.Timer(fault.after_s, self._late, (fault,))
                timer.daemon = True
                timer.start()

    @staticmethod
    def _late(fault: Fault) -> None:
        if fault._first():
            fault.act()

    def at(self, phase: str, step: int | None = None) -> None:
        for fault in self._faults:
            if fault.strikes(self._rank, self._step() if step is None else step, phase):
                fault.act()


class _None:
    """Stands in for Faults if none are set."""

    def arm(self, rank: int, step: Callable[[], int]) -> None:
        return None

    def at(self, phase: str, step: int | None = None) -> None:
        return None


def asked_for() -> bool:
    return bool(os.environ.get(VARIABLE))


_present: Faults | _None | None = None


def present() -> Faults | _None:
    """This process's faults, read once from the environment."""
    global _present
    if _present is None:
        _present = Faults(parse(os.environ[VARIABLE])) if asked_for() else _None()
    return _present


def at(phase: str, step: int | None = None) -> None:
    """A place where a fault may strike."""
    present().at(phase, step)


def arm(rank: int, step: Callable[[], int]) -> None:
    present().arm(rank, step)
