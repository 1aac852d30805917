"""Spare processes import what a worker has imported, and wait: a restart on two cores is mostly imports.

The list is taken from a running worker, not kept by hand.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)


def loaded_modules() -> list[str]:
    """Modules that this process has imported from files, in the order of import."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name != "__main__" and getattr(getattr(module, "__spec__", None), "has_location", False)
    ]


def import_all(modules: Sequence[str]) -> list[str]:
    """Imports modules in order, and returns those that fail. A worker that needs one of them will say so itself."""
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
    """The nodes on which spares are to be started, so that each worker has one on its node."""
    return sorted((Counter(workers) - Counter(spares)).elements())
