"""A classifier of small images and the features that it finds in held-out ones: what a run's samples are held against while it trains.

    python data_pipelines/train_classifier.py --score score_fashion_mnist --output fashion-mnist-classifier

It is the classifier with which `nexus score` judges runs by the same settings file, whose folders of images must be there. Takes a
minute or two on two cores. A recipe names the folder in `callbacks.monitor.classifier`.
"""

from __future__ import annotations

from pathlib import Path

from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import RECORD, Record, refuse_foreign
from nexus_scale.callbacks.monitor import CLASSIFIER, REAL
from nexus_scale.data.manifest import MANIFEST_FILE
from nexus_scale.evaluate.scores import ScoreSettings, real_groups, score_settings, train_classifier
from nexus_scale.io.durable import replacing
from nexus_scale.metrics.classifier import load_classifier, save_classifier
from nexus_scale.metrics.clips import features_of


class Options(JobOptions):
    """What the classifier learns from."""

    score: str = option(description="a settings file with a `score:` section, by path or by name below configs/")
    output: str = option(description="folder to make, below the data root")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Writes the classifier, and features of the real held-out samples of its groups.

    Raises:
        UserError: no such settings file; its folders are missing or hold no labelled images.
    """
    from safetensors.torch import save_file

    if is_made(options, roots):
        return
    folder, settings = roots.data_root / options.output, score_settings(options.score)
    refuse_foreign(folder, RECORD)
    record = _record(settings, folder, roots)
    train, heldout, names, _ = real_groups(roots.data_root, settings)
    made = train_classifier(train.samples, train.labels, num_classes=len(names), settings=settings)
    save_classifier(made, folder / CLASSIFIER)
    # as it is read back: files hold some of it in half precision
    features = features_of(load_classifier(folder / CLASSIFIER).features, heldout.samples)
    with replacing(folder / REAL) as partial:
        save_file({"features": features.contiguous()}, partial)
    record.write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether both files are there, made from these images."""
    folder = roots.data_root / options.output
    there = all((folder / name).is_file() for name in (CLASSIFIER, REAL, RECORD))
    return there and _record(score_settings(options.score), folder, roots).fits()


def _record(settings: ScoreSettings, folder: Path, roots: Roots) -> Record:
    files = [roots.data_root / source / MANIFEST_FILE for source in (settings.train, settings.heldout)]
    # how samples are drawn, and in what else they are measured, is no affair of the classifier
    decides = settings.model_dump(exclude={"features", "samples_per_group", "least_real_accuracy", "guidance", "steps"})
    return Record(folder, roots.data_root, decides, files)


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
