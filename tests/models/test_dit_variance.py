"""Reverse steps, the variational term and ancestral sampling, against closed forms and diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.chains import DDPMLinear
from nexus_scale.processes.gaussian import add_noise, recover
from nexus_scale.processes.guidance import guide_batched
from nexus_scale.processes.paths import RectifiedFlow, VPCosine
from nexus_scale.processes.reverse import (
    byte_log_likelihood,
    learned_log_variance,
    normal_kl,
    reverse,
    step_before,
    variational_term,
)
from nexus_scale.processes.times import Discrete, spaced_times
from nexus_scale.samplers.ancestral import Ancestral

PATH = DDPMLinear()
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
BARS = (1 - BETAS).cumprod(0)


def at(step: int) -> Tensor:
    """The time of DDPM's step, as float32 holds it."""
    return torch.tensor([(step + 1) / 1000])


# ---------------------------------------------------------------------------------------------- reverse steps


@pytest.mark.parametrize("step", [1, 2, 500, 999])
def test_a_reverse_step_is_ddpms(step: int) -> None:
    """Equations 6 and 7 of Ho et al. on their own tables."""
    bar, before, beta = BARS[step], BARS[step - 1], BETAS[step]
    made = reverse(PATH, step_before(at(step), 1000), at(step))
    for got, expected in (
        (made.to_x0, before.sqrt() * beta / (1 - bar)),
        (made.to_x_t, (1 - beta).sqrt() * (1 - before) / (1 - bar)),
        (made.log_small, (beta * (1 - before) / (1 - bar)).log()),
        (made.log_large, beta.log()),
    ):
        assert float(got) == pytest.approx(float(expected), rel=2e-5)


@pytest.mark.parametrize("path", [PATH, VPCosine(), RectifiedFlow()], ids=lambda path: type(path).__name__)
def test_two_steps_of_the_posterior_compose(path: Any) -> None:
    """q(x_r | x_t, x0) is q(x_r | x_s, x0) averaged over q(x_s | x_t, x0): holds on every path, from pure noise on."""
    r, s, t = torch.tensor([0.2]), torch.tensor([0.7]), torch.tensor([1.0])
    first, second, both = reverse(path, s, t), reverse(path, r, s), reverse(path, r, t)
    torch.testing.assert_close(both.to_x_t, second.to_x_t * first.to_x_t, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(both.to_x0, second.to_x0 + second.to_x_t * first.to_x0, rtol=1e-5, atol=0)
    variance = second.log_small.exp() + second.to_x_t.square() * first.log_small.exp()
    torch.testing.assert_close(both.log_small.exp(), variance, rtol=1e-5, atol=0)


def test_the_last_step_ends_at_x0_and_whole_steps_stay_whole() -> None:
    assert torch.equal(step_before(at(0), 1000), torch.zeros(1, dtype=torch.float64))
    step = torch.arange(1000)
    assert torch.equal(step_before((step + 1).float() / 1000, 1000), step.double() / 1000)
    made = reverse(PATH, torch.zeros(1), at(0))
    assert made.to_x0 == 1 and made.to_x_t == 0 and made.log_small == -math.inf


def test_discrete_times_are_the_steps_alike() -> None:
    rng = ProgressRng(0, 0, "main", torch.arange(20000))
    steps = Discrete().sample(rng) * 1000
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    counts = torch.bincount(steps.round().long(), minlength=1001)
    assert counts[0] == 0 and counts[1:].min() >= 4 and counts.max() <= 45  # 20 each, give or take
    assert Discrete(steps=4).quantile(torch.tensor([0.0, 0.24, 0.26, 0.999])).tolist() == [0.25, 0.25, 0.5, 1.0]


# ---------------------------------------------------------------------------------------- the variational term


def test_kl_and_byte_likelihood_are_torchs() -> None:
    mean, other, logvar, other_logvar = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(other, (other_logvar / 2).exp())
    )
    torch.testing.assert_close(normal_kl(mean, logvar, other, other_logvar), expected)

    values = (torch.arange(256).double() / 127.5 - 1)[:, None]  # (256, 1)
    mean, logvar = torch.tensor([-1.2, -0.3, 0.9]).double(), torch.tensor([-4.0, -2.0, 0.5]).double()
    log_p = byte_log_likelihood(values, mean, logvar)
    torch.testing.assert_close(
        log_p.exp().sum(0), torch.ones(3).double(), atol=1e-8, rtol=0
    )  # each value has its share
    cdf = normal(mean, (logvar / 2).exp()).cdf
    inside = (cdf(values[100] + 1 / 255) - cdf(values[100] - 1 / 255)).clamp_min(1e-12)
    torch.testing.assert_close(log_p[100], inside.log())


def improved_ddpm_term(step: int, x0: Tensor, x_t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """The term as Improved DDPM writes it, on tables over the steps, in bits per value (B,)."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), BARS[:-1]])
    posterior = BETAS * (1 - before) / (1 - BARS)
    log_clipped = torch.cat([posterior[1:2], posterior[1:]]).log()
    share = (v + 1) / 2
    log_variance = share * BETAS[step].log() + (1 - share) * log_clipped[step]
    x0_hat = (1 / BARS[step]).sqrt() * x_t - (1 / BARS[step] - 1).sqrt() * eps

    def mean(x: Tensor) -> Tensor:
        a = BETAS[step] * before[step].sqrt() / (1 - BARS[step])
        return a * x + (1 - before[step]) * (1 - BETAS[step]).sqrt() / (1 - BARS[step]) * x_t

    if step:
        nats = 0.5 * (
            log_variance - log_clipped[step] - 1 + (log_clipped[step] - log_variance).exp()
            + (mean(x0) - mean(x0_hat)) ** 2 * (-log_variance).exp()
        )  # fmt: skip
    else:
        normal = torch.distributions.Normal(mean(x0_hat), (log_variance / 2).exp())
        above = torch.where(x0 > 0.999, torch.ones_like(x0), normal.cdf(x0 + 1 / 255))
        below = torch.where(x0 < -0.999, torch.zeros_like(x0), normal.cdf(x0 - 1 / 255))
        nats = -(above - below).clamp_min(1e-12).log()
    return nats.flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("step", [0, 1, 40, 999])
def test_the_term_is_improved_ddpms(step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x0 = (torch.randint(0, 256, (3, 2, 4, 4), generator=generator) / 127.5 - 1).double()
    noise, eps, v = torch.randn(3, *x0.shape, generator=generator).double()
    eps = noise + 0.1 * eps  # a prediction that is not far off
    t = at(step).expand(3)
    x_t = add_noise(PATH, x0, noise, t)
    x0_hat, _ = recover(x_t, eps, "eps", PATH, t)
    got = variational_term(PATH, 1000, x0, x_t, x0_hat, v, t)
    expected = improved_ddpm_term(step, x0, x_t, eps, v)
    assert (expected > 0).all()
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-6)


def test_the_term_is_least_where_the_variance_is_that_of_the_error() -> None:
    """With the true x0, the small variance is the best: the KL is zero there and rises with v."""
    x0 = torch.randn(2, 3, 4, 4)
    t = at(2).expand(2)  # near the data, where the bounds lie far apart
    x_t = add_noise(PATH, x0, torch.randn_like(x0), t)
    terms = [
        float(variational_term(PATH, 1000, x0, x_t, x0, torch.full_like(x0, v), t).mean()) for v in (-1.0, -0.5, 1.0)
    ]
    assert terms[0] == pytest.approx(0, abs=1e-6) and terms[0] < terms[1] < terms[2]


# ------------------------------------------------------------------------------------------- the objective


class Halves(torch.nn.Module):
    """Answers a learnt multiple of its input in the first half of the channels, and of one in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(0.9)), torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.cat([self.a * x, self.b.expand_as(x)], 1)


def objective(**changes: Any) -> Denoising:
    given: dict[str, Any] = {
        "path": "ddpm_linear", "target": "eps", "times": "discrete", "conditions": ("label",), "input": "image",
        "variance": "learned",
    }  # fmt: skip
    return Denoising(**(given | changes))


def images(count: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    positions = torch.arange(count)
    return Batch({"image": pixels, "label": positions % 10}, positions=positions, samples=positions)


def test_the_loss_is_the_error_and_the_term_which_teaches_the_variance_alone() -> None:
    batch, rng, net = images(), ProgressRng(0, 0, "main", torch.arange(32)), Halves()
    loss = objective().loss("main", {"model": net}, batch, rng, 0)
    mse, bits = loss.metrics["mse"], loss.metrics["bits"]
    assert isinstance(mse, Tensor) and isinstance(bits, Tensor)
    torch.testing.assert_close(loss.total, mse + bits)
    half = objective(variational_weight=0.5).loss("main", {"model": net}, batch, rng, 0)
    torch.testing.assert_close(half.total, mse + 0.5 * bits)

    plain = objective(variance="fixed").loss("main", {"model": lambda *args: net(*args)[:, :3]}, batch, rng, 0)
    torch.testing.assert_close(plain.total, mse)
    (grad,) = torch.autograd.grad(plain.total, net.a)
    grads = torch.autograd.grad(loss.total, (net.a, net.b))
    torch.testing.assert_close(grads[0], grad)
    assert grads[1] != 0

    values = objective().validate({"model": net}, batch, rng)
    assert values["bits"].shape == (32,) and values["bits"].isfinite().all()
    fixed = objective(variance="fixed").validate({"model": lambda *args: net(*args)[:, :3]}, batch, rng)
    torch.testing.assert_close(values["loss"], fixed["loss"])
    assert "bits" not in fixed
    assert torch.equal(objective().validation_times() * 1000, (objective().validation_times() * 1000).round())


def test_labels_are_dropped_beside_and_not_in_place() -> None:
    given: list[Any] = []

    def net(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        given.append(cond)
        return torch.cat([x, x], 1)

    batch, rng = images(), ProgressRng(0, 0, "main", torch.arange(32))
    objective(condition_drop=0.5).loss("main", {"model": net}, batch, rng, 0)
    assert torch.equal(given[0]["label"], batch["label"]) and 6 < int(given[0]["drop"].sum()) < 26
    null = objective().null_condition({"label": batch["label"]})
    assert null["drop"].all() and torch.equal(null["label"], batch["label"])


def test_mistakes_name_what_to_change() -> None:
    with pytest.raises(UserError, match="steps are counted, such as 'ddpm_linear'"):
        Denoising(variance="learned")
    with pytest.raises(UserError, match="variational_weight"):
        objective(variational_weight=-1.0)
    rng = ProgressRng(0, 0, "main", torch.arange(32))
    with pytest.raises(ValueError, match=r"expected \(32, 6, 4, 4\).*learn_sigma"):
        objective().loss("main", {"model": lambda x, t, cond: x}, images(), rng, 0)
    with pytest.raises(ValueError, match=r"expected \(32, 3, 4, 4\)"):
        objective(variance="fixed").loss("main", {"model": Halves()}, images(), rng, 0)
    with pytest.raises(UserError, match=r"objective\.variance: learned"):
        objective(variance="fixed").predictor({"model": Halves()}, {}, variance=True)


# --------------------------------------------------------------------------------------------- sampling


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function will do: eps, and v in [-1, 1]."""
    place = t.view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(1.3 * x + place), torch.sin(x.roll(1, -1) + 2 * place)], 1)


def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    eps, v = network(x, t).chunk(2, 1)
    return (*recover(x, eps, "eps", PATH, t), v)


class Given:
    """Noise from one generator, as diffusers draws it, step after step."""

    def __init__(self, batch: int):
        self.batch, self.generator = batch, torch.Generator().manual_seed(7)

    def normal(self, name: str, shape: Any) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)


def walk(scheduler: Any, steps: int, learned: bool) -> list[Tensor]:
    """diffusers' own loop; states after each step."""
    scheduler.set_timesteps(steps)
    x, generator, states = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), Given(2).generator, []
    for timestep in scheduler.timesteps:
        output = network(x, ((timestep + 1) / 1000).expand(2))
        given: dict[str, Any] = {"generator": generator, "return_dict": False}
        if type(scheduler).__name__ == "DDIMScheduler":
            given["use_clipped_model_output"] = True  # eps follows a clipped x0, as in Improved DDPM's code
        x = scheduler.step(output if learned else output[:, :4], timestep, x, **given)[0]
        states.append(x)
    return states


COMMON = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("variance", "theirs"), [
    ("learned", "learned_range"), ("small", "fixed_small"), ("large", "fixed_large"), ("none", "ddim"),
])  # fmt: skip
def test_each_step_is_diffusers(variance: Any, theirs: str, spacing: Any, clip: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    settings = {**COMMON, "timestep_spacing": spacing, "clip_sample": clip}
    if theirs == "ddim":
        scheduler = diffusers.DDIMScheduler(**settings)
    else:
        scheduler = diffusers.DDPMScheduler(variance_type=theirs, **settings)
    expected = walk(scheduler, 20, learned=theirs == "learned_range")
    states: list[Tensor] = []
    sampler = Ancestral(steps=20, variance=variance, spacing=spacing, clip=clip)
    end = sampler.sample(
        denoise,
        torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)),
        path=PATH,
        rng=Given(2),  # type: ignore[arg-type]
        callback=lambda step, t, x, x0: states.append(x),
    )
    assert len(states) == len(expected) == 20
    # at its last step diffusers' DDPM adds noise unless that is step 0, which `trailing` does not reach; ours never does
    same = 19 if spacing == "trailing" and variance != "none" else 20
    for i, (got, wanted) in enumerate(zip(states[:same], expected[:same], strict=True)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()), msg=f"step {i}")
    assert torch.equal(end, states[-1])


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("count", [7, 50, 250, 1000])
def test_spacings_are_diffusers(count: int, spacing: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**COMMON, timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    assert torch.equal((spaced_times(count, 1000, spacing) * 1000 - 1).round().long(), scheduler.timesteps)


@pytest.mark.parametrize("variance", ["small", "none"])
def test_a_gaussian_comes_back_with_its_own_spread(variance: Any) -> None:
    """Data N(0.5, 0.3^2): the exact denoiser is known, and the chain must end at it."""
    mean, std = 0.5, 0.3

    def exact(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = PATH.alpha(t.double())[:, None], PATH.sigma(t.double())[:, None]
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x.double() - alpha * mean)
        return x0.float(), ((x.double() - alpha * x0) / sigma).float()

    positions = torch.arange(3000)
    rng = ProgressRng(0, 0, "sample", positions)
    samples = Ancestral(steps=1000, variance=variance).sample(exact, rng.normal("noise", (1,)), path=PATH, rng=rng)
    assert float(samples.mean()) == pytest.approx(mean, abs=0.02)
    assert float(samples.std()) == pytest.approx(std, rel=0.05)


def test_guidance_on_the_first_channels_leaves_the_others_conditional() -> None:
    """DiT's forward_with_cfg: three of four channels guided, the fourth and the variance as conditioned."""

    def make(cond: Any) -> Any:
        def predict(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            shift = torch.where(cond["drop"], 0.0, 1.0).view(-1, 1, 1, 1)
            eps = torch.tanh(x) + shift
            return (*recover(x, eps, "eps", PATH, t), x * shift)

        return predict

    label = torch.tensor([3, 4])
    keep, drop = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    x, t = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.4)
    both = guide_batched(make, {"label": label, "drop": keep}, {"label": label, "drop": drop}, 4.0, channels=3)
    x0, eps, v = both(x, t)
    torch.testing.assert_close(eps[:, :3], torch.tanh(x[:, :3]) + 4)
    torch.testing.assert_close(eps[:, 3:], torch.tanh(x[:, 3:]) + 1)
    torch.testing.assert_close(v, x)
    torch.testing.assert_close(x0, recover(x, eps, "eps", PATH, t)[0], rtol=1e-4, atol=1e-4)
    everything = guide_batched(make, {"label": label, "drop": keep}, {"label": label, "drop": drop}, 4.0)
    torch.testing.assert_close(everything(x, t)[1], torch.tanh(x) + 4)


def test_what_a_sampler_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="1 to 1000"):
        Ancestral(steps=1001).sample(denoise, torch.zeros(1, 4, 4, 4), path=PATH)
    with pytest.raises(UserError, match="at least 1"):
        Ancestral(steps=0)
    with pytest.raises(ValueError, match="needs `rng`"):
        Ancestral(steps=3, variance="small").sample(denoise, torch.zeros(1, 4, 4, 4), path=PATH)
    assert not Ancestral(variance="none").learns_variance and Ancestral().learns_variance


def test_the_halfway_variance_is_the_geometric_mean() -> None:
    logs = torch.tensor([math.log(0.25)]), torch.tensor([math.log(4.0)])
    v = torch.tensor([[-1.0, 0.0, 1.0]])
    torch.testing.assert_close(learned_log_variance(v, *logs).exp(), torch.tensor([[0.25, 1.0, 4.0]]))
