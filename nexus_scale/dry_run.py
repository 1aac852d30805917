"""`--dry-run`: the figures of a recipe on a cluster, without starting it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import dump_yaml
from nexus_scale.engine.optim import moments_of
from nexus_scale.engine.settings import stays_whole
from nexus_scale.main_job import Target, check_data, parameters
from nexus_scale.planner.activations import activations_per_sample
from nexus_scale.planner.plan import plan, precision_of, table, workers_of
from nexus_scale.rehearsal.costs import costs
from nexus_scale.train import make_objective


def describe(target: Target) -> str:
    """The resolved recipe and cluster, parameters, FLOPs, batch arithmetic and memory per rank, as text."""
    recipe, cluster = target.recipe, target.cluster
    if recipe.data.synthetic is not None:
        check_data(target)  # made-up data need no job
    micro, accumulated = recipes.accumulation(recipe.global_batch, cluster.sharers, cluster.micro_batch)
    counts = parameters(recipe)
    trained = sum(counts[name] for name in recipe.trained())
    sizes = "\n".join(f"  {name}: {count:,} parameters ({count / 1e9:.2f} B)" for name, count in counts.items())
    activations, uncounted = activations_per_sample(
        recipe, precision=precision_of(cluster), checkpointing=cluster.activation_checkpointing
    )
    planned = plan(
        parameters=trained,
        forward_flops_per_sample=costs(recipe)["flops_per_sample"] / 3,
        global_batch=recipe.global_batch,
        cluster=cluster,
        steps=recipe.steps,
        moments=_moments(recipe, counts),
        averaged=sum(counts[average.average_of] for average in recipe.averages().values()),
        frozen_parameters=_only_computing(recipe, cluster, counts),
        activation_bytes_per_sample=activations,
    )
    return "\n".join(
        [
            "# recipe",
            dump_yaml(recipes.dump(recipe)).rstrip(),
            "# cluster",
            dump_yaml(recipes.dump(cluster)).rstrip(),
            "# networks",
            sizes,
            f"# on {cluster.name}: {_workers(cluster)} x micro-batch {micro} x accumulation {accumulated}",
            table(planned),
            *(
                f"activations of {name} are not counted: it offers no example_inputs, or takes too long"
                for name in uncounted
            ),
            *_encoders_beside(recipe),
            *_missing_here(cluster),
        ]
    )


def _moments(recipe: recipes.Recipe, counts: Mapping[str, int]) -> int:
    """Values that the optimizers keep, each network's by the kind that teaches it."""
    return sum(
        counts[name] * len(moments_of(entry.optimizer or recipe.optimizer)) for name, entry in recipe.trained().items()
    )


def _encoders_beside(recipe: recipes.Recipe) -> list[str]:
    """What the memory leaves out: encoders that read captions while training. Phonemes take no network."""
    if "text" not in recipe.data.on_the_fly:
        return []
    return ["memory of the text encoders (data.on_the_fly) is not counted: every worker holds its own, whole"]


def _only_computing(recipe: recipes.Recipe, cluster: recipes.Cluster, counts: Mapping[str, int]) -> int:
    """Parameters that each rank holds beside its part of what is trained: whole copies of replicated networks, frozen networks and
    averages that the objective calls, of large ones its part."""
    sharding = cluster.engine == "deepspeed" and cluster.max_workers > 0
    workers = workers_of(cluster, recipe.global_batch)
    copies = sum(counts[name] for name, entry in recipe.trained().items() if sharding and entry.engine == "replicated")
    computing = [(name, entry.engine) for name, entry in recipe.frozen().items()]
    if sharding or precision_of(cluster) != "float32":  # otherwise an average computes from its own memory
        needed = make_objective(recipe, None).needs
        of = [average.average_of for name, average in recipe.averages().items() if name in needed]
        computing += [(name, recipe.trained()[name].engine) for name in of]
    for name, engine in computing:
        sharded = sharding and not stays_whole(counts[name], engine == "sharded")
        copies += -(-counts[name] // workers) if sharded else counts[name]
    return copies


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
