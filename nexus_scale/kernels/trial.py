"""Tries the implementations of a kernel on the shapes that a run uses, as it starts: the fastest serves.

One rank tries and all take its figures, so that all decide alike; nothing is tried inside compiled code. What was found stands in the
run's environment.json, and later starts take it from there: an implementation has its own last bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels import blocked, choice, flash, heads
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.choice import Shape
from nexus_scale.kernels.timing import median_ms

log = logging.getLogger(__name__)

TOKENS = 16_384
"""Tokens of a trial: as many samples of a shape as have so many."""

MOST_SHAPES = {"attention": 8, "modulation": 1, "rope": 1}
"""Shapes of a kernel tried at a start, those first that take the most time: a network has two or three, more with buckets of lengths.
To compile what is tried takes some seconds."""

ALIKE = ("modulation", "rope")
"""Kernels whose fastest implementation for one shape serves the others, whatever the number of tokens."""

MOST_LOGITS = 1 << 26
"""Scores of a sample: torch's plain kernel, which holds them all, is not tried where there are more."""

WRONG = 0.05
"""Part of the largest value by which a result may differ from plain torch's; one that differs more is left out."""

Agree = Callable[[list[int]], list[int]]
"""Rank 0's numbers on every rank."""

Trial = Callable[[], list[Tensor]]
"""A forward and backward pass; returns results and gradients."""


@dataclass(frozen=True)
class Found:
    """What a trial found for a kernel and a shape: the fastest implementation, and microseconds of each that could run."""

    kernel: str
    shape: Shape
    fastest: str
    microseconds: Mapping[str, int]

    def row(self) -> dict[str, Any]:
        """For a file."""
        return {
            "kernel": self.kernel,
            "shape": list(self.shape),
            "fastest": self.fastest,
            "microseconds": dict(self.microseconds),
        }


def found_in(rows: Sequence[Mapping[str, Any]]) -> list[Found]:
    """What `Found.row` wrote; what a damaged file has instead is left out, and tried again."""
    found = []
    for row in rows:
        kernel, shape, fastest = row.get("kernel"), row.get("shape"), row.get("fastest")
        if kernel in MADE and fastest in choice.OPTIONS[kernel] and isinstance(shape, list):
            found.append(Found(kernel, tuple(shape), fastest, row.get("microseconds") or {}))
    return found


def settle(
    seen: Mapping[tuple[str, Shape], int],
    known: Sequence[Found],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tries: bool,
    agree: Agree,
    deterministic: bool = False,
    compiled: bool = False,
) -> list[Found]:
    """Has the fastest implementations serve: those known from the run's first start, and for other shapes those of a trial. A collective.

    Args:
        seen: shapes by kernel, with how often each is called; of kernels that the user left to the program.
        known: from the run's folder.
        dtype: of activations.
        tries: on the rank that tries. Others give zeros.
        agree: gives all ranks that rank's figures.
        deterministic: without implementations that do not repeat.
        compiled: blocks are compiled; plain torch is tried as a compiler fuses it.
    Returns:
        known, and what was tried.
    Raises:
        UserError: the first start chose what cannot run here.
    """
    found = [f for f in known if not (deterministic and (f.kernel, f.fastest) in choice.NOT_REPEATING)]
    _check(found, device)
    for kernel in MADE:
        new = [
            shape
            for name, shape in seen
            if name == kernel and not any((f.kernel, f.shape) == (kernel, shape) for f in found)
        ]
        new.sort(key=lambda shape: (-seen[kernel, shape] * math.prod(shape[:4]), shape))
        for shape in new[: MOST_SHAPES[kernel]]:
            found.append(_tried(kernel, shape, device, dtype, tries, agree, deterministic, compiled))
        first = next((f.fastest for f in found if f.kernel == kernel), None)
        if kernel in ALIKE and first is not None:
            found += [Found(kernel, shape, first, {}) for shape in new[MOST_SHAPES[kernel] :]]
    forms = [f.fastest for f in found if f.fastest in flash.FORMS]
    flash.take_in(max(set(forms), key=forms.count) if forms else None)
    choice.prefer({(f.kernel, _key(f.kernel, f.shape)): f.fastest for f in found})
    if device.type == "cuda" and tries and len(found) > len(known):
        torch.cuda.empty_cache()
    return found


def _key(kernel: str, shape: Shape) -> Shape:
    """What an implementation is chosen by as it is called: the shape, or what is left of it without its tokens."""
    return shape[1:] if kernel in ALIKE else shape


def shared(seen: Mapping[tuple[str, Shape], int], agree: Agree) -> dict[tuple[str, Shape], int]:
    """Rank 0's shapes on every rank. A collective."""
    kernels = list(MADE)
    rows = [
        [kernels.index(k), n, len(shape), *map(int, shape), *[0] * (5 - len(shape))]
        for (k, shape), n in seen.items()
        if k in MADE
    ]
    (number,) = agree([len(rows)])
    numbers = agree([value for row in rows for value in row][: 8 * number] + [0] * 8 * (number - len(rows)))
    taken = [numbers[8 * i : 8 * i + 8] for i in range(number)]
    return {(kernels[k], tuple(rest[:length])): n for k, n, length, *rest in taken}


def _check(known: Sequence[Found], device: torch.device) -> None:
    for kernel in {f.kernel for f in known}:
        here = choice.possible(kernel, device)
        for f in known:
            if f.kernel == kernel and f.fastest not in here:
                raise UserError(
                    f"kernels.{kernel}: the run's first start chose {f.fastest}, which cannot run here; the last bits differ with another: "
                    f"name one, for example kernels.{kernel}={here[0]}, with --allow-change cluster.kernels",
                    code=5,
                )


def _tried(
    kernel: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    tries: bool,
    agree: Agree,
    deterministic: bool,
    compiled: bool,
) -> Found:
    """The fastest of the implementations for one shape, by rank 0's figures."""
    options = choice.OPTIONS[kernel]
    own = [0] * len(options)
    here = choice.possible(kernel, device)
    usable = [
        option
        for option in here
        if not (deterministic and (kernel, option) in choice.NOT_REPEATING)
        and (option != "torch_math" or math.prod((shape[0], *shape[2:4])) <= MOST_LOGITS)
    ]
    if tries and len(usable) > 1:
        times = _times(kernel, shape, usable, device, dtype, compiled)
        own = [times.get(option, 0) for option in options]
    microseconds = {option: us for option, us in zip(options, agree(own), strict=True) if us}
    fastest = min(microseconds, key=microseconds.__getitem__) if microseconds else choice.chosen(kernel)
    log.info(
        "%s of %s: %s; %s serves", kernel, LABELS[kernel](shape),
        ", ".join(f"{option} {us / 1e3:.3f} ms" for option, us in microseconds.items()) or "nothing could be tried", fastest,
    )  # fmt: skip
    return Found(kernel, shape, fastest, microseconds)


def _times(
    kernel: str, shape: Shape, options: Sequence[str], device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, int]:
    """Microseconds by implementation; without those that fail or are wrong, which is logged."""
    times, exact = {}, None
    for option in sorted(
        options, key=lambda option: option != choice.PLAIN[kernel]
    ):  # plain torch first: it is what others must equal
        try:
            with serving(kernel, shape, option):
                trial = MADE[kernel](shape, device, dtype, compiled)
                results = trial()
                exact = results if exact is None else exact
                if _differs(results, exact):
                    log.warning("%s: %s is left out: it differs from %s", kernel, option, choice.PLAIN[kernel])
                    continue
                times[option] = max(1, round(1e3 * median_ms(trial, device, warm=1)))
        except (
            Exception
        ) as error:  # each library has its own way to say that it has no kernel, or no memory, for a shape
            log.info(
                "%s: %s is left out for %s: %s", kernel, option, LABELS[kernel](shape), str(error).splitlines()[:1]
            )
    return times


@contextmanager
def serving(kernel: str, shape: Shape, option: str) -> Iterator[None]:
    """A context in which one implementation serves a shape."""
    try:
        choice.prefer({(kernel, _key(kernel, shape)): option})
        flash.take_in(option if option in flash.FORMS else None)
        yield
    finally:
        choice.prefer({})
        flash.take_in(None)


def _differs(results: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    return any(
        not torch.isfinite(got).all()
        or float((got.float() - wanted.float()).abs().max()) > WRONG * float(wanted.float().abs().max())
        for got, wanted in zip(results, exact, strict=True)
    )


# ------------------------------------------------------------------------------------------- what is tried


def _drawn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def attention_trial(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Trial:
    """Of (heads, head dim, queries, keys, whether masked); queries, keys and values lie as a projection of tokens leaves them."""
    N, E, L, S, masked = shape
    B = max(1, TOKENS // max(L, S))
    q, k, v = (
        _drawn(B, length, N, E, seed=i, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for i, length in enumerate((L, S, S))
    )
    mask = None
    if masked:
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool, device=device)
        mask[:, :, :, S - S // 4 :] = False
    dy = _drawn(B, L, N, E, seed=3, device=device, dtype=dtype).transpose(1, 2)

    def trial() -> list[Tensor]:
        y = attention(q, k, v, mask=mask)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]

    return trial


def modulation_trial(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Trial:
    """Of (tokens of a sample, features): what a block does to its stream, before, between and after its two branches. Each is compiled by
    itself, since matrix products lie between them."""
    L, D = shape
    B = max(1, TOKENS // L)
    x, y, y2, dn, dn2, dx = (_drawn(B, L, D, seed=i, device=device, dtype=dtype) for i in range(6))
    vectors = _drawn(B, 6 * D, seed=6, device=device, dtype=dtype).requires_grad_()
    streams = [t.requires_grad_() for t in (x, y, y2)]
    steps: list[Any] = [blocked.branch, blocked.gated_branch, blocked.gated_add]
    before, between, after = (torch.compile(step, dynamic=False) for step in steps) if compiled else steps

    def trial() -> list[Tensor]:
        shift, scale, gate, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
        stream, n = before(x, shift, scale, 1e-6)
        stream, n2 = between(stream, gate, y, shift2, scale2, 1e-6)
        outs = n, n2, after(stream, gate2, y2)
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, (*streams, vectors), (dn, dn2, dx))]

    return trial


def heads_trial(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Trial:
    """Of (tokens, heads, head dim, norm, whether turned): one stream, from its projection to what attention takes."""
    S, N, E, norm, turned = shape
    B = max(1, TOKENS // S)
    qkv = _drawn(B, S, 3 * N * E, seed=0, device=device, dtype=dtype).requires_grad_()
    count = {heads.PLAIN: 0, heads.RMS: 2, heads.LAYER: 4}[norm]
    weights = [
        (1 + _drawn(E, seed=i, device=device, dtype=dtype) / 8).detach().requires_grad_() for i in range(1, 1 + count)
    ]
    rotation = None
    if turned:
        angles = torch.arange(S, device=device)[:, None] / torch.arange(1, E // 2 + 1, device=device)
        rotation = angles.cos(), angles.sin()
    dys = [_drawn(B, S, N, E, seed=i, device=device, dtype=dtype) for i in range(3)]

    def split(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if heads.serves((qkv,), N, norm, rotation):
            return heads.joined((qkv,), weights, rotation, norm=norm, num_heads=N, eps=1e-6)
        return heads.plain((qkv,), weights, rotation, norm, 1, N, 1e-6, 0)

    run = torch.compile(split, dynamic=False) if compiled else split

    def trial() -> list[Tensor]:
        outs = run(qkv, *weights)
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, (qkv, *weights), dys)]

    return trial


MADE: dict[str, Callable[[Shape, torch.device, torch.dtype, bool], Trial]] = {
    "attention": attention_trial,
    "modulation": modulation_trial,
    "rope": heads_trial,
}
"""What is tried, by kernel."""

PASSES = {"modulation": 9 + 13, "rope": 4 + 8}
"""Over an activation, forward and backward, that a trial needs at least: what is read once and written once."""

RATES: tuple[tuple[str, Shape], ...] = (
    ("modulation", (256, 1152)),
    ("rope", (1178, 24, 64, heads.RMS, 0)),
    ("modulation", (1024, 1536)),
    ("rope", (4608, 24, 128, heads.RMS, 1)),
    ("modulation", (17550, 1920)),
    ("rope", (17776, 30, 64, heads.LAYER, 0)),
)
"""Shapes of DiT-XL, SD3, FLUX and CogVideoX-2B, for `rates`."""


def rates(
    device: torch.device, dtype: torch.dtype, *, compiled: bool, shapes: Sequence[tuple[str, Shape]] = RATES
) -> Iterator[dict[str, Any]]:
    """Milliseconds of each implementation of modulation and heads, and GB/s by the bytes that are needed: beside a copy's, how much of
    the memory's speed it has."""
    for kernel, shape in shapes:
        B = max(1, TOKENS // shape[0])
        moved = PASSES[kernel] * B * (shape[0] * shape[1] * (shape[2] if kernel == "rope" else 1)) * dtype.itemsize
        times = _times(kernel, shape, choice.possible(kernel, device), device, dtype, compiled)
        for option, us in times.items():
            yield {
                "kernel": f"{kernel}: {option}",
                "shape": list(shape),
                "ms": us / 1e3,
                "bytes_needed": moved,
                "gb_per_second": moved / us / 1e3,
            }


LABELS: dict[str, Callable[[Shape], str]] = {
    "attention": lambda s: (
        f"{s[0]} heads of {s[1]}, {s[2]} queries, {s[3]} keys, {'with' if s[4] else 'without'} a mask"
    ),
    "modulation": lambda s: f"{s[0]} tokens of {s[1]}",
    "rope": lambda s: f"{s[0]} tokens of {s[1]} heads of {s[2]}, norm {s[3]}, {'turned' if s[4] else 'not turned'}",
}
