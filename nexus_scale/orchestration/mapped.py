"""A function of one row, over many rows, on Ray Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.data.errors import storage_error
from nexus_scale.io.durable import umask


class _Row:
    """The function, which returns a user's mistake as a value: Ray would try again what is raised, and print its traceback."""

    def __init__(self, function: Callable[[Mapping[str, Any]], int], folder: Path, mask: int):
        self.function, self.folder, self.mask = function, folder, mask

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        os.umask(self.mask)  # Ray's workers have the umask that Ray was started with
        try:
            try:
                return {"value": self.function(row), "error": "", "code": 0}
            except OSError as error:
                raise storage_error(error, self.folder) from error
        except UserError as error:
            return {"value": 0, "error": str(error), "code": error.code}


def map_rows(
    function: Callable[[Mapping[str, Any]], int],
    rows: Sequence[Mapping[str, Any]],
    *,
    folder: Path,
    workers: int | None = None,
) -> Iterator[int]:
    """`function(row)` of every row, in the order in which they end; one CPU for each.

    Args:
        function: at the top of a module, so that it can be sent. A task that dies with its node is done again on another.
        rows: JSON values by name; all rows have the same names.
        folder: where the function writes, for messages.
        workers: the most at once; None: as many as there are CPUs.
    Raises:
        UserError: what the function raised; code 6 where the folder is full or forbidden.
    """
    from nexus_scale.orchestration.cluster import connected

    mask = umask()
    with connected():
        import ray

        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with ray.data.DataContext.current(context):
            limit: dict[str, Any] = {} if workers is None else {"concurrency": workers}
            made = ray.data.from_items([dict(row) for row in rows], override_num_blocks=len(rows)).map(
                _Row(function, folder, mask).__call__, num_cpus=1, **limit
            )
            for row in made.iter_rows():
                if row["error"]:
                    raise UserError(str(row["error"]), int(row["code"]))
                yield int(row["value"])
