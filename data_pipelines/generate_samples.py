"""Samples of a trained run as a folder of shards: prompts or classes in, pictures, clips or sounds out, shard by shard, by Ray Data.

    nexus generate quickstart --prompts captions.txt --count 50000 --output samples
    nexus generate dit_tiny_cifar10 --per-class 5000 --output samples --latents
    python data_pipelines/generate_samples.py --per-class 5000 --output samples dit_tiny_cifar10

Each sample has `image` (png, webp), `video` (npy or mp4) or `audio` (wav, flac); `caption` or `label`, what was asked for; and `json`: its
prompt, seed and position. Sample i is the one that `nexus sample` draws at that seed and position. `--latents` keeps `latents` beside it,
the sample in model space, and `noise`, what it was drawn from: the pairs that a reflow trains on. The manifest names the run, the step and
the fingerprint of its weights, and other jobs and recipes read the folder like any other.

A relative `--output` of `nexus generate` lies below the current folder; that of the job, and of a recipe's `prepare`, below the data root.
What is asked for lies in `<output>/requests`. A rerun redoes nothing that is finished, more samples can be added by a larger count, and
the number of actors changes no bit. Samples of another run, step, seed or option are never replaced: they are refused by name. Networks
and decoders compute on the accelerator of the cluster file, the run's own unless `--cluster` names another, in its precision.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash

from data_pipelines.command import Progress, progress_bar
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, Positional, option
from nexus_scale.config.recipe import Cluster, Recipe, load_cluster, network_class, prompts_of
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.manifest import DataError, Field, Manifest, canonical_json
from nexus_scale.data.shards import RawSample, ShardWriter, finish_folder, is_finished, remove_others
from nexus_scale.engine.checkpoint import newest_of
from nexus_scale.engine.hardware import DTYPES, Hardware
from nexus_scale.generate.drawing import rehearse_decoding
from nexus_scale.generate.exported import exported_at
from nexus_scale.generate.prompts import Plan, Wishes, check_family, draw_rows, plan_of, shape_wanted
from nexus_scale.generate.trained import Trained
from nexus_scale.io.plain_text import clean_text
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.orchestration.cluster import data_root_of_run
from nexus_scale.orchestration.data_jobs import THREADS, ShardJob, is_done, refuse_others, run_job
from nexus_scale.run.files import open_run, precision_of
from nexus_scale.train import Place

log = logging.getLogger(__name__)

REQUESTS = "requests"
KEPT_PROMPTS = 1024
"""Different prompts whose conditions an actor keeps; of more, those of a batch are encoded with it."""


class Options(JobOptions):
    """Which samples of which run are drawn, and how."""

    output: str = option(
        description="folder to make: `nexus generate` takes a path of the shell, the job and a recipe's `prepare` one below the data root"
    )
    run: Annotated[str, Positional()] = option(description="name of a run, or the path of its folder or of an export's")
    prompts: str | None = option(None, description="text file with one prompt a line, or one class")
    per_class: int | None = option(None, ge=1, le=10**9, description="samples of each class, instead of prompts")
    count: int | None = option(
        None, ge=1, le=10**9, description="samples in all, the prompts over and over (default: one of each prompt)"
    )
    negative: str | None = option(None, description="what is guided away from, instead of no prompt")
    label: str | None = option(
        None, description="class told beside the text of each prompt, by name or number; of a run that is told both"
    )
    guidance: float | None = option(None, ge=-1000, le=1000, description="guidance scale (default: the recipe's)")
    steps: int | None = option(None, ge=1, le=100_000, description="sampler steps (default: the recipe's)")
    sampler: str | None = option(
        None, description="another sampler than the recipe's, such as ode:steps=10,method=heun"
    )
    true_guidance: float | None = option(
        None,
        ge=-1000,
        le=1000,
        description="of a network distilled to obey a scale: guide it besides, at twice the cost",
    )
    length: float | None = option(None, gt=0, description="frames of a clip, or seconds of sound at most")
    size: str | None = option(None, description="HEIGHTxWIDTH in pixels (default: the size that most of the data have)")
    seed: int = option(0, ge=0, lt=2**63, description="seed of the noise")
    speaker: str | None = option(None, description="of speech: a held-out speaker's label (default: the first)")
    weights: str | None = option(None, description="which average draws (default: the recipe's first)")
    format: str | None = option(None, description="png or webp; npy or mp4; wav or flac (default: the first)")
    latents: bool = option(
        False, description="keep each sample in model space too, with the noise that it was drawn from"
    )
    batch: int = option(64, ge=1, le=100_000, description="samples drawn at once")
    shard_samples: int = option(512, ge=1, le=10**6, description="samples in a shard")
    cluster: str | None = option(
        None, description="cluster file, or a name below configs/cluster/ (default: the run's own)"
    )
    workers: int | None = option(
        None, ge=0, description="actors of Ray Data; 0: in this process (default: the cluster's)"
    )
    threads: int = option(THREADS, ge=1, description="threads of each actor")

    def check(self) -> None:
        if self.prompts is not None and self.per_class is not None:
            raise UserError("prompts and per_class: both say what is drawn; give one")
        if self.per_class is not None and self.count is not None:
            raise UserError("per_class and count: both say how many are drawn; give one")
        if self.prompts is None and self.per_class is None and self.count is None:
            raise UserError("expected prompts, per_class, or the count of a run without conditions")


DRAWN_BY = (
    "negative", "label", "guidance", "true_guidance", "sampler", "steps", "size", "length", "speaker", "weights", "format", "latents",
)  # fmt: skip
"""Options that decide a sample's bits beside what its request says."""


@dataclass(frozen=True)
class Source:
    """What draws: a run at its newest checkpoint, or an exported folder; where its data lie, on what and in what it computes."""

    place: Place
    recipe: Recipe
    cluster: Cluster
    step: int
    weights: str
    precision: str

    @classmethod
    def of(cls, options: Options, roots: Roots) -> Source:
        """What the options name.

        Raises:
            UserError: no such run or export, or a run without a checkpoint.
        """
        named = Path(options.run).expanduser()
        path = named if named.is_absolute() else roots.runs_root / named
        other = None if options.cluster is None else load_cluster(options.cluster)
        exported = exported_at(path)
        if exported is not None:
            cluster = other or exported.cluster
            return cls(
                exported.place,
                exported.recipe,
                cluster,
                exported.step,
                exported.weights_hash,
                _precision(cluster, None),
            )
        run, recipe, own = open_run(path)
        place = Place(run, data_root_of_run(run, own), run.path.parent)
        checkpoint = newest_of(run)
        weights = checkpoint_hash(run, checkpoint.manifest)
        precision = _precision(other or own, precision_of(run))
        return cls(place, recipe, other or own, checkpoint.step, weights, precision)

    @property
    def device(self) -> Literal["auto", "cpu"]:
        """`auto`: a GPU where there is one; `cpu` where the cluster's workers have none."""
        return "auto" if self.cluster.gpus_per_worker else "cpu"

    def encoder(self, options: Options) -> dict[str, Any]:
        """What the manifest says of what drew."""
        section = self.recipe.sample
        sampler = None if section is None else section.model_dump(mode="json")
        drawn = {name: getattr(options, name) for name in DRAWN_BY}
        body = [self.weights, sampler, drawn, self.precision]
        return {
            "kind": "samples",
            "fingerprint": xxhash.xxh3_128_hexdigest(canonical_json(body)),
            "run": self.place.run.path.name,
            "step": self.step,
            "weights_hash": self.weights,
            "sampler": sampler,
            "precision": self.precision,
            "asked": {name: value for name, value in drawn.items() if value is not None and value is not False},
        }


def _precision(cluster: Cluster, chosen: str | None) -> str:
    """What a cluster file says to compute in; where it leaves that open, what the run's first start chose."""
    return (chosen or "float32") if cluster.precision == "auto" else cluster.precision


def checkpoint_hash(run: RunFolder, manifest: Mapping[str, Any]) -> str:
    """A hash of a checkpoint's weights, from its manifest, which has the hash of each file."""
    return xxhash.xxh3_128_hexdigest(json.dumps([run.path.name, manifest], sort_keys=True, default=str).encode())


# -------------------------------------------------------------------------------------------------- the requests


def requested(options: Options, roots: Roots, described: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the requests of these options, and says who is asked; `described`: `Source.encoder`."""
    prompts = None if options.prompts is None else read_prompts(options, roots)
    asked = [prompts, options.per_class, options.count, options.seed, options.shard_samples]
    return {
        "kind": REQUESTS,
        "fingerprint": xxhash.xxh3_128_hexdigest(canonical_json(asked)),
        "prompts": None if prompts is None else xxhash.xxh3_128_hexdigest(canonical_json(prompts)),
        "per_class": options.per_class,
        "count": options.count or (None if prompts is None else len(prompts)),
        "seed": options.seed,
        "shard_samples": options.shard_samples,
        "batch": options.batch,
        "threads": options.threads,
        "drawn": {key: described[key] for key in ("run", "step", "weights_hash", "sampler", "precision", "asked")},
    }


def refuse_other_samples(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuses a folder that holds samples of other options, whether finished or not, or what is no sample.

    Args:
        known: what is asked for now; more samples of the same may be added to those that are there.
    Raises:
        UserError: names the options that differ, or the file.
    """
    try:
        there = Manifest.load(folder / REQUESTS).encoder or {}
    except DataError:
        foreign = (
            [path.name for path in sorted(folder.iterdir()) if not _may_be_ours(path.name)] if folder.is_dir() else []
        )
        if foreign:
            raise UserError(f"{folder}: holds {foreign[0]!r}, which is no sample; give a new folder", 3) from None
        return
    changed = _differences(there, known)
    if changed:
        raise UserError(
            f"{folder}: holds samples that were asked for otherwise ({'; '.join(changed)}), and they would be lost; choose another output "
            "or move them away",
            3,
        )


def _may_be_ours(name: str) -> bool:
    return name.startswith((".", "shard-")) or name in (REQUESTS, "manifest.json", "index.safetensors", "report.json")


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was asked of the samples that are there, and what is asked now."""

    def unlike(was: Mapping[str, Any], is_: Mapping[str, Any]) -> list[str]:
        keys = [key for key in sorted({*was, *is_}) if was.get(key) != is_.get(key)]
        return [f"{key}: {was.get(key, 'the default')} there, {is_.get(key, 'the default')} now" for key in keys]

    same = ("seed", "shard_samples", "batch", "threads")  # the last two decide the last bits
    changed = unlike({key: there.get(key) for key in same}, {key: now[key] for key in same})
    kinds = [[what for what in ("prompts", "per_class", "count") if one.get(what) is not None] for one in (there, now)]
    if kinds[0] != kinds[1] or there.get("prompts") != now["prompts"]:
        changed.append("other prompts or classes")
    else:
        changed += [
            f"{what}: {there[what]} there, only {now[what]} now"
            for what in ("per_class", "count")
            if what in kinds[1] and there[what] > now[what]
        ]
    drew, draws = dict(there.get("drawn", {})), dict(now["drawn"])
    changed += unlike(drew.pop("asked", {}), draws.pop("asked"))
    return changed + unlike(drew, draws)


def read_prompts(options: Options, roots: Roots) -> list[str]:
    """The prompts of the file, as captions are.

    Raises:
        UserError: no such file, or nothing in it.
    """
    assert options.prompts is not None
    path = Path(options.prompts).expanduser()
    return [clean_text(prompt) for prompt in prompts_of(path if path.is_absolute() else roots.data_root / path)]


def write_requests(options: Options, known: Mapping[str, Any], prompts: Sequence[str], folder: Path) -> Manifest:
    """The requests as a folder of shards: `json` with prompt, seed and position of each sample. Finished shards stay."""
    try:
        there = Manifest.load(folder)
        there.verify()
        if there.encoder == json.loads(canonical_json(known)):
            return there
    except DataError:
        log.debug("%s: written", folder)
    total = total_of(options, len(prompts))
    files = []
    for number, begin in enumerate(range(0, total, options.shard_samples)):
        path = folder / f"shard-{number:06d}.tar"
        files.append(path.name)
        end = min(begin + options.shard_samples, total)
        rows = [[prompts[i % len(prompts)] if prompts else "", options.seed, i] for i in range(begin, end)]
        origin = canonical_json(rows).decode()
        if is_finished(path, origin):
            continue
        with ShardWriter(path, [Field("json", "json", "json")], origin=origin) as writer:
            for prompt, seed, position in rows:
                value = {"prompt": prompt, "seed": seed, "position": position}
                writer.write(f"{position:09d}", {"json": value}, bucket="")
    remove_others(folder, files)
    return finish_folder(folder, files=files, encoder=known)


def total_of(options: Options, prompts: int) -> int:
    """How many samples are drawn of so many prompts or classes."""
    return options.count or prompts * (options.per_class or 1)


# --------------------------------------------------------------------------------------------------- the drawing


def wishes_of(options: Options) -> Wishes:
    """What the options ask of drawing, as `nexus sample` asks it."""
    return Wishes(
        steps=options.steps, sampler=options.sampler, guidance=options.guidance, true_guidance=options.true_guidance,
        negative_prompt=options.negative, label=None if options.label is None else [options.label], size=options.size,
        length=options.length, seed=options.seed, speaker=options.speaker, weights=options.weights,
    )  # fmt: skip


class Drawing:
    """What draws the samples of requests, checked; see data_jobs.ShardEncoder.

    Args:
        place: the run and its data.
        options: those of the job.
        described: what the manifest says of what draws.
        different: all prompts, where they are few: they are encoded once; None: they are encoded batch by batch.
    Raises:
        UserError: what the run cannot draw, named.
    """

    def __init__(
        self,
        place: Place,
        options: Options,
        described: Mapping[str, Any],
        different: tuple[str, ...] | None,
        device: str,
    ):
        hardware = Hardware(torch.device(device), DTYPES[str(described["precision"])])
        self.trained = Trained(place.run, place, options.weights, hardware)
        self.options = options
        # Another checkpoint may have come since the job was planned.
        same = self.trained.step == described["step"]
        self.fingerprint = str(described["fingerprint"]) if same else f"step {self.trained.step}"
        self.wanted = wishes_of(options)
        self.wanted.check()
        draws, self.medium = self.trained.draws, self.trained.medium
        if options.latents and draws.walks != "denoise":
            raise UserError(
                f"--latents: {self.medium.name} of this run is not drawn from noise of its own shape; leave it out"
            )
        self.format = self._format(options.format)
        self.shape = shape_wanted(self.trained, self.wanted) if draws.walks == "denoise" else ()
        self.fields = self._fields()
        self.ready(different)

    def ready(self, different: tuple[str, ...] | None) -> Drawing:
        """Itself, with the conditions of these prompts at hand."""
        self.different = different
        self.plan = None if different is None else self.plan_of(different)
        return self

    def plan_of(self, prompts: Sequence[str]) -> Plan:
        """What is drawn of different prompts.

        Raises:
            UserError: a prompt that the run does not take, or an option that its family does not.
        """
        return plan_of(self.trained, prompts or [""], self.wanted)

    def _format(self, wanted: str | None) -> str:
        kinds = self.medium.shard_formats
        if wanted is not None and wanted not in kinds:
            raise UserError(f"format {wanted!r}: {self.medium.name} is written into shards as {' or '.join(kinds)}")
        return wanted or kinds[0]

    def _fields(self) -> list[Field]:
        fields = [self._shown]
        if self.trained.draws.conditions:
            fields.append(self._asked)
        if self.options.latents:
            fields += [Field(name, f"{name}.npy", "float32", self.shape) for name in ("latents", "noise")]
        return [*fields, Field("json", "json", "json")]

    @property
    def _shown(self) -> Field:
        """The field of what is seen or heard."""
        name, kind = self.medium.name, self.format
        if name == "audio":
            return Field(name, kind, "int16", (1, None)) if kind == "wav" else Field(name, kind, "bytes")
        decoded = rehearse_decoding(self.trained.decoded, self.shape or self.trained.shape)
        if kind == "npy":
            return Field(name, f"{name}.npy", "uint8", decoded)
        return Field(name, kind, "bytes") if kind == "mp4" else Field(name, kind, "uint8", (*decoded[1:], 3))

    @property
    def _asked(self) -> Field:
        """The field of what was asked for."""
        speaks, told = "voice" in self.trained.draws.takes, self.trained.conditioned
        if not speaks and told.takes_label and not told.takes_both:
            return Field("label", "cls", "int64", ())
        return Field("caption", "txt", "text")

    def encode(self, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        """One shard's requests, batch by batch, to what is written of each."""
        asked = [json.loads(sample.members["json"]) for sample in samples]
        seed, positions = asked[0]["seed"], [one["position"] for one in asked]
        prompts = [one["prompt"] for one in asked]
        different = tuple(dict.fromkeys(prompts)) if self.plan is None else self.different or ("",)
        plan = self.plan or self.plan_of(different)
        place_of = {prompt: place for place, prompt in enumerate(different)}
        rows = [place_of[prompt] for prompt in prompts]
        made, shown = draw_rows(self.trained, plan, rows, positions, seed)
        values = [{**self._written(one), "json": request} for one, request in zip(shown, asked, strict=True)]
        if self.trained.draws.conditions:
            name = self._asked.name
            told = [int(plan.cond["label"][row]) for row in rows] if name == "label" else prompts
            self._add(values, name, told)
        if self.options.latents:
            rng = ProgressRng(seed, 0, "sample", torch.tensor(positions), self.trained.hardware.device)
            self._add(values, "latents", made.samples.float().cpu().numpy())
            self._add(values, "noise", rng.normal("noise", self.shape).cpu().numpy())
        return values

    @staticmethod
    def _add(values: Sequence[dict[str, Any]], name: str, column: Iterable[Any]) -> None:
        for row, value in zip(values, column, strict=True):
            row[name] = value

    def _written(self, shown: torch.Tensor) -> dict[str, Any]:
        if self.format == "npy":
            return {self.medium.name: ((shown + 1) * 127.5).round().to(torch.uint8).cpu().numpy()}
        return {self.medium.name: self.medium.file(shown, self.format)}

    @property
    def rates(self) -> dict[str, float]:
        """Frames or samples of sound a second."""
        return {} if self.medium.rate_hz is None else {self.medium.name: self.medium.rate_hz}


# ------------------------------------------------------------------------------------------------------- the job


def classes_of(trained: Trained) -> list[str]:
    """All classes of a run, by number.

    Raises:
        UserError: it is told none, or nothing says how many there are.
    """
    if not trained.draws.conditions or "voice" in trained.draws.takes or not trained.conditioned.takes_label:
        raise UserError(f"per_class: recipe {trained.recipe.name} is told no classes; give prompts")
    if trained.conditioned.takes_both:
        raise UserError(
            f"per_class: recipe {trained.recipe.name} is told a class beside a text; give prompts and a label"
        )
    known = trained.conditioned.label
    # An exported network may have room for more classes than the recipe's.
    rooms = [network_class(spec)[1].get("num_classes") for spec in trained.recipe.trained().values()]
    count = min((room for room in (known.num_classes, *rooms) if room), default=len(known.names))
    if not count:
        raise UserError("per_class: nothing says how many classes there are; give their numbers as prompts")
    return [str(number) for number in range(count)]


def plan(options: Options, roots: Roots, source: Source, rates: Mapping[str, float], **made: Any) -> ShardJob:
    """The samples of the requests that lie in the output's folder."""
    output = roots.data_root / options.output
    described = source.encoder(options)
    return ShardJob(
        source=output / REQUESTS,
        output=output,
        make=partial(Drawing, source.place, options, described, made.get("different")),
        encoder=described,
        settings={"batch": options.batch, "threads": options.threads},
        batch=options.batch,
        rates=rates,
    )


def make(options: Options, roots: Roots, progress: Progress | None) -> Manifest:
    """Draws what is not there yet.

    Raises:
        UserError: what the run cannot draw, named, before anything is drawn; see also `run_job`.
    """
    source, prompts = Source.of(options, roots), []
    if options.prompts is not None:
        prompts = read_prompts(options, roots)
    described = source.encoder(options)
    device = "cuda" if source.device == "auto" and torch.cuda.is_available() else "cpu"
    if source.device == "auto" and device == "cpu" and options.workers == 0:
        log.warning("cluster %s: workers have GPUs, torch sees none here: drawing on the CPU", source.cluster.name)
    first = Drawing(source.place, options, described, None, device)
    if options.per_class is not None:
        prompts = classes_of(first.trained)
    if first.trained.draws.conditions and not prompts:
        raise UserError("count: expected at least one prompt; give --prompts FILE or --per-class N")
    check_family(first.trained, prompts, first.wanted)
    different = tuple(dict.fromkeys(prompts))
    first.plan_of(different[:KEPT_PROMPTS])
    few = different if len(different) <= KEPT_PROMPTS else None
    job = plan(options, roots, source, first.rates, different=few)
    known = requested(options, roots, described)
    refuse_others(job)
    refuse_other_samples(job.output, known)
    write_requests(options, known, prompts, job.source)
    workers = source.cluster.max_workers if options.workers is None else options.workers
    if workers == 0:  # what checked the prompts draws them
        job = replace(job, make=lambda _: first.ready(few))
    return run_job(job, workers=workers, threads=options.threads, device=source.device, progress=progress)


def is_made(options: Options, roots: Roots) -> bool:
    """Whether all samples are there, drawn by the run as it is."""
    try:
        there = Manifest.load(roots.data_root / options.output / REQUESTS)
        source = Source.of(options, roots)
        if there.encoder != json.loads(canonical_json(requested(options, roots, source.encoder(options)))):
            return False
        return is_done(plan(options, roots, source, {}))
    except UserError:
        return False  # the run is yet to be trained


def command(argv: Sequence[str], path_of: Callable[[str], Path]) -> Path:
    """`nexus generate RUN ... --output FOLDER`, whose paths are those of the shell; returns the folder.

    Args:
        path_of: a run's folder, by its path or name.
    """
    parser = argparse.ArgumentParser(
        prog="nexus generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    Options.add_to(parser)
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    arguments = vars(parser.parse_args(list(argv)))
    values = Options.from_arguments(arguments)
    folder, run = Path(values["output"]).expanduser().absolute(), path_of(values["run"]).absolute()
    values |= {"output": folder.name, "run": str(run)}
    if values["prompts"] is not None:
        values["prompts"] = str(Path(values["prompts"]).expanduser().absolute())
    with progress_bar("generate") as progress:
        JOB.run(data_root=folder.parent, runs_root=run.parent, progress=progress, **values)
    return folder


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
