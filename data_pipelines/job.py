"""A job that makes data: its options, how they become data, and how a rerun knows that the data are there.

Each file of JOBS is one job: its options class, a function that makes the data, one that says whether they are made, and

    JOB = Job(__name__, Options, make, is_made)
    run, done, main = JOB.run, JOB.done, JOB.main

Paths in the options are relative to the data root, names of runs to the runs root. Absolute paths stay as they are, except `output`,
which is a name below the data root. The job has its output to itself while it runs.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from data_pipelines.command import Progress, parser, progress_bar
from data_pipelines.options import JobOptions, Options, option
from data_pipelines.output_folder import LockError, held, output_folder
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.data.errors import storage_error
from nexus_scale.io.terminal import keep_output_open

JOBS = (
    "align_phonemes",
    "caption_images",
    "cluster_features",
    "cut_segments",
    "fetch_cifar10",
    "fetch_emoji_clips",
    "fetch_emoji_styles",
    "fetch_fashion_mnist",
    "generate_samples",
    "ingest_clips",
    "ingest_images",
    "ingest_speech",
    "label_segments",
    "make_mixture",
    "open_pipeline",
    "pair_utterances",
    "precompute_chroma",
    "precompute_codes",
    "precompute_controls",
    "precompute_image_prompts",
    "precompute_latents",
    "precompute_phonemes",
    "precompute_semantic",
    "precompute_text",
    "precompute_video_codes",
    "rasterise_openmoji",
    "render_scores",
    "synthesise_speech",
    "train_classifier",
)

O = TypeVar("O", bound=JobOptions)  # noqa: E741


class Roots(NamedTuple):
    """The folders that the paths and names in a job's options start from."""

    data_root: Path
    runs_root: Path


@dataclass(frozen=True)
class Job(Generic[O]):
    """A job: everything that calls it goes through `run`, `done` or `main`.

    Attributes:
        module: that it stands in: its file is the job's name, its docstring what `--help` says first.
        options: what it can be told.
        make: makes what is not there yet; gets the options, the roots, and `progress(done, total)` or None to call as it goes.
        is_made: whether `make` would have nothing to do.
    """

    module: str
    options: type[O]
    make: Callable[[O, Roots, Progress | None], Any]
    is_made: Callable[[O, Roots], bool]

    @property
    def name(self) -> str:
        """The name of the file that the job stands in."""
        return Path(str(sys.modules[self.module].__file__)).stem

    @property
    def about(self) -> str:
        """What `--help` says first."""
        return sys.modules[self.module].__doc__ or ""

    def run(self, *, data_root: Path, runs_root: Path, progress: Progress | None = None, **options: Any) -> Any:
        """Makes what is not there yet. A folder that is finished needs no lock, so that data on a read-only disk can be used.

        Raises:
            UserError: wrong options (code 2), data that cannot be used (3), a disk that is full or forbidden (6).
        """
        chosen, roots = self.options.of(options, self.name), Roots(data_root, runs_root)
        folder = output_folder(chosen.output, data_root)
        try:
            with held(folder, self.name):
                return self.make(chosen, roots, progress)
        except LockError as error:
            if self.is_made(chosen, roots):
                return self.make(chosen, roots, progress)
            raise UserError(str(error), error.code) from error
        except BrokenPipeError:
            raise  # nobody reads the command's output any more
        except OSError as error:
            raise storage_error(error, folder) from error

    def done(self, *, data_root: Path, runs_root: Path, **options: Any) -> bool:
        """Whether `run` with these options would have nothing to do.

        Raises:
            UserError: wrong options.
        """
        return self.is_made(self.options.of(options, self.name), Roots(data_root, runs_root))

    def values(self, argv: list[str] | None) -> tuple[dict[str, Any], Roots, bool]:
        """A command line: the options' values, the roots, and whether `--debug` is given. Ends the program where it is none."""
        command = parser(self.name, self.about)
        self.options.add_to(command)
        arguments = vars(command.parse_args(argv))
        try:
            values = self.options.from_arguments(arguments)
        except UserError as error:
            command.error(str(error))
        roots = (Path(os.path.expanduser(arguments[name])).absolute() for name in ("data_root", "runs_root"))
        return values, Roots(*roots), arguments["debug"]

    def main(self, argv: list[str] | None = None) -> int:
        """The job as a command. A user's mistake is one line on stderr; returns the exit code."""
        keep_output_open()
        values, roots, debug = self.values(argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        # Ray sends functions of `__main__` by value, with all that they use, and finds those of a module by name.
        job = load_job(self.name)
        print(f"{self.name}: data in {roots.data_root}, runs in {roots.runs_root}")
        try:
            with progress_bar(self.name) as progress:
                job.run(**values, **roots._asdict(), progress=progress)
        except UserError as error:
            if debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print(f"{self.name}: stopped; run the same command again to finish it", file=sys.stderr)
            return 130
        return 0


def load_job(name: str) -> Job[Any]:
    """The job `name`.

    Raises:
        UserError: there is no such job; names the nearest.
    """
    if name not in JOBS:
        raise UserError(f"prepare: no job {name!r} in {Path(__file__).parent.name}/; {nearest(name, list(JOBS))}")
    job: Job[Any] = importlib.import_module(f"{__package__}.{name}").JOB
    return job


class TrainOptions(Options):
    """`{job: train, recipe: ...}`: a run that the jobs after it need. The main job trains it."""

    recipe: str
    run: str | None = None
    set: dict[str, Any] = option(default={})


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks a step of a recipe's `prepare:` as far as it can be checked before it begins.

    Args:
        name: of a job, or `train`.
        options: as the recipe has them.
    Raises:
        UserError: names the job, the option, what was got and what was expected.
    """
    cls = TrainOptions if name == "train" else load_job(name).options
    cls.of(options, f"prepare: {name}")
