"""What a critic sees instead of images: the published changes, derivatives of both orders, a probability that follows the critic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels.determinism import repeating
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.augmentations import PROBABILITY, SIGNS, find_augmentation
from nexus_scale.processes.image_transforms import (
    BAND_POWERS,
    BANDS,
    NORMALS,
    UNIFORMS,
    ImageTransforms,
    filter_bank,
    sampled,
    spread_in_order,
    warped,
)
from tests.golden import augmentations as golden


class Given:
    """Random numbers that were used before; missing columns are zeros. Grey images have no hue and saturation there."""

    def __init__(self, uniform: Tensor, normal: Tensor, noise: Tensor):
        self.uniform_columns, self.normal_columns, self.noise = uniform, normal, noise

    def uniform(self, name: str, shape: Any) -> Tensor:
        return padded(self.uniform_columns, shape[0])

    def normal(self, name: str, shape: Any) -> Tensor:
        return self.noise if name.endswith("noise") else padded(self.normal_columns, shape[0])


def padded(columns: Tensor, count: int) -> Tensor:
    return torch.cat([columns, columns.new_zeros(len(columns), count)], dim=1)[:, :count]


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    with np.load(golden.FILE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("name", [*golden.CASES, "diff", "diff even"])
def test_images_and_gradients_are_those_of_the_published_code(name: str, stored: dict[str, Tensor]) -> None:
    case = {key.partition("/")[2]: value for key, value in stored.items() if key.startswith(f"{name}/")}
    empty = torch.zeros(len(case["x"]), 0)
    given = Given(case["uniform"], case.get("normal", empty), case.get("noise", empty))
    if name in golden.CASES:
        _, changes, probability = golden.CASES[name]
        shares = dict.fromkeys(changes, 1.0)
        augment = find_augmentation(
            {"name": "ada", "changes": "", "shares": shares, "probability": probability, "target": None}
        )
    else:
        augment = find_augmentation("diffaugment")
    x = case["x"].requires_grad_()
    y = augment.changed(x, given, "real", {}, 0)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad((y * case["weights"]).sum(), x)
    assert near(y, case["y"]) and near(gradient, case["gradient"])
    assert not near(y, x, 0.05), "something changed"


def test_a_penalty_passes_through_a_changed_image() -> None:
    """The second derivative, which torch's own sampling lacks, and the first, by finite differences."""
    drawn = np.random.Generator(np.random.PCG64(1))
    x = torch.from_numpy(drawn.standard_normal((2, 1, 3, 4))).requires_grad_()
    grid = torch.from_numpy(drawn.uniform(-1.2, 1.2, (2, 2, 5, 2)))
    assert torch.autograd.gradcheck(lambda x: sampled(x, grid), (x,))
    assert torch.autograd.gradgradcheck(lambda x: sampled(x, grid).square(), (x,))
    assert near(sampled(x, grid), torch.nn.functional.grid_sample(x, grid, align_corners=False))
    onto = torch.from_numpy(drawn.standard_normal((2, 1, 2, 5)))
    (gradient,) = torch.autograd.grad((sampled(x, grid) * onto).sum(), x)
    assert near(spread_in_order(onto, grid, x.shape), gradient, 1e-12)


@pytest.mark.gpu
def test_gradients_of_changed_images_repeat_to_the_bit_on_a_gpu() -> None:
    transforms = ImageTransforms(xint=1.0, scale=1.0, rotate=1.0)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 32, 32, generator=draws)
    u, n = torch.rand(16, UNIFORMS, generator=draws), torch.randn(16, NORMALS, generator=draws)

    def gradient(device: str) -> Tensor:
        given = x.to(device).requires_grad_()
        y = transforms(given, u.to(device), n.to(device), torch.zeros(1, device=device), 1.0)
        return torch.autograd.grad(y.square().sum(), given)[0].cpu()

    with repeating(True):
        found = [gradient("cuda") for _ in range(4)]
    assert all(torch.equal(one, found[0]) for one in found) and near(found[0], gradient("cpu"), 1e-3)


def test_nothing_moves_where_nothing_is_to_change() -> None:
    x = torch.randn(2, 3, 10, 7, generator=torch.Generator().manual_seed(0))
    assert near(warped(x, torch.eye(3).expand(2, 3, 3)), x, 2e-6), "two orthogonal filters give the image back"
    moved = torch.tensor([[[0.0, -1, 1], [1, 0, -1], [0, 0, 1]]])  # a turn, and a shift that stays within an eighth
    square = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert near(warped(square, moved, reach=0.125), warped(square, moved))
    u, n = torch.full((2, UNIFORMS), 0.3), torch.ones(2, NORMALS)
    every = ImageTransforms(**dict.fromkeys(ImageTransforms.__dataclass_fields__, 1.0))
    bands = torch.tensor(filter_bank()).view(BANDS, -1)
    assert near(bands.sum(0), torch.eye(1, bands.shape[1]).roll(bands.shape[1] // 2)[0])
    assert math.isclose(sum(BAND_POWERS), 1)
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert near(every(x, u, n, torch.ones_like(x), 0.0), x, 5e-6)


def test_a_sample_is_changed_alike_in_any_micro_batch() -> None:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for spec in ("diffaugment", {"name": "ada", "changes": "bgcnx", "probability": 0.8, "target": None}):
        augment = find_augmentation(spec)  # type: ignore[arg-type]

        def changed(places: Tensor, augment: Any = augment) -> Tensor:
            return augment.changed(x[places], ProgressRng(0, 3, "critic", places), "real", {}, 0)

        whole = changed(torch.arange(6))
        assert torch.allclose(torch.cat([changed(torch.tensor([0])), changed(torch.arange(1, 6))]), whole, atol=1e-6)
        assert len({tuple(row.flatten().tolist()) for row in whole}) == 6


def test_the_probability_follows_the_signs_of_the_critics_answers() -> None:
    """Karras et al. 2020, section 3.1: every 4 steps it moves so that it goes from 0 to 1 in `images` images."""
    augment = find_augmentation({"name": "ada", "images": 80, "every": 2, "target": 0.6})
    kept = augment.first()

    def after(mean: float, step: int) -> float:
        kept.update(augment.after(kept, torch.tensor([8 * mean, 8.0], dtype=torch.float64), step))
        return float(kept[PROBABILITY])

    assert [after(mean, step) for step, mean in enumerate((1.0, 0.5, 1.0, 0.1))] == pytest.approx([0.0, 0.2, 0.2, 0.0])
    assert after(1.0, 4) == 0.0 and kept[SIGNS].tolist() == [8.0, 8.0], "half of an interval is remembered"
    assert after(math.nan, 5) == pytest.approx(0.1), "answers that are not finite count nothing"
    for step in range(6, 60):
        after(1.0, step)
    assert float(kept[PROBABILITY]) == 1.0


def test_the_probability_may_be_a_function_of_the_step() -> None:
    augment = find_augmentation({"name": "ada", "target": None, "final_probability": 0.4, "final_step": 10})
    found = [float(augment.metrics({}, step)[PROBABILITY]) for step in (0, 5, 10, 99)]
    assert augment.first() == {} and found == pytest.approx([0.0, 0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    ("spec", "words"),
    [("adda", "ada"), ({"name": "ada", "changes": "bgz"}, "got z; expected changes of b"), ({"name": "ada", "shares": {"hew": 1.0}}, "hew"),
     ({"name": "ada", "final_probability": 0.5}, "the other null"), ({"name": "ada", "every": 0}, "at least 1"),
     ({"name": "diffaugment", "policy": ["colour"]}, "color")],
)  # fmt: skip
def test_what_cannot_be_is_refused(spec: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_augmentation(spec)


def test_images_that_cannot_be_changed_are_refused() -> None:
    augment = find_augmentation({"name": "ada", "changes": "cf", "target": None, "probability": 1.0})
    for shape, words in (((1, 2, 32, 32), "2 channels"), ((1, 3, 16, 32), "more than 21 pixels")):
        with pytest.raises(UserError, match=words):
            augment.changed(torch.zeros(shape), ProgressRng(0, 0, "critic", torch.arange(1)), "real", {}, 0)
