"""Memory, speed and possible numbers of workers of a recipe, before a GPU is reserved."""

from nexus_scale.planner.activations import activations_of, kept
from nexus_scale.planner.fitting import Fit, Fitting, candidates, largest_micro_batch
from nexus_scale.planner.memory import GIB, memory_per_rank
from nexus_scale.planner.plan import Plan, divisors, largest_workers, micro_batches, plan, table

__all__ = [
    "GIB",
    "Fit",
    "Fitting",
    "Plan",
    "activations_of",
    "candidates",
    "divisors",
    "kept",
    "largest_micro_batch",
    "largest_workers",
    "memory_per_rank",
    "micro_batches",
    "plan",
    "table",
]
