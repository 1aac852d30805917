"""Pictures that samples are to follow, as the command line has them: `edges.png`, `edges.png:scale=0.8,make=true`, `sketch=a.png`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nexus_scale.conditioners.conditions import pictures_among
from nexus_scale.conditioners.control import made_as
from nexus_scale.conditioners.image_prompt import IMAGE_PROMPT, ImagePromptConditioner
from nexus_scale.config.kinds import shown
from nexus_scale.contracts import UserError
from nexus_scale.generate.drawing import guidance_of, settings_of
from nexus_scale.generate.given import encoder_of, image_of, opened_image
from nexus_scale.processes.pixels import to_unit_range

if TYPE_CHECKING:
    from nexus_scale.generate.trained import Trained

OPTION = "--control"


class Control(NamedTuple):
    """What one option says: the condition's name, empty for the only one; the picture; how much it counts, and at which times t;
    and whether the condition is first made of the picture, as those of the data were."""

    name: str
    file: Path
    scale: float
    interval: tuple[float, float] | None
    make: bool


def control_named(text: str) -> Control:
    """The option's parts.

    Raises:
        UserError: settings that there are not.
    """
    match = re.fullmatch(r"(?:(?P<name>[a-z][a-z0-9_]*)=)?(?P<file>.+?)(?::(?P<settings>\w+=.*))?", text.strip())
    how = "FILE, or FILE:scale=0.8,interval=[0.2,1],make=true, or NAME=FILE where the run is told several pictures"
    if match is None:
        raise UserError(f"{OPTION} {shown(text)}: expected {how}")
    settings: dict[str, Any] = settings_of(match["settings"]) if match["settings"] else {}
    make = settings.pop("make", False)
    if not isinstance(make, bool) or set(settings) - {"scale", "interval"}:
        raise UserError(f"{OPTION} {shown(text)}: expected {how}")
    counts = guidance_of(settings, OPTION)
    return Control(match["name"] or "", Path(match["file"]), counts.scale, counts.interval, make)


def controls_of(trained: Trained, shape: tuple[int, ...], texts: Sequence[str] | None) -> dict[str, Tensor]:
    """The pictures that a run is told, (1, 3, H, W) in [-1, 1] each, or their moments, or as prompts, with how much each counts.

    Raises:
        UserError: a run that is told none, or others; one that is missing, or no picture.
    """
    names = pictures_among(trained.draws.conditions, trained.dataset)
    controls = [control_named(text) for text in texts or ()]
    if controls and not names:
        raise UserError(f"{OPTION}: recipe {trained.recipe.name} is told no picture to follow; leave it out")
    found: dict[str, Tensor] = {}
    for control in controls:
        name = control.name or names[0]
        if name not in names or name in found or (not control.name and len(names) > 1):
            raise UserError(f"{OPTION} {control.file}: expected NAME=FILE, one for each of {', '.join(names)}")
        found |= _told(trained, shape, name, control)
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"recipe {trained.recipe.name} draws what follows a picture ({', '.join(missing)}): give {OPTION} FILE, or with "
            "FILE:make=true the picture that it is made of"
        )
    return found


def _prompt(trained: Trained, file: Path) -> Tensor:
    """What the recipe's image encoder makes of a picture, whole, (D,) or (L, D)."""
    spec = trained.recipe.data.encoders.get(IMAGE_PROMPT)
    if not isinstance(spec, Mapping):
        raise UserError(
            f"{OPTION} {file}: recipe {trained.recipe.name} names no image encoder (data.encoders.{IMAGE_PROMPT}), so it takes no picture "
            "as a prompt"
        )
    conditioner = ImagePromptConditioner(spec, trained.place.data_root, str(trained.hardware.device))
    trained.dataset.check_encoders({IMAGE_PROMPT: conditioner.fingerprint})
    return torch.from_numpy(conditioner.encode([opened_image(file, OPTION)])[0][IMAGE_PROMPT]).float()


def _told(trained: Trained, shape: tuple[int, ...], name: str, control: Control) -> dict[str, Tensor]:
    if name == IMAGE_PROMPT:
        picture = _prompt(trained, control.file)
    else:
        picture = image_of(control.file, *trained.pixels_of(shape), OPTION)
    if control.make and name != IMAGE_PROMPT:
        made: Mapping[str, Any] = trained.dataset.encoders.get(name, {})
        bytes_of = ((picture + 1) * 127.5).round().to(torch.uint8)
        picture = to_unit_range(made_as(made, bytes_of, f"{OPTION} {control.file}"), torch.uint8, name)
    value = encoder_of(trained)(picture[None]) if name in trained.draws.encoded else picture[None]
    told = {name: value, f"{name}_scale": torch.tensor([control.scale])}
    return told if control.interval is None else {**told, f"{name}_interval": torch.tensor([control.interval])}
