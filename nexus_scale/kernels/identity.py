"""Checks from metadata and file names, without running it, that an installed package has the kernels we mean.

The name `apex` on the Python package index is an unrelated Pyramid toolkit, and a folder called `flash_attn` somewhere on
sys.path is not FlashAttention: importing either to find out would already run it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """`found`: a package of that name can be imported. `genuine`: it is the one we mean. `why`: one line for people."""

    name: str
    found: bool
    genuine: bool
    why: str


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a top-level name. Never of a dotted one: that would import its parent."""
    assert "." not in name, name
    try:
        return importlib.util.find_spec(name)
    except (ValueError, ImportError):  # a module put into sys.modules by hand has no spec
        return None


def _identify(name: str, *, distribution: str, module_file: str, extension: str, foreign: str | None) -> Identity:
    spec = _spec(name)
    if spec is None:
        return Identity(name, False, False, f"{name} is not installed")
    origin = Path(spec.origin).resolve() if spec.origin and spec.has_location else None
    place = origin.parent if origin else next(iter(spec.submodule_search_locations or []), "a place unknown")

    def not_genuine(reason: str) -> Identity:
        return Identity(name, True, False, f"{name} at {place} is not used: {reason}")

    if origin is None and name == "flash_attn" and identify_flash_attn_4().genuine:
        return Identity(name, False, False, "flash_attn is not installed, only flash_attn_4")
    if origin is None or origin.name != "__init__.py":
        return not_genuine("it is not a package with an __init__.py")
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return not_genuine(f"no installed distribution {distribution!r} owns it")
    if foreign is not None and any(foreign in requirement.lower() for requirement in installed.requires or []):
        return not_genuine(
            f"its distribution requires {foreign}: the unrelated project of that name on the package index"
        )
    owned = {Path(str(installed.locate_file(file))).resolve() for file in installed.files or []}
    if origin not in owned:
        return not_genuine(f"it is not among the files of distribution {distribution!r} {installed.version}")
    if origin.parent / module_file not in owned:
        return not_genuine(f"distribution {distribution!r} has no {name}/{module_file}")
    extension_spec = _spec(extension)
    if extension_spec is None or not extension_spec.origin:
        return not_genuine(f"its compiled part {extension} is missing: it was installed without CUDA kernels")
    if not extension_spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        return not_genuine(f"{extension} at {extension_spec.origin} is not a compiled extension")
    if Path(extension_spec.origin).resolve() not in owned:
        return not_genuine(f"{extension} at {extension_spec.origin} does not belong to distribution {distribution!r}")
    return Identity(name, True, True, f"{name} {installed.version}")


def _identify_files(name: str, *, distribution: str, module: str, file: str, extension: str | None) -> Identity:
    """A package that is recognised by a file of its distribution, from which a top-level name is imported.

    Args:
        module: the top-level name.
        file: of the distribution, which importing `module` or a part of it runs.
        extension: beginning of the path of its compiled part; None: it compiles its kernels as they are used.
    """
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Identity(name, False, False, f"{name} is not installed")
    files = [str(part) for part in installed.files or []]
    label = f"{name} {installed.version}"
    if file not in files:
        return Identity(name, True, False, f"{label} is not used: its distribution has no {file}")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    if extension is not None and not any(part.startswith(extension) and part.endswith(suffixes) for part in files):
        return Identity(name, True, False, f"{label} is not used: its compiled part {extension} is missing")
    spec = _spec(module)
    places = [*(spec.submodule_search_locations or [])] if spec else []
    if spec is not None and spec.origin and spec.has_location and not places:
        places = [str(Path(spec.origin).parent)]
    wanted = Path(str(installed.locate_file(file))).resolve()
    if not any(wanted.is_relative_to(Path(place).resolve()) for place in places):
        return Identity(name, True, False, f"{label} is not used: importing {module} finds another one at {places}")
    return Identity(name, True, True, label)


def identify_flash_attn_3() -> Identity:
    """FlashAttention 3 with its CUDA extension, or why not. It is built from the folder `hopper` of FlashAttention's source."""
    return _identify_files(
        "flash_attn_3",
        distribution="flash_attn_3",
        module="flash_attn_interface",
        file="flash_attn_interface.py",
        extension="flash_attn_3/_C",
    )


def identify_flash_attn_4() -> Identity:
    """FlashAttention 4, whose kernels are compiled as they are used, or why not. It lies in the folder of FlashAttention 2."""
    return _identify_files(
        "flash_attn_4",
        distribution="flash-attn-4",
        module="flash_attn",
        file="flash_attn/cute/interface.py",
        extension=None,
    )


def identify_apex() -> Identity:
    """NVIDIA's Apex with its fused layer norm, or why not."""
    return _identify(
        "apex",
        distribution="apex",
        module_file="normalization/fused_layer_norm.py",
        extension="fused_layer_norm_cuda",
        foreign="pyramid",
    )


def identify_flash_attn() -> Identity:
    """FlashAttention 2 with its CUDA extension, or why not."""
    return _identify(
        "flash_attn",
        distribution="flash_attn",
        module_file="flash_attn_interface.py",
        extension="flash_attn_2_cuda",
        foreign=None,
    )
