"""Look-up-free quantisation: a latent's signs are its code, so that a codebook of 2^D entries needs no table and no search.

Source: Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2), section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError

LARGEST_GROUP = 16
"""Bits at most of which all 2^bits chances are held at once."""


class LookedUp(NamedTuple):
    """What a latent becomes.

    Attributes:
        latents: (B, D, ...) of -1 and 1, with the gradient of what came in.
        codes: (B, ...) int64 in [0, 2^D).
        sure: (B,), mean entropy of a latent's code in nats, which training lowers.
        used: (B,), entropy of the mean of a sample's codes, which it raises.
        commitment: (B,), mean squared distance of latents from what they are quantised to.
    """

    latents: Tensor
    codes: Tensor
    sure: Tensor
    used: Tensor
    commitment: Tensor


class LookupFreeQuantizer(nn.Module):
    """Quantises D channels to D bits, the first the most significant.

    Entropies are of softened codes, of which entry c has a chance in proportion to exp(2 z . c / temperature): D independent bits. The
    entropy of the mean is taken over a sample's own places, so that a sample's result depends on no other; and by groups of bits, whose sum
    bounds that of all of them from above, since 2^18 chances a place are too many.

    Args:
        bits: D.
        temperature: of softened codes; the public implementations have 0.01.
        group_bits: bits of a group, which must divide D; None: D, up to 16.
    Raises:
        UserError: groups that do not fit.
    """

    def __init__(self, *, bits: int, temperature: float = 0.01, group_bits: int | None = None):
        super().__init__()
        groups = (bits if bits <= LARGEST_GROUP else _largest_divisor(bits)) if group_bits is None else group_bits
        if bits < 1 or groups < 1 or bits % groups or groups > LARGEST_GROUP:
            raise UserError(
                f"group_bits: got {group_bits} of {bits} bits; expected a divisor of them, at most {LARGEST_GROUP}"
            )
        if temperature <= 0:
            raise UserError(f"temperature: got {temperature}; expected above 0")
        self.bits, self.temperature, self.group_bits = bits, temperature, groups

    @property
    def codebook_size(self) -> int:
        return 1 << self.bits

    def forward(self, z: Tensor) -> LookedUp:
        """z (B, D, ...), whatever axes of place follow."""
        z = z.float()
        signs = torch.where(z > 0, 1.0, -1.0)
        commitment = (z - signs).square().flatten(1).mean(1)
        odds = (4 * z / self.temperature).flatten(2).transpose(1, 2)  # (B, N, D), logits of 1
        # of logits and not of chances, which are 0 or 1 for most, where the entropy's derivative is infinite
        sure = -(odds.sigmoid() * F.logsigmoid(odds) + (-odds).sigmoid() * F.logsigmoid(-odds)).sum(2).mean(1)
        return LookedUp(signs + (z - z.detach()), self.encode(z), sure, self._used(odds), commitment)

    def _used(self, odds: Tensor) -> Tensor:
        """Entropy of the mean code of each sample, (B,), from logits of its bits, (B, N, D); summed over groups."""
        bits = torch.arange(self.group_bits, device=odds.device)
        entries = (torch.arange(1 << self.group_bits, device=odds.device)[:, None] >> bits.flip(0)) & 1  # (V, G)
        total = odds.new_zeros(len(odds))
        for group in odds.split(self.group_bits, dim=2):  # (B, N, G)
            # log chances of entries: a sum over bits, as a product of matrices
            chances = F.logsigmoid(group) @ entries.T.float() + F.logsigmoid(-group) @ (1 - entries.T.float())
            total = total + torch.special.entr(chances.exp().mean(1).clamp_min(1e-30)).sum(1)  # (B, N, V) -> (B,)
        return total

    def encode(self, z: Tensor) -> Tensor:
        """z (B, D, ...) -> codes (B, ...) int64."""
        return ((z > 0).long() * self._weights(z)).sum(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, ...) -> latents (B, D, ...) of -1 and 1."""
        shifts = torch.arange(self.bits - 1, -1, -1, device=codes.device).view(1, -1, *[1] * (codes.ndim - 1))
        return ((codes[:, None] >> shifts) & 1).float() * 2 - 1

    def _weights(self, z: Tensor) -> Tensor:
        powers = 1 << torch.arange(self.bits - 1, -1, -1, device=z.device)
        return powers.view(1, -1, *[1] * (z.ndim - 2))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, temperature={self.temperature}, group_bits={self.group_bits}"


def entropy_penalty(found: LookedUp, weight: float, used_weight: float = 1.0) -> Tensor:
    """What is minimised, (B,): weight * (sure - used_weight * used).

    Source: MAGVIT-v2, equation 5.
    """
    return weight * (found.sure - used_weight * found.used)


def _largest_divisor(bits: int) -> int:
    return max(group for group in range(1, LARGEST_GROUP + 1) if bits % group == 0)
