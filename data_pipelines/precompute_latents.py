"""Posterior moments of images or clips: a folder of them in, a folder of latents out, by Ray Data.

    python data_pipelines/precompute_latents.py --input openmoji-32/train/images --output openmoji-32/train/latents \\
        --vae-run vae_tiny_openmoji

Field `moments` (2C, h, w) float16, of clips (2C, f, h, w): mean and log-variance of the posterior that training draws from. `label`, and
sizes that are conditions (`--size-fields` of ingest_images), are copied if the images have them. `--mirror` adds `moments_mirrored`, the
moments of the image flipped left to right, `--masks` a random `mask` (1, h, w) of each image and `masked_moments`, those of the image
without what it covers. The autoencoder is a run of ours (averaged weights of its newest checkpoint) or a folder of diffusers'
AutoencoderKL or AutoencoderKLCogVideoX. A rerun makes only what is missing; another autoencoder makes everything again.

The manifest says how training normalises the latents: as the autoencoder states, (z - shift_factor) * scaling_factor, or by the mean and
standard deviation of the data per channel if it states nothing. `--statistics` asks for statistics of the data in any case: `channel`, or
`whole` for one factor over all channels. For clips the manifest also says how many frames the latents stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_pipelines.job import Roots
from data_pipelines.options import OneOf, option
from data_pipelines.shard_jobs import EncoderOptions, shard_job
from nexus_scale.conditioners.image import ImageConditioner
from nexus_scale.contracts import SIZES, UserError
from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import RawSample, decode
from nexus_scale.interop.autoencoders import Autoencoder, open_vae
from nexus_scale.orchestration.data_jobs import MOMENTS, ShardJob, Statistics
from nexus_scale.processes.latents import LatentStats
from nexus_scale.processes.masks import mask_of_places, random_mask, without
from nexus_scale.processes.pixels import to_unit_range

log = logging.getLogger(__name__)

MIRRORED = f"{MOMENTS}_mirrored"
CROP_MIRRORED = "crop_top_left_mirrored"
MASK, LEFT = "mask", f"masked_{MOMENTS}"
"""A random mask at the resolution of latents, and the moments of the image without what it covers."""
STATED = "stated"
KEPT = "kept"
NORMALISATION = "normalisation"
"""The key under which manifests name the origin of their statistics. Manifests of older versions lack it and have the data's."""
VIDEO = "video"
"""The field of clips that ingest_clips makes."""


class Options(EncoderOptions):
    """Which images or clips are encoded by which autoencoder."""

    input: str = option(description="folder of images or clips, below the data root")
    vae: Annotated[
        Mapping[str, Any],
        OneOf(
            run="name of a run of an autoencoder",
            folder="folder of a diffusers AutoencoderKL or AutoencoderKLCogVideoX, below the data root",
        ),
    ] = option(description="{run: name} or {folder: path of an AutoencoderKL}")
    batch: int = option(64, ge=1, description="images encoded at once")
    mirror: bool = option(False, description="also moments of mirrored images, for random flips in training")
    masks: bool = option(
        False, description="also a random mask of each image and the moments of what it leaves, for inpainting"
    )
    seed: int = option(0, ge=0, description="of the masks")
    statistics: str = option(
        STATED,
        description="what normalises the latents: `stated` by the autoencoder, or `channel` where it states nothing; `channel` or "
        "`whole`, of the data; or a folder of latents whose statistics these share",
    )


def plan(options: Options, roots: Roots) -> ShardJob:
    """The latents of a folder's images or clips. A folder that an older version made keeps the data's statistics.

    Raises:
        UserError: no images there, no such autoencoder, or images whose size it does not take.
    """
    source = Manifest.load(roots.data_root / options.input)
    output = roots.data_root / options.output
    image = next((field for field in source.fields.values() if field.is_image or field.name == VIDEO), None)
    if image is None:
        raise DataError(
            f"{source.folder}: got fields {sorted(source.fields)}, expected an image or a video; give a folder of those"
        )
    if options.masks and not image.is_image:
        raise UserError("precompute_latents: masks: are of images, and the input has clips; leave it out")
    vae = open_vae(options.vae, roots.runs_root, root=roots.data_root)
    _check_sizes(vae, source, image)
    stats, normalisation = _statistics(options.statistics, vae, roots.data_root, output)
    notes: dict[str, Any] = {NORMALISATION: normalisation}
    if not image.is_image and image.shape is not None and image.shape[1] is not None:
        notes["frames"] = image.shape[1]
    copied = [source.fields[name] for name in ("label", *SIZES, CROP_MIRRORED) if name in source.fields]
    sizes = [field.name for field in copied if field.name != "label"]
    return ShardJob(
        source=source.folder,
        output=output,
        make=partial(
            LatentEncoder,
            dict(options.vae),
            roots.runs_root,
            roots.data_root,
            image,
            copied,
            source.buckets,
            options.mirror,
            options.seed if options.masks else None,
        ),
        encoder={"kind": "vae", "fingerprint": vae.fingerprint},
        settings={"fields": [MOMENTS, *([MIRRORED] if options.mirror else []), "label", *sizes], **_masks(options)},
        batch=options.batch,
        statistics=stats,
        notes=notes,
        rates={
            name: rate
            for name in (MOMENTS, *([MIRRORED] if options.mirror else []))
            if (rate := source.rates.get(image.name))
        },
    )


def _masks(options: Options) -> dict[str, Any]:
    """What a manifest says of the masks; nothing where there are none."""
    return {"masks": options.seed} if options.masks else {}


def _check_sizes(vae: Autoencoder, source: Manifest, image: Field) -> None:
    """Raises DataError where the autoencoder does not take the size of an image or clip, before anything is encoded."""
    if not image.is_image:
        shapes = [tuple(side or 1 for side in image.shape or ())]
    else:
        sizes = [tuple(map(int, bucket.split("x"))) for bucket in source.buckets if "x" in bucket]
        shapes = [(3, *size) for size in sizes]
    for shape in shapes:
        try:
            vae.check(shape)
        except (ValueError, UserError) as error:
            raise _misfit(image, shape, error) from error


def _misfit(image: Field, shape: Sequence[int], error: Exception) -> DataError:
    how = "`resolution` of ingest_images" if image.is_image else "`size` and `frames` of ingest_clips"
    return DataError(f"got {'images' if image.is_image else 'clips'} of {tuple(shape[1:])}: {error}; set {how}")


def _statistics(name: str, vae: Autoencoder, data_root: Path, output: Path) -> tuple[Statistics | LatentStats, str]:
    """How latents are normalised, and where that comes from: `stated`, `channel`, `whole`, `shared` with another folder, or `kept`
    from an older version."""
    if name == STATED:
        if vae.stated is None:
            return "channel", "channel"
        if _made_before(output):
            log.info(
                "%s: made by an older version: its latents keep the statistics of the data, although the autoencoder states %s; to use "
                "those, name another output or delete the folder",
                output,
                vae.stated,
            )
            return "channel", KEPT
        return vae.stated, STATED
    if name in get_args(Statistics):
        return cast(Statistics, name), name
    folder = data_root / name
    if not folder.is_dir():
        known = " or ".join(get_args(Statistics))
        raise UserError(
            f"precompute_latents: statistics {name!r}; expected {known}, or a folder of latents, and {folder} is not one; the default "
            "is what the autoencoder states"
        )
    stats = Manifest.load(folder).latent
    if stats is None:
        raise DataError(f"{folder}: has no latent statistics; name a folder that precompute_latents made")
    return stats, "shared"


def _made_before(output: Path) -> bool:
    """Whether an older version made the latents in the folder, so that runs may have been trained on their statistics."""
    try:
        made = Manifest.load(output)
    except DataError:
        return False
    return made.latent is not None and (made.encoder or {}).get(NORMALISATION, KEPT) == KEPT


class LatentEncoder:
    """Encodes the images of a shard to moments; see data_jobs.ShardEncoder."""

    def __init__(
        self,
        vae: Mapping[str, Any],
        runs_root: Path,
        data_root: Path,
        image: Field,
        copied: Sequence[Field],
        buckets: Sequence[str],
        mirror: bool,
        mask_seed: int | None,
        device: str,
    ):
        opened = open_vae(vae, runs_root, root=data_root, device=device)
        self.conditioner = ImageConditioner(opened, clips=not image.is_image)
        self.image, self.copied = image, copied
        self.names = (MOMENTS, MIRRORED) if mirror else (MOMENTS,)
        self.mask_seed = mask_seed
        self.fingerprint = self.conditioner.fingerprint
        shape = self._shape(buckets)
        made = [Field(name, f"{name}.npy", "float16", shape) for name in self.names]
        if mask_seed is not None:
            made += [
                Field(LEFT, f"{LEFT}.npy", "float16", shape),
                Field(MASK, f"{MASK}.npy", "float16", (1, *shape[1:])),
            ]
        self.fields = [*made, *copied]

    def _shape(self, buckets: Sequence[str]) -> tuple[int | None, ...]:
        """(2C, h, w) where all images have one size, else (2C, None, None); clips have one, (2C, f, h, w)."""
        if not self.image.is_image:
            assert self.image.shape is not None
            size = [side or 1 for side in self.image.shape]
        elif len(buckets) != 1:
            return self.conditioner.fields[MOMENTS].shape
        else:
            size = [3, *map(int, buckets[0].split("x"))]
        return tuple(self._encoded([torch.zeros(size, dtype=torch.uint8)])[0][MOMENTS].shape)

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        """The moments of each sample, in order. Images of one size share a batch."""
        pixels = [self._pixels(sample.members[self.image.extension]) for sample in samples]
        encoded: list[dict[str, Any]] = [{} for _ in samples]
        for name in self.names:
            values = [image.flip(-1) for image in pixels] if name == MIRRORED else pixels
            for row, made in zip(encoded, self._encoded(values, samples[0].key), strict=True):
                row[name] = made[MOMENTS]
        if self.mask_seed is not None:
            for row, image, sample in zip(encoded, pixels, samples, strict=True):
                row.update(self._masked(image, sample.key, row[MOMENTS].shape[1:]))
        for row, sample in zip(encoded, samples, strict=True):
            row |= {field.name: decode(field.extension, sample.members[field.extension]) for field in self.copied}
        return encoded

    def _masked(self, image: Tensor, key: str, size: Sequence[int]) -> dict[str, np.ndarray]:
        """`mask` and `masked_moments` of an image (3, H, W) uint8; the mask depends on the seed and on the sample's key."""
        generator = np.random.default_rng([self.mask_seed or 0, xxhash.xxh3_64_intdigest(key.encode())])
        mask = random_mask(image.shape[1], image.shape[2], generator)[None]
        left = without(to_unit_range(image, image.dtype, "image")[None], mask)
        return {
            LEFT: self._encoded(list(left), key)[0][MOMENTS],
            MASK: mask_of_places(mask, size)[0].numpy().astype(np.float16),
        }

    def _pixels(self, data: bytes) -> Tensor:
        """(3, H, W) uint8 of an image, (3, F, H, W) of a clip."""
        if self.image.is_image:
            return torch.from_numpy(decode_image(data)).permute(2, 0, 1)
        return torch.from_numpy(decode(self.image.extension, data))

    def _encoded(self, images: Sequence[Tensor], key: str = "") -> Sequence[Mapping[str, np.ndarray]]:
        """The moments of images; `key` is the first one's, for messages."""
        try:
            return self.conditioner.encode(images)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        except (ValueError, UserError) as error:
            raise _misfit(self.image, tuple(images[0].shape), error) from error


JOB = shard_job(__name__, Options, plan, may_wait=True)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
