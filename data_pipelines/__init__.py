"""Jobs that make data: each file is one job, a recipe's `prepare:` names it, and it is a command too.

Every job has the same face:

    run(<options>, *, data_root, runs_root, progress=None)   does what is not done yet
    done(<options>, *, data_root, runs_root) -> bool         whether that would be nothing
    main(argv=None) -> int                                   `python data_pipelines/<job>.py --help`

Paths in the options are relative to `data_root`, names of runs to `runs_root`; absolute paths are taken as they are.
`progress(done, total)` is called as the work goes on.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from nexus_scale.contracts import UserError
from nexus_scale.registry import nearest

JOBS = ("ingest_images", "precompute_latents", "precompute_text", "rasterise_openmoji")


def load_job(name: str) -> ModuleType:
    """The module of the job `name`, with `run`, `done` and `main`.

    Raises:
        UserError: there is no such job; names the nearest.
    """
    if name not in JOBS:
        raise UserError(f"prepare: no job {name!r} in {Path(__file__).parent.name}/; {nearest(name, list(JOBS))}")
    return importlib.import_module(f"{__name__}.{name}")
