"""The recipe of a fine-tuning: what a pipeline's folder or a run of ours begins with, and what a person's pictures are to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nexus_scale.config.plain_yaml import dump_yaml, read_yaml
from nexus_scale.config.recipe import dump, recipe_from
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.interop.autoencoders import open_vae
from nexus_scale.interop.pipeline_folders import INDEX, PipelineFolder, is_pipeline, open_pipeline
from nexus_scale.interop.tuning_texts import Token, with_texts

FULL_RATE, ADAPTER_RATE = 1e-5, 1e-4
TOKEN_RATE = 5e-4
"""Learning rates of all weights, of low-rank changes, and of new tokens' embeddings: the defaults of diffusers' training scripts, as
recalled."""
KEPT, VALIDATION = "kept", "validation"
"""Data that the model draws before it learns."""
SHOWN = 5
"""How often samples are drawn and weights saved while it learns."""


@dataclass(frozen=True)
class Wish:
    """What is asked for; `None` leaves a choice to what is learned on from.

    Attributes:
        images: folder or table of pictures, or of clips.
        trigger: words that the pictures are to be called by.
        full: all weights learn, in place of low-rank changes.
        decomposed: DoRA.
        text_encoders: those of CLIP's kind learn, too, and captions are encoded in every step.
        token: textual inversion: this alone learns.
        resolution: of pictures, as ingest_images knows it: sides, or a table of aspect ratios.
        fps: frames a second of clips.
        masks: folder of pictures of the same names, white where errors count.
        captioner: a command that prints a picture's caption, for those without one.
        kept: a prompt for pictures that the model draws before it learns, `kept_images` of them, which it then learns beside yours, so that
            it keeps drawing them: prior preservation. `kept_weight`: how often they are shown, to once for yours.
        validation: prompts whose pictures, drawn before it learns, tell how far it moves; they are drawn again while it learns.
        recipe: its file; prompts are written beside it.
        data_root: where the data lie.
        cluster: on which the model draws.
    """

    name: str
    images: Path
    trigger: str = ""
    full: bool = False
    rank: int = 16
    decomposed: bool = False
    text_encoders: bool = False
    token: Token | None = None
    steps: int = 500
    rate: float | None = None
    batch: int = 4
    resolution: str | None = None
    mirror: bool = False
    fps: float = 8.0
    seed: int = 0
    masks: Path | None = None
    captioner: str = ""
    kept: str = ""
    kept_images: int = 100
    kept_weight: float = 1.0
    validation: tuple[str, ...] = ()
    recipe: Path = Path("finetune.yaml")
    data_root: Path = Path("data")
    cluster: str | None = None

    @property
    def said(self) -> str:
        """Words before the pictures' captions: the trigger, or the new token, unless the trigger has it."""
        return self.trigger or (self.token.word if self.token else "")

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """What the model draws before it learns, by the name of the data that it becomes."""
        found = {KEPT: (self.kept,) if self.kept else (), VALIDATION: self.validation}
        return {name: texts for name, texts in found.items() if texts}

    def prompts_file(self, what: str) -> Path:
        return self.recipe.resolve().with_name(f"{self.recipe.stem}_{what}.txt")


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
    if base.frames is not None and (wish.kept or wish.validation or wish.captioner or wish.masks):
        raise UserError(
            "--keep, --validate and --captioner are of pictures, and this model draws clips; leave them out"
        )
    if wish.masks is not None and (wish.kept or wish.validation or wish.mirror):
        raise UserError(
            "--masks: of what is drawn for --keep and --validate there are none, and they are not mirrored; leave --keep, --validate and "
            "--mirror out"
        )
    if wish.token is not None and (wish.full or wish.text_encoders or wish.decomposed):
        raise UserError(
            "--token: its embeddings alone learn; leave --full, --dora and --text-encoders out, or leave --token out"
        )
    learnt = {"adapts": "base", "name": "lora", "rank": wish.rank, **({"decomposed": True} if wish.decomposed else {})}
    texts: dict[str, dict[str, Any]] = {}
    if wish.text_encoders or wish.token:
        base, texts, _ = with_texts(base, None if wish.full else learnt, wish.token)
    networks: dict[str, Any] = {"base": {**base.network, "frozen": True}, "model": learnt}
    if wish.full:
        networks = {"model": dict(base.network)}
    elif wish.token:
        networks = {"model": {**base.network, "frozen": True}}
    rate = wish.rate or (FULL_RATE if wish.full else TOKEN_RATE if wish.token else ADAPTER_RATE)
    every = max(1, -(-wish.steps // SHOWN))
    parts = parts_of(wish)
    sources: list[dict[str, Any]] = [
        {"folders": _folders(part.name), **({} if part.repeats == 1 else {"weight": float(part.repeats)})}
        for part in parts
    ]
    if wish.masks is not None:
        sources[0]["named"] = {"loss_mask": f"{wish.name}/masks/train/images"}
    if wish.kept:
        sources.append({"folders": _folders(f"{wish.name}/{KEPT}"), "weight": wish.kept_weight})
    held_out = (
        {"validation": {"sources": [{"folders": _folders(f"{wish.name}/{VALIDATION}")}]}} if wish.validation else {}
    )
    return {
        "base": "_base/callbacks.yaml",
        "name": wish.name,
        "seed": wish.seed,
        "steps": wish.steps,
        "global_batch": wish.batch,
        "networks": networks | texts,
        "objective": {**base.objective, "condition_drop": 0.0, **_told(wish)},
        "optimizer": {
            "lr": rate, "weight_decay": 0.0 if wish.token else 0.01,
            "schedule": {"name": "constant", "warmup_steps": min(20, wish.steps // 10)},
        },
        "data": {
            "train": {"sources": sources}, **held_out, "tokens": dict(base.tokens), "encoders": dict(base.encoders),
        },
        "prepare": _jobs(base, wish),
        "sample": dict(base.sample),
        "callbacks": {
            "validate": {"every": every, "samples": 64} if wish.validation else None,
            "samples": {"every": every, "count": len(wish.validation) or 8, **({} if wish.full or wish.token else {"beside": True})},
            "checkpoint": {"every": every},
        },
    }  # fmt: skip


class Part(NamedTuple):
    """Pictures that are shown `repeats` times as often as those of a part with 1, under words of their own."""

    name: str
    images: Path
    words: str
    repeats: int


REPEATED = re.compile(r"(\d{1,4})_(.+)")
"""Folders that kohya's scripts read: `10_sks dog`."""


def parts_of(wish: Wish) -> list[Part]:
    """The folder of pictures; where it holds folders alone that are called by a number and words, as kohya's scripts want them, each of
    these: shown so many times, under these words unless a trigger is given.

    Raises:
        UserError: such folders with masks, or one that is shown zero times.
    """
    inside = sorted(wish.images.iterdir()) if wish.images.is_dir() else []
    named = [(one, REPEATED.fullmatch(one.name)) for one in inside if not one.name.startswith(".")]
    if not named or not all(one.is_dir() and match for one, match in named):
        return [Part(wish.name, wish.images, wish.said, 1)]
    parts = [
        Part(f"{wish.name}/part_{number}", one, wish.said or match[2], int(match[1]))
        for number, (one, match) in enumerate(named, start=1)
        if match is not None
    ]
    if wish.masks is not None or wish.captioner or any(part.repeats < 1 for part in parts):
        raise UserError(
            f"{wish.images}: has folders called by how often they are shown, {', '.join(part.images.name for part in parts[:3])}; expected "
            "1 or more, and no --masks or --captioner, which are of one folder"
        )
    return parts


def _told(wish: Wish) -> dict[str, Any]:
    return {name: True for name, asked in (("mirror", wish.mirror), ("masked", wish.masks is not None)) if asked}


def _folders(name: str) -> list[str]:
    return [f"{name}/train/latents", f"{name}/train/text"]


def _jobs(base: PipelineFolder, wish: Wish) -> list[dict[str, Any]]:
    """The jobs that make a recipe's data: of pictures or clips, and of what the model draws before it learns."""
    jobs: list[dict[str, Any]] = []
    parts = parts_of(wish)
    for part in parts:
        images = str(part.images.resolve())
        source: dict[str, Any] = {"path": images}
        if wish.captioner:
            output = f"{wish.name}/captions"
            jobs.append({"job": "caption_images", "input": images, "command": wish.captioner, "output": output})
            source = {"path": f"{output}/captions.jsonl"}
        jobs += _data(base, wish, part.name, source | ({"prefix": part.words} if part.words else {}))
    if wish.masks is not None:
        masks = {
            "source": {"path": str(wish.masks.resolve())},
            "output": f"{wish.name}/masks",
            "heldout": 0.0,
            "captions": "none",
        }
        jobs.append(
            {"job": "ingest_images", **masks, "resolution": wish.resolution or f"{base.size[0]}x{base.size[1]}"}
        )
    drawn = wish.prompts()
    on = {} if wish.cluster is None else {"cluster": wish.cluster}
    run = base.network["init_from"]["path"]
    if drawn and base.network["init_from"]["format"] != "run":
        run = str(wish.data_root / wish.name / "published")
        opened = {"model": base.network["init_from"]["path"], "folders": _folders(parts[0].name), **on}
        jobs.append({"job": "open_pipeline", "output": f"{wish.name}/published", **opened})
    for what, texts in drawn.items():
        count = wish.kept_images if what == KEPT else len(texts)
        output, prompts = f"{wish.name}/drawn_{what}", str(wish.prompts_file(what))
        made = {"run": run, "prompts": prompts, "count": count, "output": output, "seed": wish.seed, **on}
        jobs.append({"job": "generate_samples", **made})
        jobs += _data(base, wish, f"{wish.name}/{what}", {"path": f"{output}/*.tar"})
    return jobs


def _data(base: PipelineFolder, wish: Wish, output: str, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The jobs that make latents and texts of a source."""
    latents, text = _folders(output)
    made = f"{output}/train/{'images' if base.frames is None else 'clips'}"
    common = {"source": dict(source), "output": output, "heldout": 0.0}
    size = wish.resolution or f"{base.size[0]}x{base.size[1]}"
    raw: dict[str, Any]
    if base.frames is None:
        raw = {"job": "ingest_images", **common, "resolution": size, "captions": "required"}
        raw |= {"size_fields": True} if base.sizes else {}
    else:
        raw = {"job": "ingest_clips", **common, "size": size, "frames": base.frames, "fps": wish.fps}
    encoded: dict[str, Any] = {
        "job": "precompute_latents",
        "input": made,
        "output": latents,
        "vae": dict(base.encoders["moments"]),
    }
    encoded |= {"mirror": True} if wish.mirror else {}
    encoded |= {"statistics": base.statistics} if base.statistics else {}
    return [raw, encoded, {"job": "precompute_text", "input": made, "output": text, "encoders": base.texts}]


HEAD = """# Written by `nexus finetune`; change it as you like and run it with `nexus train {file}`.
"""


def files_of(values: Mapping[str, Any], wish: Wish) -> dict[Path, str]:
    """What is written: the recipe, and the prompts that it names."""
    prompts = {
        wish.prompts_file(what): "".join(f"{text}\n" for text in texts) for what, texts in wish.prompts().items()
    }
    return {wish.recipe: HEAD.format(file=wish.recipe) + dump_yaml(dict(values)), **prompts}


def name_of(model: Path, images: Path) -> str:
    """A run's name by what is learned on from and from what."""
    plain = (re.sub(r"[^A-Za-z0-9._-]+", "_", path.resolve().name).strip("._-") or "run" for path in (images, model))
    return "_".join(plain)[:80].lower()
