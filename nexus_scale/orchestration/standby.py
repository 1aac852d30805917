"""What a process that stands by for a worker does: it imports all that a worker has imported, and waits.

A restart on two cores is mostly imports. They are taken from a worker that runs, not from a list kept by hand.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)


def loaded_modules() -> list[str]:
    """What this process has imported from files, in the order of import."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name != "__main__" and getattr(getattr(module, "__spec__", None), "has_location", False)
    ]


def import_all(modules: Sequence[str]) -> list[str]:
    """Imports by name, in order; returns those that could not be. A worker that needs one of them will say so itself."""
    missed = []
    for name in modules:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception as error:  # a module's own code may raise anything
                logger.info("standby: %s was not imported: %r", name, error)
                missed.append(name)
    return missed


def missing(workers: Iterable[str], spares: Iterable[str]) -> list[str]:
    """Nodes of the spares to be started, so that each worker has one on its node; both are given by their nodes."""
    return sorted((Counter(workers) - Counter(spares)).elements())
