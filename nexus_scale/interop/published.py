"""What a family's file in this room offers: `interop/<name>.py` is the one of the network that is registered as <name>.

    PUBLISHED           where each parameter lies in published checkpoints, which a run may begin with (`init_from`)
    ORIGINAL            the same of a family that diffusers does not know: its first release's layout alone
    EXPORTS             by layout, `export(state, model_args, folder, objective, sample)` of a run's network; one that also takes
                        `networks` gets all that the run has trained, by role
    PIPELINE            the pipeline of diffusers that an export is made whole for, see pipelines.py
    NO_EXPORT           why there is none, for messages
    export_autoencoder  `(state, model_args, folder, latents)` of the autoencoder whose latents a run has learnt

Each may be missing. Whoever exports or imports finds a family by its name: adding one is adding its file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from nexus_scale.config import registry
from nexus_scale.interop.layout import Layout, SafetensorsFiles


def nothing(net: Any) -> Sequence[str]:
    return ()


class Original(NamedTuple):
    """The layout of the first release.

    Attributes:
        layout: where each parameter lies.
        model_args_of: constructor arguments from the shapes of a checkpoint.
        prefix: of its keys.
        computed: keys that are no weights of ours: what we compute, and copies.
    """

    layout: Callable[[Any], Layout]
    model_args_of: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    prefix: str
    computed: Callable[[Any], Sequence[str]] = nothing


class Published(NamedTuple):
    """diffusers' layout of a family, and the original release's where it is another.

    Attributes:
        class_name: of the network in diffusers.
        model_args_of: constructor arguments from diffusers' config: those that must be the recipe's.
        layout: where each parameter lies.
        computed: keys of theirs that are no weights of ours: what we compute, and copies.
        check: raises a UserError where weights that fit by name and shape are none of ours, `check(net, files, what)`.
        part: folder of the network in a pipeline.
    """

    class_name: str
    model_args_of: Callable[[Mapping[str, Any]], dict[str, Any]]
    layout: Callable[[Any], Layout]
    computed: Callable[[Any], Sequence[str]] = nothing
    check: Callable[[Any, SafetensorsFiles, str], None] | None = None
    part: str = "transformer"
    original: Original | None = None


@cache
def families() -> tuple[str, ...]:
    """Registered networks that have a file here."""
    files = {file.stem for file in Path(__file__).parent.glob("*.py")}
    return tuple(sorted(files & set(registry.names("models"))))


def family(name: str) -> ModuleType | None:
    """The file of the network registered as `name`; None where there is none."""
    return importlib.import_module(f"{__package__}.{name}") if name in families() else None
