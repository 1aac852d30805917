"""Who gets which tests under `pytest -n 2`: Ray clusters never stand beside each other, and a process that dies takes one test with it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController


class RayApart(LoadScopeScheduling):  # type: ignore[misc]
    """All that starts Ray goes to one worker, one test after another; the others go file by file, for the sake of their fixtures.

    pytest-xdist 3.8 has `--dist loadgroup` for the first, which pytest 9.2 makes do nothing: it renames tests, whose names are
    fixed now. It also loses tests when a worker dies (its issues 1323, 1327, 1362 and 1378), and then waits for them without
    end: it hands out what the dead one had finished, as units of no test; it gives the new worker one test, which begins none
    before it knows the next; it repeats the test that killed the first; and it gives tests to workers that still collect or
    have just died.
    """

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # else files of many tests begin before Ray's, which take the longest

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return "ray" if test.partition("[")[0] in starting_ray(self.config.rootpath / file) else file

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        super().add_node_collection(node, collection)
        if node not in self.registered_collections:  # it would be given nothing, and the run would have no end
            raise RuntimeError(
                "files of tests changed while tests ran: a new process finds others than the one that died"
            )

    def remove_node(self, node: WorkerController) -> str | None:
        """The test that the worker died in, which is not repeated; what it had not begun is handed out, before all else."""
        left = {
            scope: waiting
            for scope, tests in self.assigned_work.pop(node).items()
            if (waiting := {test: done for test, done in tests.items() if not done})
        }
        if self.collection is None:  # it died before the tests were shared out: its successor is waited for
            self.registered_collections.pop(node, None)
        if not left:
            return None
        scope = next(iter(left))
        died_in = next(iter(left[scope]))
        del left[scope][died_in]
        for scope in reversed([scope for scope in left if left[scope]]):
            self.workqueue[scope] = left[scope]
            self.workqueue.move_to_end(scope, last=False)
        for other in self.nodes:
            self._reschedule(other)
        return died_in

    def _assign_work_unit(self, node: WorkerController) -> None:
        with contextlib.suppress(OSError):  # it died: this is told next, and what it was given goes to another
            super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        if node not in self.registered_collections:  # it has yet to collect
            return
        super()._reschedule(node)
        if not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            self._reschedule(node)


@functools.cache
def starting_ray(file: Path) -> set[str]:
    """The tests of a file that carry the mark `ray`, by its text: the process that shares them out imports none."""
    text = file.read_text()
    if re.search(r"^pytestmark = pytest\.mark\.ray$", text, re.MULTILINE):
        return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    return set(re.findall(r"^@pytest\.mark\.ray$.*?^def (\w+)", text, re.MULTILINE | re.DOTALL))
