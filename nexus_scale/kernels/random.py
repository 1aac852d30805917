"""Random numbers as a function of progress: Philox4x64-10 keyed by (seed, step, phase, name), counted by position.

A sample's numbers depend on the key and on its place in the global batch alone, so neither the number of workers nor the
micro-batch size changes them. Words come from numpy's C generator on the CPU, from one Triton kernel on a GPU, and elsewhere from
the plain twin in torch's int64 arithmetic; all give the same bits. Words become normals in float64, rounded once to float32:
the vector libraries of different processors differ in a double's last place, which that rounding all but always hides.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"; Box & Muller 1958.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nexus_scale.contracts import keep_on_host
from nexus_scale.kernels.choice import warn_once
from nexus_scale.kernels.transfer import constant, to_device

Key = tuple[int, int]

WORDS_PER_BLOCK = 4  # Philox4x64 turns one counter into four 64-bit words
VALUES_PER_BLOCK = 8  # each word yields two values, one per 32-bit half

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF

_GAP_WORDS = 2048
"""Runs of positions closer than this are drawn as one: a new generator costs 6 us, as much as 2,000 words."""

_DEVICE_WORDS = 16384
"""On an accelerator, fewer words than this are made by numpy and copied."""


def replayed(device: torch.device) -> AbstractContextManager[None]:
    """What torch's own generators draw within it, such as a dropout's mask, they draw again after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def derive_key(*parts: object) -> Key:
    """A 128-bit key from anything whose `repr` is stable: integers, floats, strings, tuples of them.

    Returns:
        Two integers in [0, 2**64).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


# ------------------------------------------------------------------------------------------------ words


def _signed(word: int) -> int:
    """The int64 with the bits of `word` in [0, 2**64)."""
    return word - (1 << 64) if word >> 63 else word


def words_plain(key: Key, positions: Tensor, blocks: int) -> Tensor:
    """The plain twin of numpy.random.Philox, in int64 arithmetic on the device of `positions`.

    Args:
        key: two integers in [0, 2**64).
        positions: non-negative, (B,) int64; position p owns counters p*blocks + 1 .. (p+1)*blocks, as numpy counts.
        blocks: counters per sample, at least 1.
    Returns:
        (B, 4*blocks) int64: the bits of numpy's uint64 words.
    """
    # Low counter word as int64; the three above it stay 0: positions * blocks < 2**63.
    counters = positions[:, None] * blocks + torch.arange(1, blocks + 1, device=positions.device)  # (B, blocks)
    zero = torch.zeros_like(counters)
    even = torch.stack([counters, zero])  # (2, B, blocks): words 0 and 2
    odd = torch.stack([zero, zero])  # (2, B, blocks): words 1 and 3

    multiplier = constant(tuple(map(_signed, _MULTIPLIERS)), torch.int64, positions.device)[:, None, None]  # (2, 1, 1)
    multiplier_low, multiplier_high = multiplier & _MASK32, (multiplier >> 32) & _MASK32
    schedule = [
        [_signed((word + i * weyl) & _MASK64) for word, weyl in zip(key, _WEYL, strict=True)] for i in range(_ROUNDS)
    ]
    for round_key in to_device(torch.tensor(schedule), positions.device)[:, :, None, None]:  # (2, 1, 1) each
        # The 128-bit product from four 32-bit ones; `>> 32` is arithmetic on int64, hence the masks.
        low, high = even & _MASK32, (even >> 32) & _MASK32
        low_low, high_low = low * multiplier_low, high * multiplier_low
        low_high, high_high = low * multiplier_high, high * multiplier_high
        middle = ((low_low >> 32) & _MASK32) + (high_low & _MASK32) + low_high  # < 2**64 as unsigned
        top = high_high + ((high_low >> 32) & _MASK32) + ((middle >> 32) & _MASK32)
        bottom = even * multiplier
        # Words 0 and 2 come from the *other* multiplication: x0' = hi(M1*x2) ^ x1 ^ k0, x2' = hi(M0*x0) ^ x3 ^ k1.
        even, odd = top.flip(0) ^ odd ^ round_key, bottom.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1).flatten(1)  # (B, blocks, 4) -> (B, 4*blocks)


def words_numpy(key: Key, positions: Tensor, blocks: int) -> Tensor:
    """As `words_plain`, by numpy's C: one generator per run of neighbouring positions. CPU only."""
    places = positions.numpy()
    width = blocks * WORDS_PER_BLOCK
    key_words = np.array(key, dtype=np.uint64)

    def run(first: int, last: int) -> np.ndarray:
        counter = first * blocks
        start = np.array([counter & _MASK64, counter >> 64, 0, 0], dtype=np.uint64)
        generator = np.random.Philox(key=key_words, counter=start)
        return np.asarray(generator.random_raw((last - first + 1) * width)).view(np.int64).reshape(-1, width)

    first, last, count = int(places[0]), int(places[-1]), len(places)
    if last - first == count - 1 and (count < 3 or bool((places[1:] - places[:-1] == 1).all())):
        return torch.from_numpy(run(first, last))
    # Positions in any order: sort, draw each run with its small gaps, pick the rows.
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    breaks = np.flatnonzero(np.diff(ordered) * width > _GAP_WORDS + width) + 1
    words = np.empty((count, width), dtype=np.int64)
    for part in np.split(np.arange(count), breaks):
        begin, end = int(ordered[part[0]]), int(ordered[part[-1]])
        words[order[part]] = run(begin, end)[ordered[part] - begin]
    return torch.from_numpy(words)


def philox_words(key: Key, positions: Tensor, blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """Words of each sample, (B, 4*blocks) int64 on `device`, by whichever path is faster there; the bits are equal."""
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions: got {positions.dtype} of shape {tuple(positions.shape)}; expected int64 of shape (B,)"
        )
    device = torch.device(device)
    if len(positions) == 0:
        return torch.empty(0, blocks * WORDS_PER_BLOCK, dtype=torch.int64, device=device)
    if device.type == "cpu" or len(positions) * blocks * WORDS_PER_BLOCK < _DEVICE_WORDS:
        return to_device(words_numpy(key, positions.cpu(), blocks), device)
    return _words_on(device)(key, to_device(positions, device), blocks)


Words = Callable[[Key, Tensor, int], Tensor]


@lru_cache(maxsize=8)
def _words_on(device: torch.device) -> Words:
    """Triton's kernel where it makes numpy's words here, which is tried once and waits for the device; otherwise the plain twin."""
    if device.type != "cuda":
        return words_plain
    places = torch.arange(3)
    try:
        from nexus_scale.kernels import triton_random

        found = triton_random.words((-5, 2**40), to_device(places, device), 300)
        differs = not torch.equal(found.cpu(), words_numpy((2**64 - 5, 2**40), places, 300))
        why = "its words differ from numpy's" if differs else ""
    except (
        Exception
    ) as error:  # no Triton, no compiler for it, a card that it does not know: the twin serves everywhere
        why = f"{type(error).__name__}: {error}"
    if why:
        warn_once(f"random numbers are drawn by some 250 small kernels instead of Triton's one: {why}")
        return words_plain
    return lambda key, positions, blocks: triton_random.words((_signed(key[0]), _signed(key[1])), positions, blocks)


# ------------------------------------------------------------------------------------- words to numbers


def _halves(words: Tensor) -> Tensor:
    """(B, W) int64 -> (B, W, 2) int32: the low and the high half of each word."""
    assert sys.byteorder == "little", "the halves of a word are told apart by their order in memory"
    return words.view(torch.int32).view(*words.shape, 2)


def _blocks(shape: Sequence[int]) -> int:
    return max(1, -(-math.prod(shape) // VALUES_PER_BLOCK))


def philox_normal(key: Key, positions: Tensor, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal draws by Box-Muller, the row of position p a function of (key, p, shape) alone.

    Args:
        key: two integers in [0, 2**64), from `derive_key`.
        positions: place of each sample in the global batch, (B,) int64 on the CPU.
        shape: of one sample; () gives one number per sample.
        device: where the draws are wanted.
    Returns:
        (B, *shape) float32, of magnitude at most 6.67 (u1 has 32 bits).
    """
    words = philox_words(key, positions, _blocks(shape), device)
    size = math.prod(shape)
    half = (
        (size + 1) // 2 if size > VALUES_PER_BLOCK else WORDS_PER_BLOCK
    )  # words needed: each gives a cosine and a sine
    numbers = _halves(words)[:, :half].to(torch.float64)  # (B, W, 2), in [-2^31, 2^31)
    # u1 = (k + 1) / 2^32 for k in 0 .. 2^32 - 1 lies in (0, 1]: its logarithm is finite.
    radius = numbers[..., 0].mul(2.0**-32).add_(0.5 + 2.0**-32).log_().mul_(-2.0).sqrt_()  # (B, W)
    angle = numbers[..., 1].mul(2.0 * math.pi * 2.0**-32)  # (B, W), in [-pi, pi)
    draws = torch.empty(len(radius), 2, half, dtype=torch.float32, device=radius.device)
    torch.mul(angle.cos(), radius, out=draws[:, 0])
    torch.mul(angle.sin_(), radius, out=draws[:, 1])
    return draws.view(-1, 2 * half)[:, :size].reshape(len(radius), *shape)


def philox_uniform(
    key: Key, positions: Tensor, shape: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform draws in [0, 1), multiples of 2**-24: each is exact in float32. Arguments as for `philox_normal`.

    Returns:
        (B, *shape) float32. Of a few numbers the host keeps the values, too (`contracts.on_host`): they decide what is dropped.
    """
    device, blocks = torch.device(device), _blocks(shape)
    if device.type != "cpu" and len(positions) * blocks * WORDS_PER_BLOCK < _DEVICE_WORDS:
        here = philox_uniform(key, positions.cpu(), shape)  # exact on every device
        return keep_on_host(to_device(here, device), here)
    halves = _halves(philox_words(key, positions, blocks, device)).flatten(1)  # (B, 2W)
    halves = halves[:, : math.prod(shape)]
    upper = (halves >> 8) & 0xFFFFFF  # the shift is arithmetic; the mask drops the sign
    return upper.to(torch.float32).mul_(2.0**-24).reshape(len(positions), *shape)


class ProgressRng:
    """`contracts.Rng` for one micro-batch: draws keyed by (seed, step, phase, position in the global batch, name).

    The same name and shape give the same draws again, so each draw of an objective has its own name.

    Args:
        occurrence: number of earlier phases of this name in the step; each occurrence has new draws.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        phase: str,
        positions: Tensor,
        device: torch.device | str = "cpu",
        occurrence: int = 0,
    ):
        self.seed, self.step, self.phase, self.occurrence = int(seed), int(step), str(phase), int(occurrence)
        self.positions, self.device = positions, torch.device(device)

    def __repr__(self) -> str:
        return f"ProgressRng(seed={self.seed}, step={self.step}, phase={self.phase!r}, batch={len(self.positions)})"

    def _key(self, kind: str, name: object) -> Key:
        # The first occurrence is keyed as before there were others; no phase is named like a tuple's repr within one.
        phase = (self.phase, self.occurrence) if self.occurrence else self.phase
        return derive_key(self.seed, self.step, phase, kind, name)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, (B, *shape) float32 on the device."""
        return philox_normal(self._key("sample", name), self.positions, shape, self.device)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape) float32 on the device."""
        return philox_uniform(self._key("sample", name), self.positions, shape, self.device)

    def shared(self, name: str) -> torch.Generator:
        """A CPU generator that does not depend on the positions: equal on all ranks."""
        generator = torch.Generator()
        generator.manual_seed(self._key("shared", name)[0] >> 1)
        return generator

    @property
    def dropout_seed(self) -> int:
        """Seed in [0, 2**63) for dropout inside networks; depends on the micro-batch through its first position."""
        first = int(self.positions[0]) if len(self.positions) else 0
        return self._key("dropout", first)[0] >> 1
