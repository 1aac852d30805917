"""LPIPS in the file of the `lpips` package, `torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.pth")`, as a table; and in the two
files that it is made of, torchvision's of the trunk and the package's of the heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Format, Made, Shapes, Table
from nexus_scale.interop.published import Family
from nexus_scale.metrics.features import fingerprint_of
from nexus_scale.models.vae.lpips import LPIPS, SCALE, SHIFT, TRUNKS

PUBLISHED = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
"""Torchvision's weights of the trunks."""


def _table(net: Any) -> Table:
    """There layers are counted from the image on: each convolution and its ReLU are two, a pooling is one."""
    table, number = {}, 0
    for i, depth in enumerate(net.depth):
        number += net.stages[i].pool > 0
        for j in range(depth):
            table[f"stages.{i}.convs.{j}"] = f"net.slice{i + 1}.{number}"
            number += 2
        table[f"heads.{i}"] = f"lin{i}.model.1"
    return table


def _beside(net: Any) -> dict[str, Made]:
    """Constants, and the heads once more."""

    def made(values: Tensor, differs: str = "") -> Made:
        return Made(lambda net: values, 1e-6 if differs else None, differs, written=False)

    again = {f"lins.{i}.model.1.weight": made(torch.zeros(1, width, 1, 1)) for i, width in enumerate(net.channels)}
    of_images = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}
    return again | {name: made(torch.tensor(of).view(1, 3, 1, 1), "is another's") for name, of in of_images.items()}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """Channels and convolutions of each stage."""
    stages = shapes.count(r"net\.slice(\d+)\.")
    channels = tuple(shapes.of(f"lin{i}.model.1.weight")[1] for i in range(stages))
    return {
        "channels": channels,
        **({"trunk": "alex"} if shapes.of("net.slice1.0.weight")[2] == 11 else {}),
        "depth": tuple(shapes.count(rf"net\.slice{i + 1}\.(\d+)\.weight") for i in range(stages)),
    }


ORIGINAL = Format(
    "lpips", "LPIPS weights", _table, from_shapes=_args_of, computed=_beside, file="lpips_vgg.safetensors"
)
FAMILY = Family({"original": ORIGINAL})


def find_lpips(spec: Mapping[str, Any], root: Path) -> tuple[dict[str, Path], str]:
    """The files that `{trunk_file: vgg16-397923af.pth, trunk: vgg, heads_file: ...}` names, and their fingerprint; nothing is loaded.

    Args:
        spec: `trunk` is `alex` unless given; the heads are those of the installed package lpips unless `heads_file` is given.
        root: where relative files start.
    Raises:
        UserError: another trunk, or a file that is not there; says where it is published.
    """
    trunk = str(spec.get("trunk", "alex"))
    if trunk not in TRUNKS:
        raise UserError(f"lpips: got trunk {trunk!r}; expected {' or '.join(TRUNKS)}")
    file = root / str(spec.get("trunk_file", PUBLISHED[trunk].rpartition("/")[2]))
    if not file.is_file():
        raise UserError(f"{file}: not there; expected the weights of LPIPS's trunk, published at {PUBLISHED[trunk]}", 3)
    package = importlib.util.find_spec("lpips")
    if "heads_file" in spec:
        heads = root / str(spec["heads_file"])
    elif package is not None and package.origin is not None:
        heads = Path(package.origin).parent / "weights" / "v0.1" / f"{trunk}.pth"
    else:
        raise UserError("lpips: its heads are in the package lpips; pip install --no-deps lpips, or name a heads_file")
    if not heads.is_file():
        raise UserError(
            f"{heads}: not there; expected the heads of LPIPS, weights/v0.1/{trunk}.pth of the package lpips", 3
        )
    files = {"trunk": file, "heads": heads}
    return files, fingerprint_of(files, f"lpips {trunk}")


def open_lpips(spec: Mapping[str, Any], root: Path, device: torch.device | str = "cpu") -> LPIPS:
    """The network that `find_lpips` finds: two images (B, 3, H, W) in [-1, 1] -> (B,).

    Raises:
        UserError: as `find_lpips`; or files of other weights.
    """
    files, _ = find_lpips(spec, root)
    net = LPIPS(trunk=str(spec.get("trunk", "alex")))
    stored: dict[str, Tensor] = {}
    try:
        for part, file in files.items():
            stored |= {
                f"{part}.{name}": of for name, of in torch.load(file, map_location="cpu", weights_only=True).items()
            }
        named = {
            f"{ours}.{kind}": stored[_in_two_files(str(theirs), kind)]
            for ours, theirs in _table(net).items()
            for kind in (("weight",) if ours.startswith("heads") else ("weight", "bias"))
        }
        net.load_state_dict(named)
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, EOFError, KeyError) as error:
        raise UserError(
            f"{', '.join(map(str, files.values()))}: not the weights of LPIPS ({str(error)[:300]})", 3
        ) from None
    return net.eval().requires_grad_(False).to(device)


def _in_two_files(theirs: str, kind: str) -> str:
    """`net.slice2.3` is torchvision's `features.3`."""
    if theirs.startswith("lin"):
        return f"heads.{theirs}.{kind}"
    return f"trunk.features.{theirs.rpartition('.')[2]}.{kind}"
