"""The bound in nats: against torch's distributions, against pythae, and against what is known of Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.interop.mlp_vae import PYTHAE
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.vae.mlp_vae import MLPVAE
from nexus_scale.objectives.likelihoods import Bernoulli, Gaussian, Likelihood, Logistic
from nexus_scale.objectives.variational import Variational, mutual_information
from tests.golden.pythae import BATCH, CASES, EPOCH, FILE, MODELS, SHAPES, drawn, pixels, projected

GOLDEN = np.load(FILE)


def batch_of(x: Tensor) -> Batch:
    return Batch({"image": x}, torch.arange(len(x)), torch.arange(len(x)))


def rng_of(count: int, step: int = 0) -> ProgressRng:
    return ProgressRng(0, step, "main", torch.arange(count), torch.device("cpu"))


class Noise(ProgressRng):
    """Draws the noise that it is given, under the name of the posterior."""

    given: Tensor

    def normal(self, name: str, shape: Any) -> Tensor:
        assert name == "posterior" and tuple(shape) == self.given.shape[1:]
        return self.given


# ------------------------------------------------------------------------------------------------- pythae


@pytest.mark.parametrize(("model", "loss", "shape"), CASES)
def test_losses_and_gradients_are_pythaes(model: str, loss: str, shape: str) -> None:
    """VAE, beta-VAE and its capacity with pythae's default networks, through the table by which they are exported."""
    (channels, size, _), latents = SHAPES[shape]
    values = channels * size**2
    theirs = {
        "encoder.layers.0.0": (512, values), "encoder.embedding": (latents, 512), "encoder.log_var": (latents, 512),
        "decoder.layers.0.0": (512, latents), "decoder.layers.1.0": (values, 512),
    }  # fmt: skip
    state = {
        f"{name}.{kind}": drawn(f"{name}.{kind}", s, 0.1)
        for name, (o, i) in theirs.items()
        for kind, s in (("weight", (o, i)), ("bias", (o,)))
    }
    arguments, ours = PYTHAE.to_ours(
        None, state, {"image_channels": channels, "image_size": size, "latent_size": latents, "hidden_sizes": (512,)}
    )
    net = MLPVAE(**arguments)
    net.load_state_dict(ours)
    settings: dict[str, Any] = {"beta": MODELS[model].get("beta", 1.0)}
    step = 0
    if "C" in MODELS[model]:  # C * epoch / (warm-up + 1) there, C * (step + 1) / steps here
        settings |= {"capacity": MODELS[model]["C"], "capacity_steps": MODELS[model]["warmup_epoch"] + 1}
        step = EPOCH - 1
    objective = Variational(latent_size=latents, likelihood={"bce": "bernoulli", "mse": "gaussian"}[loss], **settings)  # type: ignore[arg-type]
    rng = Noise(0, 0, "main", torch.arange(BATCH), torch.device("cpu"))
    rng.given = drawn(f"{shape} noise", (BATCH, latents))
    found = objective.loss("main", {"model": net}, batch_of(2 * pixels(shape, SHAPES[shape][0]) - 1), rng, step)
    constant = 0.0 if loss == "bce" else 0.5 * values * math.log(2 * math.pi)  # which pythae leaves out
    got = torch.stack([found.total - constant, found.metrics["reconstruction"] - constant, found.metrics["kl"]])
    golden = GOLDEN[f"{model}_{loss}_{shape}_losses"]
    np.testing.assert_allclose(got.detach().numpy(), golden, rtol=1e-5)
    found.total.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    projections = projected(PYTHAE.to_theirs(gradients, arguments)[1])
    golden = GOLDEN[f"{model}_{loss}_{shape}_gradients"]
    np.testing.assert_allclose(projections, golden, rtol=1e-4, atol=1e-5 * np.abs(golden).max())


# ------------------------------------------------------------------------------------------------- likelihoods


def test_likelihoods_are_torchs_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 3, 5, generator=generator, dtype=torch.float64)
    out = torch.randn(3, 4, 3, 5, generator=generator, dtype=torch.float64)
    mean, other = out.chunk(2, dim=1)
    distributions = torch.distributions
    floor = -6 + torch.log1p((other + 6).exp())
    cases: list[tuple[Likelihood, Tensor, Any]] = [
        (Bernoulli(binary=False), mean, distributions.Bernoulli(logits=mean, validate_args=False)),
        (Gaussian(0.3, dequantised=False), mean, distributions.Normal(mean.sigmoid(), 0.3)),
        (Gaussian(None, dequantised=False), out, distributions.Normal(mean.sigmoid(), floor.exp())),
    ]
    for likelihood, said, known in cases:
        torch.testing.assert_close(likelihood.log_prob(said, x), known.log_prob(x).flatten(1).sum(1))
        torch.testing.assert_close(likelihood.mean(said), mean.sigmoid())


def test_a_discretised_logistic_has_the_mass_of_its_bins_and_gradients_far_away() -> None:
    levels = (torch.arange(256).double() / 255).view(256, 1, 1, 1)
    for logit, log_scale in ((0.3, -3.0), (-4.0, -6.9), (9.0, -40.0)):
        out = (
            torch.tensor([logit, log_scale]).double().view(1, 2, 1, 1).expand(256, -1, -1, -1).clone().requires_grad_()
        )
        log_mass = Logistic().log_prob(out, levels)
        assert float(log_mass.exp().sum().detach()) == pytest.approx(1, abs=1e-9)
        log_mass.sum().backward()
        assert out.grad is not None and out.grad.isfinite().all() and (out.grad[:, 0].abs() > 0).any()
        scale = math.exp(-7 + math.log1p(math.exp(log_scale + 7)))
        edges = (
            (levels[1:-1].flatten() + torch.tensor([[-0.5], [0.5]]) / 255) - torch.tensor(logit).double().sigmoid()
        ) / scale
        below, above = edges.sigmoid()
        torch.testing.assert_close(log_mass[1:-1].exp(), above - below, atol=1e-12, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- bounds, schedules


class Linear(torch.nn.Module):
    """z ~ N(0, 1), x ~ N(sigmoid(z), std^2) of one pixel, with a Gaussian posterior that is wrong on purpose."""

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = 2 * x.flatten(1), torch.full((len(x), 1), 0.5)
        return self.decode(mean + (0.5 * logvar).exp() * eps), mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        return z.view(-1, 1, 1, 1)


def test_the_importance_bound_tightens_towards_the_likelihood() -> None:
    """log p(x) of one pixel by a sum over a fine grid of z."""
    x = torch.tensor([0.2, 0.5, 0.9]).repeat_interleave(200).view(-1, 1, 1, 1)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    log_joint = (
        torch.distributions.Normal(grid.sigmoid(), 0.1).log_prob(x.view(-1, 1).double())
        - grid.square() / 2
        - 0.5 * math.log(2 * math.pi)
    )
    exact = float(-(log_joint.logsumexp(1) + math.log(16 / 4000)).mean())
    found = []
    for samples in (1, 8, 256):
        objective = Variational(latent_size=1, likelihood="gaussian", std=0.1, importance_samples=samples)
        values = objective.validate({"model": Linear()}, batch_of(2 * x - 1), rng_of(len(x)))
        found.append(float(values["importance_nats"].mean()))
        assert float(values["nats"].mean()) > exact + 0.2
    assert found[0] > found[1] > found[2] > exact - 0.02 and found[2] == pytest.approx(exact, abs=0.05)


def test_weights_and_capacities_of_the_schedules() -> None:
    once = Variational(beta=4.0, kl_warmup_steps=4)
    assert [once.kl_weight_at(step) for step in (0, 1, 3, 4, 100)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    cyclic = Variational(kl_warmup_steps=2, kl_cycle_steps=4)
    assert [cyclic.kl_weight_at(step) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 0.5, 1.0]
    assert [Variational().kl_weight_at(step) for step in (0, 9)] == [1.0, 1.0]
    held = Variational(capacity=25.0, capacity_steps=5, beta=1000.0)
    assert [held.capacity_at(step) for step in (0, 4, 9)] == [5.0, 25.0, 25.0]


def test_free_bits_charge_no_less_than_the_floor_and_give_no_gradient_there() -> None:
    mean = torch.tensor([[0.1, 2.0]], requires_grad=True)
    logvar = torch.zeros(1, 2)
    kl, charged = Variational(latent_size=2, free_bits=0.5)._kl(mean, logvar)
    assert kl.item() == pytest.approx(0.005 + 2.0) and charged.item() == pytest.approx(0.5 + 2.0)
    charged.sum().backward()
    assert mean.grad is not None and mean.grad.tolist() == [[0.0, 2.0]]


def test_active_units_and_mutual_information_of_gaussians() -> None:
    """x ~ N(0, 1) and z | x ~ N(a x, 1 - a^2): I = -log(1 - a^2) / 2; a second unit that ignores x adds nothing."""
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 3000, generator=generator, dtype=torch.float64)
    a = 0.9
    mean = torch.stack([a * x, torch.zeros_like(x)], dim=1)
    logvar = torch.tensor([math.log(1 - a**2), 0.0]).double().expand(3000, 2)
    z = mean + (0.5 * logvar).exp() * torch.stack([eps, eps.flip(0)], dim=1)
    assert float(mutual_information(mean, logvar, z)) == pytest.approx(-0.5 * math.log(1 - a**2), abs=0.05)
    figures = Variational(latent_size=2).figures({"posterior": torch.cat([mean, logvar, z], dim=1)})
    assert float(figures["active_units"]) == 1
    sharp = torch.full_like(logvar, -60.0)
    assert float(mutual_information(mean, sharp, mean)) == pytest.approx(math.log(3000), abs=1e-6), "at most log N"


@pytest.mark.parametrize(
    "settings", [{"binarise": "drawn"}, {"likelihood": "gaussian", "dequantise": True}, {"likelihood": "logistic"}]
)
def test_bits_are_nats_per_value_of_pixels_on_levels(settings: dict[str, Any]) -> None:
    """A decoder that knows nothing: a fair coin, a density of about 1, all levels about alike."""
    numbers = 2 if settings.get("likelihood") == "logistic" else 1
    settings = {**settings, "std": 10.0} if "dequantise" in settings else settings
    net = MLPVAE(image_channels=3, image_size=4, latent_size=2, hidden_sizes=(8,), numbers=numbers)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    objective = Variational(latent_size=2, **settings)
    x = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    bits = objective.validate({"model": net}, batch_of(x), rng_of(64))["bits"]
    nats = {"drawn": math.log(2), "none": 0.5 * math.log(2 * math.pi) + math.log(10.0)}[
        settings.get("binarise", "none")
    ]
    known = nats / math.log(2) + (8 if "dequantise" in settings else 0)
    if numbers == 2:  # of a logistic of scale about 1 over [0, 1]: density about 1/4, and tails beyond
        assert 8 < float(bits.mean()) < 11
    else:
        torch.testing.assert_close(bits, torch.full_like(bits, known), rtol=1e-3, atol=0)
    assert torch.equal(
        bits,
        objective.likelihood({"model": net}, batch_of(x), rng_of(64), exact=False, tolerance=1e-5, earliest=0)[
            "bits"
        ].float(),
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latent_size": 0}, "latent_size: got 0"),
        ({"std": 0.0}, "std: got 0"),
        ({"kl_warmup_steps": 5, "kl_cycle_steps": 4}, "at least the 5 of kl_warmup_steps"),
        ({"capacity": 5.0}, "capacity 5.0, capacity_steps 0"),
        ({"capacity": 5.0, "capacity_steps": 9, "free_bits": 0.1}, "no free bits"),
        ({"binarise": "drawn", "likelihood": "logistic"}, "binarise: is for likelihood bernoulli"),
        ({"dequantise": True}, "dequantise: is for likelihood gaussian"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Variational(**settings)
    with pytest.raises(UserError, match="none of pixels on levels"):
        Variational().likelihood(
            {}, batch_of(torch.zeros(1, 1, 2, 2)), rng_of(1), exact=False, tolerance=1e-5, earliest=0
        )
