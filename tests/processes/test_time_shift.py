"""The shift of times with the size of the latents: SD3's and FLUX's rules, in training and in sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.times import find_time_shift, shift_time
from nexus_scale.samplers.ode import ODE

FLUX = {"name": "exponential"}
SD3 = {"name": "square_root", "base_tokens": 1024}


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        (1.0, (64, 64), 1.0),
        (3, (7, 9), 3.0),
        (SD3, (64, 64), 1.0),
        (SD3, (128, 128), 2.0),
        (SD3 | {"shift": 1.5}, (64, 256), 3.0),
        (FLUX, (32, 32), math.exp(0.5)),
        (FLUX, (128, 128), math.exp(1.15)),
        (FLUX | {"patch_size": 1}, (128, 32), math.exp(1.15)),
        (FLUX, (96, 128), math.exp(0.5 + 0.65 * (3072 - 256) / 3840)),
    ],
)
def test_rules(spec: Any, size: tuple[int, int], expected: float) -> None:
    assert find_time_shift(spec, "x").of((2, 16, *size)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (128, 128)])
def test_flux_grid_is_the_pipelines(steps: int, size: tuple[int, int]) -> None:
    """diffusers' scheduler with dynamic shifting, given what FluxPipeline gives it."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(size[0] * size[1] // 4)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    ours = ODE(steps=steps, shift=FLUX, spacing="trailing").times(shape=(1, 16, *size))
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=1e-7)

    scheduler.set_timesteps(steps, mu=mu)  # as the SD3 pipeline does
    ours = ODE(steps=steps, shift=FLUX).times(shape=(1, 16, *size))
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_schnell_has_equal_steps() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.equal(ODE(steps=4, spacing="trailing").times(), scheduler.sigmas)


def test_training_shifts_by_the_size_of_its_batch() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    rng = ProgressRng(0, 0, "main", torch.arange(5), torch.device("cpu"))
    for size in ((8, 8), (16, 24)):
        batch = Batch({"image": torch.zeros(5, 3, *size)}, torch.arange(5), torch.arange(5))
        for shift in (1.0, SD3):
            objective = Denoising(input="image", conditions=(), time_shift=shift, condition_drop=0.0)
            objective.loss("main", {"model": network}, batch, rng, 0)
        expected = math.sqrt(size[0] * size[1] / 4 / 1024)
        torch.testing.assert_close(seen[-1], shift_time(seen[-2], expected))
        assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (0.0, "positive"),
        (-1, "positive"),
        ({"name": "exponentail"}, "exponential"),
        (FLUX | {"base_token": 3}, "base_tokens"),
        (FLUX | {"base_tokens": 4096}, "base_tokens < max_tokens"),
        ({"name": "square_root"}, "base_tokens"),
        (SD3 | {"shift": 0.0}, "positive"),
    ],
)
def test_mistakes_are_named(spec: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Denoising(time_shift=spec)
    with pytest.raises(UserError, match=words):
        ODE(shift=spec)


def test_a_path_without_shift_refuses_a_rule() -> None:
    with pytest.raises(UserError, match="time_shift"):
        Denoising(path="edm", target="edm", times="log_normal", time_shift=FLUX)
    with pytest.raises(UserError, match="spacing"):
        ODE(spacing="leading")  # type: ignore[arg-type]


def test_an_encoder_is_dropped_with_its_pooled_text_and_apart_from_the_others() -> None:
    names = ("text", "text_2", "text_3", "pooled", "pooled_2")
    drop = {"text+pooled": 0.464, "text_2+pooled_2": 0.464, "text_3": 0.464}
    objective = Denoising(conditions=names, condition_drop=drop)
    count = 4000
    cond = {name: torch.ones(count, 2, 3) if name.startswith("text") else torch.ones(count, 3) for name in names}
    rng = ProgressRng(0, 0, "main", torch.arange(count), torch.device("cpu"))
    dropped = objective.condition_drop(cond, rng)
    lost = {name: ~dropped[name].flatten(1).any(1) for name in names}
    assert torch.equal(lost["text"], lost["pooled"]) and torch.equal(lost["text_2"], lost["pooled_2"])
    for name in ("text", "text_2", "text_3"):
        assert float(lost[name].float().mean()) == pytest.approx(0.464, abs=0.03)
    together = lost["text"] & lost["text_2"] & lost["text_3"]
    assert float(together.float().mean()) == pytest.approx(0.464**3, abs=0.02)
    assert torch.equal(dropped["drop"], together)
    with pytest.raises(UserError, match="no condition 'pooled_3'"):
        Denoising(conditions=names, condition_drop={"text+pooled_3": 0.1})


def test_embeddings_get_noise_as_strong_as_they_are_in_training_alone() -> None:
    objective = Denoising(input="image", conditions=("text", "pooled"), condition_noise={"text": 0.5})
    size = torch.arange(1.0, 65).view(64, 1, 1) * torch.tensor([1.0, 0.0]).view(
        2, 1
    )  # by sample and token: the second is padding
    fields = {"image": torch.zeros(64, 3, 4, 4), "text": size.expand(64, 2, 384), "pooled": torch.ones(64, 384)}
    batch = Batch(fields, torch.arange(64), torch.arange(64))
    rng = ProgressRng(0, 0, "main", torch.arange(64), torch.device("cpu"))
    noisy, plain = (objective.told_of(batch, rng, train=train) for train in (True, False))
    added = (noisy["text"] - plain["text"])[:, 0] / size[:, 0]
    assert float(added.std()) == pytest.approx(0.5, rel=0.02) and float(added.std(1).max()) < 0.6
    assert not noisy["text"][:, 1].any() and torch.equal(noisy["pooled"], fields["pooled"])
    assert torch.equal(plain["text"], fields["text"])
    with pytest.raises(UserError, match="no condition 'label'"):
        Denoising(conditions=("text",), condition_noise={"label": 0.1})
    labels = Denoising(input="image", conditions=("label",), condition_noise={"label": 0.1})
    told = Batch({**fields, "label": torch.zeros(64, dtype=torch.int64)}, torch.arange(64), torch.arange(64))
    with pytest.raises(UserError, match="expected embeddings"):
        labels.told_of(told, rng, train=True)


def test_a_constant_reaches_the_network_in_training_and_sampling_and_is_never_dropped() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        seen.append(cond["guidance"])
        return torch.zeros_like(x)

    objective = Denoising(input="image", condition_drop=1.0, constants={"guidance": 3.5})
    fields = {"image": torch.zeros(5, 3, 4, 4), "text": torch.ones(5, 2, 3), "pooled": torch.ones(5, 3)}
    rng = ProgressRng(0, 0, "main", torch.arange(5), torch.device("cpu"))
    batch = Batch(fields, torch.arange(5), torch.arange(5))
    objective.loss("main", {"model": network}, batch, rng, 0)
    objective.predictor({"model": network}, objective.condition(batch), uncond=True)(
        torch.zeros(5, 3, 4, 4), torch.ones(5)
    )
    assert len(seen) == 2 and all(torch.equal(g, torch.full((5,), 3.5)) for g in seen)
    for wrong in ({"conditions": ()}, {"conditions": ("text", "guidance")}):
        with pytest.raises(UserError, match=r"objective\.constants"):
            Denoising(constants={"guidance": 3.5}, **wrong)  # type: ignore[arg-type]
