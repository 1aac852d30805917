"""SD3's way of combining the outputs of several text encoders."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import Cond, keep_on_host, on_both


class TextCondition(NamedTuple):
    """`text` (B, L, text_dim); `mask` (B, L), True at real tokens, None where all are; `pooled` (B, pooled_dim)."""

    text: Tensor
    mask: Tensor | None
    pooled: Tensor


def compose_text(cond: Cond, text_dim: int) -> TextCondition:
    """One text sequence and one pooled vector from up to three encoders.

    `text` and `text_2` (CLIP-L and CLIP-G) read the same tokens: they are joined on channels and zero-padded to
    `text_dim`. `text_3` (T5) follows along the sequence. Pooled texts, of the encoders that have one, are joined on channels.

    Args:
        cond: `text` (B, L, <= text_dim); optional `text_2` (B, L, ...), `text_3` (B, L3, <= text_dim); at least one of `pooled`,
            `pooled_2`, `pooled_3`, (B, P_i) each; masks `text_mask`, `text_2_mask`, `text_3_mask` (B, L) where tokens are padding.
    Returns:
        TextCondition; one encoder alone passes through untouched.
    Raises:
        ValueError: the channels of an encoder, or of the joined pair, exceed `text_dim`; the pair differs in length; no pooled text.
    Source: Esser et al. 2024, section 4 and figure 2.
    """
    text, mask = cond["text"], cond.get("text_mask")
    pools = [cond[name] for name in ("pooled", "pooled_2", "pooled_3") if name in cond]
    if not pools:
        raise ValueError(f"no pooled text among the conditions {sorted(cond)}; add `pooled` to objective.conditions")
    pooled = pools[0] if len(pools) == 1 else torch.cat(pools, dim=-1)
    if "text_2" in cond:
        second = cond["text_2"]
        if second.shape[1] != text.shape[1]:
            raise ValueError(
                f"text has {text.shape[1]} tokens and text_2 {second.shape[1]}; encoders joined on channels read the "
                "same tokens: give both one length, or pass the second as text_3"
            )
        text = torch.cat((text, second), dim=-1)
        second_mask = cond.get("text_2_mask")
        if mask is not None and second_mask is not None:
            mask = on_both(torch.bitwise_or, mask, second_mask)
        else:
            mask = None
    if "text_2" in cond or "text_3" in cond:
        text = _widen(text, text_dim, "text and text_2" if "text_2" in cond else "text")
    if "text_3" in cond:
        third, third_mask = _widen(cond["text_3"], text_dim, "text_3"), cond.get("text_3_mask")
        if mask is not None or third_mask is not None:
            mask = on_both(_joined, _mask_or_all(mask, text), _mask_or_all(third_mask, third))
        text = torch.cat((text, third.to(text.dtype)), dim=1)  # (B, L + L3, text_dim)
    return TextCondition(text, mask, pooled)


def _widen(text: Tensor, text_dim: int, name: str) -> Tensor:
    if text.shape[-1] > text_dim:
        raise ValueError(f"{name}: {text.shape[-1]} channels, the network takes text_dim = {text_dim}; raise text_dim")
    return F.pad(text, (0, text_dim - text.shape[-1]))


def _mask_or_all(mask: Tensor | None, text: Tensor) -> Tensor:
    return mask if mask is not None else all_true(tuple(text.shape[:2]), text.device)


def _joined(mask: Tensor, other: Tensor) -> Tensor:
    return torch.cat((mask, other), dim=1)


def all_true(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A mask that leaves nothing out, known to the host as well."""
    return keep_on_host(torch.ones(shape, dtype=torch.bool, device=device), torch.ones(shape, dtype=torch.bool))
