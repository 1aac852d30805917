"""What is raised where data are not what they should be."""

from __future__ import annotations

from nexus_scale.contracts import UserError


class DataError(UserError):
    """The data are not what their manifest says, or not what was asked for. Exit code 3."""

    def __init__(self, message: str, code: int = 3):
        super().__init__(message, code)


class StoreError(RuntimeError):
    """An object store that could not be reached or read, after all tries. It may be back soon, so a run that is supervised
    starts again: this is no UserError, upon which it would end, and no OSError, which would count as bad data."""
