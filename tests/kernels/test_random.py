"""Counter-based randomness: numpy's bits, independence of the batch split, the right distributions, and its cost."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nexus_scale.kernels import choice
from nexus_scale.kernels import random as philox
from nexus_scale.kernels.random import ProgressRng, derive_key, philox_normal, philox_uniform
from tests.triton_on_a_cpu import compiled, interpreted

KEY = derive_key(7, 11, "main", "noise")


def positions(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2**64 - 1, 2**63 + 5), KEY])
@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_plain_twin_gives_numpys_words(key: tuple[int, int], blocks: int) -> None:
    count = 9
    expected = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(count * blocks * 4)
    plain = philox.words_plain(key, torch.arange(count), blocks)
    assert plain.shape == (count, 4 * blocks)
    assert np.array_equal(plain.numpy().view(np.uint64).ravel(), expected)


@pytest.mark.parametrize(
    "places", [(0, 1, 2), (5,), (3, 2, 1), (0, 8, 16, 24), (7, 7, 3), (0, 10**6, 2, 10**6 + 1), (2**40, 2**40 + 1)]
)
@pytest.mark.parametrize("blocks", [1, 40])
def test_numpy_path_equals_plain_twin_at_any_positions(places: tuple[int, ...], blocks: int) -> None:
    assert torch.equal(
        philox.words_numpy(KEY, positions(*places), blocks), philox.words_plain(KEY, positions(*places), blocks)
    )


@pytest.mark.parametrize("draw", [philox_normal, philox_uniform])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (8, 4, 4), (1024,)])
def test_a_sample_does_not_depend_on_the_batch_split(draw, shape) -> None:  # type: ignore[no-untyped-def]
    whole = draw(KEY, torch.arange(128), shape)
    assert whole.shape == (128, *shape) and whole.dtype == torch.float32
    for size in (64, 32, 1, 3, 50):
        parts = torch.cat([draw(KEY, part, shape) for part in torch.arange(128).split(size)])
        assert torch.equal(whole, parts), size
    for ranks in (2, 3):
        for rank in range(ranks):
            assert torch.equal(whole[rank::ranks], draw(KEY, torch.arange(128)[rank::ranks], shape))


def test_normals_are_normal() -> None:
    from scipy import stats

    draws = philox_normal(KEY, torch.arange(500), (400,)).double()
    assert torch.isfinite(draws).all()
    assert abs(draws.mean()) < 4 / math.sqrt(draws.numel())
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / draws.numel())
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    # The cosine and the sine half of one pair are independent, and so are neighbouring samples.
    bound = 5 / math.sqrt(draws.numel() / 2)
    assert abs((draws[:, :200] * draws[:, 200:]).mean()) < bound
    assert abs((draws[1:] * draws[:-1]).mean()) < bound


def test_uniforms_are_uniform_and_below_one() -> None:
    from scipy import stats

    draws = philox_uniform(KEY, torch.arange(300), (401,))
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws.double().flatten().numpy(), "uniform").pvalue > 1e-3


def test_extreme_words_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, -1, -(2**63), 2**63 - 1]], dtype=torch.int64)
    halves = [0x0000000080000000, 0x000000007FFFFFFF]  # low half: smallest and largest int32, the ends of u1
    for words in (extremes, torch.tensor([[halves[0], halves[1], halves[0], halves[1]]])):
        monkeypatch.setattr(philox, "philox_words", lambda *_, words=words: words)
        normal = philox.philox_normal(KEY, positions(0), (8,))
        uniform = philox.philox_uniform(KEY, positions(0), (8,))
        assert torch.isfinite(normal).all() and normal.abs().max() < 6.67
        assert uniform.min() >= 0 and uniform.max() < 1


def test_keys_differ_in_every_part() -> None:
    keys = {
        derive_key(*parts)
        for parts in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (0, "1", "a"), (0, 1, "a", 0)]
    }
    assert len(keys) == 6
    assert derive_key(0, 1, "a") == derive_key(0, 1, "a")
    assert all(0 <= word < 2**64 for key in keys for word in key)


def test_progress_rng_is_a_function_of_progress() -> None:
    def rng(seed: int = 0, step: int = 3, phase: str = "main", first: int = 4) -> ProgressRng:
        return ProgressRng(seed, step, phase, torch.arange(first, first + 4))

    same = rng().normal("noise", (5,))
    assert torch.equal(same, rng().normal("noise", (5,)))
    for other in (rng(seed=1), rng(step=4), rng(phase="critic"), rng(first=5)):
        assert not torch.equal(same, other.normal("noise", (5,)))
        assert other.dropout_seed != rng().dropout_seed
    assert not torch.equal(same, rng().normal("posterior", (5,)))
    assert rng().uniform("drop").shape == (4,)
    assert 0 <= rng().dropout_seed < 2**63


def test_shared_generator_is_equal_on_all_ranks() -> None:
    first, second = (
        torch.rand(3, generator=ProgressRng(0, 3, "main", torch.arange(r, r + 2)).shared("level")) for r in (0, 2)
    )
    assert torch.equal(first, second)
    other = torch.rand(3, generator=ProgressRng(0, 4, "main", torch.arange(2)).shared("level"))
    assert not torch.equal(first, other)


def test_empty_batch_and_wrong_positions() -> None:
    assert philox_normal(KEY, torch.empty(0, dtype=torch.int64), (3,)).shape == (0, 3)
    with pytest.raises(ValueError, match="int64 of shape"):
        philox_normal(KEY, torch.zeros(2), (3,))


def test_one_triton_kernel_makes_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = interpreted(monkeypatch)
    from nexus_scale.kernels import triton_random

    for places, blocks in ((torch.tensor([0, 5, 10**9 + 7]), 3), (torch.arange(2), 300)):
        found = triton_random.words((philox._signed(KEY[0]), philox._signed(KEY[1])), places, blocks)
        assert torch.equal(found, philox.words_numpy(KEY, places, blocks))
    assert launched == ["philox", "philox"]


def test_the_triton_kernel_compiles_for_an_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from nexus_scale.kernels import triton_random

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"POSITIONS": torch.int64, "WORDS": torch.int64}
    assert compiled(triton_random.philox, types, {"BLOCK": triton_random.BLOCK}, 4, tmp_path)["spilled"] == 0


@pytest.mark.parametrize("found", [None, torch.zeros(3, 1200, dtype=torch.int64)])
def test_a_gpu_without_that_kernel_has_the_twin_and_says_so(
    found: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = SimpleNamespace() if found is None else SimpleNamespace(words=lambda *_: found)
    monkeypatch.setattr("nexus_scale.kernels.triton_random", module, raising=False)
    monkeypatch.setitem(sys.modules, "nexus_scale.kernels.triton_random", module)
    monkeypatch.setattr(philox, "to_device", lambda value, device: value)
    choice.forget()
    assert philox._words_on.__wrapped__(torch.device("cuda")) is philox.words_plain
    assert "250 small kernels" in caplog.text


@pytest.mark.gpu
def test_gpu_draws_the_same_words() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    places = torch.arange(64)
    assert torch.equal(philox.philox_words(KEY, places, 128, "cuda").cpu(), philox.words_numpy(KEY, places, 128))
    assert torch.equal(philox_uniform(KEY, places, (1000,), "cuda").cpu(), philox_uniform(KEY, places, (1000,)))
    torch.testing.assert_close(
        philox_normal(KEY, places, (1000,), "cuda").cpu(), philox_normal(KEY, places, (1000,)), rtol=1e-6, atol=1e-6
    )
