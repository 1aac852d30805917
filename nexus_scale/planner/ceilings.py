"""How fast a card is: rates that `nexus bench gpu` measured on it, or else rates that are stated in ceilings.json, each with its source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nexus_scale.config.recipe import Cluster
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
"""Where results of `nexus bench gpu` are committed: gpu*.json."""


class Rate(NamedTuple):
    """A number with where it is from."""

    value: float
    origin: Literal["measured", "stated", "given"]
    source: str


@dataclass(frozen=True)
class Ceilings:
    """A card's rates, and those of what is between cards.

    Attributes:
        matmul: TFLOP/s. copy, nvlink, network: GB/s; of a link one direction, for each GPU.
        attention: TFLOP/s forward and backward by head dim and tokens; `attention_origin` says where they are from.
        shares, host: see ceilings.json.
    """

    card: str
    matmul: Rate
    copy: Rate
    nvlink: Rate
    network: Rate
    attention: Mapping[tuple[int, int], tuple[float, float]]
    attention_origin: Rate
    shares: Mapping[str, Rate]
    host: Mapping[str, Rate]
    optimizer_bytes: Rate

    def attention_rates(self, head_dim: int, tokens: int) -> tuple[float, float]:
        """FLOP/s forward and backward: those of the next larger head dim (or the largest), between lengths by their logarithm. A head dim
        that no kernel is made for is padded: so much less of the work is useful."""
        dims = sorted({dim for dim, _ in self.attention})
        dim = next((one for one in dims if one >= head_dim), dims[-1])
        useful = 1.0 if head_dim > dim else head_dim / _padded(head_dim)
        lengths = sorted(length for one, length in self.attention if one == dim)
        low = max((length for length in lengths if length <= tokens), default=lengths[0])
        high = min((length for length in lengths if length >= tokens), default=lengths[-1])
        part = 0.0 if high == low else math.log(tokens / low) / math.log(high / low)
        rates = (self.attention[dim, low], self.attention[dim, high])
        forward, backward = ((1 - part) * rates[0][i] + part * rates[1][i] for i in range(2))
        short = min(1.0, tokens / lengths[0])
        return useful * short * forward * 1e12, useful * short * backward * 1e12

    def rates(self) -> dict[str, Rate]:
        """All rates by name, for people."""
        named = {
            "matrix products, TFLOP/s": self.matmul,
            "copies, GB/s": self.copy,
            "attention, TFLOP/s": self.attention_origin,
            "between GPUs of a node, GB/s": self.nvlink,
            "between nodes, GB/s for each GPU": self.network,
            "optimizer, bytes a parameter": self.optimizer_bytes,
        }
        return named | {f"{name}, part": rate for name, rate in self.shares.items()} | dict(self.host)


def _padded(head_dim: int) -> int:
    """What attention kernels round a head dim up to: multiples of 32 (FlashAttention 2 and 3, cuDNN)."""
    return -(-head_dim // 32) * 32


@cache
def _stated() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Path(__file__).with_name("ceilings.json").read_text(encoding="utf-8"))
    return read


def card_of(cluster: Cluster) -> str | None:
    """The card's name in ceilings.json: that of the cluster file.

    Raises:
        UserError: the file names a card that is not known.
    """
    if not cluster.gpus_per_worker or cluster.gpu is None:
        return None
    known = list(_stated()["cards"])
    if cluster.gpu not in known:
        raise UserError(f"{cluster.name}: gpu {cluster.gpu!r}; {nearest(cluster.gpu, known)}")
    return cluster.gpu


def measured_rates(card: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest result of `nexus bench gpu` on such a card: `ceilings`, `date`, `card`; None where there is none."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("gpu*.json"))]
    of_card = [one for one in found if card in one.get("card", "") and not one.get("tiny") and one.get("ceilings")]
    return max(of_card, key=lambda one: str(one.get("date", "")), default=None)


def ceilings_of(cluster: Cluster, folder: Path = RESULTS) -> Ceilings | None:
    """The rates of a cluster's cards and links; None where its file names no card."""
    card = card_of(cluster)
    if card is None:
        return None
    stated = _stated()
    own = {name: Rate(value, "stated", source) for name, (value, source) in _numbers(stated["cards"][card])}
    shares = {name: Rate(value, "stated", source) for name, (value, source) in stated["shares"].items()}
    table = stated["attention"][stated["cards"][card]["attention"]]
    attention, origin = _attention(table["rows"]), Rate(0, "stated", table["source"])
    if (result := measured_rates(card, folder)) is not None:
        said = f"nexus bench gpu on {result['card']}, {result.get('date')}"
        for name in ("matmul_tflops", "copy_gb_per_second"):
            if name in result["ceilings"]:
                own[name] = Rate(result["ceilings"][name], "measured", said)
        updates = [row["gb_per_second"] for row in result.get("rows", ()) if row["row"] == "optimizer" and "ms" in row]
        if updates:
            shares["optimizer"] = Rate(max(updates) / own["copy_gb_per_second"].value, "measured", said)
        if result["ceilings"].get("attention"):
            attention, origin = _attention(result["ceilings"]["attention"]), Rate(0, "measured", said)
    for name, given in (("nvlink", cluster.node_link_gb_per_second), ("network", cluster.network_gb_per_second)):
        if given is not None:
            own[f"{name}_gb_per_second"] = Rate(given, "given", f"{cluster.name}'s file")
    return Ceilings(
        card=card,
        matmul=own["matmul_tflops"],
        copy=own["copy_gb_per_second"],
        nvlink=own["nvlink_gb_per_second"],
        network=own["network_gb_per_second"],
        attention=attention,
        attention_origin=origin,
        shares=shares,
        host={name: Rate(value, "stated", source) for name, (value, source) in stated["host"].items()},
        optimizer_bytes=Rate(stated["optimizer_bytes"][0], "stated", stated["optimizer_bytes"][1]),
    )


def _numbers(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in card.items() if isinstance(value, list)]


def _attention(rows: Sequence[Mapping[str, float]]) -> dict[tuple[int, int], tuple[float, float]]:
    """TFLOP/s forward and backward, by head dim and tokens. Results give forward and both; the backward pass is 2.5 of the 3.5."""
    found = {}
    for row in rows:
        forward = row["forward_tflops"]
        backward = (
            row["backward_tflops"] if "backward_tflops" in row else 2.5 / (3.5 / row["both_tflops"] - 1 / forward)
        )
        found[int(row["head_dim"]), int(row["tokens"])] = forward, backward
    return found
