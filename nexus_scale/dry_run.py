"""`--dry-run`: the figures of a recipe on a cluster, without starting it."""

from __future__ import annotations

import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import dump_yaml
from nexus_scale.main_job import Target, check_data, parameters
from nexus_scale.planner.plan import plan, table


def describe(target: Target) -> str:
    """The resolved recipe and cluster, parameters, FLOPs, batch arithmetic and memory per rank, as text."""
    recipe, cluster = target.recipe, target.cluster
    if recipe.data.synthetic is not None:
        check_data(target)  # made-up data need no job
    planned = plan(recipe, cluster, data_root=target.place.data_root)
    counts = parameters(recipe)
    sizes = "\n".join(f"  {name}: {count:,} parameters ({count / 1e9:.2f} B)" for name, count in counts.items())
    return "\n".join(
        [
            "# recipe",
            dump_yaml(recipes.dump(recipe)).rstrip(),
            "# cluster",
            dump_yaml(recipes.dump(cluster)).rstrip(),
            "# networks",
            sizes,
            f"# on {cluster.name}: {_workers(cluster)} x micro-batch {planned.micro_batch} x accumulation {planned.accumulation}",
            table(planned),
            *(
                f"activations of {name} are not counted: it offers no example_inputs, or takes too long"
                for name in planned.fit.uncounted
            ),
            *planned.notes,
            *_missing_here(cluster),
        ]
    )


def _missing_here(cluster: recipes.Cluster) -> list[str]:
    """What the cluster file asks for and this machine lacks; a dry run may be for other machines."""
    each = cluster.gpus_per_worker * -(-cluster.ranks // cluster.nodes)
    here = torch.cuda.device_count()
    if each <= here:
        return []
    return [
        f"training would end with code 4 on this machine: {cluster.name} asks for {each:g} GPUs per machine, this one has {here}"
    ]


def _workers(cluster: recipes.Cluster) -> str:
    if cluster.sequence_parallel == 1:
        return f"{cluster.ranks} workers"
    return f"{cluster.sharers} groups of {cluster.sequence_parallel} workers that share each sample"
