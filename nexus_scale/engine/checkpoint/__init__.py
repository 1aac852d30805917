"""Checkpoints that know tensors and not workers: written behind the training, committed whole, verified before anything
is read.

A checkpoint is a folder `step_00000100/`: one safetensors file per rank, which any reader of that format opens, and
MANIFEST.json, which says where the parts of each logical tensor lie, with size and XXH3-128 of each file. Reading gives
any range of any tensor, so any number of workers resumes from what any other number wrote.

Commit: every rank writes and fsyncs its file into a draft, then leaves a note of what it wrote; rank 0 awaits all notes, checks
that the parts tile every tensor and that no newer attempt has taken the run over, and writes the manifest. On a file system the
draft is then renamed into place (folder.py); in an object store the manifest itself is the commit (objects.py).

Why not torch.distributed.checkpoint: writing and hashing are one pass over the bytes here; its planner and its
asynchronous commit use collectives of pickled objects from a second thread, which can interleave with the training's;
and its reader verifies nothing.

    manifest    contents and seal of a checkpoint's manifest
    places      the interface of a place of checkpoints
    folder      a place in a folder that all ranks see
    objects     a place in an object store
    located     which of them a run uses
    reading     the newest checkpoint that verifies, any range of any tensor
    retention   which checkpoints are kept
    store       saving
"""

from nexus_scale.engine.checkpoint.located import send_elsewhere
from nexus_scale.engine.checkpoint.manifest import CheckpointError, Fenced, folder_name
from nexus_scale.engine.checkpoint.objects import allowed_url
from nexus_scale.engine.checkpoint.reading import (
    Checkpoint,
    any_damaged,
    checkpoint_at,
    committed_steps,
    load_network,
    newest,
    newest_of,
    newest_state,
    undo,
)
from nexus_scale.engine.checkpoint.retention import Best
from nexus_scale.engine.checkpoint.store import CheckpointStore

__all__ = [
    "Best",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "Fenced",
    "allowed_url",
    "any_damaged",
    "checkpoint_at",
    "committed_steps",
    "folder_name",
    "load_network",
    "newest",
    "newest_of",
    "newest_state",
    "send_elsewhere",
    "undo",
]
