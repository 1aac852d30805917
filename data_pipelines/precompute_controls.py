"""Pictures for drawings to follow: a folder of images in, a folder of their edges (or what else a maker makes) out, by Ray Data.

    python data_pipelines/precompute_controls.py --input openmoji-32/train/images --output openmoji-32/train/edges --maker canny

Field `image` (png): of each image what the maker makes of it, white on black: `canny` (edges, by `--low` and `--high`), `blur` (by
`--radius`), `low_resolution` (`--factor`), `sketch` (`--radius`, `--contrast`) or `silhouette` (`--contrast`). A recipe gives it a name:
`named: {control: FOLDER}`, as it does with a folder of pictures that were made elsewhere and ingested. A rerun makes only what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from data_pipelines.job import Roots
from data_pipelines.options import option
from data_pipelines.shard_jobs import ShardOptions, shard_job
from nexus_scale.conditioners.control import CONTROL, ControlConditioner
from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import RawSample
from nexus_scale.orchestration.data_jobs import ShardJob
from nexus_scale.processes.followed import MAKERS


class Options(ShardOptions):
    """Which pictures, and what is made of them."""

    input: str = option(description="folder of images, below the data root")
    maker: Literal["canny", "blur", "low_resolution", "sketch", "silhouette"] = option(
        "canny", description="what is made of an image"
    )
    low: float | None = option(
        None, ge=0, le=4096, description="of canny: gradients of edges that continue others (100)"
    )
    high: float | None = option(None, ge=0, le=4096, description="of canny: gradients of edges (200)")
    radius: float | None = option(None, gt=0, le=1000, description="of blur and sketch, in pixels (4)")
    contrast: float | None = option(
        None, ge=0, le=255, description="of sketch (12) and silhouette (16): by how much a value of 0 to 255 differs"
    )
    factor: int | None = option(None, ge=1, le=4096, description="of low_resolution (4)")
    batch: int = option(64, ge=1, description="images decoded at once")

    def check(self) -> None:
        """Raises a UserError for settings of another maker."""
        own = {field.name for field in dataclasses.fields(MAKERS[self.maker])}
        if wrong := [name for name in self.settings() if name not in own]:
            raise UserError(
                f"precompute_controls: {', '.join(wrong)}: not of {self.maker}, which has {', '.join(sorted(own))}"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UserError(f"precompute_controls: got low {self.low:g} above high {self.high:g}")

    def settings(self) -> dict[str, Any]:
        """What is set of the maker."""
        asked = {name: getattr(self, name) for name in ("low", "high", "radius", "contrast", "factor")}
        return {name: value for name, value in asked.items() if value is not None}


def plan(options: Options, roots: Roots) -> ShardJob:
    """What is made of a folder's images.

    Raises:
        DataError: no images there, or several kinds.
    """
    source = Manifest.load(roots.data_root / options.input)
    conditioner = ControlConditioner(options.maker, options.settings())
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(ControlEncoder, source.image, options.maker, options.settings()),
        encoder={"kind": CONTROL, "fingerprint": conditioner.fingerprint, **conditioner.settings},
        settings=conditioner.settings,
        batch=options.batch,
    )


class ControlEncoder:
    """Makes the conditions of a shard's images; see data_jobs.ShardEncoder."""

    def __init__(self, image: Field, maker: str, settings: Mapping[str, Any], device: str):
        self.image, self.conditioner = image, ControlConditioner(maker, settings)
        self.fingerprint = self.conditioner.fingerprint
        self.fields = [Field("image", "png", "uint8", image.shape)]

    def encode(self, samples: Sequence[RawSample]) -> list[Mapping[str, Any]]:
        pixels = [torch.from_numpy(decode_image(sample.members[self.image.extension])) for sample in samples]
        made = self.conditioner.encode([one.permute(2, 0, 1) for one in pixels])
        return [{"image": one[CONTROL].transpose(1, 2, 0)} for one in made]


JOB = shard_job(__name__, Options, plan)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
