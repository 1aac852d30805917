"""What `nexus plan` says beside what `nexus bench gpu` measured: `python -m nexus_scale.bench.gpu.planned RESULT.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nexus_scale.bench.gpu.cases import CASES, Case
from nexus_scale.bench.gpu.training import batch_of, recipe_of
from nexus_scale.config.recipe import cluster_from, dump, recipe_from
from nexus_scale.engine.settings import RESIDENT_NUMEL
from nexus_scale.planner.memory import GIB, WEIGHT, in_tensors
from nexus_scale.planner.plan import plan

MEMORY, TIME = 0.05, 0.15
"""Parts by which the plan may be off."""


def is_planned(case: Case) -> bool:
    """Whether the plan tells a case: not where one network of a recipe's two trains, nor with kernels that the cluster file asks for."""
    ours = case.kind == "ours" and case.task is not None and not case.task.phase
    return ours and not case.cluster.keys() & {"kernels", "deterministic", "cuda_graphs"}


def planned(case: Case, micro_batch: int, card: str) -> dict[str, float | None]:
    """`gib` and `ms` of a step of a case on one such card."""
    assert case.task is not None, case
    recipe = recipe_from({**dump(recipe_of(case.task, tiny=False)), "global_batch": micro_batch}, "bench gpu")
    cluster = cluster_from(
        {
            "precision": "bf16",
            "compile": True,
            "gpus_per_worker": 1,
            "gpu": card,
            "micro_batch": micro_batch,
            "activation_checkpointing": case.task.checkpointing,
            **case.cluster,
        },
        "bench gpu",
    )
    several = len(recipe.trained()) > 1
    found = plan(recipe, cluster, sample=batch_of(case.task.fields, 1, torch.device("cpu")) if several else None)
    seconds = found.seconds_per_step
    held = in_tensors(found.fit.memory) + (_of_shards(found.parameters) if case.cluster.get("zero_stage", 3) else 0)
    return {"gib": held / GIB, "ms": None if seconds is None else 1e3 * seconds}


def _of_shards(parameters: int) -> float:
    """Bytes that a bench's single rank takes for sharding, which a run's leaves out: gradients that stay, and gathered blocks."""
    return WEIGHT["bf16"] * parameters * (2 if parameters <= RESIDENT_NUMEL else 1)


def beside(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each measured step that is planned, with the plan of it: `memory` and `time` are planned over measured, and `off` names those of them
    that are further from 1 than wanted."""
    card = next(part for part in ("H200", "H100") if part in result["card"])
    found = []
    for row in result["rows"]:
        case = CASES[row["case"]]
        if row["row"] != "step" or not is_planned(case):
            continue
        said = planned(case, row["micro_batch"], card)
        memory = said["gib"] / row["gib"] if said["gib"] and row["gib"] else None
        time = said["ms"] / row["ms"] if said["ms"] else None
        found.append(
            {
                "case": row["case"],
                "micro_batch": row["micro_batch"],
                "gib": row["gib"],
                "planned_gib": said["gib"],
                "memory": memory,
                "ms": row["ms"],
                "planned_ms": said["ms"],
                "time": time,
                "off": [
                    name
                    for name, factor, part in (("memory", memory, MEMORY), ("time", time, TIME))
                    if factor is not None and abs(factor - 1) > part
                ],
            }
        )
    return found


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(f"{result['card']}, {result['date']}; wanted: memory within {MEMORY:.0%}, time within {TIME:.0%}")
    for row in beside(result):
        off = f"; off: {', '.join(row['off'])}" if row["off"] else ""
        print(
            f"{row['case']}, {row['micro_batch']}: {row['planned_gib']:.1f} GiB planned, {row['gib']:.1f} measured; "
            f"{row['planned_ms'] or 0:.1f} ms planned, {row['ms']:.1f} measured{off}"
        )


if __name__ == "__main__":
    main()
