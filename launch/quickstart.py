"""From raw images to a report, in front of you: ingest, autoencoder, latents and text, MMDiT, samples, scores."""

from __future__ import annotations

import sys
import time

from nexus_scale import evaluate, main_job
from nexus_scale.cli import guarded
from nexus_scale.main_job import note_stage
from nexus_scale.recipe import find_config, read_yaml
from nexus_scale.report import write_report


def main() -> None:
    settings = read_yaml(find_config("quickstart"))
    target = main_job.resolve(settings["recipe"], sys.argv[1:], cluster=settings["cluster"])
    run = target.place.run
    summary = main_job.train_target(target)

    begun = time.monotonic()
    evaluate.draw_prompts(target.place, settings["sample"]["prompts"])
    note_stage(run, "sample", time.monotonic() - begun)

    begun = time.monotonic()
    scores = evaluate.score_groups(target.place, evaluate.score_settings("quickstart"))
    note_stage(run, "score", time.monotonic() - begun)

    write_report(run)
    print(main_job.summary_line(summary))
    print(f"{scores['group_accuracy']:.0%} of {scores['samples']} samples of held-out prompts are of the prompted kind (chance {1 / len(scores['per_group']):.0%});")
    print(f"the judge itself finds {scores['real_accuracy']:.0%} of real held-out images. Look at {run.report}")


if __name__ == "__main__":
    guarded(main)
