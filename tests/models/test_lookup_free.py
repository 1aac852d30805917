"""Look-up-free quantisation: codes are signs, entropies are those of 2^D chances, and both are lucidrains' LFQ's."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.models.layers.lookup_free import LookupFreeQuantizer, entropy_penalty

# vector-quantize-pytorch 1.32.0: LFQ(codebook_size=16, dim=4)(Z[None], inv_temperature=2.0) and the gradient of its two entropies
Z = [[0.31, -0.12, 0.05, -0.4], [-0.02, 0.2, -0.33, 0.11], [0.01, -0.25, 0.15, 0.09]]
CODES, SURE, USED = [10, 5, 11], 1.9747629165649414, 2.5800540447235107
SLOPES = [
    [-0.24083587527275085, 0.09186577796936035, -0.09205427020788193, 0.2605245113372803],
    [0.18876194953918457, -0.42491117119789124, 0.2571181058883667, -0.2708112299442291],
    [0.2764875590801239, 0.29234710335731506, -0.40188759565353394, -0.5110368132591248],
]


def test_codes_entropies_and_gradients_are_theirs() -> None:
    z = torch.tensor(Z).T[None].requires_grad_()  # (1, D, N)
    found = LookupFreeQuantizer(bits=4, temperature=0.5)(z)
    assert found.codes.tolist() == [CODES] and found.latents.tolist() == [torch.tensor(Z).sign().T.tolist()]
    # theirs adds 1e-5 to chances before it takes their logarithms
    assert float(found.sure) == pytest.approx(SURE, abs=3e-4) and float(found.used) == pytest.approx(USED, abs=3e-4)
    (slopes,) = torch.autograd.grad(entropy_penalty(found, 1.0).sum(), z)
    torch.testing.assert_close(slopes[0].T, torch.tensor(SLOPES), rtol=1e-3, atol=5e-4)


def test_codes_come_back_of_images_and_clips_of_any_number_of_bits() -> None:
    for bits, places in ((1, (3,)), (5, (2, 3)), (18, (2, 2, 3))):
        quantizer = LookupFreeQuantizer(bits=bits)
        z = torch.randn(2, bits, *places, requires_grad=True)
        found = quantizer(z)
        assert found.codes.shape == (2, *places) and 0 <= int(found.codes.min()) <= int(found.codes.max()) < 2**bits
        assert torch.equal(quantizer.decode(found.codes), found.latents) and torch.equal(
            quantizer.encode(z), found.codes
        )
        assert torch.equal(quantizer.encode(quantizer.decode(found.codes)), found.codes)
        (through,) = torch.autograd.grad(found.latents.sum(), z)
        assert torch.equal(through, torch.ones_like(z)), "straight through"
        alone = quantizer(z[1:])
        assert all(torch.allclose(a[1:], b) for a, b in zip(found, alone, strict=True)), "whatever the company"


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0, 1e4])
def test_entropies_of_codes_that_are_sure_have_finite_gradients(size: float) -> None:
    """At the public temperature nearly all are: their chances are 0 or 1 in float32."""
    z = (size * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (slopes,) = torch.autograd.grad(entropy_penalty(LookupFreeQuantizer(bits=6)(z), 0.1).sum(), z)
    assert bool(slopes.isfinite().all()) and (size > 1 or bool(slopes.any()))


def test_entropies_are_largest_where_all_codes_are_used_and_groups_bound_them() -> None:
    """Of all 16 codes, one a place: the mean is uniform. Groups see no more than their own bits."""
    quantizer = LookupFreeQuantizer(bits=4)
    every = quantizer.decode(torch.arange(16)[None])
    assert float(quantizer(every).used) == pytest.approx(4 * math.log(2)) and float(
        quantizer(every).sure
    ) == pytest.approx(0)
    two = quantizer.decode(torch.tensor([[0, 15]]))
    halves = LookupFreeQuantizer(bits=4, group_bits=2)
    assert float(quantizer(two).used) == pytest.approx(math.log(2))
    assert float(halves(two).used) == pytest.approx(2 * math.log(2))
    assert LookupFreeQuantizer(bits=18).group_bits == 9 and LookupFreeQuantizer(bits=18).codebook_size == 262144
    for arguments, words in (
        ({"bits": 18, "group_bits": 4}, "got 4 of 18"),
        ({"bits": 4, "temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(UserError, match=words):
            LookupFreeQuantizer(**arguments)
