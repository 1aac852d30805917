"""The options of ingest_images."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from data_pipelines.image_decoding import Colour, Size, colour_of
from data_pipelines.options import Hidden, JobOptions, Repeated, option
from data_pipelines.source_spec import SourcesFlag, SourceSpec
from nexus_scale.contracts import UserError
from nexus_scale.data.buckets import TABLES

WHITE = (255, 255, 255)


class Options(JobOptions):
    """Which images become data, and how. Properties combine several options."""

    source: Annotated[str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None, Hidden()] = option(
        None, description="one source, see data_pipelines.sources.SourceSpec"
    )
    sources: Annotated[Sequence[str | Mapping[str, Any]] | None, SourcesFlag("samples")] = option(
        None, description="several sources to mix"
    )
    resolution: Annotated[int | str | Sequence[Any] | None, Repeated()] = option(
        None,
        description="256, 256x384 (height x width), or a published table of aspect ratios: 40_of_1024, 33_of_1024, 33_of_512, 33_of_256; "
        "may be repeated (default: each size is kept)",
    )
    resolutions: Annotated[Sequence[Any] | None, Hidden()] = option(None, description="several sizes")
    heldout: float = option(0.125, ge=0, lt=1, description="share of groups that is held out")
    heldout_captions: int | None = option(
        None, ge=0, description="different captions held out of each label, at least (default: 21 for openmoji, else 0)"
    )
    shard_samples: int | None = option(
        None, ge=1, description="samples in a shard (default: 256 for openmoji, else 1024)"
    )
    seed: int = option(0, description="of the split and the order")
    max_bad: float = option(0.01, ge=0, le=1, description="share of bad samples above which the job gives up")
    format: Literal["jpg", "png", "webp"] = option(
        "png",
        description="how images are stored: png, webp (lossless where encoded here) or jpg; an image that has the format and a bucket's "
        "size is stored as it is",
    )
    crop: Literal["centre", "random"] = option(
        "centre",
        description="which part of an image that is longer than its size is kept; random: one part, by the seed and the image",
    )
    size_fields: bool = option(
        False, description="also fields original_size, crop_top_left and target_size (height and width), as conditions"
    )
    captions: Literal["auto", "required", "none"] = option(
        "auto", description="required: every sample must have one; auto: if any sample has one"
    )
    background: str | Sequence[int] = option(
        "white", description="colour behind transparent parts: white, '#808080' or, in a recipe, [128, 128, 128]"
    )
    ignore: Annotated[str | Sequence[str], Repeated("PATTERN")] = option(
        (), description="names or paths to leave out, of all sources; may be repeated"
    )
    threads: int | None = option(
        None,
        ge=0,
        description="threads that decode and resize; the output does not depend on it (default, or 0: up to 8)",
    )

    @cached_property
    def specs(self) -> tuple[SourceSpec, ...]:
        """The sources, each with the `ignore` patterns of the job."""
        ignore = (self.ignore,) if isinstance(self.ignore, str) else self.ignore
        given = self.source if self.sources is None else self.sources
        return tuple(
            SourceSpec.of(one, ignore) for one in ([given] if isinstance(given, str | Mapping) else given or ())
        )

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of each bucket; empty where every size is kept."""
        return _sizes(self.resolution if self.resolutions is None else self.resolutions)

    @cached_property
    def colour(self) -> Colour:
        """The background."""
        return colour_of(self.background)

    @property
    def least_captions(self) -> int:
        """Least number of different captions that are held out of each label."""
        if self.heldout_captions is not None:
            return self.heldout_captions
        # The quickstart draws 42 samples of each of OpenMoji's six groups, two of each held-out prompt. With 42 prompts held out, a
        # third of the 131 foods would be missing from training.
        return 21 if self._openmoji and self.heldout > 0 else 0

    @property
    def samples_per_shard(self) -> int:
        """Most samples in a shard."""
        return self.shard_samples or (256 if self._openmoji else 1024)

    @property
    def _openmoji(self) -> bool:
        return any(spec.path == "openmoji" for spec in self.specs)

    def check(self) -> None:
        if (self.source is None) == (self.sources is None):
            raise UserError("give `source` (one) or `sources` (several to mix).")
        if not self.specs:
            raise UserError("sources is empty; expected at least one.")
        if len({spec.weight is None for spec in self.specs}) == 2:
            raise UserError("some sources have a weight and some have none; give all of them one, or none.")
        if self.resolution is not None and self.resolutions is not None:
            raise UserError("give `resolution` or `resolutions`, not both.")
        _ = self.sizes, self.colour

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the bits of the output, as reports hold it; options unknown to older versions are None at default."""
        values = {
            "sources": [spec.to_json() for spec in self.specs],
            "resolutions": self.sizes,
            "heldout": self.heldout,
            "heldout_captions": self.least_captions,
            "shard_samples": self.samples_per_shard,
            "seed": self.seed,
            "max_bad": self.max_bad,
            "format": self.format,
            "captions": None if self.captions == "auto" else self.captions,
            "background": None if self.colour == WHITE else self.colour,
            "crop": None if self.crop == "centre" else self.crop,
            "size_fields": self.size_fields or None,
        }
        return json.loads(json.dumps(values))  # tuples become lists, as in a report that is read back


def _sizes(value: Any) -> tuple[Size, ...]:
    """The sizes that 256, "256x384", [256, 384] or a list of these name."""
    if value is None:
        return ()
    many = isinstance(value, Sequence) and not isinstance(value, str)
    if many and not (len(value) == 2 and all(isinstance(side, int) for side in value)):
        if any(isinstance(each, Sequence) and not isinstance(each, str) and len(each) != 2 for each in value):
            raise _no_size(value)
        return tuple(dict.fromkeys(size for each in value for size in _sizes(each)))
    if isinstance(value, str) and value in TABLES:
        return tuple((bucket.height, bucket.width) for bucket in TABLES[value])
    sides = value.split("x") if isinstance(value, str) else list(value) if many else [value]
    whole: list[Any] = [
        int(side) if isinstance(side, str) and re.fullmatch(r"[0-9]{1,5}", side, re.ASCII) else side for side in sides
    ]
    height, width = whole[0], whole[-1]
    if len(whole) > 2 or not all(type(side) is int and 1 <= side <= 8192 for side in (height, width)):
        raise _no_size(value)
    return ((height, width),)


def _no_size(value: Any) -> UserError:
    return UserError(
        f"resolution {value!r}: expected a size such as 256, height and width such as [256, 384], or a table: {', '.join(TABLES)}."
    )
