"""`nexus sample`, `generate`, `score` and `export`: what comes out of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nexus_scale.cli.base import (
    SEEDS,
    Debug,
    Json,
    OfCluster,
    finite,
    guarded,
    hardware_named,
    path_of,
    place_of,
)
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import visible


def _guidance(text: str | None) -> Any:
    """What `--guidance` says: a scale, or settings by name."""
    if text is None:
        return None
    from nexus_scale.generate.drawing import guidance_named

    try:
        return guidance_named(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None


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
    original_size: Annotated[
        str | None,
        typer.Option(
            help="of a run that is told sizes: HEIGHTxWIDTH of the image that samples are part of (default: their size)"
        ),
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="of a run that is told crops: TOPxLEFT of samples in that image (default: 0x0)")
    ] = None,
    length: Annotated[
        float | None,
        typer.Option(min=0, max=100_000, callback=finite, help="frames of a clip, or the longest speech in seconds"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=100_000, help="sampler steps (default: the recipe's)")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="a sampler with settings, as ode:method=heun,shift=3, or a folder of diffusers' scheduler (default: the recipe's)"
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            callback=_guidance,
            help="guidance scale, or settings such as scale=2,interval=[0.2,0.8],rescale=0.7,by=weak; for a guidance-distilled network, "
            "the scale it is conditioned on (default: the recipe's)",
        ),
    ] = None,
    true_guidance: Annotated[
        float | None,
        typer.Option(
            min=-1000,
            max=1000,
            callback=finite,
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
    prosody: Annotated[
        str | None,
        typer.Option(
            help="for speech: a WAV recording, or a held-out speaker's label, whose manner of speaking is taken"
        ),
    ] = None,
    prosody_text: Annotated[str | None, typer.Option(help="the words of that recording")] = None,
    timbre: Annotated[
        str | None,
        typer.Option(help="for speech: a WAV recording, or a held-out speaker's label, whose timbre is taken"),
    ] = None,
    edit: Annotated[
        Path | None,
        typer.Option(
            help="for speech: a WAV recording that is to say the prompt: new words are spoken, the rest is kept; with --voice all of it is "
            "said in that voice, with its timing"
        ),
    ] = None,
    edit_text: Annotated[str | None, typer.Option(help="the words of that recording")] = None,
    span: Annotated[
        str | None, typer.Option(help="FROM-TO in seconds: the part of --edit that is spoken anew, with the same words")
    ] = None,
    begin: Annotated[
        Path | None, typer.Option(help="of music: a WAV recording that samples begin with; of codes of clips: a webp")
    ] = None,
    melody: Annotated[Path | None, typer.Option(help="of music: a WAV recording whose melody samples follow")] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="a picture to be drawn anew (with --mask: drawn into), or the first frame of clips; of a run that translates, a picture "
            "or a folder of them"
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="translate --image the other way, of a run that learnt both")
    ] = False,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="how much of --image is drawn anew (default: 0.8; with --mask 1, from noise alone)",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="a picture that is white where --image, or the clip --begin, is drawn into; the rest of it is kept"
        ),
    ] = None,
    grow: Annotated[
        str | None,
        typer.Option(
            help="TOP,RIGHT,BOTTOM,LEFT pixels that are drawn around --image, which is scaled to leave room for them"
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="a picture that samples follow, of a run that was trained to: FILE, FILE:scale=0.8,interval=[0.2,1],make=true (made of "
            "the picture, as the data's were), or NAME=FILE"
        ),
    ] = None,
    interpolate: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=10_000,
            help="of a run with latents, as a GAN or VAE: samples from each of the --count draws to the next (slerp)",
        ),
    ] = None,
    walk: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="of a run with latents: each sample is the one before with this part of its latent new, in (0, 1]",
        ),
    ] = None,
    mix: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="of a run with latents: all pairs of --count draws, so far from the first, in [0, 1]",
        ),
    ] = None,
    traverse: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=10_000,
            help="of a run with latents: a row of samples for each number of a draw's latent, -3 to 3",
        ),
    ] = None,
    truncate: Annotated[
        float | None,
        typer.Option(
            min=-10,
            max=10,
            callback=finite,
            help="of a run with latents: psi, a factor on latents; below 1 less varied",
        ),
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
            place_of(run), wanted, negative_prompt=negative, label=label or None, per_prompt=count, size=size,
            original_size=original_size, crop=crop, length=length, steps=steps, sampler=sampler,
            guidance=guidance, true_guidance=true_guidance, seed=seed,
            weights=weights, output=output, format=format, voice=voice, voice_text=voice_text, speaker=speaker, image=image,
            prosody=prosody, prosody_text=prosody_text, timbre=timbre,
            strength=strength, reverse=reverse or None, mask=mask, grow=grow, begin=begin, melody=melody, control=control or None,
            edit=edit, edit_text=edit_text, span=span,
            interpolate=interpolate, walk=walk, mix=mix, traverse=traverse, truncate=truncate,
            hardware=hardware_named(cluster),
        )  # fmt: skip
        print(visible(f"samples in {folder}"))

    guarded(action, debug)


def generate(context: typer.Context) -> None:
    """Draw many samples with a run, as a folder of shards. An interrupted job resumes where it stopped."""

    def action() -> None:
        from data_pipelines.generate_samples import command

        print(visible(f"samples in {command(context.args, path_of)}"))

    guarded(action, "--debug" in context.args)


def score(
    run: Annotated[str, typer.Argument(help="run folder, or the name of a run")],
    settings: Annotated[
        str, typer.Option(help="a file with a `score:`, `speech:` or `likelihood:` section")
    ] = "quickstart",
    cluster: OfCluster = None,
    debug: Debug = False,
) -> None:
    """Score samples of held-out prompts: images with a classifier trained on real images, speech with a recogniser and speaker encoder."""

    def action() -> None:
        from nexus_scale.evaluate import scores as evaluate

        print(json.dumps(evaluate.score(place_of(run), settings, hardware_named(cluster)), indent=1))

    guarded(action, debug)


def export(
    run: Annotated[str, typer.Argument(help="run folder, or the name of a run")],
    output: Annotated[Path | None, typer.Option(help="folder (default: runs/<name>/export)")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="diffusers, transformers or original (default: the first that the family supports)"),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="which trained network of the recipe, by its name there (default: the first)")
    ] = None,
    debug: Debug = False,
) -> None:
    """Export a run's averaged weights as a folder that other libraries load."""

    def action() -> None:
        from nexus_scale.evaluate.scores import export_run

        print(visible(f"written: {export_run(place_of(run), format, output, network)}"))

    guarded(action, debug)


def scoreboard(
    settings: Annotated[str, typer.Argument(help="a file with a `scoreboard:` section")] = "scoreboard",
    output: Annotated[
        Path | None, typer.Option(help="folder of its runs, data and results (default: scoreboard beside the runs)")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train families with equal compute, draw and score them side by side, and judge what theory demands of them."""

    def action() -> None:
        from nexus_scale.bench.scoreboard import scoreboard as made

        rows, outcomes = made(
            settings, output, told=(lambda line: None) if as_json else lambda line: print(visible(line), flush=True)
        )
        if as_json:
            print(json.dumps(rows, indent=1))
        for one in outcomes:
            figures = " against ".join("never" if value is None else f"{value:.4g}" for value in one.figures)
            print(visible(f"{'holds' if one.holds else 'FAILS'}: {one.claim} {figures}"), file=sys.stderr)
        if not all(one.holds for one in outcomes):
            raise SystemExit(1)

    guarded(action, debug)


def samplers(
    recipe: Annotated[str | None, typer.Argument(help="a recipe, to be told which of them draw it")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the samplers: evaluations, noise, the paths that each walks, its settings, and which of them draw a recipe."""

    def action() -> None:
        from nexus_scale.config.recipe import load_recipe
        from nexus_scale.generate import sampler_list

        found = sampler_list.rows(None if recipe is None else load_recipe(recipe))
        print(json.dumps(sampler_list.as_json(found), indent=1) if as_json else visible(sampler_list.show(found)))

    guarded(action, debug)
