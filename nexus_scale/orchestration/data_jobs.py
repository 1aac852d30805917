"""Jobs from shards to shards, on Ray Data or in this process, with the same bits.

An encoder makes each output shard from one input shard, in batches within the shard and with a fixed number of threads, so that neither
the number of actors nor a kill changes a bit. An output shard appears whole or not at all, and records what it was made from (the input's
hash, the encoder's fingerprint, the settings): a rerun makes what is missing. The manifest comes last, when everything is done.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nexus_scale.contracts import UserError
from nexus_scale.data.errors import storage_error
from nexus_scale.data.manifest import (
    MANIFEST_FILE,
    DataError,
    Field,
    Manifest,
    canonical_json,
    hash_file,
)
from nexus_scale.data.shards import (
    RawSample,
    ShardWriter,
    counts_of,
    finish_folder,
    is_finished,
    read_samples,
    remove_others,
)
from nexus_scale.io.durable import atomic_write, umask
from nexus_scale.processes.latents import LOGVAR_RANGE, LatentStats

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""`progress(done, total)` in samples."""

THREADS = 1
"""Threads of an encoder on every machine, because sums of floating-point numbers depend on it. More shards at once use a machine better
than more threads: on a busy machine a second thread made MiniLM ten times slower (threads wait for each other at every layer; two cores,
load 13)."""
REPORT = "report.json"
MOMENTS = "moments"
"""The field whose mean and standard deviation per channel go into the manifest."""


Statistics = Literal["channel", "whole"]
"""How latents are normalised: by a mean and a standard deviation per channel, or by one factor for all and no shift
(Rombach et al. 2022; the `scaling_factor` of diffusers' autoencoders)."""


class ShardEncoder(Protocol):
    """Makes output samples from input samples, in one process. `fingerprint` is that of what it has loaded."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def fields(self) -> Sequence[Field]: ...

    def encode(self, samples: Sequence[RawSample]) -> Sequence[Mapping[str, Any]]:
        """Values by field name for each sample, in order."""
        ...


class Row(NamedTuple):
    """A sample to write; `bucket` as `ShardWriter.write` takes it."""

    key: str
    values: Mapping[str, Any]
    bucket: str | None = None


@runtime_checkable
class Placing(Protocol):
    """An encoder that decides how its samples are written: in buckets of its own, or several for one input. Without `place` each input
    becomes one output of the same key, and folders can be joined."""

    def place(self, key: str, values: Mapping[str, Any]) -> Iterable[Row]: ...


@runtime_checkable
class Counting(Protocol):
    """An encoder that counts remarks on its samples, for instance captions that were cut. `counts` restarts with each shard."""

    counts: Counter[str]


@dataclass(frozen=True)
class ShardJob:
    """A job over all shards of a folder.

    Attributes:
        source, output: folders.
        make: builds the encoder on a device (`cpu`, `cuda`); called once in each process, so it must be picklable.
        encoder: what the manifest says of it; `fingerprint` in it is compared with the one that `make` gives.
        settings: what else decides the output's bits.
        batch: samples that are encoded at once.
        statistics: how the field `moments` is measured for the manifest, or what is known of it already: what its autoencoder states,
            and sources that are trained on together share theirs. None where there is no such field.
        rates: frames or samples of sound a second, by output field; they follow from the input.
        notes: what else the manifest says of the encoder, and follows from it and the input; folders of older versions lack it.
    """

    source: Path
    output: Path
    make: Callable[[str], ShardEncoder]
    encoder: Mapping[str, Any]
    settings: Mapping[str, Any]
    batch: int
    statistics: Statistics | LatentStats | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def origin(self, shard_hash: str) -> str:
        """What an output shard is made from, and how."""
        return canonical_json([shard_hash, dict(self.encoder), dict(self.settings)]).decode()


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    source: str
    source_hash: str
    output: str
    origin: str
    batch: int
    fingerprint: str


def is_done(job: ShardJob) -> bool:
    """Whether the output is complete: made from this input by this encoder with these settings."""
    try:
        source, made = Manifest.load(job.source), Manifest.load(job.output)
        made.verify()
    except DataError:
        return False
    if not _is_of(made, source, job) or _missing(source, job):
        return False
    files = [shard.file for shard in source.shards]
    return job.statistics is None or made.latent == _latent_stats(job.output, files, job.statistics)


def run_job(
    job: ShardJob,
    *,
    workers: int | None = None,
    threads: int = THREADS,
    device: str = "auto",
    progress: Progress | None = None,
) -> Manifest:
    """The output's manifest, after what is missing was made.

    Args:
        workers: actors of Ray Data; 0 encodes in this process, without Ray. None takes one for every two cores, or one for each GPU
            where the cluster has any.
        threads: of each encoder. Other numbers change the last bits.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
    Raises:
        UserError: no input, a damaged shard, too few resources, or another encoder than the one announced.
    """
    if job.batch < 1 or threads < 1 or (workers is not None and workers < 0):
        raise UserError(f"batch {job.batch}, threads {threads}, workers {workers}: expected at least 1, 1 and 0.")
    inner, outer = job.output.resolve(), job.source.resolve()
    if inner == outer or outer in inner.parents:
        what = "input and output are one folder" if inner == outer else f"the output lies in the input {job.source}"
        raise UserError(f"{job.output}: {what}; choose another output.")
    source = Manifest.load(job.source)
    source.verify()
    if is_done(job):
        return Manifest.load(job.output)
    refuse_others(job)
    job.output.mkdir(parents=True, exist_ok=True)
    if (job.output / MANIFEST_FILE).is_file():
        log.info("%s: its data, encoder or settings changed; it is made again", job.output)
        (job.output / MANIFEST_FILE).unlink()  # a folder that changes must not look finished

    tasks = _missing(source, job)
    done = source.samples - sum(samples for _, samples in tasks)
    if 0 < done < source.samples:
        log.info("%s: %d of %d samples exist already", job.output, done, source.samples)
    if progress is not None:
        progress(done, source.samples)
    how = _in_process if workers == 0 else _on_ray
    all_made = []
    for made in how(job.make, [task for task, _ in tasks], workers, threads, device) if tasks else ():
        all_made.append(made)
        done += made.samples
        if progress is not None:
            progress(done, source.samples)

    if all_made:
        log.info(
            "%s: %d samples by %d processes; %.0f %% of their time was spent in the encoder",
            job.output, sum(made.samples for made in all_made), len({made.process for made in all_made}),
            100 * encoder_share(all_made),
        )  # fmt: skip

    files = [shard.file for shard in source.shards]
    remove_others(job.output, files)
    _report(job.output, files, source.samples)
    return finish_folder(
        job.output,
        files=files,
        encoder={**job.encoder, **job.notes},
        latent=_latent_stats(job.output, files, job.statistics) if job.statistics else None,
        source=source.hash,
        licence=source.licence,
        attribution=source.attribution,
        rates=job.rates,
    )


def _report(folder: Path, files: Sequence[str], samples: int) -> None:
    """Writes `report.json`: the number of samples and the encoder's counts, which the log has, too."""
    counts = dict(sorted(counts_of(folder / file for file in files).items()))
    for what, count in counts.items():
        log.warning("%s: %d of %d: %s", folder, count, samples, what)
    atomic_write(folder / REPORT, json.dumps({"samples": samples, "counts": counts}, indent=1, ensure_ascii=False))


def refuse_others(job: ShardJob) -> None:
    """Raises UserError where the output holds data of another kind of job, which this one could not make again."""
    try:
        there = Manifest.load(job.output).encoder
    except DataError:
        return
    got, own = (None if each is None else each.get("kind") for each in (there, job.encoder))
    if got != own:
        made = "of no encoder (such as ingested ones)" if got is None else f"of kind {got!r}"
        raise UserError(
            f"{job.output}: holds data {made}, this job makes {own!r} and would replace them; choose another output or move them away.",
            3,
        )


def _is_of(made: Manifest, source: Manifest, job: ShardJob) -> bool:
    if made.source != source.hash or made.encoder is None:
        return False
    known = {**job.encoder, **{key: value for key, value in job.notes.items() if key in made.encoder}}
    return dict(made.encoder) == json.loads(canonical_json(known))


def _missing(source: Manifest, job: ShardJob) -> list[tuple[Task, int]]:
    """Tasks of the unfinished shards, each with its number of samples."""
    tasks = []
    for shard in source.shards:
        path, origin = job.output / shard.file, job.origin(shard.xxh3_128)
        if not is_finished(path, origin) or (job.statistics and _sums_of(path) is None):
            fingerprint = str(job.encoder["fingerprint"])
            task = Task(str(job.source / shard.file), shard.xxh3_128, str(path), origin, job.batch, fingerprint)
            tasks.append((task, shard.samples))
    return tasks


# ------------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class Made:
    """A shard that was made.

    Attributes:
        samples: of the input.
        encoding_s: seconds within the encoder, which also reads its samples' payloads; the rest is files, hashes and waiting.
        begun_s, ended_s: on the process's own clock.
        process: host and process id.
    """

    samples: int
    encoding_s: float
    begun_s: float
    ended_s: float
    process: str


def encoder_share(all_made: Sequence[Made]) -> float:
    """The share of the processes' time, each from the beginning of its first shard to the end of its last, that is spent in the encoder."""
    lives = 0.0
    for process in {made.process for made in all_made}:
        own = [made for made in all_made if made.process == process]
        lives += max(made.ended_s for made in own) - min(made.begun_s for made in own)
    return sum(made.encoding_s for made in all_made) / lives


def encode_shard(encoder: ShardEncoder, task: Task) -> Made:
    """Makes one output shard.

    Raises:
        DataError: the input does not match its manifest, or the encoder is not the one announced.
    """
    begun, encoding = time.monotonic(), 0.0
    if encoder.fingerprint != task.fingerprint:
        raise DataError(
            f"{task.output}: the encoder has fingerprint {encoder.fingerprint}, the job was begun with "
            f"{task.fingerprint}; it has changed since: run the job again"
        )
    source, output = Path(task.source), Path(task.output)
    if (got := hash_file(source)) != task.source_hash:
        raise DataError(f"{source}: got hash {got}, expected {task.source_hash}; restore it or make it again")
    sums, done = _Sums(), 0
    if isinstance(encoder, Counting):
        encoder.counts.clear()
    place = encoder.place if isinstance(encoder, Placing) else lambda key, values: [Row(key, values)]
    with ShardWriter(output, encoder.fields, origin=task.origin) as writer:
        samples = read_samples(source)
        while batch := list(itertools.islice(samples, task.batch)):
            before = time.monotonic()
            encoded = encoder.encode(batch)
            encoding += time.monotonic() - before
            for sample, values in zip(batch, encoded, strict=True):
                for row in place(sample.key, values):
                    writer.write(row.key, row.values, row.bucket)
                if MOMENTS in values:
                    sums.add(np.asarray(values[MOMENTS]))
            done += len(batch)
        if isinstance(encoder, Counting):
            writer.counts = dict(encoder.counts)
        if sums.count:
            # Before the shard gets its name, so that a finished shard always has its sums.
            atomic_write(_sums_file(output), canonical_json({"origin": task.origin, **sums.to_json()}))
    return Made(done, encoding, begun, time.monotonic(), f"{socket.gethostname()}:{os.getpid()}")


class _Sums:
    """Sums over a shard's moments, (2C, h, w) or (2C, f, h, w), per channel: of the posterior's mean, of mean^2 + variance, and the count.

    Each sample is summed in float64; the sums over samples and shards are exact (`math.fsum`).
    """

    def __init__(self) -> None:
        self.count = 0
        self._first: list[np.ndarray] = []
        self._second: list[np.ndarray] = []

    def add(self, moments: np.ndarray) -> None:
        mean, logvar = np.split(moments.astype(np.float64), 2)  # (C, ...) each
        logvar = logvar.clip(*LOGVAR_RANGE)  # as in training, before it draws
        places = tuple(range(1, mean.ndim))
        self._first.append(mean.sum(axis=places))
        self._second.append((mean**2 + np.exp(logvar)).sum(axis=places))
        self.count += mean[0].size

    def to_json(self) -> dict[str, Any]:
        def exact(rows: list[np.ndarray]) -> list[float]:
            return [math.fsum(channel) for channel in np.stack(rows, axis=1)]

        return {"count": self.count, "first": exact(self._first), "second": exact(self._second)}


def _sums_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.sums.json")


def _sums_of(shard: Path) -> dict[str, Any] | None:
    """The sums of a shard's moments; None where they are missing or torn, and the shard must be made again."""
    try:
        body = json.loads(_sums_file(shard).read_text(encoding="utf-8"))
        first, second = body["first"], body["second"]
        right = body["count"] > 0 and len(first) == len(second) > 0 and all(map(math.isfinite, [*first, *second]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return body if right else None


def _latent_stats(folder: Path, files: Sequence[str], statistics: Statistics | LatentStats) -> LatentStats:
    """Mean and standard deviation of draws from the posteriors of all shards: E[z] = E[mean], E[z^2] = E[mean^2 + variance]; as one
    factor, the standard deviation of all channels together."""
    if isinstance(statistics, LatentStats):
        return statistics
    found = {file: _sums_of(folder / file) for file in files}
    sums = [each for each in found.values() if each is not None]
    if len(sums) < len(found) or len({len(each["first"]) for each in sums}) > 1:
        lacking = [file for file, each in found.items() if each is None]
        raise DataError(f"{folder}: got shards whose sums are missing or differ ({lacking[:3]}); run the job again")
    count = sum(each["count"] for each in sums)
    channels = range(len(sums[0]["first"]))
    mean, square = (
        [math.fsum(each[power][channel] for each in sums) / count for channel in channels]
        for power in ("first", "second")
    )
    if statistics == "whole":
        whole = math.fsum(square) / len(square) - (math.fsum(mean) / len(mean)) ** 2
        mean, std = [0.0 for _ in channels], [math.sqrt(max(whole, 0.0)) for _ in channels]
    else:
        std = [math.sqrt(max(second - first**2, 0.0)) for first, second in zip(mean, square, strict=True)]
    try:
        return LatentStats(tuple(mean), tuple(std))
    except ValueError as error:
        raise DataError(f"{folder}: {error}; check the encoder and its input") from error


# ------------------------------------------------------------------------------------------------- who does it

Runner = Callable[[Callable[[str], ShardEncoder], list[Task], int | None, int, str], Iterator[Made]]


def _in_process(
    make: Callable[[str], ShardEncoder], tasks: list[Task], workers: int | None, threads: int, device: str
) -> Iterator[Made]:
    import torch

    with _threads(threads):
        encoder = make(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    for task in tasks:
        with _threads(threads):  # restored between shards, for the consumer of this iterator
            made = encode_shard(encoder, task)
        yield made


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ShardActor:
    """An encoder that stays loaded in a Ray actor and takes one task after another."""

    def __init__(self, make: Callable[[str], ShardEncoder], threads: int, device: str, mask: int):
        import torch

        os.umask(mask)  # a local Ray starts its workers with 077
        torch.set_num_threads(threads)
        self.make, self.device = make, device
        self.encoder: ShardEncoder | None = None

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """One row in, one row out. A user's mistake is returned as a value: Ray would try again what is raised, and print its traceback."""
        first = {name: column[0] for name, column in rows.items()}
        task = Task(**{name: v.item() if isinstance(v, np.generic) else v for name, v in first.items()})
        try:
            if self.encoder is None:
                self.encoder = self.make(self.device)
            try:
                made = asdict(encode_shard(self.encoder, task))
            except OSError as error:
                raise storage_error(error, Path(task.output).parent) from error
            return {**{name: [value] for name, value in made.items()}, "error": [""], "code": [0]}
        except UserError as error:
            nothing = asdict(Made(0, 0.0, 0.0, 0.0, ""))
            return {**{name: [value] for name, value in nothing.items()}, "error": [str(error)], "code": [error.code]}


def _on_ray(
    make: Callable[[str], ShardEncoder], tasks: list[Task], workers: int | None, threads: int, device: str
) -> Iterator[Made]:
    from nexus_scale.orchestration.cluster import connected

    mask = umask()
    with connected():
        import ray

        have = ray.cluster_resources()
        gpus, cpus = int(have.get("GPU", 0)), int(have.get("CPU", 1))
        if device == "cuda" and not gpus:
            raise UserError(f"device is cuda, and the cluster has no GPU ({cpus} CPUs); use device=cpu.", code=4)
        device = ("cuda" if gpus else "cpu") if device == "auto" else device
        each = min(threads, cpus)
        actors = min(workers or max(1, gpus if device == "cuda" else cpus // 2), len(tasks))
        most = min(gpus, cpus // each) if device == "cuda" else cpus // each
        if actors > most:
            log.info(
                "%d actors of %d CPUs do not fit into %d CPUs and %d GPUs: using %d", actors, each, cpus, gpus, most
            )
            actors = most
        log.info("%d shards on %d actors of Ray Data (%s, %d threads each)", len(tasks), actors, device, threads)

        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with ray.data.DataContext.current(context):
            rows = ray.data.from_items([asdict(task) for task in tasks], override_num_blocks=len(tasks)).map_batches(
                ShardActor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=actors),
                fn_constructor_args=(make, threads, device, mask),
                num_cpus=each,
                num_gpus=1 if device == "cuda" else 0,
            )
            for row in rows.iter_rows():
                if row["error"]:
                    raise UserError(str(row["error"]), int(row["code"]))
                yield Made(**{each.name: row[each.name] for each in fields(Made)})
