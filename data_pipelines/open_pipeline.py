"""A pipeline's folder of diffusers as something that draws before anything is trained: for pictures of a class that a fine-tuning is to
keep, and for prompts under which the tuned network is to be compared with it.

    python data_pipelines/open_pipeline.py --model models/sd15 --folders mine/train/latents --folders mine/train/text --output sd15

`nexus sample` and `nexus generate` take the folder as they take an export: its weights are links to the pipeline's, and `nexus.json` says
how they are told and drawn, in the sizes of the data in `--folders`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, Repeated, option
from data_pipelines.signatures import RECORD, Record, refuse_foreign
from nexus_scale.config.recipe import Cluster, Recipe, load_cluster, recipe_from
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.generate.exported import FILE, note
from nexus_scale.interop.folders import weight_files
from nexus_scale.interop.pipeline_folders import open_pipeline
from nexus_scale.interop.pipelines import link
from nexus_scale.interop.published import family
from nexus_scale.train import Place


class Options(JobOptions):
    """Which pipeline, and the data whose sizes it draws."""

    output: str = option(description="folder to make, below the data root")
    model: str = option(description="folder that diffusers saved, absolute or below the data root")
    folders: Annotated[str | Sequence[str], Repeated("FOLDER")] = option(
        description="folders of latents and texts that its encoders made, below the data root"
    )
    cluster: str | None = option(
        None,
        description="cluster file, or a name below configs/cluster/, on whose devices it draws (default: local_cpu)",
    )

    @property
    def joined(self) -> list[str]:
        """The folders of data."""
        return [self.folders] if isinstance(self.folders, str) else list(self.folders)

    def check(self) -> None:
        if not self.joined:
            raise UserError("folders: expected the folders of latents and of texts")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/nexus.json` and links to the network's weights.

    Raises:
        UserError: no such pipeline, no data, or a folder that holds something else.
    """
    if is_made(options, roots):
        return
    folder, model = roots.data_root / options.output, roots.data_root / options.model
    refuse_foreign(folder, RECORD)
    recipe = _recipe(options, roots)
    form = family(recipe.trained()["model"].name).formats["diffusers"]
    part = model.resolve() / form.part
    for file in [part / "config.json", *weight_files(part, form.file), *part.glob("*.index.json")]:
        link(file, folder / form.part / file.name)
    stats = Manifest.load(roots.data_root / options.joined[0]).latent
    cluster = Cluster() if options.cluster is None else load_cluster(options.cluster)
    note(Place(RunFolder(folder), roots.data_root, roots.runs_root), "diffusers", 0, recipe, cluster, stats, folder)
    _record(options, roots).write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the folder is there, made from this pipeline and these data."""
    folder = roots.data_root / options.output
    return (folder / FILE).is_file() and (folder / RECORD).is_file() and _record(options, roots).fits()


def _recipe(options: Options, roots: Roots) -> Recipe:
    """How the pipeline draws, as a recipe that trains nothing."""
    base = open_pipeline(roots.data_root / options.model)
    network = {key: value for key, value in base.network.items() if key != "init_from"}
    values = {
        "name": Path(options.output).name,
        "steps": 1,
        "global_batch": 1,
        "networks": {"model": network},
        "objective": dict(base.objective),
        "data": {
            "train": {"sources": [{"folders": options.joined}]}, "tokens": dict(base.tokens), "encoders": dict(base.encoders)
        },
        "sample": dict(base.sample),
    }  # fmt: skip
    return recipe_from(json.loads(json.dumps(values)), options.model)


def _record(options: Options, roots: Roots) -> Record:
    model = roots.data_root / options.model
    files = [*model.glob("*.json"), *model.glob("*/*.json"), *model.glob("*/*.safetensors")]
    decides = {"model": options.model, "folders": options.joined, "cluster": options.cluster}
    return Record(roots.data_root / options.output, roots.data_root, decides, sorted(files))


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
