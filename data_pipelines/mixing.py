"""The split of samples into train and heldout, and the order in which sources are mixed: functions of the seed and the samples' names."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.shard_plan import keyed
from data_pipelines.sources import Source
from nexus_scale.contracts import UserError

log = logging.getLogger(__name__)


def split_groups(
    sources: Sequence[Source], *, seed: int, heldout: float, heldout_captions: int, by_label: bool
) -> dict[str, str]:
    """The split of each group, `train` or `heldout`. A group that occurs in several sources is one group.

    Raises:
        UserError: a label has too few groups to hold out `heldout_captions` captions.
    """
    strata: dict[Any, dict[str, set[str]]] = defaultdict(dict)
    home: dict[str, Any] = {}
    for source in sources:
        for entry in source.entries:
            # A group whose members differ in label follows its first member: a group is never split.
            stratum = home.setdefault(entry.group, entry.label if by_label else None)
            strata[stratum].setdefault(entry.group, set()).add(entry.caption)
    splits = dict.fromkeys(home, "train")
    for label, groups in strata.items():
        draws = {group: keyed(seed, "split", group) for group in groups}
        ranked = sorted(groups, key=lambda group, draws=draws: (draws[group], group))  # type: ignore[misc]
        below = sum(draw < heldout * 2.0**64 for draw in draws.values())
        wanted = round(heldout * len(ranked)) if by_label else below
        captions: set[str] = set()
        for place, group in enumerate(ranked):
            if place >= wanted and len(captions) >= heldout_captions:
                break
            if place >= wanted and 2 * place >= len(ranked):
                raise UserError(
                    f"ingest_images: holding {heldout_captions} captions of label {label!r} out would take more "
                    f"than half of its {len(ranked)} groups; lower heldout_captions.",
                    3,
                )
            splits[group] = "heldout"
            captions |= groups[group]
    if heldout > 0 and "heldout" not in splits.values():
        log.warning(
            "ingest_images: %d groups are too few to hold %g of them out",
            len(splits),
            heldout,
        )
    if "train" not in splits.values():
        raise UserError(f"ingest_images: all {len(splits)} groups would be held out; lower heldout ({heldout}).", 3)
    return splits


def interleave(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of a source and a place in it. At every point each source has given its share, to within one sample."""
    given = [0] * len(counts)
    for _ in range(sum(counts)):
        # The source furthest behind its share comes next.
        number = min(
            (n for n, count in enumerate(counts) if given[n] < count), key=lambda n: ((given[n] + 0.5) / counts[n], n)
        )
        yield number, given[number]
        given[number] += 1
