"""Random masks cover what the paper's do, and what is left of an image is grey under them."""

from __future__ import annotations

import numpy as np
import torch

from nexus_scale.processes.masks import mask_of_places, random_mask, without


def test_random_masks_are_boxes_strokes_or_everything() -> None:
    generator = np.random.default_rng(0)
    masks = [random_mask(48, 32, generator) for _ in range(400)]
    assert all(mask.shape == (1, 48, 32) and set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks)
    covered = torch.stack(masks).mean((1, 2, 3))
    whole = covered == 1
    assert 0.19 < float(whole.float().mean()) < 0.31, "a quarter covers everything"
    assert 0.1 < float(covered[~whole].mean()) < 0.5 and float(covered.min()) > 0
    again = random_mask(48, 32, np.random.default_rng([1, 2]))
    assert torch.equal(again, random_mask(48, 32, np.random.default_rng([1, 2])))


def test_what_is_covered_is_grey_and_a_place_is_its_first_pixel() -> None:
    image, mask = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., 2:, :1] = 1
    left = without(image, mask)
    assert left[0, :, 2:, 0].abs().sum() == 0 and left.sum() == 3 * 14
    assert mask_of_places(mask, (2, 2)).flatten().tolist() == [0, 0, 1, 0]
