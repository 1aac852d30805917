"""Training a tokenizer: its loss's parts, and a discriminator that begins late and is kept near averages of logits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.gan.video_discriminator import VideoDiscriminator
from nexus_scale.models.vae.lpips import LPIPS
from nexus_scale.objectives.tokenizer import DECAY, DISCRIMINATOR, GENERATOR, IMAGES, Tokenizer
from tests.models.test_magvit2 import small

WEIGHTS: dict[str, Any] = {"perceptual_weight": 0.3, "entropy_weight": 0.2, "used_weight": 0.5, "lecam_weight": 2.0}


def test_both_losses_are_the_papers_whatever_the_micro_batches() -> None:
    nets: dict[str, Any] = {"model": small(), "discriminator": VideoDiscriminator(hidden_size=4, depth=1)}
    nets["perceptual"] = LPIPS(channels=(4, 8), depth=(1, 1))
    for name in ("discriminator", "perceptual"):
        nets[name].init_weights()
    x = torch.rand(3, 3, 5, 8, 12) * 2 - 1
    objective = Tokenizer(l1_weight=0.25, discriminator_begins=1, **WEIGHTS)
    assert [len(objective.phases(step)) for step in (0, 1)] == [1, 2] and objective.needs == tuple(nets)

    made = nets["model"](x)
    real, fake = nets["discriminator"](x), nets["discriminator"](made.x_hat.detach())
    flat = [value.transpose(1, 2).flatten(0, 1) for value in (x, made.x_hat)]
    rebuilt = 0.75 * (x - made.x_hat).square().mean() + 0.25 * (x - made.x_hat).abs().mean()
    rebuilt = rebuilt + 0.3 * nets["perceptual"](*flat).mean() + 0.25 * made.commitment.mean()
    rebuilt = rebuilt + 0.2 * (made.sure - 0.5 * made.used).mean()

    def whole(phase: str, step: int) -> Tensor:
        """The mean over the batch of what micro-batches of one and two samples say."""
        totals = []
        for rows in (slice(0, 1), slice(1, 3)):
            places = torch.arange(3)[rows]
            batch, rng = (
                Batch({"video": x[rows]}, places, places, draw=step),
                ProgressRng(0, step, phase, places, x.device),
            )
            totals.append(objective.loss(phase, nets, batch, rng, step).total * len(places) / 3)
        objective.after_phase(phase, nets, lambda value: value, rng, step)
        return torch.stack(totals).sum()

    torch.testing.assert_close(whole(GENERATOR, 0), rebuilt)
    torch.testing.assert_close(
        whole(GENERATOR, 1), rebuilt + 0.1 * F.softplus(-nets["discriminator"](made.x_hat)).mean()
    )
    hinge = F.softplus(-real).mean() + F.softplus(fake).mean()
    near = real.relu().square().mean() + (-fake).relu().square().mean()  # both averages begin at 0
    torch.testing.assert_close(whole(DISCRIMINATOR, 1), hinge + 2 * near)
    averages = torch.stack([real.mean(), fake.mean()]).detach() * (1 - DECAY)
    torch.testing.assert_close(objective.kept["logits"].float(), averages)
    again = Tokenizer(**WEIGHTS)
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.kept["logits"], objective.kept["logits"])
    batch = Batch({"video": x}, torch.arange(3), torch.arange(3))
    found = objective.validate(nets, batch, ProgressRng(0, 0, "validate", torch.arange(3), x.device))
    torch.testing.assert_close(found["loss"].mean(), rebuilt) and all(value.shape == (3,) for value in found.values())
    plain = Tokenizer(perceptual_weight=0.0, adversarial_weight=0.0)
    assert plain.needs == ("model",) and plain.state_dict() == {}
    for arguments, words in (
        ({"l1_weight": 2.0}, "l1_weight: got 2.0"),
        ({"used_weight": -1.0}, "used_weight: got -1.0"),
        ({"images": 0}, "images: got 0"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            Tokenizer(**arguments)


def test_first_steps_see_images_and_later_ones_frames_in_a_row() -> None:
    objective = Tokenizer(perceptual_weight=0.0, image_steps=2, images=3, frames=5)
    assert [[phase.name for phase in objective.phases(step)] for step in (0, 1, 2)] == [
        [IMAGES], [IMAGES], [GENERATOR, DISCRIMINATOR],
    ]  # fmt: skip
    places = torch.arange(64)
    clips = torch.arange(9.0).view(1, 1, 9, 1, 1) / 9 + places.view(-1, 1, 1, 1, 1)

    def seen(phase: str) -> Tensor:
        return objective._seen(clips, ProgressRng(0, 0, phase, places, clips.device), phase)

    images = seen(IMAGES)
    assert images.shape == (192, 1, 1, 1, 1)
    assert torch.equal(images.view(64, 3).floor(), places.view(-1, 1).expand(-1, 3).float()), "of each clip three"
    assert len((images * 9).round().remainder(9).unique()) == 9
    frames = (seen(GENERATOR)[:, 0, :, 0, 0] - places[:, None]) * 9
    torch.testing.assert_close(frames - frames[:, :1], torch.arange(5.0).expand(64, 5), atol=1e-3, rtol=0)
    assert set(frames[:, 0].round().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    rng, batch = (
        ProgressRng(0, 0, IMAGES, places[:2], clips.device),
        Batch({"video": torch.rand(2, 3, 9, 8, 12) * 2 - 1}, places[:2], places[:2]),
    )
    found = objective.loss(IMAGES, {"model": small()}, batch, rng, 0)
    assert "adversarial" not in found.metrics and bool(found.total.isfinite())
