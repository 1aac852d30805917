"""The options of ingest_images that decide the bits of its output, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.fitting import FORMATS
from data_pipelines.image_decoding import Colour, Size, colour_of
from data_pipelines.sources import SourceSpec
from nexus_scale.contracts import UserError

CAPTIONS = ("auto", "required", "none")
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Options:
    """What decides the bits of the output."""

    sources: tuple[SourceSpec, ...]
    resolutions: tuple[Size, ...]
    heldout: float
    heldout_captions: int
    shard_samples: int
    seed: int
    max_bad: float
    format: str
    captions: str = "auto"
    background: Colour = WHITE

    def to_json(self) -> dict[str, Any]:
        """As the report has it; what older versions did not know is off (None) at its default."""
        values = {
            **vars(self),
            "sources": [spec.to_json() for spec in self.sources],
            "captions": None if self.captions == "auto" else self.captions,
            "background": None if self.background == WHITE else self.background,
        }
        return json.loads(json.dumps(values))  # tuples become lists, as when it is read back


def options_of(
    *,
    source: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    sources: Sequence[str | Mapping[str, Any]] | None = None,
    resolution: int | str | Sequence[Any] | None = None,
    resolutions: Sequence[Any] | None = None,
    heldout: float = 0.125,
    heldout_captions: int | None = None,
    shard_samples: int | None = None,
    seed: int = 0,
    max_bad: float = 0.01,
    format: str = "png",
    captions: str = "auto",
    background: Any = "white",
    ignore: str | Sequence[str] = (),
) -> Options:
    """Checks the options of `run`.

    Raises:
        UserError: names the option.
    """
    if (source is None) == (sources is None):
        raise UserError("ingest_images: give `source` (one) or `sources` (several to mix).")
    given: Any = source if sources is None else sources
    given = [given] if isinstance(given, str | Mapping) else given
    if not isinstance(given, Sequence):
        raise UserError(f"ingest_images: source {given!r}: expected a path, a mapping with `path`, or a list of them.")
    left_out = (ignore,) if isinstance(ignore, str) else tuple(ignore or ())
    specs = tuple(SourceSpec.of(each, left_out) for each in given)
    if not specs:
        raise UserError("ingest_images: sources is empty; expected at least one.")
    if len({spec.weight is None for spec in specs}) == 2:
        raise UserError("ingest_images: some sources have a weight and some have none; give all of them one, or none.")
    openmoji = any(spec.path == "openmoji" for spec in specs)
    if not _is_number(heldout) or not 0.0 <= heldout <= 0.5:
        raise UserError(f"ingest_images: heldout is {heldout}, expected a share from 0 to 0.5.")
    if not _is_number(max_bad) or not 0.0 <= max_bad <= 1.0:
        raise UserError(f"ingest_images: max_bad is {max_bad}, expected a share from 0 to 1.")
    if format not in FORMATS:
        raise UserError(f"ingest_images: format is {format!r}, expected one of {', '.join(FORMATS)}.")
    if captions not in CAPTIONS:
        raise UserError(f"ingest_images: captions is {captions!r}, expected one of {', '.join(CAPTIONS)}.")
    shard_samples = shard_samples if shard_samples is not None else (256 if openmoji else 1024)
    # The quickstart draws 42 samples of each of OpenMoji's six groups, two of each held-out prompt. With 42 prompts held out, a third
    # of the 131 foods would be missing from training.
    held = heldout_captions if heldout_captions is not None else (21 if openmoji and heldout > 0 else 0)
    for name, value, least in (
        ("shard_samples", shard_samples, 1),
        ("heldout_captions", held, 0),
        ("seed", seed, None),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            raise UserError(
                f"ingest_images: {name} is {value!r}, expected a whole number{'' if least is None else f' of at least {least}'}."
            )
    sizes = resolutions if resolutions is not None else resolution
    if resolution is not None and resolutions is not None:
        raise UserError("ingest_images: give `resolution` or `resolutions`, not both.")
    colour = colour_of(background, "ingest_images")
    return Options(
        specs, _sizes(sizes), float(heldout), held, shard_samples, seed, float(max_bad), format, captions, colour
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(value: Any) -> tuple[Size, ...]:
    """256, "256x384", [256, 384], or a list of these."""
    if value is None:
        return ()
    many = isinstance(value, Sequence) and not isinstance(value, str)
    if many and not (len(value) == 2 and all(isinstance(side, int) for side in value)):
        if any(isinstance(each, Sequence) and not isinstance(each, str) and len(each) != 2 for each in value):
            raise _no_size(value)
        return tuple(dict.fromkeys(size for each in value for size in _sizes(each)))
    sides = value.split("x") if isinstance(value, str) else list(value) if many else [value]
    whole = [
        int(side) if isinstance(side, str) and re.fullmatch(r"[0-9]{1,5}", side, re.ASCII) else side for side in sides
    ]
    size = (whole[0], whole[-1])
    if len(whole) > 2 or not all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 8192 for side in size
    ):
        raise _no_size(value)
    return (size,)


def _no_size(value: Any) -> UserError:
    return UserError(
        f"ingest_images: resolution {value!r}: expected a size such as 256, or height and width such as [256, 384]."
    )
