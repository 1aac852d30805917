"""Checkpoints that know tensors and not workers: written behind the training, committed whole, verified before anything
is read.

A checkpoint is a folder `step_00000100/`: one safetensors file per rank, which any reader of that format opens, and
MANIFEST.json, which says where the parts of each logical tensor lie, with size and XXH3-128 of each file. Reading gives
any range of any tensor, so any number of workers resumes from what any other number wrote.

Commit: every rank writes and fsyncs into `step_00000100.tmp-<attempt>/`, then leaves a note of what it wrote; rank 0
awaits all notes, checks that the parts tile every tensor, writes and fsyncs the manifest, renames the folder into
place, fsyncs the parent and replaces LATEST. A folder without the temporary name is complete, or was damaged later,
which the hashes tell.

Why not torch.distributed.checkpoint: writing and hashing are one pass over the bytes here; its planner and its
asynchronous commit use collectives of pickled objects from a second thread, which can interleave with the training's;
and its reader verifies nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from nexus_scale import __version__
from nexus_scale.contracts import Piece, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.tensor_file import DTYPES, NAMES, TensorFile, bytes_of, hash_file, header_of, write_file

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "MANIFEST.json"
LATEST = "LATEST"
_COMMITTED = re.compile(r"step_(\d{8,})")
_POLL_S = 0.02


class CheckpointError(Exception):
    """A save that failed, or a checkpoint that does not hold what is asked of it."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_whole(path: Path, text: str) -> None:
    """A small file that is there with all its bytes, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON with its own hash, so that a flipped bit in it is found too."""
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return json.dumps(
        {"xxh3_128": xxhash.xxh3_128_hexdigest(body.encode()), "manifest": manifest},
        sort_keys=True,
        separators=(",", ":"),
    )


def _unsealed(text: str) -> dict[str, Any]:
    """Raises ValueError where the text is no manifest, or not the one that was written."""
    sealed = json.loads(text)
    if not isinstance(sealed, dict) or set(sealed) != {"xxh3_128", "manifest"}:
        raise ValueError("not a sealed manifest")
    body = json.dumps(sealed["manifest"], sort_keys=True, separators=(",", ":"))
    if xxhash.xxh3_128_hexdigest(body.encode()) != sealed["xxh3_128"]:
        raise ValueError("the manifest's hash is not that of its contents")
    manifest: dict[str, Any] = sealed["manifest"]
    return manifest


# ------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files were verified."""

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def state(self) -> Mapping[str, Any]:
        """What the run wrote beside the tensors: plain JSON values."""
        state: Mapping[str, Any] = self.manifest["state"]
        return state

    @property
    def names(self) -> list[str]:
        return sorted(self.manifest["tensors"])

    @cached_property
    def _files(self) -> dict[str, TensorFile]:
        return {name: TensorFile.open(self.path / name) for name in self.manifest["files"]}

    def _entry(self, name: str) -> Mapping[str, Any]:
        entry: Mapping[str, Any] | None = self.manifest["tensors"].get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: holds no tensor {name!r}; was it written with other networks or averages?"
            )
        return entry

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened logical tensor, on the CPU, in the precision they were written in.

        Raises:
            CheckpointError: there is no such tensor, or it has no such range.
        """
        entry = self._entry(name)
        numel = torch.Size(entry["shape"]).numel()
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(f"{self.path}: {name} has {numel} values; [{start}, {stop}) was asked for")
        out = torch.empty(stop - start, dtype=DTYPES[entry["dtype"]])
        for file, first, last in entry["pieces"]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                self._files[file].read_into(name, low - first, out[low - start : high - start])
        return out

    def tensor(self, name: str) -> Tensor:
        """The whole logical tensor."""
        shape = self.shape(name)
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError where the folder's list of files is not that of its manifest, or the manifest is damaged."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    manifest = _unsealed(manifest_path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: was written in checkpoint format {manifest.get('format')}, this nexus_scale {__version__} reads format {FORMAT}; "
            f"use the version that wrote it ({manifest.get('versions', {}).get('nexus_scale')})",
            code=5,
        )
    if folder_name(manifest["step"]) != path.name:
        raise ValueError(f"the manifest is that of step {manifest['step']}")
    there = {entry.name for entry in path.iterdir()}
    listed = {MANIFEST, *manifest["files"]}
    if there != listed:
        raise ValueError(f"missing {sorted(listed - there)}, alien {sorted(there - listed)}")
    return manifest


def _verify(path: Path, rank: int, world_size: int) -> dict[str, Any]:
    """The manifest, once this rank's share of the files has the sizes and hashes it says. Raises ValueError or OSError
    where not."""
    manifest = _read_manifest(path)
    for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
        if number % world_size != rank:
            continue
        size = (path / name).lstat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes, the manifest says {expected['bytes']}")
        _, digest = hash_file(path / name)
        if digest != expected["xxh3_128"]:
            raise ValueError(f"{name} has XXH3-128 {digest}, the manifest says {expected['xxh3_128']}")
    return manifest


def committed_steps(root: Path) -> list[int]:
    """Steps of committed checkpoints, oldest first, by name alone."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for entry in root.iterdir() if (match := _COMMITTED.fullmatch(entry.name)))


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on all ranks; None where there is none.

    Each rank verifies its share of the files. A checkpoint that does not verify is set aside as `*.corrupt-<n>`, said
    in the log, and never deleted; then the one before it is tried. A collective where there is a process group.
    """
    rank, world_size = distributed.rank_and_world_size()
    if rank == 0:
        _finish_replacements(root)
    tried: set[int] = set()
    while True:
        steps = [step for step in committed_steps(root) if step not in tried] if rank == 0 else []
        step = distributed.broadcast_int(steps[-1] if steps else -1)
        if step < 0:
            return None
        tried.add(step)
        path = root / folder_name(step)
        manifest: dict[str, Any] | None = None
        refusal: UserError | None = None
        wrong = ""
        try:
            manifest = _verify(path, rank, world_size)
        except UserError as error:
            refusal = error
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            wrong = f"{error}" or type(error).__name__
        if distributed.any_rank(refusal is not None):
            raise refusal or UserError(f"{path}: another rank refused it", code=5)
        if not distributed.any_rank(bool(wrong)):
            assert manifest is not None
            return Checkpoint(path, manifest)
        if wrong:
            logger.error("checkpoint %s does not verify: %s", path, wrong)
        if rank == 0:
            _set_aside(path)
        distributed.barrier()


def _set_aside(path: Path) -> None:
    number = 0
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(aside)
    _fsync_folder(path.parent)
    logger.error("checkpoint %s is set aside as %s; the next newest is tried", path, aside.name)


def _finish_replacements(root: Path) -> None:
    """Brings back what a crash left between the two renames of a replacement."""
    for old in sorted(root.glob("step_*.replaced-*")) if root.is_dir() else []:
        name = old.name.partition(".")[0]
        if (root / name).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(root / name)


@torch.no_grad()
def load_network(checkpoint: Checkpoint, role: str, module: nn.Module) -> None:
    """Fills a bare module with the weights of a network, or of an average of one, without an engine.

    Raises:
        CheckpointError: a parameter or buffer of the module is not in the checkpoint under this role.
        UserError: a shape differs.
    """
    from nexus_scale.engine.networks import persistent_buffers

    known = checkpoint.manifest["tensors"]
    kind = "ema" if any(name.startswith(f"{role}/") and name.endswith(".ema") for name in known) else "fp32"
    wanted: list[tuple[str, Tensor]] = [
        (f"{role}/{name}.{kind}", parameter) for name, parameter in module.named_parameters()
    ]
    wanted += [(f"{role}/{name}.buffer", buffer) for name, buffer in persistent_buffers(module)]
    for name, held in wanted:
        shape = checkpoint.shape(name)
        if shape != tuple(held.shape):
            raise UserError(
                f"{checkpoint.path}: {name} has shape {shape}, the network wants {tuple(held.shape)}; use the run's own recipe",
                code=5,
            )
        held.copy_(checkpoint.tensor(name))


# ------------------------------------------------------------------------------------------------- writing


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
    """`number` counts the calls of `save`, alike on all ranks: no two saves share a temporary folder."""

    number: int
    step: int
    header: bytes
    data: memoryview
    parts: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Any]


class CheckpointStore:
    """Saves a run's checkpoints. One per rank; all ranks call `save` at the same steps.

    Args:
        root: folder of the checkpoints, shared by all ranks.
        attempt: name of this start of the run, the same on all ranks (distributed.shared_token): no two attempts share
            a temporary folder.
        keep: the newest so many stay.
        keep_every: besides, those whose step is a multiple of this stay.
        busy: what a save does while the one before is under way: `wait` for it, or `skip` (decided by all ranks
            together).
        deadline_s: how long rank 0 waits for the other ranks' files.
    """

    def __init__(
        self,
        root: Path,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        keep: int = 2,
        keep_every: int | None = None,
        busy: Literal["wait", "skip"] = "wait",
        deadline_s: float = 600.0,
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep: expected at least 1, got {keep}")
        self.root, self.rank, self.world_size, self.attempt = Path(root), rank, world_size, attempt
        self.keep, self.keep_every, self.busy, self.deadline_s = keep, keep_every, busy, deadline_s
        self._snapshot: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saves = 0
        self.root.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _finish_replacements(self.root)
            for leftover in (*self.root.glob("step_*.tmp-*"), *self.root.glob("step_*.pruned-*")):
                logger.info("removing %s, which an earlier attempt left unfinished", leftover)
                shutil.rmtree(leftover, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ the caller's side

    def save(self, step: int, pieces: Mapping[str, Piece], state: Mapping[str, Any]) -> bool:
        """Copies this rank's pieces to host memory and returns; a thread writes and commits them.

        Args:
            state: plain JSON values; rank 0's are kept.
        Returns:
            False where the save before is still under way and the policy is to skip.
        Raises:
            CheckpointError, UserError: the save before failed; nothing was begun.
        """
        self._saves += 1
        if self.busy == "skip" and self._someone_is_busy():
            logger.warning("step %d: the checkpoint before is still being written; this one is skipped", step)
            return False
        self.wait()
        json.dumps(state)  # a value that JSON cannot hold is the caller's mistake: raised here, not in the thread
        job = self._take(step, pieces, state)
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        return True

    def wait(self) -> None:
        """Returns when this rank's part of the save under way is on disk (on rank 0: when it is committed); raises what
        went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Finishes the save under way; a failure is logged, and raised only by `wait`."""
        try:
            self.wait()
        except (CheckpointError, UserError) as error:
            logger.error("the last save failed: %s", error)

    def newest(self) -> Checkpoint | None:
        """See `newest`. A collective where there is a process group."""
        return newest(self.root)

    def free_bytes_needed(self, pieces: Mapping[str, Piece]) -> int:
        """Room that one save takes on disk, all ranks together (this rank's bytes times their number, and the
        headers)."""
        return self.world_size * sum(p.local.numel() * p.local.element_size() + 512 for p in pieces.values())

    def _someone_is_busy(self) -> bool:
        # Ranks end their parts at different times; only together can they decide to leave one out.
        return distributed.any_rank(self.writing) if self.world_size > 1 else self.writing

    @torch.no_grad()
    def _take(self, step: int, pieces: Mapping[str, Piece], state: Mapping[str, Any]) -> _Job:
        layout = tuple((name, piece.local.dtype, piece.local.numel()) for name, piece in pieces.items())
        if self._snapshot is None or self._snapshot.layout != layout:
            tensors = {name: (dtype, numel) for name, dtype, numel in layout}
            header, places, size = header_of(tensors, {"format": f"nexus_scale-{FORMAT}"})
            on_gpu = any(piece.local.is_cuda for piece in pieces.values())
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            views = [buffer[slice(*places[name])].view(dtype) for name, dtype, _ in layout]
            self._snapshot = _Snapshot(layout, header, buffer, views)
        snapshot = self._snapshot
        torch._foreach_copy_(snapshot.views, [piece.local.detach() for piece in pieces.values()], non_blocking=True)
        if any(piece.local.is_cuda for piece in pieces.values()):
            torch.cuda.current_stream().synchronize()
        parts = {
            name: {
                "shape": list(piece.shape),
                "dtype": NAMES[piece.local.dtype],
                "start": piece.start,
                "stop": piece.start + piece.local.numel(),
            }
            for name, piece in pieces.items()
        }
        return _Job(self._saves, step, snapshot.header, bytes_of(snapshot.buffer), parts, dict(state))

    # ------------------------------------------------------------------------------------------ the thread's side

    def _run(self, job: _Job) -> None:
        temporary = self.root / f"{folder_name(job.step)}.tmp-{self.attempt}-{job.number}"
        try:
            self._write_part(job, temporary)
            if self.rank == 0:
                self._commit(job, temporary)
        except Exception as error:
            self._error = self._explained(error, job, temporary)
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _explained(self, error: Exception, job: _Job, temporary: Path) -> Exception:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = self.world_size * (len(job.header) + len(job.data))
            free = shutil.disk_usage(self.root).free
            return UserError(
                f"{self.root}: the disk is full: the checkpoint of step {job.step} needs {needed:,} bytes, {free:,} are free; "
                "free some, or lower callbacks.checkpoint.keep",
                code=6,
            )
        if isinstance(error, (CheckpointError, UserError)):
            return error
        failed = CheckpointError(f"{temporary}: the save failed: {type(error).__name__}: {error}")
        failed.__cause__ = error
        return failed

    def _write_part(self, job: _Job, temporary: Path) -> None:
        """This rank's file, then the note that says so (or that it failed, so that rank 0 need not wait for the
        deadline)."""
        file = f"rank{self.rank:05d}-of-{self.world_size:05d}.safetensors"
        note = temporary / f"rank{self.rank:05d}.json"
        temporary.mkdir(exist_ok=True)
        try:
            needed = self.world_size * (len(job.header) + len(job.data))
            if self.rank == 0 and shutil.disk_usage(self.root).free < needed:
                raise OSError(errno.ENOSPC, "not enough room for the checkpoint")
            size, digest = write_file(temporary / file, job.header, job.data)
            written = {"step": job.step, "file": file, "bytes": size, "xxh3_128": digest, "tensors": job.parts}
        except Exception as error:
            (temporary / file).unlink(
                missing_ok=True
            )  # its room is needed for the note, and by whoever runs on this disk
            _write_whole(note, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        _write_whole(note, json.dumps(written))

    def _commit(self, job: _Job, temporary: Path) -> None:
        notes = self._await_notes(temporary)
        manifest = {
            "format": FORMAT,
            "step": job.step,
            "world_size": self.world_size,
            "attempt": self.attempt,
            "tensors": _tiled(notes),
            "files": {note["file"]: {"bytes": note["bytes"], "xxh3_128": note["xxh3_128"]} for note in notes},
            "state": job.state,
            "versions": {"nexus_scale": __version__, "torch": str(torch.__version__)},
        }
        for rank in range(self.world_size):
            (temporary / f"rank{rank:05d}.json").unlink()
        _write_whole(temporary / MANIFEST, _sealed(manifest))
        _fsync_folder(temporary)
        final = self.root / folder_name(job.step)
        old = self.root / f"{final.name}.replaced-{self.attempt}"
        if final.exists():  # a run that was rolled back comes by here again
            final.rename(old)
        temporary.rename(final)
        _fsync_folder(self.root)
        _write_whole(self.root / LATEST, final.name + "\n")
        shutil.rmtree(old, ignore_errors=True)
        self._prune(job.step)

    def _await_notes(self, temporary: Path) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.deadline_s
        notes: dict[int, dict[str, Any]] = {}
        while True:
            for rank in set(range(self.world_size)) - set(notes):
                path = temporary / f"rank{rank:05d}.json"
                if path.exists():
                    notes[rank] = json.loads(path.read_text(encoding="utf-8"))
                    if "error" in notes[rank]:
                        raise CheckpointError(
                            f"{temporary}: rank {rank} could not write its part: {notes[rank]['error']}"
                        )
            missing = sorted(set(range(self.world_size)) - set(notes))
            if not missing:
                return [notes[rank] for rank in range(self.world_size)]
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{temporary}: ranks {missing} did not write their parts within {self.deadline_s:.0f} s"
                )
            time.sleep(_POLL_S)

    def _prune(self, newest_step: int) -> None:
        """Removes what retention does not name; the checkpoint just committed always stays."""
        steps = committed_steps(self.root)
        stay = {newest_step, *steps[-self.keep :]}
        for step in steps:
            if step in stay or (self.keep_every and step % self.keep_every == 0):
                continue
            path = self.root / folder_name(step)
            doomed = self.root / f"{path.name}.pruned-{self.attempt}"
            path.rename(doomed)  # so that a half-deleted folder never looks like a damaged checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def _tiled(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' parts by logical tensor, once they are seen to cover each of them exactly.

    Raises:
        CheckpointError: a gap, an overlap, or two ranks that disagree; names the tensor.
    """
    tensors: dict[str, Any] = {}
    for note in notes:
        for name, part in note["tensors"].items():
            entry = tensors.setdefault(name, {"shape": part["shape"], "dtype": part["dtype"], "pieces": []})
            if (entry["shape"], entry["dtype"]) != (part["shape"], part["dtype"]):
                raise CheckpointError(
                    f"{name}: {note['file']} has {part['dtype']} {part['shape']}, another rank {entry['dtype']} {entry['shape']}"
                )
            entry["pieces"].append([note["file"], part["start"], part["stop"]])
    for name, entry in tensors.items():
        entry["pieces"].sort(key=lambda piece: piece[1])
        reached = 0
        for file, start, stop in entry["pieces"]:
            if start != reached:
                raise CheckpointError(
                    f"{name}: values [{reached}, {start}) are {'missing' if start > reached else 'there twice'} ({file})"
                )
            reached = stop
        if reached != torch.Size(entry["shape"]).numel():
            raise CheckpointError(f"{name}: has {torch.Size(entry['shape']).numel()} values, the ranks wrote {reached}")
    return tensors
