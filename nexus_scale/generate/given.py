"""A picture that samples are drawn from, and a mask of what is drawn into it, as a run's network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import IMAGE_EXTENSIONS, DataError
from nexus_scale.media.opening import Encoder, encoder_of_latents
from nexus_scale.processes.masks import mask_of_places, without
from nexus_scale.processes.pixels import to_unit_range

if TYPE_CHECKING:
    from nexus_scale.generate.trained import Trained

REDRAWN = 0.8
"""The strength with which a picture is drawn anew unless another is asked for; diffusers' default."""


class Given(NamedTuple):
    """`given` of a request and its strength, and conditions beside the prompts'; tensors (1, ...)."""

    given: dict[str, Tensor]
    cond: dict[str, Tensor]
    strength: float


def given_of(
    trained: Trained, shape: tuple[int, ...], image: Path | None, mask: Path | None, strength: float | None
) -> Given:
    """What the picture and the mask of a call become.

    Args:
        shape: of one sample in model space.
        mask: white where the picture is drawn anew; of a run that was trained to.
        strength: how far the picture is noised before it is drawn; None: REDRAWN, or with a mask 1, from noise alone.
    Raises:
        UserError: a file that is no picture; a run that draws clips; a picture or mask that is missing.
    """
    inpaints = "mask" in trained.draws.takes
    if inpaints and (image is None or mask is None):
        raise UserError(f"recipe {trained.recipe.name} draws into a picture: give --image FILE and --mask FILE")
    if image is None:
        return Given({}, {}, 1.0)
    if len(shape) != 3:
        raise UserError(f"--image: recipe {trained.recipe.name} draws clips; leave it out")
    height, width = trained.pixels_of(shape)
    field, asked = trained.draws.makes, strength
    asked = (1.0 if inpaints else REDRAWN) if asked is None else asked
    pixels = image_of(image, height, width)[None]
    encode = encoder_of(trained) if field == "moments" else lambda x: x
    given = {} if inpaints and asked == 1.0 else {field: encode(pixels)}
    if mask is None:
        return Given(given, {}, asked)
    covered = mask_of(mask, height, width)[None]
    cond = {"mask": mask_of_places(covered, shape[1:]), f"masked_{field}": encode(without(pixels, covered))}
    return Given(given, cond, asked)


class PictureFiles:
    """Pictures as a network that translates takes them, read when their rows are asked for.

    Args:
        shape: of a sample, (3, H, W).
    Raises:
        UserError: a file that is no picture; all are looked at before the first is translated.
    """

    def __init__(self, paths: Sequence[Path], shape: tuple[int, ...]):
        self.paths, self.shape = paths, shape
        for path in paths:
            _opened(path, "--image")

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.stack([image_of(self.paths[row], self.shape[-2], self.shape[-1]) for row in rows.tolist()])


def pictures_of(place: Path) -> list[Path]:
    """The picture of that name, or the pictures in a folder of that name, in the order of their names.

    Raises:
        UserError: a folder without pictures.
    """
    if not place.is_dir():
        return [place]
    found = [path for path in sorted(place.iterdir()) if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS]
    if not found:
        raise UserError(f"--image {place}: has no pictures; expected {', '.join(sorted(IMAGE_EXTENSIONS))} in it")
    return found


def encoder_of(trained: Trained) -> Encoder:
    """Pixels in [-1, 1] to moments, as the run's data have them."""
    place, hardware = trained.place, trained.hardware
    return encoder_of_latents(
        trained.recipe, trained.dataset, place.runs_root, place.data_root, hardware.device, hardware.dtype
    )


def image_of(path: Path, height: int, width: int, option: str = "--image") -> Tensor:
    """The middle of a picture, scaled to cover the size, (3, H, W) float32 in [-1, 1]."""
    fitted = ImageOps.fit(_opened(path, option), (width, height), Image.Resampling.LANCZOS)
    return to_unit_range(_pixels(fitted), torch.uint8, "image")


def opened_image(path: Path, option: str) -> Tensor:
    """A picture as it is, (3, H, W) uint8."""
    return _pixels(_opened(path, option))


def mask_of(path: Path, height: int, width: int) -> Tensor:
    """A mask scaled and cut as its picture is, (1, H, W) float32: 1 where it is at least half white."""
    fitted = ImageOps.fit(_opened(path, "--mask"), (width, height), Image.Resampling.NEAREST)
    return (_pixels(fitted.convert("L").convert("RGB"))[:1] >= 128).float()


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _opened(path: Path, option: str) -> Image.Image:
    try:
        return Image.fromarray(decode_image(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise UserError(f"{option} {path}: {error}") from None
