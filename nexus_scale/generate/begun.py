"""What samples begin with or follow, as a run's network takes it: pictures, sounds, and clips as codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from nexus_scale.conditioners.clips import outlines_of
from nexus_scale.config.kinds import shown
from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_frames
from nexus_scale.data.manifest import DataError
from nexus_scale.generate.controls import control_named, controls_of
from nexus_scale.generate.given import Given, encoder_of, given_of, image_of, mask_of, pixels_of
from nexus_scale.media.opening import open_tokenizer
from nexus_scale.processes.masks import without
from nexus_scale.processes.pixels import to_unit_range

if TYPE_CHECKING:
    from nexus_scale.generate.trained import Trained


class Asked(Protocol):
    """Of the options of `nexus sample`, those that say what samples begin with or follow; see `prompts.Wishes`."""

    @property
    def image(self) -> Path | None: ...
    @property
    def mask(self) -> Path | None: ...
    @property
    def grow(self) -> str | None: ...
    @property
    def strength(self) -> float | None: ...
    @property
    def begin(self) -> Path | None: ...
    @property
    def melody(self) -> Path | None: ...
    @property
    def control(self) -> Sequence[str] | None: ...


def begun_of(trained: Trained, shape: tuple[int, ...], asked: Asked) -> Given:
    """What the options of a call become.

    Args:
        shape: of one sample in model space.
    Raises:
        UserError: a file that is not what its option asks for, or that the run cannot use.
    """
    if trained.draws.walks != "denoise" and trained.medium.name == "video":
        if asked.grow is not None:
            raise UserError(f"--grow: recipe {trained.recipe.name} draws clips; leave it out")
        return clip_given(trained, asked.image, asked.begin, asked.mask, asked.control)
    if trained.draws.walks == "denoise" and asked.begin is not None:
        begun = clip_extended(trained, shape, asked)
    elif trained.medium.name == "audio" and (asked.begin is not None or asked.melody is not None):
        begun = Given(*trained.speaking.given(asked.begin, asked.melody, trained.draws.makes), 1.0)
    else:
        begun = given_of(trained, shape, asked.image, asked.mask, asked.strength, asked.grow)
    begun.cond.update(controls_of(trained, shape, asked.control))
    return begun


def clip_extended(trained: Trained, shape: tuple[int, ...], asked: Asked) -> Given:
    """What a clip becomes for a run that draws latents of clips from noise: samples keep its latent frames, as many of its first as leave
    one to be drawn behind them. A network that is told the first is told this clip's.

    Raises:
        UserError: a run that draws no clips, or clips of one latent frame; a file that is no clip; another option beside it.
    """
    what = f"--begin: recipe {trained.recipe.name}"
    if len(shape) != 4 or shape[1] < 2:
        raise UserError(f"{what} draws {'clips of one frame' if len(shape) == 4 else 'no clips'}; leave it out")
    beside = {"--mask": asked.mask, "--grow": asked.grow, "--strength": asked.strength, "--image": asked.image}
    if wrong := [option for option, value in beside.items() if value is not None]:
        raise UserError(f"{wrong[0]}: samples go on from a clip, --begin; leave one of both out")
    counts = [trained.frames_of(latent) for latent in range(1, shape[1])]
    clip = _clip_of(asked.begin, counts[-1], *trained.pixels_of(shape), "--begin", whole=False)  # type: ignore[arg-type]
    known = sum(count <= clip.shape[1] for count in counts)
    moments = encoder_of(trained)(_unit(clip[:, : counts[known - 1]]))  # (1, 2C, known, h, w)
    drawn = torch.arange(shape[1]) >= known
    given = {
        trained.draws.makes: F.pad(moments, (0, 0, 0, 0, 0, shape[1] - known)),
        "mask": drawn.float().view(1, 1, -1, 1, 1),
    }
    cond = {trained.draws.begins: moments[:, :, :1]} if trained.draws.begins else {}
    return Given(given, cond, 1.0)


def clip_given(
    trained: Trained,
    image: Path | None,
    begin: Path | None,
    mask: Path | None = None,
    control: Sequence[str] | None = None,
) -> Given:
    """What a picture or a clip becomes for a run that draws codes of clips: the codes of the first frames; with a mask, of the whole clip
    without what it covers; as `control`, of the whole clip of outlines that samples follow, or with `make` of a clip's outlines.

    Raises:
        UserError: a file that is no picture or clip; a mask without a clip, or a clip that is too short for it.
    """
    if image is None and begin is None and mask is None and not control:
        return Given({}, {}, 1.0)
    if (image is not None) + (begin is not None) + bool(control) != 1 or (mask is not None and begin is None):
        raise UserError(
            "expected --image FILE, its first frame, or --begin FILE, a clip, with or without --mask FILE, or --control FILE, "
            "outlines that it follows"
        )
    place, recipe, field = trained.place, trained.recipe, trained.draws.makes
    tokenizer = open_tokenizer(recipe, trained.dataset, place.runs_root, place.data_root, trained.hardware.device)
    _, frames, height, width = trained.decoded_shape
    if image is not None:
        return Given({field: tokenizer.encode(image_of(image, height, width)[None, :, None])}, {}, 1.0)
    if control:
        file, make = _outlines_named(control)
        drawn = _clip_of(file, frames, height, width, "--control", whole=True)
        outlines = outlines_of(drawn) if make else drawn
        return Given({f"outline_{field}": tokenizer.encode(_unit(outlines))}, {}, 1.0)
    assert begin is not None
    clip = _unit(_clip_of(begin, frames, height, width, "--begin", whole=mask is not None))
    if mask is None:
        return Given({field: tokenizer.encode(_cut(clip[:, :, : frames - 1], tokenizer))}, {}, 1.0)
    left = without(clip, mask_of(mask, height, width)[None, :, None])
    return Given({f"masked_{field}": tokenizer.encode(left)}, {}, 1.0)


def _outlines_named(texts: Sequence[str]) -> tuple[Path, bool]:
    """The clip that samples follow, and whether its outlines are first made of it."""
    control = control_named(texts[0])
    if len(texts) > 1 or control.name or control.scale != 1 or control.interval is not None:
        raise UserError(f"--control {shown(texts[-1])}: expected one clip, FILE or FILE:make=true")
    return control.file, control.make


def _clip_of(path: Path, frames: int, height: int, width: int, option: str, *, whole: bool) -> Tensor:
    """The first frames of a clip, `frames` or if not `whole` fewer, scaled and cut as pictures are, (3, F, H, W) uint8."""
    try:
        found = decode_frames(path.read_bytes(), frames)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise UserError(f"{option} {path}: {error}; `nexus sample` writes and reads clips as webp") from None
    if whole and len(found) < frames:
        raise UserError(f"{option} {path}: has {len(found)} frames; it must have {frames}, as samples have")
    fitted = [ImageOps.fit(Image.fromarray(one), (width, height), Image.Resampling.LANCZOS) for one in found]
    return torch.stack([pixels_of(one) for one in fitted], dim=1)


def _unit(clip: Tensor) -> Tensor:
    """(3, F, H, W) uint8 as (1, 3, F, H, W) in [-1, 1]."""
    return to_unit_range(clip, torch.uint8, "video")[None]


def _cut(clip: Tensor, tokenizer: Any) -> Tensor:
    """As many of its first frames as the tokenizer takes."""
    for frames in range(clip.shape[2], 1, -1):
        try:
            tokenizer.check((clip.shape[1], frames, *clip.shape[3:]))
        except UserError:
            continue
        return clip[:, :, :frames]
    return clip[:, :, :1]
