"""What is raised where data are not what they should be."""

from __future__ import annotations

from nexus_scale.contracts import UserError


class DataError(UserError):
    """The data are not what their manifest says, or not what was asked for. Exit code 3."""

    def __init__(self, message: str, code: int = 3):
        super().__init__(message, code)
