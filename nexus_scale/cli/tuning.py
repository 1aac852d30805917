"""`nexus finetune`: a recipe for a folder of pictures, written and run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_scale.cli.base import SEEDS, Debug, Overrides, finite, guarded, path_of
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import visible


def finetune(
    model: Annotated[str, typer.Argument(help="a pipeline's folder saved by diffusers, or a run, by folder or name")],
    images: Annotated[
        Path, typer.Argument(help="a folder of pictures (of clips for a model of clips), or a table of them")
    ],
    overrides: Overrides = None,
    trigger: Annotated[
        str,
        typer.Option(
            help="words that the pictures are to be called by: before the captions beside them (.txt), or alone"
        ),
    ] = "",
    name: Annotated[
        str | None, typer.Option(help="of the run and its recipe (default: of the pictures and the model)")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="all weights learn, not low-rank changes of them")] = False,
    dora: Annotated[
        bool, typer.Option("--dora", help="low-rank changes turn weights, whose lengths are learnt besides")
    ] = False,
    text_encoders: Annotated[
        bool, typer.Option("--text-encoders", help="CLIP's text encoders of the model learn, too")
    ] = False,
    token: Annotated[
        str,
        typer.Option(
            help='a new word such as "<cat>", whose embedding alone learns (textual inversion); captions begin with it, or with --trigger'
        ),
    ] = "",
    vectors: Annotated[int, typer.Option(min=1, max=64, help="tokens that the word of --token is")] = 1,
    begins_as: Annotated[
        str, typer.Option(help="a word of one token that --token begins as (default: at random)")
    ] = "",
    rank: Annotated[int, typer.Option(min=1, max=65_536, help="of low-rank changes")] = 16,
    steps: Annotated[int, typer.Option(min=1, max=10**9, help="of training")] = 500,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-12, max=1000, callback=finite, help="learning rate (default: 1e-4, with --full 1e-5)"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=10**6, help="pictures a step, over all workers")] = 4,
    resolution: Annotated[
        str | None,
        typer.Option(
            help="a side in pixels, HEIGHTxWIDTH, or a table of aspect ratios such as 40_of_1024 or 33_of_512 (default: the model's size)"
        ),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="half of the pictures are learnt flipped left to right")
    ] = False,
    fps: Annotated[float, typer.Option(min=0.1, max=1000, callback=finite, help="of clips: frames a second")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="of order, noise and first changes")] = 0,
    masks: Annotated[
        Path | None, typer.Option(help="a folder of pictures of the same names, white where yours are to be learnt")
    ] = None,
    captioner: Annotated[
        str,
        typer.Option(
            help="a command that prints the caption of the picture whose path comes last, for those without one"
        ),
    ] = "",
    keep: Annotated[
        str,
        typer.Option(
            help='a prompt such as "dog": pictures that the model draws of it beforehand are learnt beside yours, so that it forgets none'
        ),
    ] = "",
    keep_images: Annotated[int, typer.Option(min=1, max=10**6, help="how many it draws for --keep")] = 100,
    keep_weight: Annotated[
        float,
        typer.Option(
            min=1e-3, max=1000, callback=finite, help="how often one of these is shown, to once for one of yours"
        ),
    ] = 1.0,
    validate: Annotated[
        list[str] | None,
        typer.Option(
            help="a prompt drawn before and while it learns, shown side by side in the report; may be given several times"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the recipe's file (default: NAME.yaml here)")] = None,
    cluster: Annotated[str | None, typer.Option(help="a cluster file, or a name below configs/cluster/")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the recipe, estimate memory and time, and stop")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a recipe that teaches a model your pictures, say what memory it takes, and run it. The same command resumes it."""

    def action() -> None:
        from nexus_scale import main_job
        from nexus_scale.config.recipe import load_cluster, overrides_of
        from nexus_scale.interop import tuning
        from nexus_scale.orchestration.cluster import roots
        from nexus_scale.orchestration.security import refuse_secrets

        refuse_secrets({}, overrides or ())
        _, over_cluster = overrides_of(pair for pair in overrides or () if not pair.startswith(main_job.RUN))
        where = load_cluster(cluster or main_job.DEFAULT_CLUSTER, over_cluster)
        data_root, runs_root = roots(where)
        folder = Path(model) if Path(model).is_dir() else path_of(model)
        if not images.exists():
            raise UserError(f"{images}: no such folder or table of pictures", 3)
        if masks is not None and not masks.is_dir():
            raise UserError(f"--masks {masks}: no such folder", 3)
        if not token and (begins_as or vectors > 1):
            raise UserError("--vectors, --begins-as: are of --token; give it, too")
        new = tuning.Token(token, vectors, begins_as) if token else None
        chosen = main_job.checked_name(name or tuning.name_of(folder, images), "--name ")
        file = output or Path(f"{chosen}.yaml")
        wish = tuning.Wish(
            chosen, images, trigger, full=full, decomposed=dora, text_encoders=text_encoders, token=new,
            rank=rank, steps=steps, rate=rate, batch=batch,
            resolution=resolution, mirror=mirror, fps=fps, seed=seed, masks=masks, captioner=captioner, kept=keep,
            kept_images=keep_images, kept_weight=keep_weight, validation=tuple(validate or ()), recipe=file, data_root=data_root,
            cluster=cluster,
        )  # fmt: skip
        values = tuning.recipe_of(tuning.open_base(folder, runs_root, data_root), wish)
        for place, text in tuning.files_of(values, wish).items():
            _write(place, text)
        print(visible(f"recipe in {file}"), flush=True)
        _run(file, overrides or (), cluster, dry_run)

    guarded(action, debug)


def _write(file: Path, text: str) -> None:
    from nexus_scale.io.durable import atomic_write

    if file.exists() and file.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(
            f"{file}: is there and says otherwise; run it with `nexus train {file}`, delete it, or write another one (--name, --output)"
        )
    atomic_write(file, text)


def _run(file: Path, overrides: Any, cluster: str | None, dry_run: bool) -> None:
    from nexus_scale import main_job
    from nexus_scale.dry_run import estimate

    print(visible(estimate(main_job.resolve(str(file), overrides, cluster=cluster))), flush=True)
    if not dry_run:
        main_job.main(str(file), overrides, cluster=cluster)
