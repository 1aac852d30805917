"""What drawings are to follow, made of pictures: edges are OpenCV's, the others by definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_scale.conditioners.control import ControlConditioner, made_as
from nexus_scale.contracts import UserError
from nexus_scale.metrics.edges import overlap
from nexus_scale.processes.followed import MAKERS, Blur, Canny, LowResolution, Silhouette, Sketch, maker

GOLDEN = Path(__file__).parents[1] / "golden" / "canny.npz"
"""Made by golden/canny.py with OpenCV 5.0.0."""


def test_edges_are_opencvs_to_the_bit() -> None:
    with np.load(GOLDEN) as golden:
        for number in range(3):
            image, low, high = torch.from_numpy(golden[f"image{number}"]), *golden[f"thresholds{number}"].tolist()
            edges = Canny(low, high)(image.permute(2, 0, 1))
            assert edges.shape == (3, *image.shape[:2]) and (edges[0] == edges[2]).all()
            assert (edges[0].numpy() == golden[f"edges{number}"]).all() and edges.any()


def test_other_makers_do_what_they_say() -> None:
    flat = torch.full((3, 12, 16), 77, dtype=torch.uint8)
    shape = flat.clone()
    shape[:, 3:9, 4:12] = 10
    for each in MAKERS.values():
        made = each()(shape)
        assert made.shape == shape.shape and made.dtype == torch.uint8
    assert torch.equal(Blur(2.0)(flat), flat) and torch.equal(LowResolution(4)(flat), flat)
    assert Blur(2.0)(shape)[0, 3, 4] > 10 and LowResolution(12)(shape).float().std() < shape.float().std()
    assert torch.equal(Silhouette()(shape)[0] > 0, shape[0] == 10) and not Silhouette()(flat).any()
    line = flat.clone()
    line[:, 6] = 0
    assert torch.equal(Sketch(2.0, 20.0)(line)[0] > 0, line[0] == 0) and not Sketch()(flat).any()


def test_a_condition_is_made_again_as_a_manifest_says_and_mistakes_are_named() -> None:
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    conditioner = ControlConditioner("sketch", {"contrast": 5.0})
    told = {"kind": "control", "fingerprint": conditioner.fingerprint, **conditioner.settings}
    assert torch.equal(made_as(told, image, "x"), Sketch(contrast=5.0)(image))
    with pytest.raises(UserError, match="do not say how their pictures were made"):
        made_as({"kind": "vae"}, image, "x")
    with pytest.raises(UserError, match="no maker 'hed'"):
        maker("hed", {})
    with pytest.raises(UserError, match="canny: has no factor"):
        maker("canny", {"factor": 2})
    with pytest.raises(UserError, match="0 <= low <= high"):
        Canny(5, 1)(image)


def test_marks_agree_where_they_are_near() -> None:
    a = torch.zeros(3, 8, 8, dtype=torch.bool)
    a[:2, 2] = True
    b = a.roll(1, 1)
    assert overlap(a, a).tolist() == [1, 1, 1] and overlap(a, b).tolist() == [0, 0, 1]
    assert overlap(a, b, within=1).tolist() == [1, 1, 1]
    half = a.clone()
    half[0, 2, 4:] = False
    assert overlap(a, half)[0] == pytest.approx(0.5)
