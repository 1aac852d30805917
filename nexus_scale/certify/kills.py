"""Kills of a certificate's twin: a plan drawn from a seed, written as NEXUS_FAULT.

The workers kill themselves, so that a plan works wherever they run. Each fault leaves a file when it strikes, with the time of the kill.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nexus_scale.contracts import UserError

Kind = Literal["one", "any time", "all", "save", "preemption"]

WORDS: dict[Kind, str] = {
    "one": "SIGKILL of one rank, inside a random stage of a random step",
    "any time": "SIGKILL of one rank, a random time after its start",
    "all": "SIGKILL of all ranks at once",
    "save": "SIGKILL inside a save",
    "preemption": "SIGTERM to one rank, which saves and leaves",
}

# Three of ten are inside a save, and at least a quarter of the first few.
_TURNS: tuple[Kind, ...] = (
    "save", "one", "all", "save", "any time", "preemption", "save", "one", "any time", "one",
)  # fmt: skip

STAGES = ("data", "forward", "backward", "step")
SAVE_PHASES = {
    "save_begin": "every rank",
    "save_mid": "every rank",
    "save_between": "rank 0",
    "save_commit": "rank 0",
    "save_prune": "rank 0",
}
"""Where within a save a fault can strike, and on which ranks."""


@dataclass(frozen=True)
class Kill:
    """One kill: `where` in words; `faults` by the name of the file that each leaves in the folder of marks."""

    kind: Kind
    where: str
    faults: dict[str, str]

    def struck_at(self, marks: Path) -> float | None:
        """When its first fault struck, in seconds since the epoch; None where none has."""
        times = [path.stat().st_mtime for name in self.faults if (path := marks / name).exists()]
        return min(times, default=None)


def plan_kills(count: int, *, steps: int, every: int, workers: int, seed: int, life_s: float) -> list[Kill]:
    """Kills of a run, spread over all its steps.

    Args:
        every: steps between checkpoints.
        life_s: how long a worker lives between two kills on average: the range of the random times.
    """
    draw = random.Random(seed)
    kinds = [_TURNS[i % len(_TURNS)] for i in range(count)]
    saves = list(range(every, steps + 1, every))
    # The first save has nothing to prune yet.
    steps_of_saves = _spread(draw, saves[1:] or saves, kinds.count("save"))
    others = _spread(draw, range(1, steps), len(kinds) - kinds.count("save"))
    kills = []
    for number, kind in enumerate(kinds):
        rank = draw.randrange(workers)
        name = f"kill-{number:04d}"
        if kind == "save":
            step, phase = steps_of_saves.pop(), draw.choice(list(SAVE_PHASES))
            whose = f"rank:{rank}," if SAVE_PHASES[phase] == "every rank" else ""
            fault = f"{whose}step:{step},phase:{phase},action:SIGKILL"
            kills.append(Kill(kind, f"step {step}, {phase}", {name: fault}))
            continue
        step, stage = others.pop(), draw.choice(STAGES)
        at = f"step:{step},phase:{stage}"
        if kind == "any time":
            after = draw.uniform(0.0, 2.0 * life_s)
            fault = f"rank:{rank},after_s:{after:.3f},action:SIGKILL"
            kills.append(Kill(kind, f"rank {rank}, {after:.1f} s after a start", {name: fault}))
        elif kind == "all":
            faults = {f"{name}-{r}": f"rank:{r},step:{step},phase:data,action:SIGKILL" for r in range(workers)}
            kills.append(Kill(kind, f"after step {step}", faults))
        elif kind == "preemption":
            kills.append(Kill(kind, f"rank {rank}, step {step}, {stage}", {name: f"rank:{rank},{at},action:SIGTERM"}))
        else:
            kills.append(Kill(kind, f"rank {rank}, step {step}, {stage}", {name: f"rank:{rank},{at},action:SIGKILL"}))
    return kills


def _spread(draw: random.Random, values: Sequence[int], count: int) -> list[int]:
    """`count` of the values in random order; none comes twice before all have come once."""
    found: list[int] = []
    while len(found) < count:
        found += draw.sample(values, min(len(values), count - len(found)))
    return found


def as_faults(kills: Sequence[Kill], marks: Path) -> str:
    """The kills as the value of NEXUS_FAULT; each strikes once, however often the workers start.

    Raises:
        UserError: the folder's path has a character that separates faults.
    """
    if any(character in str(marks) for character in ",;"):
        raise UserError(f"{marks}: a comma or semicolon in the path; choose another --output")
    return ";".join(f"{fault},once:{marks / name}" for kill in kills for name, fault in kill.faults.items())
