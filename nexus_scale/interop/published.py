"""What a family's file in this room offers: `interop/<name>.py` is the one of the network that is registered as <name>.

    FORMATS     how other programs store it, by the name that `init_from` and `nexus export --format` know; see formats.py
    TOGETHER    by format, what writes all networks of a run into one file
    PIPELINE    the pipeline of diffusers that an export is made whole for; see pipelines.py
    SCALE       of an autoencoder: `scaling_factor` of a config that leaves it out
    normalised  of an autoencoder: settings by which a pipeline normalises as a run has learnt, from its LatentStats or None

Each may be missing. Whoever exports or imports finds a family by its name: adding one is adding its file.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from nexus_scale.config import registry
from nexus_scale.interop.formats import Format


@cache
def families() -> tuple[str, ...]:
    """Registered networks that have a file here."""
    files = {file.stem for file in Path(__file__).parent.glob("*.py")}
    return tuple(sorted(files & set(registry.names("models"))))


def family(name: str) -> ModuleType | None:
    """The file of the network registered as `name`; None where there is none."""
    return importlib.import_module(f"{__package__}.{name}") if name in families() else None


def formats(name: str) -> dict[str, Format]:
    """The formats of a family, by name; empty where other programs do not know it."""
    return dict(getattr(family(name), "FORMATS", {}))


def known(among: Sequence[str]) -> str:
    """Families and those of their formats that are `among` these, for an error."""
    found = {name: [form for form in formats(name) if form in among] for name in families()}
    return ", ".join(f"{name} ({', '.join(forms)})" for name, forms in found.items() if forms)


def autoencoder_of(class_name: object) -> str | None:
    """The family of ours that diffusers has as this class of autoencoder; None where there is none."""
    for name in families():
        form = formats(name).get("diffusers")
        if form is not None and form.part == "vae" and form.class_name == class_name:
            return name
    return None


def codec_of(model_type: object) -> str | None:
    """The family of ours that transformers has as this type of codec; None where there is none."""
    for name in families():
        form = formats(name).get("transformers")
        if form is not None and form.part == "codec" and form.model_type == model_type:
            return name
    return None
