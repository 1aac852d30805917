"""Points of a mixture of normal distributions on a square grid, whose modes a generator must find: 25 unless told otherwise.

    python data_pipelines/make_mixture.py --output mixture

Needs nothing else. Each point is a field `point` of two numbers, whose bits follow from the seed. The grid is that of WGAN-GP's public code
(igul222/improved_wgan_training, gan_toy.py) before it divides points by their spread: five rows of five modes, 2 apart, each of standard
deviation 0.05.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.class_images import finished
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import RECORD, Record, refuse_foreign
from nexus_scale.data.manifest import MANIFEST_FILE, Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.metrics.diversity import grid_of_modes

SHARD_SAMPLES = 10_000
FIELDS = [Field("point", "point.npy", "float32", (2,))]


class Options(JobOptions):
    """Which modes there are, and how many points are drawn from them."""

    output: str = option("mixture", description="folder to make, below the data root")
    side: int = option(5, ge=1, le=100, description="modes in a row, and rows")
    spacing: float = option(2.0, gt=0, le=1000, description="between neighbouring modes")
    deviation: float = option(0.05, ge=0, le=1000, description="standard deviation of each mode")
    samples: int = option(20_000, ge=1, le=10_000_000, description="points to train on")
    heldout: int = option(5_000, ge=1, le=10_000_000, description="points held out")
    seed: int = option(0, ge=0, lt=1 << 63, description="of the points")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/train/points` and `<output>/heldout/points`.

    Raises:
        UserError: the folder holds other data, or such points of other options.
    """
    folder, record = roots.data_root / options.output, _record(options, roots)
    refuse_foreign(folder, RECORD)
    record.refuse_others(finished(folder, _counts(options), "points"))
    if is_made(options, roots):
        return
    for number, (split, count) in enumerate(_counts(options).items()):
        place = folder / split / "points"
        (place / MANIFEST_FILE).unlink(missing_ok=True)  # data that are being changed must not look finished
        rng, modes = np.random.default_rng([options.seed, number]), grid_of_modes(options.side, options.spacing).numpy()
        points = modes[rng.integers(len(modes), size=count)] + options.deviation * rng.standard_normal((count, 2))
        files: list[str] = []
        for start in range(0, count, SHARD_SAMPLES):
            files.append(f"shard-{len(files):06d}.tar")
            with ShardWriter(place / files[-1], FIELDS) as writer:
                for row in range(start, min(start + SHARD_SAMPLES, count)):
                    writer.write(f"{row:08d}", {"point": points[row].astype(np.float32)})
            if progress is not None:
                progress(min(start + SHARD_SAMPLES, count), count)
        finish_folder(place, files=files, licence="CC0-1.0", attribution="made by data_pipelines/make_mixture.py")
    record.write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether both splits are there, of these options."""
    return _record(options, roots).fits() and finished(roots.data_root / options.output, _counts(options), "points")


def _counts(options: Options) -> dict[str, int]:
    return {"train": options.samples, "heldout": options.heldout}


def _record(options: Options, roots: Roots) -> Record:
    names = ("side", "spacing", "deviation", "samples", "heldout", "seed")
    return Record(
        roots.data_root / options.output, roots.data_root, {name: getattr(options, name) for name in names}, []
    )


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
