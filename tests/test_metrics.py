"""Figures of quality: PSNR, balanced accuracy, and the classifier that judges samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nexus_scale.metrics.classifier import (
    balanced_accuracy,
    degrade,
    jitter,
    load_classifier,
    predict,
    save_classifier,
    score_groups,
    train_classifier,
)
from nexus_scale.metrics.psnr import psnr

torch.set_num_threads(1)


def shapes(counts: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Discs, crosses and stripes of random place, size and colour on white: (N, 3, 32, 32) in [-1, 1], (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = []
    for label in labels.tolist():
        y, x = (torch.arange(32.0) - 16)[:, None], (torch.arange(32.0) - 16)[None]
        dy, dx = (torch.rand(2, generator=generator) * 8 - 4).tolist()
        size = 5 + 5 * float(torch.rand((), generator=generator))
        y, x = y - dy, x - dx
        inside = (y.abs() < size) & (x.abs() < size)
        mask = (
            y * y + x * x < size * size,
            inside & ((y.abs() < 2) | (x.abs() < 2)),
            inside & ((y + 32) % 4 < 2).expand(32, 32),
        )[label]
        colour = torch.rand(3, generator=generator) * 1.4 - 1
        images.append(torch.where(mask, colour[:, None, None], torch.ones(())))
    return torch.stack(images), labels


@pytest.fixture(scope="module")
def trained():
    images, labels = shapes((20, 30, 60), 0)
    return train_classifier(
        images, labels, num_classes=3, views=3, num_filters=24, num_components=64, width=8, steps=60
    )


def test_the_classifier_tells_held_out_shapes_apart(trained) -> None:
    images, labels = shapes((30, 30, 30), 1)
    scores = score_groups(trained, images, labels, num_classes=3)
    assert scores.balanced >= 0.95
    torch.testing.assert_close(trained(images).sum(1), torch.ones(len(images)))
    assert scores.accuracy == pytest.approx(scores.balanced)
    assert [sum(row) for row in scores.confusion] == [30, 30, 30]
    degraded = degrade(images, torch.Generator().manual_seed(2))
    assert score_groups(trained, degraded, labels, num_classes=3).balanced >= 0.8


def test_the_same_images_give_the_same_classifier(trained) -> None:
    images, labels = shapes((20, 30, 60), 0)
    before = torch.random.get_rng_state()
    again = train_classifier(
        images, labels, num_classes=3, views=3, num_filters=24, num_components=64, width=8, steps=60
    )
    assert torch.equal(before, torch.random.get_rng_state()), "training it moved the run's own generator"
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_saved_classifier_answers_the_same(trained, tmp_path: Path) -> None:
    save_classifier(trained, tmp_path / "classifier.safetensors")
    images, _ = shapes((5, 5, 5), 3)
    assert torch.equal(load_classifier(tmp_path / "classifier.safetensors")(images), trained(images))


def test_mirrored_images_score_the_same(trained) -> None:
    images, _ = shapes((5, 5, 5), 4)
    torch.testing.assert_close(trained(images), trained(images.flip(3)))


def test_images_of_another_size_are_refused(trained) -> None:
    with pytest.raises(ValueError, match="trained on"):
        trained(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("labels", "classes"), [([0, 1, 1], 3), ([0, 1, 5], 3)])
def test_a_class_without_images_is_refused(labels: list[int], classes: int) -> None:
    with pytest.raises(ValueError, match="images per class"):
        train_classifier(torch.zeros(3, 3, 32, 32), torch.tensor(labels), num_classes=classes)


def test_jitter_keeps_white_white() -> None:
    images = torch.ones(4, 3, 32, 32)
    torch.testing.assert_close(jitter(images, torch.Generator().manual_seed(0)), images)


def test_balanced_accuracy_weighs_classes_and_not_images() -> None:
    labels = torch.tensor([0] * 98 + [1, 1])
    assert balanced_accuracy(torch.zeros(100, dtype=torch.int64), labels) == pytest.approx(0.5)
    assert balanced_accuracy(labels, labels) == 1.0


def test_scores_of_a_known_answer() -> None:
    class Says(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()

    images = torch.tensor([0, 0, 0, 1, 2, 0]).float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    scores = score_groups(Says(), images, labels, num_classes=3)
    assert scores.confusion == ((3, 1, 0), (1, 0, 1), (0, 0, 0))
    assert scores.accuracy == pytest.approx(0.5)
    assert scores.balanced == pytest.approx(0.375)
    assert scores.per_group == (0.75, 0.0, None)
    assert predict(Says(), images, batch=4).tolist() == [0, 0, 0, 1, 2, 0]


def test_psnr_of_known_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 2.0)])
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 0.0]), atol=1e-4, rtol=0)
    assert torch.isinf(psnr(x, x)).all()
    with pytest.raises(ValueError, match="shapes"):
        psnr(x, y[:1])
