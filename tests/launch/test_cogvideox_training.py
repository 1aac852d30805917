"""What CogVideoX's training adds to the objectives: even times, clips of many lengths, the autoencoder's bound on videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media.pictures import filmstrip, to_uint8
from nexus_scale.models.diffusion.cogvideox import CogVideoX
from nexus_scale.models.vae.causal_vae3d import CausalVAE3D
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.objectives.elbo import ELBO
from nexus_scale.processes.times import find_times


def rng_of(positions: Tensor, step: int = 0) -> ProgressRng:
    return ProgressRng(0, step, "main", positions)


def batch_of(**fields: Tensor) -> Batch:
    count = len(next(iter(fields.values())))
    return Batch(fields, torch.arange(count), torch.arange(count))


# ------------------------------------------------------------------------------------------------ even times


def test_every_share_of_the_times_is_drawn_once_however_many_ranks_draw() -> None:
    times = find_times({"name": "stratified", "intervals": 32})
    whole = times.sample(rng_of(torch.arange(32)))
    assert (whole * 32).floor().tolist() == list(range(32))
    ranks = torch.cat([times.sample(rng_of(torch.arange(first, 32, 4))) for first in range(4)])
    assert torch.equal(ranks.sort().values, whole.sort().values)
    assert not torch.equal(times.sample(rng_of(torch.arange(32), step=1)), whole)


def test_steps_are_drawn_evenly_and_all_of_them_can_be() -> None:
    times = find_times({"name": "stratified", "intervals": 8, "of": {"name": "discrete", "steps": 16}})
    counts = torch.zeros(16)
    for step in range(50):
        drawn = (times.sample(rng_of(torch.arange(16), step)) * 16).round().long() - 1
        assert (drawn // 2).bincount(minlength=8).eq(2).all(), "two samples of each share of two steps"
        counts += drawn.bincount(minlength=16)
    assert counts.min() > 25


def test_shares_are_of_another_distribution_and_unknown_ones_are_refused() -> None:
    times = find_times({"name": "stratified", "intervals": 4, "of": "logit_normal"})
    drawn = times.sample(rng_of(torch.arange(4)))
    borders = find_times("logit_normal").quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert torch.bucketize(drawn, borders).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="logit_normal"):
        find_times({"name": "stratified", "intervals": 4, "of": "logitnormal"})
    with pytest.raises(UserError, match="intervals"):
        find_times({"name": "stratified", "intervals": 0})


def test_no_time_reaches_past_the_end() -> None:
    class Highest:
        positions = torch.tensor([2**20 - 1])

        def uniform(self, name: str, shape: Any = ()) -> Tensor:
            return torch.tensor([1 - 2.0**-24])

    times = find_times({"name": "stratified", "intervals": 2**20})
    assert float(times.sample(Highest())) < 1  # type: ignore[arg-type]


def test_validation_times_are_those_of_the_distribution_that_is_stratified() -> None:
    arguments: dict[str, Any] = {"path": "scaled_linear", "target": "v", "conditions": ("text",)}
    plain = Denoising(**arguments, times="discrete").validation_times()
    assert torch.equal(
        Denoising(**arguments, times={"name": "stratified", "intervals": 4, "of": "discrete"}).validation_times(), plain
    )


# ------------------------------------------------------------------------------------- clips of many lengths


@pytest.mark.parametrize("attention", ["masked", "packed"])
def test_a_batch_of_many_lengths_costs_what_its_clips_cost_alone(attention: str) -> None:
    torch.manual_seed(0)
    net = CogVideoX(
        latent_channels=2,
        latent_frames=3,
        latent_height=4,
        latent_width=4,
        hidden_size=32,
        depth=2,
        num_heads=2,
        text_dim=8,
        time_dim=16,
        positions="rotary",
        attention=attention,  # type: ignore[arg-type]
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    objective = Denoising(
        path={"name": "scaled_linear", "snr_shift": 3.0},
        target="v",
        times={"name": "stratified", "intervals": 3, "of": "discrete"},
        conditions=("text",),
        condition_drop=0.0,
    )
    frames = torch.tensor([3, 1, 2])
    mask = torch.arange(3) < frames[:, None]
    moments = torch.randn(3, 3, 4, 4, 4) * mask[:, :, None, None, None]  # (B, F, 2C, H, W)
    text = torch.randn(3, 5, 8)
    whole = batch_of(moments=moments, moments_mask=mask, text=text)
    rng = rng_of(torch.arange(3))
    error = objective.loss("main", {"model": net}, whole, rng, 0).total

    # the same draws, sample by sample, cut to what is real
    x0, eps = objective.clean(whole, rng), rng.normal("noise", (2, 3, 4, 4))
    t = objective.times.sample(rng)
    alone = []
    for i, f in enumerate(frames.tolist()):
        a, b, c = x0[i : i + 1, :, :f], eps[i : i + 1, :, :f], t[i : i + 1]
        alone.append(objective._errors({"model": net}, a, b, c, {"text": text[i : i + 1]}).squared)
    torch.testing.assert_close(error, torch.cat(alone).mean(), rtol=1e-5, atol=1e-6)

    # what is not real has no part in it
    noisy = batch_of(moments=moments + 5 * (~mask)[:, :, None, None, None], moments_mask=mask, text=text)
    torch.testing.assert_close(objective.loss("main", {"model": net}, noisy, rng, 0).total, error, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- videos


def test_the_bound_of_videos() -> None:
    torch.manual_seed(0)
    net = CausalVAE3D(
        num_frames=5, image_size=(8, 8), latent_channels=2, channels=(4, 4, 4), depth=1, num_groups=2, norm_over="frame"
    )
    net.init_weights()
    objective = ELBO(latent_shape=net.latent_shape, input="video", mirror=True)
    assert objective.fields == ("video",)
    videos = torch.randint(0, 256, (2, 3, 5, 8, 8), dtype=torch.uint8)
    batch, rng = batch_of(video=videos), rng_of(torch.arange(2))
    loss = objective.loss("main", {"model": net}, batch, rng, 0)
    assert loss.total.isfinite()
    found = objective.validate({"model": net}, batch, rng)
    assert all(value.shape == (2,) for value in found.values())
    cond, request = objective.request_like(batch_of(video=videos).on("cpu"), Request())  # as the loop gives bytes
    assert torch.equal(request.given["video"], videos.float() / 127.5 - 1)
    rebuilt = objective.generate({"model": net}, cond, request, rng).samples
    torch.testing.assert_close(rebuilt, net(request.given["video"])[0].float())
    prior = objective.generate({"model": net}, {}, Request(), rng).samples
    assert prior.shape[:2] == (2, 3) and prior.shape[3:] == (8, 8) and not torch.equal(prior[0], prior[1])
    with pytest.raises(UserError, match=r"\(C, f, h, w\)"):
        ELBO(latent_shape=(2, 2, 2), input="video")


def test_clips_are_shown_as_strips_from_first_to_last_frame() -> None:
    videos = torch.linspace(-1, 1, 17).view(1, 1, 17, 1, 1).expand(2, 3, 17, 4, 6)
    strip = filmstrip(videos)
    assert strip.shape == (2, 3, 4, 8 * 6)
    assert strip[0, 0, 0, 0] == -1 and strip[0, 0, 0, -1] == 1
    assert to_uint8(videos).shape == (2, 4, 48, 3)
    assert filmstrip(videos[:, :, :1]).shape == (2, 3, 4, 6)
