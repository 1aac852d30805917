"""Metrics of pairs of images, and Inception's features: held against public packages, and sensitive to what they claim to see."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics.clips import frame_change, frame_consistency
from nexus_scale.metrics.diversity import pair_diversity
from nexus_scale.metrics.features import find_inception
from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.metrics.inception import InceptionV3, resized_as_tensorflow, resized_clean
from nexus_scale.metrics.psnr import psnr
from nexus_scale.metrics.ssim import ms_ssim, ssim
from tests.golden import pair_metrics as golden

torch.set_num_threads(1)
SAID = json.loads(golden.FILE.read_text())


def test_structural_similarity_is_that_of_scikit_image() -> None:
    x, y = golden.pair(40)
    assert ssim(x, y).tolist() == pytest.approx(SAID["ssim"], rel=1e-6)
    torch.testing.assert_close(ssim((x + 1) / 2, (y + 1) / 2, least=0.0, peak=1.0), ssim(x, y))
    torch.testing.assert_close(ssim(x, x), torch.ones(2).double())
    for measure, side in ((ssim, 10), (ms_ssim, 160)):
        with pytest.raises(ValueError, match=f"at least {side + 1}"):
            measure(*golden.pair(side))


def test_structural_similarity_at_several_scales_is_its_definition() -> None:
    """Wang et al. 2003, equation 7, with the exponents of their section 3.2."""
    line = torch.exp(-torch.arange(-5.0, 6).double().square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(z: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(z.flatten(0, 1)[:, None], window).unflatten(0, z.shape[:2])[:, :, 0]

    x, y = ((one + 1) for one in golden.pair(176))
    expected = torch.ones(2, 3).double()
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = mean(x), mean(y)
        vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        of_scale = (2 * both + 0.06**2) / (vx + vy + 0.06**2)
        if scale == 4:
            of_scale = of_scale * (2 * mx * my + 0.02**2) / (mx**2 + my**2 + 0.02**2)
        expected *= of_scale.mean((2, 3)).clamp(min=0) ** exponent
        x, y = (torch.nn.functional.avg_pool2d(one, 2) for one in (x, y))
    assert ms_ssim(*golden.pair(176)).tolist() == pytest.approx(expected.mean(1).tolist(), rel=1e-6)


def blurred(x: Tensor, radius: int) -> Tensor:
    for _ in range(radius):
        x = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return x


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_similarity_falls_with_noise_and_blur(measure) -> None:
    x = golden.images(5, 48).double() / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    for worse in ([x + s * noise for s in (0.05, 0.2, 0.8)], [blurred(x, r) for r in (1, 2, 4)]):
        found = [float(measure(x, one).mean()) for one in worse]
        assert found == sorted(found, reverse=True) and len(set(found)) == 3, found


def test_diversity_of_pairs_is_within_a_condition_and_across() -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().flatten(1).mean(1)

    samples = torch.tensor([0.0, 1, 10, 12]).view(4, 1, 1, 1).expand(-1, 3, 2, 2)
    groups = torch.tensor([0, 0, 1, 1])
    found = pair_diversity(samples, distance, groups)
    assert found == (1.5, (10 + 12 + 9 + 11) / 4, (2, 4))
    assert pair_diversity(samples, distance).within == pytest.approx((1 + 10 + 12 + 9 + 11 + 2) / 6)
    few = pair_diversity(samples, distance, groups, pairs=1, batch=1)
    assert few.pairs == (1, 1) and few == pair_diversity(samples, distance, groups, pairs=1)
    assert torch.tensor(pair_diversity(samples[:1], distance).within).isnan(), "no pair"
    copies = pair_diversity(samples[:1].expand(3, -1, -1, -1), distance)
    assert copies.within == 0


def test_consistency_falls_with_flicker_and_drift() -> None:
    still = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 6, -1, -1) * 2 - 1
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    flicker = [still + s * noise for s in (0.0, 0.1, 0.5)]
    drift = still + 0.3 * noise[:, :, :1] * torch.arange(6.0).view(1, 1, 6, 1, 1)
    extract = lambda images: images.flatten(1)  # noqa: E731
    for values in (
        [frame_consistency(extract, x).following.mean() for x in flicker],
        [-frame_change(x).mean() for x in flicker],
    ):
        found = [float(v) for v in values]
        assert found == sorted(found, reverse=True) and len(set(found)) == 3, found
    of_drift = frame_consistency(extract, drift)
    assert bool((of_drift.first < of_drift.following).all()), "the first frame is left behind"
    torch.testing.assert_close(frame_consistency(extract, still).first, torch.ones(2).double())
    assert frame_change(torch.tensor([0.0, 1, -1]).view(1, 1, 3, 1, 1)).tolist() == [1.5]
    with pytest.raises(ValueError, match="at least 2 frames"):
        frame_change(still[:, :, :1])


# ------------------------------------------------------------------------------------------------------ Inception


def test_images_are_resized_as_tensorflow_and_clean_fid_do() -> None:
    x = golden.images(3, 48)
    for resize, name in ((resized_as_tensorflow, "tensorflow"), (resized_clean, "clean")):
        assert resize(x).shape == (2, 3, 299, 299)
        assert golden.some(resize(x)) == pytest.approx(SAID["inception"][name], rel=1e-6, abs=1e-4), name


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(golden.weights(golden.inception_shapes()), file)
    return file


def test_inceptions_features_are_torch_fidelitys(weights: Path) -> None:
    assert sum(p.numel() for p in InceptionV3().parameters()) == 23_850_960
    x = golden.images(3, 48)
    found = find_inception(weights)
    for name, features in found.all(x.float() / 127.5 - 1).items():
        # a convolution's sums are ordered as its library likes
        assert golden.some(features) == pytest.approx(SAID["inception"][name], rel=1e-4, abs=1e-5), name
    clean = find_inception(weights, "clean")
    assert clean.fingerprint != found.fingerprint and "other weights than the published" in clean.name
    assert found.fingerprint == find_inception(weights).fingerprint
    x = golden.images(4, 20).float() / 127.5 - 1
    assert clean(x).shape == (2, 2048)
    rfid = [frechet_distance(clean(x), clean(x + s * torch.randn(x.shape))) for s in (0.0, 0.5)]
    assert rfid[0] == pytest.approx(0, abs=1e-6) and rfid[1] > 1e-3


def test_what_is_missing_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match=r"not there; expected the weights .* published at .*6726825d"):
        find_inception(file)
    with pytest.raises(UserError, match="expected tensorflow or clean"):
        find_inception(file, "bicubic")
    torch.save({"fc.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="cannot be read as the weights of torch-fidelity's"):
        find_inception(file)(torch.zeros(1, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
    with pytest.raises(UserError, match=r"pip install 'nexus-scale\[score-images\]'"):
        ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
