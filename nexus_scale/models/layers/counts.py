"""Arguments of networks that count something."""

from __future__ import annotations

from collections.abc import Mapping

from nexus_scale.contracts import UserError


def check_counts(network: str, counts: Mapping[str, int], least: Mapping[str, int] | None = None) -> None:
    """Counts are at least 1, or what `least` says of them.

    Raises:
        UserError: names the network's argument.
    """
    for argument, count in counts.items():
        lowest = (least or {}).get(argument, 1)
        if count < lowest:
            raise UserError(f"{network}.{argument}: got {count}; it must be at least {lowest}")
