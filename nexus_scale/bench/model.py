"""Our MMDiT, forward and backward, against diffusers' SD3Transformer2DModel with the same weights, on the CPU.

Both run in one process on the same inputs, in turns, each going first in every other round: what slows the machine down
slows both. Time is CPU time, which a busy machine disturbs less than the clock does, and of one thread unless asked
otherwise: threads that wait for one another spin, and spinning counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.interop.mmdit import DIFFUSERS
from nexus_scale.models.diffusion.mmdit import MMDiT

BATCH_SIZE, TEXT_TOKENS = 8, 32
MODEL_ARGS: dict[str, Any] = {
    "latent_channels": 16,
    "latent_size": 32,  # 256 image tokens
    "patch_size": 2,
    "hidden_size": 384,
    "depth": 6,
    "num_heads": 6,
    "text_dim": 4096,
    "pooled_dim": 2048,
    "pos_embed_max_size": 192,
}
VARIANTS: dict[str, dict[str, Any]] = {"sd3": {"qk_norm": None}, "qk_norm": {"qk_norm": "rms_norm"}}


class Inputs(NamedTuple):
    """x (B, C, H, W), t (B,), text (B, T, text_dim), pooled (B, pooled_dim); `direction`: gradient of y, like x."""

    x: Tensor
    t: Tensor
    text: Tensor
    pooled: Tensor
    direction: Tensor


def run(rounds: int = 10, threads: int | None = None) -> dict[str, Any]:
    """CPU time of both networks, without and with RMS norm of queries and keys.

    Args:
        rounds: how often each is timed, after one run that is not counted.
        threads: of torch; one by default.
    Returns:
        `ratio`: ours over diffusers', by medians of CPU time, of the variant that is worse for us; `ours` and
        `peers.diffusers` with that variant's figures; `variants` with all; `max_relative_error` over outputs and
        gradients.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or 1)
    try:
        variants = {name: _compare(MODEL_ARGS | changes, rounds) for name, changes in VARIANTS.items()}
    finally:
        torch.set_num_threads(before)
    worst = max(variants.values(), key=lambda variant: variant["ratio"])
    return {
        "name": "model",
        "ratio": worst["ratio"],
        "ours": worst["ours"],
        "peers": {"diffusers": worst["diffusers"]},
        "variants": variants,
        "max_relative_error": max(variant["max_relative_error"] for variant in variants.values()),
        "settings": MODEL_ARGS
        | {
            "batch_size": BATCH_SIZE,
            "text_tokens": TEXT_TOKENS,
            "dtype": "float32",
            "rounds": rounds,
            "threads": threads or 1,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"torch": torch.__version__, "diffusers": version("diffusers")},
    }


def _compare(model_args: dict[str, Any], rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = _pair(model_args, generator)
    inputs = _inputs(model_args, generator)
    timesteps = inputs.t * 1000.0

    def run_ours() -> Tensor:
        y: Tensor = ours(inputs.x, inputs.t, {"text": inputs.text, "pooled": inputs.pooled})
        return y

    def run_theirs() -> Tensor:
        y: Tensor = theirs(inputs.x, inputs.text, inputs.pooled, timesteps, return_dict=False)[0]
        return y

    sides: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "ours": (ours, run_ours),
        "diffusers": (theirs, run_theirs),
    }

    # the untimed run: both compute the same
    outputs = {name: _step(net, forward, inputs.direction)[0] for name, (net, forward) in sides.items()}
    error = max(_error(outputs["ours"], outputs["diffusers"]), _gradient_error(ours, theirs, model_args))

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in sides if i % 2 == 0 else reversed(sides):
            net, forward = sides[name]
            times[name].append(_step(net, forward, inputs.direction)[1])
    figures = {name: _figures(measured) for name, measured in times.items()}
    ratio = figures["ours"]["cpu_seconds"]["median"] / figures["diffusers"]["cpu_seconds"]["median"]
    return {"ratio": ratio, **figures, "max_relative_error": error}


def _pair(model_args: dict[str, Any], generator: torch.Generator) -> tuple[MMDiT, nn.Module]:
    """diffusers' network with every parameter random, those that start as zero too, and ours with its weights."""
    from diffusers import SD3Transformer2DModel

    ours = MMDiT(**model_args)
    with torch.no_grad():
        for p in ours.parameters():
            std = 0.1 if p.dim() == 1 else p.shape[1] ** -0.5
            p.normal_(std=std, generator=generator)
    config, state = DIFFUSERS.to_theirs(ours.state_dict(), model_args)
    theirs = SD3Transformer2DModel.from_config(config)
    theirs.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return ours, theirs


def _inputs(model_args: dict[str, Any], generator: torch.Generator) -> Inputs:
    C, size = model_args["latent_channels"], model_args["latent_size"]
    return Inputs(
        x=torch.randn(BATCH_SIZE, C, size, size, generator=generator),
        t=torch.rand(BATCH_SIZE, generator=generator),
        text=torch.randn(BATCH_SIZE, TEXT_TOKENS, model_args["text_dim"], generator=generator),
        pooled=torch.randn(BATCH_SIZE, model_args["pooled_dim"], generator=generator),
        direction=torch.randn(BATCH_SIZE, C, size, size, generator=generator),
    )


def _step(net: nn.Module, forward: Callable[[], Tensor], direction: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """One forward and backward; the output, and (CPU, wall) seconds."""
    net.zero_grad(set_to_none=True)
    cpu, wall = time.process_time(), time.perf_counter()
    y = forward()
    y.backward(direction)
    return y.detach(), (time.process_time() - cpu, time.perf_counter() - wall)


def _figures(measured: list[tuple[float, float]]) -> dict[str, Any]:
    cpu, wall = zip(*measured, strict=True)
    return {
        "cpu_seconds": {"median": statistics.median(cpu), "min": min(cpu)},
        "wall_seconds": {"median": statistics.median(wall), "min": min(wall)},
    }


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _gradient_error(ours: MMDiT, theirs: nn.Module, model_args: dict[str, Any]) -> float:
    """Largest relative error over the gradients of all matrices, ours converted as weights are.

    Without a norm of keys their biases have no gradient but rounding noise, which says nothing."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    _, converted = DIFFUSERS.to_theirs(grads, model_args)
    return max(
        _error(converted[n], p.grad)
        for n, p in theirs.named_parameters()
        if p.grad is not None and p.dim() > 1 and bool(p.grad.any())
    )
