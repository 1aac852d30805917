"""What a trained run is good for: prompts drawn, samples judged, weights exported."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from nexus_scale.callbacks.grid import make_grid
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.generate import Trained
from nexus_scale.metrics import classifier as judges
from nexus_scale.recipe import find_config, read_yaml
from nexus_scale.train import Place

log = logging.getLogger(__name__)


def slug(text: str) -> str:
    """A file name from a prompt: letters, digits and dashes alone, never a path."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"


def draw_prompts(
    place: Place,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> Path:
    """Writes one PNG a prompt and `grid.png`.

    Returns:
        The folder.
    Raises:
        UserError: no prompt, or an empty one.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError(
            f"expected at least one prompt, and none of them empty; got {list(prompts)!r}: give --prompt TEXT or --prompts FILE"
        )
    trained = Trained(place.run, place)
    images = trained.images(
        trained.latents(trained.conditions(prompts), seed=seed, steps=steps, guidance=guidance)
    ).numpy()
    folder = output or place.run.samples / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        Image.fromarray(image).save(folder / f"{number:03d}_{slug(prompt)}.png")
    make_grid(list(images), captions=list(prompts)).save(folder / "grid.png")
    return folder


# ------------------------------------------------------------------------------------------------- scores


class ScoreSettings(BaseModel):
    """The `score:` section of a quickstart file: which real images the classifier learns from and is tried on, and how many samples it
    judges. The prompts are captions of `heldout`, so training never saw them, or names of classes. `real_samples`: so many of each
    folder's images, None for all; the classifier wants a few thousand at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: str
    heldout: str
    real_samples: int | None = Field(None, ge=1)
    samples_per_group: int = Field(42, ge=1)
    least_real_accuracy: float = Field(0.8, ge=0, le=1)
    guidance: float | None = None
    steps: int | None = None
    seed: int = 0


def score_settings(name: str) -> ScoreSettings:
    """The `score:` section of a file, by path or by name below configs/."""
    values = read_yaml(find_config(name))
    if "score" not in values:
        raise UserError(f"{name}: has no `score:` section")
    return ScoreSettings.model_validate(values["score"])


def _real(
    place: Place, folder: str, count: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Images (N, 3, H, W), labels (N,), captions and group names of a folder of real images."""
    dataset = Dataset.open([Source([place.data_root / folder], 1.0)])
    batches = list(dataset.fixed(count or dataset.samples, rank=0, world_size=1, batch=256))
    samples = torch.cat([batch.samples for batch in batches])
    captions = dataset.texts("caption", samples.tolist())
    groups = [str(json.loads(text)["group"]) for text in dataset.texts("json", samples.tolist())]
    return (
        torch.cat([batch["image"] for batch in batches]),
        torch.cat([batch["label"] for batch in batches]),
        captions,
        groups,
    )


def held_out_prompts(labels: torch.Tensor, captions: Sequence[str], per_group: int) -> tuple[list[str], torch.Tensor]:
    """`per_group` prompts of each label: its captions in order, from the start again where there are fewer.

    Returns:
        Prompts and their labels.
    """
    prompts: list[str] = []
    wanted: list[int] = []
    for label in sorted(set(labels.tolist())):
        own = list(dict.fromkeys(c for c, other in zip(captions, labels.tolist(), strict=True) if other == label))
        # Spread over the group rather than its first ones: captions lie in the collection's order, twins beside each other.
        chosen = [own[int(i * len(own) / per_group)] for i in range(per_group)]
        prompts += chosen
        wanted += [label] * per_group
    return prompts, torch.tensor(wanted)


def score_groups(place: Place, settings: ScoreSettings) -> dict[str, Any]:
    """Draws held-out prompts and lets a classifier of the groups, trained here on the real images, judge them.

    Returns:
        group_accuracy (share of samples found to be of the prompted group), real_accuracy (the classifier's balanced accuracy on
        real held-out images), counts (is the classifier good enough for the score to count), groups (the share of each),
        confusion, samples, guidance, seconds.
    """
    begun = time.monotonic()
    images, labels, _, groups = _real(place, settings.train, settings.real_samples)
    real, real_labels, captions, _ = _real(place, settings.heldout, settings.real_samples)
    group_names = [
        next(n for n, label in zip(groups, labels.tolist(), strict=True) if label == k)
        for k in range(int(labels.max()) + 1)
    ]
    judge = judges.train_classifier(images, labels, num_classes=len(group_names), seed=settings.seed)
    real_accuracy = judges.score_groups(judge, real, real_labels, num_classes=len(group_names)).balanced

    trained = Trained(place.run, place)
    prompts, wanted = held_out_prompts(real_labels, captions, settings.samples_per_group)
    latents = trained.latents(
        trained.conditions(prompts), seed=settings.seed, steps=settings.steps, guidance=settings.guidance
    )
    drawn = trained.images(latents)
    found = judges.score_groups(
        judge, drawn.permute(0, 3, 1, 2).float() / 127.5 - 1, wanted, num_classes=len(group_names)
    )
    scores = {
        "group_accuracy": found.accuracy,
        "real_accuracy": real_accuracy,
        "counts": real_accuracy >= settings.least_real_accuracy,
        "groups": dict(zip(group_names, found.per_group, strict=True)),
        "confusion": {"labels": group_names, "matrix": found.confusion},
        "samples": len(prompts),
        "guidance": settings.guidance,
        "seconds": time.monotonic() - begun,
    }
    judges.save_classifier(judge, place.run.path / "classifier.safetensors")
    shown = [i for k in range(len(group_names)) for i in (wanted == k).nonzero()[:, 0].tolist()[:8]]
    make_grid([drawn[i].numpy() for i in shown], columns=8, captions=[prompts[i] for i in shown]).save(
        place.run.path / "scored.png"
    )
    (place.run.path / "scores.json").write_text(json.dumps(scores, indent=1))
    if not scores["counts"]:
        log.warning(
            "the classifier finds %.2f of real held-out images, below %.2f: the score does not count",
            real_accuracy,
            settings.least_real_accuracy,
        )
    return scores


# ------------------------------------------------------------------------------------------------- export


def export_run(place: Place, layout: str, output: Path | None = None) -> Path:
    """Writes the averaged weights of a run as a folder that `layout`'s library loads.

    Raises:
        UserError: an unknown layout, or a family that it has no class for.
    """
    from nexus_scale.interop import dit, flux, sd3

    exporters: dict[tuple[str, str], Callable[..., Path]] = {
        ("diffusers", "mmdit"): sd3.export_trained,
        ("diffusers", "flux"): flux.export_trained,
        ("diffusers", "dit"): dit.export_trained,
        ("original", "mmdit"): lambda state, arguments, folder, *_: sd3.export_original(state, arguments, folder),
        ("original", "flux"): lambda state, arguments, folder, *_: flux.export_original(state, arguments, folder),
    }
    trained = Trained(place.run, place)
    role, spec = next(iter(trained.recipe.trained().items()))
    key = (layout, str(spec["name"]))
    if key not in exporters:
        raise UserError(f"export: no {layout!r} layout for family {spec['name']!r}; there are {sorted(exporters)}")
    from nexus_scale.recipe import network_class

    _, arguments = network_class(spec)
    folder = output or place.run.path / "export"
    sample = trained.recipe.sample.arguments if trained.recipe.sample else {}
    objective = trained.recipe.objective.arguments
    return exporters[key](trained.nets[role].state_dict(), arguments, folder, objective, sample)
