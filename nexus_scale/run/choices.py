"""What the program chooses by itself in a run's first start, and keeps in later ones: precision, kernels, micro-batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nexus_scale.config.recipe import Cluster, accumulation
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.hardware import DTYPES
from nexus_scale.engine.precision import measured_precision
from nexus_scale.io.durable import atomic_write
from nexus_scale.kernels import choice, trial, updates
from nexus_scale.run.files import frozen_choices, was_deterministic
from nexus_scale.run.resume import versions

log = logging.getLogger(__name__)


def choose(cluster: Cluster, run: RunFolder, device: torch.device) -> dict[str, Any]:
    """`precision`, `micro_batch` and `kernels` of a run: as its first start chose, or chosen now; an empty `found` says that the
    micro-batch is to be found. A collective.

    Raises:
        UserError: a kernel that the cluster file names, or that the first start chose, is not available here.
    """
    frozen = frozen_choices(run)
    distributed.barrier()  # all ranks have read before rank 0 writes
    if frozen is None:
        precision = cluster.precision
        if precision == "auto":
            measured = measured_precision(device) if distributed.rank() == 0 else "float32"
            precision = "bf16" if distributed.broadcast_int(int(measured == "bf16")) else "float32"
        frozen = {
            "precision": precision,
            "micro_batch": cluster.fixed_micro_batch,
            "kernels": dict(cluster.kernels),
            "trials": [],
        }
        if cluster.micro_batch == "auto":
            frozen["found"] = {}
    else:  # a kernel unknown to the version of the first start was plain torch there
        frozen = {**frozen, "kernels": {**choice.PLAIN, **frozen["kernels"]}}
    wanted = _repeating(frozen["kernels"], cluster) if cluster.deterministic else frozen["kernels"]
    try:
        kernels = choice.choose(wanted, device, cluster.deterministic)
    except UserError as error:
        if frozen["kernels"] == dict(cluster.kernels):
            raise
        raise UserError(
            f"{run.path}: what its first start chose is not available here ({error}); `auto` keeps that choice: name another, for "
            "example cluster.kernels.attention=sdpa --allow-change cluster.kernels",
            code=5,
        ) from None
    names = {name: made.kernel for name, made in kernels.items()}
    if device.type == "cuda" and wanted.get("adam", "auto") == "auto":
        names["adam"] = _fastest_adam(device)
    return {**frozen, "kernels": names}


def _fastest_adam(device: torch.device) -> str:
    """The implementation that rank 0 finds the fastest, on all ranks. A collective."""
    options = choice.OPTIONS["adam"]
    fastest = updates.settle_fastest(device) if distributed.rank() == 0 else options[0]
    name = options[distributed.broadcast_int(options.index(fastest))]
    if distributed.rank() != 0:
        choice.settle("adam", name, "the fastest that rank 0 found")
    return name


def try_kernels(
    choices: Mapping[str, Any], cluster: Cluster, device: torch.device, rehearse: Callable[[], object]
) -> dict[str, Any]:
    """The choices, with trials of kernels on the shapes that the run uses, on a GPU; the fastest serve from now on. A collective.

    A run that began before there were trials, or those of a kernel, goes on without.

    Args:
        rehearse: computes the objective's losses on the meta device, where shapes are seen.
    Raises:
        UserError: what the first start chose cannot run here.
    """
    if device.type != "cuda" or "trials" not in choices:
        return dict(choices)
    with choice.noting() as counted:
        rehearse()
    known = trial.found_in(choices["trials"])
    named = {kernel for kernel, path in cluster.kernels.items() if path != "auto"}
    tried = {one.kernel for one in known} or set(trial.MADE)  # in the first start all, later those of the first
    seen = trial.shared(counted, distributed.broadcast_ints)
    found = trial.settle(
        {one: count for one, count in seen.items() if one[0] in tried - named},
        [one for one in known if one.kernel not in named],
        device,
        DTYPES[choices["precision"]],
        tries=distributed.rank() == 0,
        agree=distributed.broadcast_ints,
        deterministic=cluster.deterministic,
        compiled=cluster.compile,
    )
    return {**choices, "trials": [one.row() for one in found]}


def _repeating(kernels: Mapping[str, str], cluster: Cluster) -> dict[str, str]:
    """The run's kernels, with `auto` for those that do not repeat, unless the cluster file names them."""
    return {
        name: "auto" if (name, path) in choice.NOT_REPEATING and cluster.kernels.get(name, "auto") == "auto" else path
        for name, path in kernels.items()
    }


def record(run: RunFolder, cluster: Cluster, choices: Mapping[str, Any], device: torch.device) -> None:
    """Writes the choices, and what else the last bits depend on, to the run's environment.json. Called by rank 0."""
    before = was_deterministic(run)
    if before is not None and before != cluster.deterministic:
        log.warning(
            "%s: continues with cluster.deterministic: %s, and began with %s: on a GPU, steps from here on have other last bits",
            run.path, str(cluster.deterministic).lower(), str(before).lower(),
        )  # fmt: skip
    environment = {
        "choices": dict(choices),
        "deterministic": cluster.deterministic,
        "kernels": choice.report(),
        **versions(),
        "device": str(device),
    }
    atomic_write(run.environment, json.dumps(environment, indent=1))


def micro_batch_of(run: RunFolder, global_batch: int, cluster: Cluster) -> int:
    """Samples that a rank takes at once: as the run's first start chose, or as the cluster file says."""
    frozen = frozen_choices(run) or {"micro_batch": cluster.fixed_micro_batch}
    return accumulation(global_batch, distributed.world_size() // cluster.sequence_parallel, frozen["micro_batch"])[0]


def add_to_record(run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Adds what came up later to the run's environment.json. Called by rank 0."""
    before = json.loads(run.environment.read_text(encoding="utf-8"))
    atomic_write(run.environment, json.dumps({**before, **facts}, indent=1))
