"""How a token is drawn from logits: which are cut off, and which one a uniform number chooses.

Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
"""

from __future__ import annotations

from torch import Tensor


def cut(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Logits (..., V) with -inf at tokens that are not among the `top_k` likeliest, or not needed for probability `top_p`; the
    likeliest one always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # total of the likelier tokens
        beyond = (before >= top_p).scatter(-1, places, before >= top_p)
        logits = logits.masked_fill(beyond, float("-inf"))
    return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative probability passes u: (..., V), (...) in [0, 1) -> (...). -inf is never drawn."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = u.double()[..., None] * cumulative[..., -1:]
    return (cumulative <= wanted).sum(-1)
