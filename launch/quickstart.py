"""From raw images to a report, in front of you: ingest, autoencoder, latents and text, MMDiT, samples, scores.

python launch/quickstart.py [key=value ...]
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time

import psutil

from nexus_scale import main_job
from nexus_scale.cli import guarded
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import find_config
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.io.stages import stage
from nexus_scale.io.terminal import keep_output_open
from nexus_scale.io.ticker import ticking
from nexus_scale.report.page import write_report


class Memory(threading.Thread):
    """Peak memory of this process and all below it, in bytes, looked at every two seconds. Pages that several share count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it ended meanwhile, and holds nothing any more
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            time.sleep(2.0)


def main() -> None:
    begun, memory = time.monotonic(), Memory()
    settings = read_yaml(find_config("quickstart"))
    target = main_job.resolve(settings["recipe"], sys.argv[1:], cluster=settings["cluster"])
    run = target.place.run
    summary = main_job.train_target(target)

    with stage(run.path, "sample"):
        evaluate.draw_prompts(target.place, settings["sample"]["prompts"])
    with stage(run.path, "score"):
        scores = evaluate.score_groups(target.place, evaluate.score_settings("quickstart"))

    write_report(run, given={"wall_seconds": time.monotonic() - begun, "peak_memory_bytes": memory.peak})
    print(main_job.summary_line(summary))
    print(
        f"{scores['group_accuracy']:.0%} of {scores['samples']} samples of prompts that training never saw are of the prompted group "
        f"(chance {1 / len(scores['groups']):.0%}); of real held-out images the classifier that says so recognises "
        f"{scores['real_accuracy']:.0%}"
    )
    print(f"Report: {run.report}")


if __name__ == "__main__":
    keep_output_open()  # first: the ticker listens to what stands then
    with ticking(every_s=9.0, max_s=9.0):  # a line at least every ten seconds
        guarded(main)
