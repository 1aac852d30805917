"""The recipe of a fine-tuning: what a pipeline's folder or a run of ours begins with, and what a person's pictures are to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.config.plain_yaml import dump_yaml, read_yaml
from nexus_scale.config.recipe import dump, recipe_from
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.interop.pipeline_folders import INDEX, PipelineFolder, is_pipeline, open_pipeline

FULL_RATE, ADAPTER_RATE = 1e-5, 1e-4
"""Learning rates of all weights, and of low-rank changes: the defaults of diffusers' training scripts, as recalled."""
SHOWN = 5
"""How often samples are drawn and weights saved while it learns."""


@dataclass(frozen=True)
class Wish:
    """What is asked for; `None` leaves a choice to what is learned on from.

    Attributes:
        images: folder or table of pictures, or of clips.
        trigger: words that the pictures are to be called by.
        full: all weights learn, in place of low-rank changes.
        resolution: of pictures, as ingest_images knows it: sides, or a table of aspect ratios.
        fps: frames a second of clips.
    """

    name: str
    images: Path
    trigger: str = ""
    full: bool = False
    rank: int = 16
    steps: int = 500
    rate: float | None = None
    batch: int = 4
    resolution: str | None = None
    mirror: bool = False
    fps: float = 8.0
    seed: int = 0


def open_base(model: Path, runs_root: Path, data_root: Path) -> PipelineFolder:
    """What is learned on from: a pipeline's folder, or a run's.

    Raises:
        UserError: neither, or a run that is told no text.
    """
    if is_pipeline(model):
        return open_pipeline(model)
    run = RunFolder(model)
    if not run.recipe.is_file():
        raise UserError(
            f"{model}: no {INDEX} and no recipe.yaml there; expected a pipeline's folder of diffusers, or a run", 5
        )
    return _of_run(run, runs_root, data_root)


def _of_run(run: RunFolder, runs_root: Path, data_root: Path) -> PipelineFolder:
    recipe = recipe_from(read_yaml(run.recipe), str(run.recipe))
    values = dump(recipe)
    told, encoders = recipe.objective.arguments, values["data"]["encoders"]
    entry = values["networks"].get("model")
    if list(recipe.trained()) != ["model"] or "name" not in entry or "adapts" in entry or recipe.sample is None:
        raise UserError(f"{run.path}: expected a run of one network, `model`, that draws")
    if "text" not in encoders or "text" not in told.get("conditions", ("text",)) or "moments" not in encoders:
        raise UserError(
            f"{run.path}: expected a run that draws latents of prompts (data.encoders with moments and text)"
        )
    if "latent_size" not in entry:
        raise UserError(f"{run.path}: expected a run that draws pictures")
    network = {key: value for key, value in entry.items() if key not in ("optimizer", "init_from", "frozen")}
    sides = int(entry["latent_size"]) * _factor(encoders["moments"], int(entry["latent_size"]), runs_root, data_root)
    assert recipe.data.train is not None
    tokens = dict(recipe.data.tokens)
    if recipe.data.text_tokens is not None:
        tokens |= {"text": recipe.data.text_tokens}
    return PipelineFolder(
        network={**network, "init_from": {"format": "run", "path": str(run.path)}},
        objective={key: value for key, value in values["objective"].items() if key != "mirror"},
        sample=values["sample"],
        encoders={key: encoders[key] for key in ("moments", "text")},
        tokens=tokens,
        size=(sides, sides),
        sizes="original_size" in told.get("conditions", ()),
        statistics=recipe.data.train.sources[0].folders[0],
    )


def _factor(spec: Mapping[str, Any], latent_size: int, runs_root: Path, data_root: Path) -> int:
    """Pixels along a side of a latent of an autoencoder."""
    import torch

    vae = open_vae(spec, runs_root, data_root)
    return int(vae.decode(torch.zeros(1, vae.latent_channels, latent_size, latent_size)).shape[-1]) // latent_size


def recipe_of(base: PipelineFolder, wish: Wish) -> dict[str, Any]:
    """The recipe's values.

    Raises:
        UserError: a wish that does not fit what is learned on from.
    """
    frozen = {"base": {**base.network, "frozen": True}, "model": {"adapts": "base", "name": "lora", "rank": wish.rank}}
    rate = wish.rate or (FULL_RATE if wish.full else ADAPTER_RATE)
    every = max(1, -(-wish.steps // SHOWN))
    return {
        "base": "_base/callbacks.yaml",
        "name": wish.name,
        "seed": wish.seed,
        "steps": wish.steps,
        "global_batch": wish.batch,
        "networks": {"model": dict(base.network)} if wish.full else frozen,
        "objective": {**base.objective, "condition_drop": 0.0, **({"mirror": True} if wish.mirror else {})},
        "optimizer": {
            "lr": rate, "weight_decay": 0.01, "schedule": {"name": "constant", "warmup_steps": min(20, wish.steps // 10)}
        },
        "data": {
            "train": {"sources": [{"folders": _folders(wish.name)}]},
            "tokens": dict(base.tokens),
            "encoders": dict(base.encoders),
        },
        "prepare": _jobs(base, wish),
        "sample": dict(base.sample),
        "callbacks": {"validate": None, "samples": {"every": every, "count": 8}, "checkpoint": {"every": every}},
    }  # fmt: skip


def _folders(name: str) -> list[str]:
    return [f"{name}/train/latents", f"{name}/train/text"]


def _jobs(base: PipelineFolder, wish: Wish) -> list[dict[str, Any]]:
    """The jobs that make a recipe's data of pictures or clips."""
    latents, text = _folders(wish.name)
    source: dict[str, Any] = {"path": str(wish.images.resolve())}
    source |= {"prefix": wish.trigger} if wish.trigger else {}
    made = f"{wish.name}/train/{'images' if base.frames is None else 'clips'}"
    common = {"source": source, "output": wish.name, "heldout": 0.0}
    if base.frames is None:
        size = wish.resolution or f"{base.size[0]}x{base.size[1]}"
        raw = {"job": "ingest_images", **common, "resolution": size, "captions": "required"}
        raw |= {"size_fields": True} if base.sizes else {}
    else:
        size = wish.resolution or f"{base.size[0]}x{base.size[1]}"
        raw = {"job": "ingest_clips", **common, "size": size, "frames": base.frames, "fps": wish.fps}
    encoded = {"job": "precompute_latents", "input": made, "output": latents, "vae": dict(base.encoders["moments"])}
    encoded |= {"mirror": True} if wish.mirror else {}
    encoded |= {"statistics": base.statistics} if base.statistics else {}
    return [raw, encoded, {"job": "precompute_text", "input": made, "output": text, "encoders": base.texts}]


HEAD = """# Written by `nexus finetune`; change it as you like and run it with `nexus train {file}`.
"""


def write_recipe(values: Mapping[str, Any], file: Path) -> str:
    """The text of a recipe's file."""
    return HEAD.format(file=file) + dump_yaml(dict(values))


def name_of(model: Path, images: Path) -> str:
    """A run's name by what is learned on from and from what."""
    plain = (re.sub(r"[^A-Za-z0-9._-]+", "_", path.resolve().name).strip("._-") or "run" for path in (images, model))
    return "_".join(plain)[:80].lower()
