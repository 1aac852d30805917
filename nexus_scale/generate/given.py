"""A picture that samples are drawn from, and a mask of what is drawn into it, as a run's network takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from nexus_scale.config.kinds import shown
from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import IMAGE_EXTENSIONS, DataError
from nexus_scale.io.plain_text import clean_text
from nexus_scale.media.opening import Encoder, encoder_of_latents
from nexus_scale.processes.masks import mask_of_places, without
from nexus_scale.processes.pixels import to_unit_range

if TYPE_CHECKING:
    from nexus_scale.generate.trained import Trained

REDRAWN = 0.8
"""The strength with which a picture is drawn anew unless another is asked for; diffusers' default."""


class Kept(NamedTuple):
    """A picture (1, 3, H, W) in [-1, 1] of which samples keep what lies outside of a mask (1, 1, H, W)."""

    picture: Tensor
    drawn: Tensor

    def around(self, sample: Tensor) -> Tensor:
        """A sample (3, H, W) within the mask, and around it the picture, whose bytes come back."""
        return torch.where(self.drawn[0] >= 0.5, sample, self.picture[0].to(sample))


class Given(NamedTuple):
    """`given` of a request and its strength, conditions beside the prompts', and what is kept of a picture; tensors (1, ...)."""

    given: dict[str, Tensor]
    cond: dict[str, Tensor]
    strength: float
    kept: Kept | None = None


def given_of(
    trained: Trained,
    shape: tuple[int, ...],
    image: Path | None,
    mask: Path | None,
    strength: float | None,
    grow: str | None = None,
) -> Given:
    """What the picture and the mask of a call become.

    Args:
        shape: of one sample in model space.
        mask: white where the picture is drawn anew; a network that was trained to is told it, and with others what lies outside is kept
            as it is.
        strength: how far the picture is noised before it is drawn; None: REDRAWN, or with a mask 1, from noise alone.
        grow: pixels that are drawn around the picture, TOP,RIGHT,BOTTOM,LEFT, in the place of a mask.
    Raises:
        UserError: a file that is no picture; a run that draws clips; a picture or mask that is missing.
    """
    if trained.draws.begins:
        return _beginning(trained, shape, image)
    inpaints, masked = trained.draws.draws_into, mask is not None or grow is not None
    if inpaints and (image is None or not masked):
        raise UserError(f"recipe {trained.recipe.name} draws into a picture: give --image FILE and --mask FILE")
    if mask is not None and grow is not None:
        raise UserError("--mask and --grow: both say what is drawn; give one")
    if image is None:
        return Given({}, {}, 1.0)
    if len(shape) != 3:
        raise UserError(f"--image: recipe {trained.recipe.name} draws clips; leave it out")
    height, width = trained.pixels_of(shape)
    field, asked = trained.draws.makes, strength
    asked = (1.0 if masked else REDRAWN) if asked is None else asked
    if grow is None:
        pixels = image_of(image, height, width)[None]
        covered = None if mask is None else mask_of(mask, height, width)[None]
    else:
        pixels, covered = _grown(image, height, width, grow)
    encode = encoder_of(trained) if field == "moments" else lambda x: x
    given = {} if inpaints and asked == 1.0 else {field: encode(pixels)}
    if covered is None:
        return Given(given, {}, asked)
    kept, places = Kept(pixels, covered), mask_of_places(covered, shape[1:])
    if not inpaints:
        return Given({**given, "mask": places}, {}, asked, kept)
    return Given(given, {"mask": places, f"masked_{field}": encode(without(pixels, covered))}, asked, kept)


def _beginning(trained: Trained, shape: tuple[int, ...], image: Path | None) -> Given:
    """The moments of the picture that clips begin as."""
    if image is None:
        raise UserError(f"recipe {trained.recipe.name} draws clips that begin as a picture: give --image FILE")
    picture = image_of(image, *trained.pixels_of(shape))[None, :, None]  # (1, 3, 1, H, W)
    return Given({}, {trained.draws.begins: encoder_of(trained)(picture)}, 1.0)


def _grown(image: Path, height: int, width: int, grow: str) -> tuple[Tensor, Tensor]:
    """A picture within a larger one, whose edges go on to the border, and what lies around it; (1, 3, H, W) and (1, 1, H, W)."""
    match = re.fullmatch(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})", grow.replace(" ", ""))
    top, right, bottom, left = map(int, match.groups()) if match else (0, 0, 0, 0)
    inner = height - top - bottom, width - left - right
    if min(inner) < 1 or not any((top, right, bottom, left)):
        raise UserError(
            f"--grow {shown(grow)}: expected TOP,RIGHT,BOTTOM,LEFT pixels that are drawn around the picture, such as 0,16,0,16, in samples "
            f"of {height} x {width}"
        )
    around = (left, right, top, bottom)
    pixels = F.pad(image_of(image, *inner)[None], around, mode="replicate")
    return pixels, F.pad(torch.zeros(1, 1, *inner), around, value=1.0)


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


def prompt_beside(name: str, folders: Sequence[Path], records: Sequence[Any]) -> str:
    """What a sample of that name, without suffix, was drawn of: a text file beside it says so in one of the folders, or the list of
    prompts that `nexus sample` left in one of their records; empty where nothing says it."""
    for folder in folders:
        beside = folder / f"{name}.txt"
        if beside.is_file() and beside.stat().st_size < 100_000:
            return clean_text(beside.read_text(encoding="utf-8", errors="replace"))
    number = re.match(r"(\d{3,})_", name)
    for record in records:
        if number is not None and isinstance(record, list) and int(number[1]) < len(record):
            return clean_text(str(record[int(number[1])]))
    return ""


def encoder_of(trained: Trained) -> Encoder:
    """Pixels in [-1, 1] to moments, as the run's data have them."""
    place, hardware = trained.place, trained.hardware
    return encoder_of_latents(
        trained.recipe, trained.dataset, place.runs_root, place.data_root, hardware.device, hardware.dtype
    )


def image_of(path: Path, height: int, width: int, option: str = "--image") -> Tensor:
    """The middle of a picture, scaled to cover the size, (3, H, W) float32 in [-1, 1]."""
    fitted = ImageOps.fit(_opened(path, option), (width, height), Image.Resampling.LANCZOS)
    return to_unit_range(pixels_of(fitted), torch.uint8, "image")


def opened_image(path: Path, option: str) -> Tensor:
    """A picture as it is, (3, H, W) uint8."""
    return pixels_of(_opened(path, option))


def mask_of(path: Path, height: int, width: int) -> Tensor:
    """A mask scaled and cut as its picture is, (1, H, W) float32: 1 where it is at least half white."""
    fitted = ImageOps.fit(_opened(path, "--mask"), (width, height), Image.Resampling.NEAREST)
    return (pixels_of(fitted.convert("L").convert("RGB"))[:1] >= 128).float()


def pixels_of(image: Image.Image) -> Tensor:
    """(H, W, 3) of 8 bits as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _opened(path: Path, option: str) -> Image.Image:
    try:
        return Image.fromarray(decode_image(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise UserError(f"{option} {path}: {error}") from None
