"""Textual inversion: tokens that a text encoder does not have, whose embeddings alone learn.

Source: Gal et al. 2022, "An image is worth one word".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Adapter, Network
from nexus_scale.models.layers.tokens import TokenTable


class NewTokens(Adapter):
    """Rows of a table of tokens, (n, D), that stand behind those which the encoder has.

    Attributes:
        begins_as: the number of a token of the encoder, whose embedding they begin with where `init_from` is the encoder's own folder.
    """

    def __init__(
        self,
        *,
        base: Callable[[], Network],
        count: Annotated[int, Field(ge=1, le=4096)] = 1,
        begins_as: Annotated[int, Field(ge=0)] | None = None,
    ):
        """
        Args:
            base: makes the text encoder; the program gives it.
            count: of new tokens.
            begins_as: of the encoder's tokens, the number of the one that they begin as; without it they begin at random.
        """
        super().__init__()
        with torch.device("meta"):
            made: Any = base()
        self.count, self.begins_as = count, begins_as
        self.table = TokenTable(count, int(made.token_embed.rows.shape[1]))
        self.attach(made)

    @property
    def rows(self) -> Tensor:
        """(n, D)."""
        return self.table.rows

    def attach(self, base: Network) -> None:
        there, here = int(base.get_parameter("token_embed.rows").shape[1]), self.rows.shape[1]
        if there != here:
            raise ValueError(f"embeddings of {here} numbers; the base has {there}")
        vars(self)["base"] = base  # not a part of this network

    def init_weights(self) -> None:
        """As the encoder's own table."""
        self.table.init_weights(std=0.02)

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def told(tokens: Tensor) -> Any:
            with self.at_work():
                return call(tokens, new_rows=self.table(torch.arange(self.count, device=tokens.device)))

        return told
