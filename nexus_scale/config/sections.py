"""What all sections of recipes and cluster files are made of: their strictness, and the types that several share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""A name of a recipe, a run or a network; folders are named by it."""

MAX_STEPS = 10**12
MAX_WORKERS = 100_000


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Tokens = Annotated[int, Field(ge=1, le=10**7)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]
Named = Annotated[str, Field(pattern=NAME)]


class Component(BaseModel):
    """`{name: mmdit, depth: 28}`: a registered class and its constructor's arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
