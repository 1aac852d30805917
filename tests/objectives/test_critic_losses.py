"""Losses and penalties of GANs against the papers' formulas in float64, and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.adversarial import Adversarial
from nexus_scale.objectives.critic_losses import Losses, critic_loss, generator_loss

COUNT, NOISE, CLASSES = 5, 4, 3
STEP = 1e-5


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


PAPERS: dict[str, tuple[Callable[[float, float], float], Callable[[float], float]]] = {
    # Goodfellow et al. 2014, equation 1: the critic maximises log D(x) + log(1 - D(G(z)))
    "logistic": (lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)), lambda f: -math.log(sigmoid(f))),
    "saturating": (lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)), lambda f: math.log(1 - sigmoid(f))),
    "hinge": (lambda r, f: max(0.0, 1 - r) + max(0.0, 1 + f), lambda f: -f),
    "least_squares": (lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda f: 0.5 * (f - 1) ** 2),
    "wasserstein": (lambda r, f: f - r, lambda f: -f),
}
PAIRED: dict[str, tuple[Callable[[float, float], float], Callable[[float, float], float]]] = {
    # Jolicoeur-Martineau 2018, equations 5 and 6 (RSGAN); of the others its section 4.1 with their functions
    "logistic": (lambda r, f: -math.log(sigmoid(r - f)), lambda r, f: -math.log(sigmoid(f - r))),
    "saturating": (lambda r, f: -math.log(sigmoid(r - f)), lambda r, f: math.log(sigmoid(r - f))),
    "hinge": (lambda r, f: max(0.0, 1 - (r - f)), lambda r, f: max(0.0, 1 - (f - r))),
    "least_squares": (lambda r, f: 0.5 * (r - f - 1) ** 2, lambda r, f: 0.5 * (f - r - 1) ** 2),
    "wasserstein": (lambda r, f: f - r, lambda r, f: r - f),
}
ANSWERS = [(1.3, -2.1), (-0.4, 0.3), (0.2, 3.5), (-5.0, -0.7)]


@pytest.mark.parametrize("losses", get_args(Losses))
def test_losses_and_their_slopes_are_the_papers(losses: Losses) -> None:
    real, fake = (torch.tensor(column, dtype=torch.float64) for column in zip(*ANSWERS, strict=True))
    for paired in (False, True):
        of_critic, of_generator = PAIRED[losses] if paired else PAPERS[losses]
        generator = of_generator if paired else lambda r, f, alone=of_generator: alone(f)
        checks: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float, float], float]]] = [
            (lambda r, f, paired=paired: critic_loss(losses, r, f, paired=paired), of_critic),
            (lambda r, f, paired=paired: generator_loss(losses, f, r if paired else None), generator),
        ]
        for ours, paper in checks:
            r, f = real.clone().requires_grad_(), fake.clone().requires_grad_()
            found = ours(r, f)
            assert found.tolist() == pytest.approx([paper(*answers) for answers in ANSWERS], rel=1e-12)
            slopes = torch.autograd.grad(found.sum(), (r, f), allow_unused=True)
            for place, (a, b) in enumerate(ANSWERS):
                moved = (
                    (paper(a + STEP, b) - paper(a - STEP, b)) / (2 * STEP),
                    (paper(a, b + STEP) - paper(a, b - STEP)) / (2 * STEP),
                )
                got = [0.0 if slope is None else float(slope[place]) for slope in slopes]
                assert got == pytest.approx(moved, rel=1e-6, abs=1e-9), (losses, paired)


class Critic(nn.Module):
    """A smooth critic of images (B, 3, 2, 2) that names classes where it is asked to."""

    def __init__(self, names: bool = False):
        super().__init__()
        self.first, self.last, self.names = nn.Linear(12, 6), nn.Linear(6, 1 + CLASSES), names

    def forward(self, x: Tensor, cond: Any) -> Any:
        said = self.last(torch.nn.functional.silu(self.first(x.double().flatten(1))))
        return (said[:, 0], said[:, 1:]) if self.names else said[:, 0]


def made(names: bool = False) -> tuple[dict[str, Any], Batch]:
    torch.manual_seed(0)
    generator = nn.Linear(NOISE, 12).double()
    nets = {"critic": Critic(names).double(), "model": lambda z, cond: generator(z.double()).view(-1, 3, 2, 2)}
    fields = {"image": torch.randn(COUNT, 3, 2, 2), "label": torch.tensor([0, 2, 1, 1, 0])}
    return nets, Batch(fields, torch.arange(COUNT), torch.arange(COUNT))


def rng_of(count: int = COUNT) -> ProgressRng:
    return ProgressRng(0, 0, "critic", torch.arange(count), torch.device("cpu"))


def slope_by_differences(critic: nn.Module, x: Tensor) -> Tensor:
    """The gradient of each sample's answer at x, (B, all of x), in float64."""
    x = x.double()
    columns = []
    for place in range(12):
        step = torch.zeros(12, dtype=torch.float64)
        step[place] = STEP
        moved = [critic(x + sign * step.view(3, 2, 2), {}).detach() for sign in (1, -1)]
        columns.append((moved[0] - moved[1]) / (2 * STEP))
    return torch.stack(columns, 1)


POINTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "r1": lambda x, x_hat, u: x,
    "r2": lambda x, x_hat, u: x_hat,
    "gp": lambda x, x_hat, u: u * x + (1 - u) * x_hat,
}


@pytest.mark.parametrize("name", POINTS)
def test_penalties_and_their_gradients_are_those_of_finite_differences(name: str) -> None:
    """R1, R2: Mescheder et al. 2018, equation 9: gamma / 2 * E |grad D|^2; WGAN-GP: Gulrajani et al. 2017, equation 3. The gradient of the
    whole loss by each of the critic's weights, too, which is a second derivative."""
    nets, batch = made()
    critic = nets["critic"]
    objective = Adversarial(noise_size=NOISE, losses="wasserstein", **{f"{name}_weight": 3.0})

    def reference() -> float:
        x, x_hat = batch["image"], nets["model"](rng_of().normal("z", (NOISE,)), {}).detach().float()
        u = rng_of().uniform("mix", (1,)).view(-1, 1, 1, 1)
        gradients = slope_by_differences(critic, POINTS[name](x, x_hat, u))
        square = gradients.square().sum(1)
        penalty = (square.sqrt() - 1).square().mean() if name == "gp" else 0.5 * square.mean()
        return float((critic(x_hat, {}) - critic(x, {})).mean().detach() + 3.0 * penalty)

    found = objective.loss("critic", nets, batch, rng_of(), 0)
    assert float(found.total.detach()) == pytest.approx(reference(), rel=1e-5)
    assert name in found.metrics and objective.needs_whole == ("critic",)
    gradients = torch.autograd.grad(found.total, list(critic.parameters()))
    by = 1e-4
    for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for place in range(0, len(flat), 7):
            kept, moved = float(flat[place]), []
            for sign in (1, -1):
                flat[place] = kept + sign * by
                moved.append(reference())
            flat[place] = kept
            slope = (moved[0] - moved[1]) / (2 * by)
            assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-5), (name, place)


def test_a_gradient_penalty_has_a_gradient_where_a_critic_has_no_slope() -> None:
    nets, batch = made()
    nn.init.zeros_(nets["critic"].first.weight)
    found = Adversarial(noise_size=NOISE, losses="wasserstein", gp_weight=10.0).loss("critic", nets, batch, rng_of(), 0)
    assert float(found.metrics["gp"]) == 1.0
    gradients = torch.autograd.grad(found.total, list(nets["critic"].parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_lazy_penalties_weigh_as_much_on_average() -> None:
    nets, batch = made()
    plain = Adversarial(noise_size=NOISE, r1_weight=2.0, r2_weight=1.0)
    lazy = Adversarial(noise_size=NOISE, r1_weight=2.0, r2_weight=1.0, penalty_every=4)
    without = Adversarial(noise_size=NOISE).loss("critic", nets, batch, rng_of(), 0).total
    each = [lazy.loss("critic", nets, batch, rng_of(), step) for step in range(8)]
    assert [sorted({"r1", "r2"} & set(loss.metrics)) for loss in each] == [["r1", "r2"], [], [], []] * 2
    assert [step for step in range(8) if float((each[step].total - without).detach()) == 0] == [1, 2, 3, 5, 6, 7]
    penalty = plain.loss("critic", nets, batch, rng_of(), 0).total - without
    torch.testing.assert_close(sum(loss.total - without for loss in each) / 8, penalty)


def test_pairs_are_of_the_same_place_and_do_not_teach_through_the_data() -> None:
    nets, batch = made()
    objective = Adversarial(noise_size=NOISE, paired=True)
    fake = nets["critic"](nets["model"](rng_of().normal("z", (NOISE,)), {}).float(), {})
    real = nets["critic"](batch["image"], {})
    expected = {"critic": -(real - fake).sigmoid().log().mean(), "generator": -(fake - real).sigmoid().log().mean()}
    for phase, value in expected.items():
        found = objective.loss(phase, nets, batch, rng_of(), 0)
        torch.testing.assert_close(found.total.double(), value, rtol=1e-6, atol=1e-7)
    assert not batch["image"].requires_grad


def test_a_critic_that_names_classes_pays_for_wrong_ones() -> None:
    """Odena et al. 2017, equation 3: the class of data and of samples; the generator of samples."""
    nets, batch = made(names=True)
    told = {"noise_size": NOISE, "conditions": ("label",)}
    both = [Adversarial(class_weight=weight, **told) for weight in (0.0, 0.5)]  # type: ignore[arg-type]
    x_hat = nets["model"](rng_of().normal("z", (NOISE,)), {}).float()
    log_p = [
        nets["critic"](x, {})[1].log_softmax(1)[torch.arange(COUNT), batch["label"]] for x in (batch["image"], x_hat)
    ]
    for phase, paid in (("critic", -(log_p[0] + log_p[1]).mean()), ("generator", -log_p[1].mean())):
        plain, named = (objective.loss(phase, nets, batch, rng_of(), 0) for objective in both)
        torch.testing.assert_close((named.total - plain.total).double(), 0.5 * paid, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(named.metrics["class"].double(), paid.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"networks\.critic names no classes"):
        both[1].loss("generator", made()[0], batch, rng_of(), 0)


def test_a_step_that_broke_off_is_forgotten_with_its_state() -> None:
    """ADA counts the signs of a step; those of one that a rollback took back do not count in the next."""
    nets, batch = made()
    ada = {
        "name": "ada",
        "changes": "",
        "shares": {"xflip": 1.0},
        "images": 100,
        "probability": 0.5,
        "target": 1.0,
        "every": 1,
    }
    found = []
    for broken in (False, True):
        objective = Adversarial(noise_size=NOISE, augment=ada)
        if broken:
            objective.loss("critic", nets, batch, rng_of(), 0)
            objective.load_state_dict({name: value.clone() for name, value in objective.state_dict().items()})
        objective.loss("critic", nets, batch, rng_of(), 0)
        objective.after_phase("critic", nets, lambda total: total, rng_of(), 0)
        found.append(float(objective.kept["augment_probability"]))
    assert found[0] == found[1] < 0.5
