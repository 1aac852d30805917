"""Autoencoders whose latents are codes: VQ-VAE's book against pythae's, finite scalar quantisation against lucidrains'."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.models.audio.quantization import ResidualQuantizer
from nexus_scale.models.layers.fsq import FSQ
from nexus_scale.models.vae.fsq_vae import FSQVAE
from nexus_scale.models.vae.vq_vae import VQVAE
from nexus_scale.objectives.discrete_autoencoder import DiscreteAutoencoder
from tests.golden.pythae import BOOK, COMMITMENT, DECAY, ENTRIES, FILE, LEVELS, PLACES, drawn

GOLDEN = np.load(FILE)


class Seen(NamedTuple):
    latents: Tensor
    codes: Tensor
    positions: Tensor


def as_in_golden(name: str, got: Tensor, rtol: float = 1e-5) -> None:
    known = GOLDEN[name]
    np.testing.assert_allclose(got.detach().numpy(), known, rtol=rtol, atol=1e-6 * np.abs(known).max())


def test_a_step_of_the_book_is_pythaes() -> None:
    """Entries, codes, commitment, the gradient straight through, and the book after a step of its averages."""
    quantizer = ResidualQuantizer(
        num_codebooks=1, codebook_size=ENTRIES, dim=BOOK[1], decay=DECAY, dead_below=0.0, kmeans_iterations=0
    )
    book, size = drawn("book", BOOK), drawn("sizes", (ENTRIES,)).abs() + 1
    quantizer.codebooks[0], quantizer.cluster_size[0], quantizer.cluster_sum[0] = book, size, book * size[:, None]
    quantizer.initialised.fill_(1)
    z = drawn("places", PLACES).requires_grad_()
    latents, codes, commitment = quantizer(z.flatten(2))
    as_in_golden("vq_latents", latents.view(PLACES))
    assert np.array_equal(codes.view(PLACES[0], *PLACES[2:]).numpy(), GOLDEN["vq_codes"])
    loss = COMMITMENT * commitment.mean()
    as_in_golden("vq_loss", loss)
    ((latents.view(PLACES) * drawn("onto places", PLACES)).sum() + loss).backward()
    assert z.grad is not None
    as_in_golden("vq_gradient", z.grad)
    seen = Seen(z.detach().flatten(2), codes, torch.arange(PLACES[0]))
    quantizer.follow([seen], lambda value: value, torch.Generator())
    as_in_golden("vq_after", quantizer.codebooks[0])


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_finite_scalar_quantisation_is_lucidrains(levels: tuple[int, ...]) -> None:
    z = drawn(f"fsq {levels}", (2, len(levels), 3, 5), 2.0).requires_grad_()
    fsq, key = FSQ(levels), "fsq_" + "_".join(map(str, levels))
    latents, codes, commitment = fsq(z.flatten(2))
    as_in_golden(f"{key}_latents", latents.view(z.shape))
    assert np.array_equal(codes.view(2, 3, 5).numpy(), GOLDEN[f"{key}_codes"]) and not commitment.any()
    (latents.view(z.shape) * drawn(f"fsq {levels} onto", z.shape)).sum().backward()
    assert z.grad is not None
    as_in_golden(f"{key}_gradient", z.grad)
    every = torch.arange(fsq.codebook_size).view(1, -1, 1)
    entries = fsq.decode(every)
    assert len(torch.unique(entries[0].T, dim=0)) == fsq.codebook_size
    assert torch.equal(fsq.decode(codes), latents.detach()), "codes and latents are each other's"


def test_the_perplexity_of_levels_counts_codes_of_all_ranks() -> None:
    fsq = FSQ((3, 3))
    seen = [Seen(torch.empty(0), torch.tensor([[[0], [0], [8]]]), torch.arange(1))]
    other = torch.zeros(9).double()
    other[4] = 3
    found = fsq.follow(seen, lambda value: value + other, torch.Generator())["perplexity"]
    shares = torch.tensor([2, 1, 3]) / 6
    torch.testing.assert_close(found, (-(shares * shares.log()).sum()).exp().double())


SIZES: dict[str, Any] = {"image_size": 8, "hidden_size": 6, "residual_size": 4, "depth": 1}


@pytest.mark.parametrize("net", [VQVAE(latent_channels=3, codebook_size=5, **SIZES), FSQVAE(levels=(5, 3), **SIZES)])
def test_images_of_any_size_are_coded_and_decoded(net: VQVAE | FSQVAE) -> None:
    torch.manual_seed(0)
    net.init_weights()
    if isinstance(net, VQVAE):
        net.quantizer.codebooks.normal_()
        net.quantizer.initialised.fill_(1)
    x = torch.randn(2, 3, 12, 8)
    coded, codes = net(x), net.encode(x)
    assert coded.x_hat.shape == x.shape and codes.shape == (2, 3, 2) and int(codes.max()) < net.codebook_size
    torch.testing.assert_close(net.decode(codes), coded.x_hat)
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        net(torch.randn(1, 3, 10, 8))


def test_a_vq_vae_has_the_papers_sizes() -> None:
    with torch.device("meta"):
        net = VQVAE()
    assert net.example_inputs(1, 0, "meta")[0].shape == (1, 3, 128, 128) and net.codebook_size == 512
    assert net(net.example_inputs(1, 0, "meta")[0]).codes.shape == (1, 32 * 32, 1)
    assert FSQ((8, 5, 5, 5)).codebook_size == 1000


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VQVAE(image_size=30), "image_size: got 30; 2 stages need a multiple of 2^2"),
        (lambda: VQVAE(codebook_size=1), "got codebook_size 1"),
        (lambda: VQVAE(hidden_size=1), "hidden_size: got 1; it must be at least 2"),
        (lambda: FSQVAE(levels=(8, 2)), "expected at least 3 of each number"),
        (lambda: DiscreteAutoencoder(data_variance=0.0), "data_variance 0.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make()
