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


def halved(network: str, image_size: int, depth: int, of: str = "depth") -> int:
    """Height and width of images after so many halvings, which the network's argument `of` says.

    Raises:
        UserError: they do not stay whole; names the network's argument.
    """
    if depth >= (most := image_size.bit_length()):  # before 2**depth, whose digits may fill the memory
        raise UserError(
            f"{network}.{of}: got {depth} halvings; {image_size} pixels are halved at most {most - 1} times"
        )
    if image_size % 2**depth:
        raise UserError(f"{network}.image_size: got {image_size}; {depth} halvings need a multiple of {2**depth}")
    return image_size // 2**depth
