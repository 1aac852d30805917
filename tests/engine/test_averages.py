"""Decays of moving averages are the papers', and recipes say them by name."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_scale.config.schema import Average, ConsistencyDecay, CosineDecay, PowerDecay
from nexus_scale.engine.ema import MovingAverage, decay_at, gamma_of, scales_at

STEPS = 1000


def decays(decay: object, steps: int = STEPS) -> list[float]:
    average = Average.model_validate({"average_of": "model", "decay": decay})
    return [decay_at(average, step, steps) for step in range(steps)]


def test_the_power_profile_is_edm2s() -> None:
    """Karras et al. 2024: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94; the weight of step t in the average is as t^gamma."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    kept = torch.tensor(decays({"name": "power", "sigma_rel": 0.1}), dtype=torch.float64)
    weights = (1 - kept) * torch.cat(
        [kept[1:].flip(0).cumprod(0).flip(0), torch.ones(1)]
    )  # of each step in the last average
    assert kept[0] == 0 and float(weights.sum()) == pytest.approx(1.0)
    times = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    mean = (weights * times).sum()
    assert float(((weights * (times - mean) ** 2).sum()).sqrt()) == pytest.approx(0.1, rel=2e-3)


def test_a_consistency_targets_decay_rises_with_the_scales() -> None:
    """Song et al. 2023: N(k) from s0 to s1 + 1, mu(k) = exp(s0 ln mu0 / N(k)), so that mu(0) = mu0."""
    decay = ConsistencyDecay(start_decay=0.95, start_scales=2, end_scales=150)
    scales = [scales_at(decay, step, STEPS) for step in range(STEPS + 1)]
    assert scales[0] == 2 and scales[-1] == 151 and scales == sorted(scales)
    assert scales[250] == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    values = decays(decay)
    assert values[0] == pytest.approx(0.95) and values[-1] == pytest.approx(math.exp(2 * math.log(0.95) / 151))


def test_a_cosine_decay_ends_at_one() -> None:
    values = decays(CosineDecay(base=0.99))
    assert values[0] == pytest.approx(0.99) and values[STEPS // 2] == pytest.approx(0.995) and values[-1] > 0.99999


def test_a_number_warms_up_unless_it_is_told_not_to() -> None:
    assert decays(0.9)[:3] == pytest.approx([0.1, 2 / 11, 3 / 12]) and decays(0.9)[-1] == 0.9
    assert decay_at(Average(average_of="model", decay=0.9, warmup=False), 0, STEPS) == 0.9


def test_an_average_with_decay_zero_is_the_network_to_the_bit() -> None:
    source = [torch.randn(1000) * 10]
    average = MovingAverage(Average(average_of="model", decay=0.0), source, STEPS)
    source[0].add_(torch.randn(1000))
    average.update(0)
    assert torch.equal(average.values[0], source[0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decay": {"name": "pwoer"}}, "one of 'power', 'consistency', 'cosine'"),
        ({"decay": {"name": "power", "sigma_rel": 0.3}}, "less than 0.2886"),
        ({"decay": {"name": "consistency", "end_scales": 1}}, "greater than or equal to 2"),
        ({"decay": PowerDecay(), "warmup": True}, "power has a beginning of its own"),
        ({"decay": 1.0}, "less than 1"),
    ],
)
def test_decays_that_cannot_be_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Average.model_validate({"average_of": "model", **values})
