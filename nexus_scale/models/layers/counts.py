"""Checks of network arguments that are counts."""

from __future__ import annotations

from collections.abc import Mapping

from nexus_scale.contracts import UserError


def check_counts(network: str, counts: Mapping[str, int], least: Mapping[str, int] | None = None) -> None:
    """Checks that counts are at least 1, or at least their value in `least`.

    Raises:
        UserError: names the network's argument.
    """
    for argument, count in counts.items():
        lowest = (least or {}).get(argument, 1)
        if count < lowest:
            raise UserError(f"{network}.{argument}: got {count}; it must be at least {lowest}")
