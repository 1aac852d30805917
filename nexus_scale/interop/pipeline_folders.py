"""A pipeline's folder of diffusers, read as the sections of a recipe that goes on from it: network, objective, encoders, sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.cogvideox import TEMPORAL_RATIO
from nexus_scale.interop.folders import parsed_config
from nexus_scale.interop.pipelines import Pipeline, TextSlot, Tuning
from nexus_scale.interop.published import families, family
from nexus_scale.interop.scheduler_folders import scheduler_at

INDEX = "model_index.json"


@dataclass(frozen=True)
class PipelineFolder:
    """What is learned on from.

    Attributes:
        network: its entry in `networks`, with its arguments and `init_from`.
        objective, sample, encoders: sections of a recipe.
        tokens: `data.tokens`: tokens of each text.
        size: height and width of what it draws, in pixels; with `frames`, of clips.
        sizes: whether it is told sizes.
        statistics: a folder of latents whose normalisation its own latents have; empty where the autoencoder states one.
    """

    network: Mapping[str, Any]
    objective: Mapping[str, Any]
    sample: Mapping[str, Any]
    encoders: Mapping[str, Any]
    tokens: Mapping[str, int]
    size: tuple[int, int]
    frames: int | None = None
    sizes: bool = False
    statistics: str = ""

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Its text encoders."""
        found = self.encoders["text"]
        return [dict(found)] if isinstance(found, Mapping) else [dict(one) for one in found]


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def open_pipeline(folder: Path) -> PipelineFolder:
    """The pipeline in a folder.

    Raises:
        UserError: none there, or one whose network, scheduler or text encoders are none of ours.
    """
    folder = folder.resolve()
    index = parsed_config(folder, "DiffusionPipeline", INDEX)
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX}: expected a mapping of parts")
    name, arguments, pipeline, tuning = _network(folder, index)
    if tuning.latent_size is not None:
        arguments["latent_size"] = tuning.latent_size
    scheduler = scheduler_at(folder)
    sample = {**scheduler.sample, **tuning.sample}
    texts, tokens = _texts(folder, pipeline, tuning)
    pixels, frames = _size(arguments, _factor(folder))
    shift = {"time_shift": sample["shift"]} if "shift" in sample else {}
    kept = {key: value for key, value in arguments.items() if value is not None}
    return PipelineFolder(
        network={"name": name, **kept, "init_from": {"format": "diffusers", "path": str(folder)}},
        objective={
            **tuning.objective, "path": scheduler.path, "target": scheduler.target, **shift, "conditions": list(tuning.conditions),
        },
        sample=sample,
        encoders={"moments": {"folder": str(folder / "vae")}, "text": texts if len(texts) > 1 else texts[0]},
        tokens=tokens,
        size=pixels,
        frames=frames,
        sizes="original_size" in tuning.conditions,
    )  # fmt: skip


def _network(folder: Path, index: Mapping[str, Any]) -> tuple[str, dict[str, Any], Pipeline, Tuning]:
    """The family of a folder's network, its arguments, the pipeline of such a network, and how it learns on."""
    named, why = index.get("_class_name"), ""
    for name in families():
        form = family(name).formats.get("diffusers")
        if form is None or not (folder / form.part / "config.json").is_file() or form.part not in index:
            continue
        config = parsed_config(folder / form.part, form.class_name)
        if not isinstance(config, dict) or config.get("_class_name") not in (form.class_name, *form.also):
            continue
        try:
            arguments = form.model_args(config)
        except UserError as error:
            why = f": {error}"
            continue
        pipeline, tuning = family(name).pipeline_of(arguments), family(name).tuning(arguments)
        if pipeline is not None and tuning is not None and pipeline.class_name == named:
            return name, arguments, pipeline, tuning
    known = sorted(_classes())
    raise UserError(f"{folder}: its pipeline is {named!r}{why}; expected one of {', '.join(known)}")


def _classes() -> set[str]:
    """Pipelines that are learned on from."""
    found = {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
    }
    for name in families():
        pipeline = family(name).pipeline
        if isinstance(pipeline, Pipeline) and pipeline.text:
            found.add(pipeline.class_name)
    return found


def _texts(folder: Path, pipeline: Pipeline, tuning: Tuning) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The text encoders in the order of a recipe, and the tokens of each field."""
    left: list[TextSlot] = list(pipeline.text)
    specs: list[dict[str, Any]] = []
    tokens: dict[str, int] = {}
    for number, (class_name, pad) in enumerate(zip(pipeline.trained_on, tuning.pads, strict=True), start=1):
        slot = next(slot for slot in left if slot.class_name == class_name)
        left.remove(slot)
        spec: dict[str, Any] = {"folder": str(folder / slot.encoder)}
        field = "text" if number == 1 else f"text_{number}"
        if pad is None:
            assert tuning.cut is not None, "what is not padded is cut"
            spec["max_tokens"] = tokens[field] = tuning.cut
        else:
            spec["pad_to"] = tokens[field] = pad or _limit(folder / slot.tokenizer)
        if tuning.states is not None:
            spec["states"] = tuning.states
        specs.append(spec)
    return specs, tokens


def _limit(tokenizer: Path) -> int:
    """Tokens that a tokenizer takes at most."""
    file = tokenizer / "tokenizer_config.json"
    try:
        limit = json.loads(file.read_text(encoding="utf-8"))["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: expected a tokenizer's settings with model_max_length") from None
    if not isinstance(limit, int) or not 3 <= limit <= 10_000:
        raise UserError(f"{file}: model_max_length is {limit!r}; expected 3 to 10,000")
    return limit


def _factor(folder: Path) -> int:
    """Pixels along a side of a latent."""
    config = parsed_config(folder / "vae", "an autoencoder")
    widths = config.get("block_out_channels") if isinstance(config, dict) else None
    if not isinstance(widths, Sequence) or not widths:
        raise UserError(f"{folder / 'vae'}: its config names no block_out_channels")
    return int(2 ** (len(widths) - 1))


def _size(arguments: Mapping[str, Any], factor: int) -> tuple[tuple[int, int], int | None]:
    """Height and width in pixels that a network is configured for, and of clips their frames."""
    if "latent_frames" not in arguments:
        side = int(arguments["latent_size"]) * factor
        return (side, side), None
    size = int(arguments["latent_height"]) * factor, int(arguments["latent_width"]) * factor
    return size, (int(arguments["latent_frames"]) - 1) * TEMPORAL_RATIO + 1
