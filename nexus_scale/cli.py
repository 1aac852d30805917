"""The `nexus` command; launch/*.py call the same functions.

Exit codes: 0 done; 2 a mistake in the command, a recipe or a cluster file; 3 data; 4 too few resources; 5 the run folder;
6 the disk; 1 anything else. A user's mistake is one message without a stack trace; `--debug` shows the trace.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_scale.contracts import SAFE_ENVIRONMENT, Preempted, UserError
from nexus_scale.engine.checkpoint import CheckpointError
from nexus_scale.io.durable import trouble
from nexus_scale.io.terminal import VisibleFormatter, has_reader, keep_output_open, visible

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train generative models at any scale.",
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value over the recipe, cluster.key=value over the cluster, run=NAME")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the stack trace of an error")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


OfCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="a cluster file, or a name below configs/cluster/, whose device computes (default: the run's own)",
    ),
]


def _finite(value: float | None) -> float | None:
    """The value, unless it is nan or infinite, which click's bounds accept."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number")
    return value


SEEDS = 2**63 - 1


def guarded(action: Callable[[], Any], debug: bool = False) -> Any:
    """Calls `action`; a user's mistake becomes a message on stderr and its exit code."""
    keep_output_open()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    os.environ.update(SAFE_ENVIRONMENT)
    try:
        return action()
    except UserError as error:
        if debug:
            raise
        words, code = str(error), error.code
    except CheckpointError as error:
        if debug:
            raise
        words, code = str(error), 5
    except OSError as error:
        known = trouble(error)
        if debug or known is None:
            raise
        words, code = known
    except Preempted as left:
        print(str(left), file=sys.stderr)
        raise SystemExit(75) from None
    print(f"error: {visible(words)}", file=sys.stderr)
    raise SystemExit(code)


@app.command()
def train(
    target: Annotated[
        str, typer.Argument(help="a recipe (a path, or a name below configs/), or a run folder to resume")
    ],
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="a cluster file, or a name below configs/cluster/")] = None,
    run: Annotated[str | None, typer.Option(help="name of the run (default: the recipe's name)")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the resolved recipe, parameters, FLOPs and memory per rank, and stop"),
    ] = False,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="apply the recipe's `tiny:` block; the run is NAME_tiny unless --run names it"),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="a key of the recipe or cluster that may change when a run resumes; may be repeated"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a recipe, or resume a run. Missing data are prepared first."""

    def action() -> None:
        from nexus_scale import main_job
        from nexus_scale.orchestration.security import refuse_secrets

        refuse_secrets({}, overrides or ())  # before any of it is written into a run folder
        if dry_run:
            from nexus_scale.dry_run import describe

            print(describe(main_job.resolve(target, overrides or (), cluster=cluster, run=run, tiny=tiny)))
            return
        if allow_change:
            from nexus_scale.run.runs import change_run

            resolved = main_job.resolve(target, overrides or (), cluster=cluster, run=run, tiny=tiny)
            change_run(resolved.place.run, resolved.recipe, resolved.cluster, allow_change)
        main_job.main(target, overrides or (), cluster=cluster, run=run, tiny=tiny)

    guarded(action, debug)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(context: typer.Context) -> None:
    """Say whether a recipe fits a cluster, how long a step takes and what bounds it; or search clusters of 1 to 16,384 GPUs."""
    from nexus_scale.dry_run import plan_command

    guarded(lambda: plan_command(context.args), "--debug" in context.args)


runs_app = typer.Typer(help="List runs; follow, stop or delete one.", invoke_without_command=True)
app.add_typer(runs_app, name="runs")

Root = Annotated[Path | None, typer.Option(help="folder of the runs (default: NEXUS_RUNS_ROOT or ./runs)")]
Name = Annotated[str, typer.Argument(help="name of a run")]


@runs_app.callback()
def runs(context: typer.Context, root: Root = None, as_json: Json = False, debug: Debug = False) -> None:
    """List runs; follow, stop or delete one."""
    if context.invoked_subcommand is None:
        list_runs(root, as_json, debug)


@runs_app.command("list")
def list_runs(root: Root = None, as_json: Json = False, debug: Debug = False) -> None:
    """List all runs with their state, step, last loss and last incident."""

    def action() -> None:
        from nexus_scale.run.runs import runs_below

        found = runs_below(_root(root))
        if as_json:
            print(json.dumps([vars(summary) for summary in found], indent=1))
        elif not found:
            print(f"no runs in {visible(str(_root(root)))}")
        else:
            _print_runs(found)

    guarded(action, debug)


@runs_app.command("follow")
def follow_run(
    name: Name,
    root: Root = None,
    lines: Annotated[int, typer.Option(min=0, max=10**9, help="earlier lines to print first")] = 20,
    debug: Debug = False,
) -> None:
    """Follow a run's log and incidents until it ends."""

    def action() -> None:
        from nexus_scale.run.runs import follow, summary_of

        run = _run(name, root)
        for line in follow(run, lines=lines):
            print(visible(line), flush=True)
            if not has_reader():
                return
        summary = summary_of(run)
        print(visible(f"{summary.name}: {summary.state} after step {summary.step} of {summary.steps}"), file=sys.stderr)

    guarded(action, debug)


@runs_app.command("stop")
def stop_run(
    name: Name,
    root: Root = None,
    deadline: Annotated[
        float, typer.Option(min=0, max=30 * 86400, callback=_finite, help="seconds to wait for the run to stop")
    ] = 300.0,
    debug: Debug = False,
) -> None:
    """Ask a run to save and stop, and wait until it has."""

    def action() -> None:
        from nexus_scale.run.runs import stop

        summary = stop(_run(name, root), deadline_s=deadline)
        print(visible(f"{summary.name}: {summary.state} after step {summary.step} of {summary.steps}"))
        if summary.state != "done":
            print(visible(f"resume it with: nexus train {summary.path}"))

    guarded(action, debug)


@runs_app.command("delete")
def delete_run(
    name: Name,
    root: Root = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete without asking")] = False,
    debug: Debug = False,
) -> None:
    """Delete a run's folder with all its checkpoints, after asking for confirmation."""

    def action() -> None:
        from nexus_scale.run.runs import deletable, delete, summary_of_damaged

        where = _root(root)
        path = Path(name) if Path(name).is_absolute() else where / name
        summary = summary_of_damaged(deletable(path, where))
        shown = visible(str(path), keep="")
        question = f"delete {shown} ({summary.state}, step {summary.step} of {summary.steps}) with all its checkpoints?"
        try:
            agreed = yes or typer.confirm(question)
        except typer.Abort:
            raise UserError(
                "nothing was deleted because the question was not answered; use --yes to delete without asking"
            ) from None
        if not agreed:
            print("nothing deleted")
            return
        delete(path, where)
        print(f"deleted {shown}")

    guarded(action, debug)


def _root(given: Path | None) -> Path:
    from nexus_scale.config.recipe import Cluster
    from nexus_scale.orchestration.cluster import roots

    return given.resolve() if given is not None else roots(Cluster())[1]


def _run(name: str, root: Path | None) -> Any:
    from nexus_scale.run.files import open_run
    from nexus_scale.run.runs import resolve_run

    return open_run(resolve_run(name, _root(root)))[0]


def _print_runs(found: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "loss", "seen", "last incident"):
        table.add_column(title, justify="right" if title in ("step", "loss", "seen") else "left")
    for run in found:
        incident = f"{run.incident['kind']}: {run.incident['message']}" if run.incident else ""
        table.add_row(
            escape(visible(run.name, keep="")), run.state, f"{run.step}/{run.steps}", "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.age_s is None else f"{_span(run.age_s)} ago", escape(visible(incident, keep="")),
        )  # fmt: skip
    Console().print(table)


def _span(seconds: float) -> str:
    for size, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {letter}"
    return f"{seconds:.0f} s"


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="run folder, or the name of a run")],
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; may be given several times")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file with one prompt per line")] = None,
    negative: Annotated[
        str | None,
        typer.Option(
            "--negative", "--negative-prompt", help="what to guide away from (default: no prompt); may be empty"
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="class label to condition on, by name or number; one for all prompts, or one for each"),
    ] = None,
    count: Annotated[int, typer.Option("--count", "--per-prompt", min=1, max=10_000, help="samples per prompt")] = 1,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels (default: the most common size in the data)")
    ] = None,
    length: Annotated[
        float | None,
        typer.Option(min=0, max=100_000, callback=_finite, help="frames of a clip, or the longest speech in seconds"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=100_000, help="sampler steps (default: the recipe's)")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="a sampler and its settings, such as ode:method=heun,shift=3 (default: the recipe's)"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=-1000,
            max=1000,
            callback=_finite,
            help="guidance scale; for a guidance-distilled network, the scale it is conditioned on (default: the recipe's)",
        ),
    ] = None,
    true_guidance: Annotated[
        float | None,
        typer.Option(
            min=-1000,
            max=1000,
            callback=_finite,
            help="classifier-free guidance on top of the distilled scale, at twice the cost",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="seed of the noise")] = 0,
    weights: Annotated[
        str | None,
        typer.Option(help="an average, or a network's own weights by its name (default: the recipe's first average)"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder (default: runs/<name>/samples/prompts)")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="images: png or webp; clips: webp or mp4; sound: wav or flac (default: the first of each)"),
    ] = None,
    voice: Annotated[Path | None, typer.Option(help="for speech: a WAV recording of the voice to imitate")] = None,
    voice_text: Annotated[str | None, typer.Option(help="the words of that recording")] = None,
    speaker: Annotated[
        str | None, typer.Option(help="for speech: a held-out speaker's label, instead of --voice")
    ] = None,
    cluster: OfCluster = None,
    debug: Debug = False,
) -> None:
    """Draw samples of prompts with a run's averaged weights: one file per sample (image, clip or sound), and a grid."""

    def action() -> None:
        from nexus_scale.config.recipe import prompts_of
        from nexus_scale.generate.prompts import draw_prompts

        wanted = [*(prompt or []), *(prompts_of(prompts) if prompts else [])]
        folder = draw_prompts(
            place_of(run), wanted, negative_prompt=negative, label=label or None, per_prompt=count, size=size, length=length, steps=steps,
            sampler=sampler, guidance=guidance, true_guidance=true_guidance, seed=seed, weights=weights, output=output, format=format,
            voice=voice, voice_text=voice_text, speaker=speaker, hardware=hardware_named(cluster),
        )  # fmt: skip
        print(visible(f"samples in {folder}"))

    guarded(action, debug)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def generate(context: typer.Context) -> None:
    """Draw many samples with a run, as a folder of shards. An interrupted job resumes where it stopped."""

    def action() -> None:
        from data_pipelines.generate_samples import command

        print(visible(f"samples in {command(context.args, path_of)}"))

    guarded(action, "--debug" in context.args)


@app.command()
def score(
    run: Annotated[str, typer.Argument(help="run folder, or the name of a run")],
    settings: Annotated[str, typer.Option(help="a file with a `score:` or a `speech:` section")] = "quickstart",
    cluster: OfCluster = None,
    debug: Debug = False,
) -> None:
    """Score samples of held-out prompts: images with a classifier trained on real images, speech with a recogniser and speaker encoder."""

    def action() -> None:
        from nexus_scale.evaluate import scores as evaluate

        print(json.dumps(evaluate.score(place_of(run), settings, hardware_named(cluster)), indent=1))

    guarded(action, debug)


@app.command()
def report(run: Annotated[str, typer.Argument(help="run folder, or the name of a run")], debug: Debug = False) -> None:
    """Rewrite a run's report.html and results.json."""

    def action() -> None:
        from nexus_scale.report.page import write_report
        from nexus_scale.run.files import run_at

        folder = run_at(path_of(run))
        write_report(folder)
        print(visible(str(folder.report)))

    guarded(action, debug)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="run folder, or the name of a run")],
    output: Annotated[Path | None, typer.Option(help="folder (default: runs/<name>/export)")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="diffusers, transformers or original (default: the first that the family supports)"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Export a run's averaged weights as a folder that other libraries load."""

    def action() -> None:
        from nexus_scale.evaluate.scores import export_run

        print(visible(f"written: {export_run(place_of(run), format, output)}"))

    guarded(action, debug)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what is installed, which kernels are used, and which problems to expect."""
    environment = dict(os.environ)  # the user's, before it is made safe for this process

    def action() -> None:
        from nexus_scale.config.recipe import Cluster
        from nexus_scale.orchestration.cluster import roots
        from nexus_scale.run.doctor import diagnose, table, worst

        findings = diagnose(roots=roots(Cluster()), environ=environment)
        print(json.dumps([vars(f) for f in findings], indent=1, default=str) if as_json else table(findings))
        if worst(findings) == "error":
            raise SystemExit(1)

    guarded(action, debug)


@app.command()
def certify(
    recipe: Annotated[str, typer.Argument(help="a recipe: a path, or a name below configs/")],
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="a cluster file, or a name below configs/cluster/")] = None,
    kills: Annotated[int, typer.Option(min=0, max=100_000, help="how often the twin is killed")] = 20,
    workers: Annotated[
        str, typer.Option(help="numbers of workers; the first is that of the reference and the twin")
    ] = "2,1,4",
    steps: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="steps of each run (default: two per kill, at least 60)")
    ] = None,
    every: Annotated[int, typer.Option(min=1, max=10**9, help="steps between checkpoints")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="seed of the kills")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="apply the recipe's `tiny:` block")] = False,
    left_out: Annotated[
        str | None,
        typer.Option(
            "--leave-out",
            help="resume once without one of masters, moments, ema, optimizer_steps or draws; the proof must then fail",
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="also check that leaving out any of these is detected")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="a new folder for the certificate and its runs")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove that no training is lost on this cluster: kill and rescale a twin of a reference run, and compare every step."""

    def action() -> None:
        from nexus_scale import certify as proof
        from nexus_scale.orchestration.security import refuse_secrets

        refuse_secrets({}, overrides or ())
        certificate, folder = proof.certify(
            recipe, overrides or (), cluster=cluster, kills=kills, workers=_numbers(workers), steps=steps, every=every, seed=seed,
            tiny=tiny, folder=output, left_out=left_out, controls=controls, quiet=as_json,
        )  # fmt: skip
        print(json.dumps(proof.as_json(certificate), indent=1) if as_json else proof.summary(certificate))
        print(visible(f"certificate in {folder}/certificate.html"), file=sys.stderr)
        if not certificate.passed:
            raise SystemExit(1)

    guarded(action, debug)


MAX_WORKERS = 10_000


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if (
        not all(part.isascii() and part.isdigit() and 1 <= int(part[:6]) <= MAX_WORKERS for part in parts)
        or len(parts) > 100
    ):
        raise UserError(f"--workers {text[:100]!r}: expected numbers, like 2,1,4, each from 1 to {MAX_WORKERS:,}")
    return [int(part) for part in parts]


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="gpu, step, host, model, loader, start, checkpoint, generate, recovery or storm")
    ],
    as_json: Json = False,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="interleaved rounds (default: the benchmark's own)"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, max=10_000, callback=_finite, help="minutes of a storm (default: 30), or of gpu (7)"),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compiled", help="host: blocks are compiled on all sides", show_default=False)
    ] = None,
    tiny: Annotated[
        bool | None,
        typer.Option(
            "--tiny", help="gpu: in miniature, without a GPU too: every case, and no figure", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="gpu: takes each row as it is measured (default: nexus-bench-gpu.jsonl)")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare this project with its peers, side by side in one run."""

    def action() -> None:
        from nexus_scale.bench import measure, show

        result = measure(name, rounds=rounds, minutes=minutes, compiled=compiled, tiny=tiny, output=output)
        print(json.dumps(result, indent=1) if as_json else show(result))

    guarded(action, debug)


def hardware_named(cluster: str | None) -> Any:
    """The hardware of a cluster file, or None (the run's own) without one."""
    if cluster is None:
        return None
    from nexus_scale.config.recipe import load_cluster
    from nexus_scale.engine.hardware import hardware_of

    return hardware_of(load_cluster(cluster))


def place_of(run: str) -> Any:
    """The roots of an existing run or an exported folder, whatever the working directory."""
    from nexus_scale.generate.exported import exported_at
    from nexus_scale.orchestration.cluster import data_root_of_run
    from nexus_scale.run.files import open_run
    from nexus_scale.train import Place

    if (exported := exported_at(path_of(run))) is not None:
        return exported.place
    folder, _, cluster = open_run(path_of(run))
    data_root = data_root_of_run(folder, cluster)
    logging.getLogger(__name__).info("run %s, data in %s", folder.path, data_root)
    return Place(folder, data_root, folder.path.parent)


def path_of(run: str) -> Path:
    """A run's folder, by path or by name."""
    from nexus_scale.config.recipe import Cluster
    from nexus_scale.orchestration.cluster import roots
    from nexus_scale.run.runs import resolve_run

    return Path(run) if Path(run).is_dir() else resolve_run(run, roots(Cluster())[1])


def launch(recipe: str | None) -> None:
    """Runs `nexus train` with the command line's arguments, for launch/train*.py; `recipe` is the default."""
    keep_output_open()
    arguments = sys.argv[1:]
    named = [a for a in arguments if not a.startswith("-") and "=" not in a]
    if recipe is not None and not named:
        arguments = [recipe, *arguments]
    app(["train", *arguments], prog_name=sys.argv[0])


def main() -> None:
    keep_output_open()
    app()


if __name__ == "__main__":
    main()
