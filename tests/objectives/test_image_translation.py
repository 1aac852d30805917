"""pix2pix and CycleGAN against float64 references written from the papers; the pool of translations, alike on any number of workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.cyclegan import CRITICS, GENERATORS, POOLS, CycleGAN
from nexus_scale.objectives.pix2pix import Pix2Pix

SHAPE, GLOBAL = (3, 6, 6), 4


def nets(*names: str, channels: int = 3) -> dict[str, Any]:
    """Small convolutions in float64: translators end in tanh, critics in logits of patches."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    for name in names:
        critic = "critic" in name
        made[name] = nn.Sequential(
            nn.Conv2d(channels if critic else 3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1 if critic else 3, 3, padding=1),
            nn.Identity() if critic else nn.Tanh(),
        ).double()  # fmt: skip
    return made


def pair(number: int = 0) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(number)
    first, second = (torch.rand(GLOBAL, *SHAPE, generator=made, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return first, second


def batch(source: Tensor, image: Tensor, places: Tensor, draw: int = 0) -> Batch:
    return Batch({"source": source[places], "image": image[places]}, places, places, draw)


def rng(phase: str, step: int = 0) -> ProgressRng:
    return ProgressRng(1, step, phase, torch.arange(GLOBAL), torch.device("cpu"))


class Exact:
    """Lets objectives compute in float64: `.float()` of their tensors is then no change."""

    def __enter__(self) -> None:
        self.before = Tensor.float
        Tensor.float = lambda x: x  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        Tensor.float = self.before  # type: ignore[method-assign]


def gradients(loss: Tensor, of: dict[str, Any], *names: str) -> Tensor:
    parameters = [parameter for name in names for parameter in of[name].parameters()]
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, parameters, retain_graph=True)])


@pytest.mark.parametrize("losses", ["logistic", "least_squares"])
def test_pix2pix_minimises_what_the_paper_says(losses: Any) -> None:
    """Isola et al., equations 1 to 4, with the non-saturating generator, and the critic's objective halved."""
    (source, image), parts = pair(), nets("model")
    parts |= nets("critic", channels=6)
    objective = Pix2Pix(losses=losses, l1_weight=7.0)
    real, fake = (parts["critic"](torch.cat([source, x], 1)) for x in (image, parts["model"](source)))
    if losses == "logistic":
        critic = -0.5 * (torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
        generator = -torch.sigmoid(fake).log().mean()
    else:
        critic = 0.5 * ((real - 1).square().mean() + fake.square().mean())
        generator = (fake - 1).square().mean()
    expected = {"critic": critic, "generator": generator + 7.0 * F.l1_loss(parts["model"](source), image)}
    trains = {"critic": "critic", "generator": "model"}
    with Exact():
        for phase in objective.phases(0):
            given = batch(source, image, torch.arange(GLOBAL))
            got = objective.loss(phase.name, parts, given, rng(phase.name), 0)
            torch.testing.assert_close(got.total, expected[phase.name], rtol=1e-12, atol=0)
            found, known = (gradients(x, parts, trains[phase.name]) for x in (got.total, expected[phase.name]))
            torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-14)


def test_cyclegan_minimises_what_the_paper_says() -> None:
    """Zhu et al., equations 1 to 3 with least squares (section 4), and the identity term of section 5.2."""
    (x, y), parts = pair(), nets("model", "back", "critic", "source_critic")
    G, F_, D_Y, D_X = (parts[name] for name in ("model", "back", "critic", "source_critic"))
    l1 = F.l1_loss
    generators = (D_Y(G(x)) - 1).square().mean() + (D_X(F_(y)) - 1).square().mean()
    generators = generators + 10 * (l1(F_(G(x)), x) + l1(G(F_(y)), y)) + 5 * (l1(G(y), y) + l1(F_(x), x))
    critics = 0.5 * ((D_Y(y) - 1).square().mean() + D_Y(G(x).detach()).square().mean())
    critics = critics + 0.5 * ((D_X(x) - 1).square().mean() + D_X(F_(y).detach()).square().mean())
    objective = CycleGAN(global_batch=GLOBAL, image_shape=SHAPE, pool_size=0)
    given = batch(x, y, torch.arange(GLOBAL))
    with Exact():
        for phase, expected in ((GENERATORS, generators), (CRITICS, critics)):
            trains = next(each.networks for each in objective.phases(0) if each.name == phase)
            got = objective.loss(phase, parts, given, rng(phase), 0).total
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
            found, known = (gradients(loss, parts, *trains) for loss in (got, expected))
            torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-14)
        cycles = objective.validate(parts, given, rng("validate"))
        objective.validates = "pairs"
        pairs = objective.validate(parts, given, rng("validate"))
    torch.testing.assert_close(cycles["loss"].mean(), 0.5 * (l1(F_(G(x)), x) + l1(G(F_(y)), y)))
    for name, value in {"loss": l1(G(x), y), "back": l1(F_(y), x), "identity": l1(x, y)}.items():
        torch.testing.assert_close(pairs[name].mean(), value)


# ------------------------------------------------------------------------------------------------- the pool


def shown_by(objective: CycleGAN, parts: dict[str, Any], step: int, splits: list[list[Tensor]]) -> Tensor:
    """What critics are shown in a step, (2, GLOBAL, ...) in order; `splits`: the micro-batches of each rank."""
    source, image = pair(step)
    sums: list[Tensor] = []
    for places in splits:  # first all ranks leave their part, then the first one is told the sum
        for place in places:
            objective.loss(GENERATORS, parts, batch(source, image, place, step), rng(GENERATORS, step), step)
        if len(splits) > 1 and places is not splits[-1]:
            whole = torch.zeros(2, GLOBAL, *SHAPE)
            for place in places:
                whole[:, place] = objective._shown[int(place[0])].float()
            sums.append(whole)
            objective._positions, objective._shown = [], {}
    objective.after_phase(GENERATORS, parts, lambda mine: mine + sum(sums), rng(GENERATORS, step), step)
    return torch.cat([objective._shown[int(place[0])] for place in splits[-1]], dim=1)


@torch.no_grad()
def test_the_pool_shows_what_a_pool_that_takes_one_after_another_shows() -> None:
    """Against a loop over the images of each step; alike in micro-batches, on two ranks, and after a resume in the middle."""
    parts = {name: net.float() for name, net in nets("model", "back").items()} | {
        name: net.float() for name, net in nets("critic", "source_critic").items()
    }
    made = {name: CycleGAN(global_batch=GLOBAL, image_shape=SHAPE, pool_size=6) for name in ("whole", "parts", "ranks")}
    all_of, halves = torch.arange(GLOBAL), list(torch.arange(GLOBAL).split(2))
    pools: dict[str, list[Tensor]] = {name: [] for name in POOLS}
    changed = 0
    for step in range(8):
        source, image = pair(step)
        fresh = dict(zip(POOLS, (parts["model"](source.float()), parts["back"](image.float())), strict=True))
        expected = []
        for name in POOLS:
            generator = rng(GENERATORS, step).shared(name)
            draws, places = torch.rand(GLOBAL, generator=generator), torch.randint(6, (GLOBAL,), generator=generator)
            for one, draw, place in zip(fresh[name], draws.tolist(), places.tolist(), strict=True):
                if len(pools[name]) < 6:
                    pools[name].append(one)
                elif draw < 0.5:
                    one, pools[name][place] = pools[name][place], one
                    changed += 1
                expected.append(one)
        shown = torch.stack(expected).view(2, GLOBAL, *SHAPE)
        source, image = source.float(), image.float()
        torch.testing.assert_close(shown_by(made["whole"], parts, step, [[all_of]]), shown)
        torch.testing.assert_close(shown_by(made["parts"], parts, step, [halves]), shown)
        torch.testing.assert_close(shown_by(made["ranks"], parts, step, [halves[:1], halves[1:]]), shown[:, 2:])
        if step == 3:
            resumed = CycleGAN(global_batch=GLOBAL, image_shape=SHAPE, pool_size=6)
            resumed.load_state_dict({name: value.clone() for name, value in made["whole"].state_dict().items()})
            made["whole"] = resumed
    assert changed > 8 and all(
        torch.equal(made[name].kept[pool], made["whole"].kept[pool]) for name in made for pool in POOLS
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Pix2Pix(l1_weight=-1.0), "l1_weight"),
        (lambda: CycleGAN(global_batch=2, image_shape=(3, 4)), "image_shape"),
        (lambda: CycleGAN(global_batch=2, image_shape=SHAPE, pool_size=-1), "pool_size"),
    ],
)
def test_what_they_refuse(make: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()


def test_images_of_another_size_than_the_pools_are_refused() -> None:
    objective = CycleGAN(global_batch=GLOBAL, image_shape=(3, 8, 8))
    with pytest.raises(UserError, match=r"image_shape: got \(3, 8, 8\); field source is \(3, 6, 6\)"):
        objective.loss(GENERATORS, nets("model", "back"), batch(*pair(), torch.arange(GLOBAL)), rng(GENERATORS), 0)
