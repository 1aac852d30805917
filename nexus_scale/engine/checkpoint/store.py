"""Writing: a copy in host memory, a thread that writes it behind the training, a commit when all ranks have written.

All ranks handle errors of that thread together, at the next opportunity: at the next save, or when the
save is waited for. A save that failed is noted, and training continues until too many have failed in a row.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nexus_scale.contracts import Shard, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import manifest as manifests
from nexus_scale.engine.checkpoint.located import place_at
from nexus_scale.engine.checkpoint.manifest import FORMAT, CheckpointError, Fenced
from nexus_scale.engine.checkpoint.places import Draft
from nexus_scale.engine.checkpoint.reading import Checkpoint, newest, verified
from nexus_scale.engine.checkpoint.retention import Best, Retention
from nexus_scale.engine.tensor_file import NAMES, bytes_of, header_of
from nexus_scale.io import faults, incidents
from nexus_scale.io.durable import trouble

logger = logging.getLogger(__name__)

_POLL_S = 0.01
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
_FIRST_PAUSE_S = 0.5


class Outcome(IntEnum):
    """Outcome of a save on one rank; the outcome of the save is the worst of all ranks."""

    DONE = 0
    FAILED = 1
    FULL = 2  # failed, and free space would help
    BROKEN = 3  # a bug: retrying cannot help
    FENCED = 4

    @classmethod
    def of(cls, error: Exception | None) -> Outcome:
        if error is None:
            return cls.DONE
        if isinstance(error, Fenced):
            return cls.FENCED
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cls.FULL
        return cls.BROKEN if isinstance(error, (CheckpointError, UserError)) else cls.FAILED


@dataclass
class _Snapshot:
    """A host buffer laid out as the data part of a file, and views of it by tensor; reused while the layout is the
    same."""

    layout: tuple[tuple[str, torch.dtype, int], ...]
    header: bytes
    buffer: Tensor
    views: list[Tensor]


@dataclass(frozen=True)
class _Job:
    step: int
    header: bytes
    data: memoryview
    parts: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Any]


class _Writing:
    """One attempt to write a job: its thread and its outcome."""

    def __init__(self, store: CheckpointStore, job: _Job, draft: Draft, make_room: bool):
        self.store, self.job, self.draft, self.make_room = store, job, draft, make_room
        self.error: Exception | None = None
        self.written = threading.Event()
        self.given_up = threading.Event()
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            try:
                self._write_part()
            finally:
                self.written.set()
            if self.store.rank == 0:
                self._commit()
        except Exception as error:
            self.error = error
            if self.store.rank == 0:
                self._discard()

    def _discard(self) -> None:
        try:
            self.draft.discard()
        except OSError as error:
            logger.warning("%s: is left in place (%s); the next start of the run removes it", self.draft, error)

    def _write_part(self) -> None:
        """Writes this rank's file, then a note of success or failure."""
        store, job = self.store, self.job
        file = f"rank{store.rank:05d}-of-{store.world_size:05d}.safetensors"
        try:
            faults.at("save_begin", step=job.step)
            store.place.check(store.attempt)
            if store.rank == 0:
                self._need_room()
            size, digest = self.draft.write(file, job.header, job.data, lambda: faults.at("save_mid", step=job.step))
            faults.at("save_between", step=job.step)
        except Exception as error:
            self._say_failed(file, error)
            raise
        self.draft.say(
            store.rank,
            json.dumps({"step": job.step, "file": file, "bytes": size, "xxh3_128": digest, "tensors": job.parts}),
        )

    def _say_failed(self, file: str, error: Exception) -> None:
        """So that rank 0 need not wait. It hears of it in `settle` too, where this fails as well."""
        note = json.dumps({"error": f"{type(error).__name__}: {error}"})
        # Its space is needed for the note, and by other writers on this disk.
        for action in (lambda: self.draft.drop(file), lambda: self.draft.say(self.store.rank, note)):
            try:
                action()
            except OSError as second:
                logger.warning("%s: the failure itself could not be handled: %s", self.draft, second)

    def _need_room(self) -> None:
        store = self.store
        if self.make_room:
            store.make_room(self.job.step)
        room = store.place.room()
        needed = store.world_size * (len(self.job.header) + len(self.job.data))
        if room is not None and room < needed:
            raise OSError(errno.ENOSPC, f"needs {needed:,} bytes, {room:,} are free")

    def _commit(self) -> None:
        store, job = self.store, self.job
        text = manifests.make(
            job.step, store.attempt, self._await_notes(), job.state, {"torch": str(torch.__version__)}
        )

        def before() -> None:
            faults.at("save_commit", step=job.step)
            store.place.check(store.attempt)

        self.draft.commit(text, before)
        try:
            store.prune(job.step)
        except OSError as error:  # the checkpoint is committed all the same
            logger.warning("%s: old checkpoints are not removed yet: %s", store.place, error)

    def _await_notes(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.store.deadline_s
        notes: dict[int, dict[str, Any]] = {}
        while True:
            for rank in sorted(set(range(self.store.world_size)) - set(notes)):
                said = self.draft.said(rank)
                if said is not None:
                    notes[rank] = json.loads(said)
                    if "error" in notes[rank]:
                        raise OSError(f"{self.draft}: rank {rank} could not write its part: {notes[rank]['error']}")
            missing = sorted(set(range(self.store.world_size)) - set(notes))
            if not missing:
                return [notes[rank] for rank in range(self.store.world_size)]
            if self.given_up.wait(_POLL_S):
                raise OSError(f"{self.draft}: ranks {missing} could not write their parts")
            if time.monotonic() > deadline:
                raise OSError(
                    f"{self.draft}: ranks {missing} did not write their parts within {self.store.deadline_s:.0f} s"
                )


class CheckpointStore:
    """Saves a run's checkpoints. One per rank; making one is a collective, and all ranks call `save` and `wait` at the same steps.

    Args:
        root: folder of the checkpoints, shared by all ranks, or the URL of an object store's prefix.
        attempt: name of this start of the run, the same on all ranks (distributed.shared_token). Rank 0 claims the place for it:
            from then on no process of an earlier attempt commits.
        keep, keep_every, best: see Retention.
        busy: what a save does while the one before is under way: `wait` for it, or `skip` (decided by all ranks
            together).
        failures: the run stops after this many failed saves in a row.
        deadline_s: how long rank 0 waits for the other ranks' files.
        run: the run's folder, in whose record of incidents a failed save is noted.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        keep: int = 2,
        keep_every: int | None = None,
        best: Best | None = None,
        busy: Literal["wait", "skip"] = "wait",
        failures: int = 3,
        deadline_s: float = 600.0,
        run: Path | None = None,
    ):
        self.retention = Retention(keep, keep_every, best)
        self.root, self.rank, self.world_size, self.attempt = root, rank, world_size, attempt
        self.busy, self.failures, self.deadline_s, self.run = busy, failures, deadline_s, run
        self.place = place_at(root)
        self._snapshot: _Snapshot | None = None
        self._job: _Job | None = None
        self._writing: _Writing | None = None
        self._tries = 0
        self._failed = 0
        self._last = Outcome.DONE
        if rank == 0:
            self.place.claim(attempt)
        if world_size > 1:
            # A rank that saved before the claim would find no folder to write into, or the attempt before this one in it.
            distributed.barrier()

    # ------------------------------------------------------------------------------------------ the caller's side

    def save(self, step: int, shards: Mapping[str, Shard], state: Mapping[str, Any]) -> bool:
        """Copies this rank's shards to host memory and returns; a thread writes and commits them. A collective.

        Args:
            state: plain JSON values; rank 0's are kept.
        Returns:
            False where the save before is still under way and the policy is to skip.
        Raises:
            Fenced: a newer attempt holds the run.
            UserError, CheckpointError: the save before was the last of too many that failed; nothing was begun.
        """
        if self.busy == "skip" and self._someone_is_busy():
            logger.warning("step %d: the previous checkpoint is still being written; this one is skipped", step)
            return False
        self._settle()
        json.dumps(state)  # a value that JSON cannot hold is the caller's mistake: raise here, not in the thread
        self._job = self._take(step, shards, state)
        self._begin(self._job)
        return True

    def wait(self) -> None:
        """Waits until the running save is committed, retrying from the same copy if it failed. A collective.

        Raises:
            Fenced, UserError, CheckpointError: as `save`.
        """
        while not self._settle():
            assert self._job is not None
            time.sleep(_FIRST_PAUSE_S * 2 ** (self._failed - 1))
            self._begin(self._job)

    @property
    def writing(self) -> bool:
        return self._writing is not None and self._writing.thread.is_alive()

    def close(self) -> None:
        """Waits for this rank's part of the running save; a failure is logged, and raised only by `wait`. No collective."""
        if self._writing is not None:
            self._writing.thread.join()
            if self._writing.error is not None:
                logger.error("the last save failed: %s", self._writing.error)
            self._writing = None

    def newest(self) -> Checkpoint | None:
        """See `reading.newest`. A collective where there is a process group."""
        return newest(self.root)

    def _someone_is_busy(self) -> bool:
        # Ranks finish at different times; only together can they decide to skip a save.
        return distributed.any_rank(self.writing) if self.world_size > 1 else self.writing

    def _begin(self, job: _Job) -> None:
        self._tries += 1  # the same on all ranks: no two tries share a draft
        draft = self.place.draft(job.step, self.attempt, self._tries)
        self._writing = _Writing(self, job, draft, make_room=self._last is Outcome.FULL)

    def _settle(self) -> bool:
        """Whether the running save, if any, succeeded; ranks agree. Counts and notes a failure, and raises after too many."""
        writing, self._writing = self._writing, None
        if writing is None:
            return True
        writing.written.wait()
        if _worst(Outcome.of(writing.error)) is not Outcome.DONE:
            writing.given_up.set()
        writing.thread.join()
        self._last = _worst(Outcome.of(writing.error))
        if self._last is Outcome.DONE:
            self._failed = 0
            return True
        self._failed += 1
        error = self._explained(writing)
        if self._last >= Outcome.BROKEN:
            raise error
        if self.rank == 0 and self.run is not None:
            facts = {"step": writing.job.step, "failures": self._failed, "limit": self.failures}
            incidents.note(self.run, "save_failed", str(error), **facts)
        if self._failed >= self.failures:
            raise error
        logger.error("%s (%d of at most %d in a row; training continues)", error, self._failed, self.failures)
        return False

    def _explained(self, writing: _Writing) -> Exception:
        error, step = writing.error, writing.job.step
        if isinstance(error, (CheckpointError, UserError)):
            return error
        if self._last is Outcome.FENCED:
            return Fenced(f"{self.place}: another rank found that a newer attempt holds the run")
        if self._last is Outcome.FULL:
            needed = self.world_size * (len(writing.job.header) + len(writing.job.data))
            room = self.place.room()
            free = "" if room is None else f", {room:,} are free"
            return UserError(
                f"{self.place}: the disk is full: the checkpoint of step {step} needs {needed:,} bytes{free}; "
                "free some, or lower callbacks.checkpoint.keep",
                code=6,
            )
        known = trouble(error) if isinstance(error, OSError) and error.errno in _FORBIDDEN else None
        if known is not None:
            return UserError(f"the checkpoint of step {step} could not be written: {known[0]}", known[1])
        what = "another rank failed, see its log" if error is None else f"{type(error).__name__}: {error}"
        failed = CheckpointError(f"{self.place}: the checkpoint of step {step} could not be written: {what}")
        failed.__cause__ = error
        return failed

    @torch.no_grad()
    def _take(self, step: int, shards: Mapping[str, Shard], state: Mapping[str, Any]) -> _Job:
        layout = tuple((name, shard.local.dtype, shard.local.numel()) for name, shard in shards.items())
        if self._snapshot is None or self._snapshot.layout != layout:
            tensors = {name: (dtype, numel) for name, dtype, numel in layout}
            header, places, size = header_of(tensors, {"format": f"nexus_scale-{FORMAT}"})
            on_gpu = any(shard.local.is_cuda for shard in shards.values())
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            views = [buffer[slice(*places[name])].view(dtype) for name, dtype, _ in layout]
            self._snapshot = _Snapshot(layout, header, buffer, views)
        snapshot = self._snapshot
        torch._foreach_copy_(snapshot.views, [shard.local.detach() for shard in shards.values()], non_blocking=True)
        if any(shard.local.is_cuda for shard in shards.values()):
            torch.cuda.current_stream().synchronize()
        parts = {
            name: {
                "shape": list(shard.shape),
                "dtype": NAMES[shard.local.dtype],
                "start": shard.start,
                "stop": shard.start + shard.local.numel(),
            }
            for name, shard in shards.items()
        }
        return _Job(step, snapshot.header, bytes_of(snapshot.buffer), parts, dict(state))

    # ------------------------------------------------------------------------------------------ the thread's side, rank 0

    def prune(self, step: int, keep: int | None = None) -> None:
        """Removes checkpoints that retention does not keep: all are invalidated first, then deleted."""
        self.place.check(self.attempt)
        for commit in self.retention.superfluous(self.place.commits(), keep):
            self.place.withdraw(commit)
        faults.at("save_prune", step=step)
        self.place.sweep(self.attempt)

    def make_room(self, step: int) -> None:
        """For a full disk: keeps only the newest checkpoint, after verifying it."""
        commits = self.place.commits()
        if len(commits) > 1 and verified(self.place, commits[-1], all_files=True).wrong:
            logger.error("%s: the newest checkpoint does not verify, so no other is removed to free space", self.place)
            return
        logger.warning("%s: no space left: keeping one checkpoint instead of %d", self.place, self.retention.keep)
        self.prune(step, keep=1)


def _worst(outcome: Outcome) -> Outcome:
    """Of all ranks. A collective."""
    counts = torch.zeros(len(Outcome), dtype=torch.int64)
    counts[outcome] = 1
    return max(Outcome(i) for i, count in enumerate(distributed.sum_over_ranks(counts).tolist()) if count)
