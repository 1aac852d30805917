"""Reading: the newest checkpoint that verifies, and any range of any of its tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.contracts import ReadShard, RunFolder, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import manifest as manifests
from nexus_scale.engine.checkpoint.located import place_at
from nexus_scale.engine.checkpoint.manifest import CheckpointError
from nexus_scale.engine.checkpoint.places import Commit, Place
from nexus_scale.engine.tensor_file import DTYPES, TensorFile
from nexus_scale.io import incidents

logger = logging.getLogger(__name__)

_NAME_BYTES = 64


def _fresh(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files were verified."""

    place: Place
    commit: Commit
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> str:
        """Where it lies: a path, or a URL."""
        return self.place.where(self.commit)

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
        return {}

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            path = self.place.path_of(self.commit, name, self.manifest["files"][name]["xxh3_128"])
            self._files[name] = TensorFile.open(path)
        return self._files[name]

    def _entry(self, name: str) -> Mapping[str, Any]:
        entry: Mapping[str, Any] | None = self.manifest["tensors"].get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: has no tensor {name!r}; was it written with other networks or averages?"
            )
        return entry

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened logical tensor, on the CPU, in the precision they were written in.

        Raises:
            CheckpointError: there is no such tensor, or it has no such range.
        """
        return self._read(name, start, stop, _fresh)

    def _read(self, name: str, start: int, stop: int, memory: Callable[[int], Tensor]) -> Tensor:
        entry = self._entry(name)
        numel = torch.Size(entry["shape"]).numel()
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(f"{self.path}: {name} has {numel} values; [{start}, {stop}) was requested")
        dtype = DTYPES[entry["dtype"]]
        out = memory((stop - start) * dtype.itemsize).view(dtype)
        for file, first, last in entry["pieces"]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                self._file(file).read_into(name, low - first, out[low - start : high - start])
        return out

    def tensor(self, name: str) -> Tensor:
        """The whole logical tensor."""
        shape = self.shape(name)
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)

    @contextmanager
    def claimed(self) -> Iterator[ReadShard]:
        """`read` for a caller that must ask for every tensor there is, all ranks together. A collective at its end.

        What it returns is good until the next call: one buffer serves all, whose pages stay warm.

        Raises:
            CheckpointError: a requested tensor does not exist.
            UserError: the checkpoint has tensors that no rank requested; names them.
        """
        names = self.names
        number = {name: i for i, name in enumerate(names)}
        asked = torch.zeros(len(names), dtype=torch.int64)
        scratch = torch.empty(0, dtype=torch.uint8)

        def memory(size: int) -> Tensor:
            nonlocal scratch
            if scratch.numel() < size:
                scratch = _fresh(size)
            return scratch[:size]

        def read(name: str, start: int, stop: int) -> Tensor:
            values = self._read(name, start, stop, memory)
            asked[number[name]] = 1
            return values

        yield read
        left = [
            name for name, count in zip(names, distributed.sum_over_ranks(asked).tolist(), strict=True) if not count
        ]
        if left:
            shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            raise UserError(
                f"{self.path}: contains entries that this run does not use: {shown}; resume with the networks, averages and objective that "
                "wrote it, and the same nexus_scale",
                code=5,
            )


def committed_steps(root: Path | str) -> list[int]:
    """Steps of committed checkpoints, oldest first, by name alone."""
    return [commit.step for commit in place_at(root).commits()]


def newest_state(root: Path | str) -> Mapping[str, Any] | None:
    """What the newest checkpoint with an intact manifest says beside its tensors, whose files are not looked at; None where there is
    none."""
    place = place_at(root)
    for commit in reversed(place.commits()):
        try:
            state: Mapping[str, Any] = manifests.unsealed(place.manifest(commit))["state"]
        except (OSError, ValueError, KeyError) as error:
            logger.warning("checkpoint %s: its manifest cannot be read: %s", place.where(commit), error)
            continue
        return state
    return None


def any_damaged(root: Path | str) -> bool:
    """Whether a checkpoint was ever set aside there."""
    return place_at(root).damaged()


def newest(root: Path | str, *, before: int | None = None, run: Path | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on all ranks; None without one.

    Each rank verifies its share of the files; no byte of a tensor is read before all of them were. A checkpoint that does not
    verify is set aside, said in the log, and never deleted; then the one before it is tried. A collective where there is a
    process group.

    Args:
        root: a run's folder of checkpoints, or the URL of an object store's prefix.
        before: the largest step to consider.
        run: the run's folder, in whose record of incidents a damaged checkpoint is noted.
    Raises:
        UserError: a checkpoint is of a format that this version does not read.
        OSError: an object store does not answer.
    """
    place = place_at(root)
    tried: set[Commit] = set()
    while True:
        commit = _shared(_greatest(place, tried, before) if distributed.rank() == 0 else None)
        if commit is None:
            return None
        tried.add(commit)
        seen = verified(place, commit)
        if distributed.any_rank(seen.refusal is not None):
            raise seen.refusal or UserError(f"{place.where(commit)}: another rank refused it", code=5)
        if not distributed.any_rank(bool(seen.wrong)):
            return Checkpoint(place, commit, seen.manifest)
        if seen.wrong:
            logger.error("checkpoint %s does not verify: %s", place.where(commit), seen.wrong)
        if distributed.rank() == 0 and commit in place.commits():  # else retention took it from under a mere reader
            aside = place.set_aside(commit)
            message = f"checkpoint {place.where(commit)} is set aside as {aside}; the next newest is tried"
            logger.error("%s", message)
            if run is not None:
                incidents.note(
                    run, "corrupt_checkpoint", message, step=commit.step, why=seen.wrong or "see another rank's log"
                )
        distributed.barrier()


def newest_of(run: RunFolder, asked_by: str | None = None) -> Checkpoint:
    """The newest checkpoint of a run that verifies; see `newest`.

    Args:
        asked_by: what the message begins with; the run's folder unless given.
    Raises:
        UserError: there is none.
    """
    checkpoint = newest(run.checkpoints)
    if checkpoint is None:
        raise UserError(
            f"{asked_by or run.path}: no checkpoint that verifies; train it first: nexus train {run.path}", code=5
        )
    return checkpoint


def checkpoint_at(run: RunFolder, step: int) -> Checkpoint:
    """The checkpoint of one step of a run.

    Raises:
        UserError: it is not there any more, or does not verify; names those that are.
    """
    found = newest(run.checkpoints, before=step) if step in committed_steps(run.checkpoints) else None
    if found is None or found.step != step:
        kept = ", ".join(map(str, committed_steps(run.checkpoints))) or "none"
        raise UserError(
            f"{run.path}: has no checkpoint of step {step} that verifies; there are {kept}: callbacks.checkpoint.keep and keep_every keep "
            "more of them",
            code=5,
        )
    return found


def _greatest(place: Place, tried: set[Commit], before: int | None) -> Commit | None:
    found = [c for c in place.commits() if c not in tried and (before is None or c.step <= before)]
    return found[-1] if found else None


def _shared(commit: Commit | None) -> Commit | None:
    """Rank 0's, on all ranks. A collective."""
    name = b"" if commit is None else commit.name.encode()
    assert len(name) <= _NAME_BYTES, name
    step, *letters = distributed.broadcast_ints(
        [-1 if commit is None else commit.step, *name.ljust(_NAME_BYTES, b"\0")]
    )
    return None if step < 0 else Commit(step, bytes(letters).rstrip(b"\0").decode())


class Verified(NamedTuple):
    """The manifest of a checkpoint; or what is wrong with it; or why it is not for this program to judge."""

    manifest: Mapping[str, Any] = {}
    wrong: str = ""
    refusal: Exception | None = None


def verified(place: Place, commit: Commit, *, all_files: bool = False) -> Verified:
    """Whether the files are those of the manifest, and have its sizes; and its hashes, of which each rank looks at its share."""
    rank, world_size = (0, 1) if all_files else distributed.rank_and_world_size()
    try:
        try:
            manifest = manifests.unsealed(place.manifest(commit))
        except FileNotFoundError:
            raise ValueError(f"{manifests.MANIFEST} is missing") from None
        manifests.check(place.where(commit), manifest, commit.step, place.sizes(commit))
        for name in sorted(manifest["files"])[rank::world_size]:
            place.verify(commit, name, manifest["files"][name]["xxh3_128"])
    except UserError as error:
        return Verified(refusal=error)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        return Verified(wrong=f"{error}" or type(error).__name__)
    except OSError as error:
        # A disk that cannot read a block is damage; a store that does not answer is not.
        return Verified(refusal=error) if place.remote else Verified(wrong=str(error))
    return Verified(manifest)


def undo(root: Path | str, after: int) -> None:
    """Withdraws the checkpoints after step `after`, so that a run that rolled back does not resume from them if
    interrupted. A collective."""
    place = place_at(root)
    if distributed.rank() == 0:
        for commit in reversed(place.commits()):
            if commit.step > after:
                logger.warning("checkpoint %s is withdrawn: the run rolled back to step %d", place.where(commit), after)
                place.withdraw(commit)
    distributed.barrier()


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
                f"{checkpoint.path}: {name} has shape {shape}, the network expects {tuple(held.shape)}; use the run's own recipe",
                code=5,
            )
        held.copy_(checkpoint.tensor(name))
