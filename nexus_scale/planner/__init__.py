"""Memory, speed and possible numbers of workers of a recipe, before a GPU is reserved."""

from nexus_scale.planner.activations import activations_per_sample, saved_bytes
from nexus_scale.planner.memory import GIB, memory_per_rank
from nexus_scale.planner.plan import Plan, divisors, largest_workers, micro_batches, plan, table

__all__ = [
    "GIB",
    "Plan",
    "activations_per_sample",
    "divisors",
    "largest_workers",
    "memory_per_rank",
    "micro_batches",
    "plan",
    "saved_bytes",
    "table",
]
