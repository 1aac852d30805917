"""What `nexus bench gpu` measures, in order of importance: each case is a process of its own.

Full sizes are those of the recipes' papers. In miniature (`tiny`) the recipes' own `tiny:` blocks serve, so that every line of every case
runs on a CPU in a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Mapping[str, Any]]
"""The fields of a batch, as `data.synthetic.fields` has them; here `lengths: true` means a mask that is true everywhere."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        recipe, overrides: at its full size.
        fields: of a sample.
        micro_batch: a size that fits a card of 80 GB, at which sides are compared.
        phase: of the objective, the only one that runs; empty: all.
        theirs: the module of interop whose `DIFFUSERS` describes the peer.
        checkpointing: blocks are computed again in the backward pass, on both sides.
    """

    recipe: str
    fields: Fields
    micro_batch: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    phase: str = ""
    theirs: str = ""
    checkpointing: bool = False


DIT = Task(
    "dit/xl2_imagenet",
    {
        "moments": {"shape": [8, 32, 32]},
        "moments_mirrored": {"shape": [8, 32, 32]},
        "label": {"shape": [], "dtype": "int64", "high": 1000},
    },
    micro_batch=64,
    overrides={"optimizer": {"clip_grad_norm": 1.0}},
    theirs="dit",
)
SD3 = Task(
    "mmdit/sd3_2b",
    {
        "moments": {"shape": [32, 64, 64]},
        "text": {"shape": [77, 768]},
        "text_2": {"shape": [77, 1280]},
        "text_3": {"shape": [77, 4096]},
        "pooled": {"shape": [768]},
        "pooled_2": {"shape": [1280]},
    },
    micro_batch=8,
    theirs="mmdit",
)
COGVIDEOX = Task(
    "cogvideox/2b",
    {
        "moments": {"shape": [32, 13, 60, 90]},
        "text": {"shape": [226, 4096]},
    },
    micro_batch=1,
    theirs="cogvideox",
    checkpointing=True,
)
VALLE = Task(
    "valle/paper",
    {
        "codes": {"shape": [824, 8], "dtype": "int64", "high": 1024, "lengths": True},
        "phonemes": {"shape": [200], "dtype": "int64", "high": 512, "lengths": True},
    },
    micro_batch=16,
    overrides={"data": {"tokens": {"codes": 824, "phonemes": 200}}},
    phase="ar",
)
SMALL = Task(
    "mmdit/tiny_openmoji",
    {
        "moments": {"shape": [32, 8, 8]},
        "moments_mirrored": {"shape": [32, 8, 8]},
        "text": {"shape": [16, 384]},
        "pooled": {"shape": [384]},
    },
    micro_batch=128,
    overrides={"networks": {"model": {"hidden_size": 512, "depth": 8, "num_heads": 8}}},
    theirs="mmdit",
)
SD15 = Task(
    "stable_diffusion/sd15",
    {"moments": {"shape": [8, 64, 64]}, "text": {"shape": [77, 768]}},
    micro_batch=16,
    overrides={"networks": {"model": {"init_from": None}}},
)
LORA = Task(
    "lora/tiny_line_art",
    SD15.fields,
    micro_batch=16,
    overrides={
        "networks": {
            "base": {
                "latent_channels": 4,
                "latent_size": 64,
                "widths": [320, 640, 1280, 1280],
                "depth": 2,
                "transformer_depth": [1, 1, 1, 0],
                "num_heads": 8,
                "text_dim": 768,
                "num_groups": 32,
                "init_from": None,
            }
        },
        "data": {"text_tokens": 77},
        "objective": {"mirror": False},
    },
)
R3GAN = Task(
    "r3gan/imagenet64",
    {"image": {"shape": [3, 64, 64]}, "label": {"shape": [], "dtype": "int64", "high": 1000}},
    micro_batch=16,
)
MUSICGEN = Task(
    "musicgen/small",
    {
        "codes": {"shape": [1500, 4], "dtype": "int64", "high": 2048},
        "text": {"shape": [64, 768], "lengths": True},
    },
    micro_batch=8,
)
MUSIC = Task("musicgen/small", MUSICGEN.fields, micro_batch=4, overrides={"sample": {"max_tokens": 500}})


@dataclass(frozen=True)
class Case:
    """A process.

    Attributes:
        kind: which function of the worker serves it.
        task: what is trained, where the kind trains.
        cluster: settings of the cluster file beside `precision: bf16` and `compile: true`; where it names kernels that the device has not,
            the case is one row that says why.
        largest: also at the largest micro-batch that fits.
        seconds: that it takes on an H100; it is not begun with less time left than half of them.
    """

    kind: str
    task: Task | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)
    largest: bool = True
    seconds: float = 50.0


ZERO3: Mapping[str, Any] = {"engine": "deepspeed", "workers": 1}
LOCAL: Mapping[str, Any] = {"engine": "local", "workers": 0, "zero_stage": 0}

CASES: dict[str, Case] = {
    "ceilings": Case("ceilings", seconds=15),
    "dit_zero3": Case("ours", DIT, ZERO3, seconds=70),
    "dit_local": Case("ours", DIT, LOCAL, largest=False, seconds=40),
    "dit_diffusers": Case("diffusers", DIT, largest=False, seconds=60),
    "sd3_zero3": Case("ours", SD3, ZERO3, seconds=90),
    "small_zero3": Case("ours", SMALL, ZERO3, largest=False, seconds=50),
    "small_graphs": Case("ours", SMALL, {**LOCAL, "cuda_graphs": True}, largest=False, seconds=50),
    "valle_zero3": Case("ours", VALLE, ZERO3, largest=False, seconds=40),
    "cogvideox_zero3": Case("ours", COGVIDEOX, ZERO3, largest=False, seconds=90),
    "sd15_local": Case("ours", SD15, LOCAL, largest=False, seconds=60),
    "lora_local": Case("ours", LORA, LOCAL, largest=False, seconds=60),
    "r3gan_local": Case("ours", R3GAN, LOCAL, largest=False, seconds=50),
    "musicgen_local": Case("ours", MUSICGEN, LOCAL, largest=False, seconds=50),
    "musicgen_draws": Case("draws", MUSIC, seconds=60),
    "optimizer": Case("optimizer", seconds=40),
    "attention": Case("attention", seconds=40),
    "sd3_diffusers": Case("diffusers", SD3, seconds=80),
    "dit_deterministic": Case("ours", DIT, {**LOCAL, "deterministic": True}, largest=False),
    "dit_fp8": Case("ours", DIT, {**ZERO3, "kernels": {"linear": "fp8"}}, largest=False, seconds=60),
    "fused": Case("fused", seconds=80),
    "blocks": Case("blocks", seconds=90),
    "small_local": Case("ours", SMALL, LOCAL, largest=False, seconds=30),
    "small_diffusers": Case("diffusers", SMALL, largest=False, seconds=30),
    "cogvideox_diffusers": Case("diffusers", COGVIDEOX, seconds=90),
    "sd3_local": Case("ours", SD3, LOCAL, largest=False, seconds=70),
}
"""By name, the most important first."""

WANTED: dict[str, tuple[str, str, float]] = {
    "dit_zero3_over_local": ("dit_zero3", "dit_local", 0.95),
    "dit_zero3_over_diffusers": ("dit_zero3", "dit_diffusers", 1.05),
    "sd3_zero3_over_diffusers": ("sd3_zero3", "sd3_diffusers", 1.0),
    "cogvideox_zero3_over_diffusers": ("cogvideox_zero3", "cogvideox_diffusers", 1.0),
    "small_graphs_over_zero3": ("small_graphs", "small_zero3", 1.0),
    "small_zero3_over_diffusers": ("small_zero3", "small_diffusers", 1.0),
    "dit_deterministic_over_local": ("dit_deterministic", "dit_local", 0.0),
    "dit_fp8_over_bf16": ("dit_fp8", "dit_zero3", 0.0),
}
"""Ratios of samples a second at the same micro-batch, and the least that is wanted; 0: it is to be known."""

WANTED_MFU = {"dit_zero3": 0.42, "sd3_zero3": 0.42, "cogvideox_zero3": 0.38, "valle_zero3": 0.35}
"""Part of the card's peak at the best micro-batch, at least."""

WANTED_STEPS = {"small_zero3": 60.0, "small_graphs": 60.0}
"""Steps a second, at least."""
