"""Objectives on networks with a known answer: the loss is the formula, drops and draws are per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.contracts import Batch, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.codec_language import CodecLanguage
from nexus_scale.objectives.conditions import drop_condition, null_condition
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.objectives.elbo import ELBO, gaussian_kl, psnr
from nexus_scale.objectives.latent_consistency import LatentConsistency
from nexus_scale.processes.latents import LatentStats, normalise, sample_moments
from nexus_scale.processes.times import shift_time
from nexus_scale.samplers.autoregressive import Autoregressive
from nexus_scale.samplers.ode import ODE

STATS = LatentStats(mean=(0.5, -0.5), std=(2.0, 3.0))


def batch_of(positions: Tensor, seed: int = 0) -> Batch:
    """Rows of one fixed global batch of 64, so that splits can be compared."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (64,), generator=generator)
    fields = {
        "moments": torch.randn(64, 4, 4, 4, generator=generator).half(),
        "text": torch.randn(64, 5, 8, generator=generator).half(),
        "text_mask": torch.arange(5) < lengths[:, None],
        "pooled": torch.randn(64, 8, generator=generator).half(),
        "label": torch.randint(0, 9, (64,), generator=generator),
    }
    return Batch({name: value[positions] for name, value in fields.items()}, positions=positions, samples=positions)


def rng_of(positions: Tensor, step: int = 0) -> ProgressRng:
    return ProgressRng(0, step, "main", positions)


class Recorder:
    """A network that answers a fixed linear function of its input and remembers what it was given."""

    def __init__(self, slope: float = 0.0):
        self.slope, self.calls = slope, list[tuple[Tensor, Tensor, Mapping[str, Tensor]]]()

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.calls.append((x, t, cond))
        return self.slope * x


# ------------------------------------------------------------------------------------------- denoising


def test_loss_is_the_papers_formula() -> None:
    positions = torch.arange(16)
    batch, network = batch_of(positions), Recorder(slope=0.3)
    objective = Denoising(time_shift=2.0, latents=STATS)
    assert tuple(objective.needs) == ("model",) and tuple(objective.fields) == ("moments", "text", "pooled")
    assert [phase.trains for phase in objective.phases(0)] == ["model"]
    loss = objective.loss("main", {"model": network}, batch, rng_of(positions), 0)

    rng = rng_of(positions)
    x0 = normalise(sample_moments(batch["moments"], rng.normal("posterior", (2, 4, 4))), STATS)
    eps = rng.normal("noise", (2, 4, 4))
    t = shift_time(torch.sigmoid(rng.normal("times", ())), 2.0)
    x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    error = (0.3 * x_t - (eps - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.total, error.mean())
    assert loss.total.dtype == torch.float32
    given_x, given_t, cond = network.calls[0]
    torch.testing.assert_close(given_x, x_t)
    torch.testing.assert_close(given_t, t)
    assert cond["text"].dtype == cond["pooled"].dtype == torch.float32 and "label" not in cond

    left = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    left[..., :4] = 255  # the left half is white: its errors count alone
    masked = Denoising(time_shift=2.0, latents=STATS, masked=True)
    assert "loss_mask" in masked.fields
    beside = Batch({**batch.fields, "loss_mask": left}, positions=positions, samples=positions)
    half = masked.loss("main", {"model": network}, beside, rng_of(positions), 0)
    squares = (0.3 * x_t - (eps - x0)).square()
    torch.testing.assert_close(half.total, squares[..., :2].sum() / squares.numel())
    with pytest.raises(UserError, match="masks are not flipped"):
        Denoising(masked=True, mirror=True)

    pairs = [loss.metrics[f"loss_t{i}"] for i in range(4)]
    assert all(isinstance(pair, tuple) for pair in pairs)
    assert sum(int(count) for _, count in pairs) == 16  # type: ignore[misc]
    for i, (total, count) in enumerate(pairs):  # type: ignore[misc]
        inside = (t >= i / 4) & (t < (i + 1) / 4)
        assert count == inside.sum()
        torch.testing.assert_close(total, error[inside].sum())


def test_loss_does_not_depend_on_the_split() -> None:
    objective, network = Denoising(latents=STATS), Recorder(slope=0.3)
    objective.loss("main", {"model": network}, batch_of(torch.arange(64)), rng_of(torch.arange(64)), 0)
    for part in torch.arange(64).split(16):
        objective.loss("main", {"model": network}, batch_of(part), rng_of(part), 0)
    whole, *parts = network.calls
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))  # type: ignore[arg-type]
    for name in ("text", "text_mask", "pooled", "drop"):
        assert torch.equal(whole[2][name], torch.cat([part[2][name] for part in parts]))


def test_dropped_conditions_are_the_null_condition() -> None:
    positions = torch.arange(64)
    batch, network = batch_of(positions), Recorder()
    objective = Denoising(condition_drop=0.4, conditions=("text", "pooled", "label"))
    objective.loss("main", {"model": network}, batch, rng_of(positions), 0)
    cond = network.calls[0][2]
    drop = cond["drop"]
    assert torch.equal(drop, rng_of(positions).uniform("drop") < 0.4)
    assert 10 < int(drop.sum()) < 42
    full = objective.condition(batch)
    null = objective.null_condition(full)
    for name in ("text", "text_mask", "pooled"):
        assert torch.equal(cond[name][drop], null[name][drop])
        assert torch.equal(cond[name][~drop], full[name][~drop])
    assert torch.equal(cond["label"], batch["label"])
    assert (null["text"] == 0).all() and (null["pooled"] == 0).all() and null["drop"].all()
    assert (null["text_mask"].sum(1) == 1).all() and null["text_mask"][:, 0].all()
    assert torch.equal(full["text_mask"], batch["text_mask"])  # the batch itself was not written to


def test_conditions_drop_independently_by_name() -> None:
    positions = torch.arange(64)
    network = Recorder()
    Denoising(condition_drop={"text": 0.5, "pooled": 0.5}).loss(
        "main", {"model": network}, batch_of(positions), rng_of(positions), 0
    )
    cond = network.calls[0][2]
    text, pooled = ((cond[name].flatten(1) == 0).all(1) for name in ("text", "pooled"))
    assert (text & pooled).any() and (text & ~pooled).any() and (~text & pooled).any() and (~text & ~pooled).any()
    assert torch.equal(cond["drop"], text & pooled)


def test_no_drop_without_probability_and_text_without_mask() -> None:
    cond = {"text": torch.ones(2, 3, 4), "guidance": torch.ones(2)}
    assert set(drop_condition(cond, {})) == {"text", "guidance"}
    assert (null_condition(cond)["text"] == 0).all() and "text_mask" not in null_condition(cond)
    assert (null_condition(cond, ("text", "pooled"))["guidance"] == 1).all()
    network, positions = Recorder(), torch.arange(4)
    Denoising(condition_drop=0.0).loss("main", {"model": network}, batch_of(positions), rng_of(positions), 0)
    assert "drop" not in network.calls[0][2]


@pytest.mark.parametrize(
    ("path", "target", "times"),
    [
        ("rectified_flow", "velocity", "logit_normal"),
        ("vp_cosine", "v", "uniform"),
        ("ddpm_linear", "eps", "uniform"),
        ("edm", "edm", "log_normal"),
    ],
)
def test_predictor_of_a_perfect_network_recovers_the_sample(path: str, target: str, times: str) -> None:
    positions = torch.arange(8)
    objective = Denoising(path=path, target=target, times=times, latents=STATS, condition_drop=0.0)
    x0 = objective.clean(batch_of(positions), rng_of(positions))
    eps = rng_of(positions).normal("noise", x0.shape[1:])

    from nexus_scale.processes.gaussian import add_noise, target_of

    t = objective.path.t_max * torch.linspace(0.02, 0.9, 8)

    def perfect(x: Tensor, t_net: Tensor, cond: Any) -> Tensor:
        return target_of(objective.path, target, x0, eps, t)

    found_x0, found_eps = objective.predictor({"model": perfect}, {})(add_noise(objective.path, x0, eps, t), t)
    torch.testing.assert_close(found_x0, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_eps, eps, rtol=1e-3, atol=1e-3)


def test_predictor_without_condition_sees_the_null_condition() -> None:
    network, positions = Recorder(), torch.arange(4)
    objective = Denoising()
    cond = objective.condition(batch_of(positions))
    objective.predictor({"model": network}, cond, uncond=True)(torch.zeros(4, 2, 4, 4), torch.full((4,), 0.5))
    assert (network.calls[0][2]["text"] == 0).all() and network.calls[0][2]["drop"].all()


def test_validation_is_eight_fixed_times_and_zero_is_zero() -> None:
    positions = torch.arange(6)
    objective, batch = Denoising(latents=STATS, condition_drop=1.0), batch_of(positions)
    network = Recorder(slope=0.0)
    values = objective.validate({"model": network}, batch, rng_of(positions))
    assert torch.equal(values["loss"], values["loss_zero"]) and values["loss"].shape == (6,)
    assert [float(call[1][0]) for call in network.calls] == [(i + 0.5) / 8 for i in range(8)]
    assert all(
        "drop" not in call[2] and torch.equal(call[2]["text_mask"], batch["text_mask"]) for call in network.calls
    )
    torch.testing.assert_close(values["loss"], torch.stack([values[f"loss_t{i}"] for i in range(8)]).mean(0))
    better = objective.validate({"model": Recorder(slope=0.3)}, batch, rng_of(positions))
    assert not torch.equal(better["loss"], better["loss_zero"]) and torch.equal(
        better["loss_zero"], values["loss_zero"]
    )
    # Fixed: the same again, and the same rows whatever the batch.
    part = objective.validate({"model": Recorder(slope=0.3)}, batch_of(positions[2:4]), rng_of(positions[2:4]))
    torch.testing.assert_close(part["loss"], better["loss"][2:4], rtol=1e-6, atol=0)


def test_edm_feeds_scaled_input_and_buckets_by_quantile() -> None:
    positions = torch.arange(64)
    network = Recorder()
    objective = Denoising(path="edm", target="edm", times="log_normal", latents=LatentStats((0.0, 0.0), (2.0, 2.0)))
    loss = objective.loss("main", {"model": network}, batch_of(positions), rng_of(positions), 0)
    x, c_noise, _ = network.calls[0]
    sigma = rng_of(positions).normal("times", ()).mul(1.2).sub(1.2).exp()
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert 0.5 < float(x.std()) < 1.5
    assert all(int(loss.metrics[f"loss_t{i}"][1]) >= 6 for i in range(4))
    assert torch.isfinite(objective.validate({"model": network}, batch_of(positions), rng_of(positions))["loss"]).all()


def test_images_as_input() -> None:
    positions = torch.arange(3)
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    want = torch.tensor([-1.0, 1.0, -0.6])
    stored = Batch({"image": pixels}, positions=positions, samples=positions)
    scaled = Batch({"image": want.half().view(3, 1, 1, 1).expand(3, 3, 2, 2)}, positions=positions, samples=positions)
    objective = Denoising(input="image", conditions=())
    # as the trainer hands it, widened to int64; twice does no harm
    for batch in (stored, stored.on("cpu"), stored.on("cpu").on("cpu"), scaled.on("cpu")):
        found = objective.clean(batch, rng_of(positions))[:, 0, 0, 0]
        torch.testing.assert_close(found, want, atol=1e-3, rtol=0)
    wide = Batch({"image": pixels.to(torch.int16)}, positions=positions, samples=positions)
    with pytest.raises(UserError, match="field image: got int16, expected pixels as uint8"):
        objective.clean(wide.on("cpu"), rng_of(positions))
    assert tuple(objective.fields) == ("image",)
    batch = stored.on("cpu")
    assert torch.isfinite(objective.loss("main", {"model": Recorder()}, batch, rng_of(positions), 0).total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "velocitty"}, "velocity"),
        ({"target": "edm"}, "needs path 'edm'"),
        ({"path": "rectified"}, "rectified_flow"),
        ({"times": {"name": "logit_normal", "men": 1.0}}, "mean"),
        ({"condition_drop": 1.5}, "probability"),
        ({"condition_drop": {"txt": 0.1}}, "text"),
        ({"time_shift": 0.0}, "positive"),
        ({"path": "edm", "target": "edm", "times": "log_normal", "time_shift": 3.0}, "time_shift"),
    ],
)
def test_mistakes_name_what_to_change(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Denoising(**arguments)


def test_a_network_of_the_wrong_shape_is_named() -> None:
    positions = torch.arange(2)
    with pytest.raises(ValueError, match=r"expected \(2, 2, 4, 4\)"):
        Denoising().loss("main", {"model": lambda x, t, cond: x[:, :1]}, batch_of(positions), rng_of(positions), 0)


def test_the_registry_finds_and_checks_them() -> None:
    assert registry.find("objectives", "denoising") is Denoising and registry.find("objectives", "elbo") is ELBO
    given = {"path": "rectified_flow", "times": {"name": "logit_normal", "mean": 0.0}, "condition_drop": 0.1}
    checked = registry.check_arguments(Denoising, given, "objective", frozenset({"latents"}))
    assert Denoising(**checked).times.quantile(torch.tensor(0.5)) == 0.5
    assert registry.check_arguments(ELBO, {"latent_shape": [8, 4, 4]}, "objective") == {"latent_shape": (8, 4, 4)}
    with pytest.raises(UserError, match="condition_drop"):
        registry.check_arguments(Denoising, {"conditon_drop": 0.1}, "objective")


# ------------------------------------------------------------------------------------------------ ELBO


class LinearVAE(torch.nn.Module):
    """mean and log-variance from fixed numbers, image from the latent by a constant."""

    def __init__(self, mean: float, logvar: float, latent_shape: tuple[int, int, int] = (2, 2, 2)):
        super().__init__()
        self.mean, self.logvar, self.latent_shape = mean, logvar, latent_shape

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = torch.full((len(x), *self.latent_shape), self.mean)
        logvar = torch.full_like(mean, self.logvar)
        z = mean + (0.5 * logvar).exp() * eps
        return z.mean((1, 2, 3)).view(-1, 1, 1, 1).expand_as(x), mean, logvar


def images(count: int = 4) -> Batch:
    x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch({"image": x}, positions=torch.arange(count), samples=torch.arange(count))


def test_kl_is_that_of_gaussians() -> None:
    mean, logvar = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.0, -1.0, 0.7])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, logvar), expected)


@pytest.mark.parametrize("l1", [0.0, 0.25])
def test_elbo_is_reconstruction_plus_kl_per_image_value(l1: float) -> None:
    batch, rng = images(), rng_of(torch.arange(4))
    objective = ELBO(latent_shape=(2, 2, 2), kl_weight=0.1, l1_weight=l1)
    loss = objective.loss("main", {"model": LinearVAE(0.5, -1.0)}, batch, rng, 0)
    x_hat = (0.5 + math.exp(-0.5) * rng.normal("posterior", (2, 2, 2))).mean((1, 2, 3)).view(-1, 1, 1, 1)
    kl = 8 * float(gaussian_kl(torch.tensor(0.5), torch.tensor(-1.0))) / 48
    mse, mae = (x_hat - batch["image"]).square(), (x_hat - batch["image"]).abs()
    torch.testing.assert_close(loss.total, (1 - l1) * mse.mean() + l1 * mae.mean() + 0.1 * kl)
    torch.testing.assert_close(loss.metrics["kl"], torch.tensor(kl))
    torch.testing.assert_close(loss.metrics["psnr"], (10 * torch.log10(4 / mse.flatten(1).mean(1))).mean())
    assert not any(value.requires_grad for value in loss.metrics.values())  # type: ignore[union-attr]


def test_kl_warms_up_with_the_step_and_validation_has_the_full_weight() -> None:
    objective = ELBO(latent_shape=(2, 2, 2), kl_weight=0.1, kl_warmup_steps=4)
    nets, rng = {"model": LinearVAE(0.5, -1.0)}, rng_of(torch.arange(4))
    found = [objective.loss("main", nets, images(), rng, step) for step in range(6)]
    weights = [float((loss.total - loss.metrics["reconstruction"]) / loss.metrics["kl"]) for loss in found]  # type: ignore[operator]
    assert weights == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rel=1e-3)
    values = objective.validate(nets, images(), rng)
    torch.testing.assert_close(
        values["loss"].mean(), ELBO(latent_shape=(2, 2, 2), kl_weight=0.1).loss("main", nets, images(), rng, 0).total
    )
    torch.testing.assert_close(values["loss_zero"], images()["image"].square().flatten(1).mean(1))
    assert values["psnr"].shape == (4,)


def test_free_bits_cost_nothing_and_have_no_gradient() -> None:
    rng = rng_of(torch.arange(4))
    nats = float(gaussian_kl(torch.tensor(0.5), torch.tensor(-1.0)))
    for free in (0.0, nats / 2, nats * 2):
        loss = ELBO(latent_shape=(2, 2, 2), free_bits=free).loss(
            "main", {"model": LinearVAE(0.5, -1.0)}, images(), rng, 0
        )
        torch.testing.assert_close(loss.metrics["kl"], torch.tensor(max(nats, free) * 8 / 48))


def test_psnr_has_peak_two() -> None:
    torch.testing.assert_close(psnr(torch.tensor([4.0, 0.04])), torch.tensor([0.0, 20.0]))


def test_uint8_images_are_scaled() -> None:
    pixels = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    batch = Batch({"image": pixels}, positions=torch.arange(2), samples=torch.arange(2)).on("cpu")
    values = ELBO(latent_shape=(2, 2, 2)).validate({"model": LinearVAE(1.0, -30.0)}, batch, rng_of(torch.arange(2)))
    torch.testing.assert_close(values["loss_zero"], torch.ones(2))
    assert (values["psnr"] > 50).all()


def test_a_latent_shape_that_is_not_the_networks_is_named() -> None:
    rng = rng_of(torch.arange(4))
    with pytest.raises(ValueError, match=r"objective\.latent_shape"):
        ELBO(latent_shape=(2, 1, 1)).loss(
            "main", {"model": LinearVAE(0.5, -1.0)}, images(), rng, 0
        )  # broadcasts silently
    with pytest.raises(RuntimeError) as caught:
        ELBO(latent_shape=(3, 2, 2)).loss("main", {"model": LinearVAE(0.5, -1.0)}, images(), rng, 0)
    assert "objective.latent_shape" in caught.value.__notes__[0]
    for wrong in ({"kl_weight": -1.0}, {"l1_weight": 2.0}, {"free_bits": -0.1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ELBO(latent_shape=(2, 2, 2), **wrong)


def test_flips_mirror_half_of_the_samples_in_training_alone() -> None:
    positions = torch.arange(64)
    moments = torch.zeros(64, 4, 2, 2)
    moments[:, 2:] = -30.0  # no spread: the draw is the mean
    moments[:, :2] = torch.arange(8.0).view(2, 2, 2)
    mirrored = moments.flip(-1)
    batch = Batch({"moments": moments, "moments_mirrored": mirrored}, positions, positions)
    rng = ProgressRng(0, 0, "main", positions)
    objective = Denoising(mirror=True, conditions=())
    assert objective.fields == ("moments", "moments_mirrored")
    x0 = objective.clean(batch, rng, flip=True)
    plain, flipped = moments[:, :2], mirrored[:, :2]
    is_plain = torch.isclose(x0, plain, atol=1e-4).flatten(1).all(1)
    is_flipped = torch.isclose(x0, flipped, atol=1e-4).flatten(1).all(1)
    assert bool((is_plain ^ is_flipped).all()) and 20 < int(is_flipped.sum()) < 44
    torch.testing.assert_close(objective.clean(batch, rng), plain, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------- samplers from code


@pytest.mark.parametrize(
    ("objective", "sampler", "words"),
    [
        (CodecLanguage(), None, r"CodecLanguage draws with a sampler for 'logits'.*request\.sampler: got none"),
        (CodecLanguage(), ODE(), r"got ODE, for 'denoise'"),
        (CodecLanguage(), "autoregressive", "got 'autoregressive', which is no sampler"),
        (Denoising(), None, r"Denoising draws with a sampler for 'denoise'.*got none"),
        (Denoising(), Autoregressive(), r"got Autoregressive, for 'logits'"),
    ],
)
def test_a_sampler_that_is_missing_or_of_the_other_kind_is_named(objective: Any, sampler: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        objective.sampler_of(Request(sampler=sampler))


def test_a_family_that_draws_asks_for_its_kind_of_sampler_first() -> None:
    codes = {"codes": torch.zeros(1, 2, 8, dtype=torch.int64), "codes_mask": torch.ones(1, 2, dtype=torch.bool)}
    with pytest.raises(UserError, match="CodecLanguage draws with a sampler"):
        CodecLanguage().generate({}, {}, Request(given=codes), rng_of(torch.arange(1)))


@pytest.mark.parametrize("length", [2, 5])
def test_no_text_is_the_empty_text_cut_or_padded_to_the_batch(length: int) -> None:
    empty = {"text": torch.randn(1, 3, 4), "text_mask": torch.tensor([[True, True, True]]), "pooled": torch.randn(1, 6)}
    cond = {
        "text": torch.randn(2, length, 4),
        "text_mask": torch.ones(2, length, dtype=torch.bool),
        "pooled": torch.randn(2, 6),
    }
    objective = LatentConsistency(conditions=("text", "pooled"), null="empty", no_text=empty)
    assert list(objective.empty_texts) == ["text", "pooled"] and not LatentConsistency().empty_texts
    null, kept = objective.null_condition(cond), min(3, length)
    assert (
        torch.equal(null["text"][:, :kept], empty["text"][:, :kept].expand(2, -1, -1)) and not null["text"][:, 3:].any()
    )
    assert null["text_mask"].sum(1).tolist() == [kept, kept] and null["drop"].all()
    assert torch.equal(null["pooled"], empty["pooled"].expand(2, -1))
