"""A trained run as a folder that other libraries load: the network, and for diffusers the pipeline around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nexus_scale.config.kinds import shown
from nexus_scale.config.recipe import Adapter, computing, network_class
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import SIZES, Request, UserError
from nexus_scale.engine.hardware import CPU
from nexus_scale.generate.drawing import guidance_of, sampler_of
from nexus_scale.generate.exported import note
from nexus_scale.generate.sampler_list import draws_noise
from nexus_scale.generate.trained import Trained
from nexus_scale.interop import autoencoder_kl
from nexus_scale.interop.autoencoders import OwnAutoencoder, open_vae
from nexus_scale.interop.changes import LAYOUTS, Changed, write_changes
from nexus_scale.interop.encoders import TextEncoderFolder, find_text_encoder, open_codec, tokenizer_class
from nexus_scale.interop.folders import copy_folder, network_folder, write_json
from nexus_scale.interop.formats import Format
from nexus_scale.interop.pipelines import (
    Parts,
    Pipeline,
    TextSlot,
    add_network,
    normalisation_words,
    write_alone,
    write_beside_file,
    write_pipeline,
)
from nexus_scale.interop.published import Beside, families, family
from nexus_scale.media.latent_space import frames_of
from nexus_scale.run.files import cluster_of
from nexus_scale.train import Place

log = logging.getLogger(__name__)


def export_run(place: Place, layout: str | None = None, output: Path | None = None, role: str | None = None) -> Path:
    """Writes the averaged weights of a run as a folder that `layout`'s library loads. For diffusers it is a whole pipeline: with the
    autoencoder whose latents the run has learnt, normalised as the run knows them, links to the text encoders, and a README. What is
    left out is said there and in the log.

    Args:
        role: the trained network that is written, by its name in the recipe; None: the first.
    Raises:
        UserError: an unknown layout or network, or a family that it has no class for.
    """
    trained = Trained(place.run, place, hardware=CPU)  # as checkpoints hold weights, in float32
    known = trained.recipe.trained()
    role = next(iter(known)) if role is None else role
    if role not in known:
        raise UserError(f"--network {shown(role)}: {nearest(role, list(known))}")
    entry = known[role]
    alone = bool(family(entry.name).formats)  # an adapter that is a network of its own elsewhere, too
    network = entry if alone else computing(entry)
    name, folder = network.name, output or place.run.path / "export"
    if isinstance(entry, Adapter) and not alone and layout in (None, *LAYOUTS):
        return _adapters(trained, layout or LAYOUTS[0], folder)
    layout = layout or next(iter(family(name).formats), "diffusers")
    form = _form(name, layout)
    together = family(name).together.get(layout)
    _, arguments = network_class(network)
    objective = trained.recipe.objective.name
    pipeline = family(name).pipeline_of(arguments, objective) if layout == "diffusers" else None
    state: Mapping[str, Tensor] = trained.nets[role].state_dict()
    about = [f"Recipe {trained.recipe.name}, step {trained.step}."]
    if together is not None:
        together(trained.nets, folder)
    elif pipeline is None:
        form.write(folder, state, arguments, **family(name).alone)
        if layout in family(name).whole:
            return _whole(trained, folder, layout, form, family(name).whole[layout])
        if form.example:
            write_alone(folder, form, about)
    else:
        if pipeline.prepared is not None:
            state, arguments = pipeline.prepared(state, arguments)
        form.write(folder, state, arguments)
        _complete(trained, arguments, folder, pipeline, form)
        if len(trained.recipe.trained()) == 1:
            note(
                place, layout, trained.step, trained.recipe, cluster_of(place.run), trained.dataset.latent_stats, folder
            )
        return folder
    if not form.class_name:
        written = [computing(one) for one in known.values()] if together is not None else [network]
        write_beside_file(
            folder, {one.name: (_form(one.name, layout), network_class(one)[1]) for one in written}, about
        )
    log.info("%s: the network %s alone%s", folder, name, _alone(form))
    return folder


def _whole(trained: Trained, folder: Path, layout: str, form: Format, whole: Callable[[Path, Beside], str]) -> Path:
    """Puts what the run has beside its network into the network's folder, with which `nexus sample` draws, too."""
    recipe, place = trained.recipe, trained.place
    spec, codec = recipe.data.encoders.get("text"), recipe.data.encoders.get("codes")
    specs = [] if spec is None else [spec] if isinstance(spec, Mapping) else list(spec)
    made_up = recipe.data.synthetic is not None
    texts = [] if made_up else [find_text_encoder(one, place.data_root) for one in specs]
    opened = None if made_up or not isinstance(codec, Mapping) else open_codec(codec, place.runs_root, place.data_root)
    why = whole(folder, Beside(texts, opened))
    alone = [f"The network alone: {why}. `nexus sample` draws with this folder."] if why else []
    write_alone(folder, form, [*alone, f"Recipe {recipe.name}, step {trained.step}."])
    note(place, layout, trained.step, recipe, cluster_of(place.run), trained.dataset.latent_stats, folder)
    log.info("%s: %s%s", folder, form.class_name, f", the network alone: {why}" if why else "")
    return folder


def _adapters(trained: Trained, layout: str, folder: Path) -> Path:
    """Writes a run's adapters alone, by the names of their bases in other libraries."""
    spec = trained.recipe.data.encoders.get("text")
    texts = [spec] if isinstance(spec, Mapping) else list(spec or ())
    changed: list[Changed] = []
    others: dict[str, dict[str, Any]] = {}
    for role, adapter in trained.adapters.items():
        entry = trained.recipe.adapters()[role]
        base = entry.base
        form = next(iter(family(base.name).formats.values()), None) or _form(base.name, "diffusers")
        lies = "" if base.init_from is None else Path(base.init_from.path).name  # in a pipeline's folder
        part = lies if lies.rpartition("_")[0] == form.part else form.part
        if family(entry.name).writes is not None:
            others.setdefault(entry.name, {})[part] = adapter
        elif not family(entry.name).formats:
            changed.append(Changed(form, adapter.base, adapter, part))
    written = []
    if changed:
        written.append(write_changes(folder, layout, changed, trained.place.run.path.name, one_text=len(texts) == 1))
    for name, adapters in others.items():
        write = family(name).writes
        assert write is not None
        written.append(write(folder, adapters, [find_text_encoder(one, trained.place.data_root) for one in texts]))
    for file in written:
        log.info("%s: what the run adds; --format diffusers writes the whole network with it", file)
    return folder


def _form(name: str, layout: str) -> Format:
    """A family's format of that name; raises a UserError where it has none."""
    if layout in family(name).formats:
        return family(name).formats[layout]
    if family(name).formats:
        raise UserError(f"--format {layout}: {name} is exported as {' or '.join(sorted(family(name).formats))}")
    others = ", ".join(each for each in families() if family(each).formats)
    raise UserError(f"--format {layout}: {name} has no export; there is one for {others}")


def _alone(form: Format) -> str:
    if form.part == "vae":
        return "; scaling_factor is null: it is of the latents of some data, and the export of a run that was trained on them has it"
    return ", without what encodes its conditions and decodes what it draws"


def _complete(trained: Trained, arguments: Mapping[str, Any], folder: Path, pipeline: Pipeline, form: Format) -> None:
    """Makes a network's folder a pipeline's."""
    parts = Parts()
    _add_scheduler(trained, folder, pipeline, parts)
    why = _unfit(trained, pipeline)
    if why is not None:
        log.info("%s: no pipeline: %s", folder, why)
        alone = f"No pipeline: {why}. `nexus sample` draws with this folder."
        write_alone(folder, form, [alone, f"Recipe {trained.recipe.name}, step {trained.step}."])
        return
    add_network(folder, pipeline.part, form.class_name, parts)
    if pipeline.decodes:
        try:
            parts.present["vae"] = _add_vae(trained, folder / "vae", pipeline)
        except UserError as error:
            parts.missing["vae"] = str(error)
    encoders = _text_encoders(trained, pipeline)
    places = _add_text(folder, pipeline, encoders, parts)
    known = _trained(trained, arguments, pipeline, encoders, places) if pipeline.text else None
    about = _about(trained) + _lengths(encoders)
    write_pipeline(folder, pipeline, parts, known, about, _other_text(trained, pipeline, encoders))
    reasons: dict[str, list[str]] = {}
    for name, why in sorted(parts.missing.items()):
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        log.warning("%s: without %s: %s", folder, ", ".join(names), why)
    log.info(
        "%s: %s with %s; README.md says how to call it", folder, pipeline.class_name, ", ".join(sorted(parts.present))
    )


def _unfit(trained: Trained, pipeline: Pipeline) -> str | None:
    """Why the pipeline cannot draw with the network; None: it can."""
    latents, name = trained.draws.makes == "moments", pipeline.class_name
    if latents != pipeline.decodes:
        return f"the network draws {'latents' if latents else 'pixels'}, and {name} {'draws pixels' if latents else 'decodes latents'}"
    if trained.draws.conditions and not pipeline.conditional:
        return f"the network is told {', '.join(trained.draws.conditions)}, and {name} tells nothing"
    return None


def _add_scheduler(trained: Trained, folder: Path, pipeline: Pipeline, parts: Parts) -> None:
    """`scheduler/` with the scheduler that draws as the recipe's sampler does, where diffusers has it."""
    section = trained.recipe.sample
    sample = {"name": section.name, **section.arguments} if section else {}
    assert pipeline.scheduler is not None, pipeline.class_name
    try:
        config = pipeline.scheduler(trained.recipe.objective.arguments, sample, (1, *trained.shape))
    except UserError as error:
        parts.missing["scheduler"] = str(error)
        log.warning("%s: written without a scheduler: %s", folder, error)
        return
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    parts.present["scheduler"] = ["diffusers", str(config["_class_name"])]


def _add_vae(trained: Trained, folder: Path, pipeline: Pipeline) -> list[str]:
    """Writes the autoencoder whose latents the run has learnt; returns its library, which may be a file of the folder, and its class.

    Raises:
        UserError: there is none, or diffusers has no class for it or for how its latents are normalised; says which.
    """
    spec = trained.recipe.data.encoders.get("moments")
    if not isinstance(spec, Mapping):
        raise UserError("the recipe names no autoencoder (data.encoders.moments)")
    stats = trained.dataset.latent_stats
    vae = open_vae(spec, trained.place.runs_root, trained.place.data_root)
    source = network_folder(trained.place.data_root / str(spec["folder"]), "vae") if "folder" in spec else None
    if not isinstance(vae, OwnAutoencoder):
        assert source is not None
        autoencoder_kl.export_normalised(source, folder, stats, vae.stated, shifts=pipeline.shifts)
        return ["diffusers", autoencoder_kl.CLASS_NAME]
    form = family(vae.family).formats.get("diffusers")
    if form is None:
        raise UserError(f"the autoencoder {vae.family} has no export")
    if form.class_name == autoencoder_kl.CLASS_NAME:
        form.write(folder, vae.network.state_dict(), vae.arguments)
        autoencoder_kl.export_normalised(folder, folder, stats, None, shifts=pipeline.shifts)
        return form.names
    settings = family(vae.family).normalised(stats)
    if source is None:
        form.write(folder, vae.network.state_dict(), vae.arguments, **settings)
        return form.names
    config = form.read_config(source)
    by_channel = {"latents_mean": None, "latents_std": None} if "latents_mean" in config else {}
    copy_folder(source, folder, config if stats == vae.stated and not by_channel else config | by_channel | settings)
    form.carry_into(folder)
    return form.names


def _text_encoders(trained: Trained, pipeline: Pipeline) -> list[TextEncoderFolder]:
    """The recipe's, as they lie."""
    spec = trained.recipe.data.encoders.get("text")
    if spec is None or not pipeline.text:
        return []
    found = []
    for one in [spec] if isinstance(spec, Mapping) else spec:
        try:
            found.append(find_text_encoder(one, trained.place.data_root))
        except UserError as error:
            log.warning("text encoder %s: not in the export: %s", dict(one), error)
    return found


def _add_text(
    folder: Path, pipeline: Pipeline, encoders: Sequence[TextEncoderFolder], parts: Parts
) -> list[TextSlot | None]:
    """Links to the text encoders and tokenizers of the recipe, each in the free place for its class, or else in any.

    Returns:
        The place of each encoder; None where there are more encoders than places.
    Raises:
        UserError: something else lies where a link would.
    """
    free, places = list(pipeline.text), dict[int, TextSlot]()
    for fits in (lambda one, slot: one.class_name == slot.class_name, lambda one, slot: True):
        for number, one in enumerate(encoders):
            slot = next((slot for slot in free if number not in places and fits(one, slot)), None)
            if slot is not None:
                free.remove(slot)
                places[number] = slot
    for number, slot in places.items():
        found = encoders[number]
        for name, source in ((slot.encoder, found.folder), (slot.tokenizer, found.tokenizer)):
            _link_folder(source, folder / name)
        parts.present[slot.encoder] = ["transformers", found.class_name]
        parts.present[slot.tokenizer] = ["transformers", tokenizer_class(found)]
    has = ", ".join(one.class_name for one in encoders) or "none"
    for slot in free:
        reason = f"the run's text encoders are {has}"
        parts.missing[slot.encoder] = parts.missing[slot.tokenizer] = reason
    return [places.get(number) for number in range(len(encoders))]


def _link_folder(source: Path, target: Path) -> None:
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        raise UserError(f"{target}: is there, and no link to {source}; move it away, or export into another folder")
    target.symlink_to(source, target_is_directory=True)


def _other_text(trained: Trained, pipeline: Pipeline, encoders: Sequence[TextEncoderFolder]) -> str | None:
    """Why the pipeline's own encoding of a prompt is not what the run was trained on; None where it is."""
    if not pipeline.text:
        return None
    conditions = sorted(set(trained.draws.conditions) - {*SIZES, *trained.draws.encoded})
    if [one.class_name for one in encoders] != list(pipeline.trained_on) or conditions != sorted(pipeline.conditions):
        has = ", ".join(one.class_name for one in encoders) or "an encoder that the recipe does not name"
        return (
            f"it reads {', '.join(pipeline.trained_on)}, and this run was trained on {', '.join(conditions)} of {has}"
        )
    if any(one.pad_to is None for one in encoders):
        return "it pads prompts and reads the padding as text, and this run was trained without padding"
    return None


def _lengths(encoders: Sequence[TextEncoderFolder]) -> list[str]:
    """A README's word on the length that T5's prompts were padded to."""
    lengths = [one.pad_to for one in encoders if one.kind == "t5" and one.pad_to is not None]
    return [f"T5 read prompts padded to {length} tokens: ask for `max_sequence_length={length}`." for length in lengths]


def _trained(
    trained: Trained,
    arguments: Mapping[str, Any],
    pipeline: Pipeline,
    encoders: Sequence[TextEncoderFolder],
    places: Sequence[TextSlot | None],
) -> dict[str, Any]:
    """What `pipeline.py` is to know of the run, as JSON; see carried/pipeline.py."""
    assert pipeline.null_of is not None, pipeline.class_name
    batch = next(iter(trained.dataset.fixed(1, batch=1))).on("cpu")
    cond, _ = trained.objective.request_like(batch, Request())
    null = pipeline.null_of(trained.objective.unconditional(cond), arguments)
    shape, size = trained.shape, _size(trained)
    section = trained.recipe.sample
    options = section.arguments if section else {}
    defaults = {
        **({"num_inference_steps": options["steps"]} if "steps" in options else {}),
        pipeline.guidance: guidance_of(options.get("guidance", 1.0)).scale,
        **{f"{name}_scale": value for name, value in trained.draws.constants.items() if name == "guidance"},
        "height": size[-2],
        "width": size[-1],
        **({"num_frames": size[0]} if len(size) == 3 else {}),
    }
    return {
        "texts": _texts(trained, encoders, places),
        "conditions": list(trained.draws.conditions),
        "text_dim": null["negative_prompt_embeds"].shape[-1],
        "null_tokens": null["negative_prompt_embeds"].shape[1],
        **({"null": "empty"} if trained.objective.empty_texts else {}),
        "pooled": "negative_pooled_prompt_embeds" in null,
        "guidance": pipeline.guidance,
        "shape": list(shape),
        "size": list(size[-2:]),
        "defaults": defaults,
    }


def _size(trained: Trained) -> tuple[int, ...]:
    """(H, W) or (F, H, W) of what the run draws; by diffusers' factor of 8 where no autoencoder decodes it."""
    try:
        return tuple(trained.decoded_shape[1:])
    except UserError:
        *front, height, width = trained.shape[1:]
        return (*((frames - 1) * 4 + 1 for frames in front), height * 8, width * 8)


def _texts(
    trained: Trained, encoders: Sequence[TextEncoderFolder], places: Sequence[TextSlot | None]
) -> list[dict[str, Any]] | None:
    """How each text encoder reads a prompt; None where one of them is not in the folder."""
    spec = trained.recipe.data.encoders.get("text")
    specs = [] if spec is None else [spec] if isinstance(spec, Mapping) else list(spec)
    if not specs or len(specs) != len(encoders) or None in places:
        return None
    made = trained.dataset.encoders.get("text", {}).get("encoders", [])
    cuts = [*(one.get("max_tokens") for one in made), *[None] * len(specs)]
    lengths = {name: shape[0] for name, shape in trained.dataset.fields.items() if len(shape) == 2}
    found = []
    for number, (one, place, given, cut) in enumerate(zip(encoders, places, specs, cuts, strict=False), start=1):
        assert place is not None
        fields = ["text", "pooled"] if number == 1 else [f"text_{number}", f"pooled_{number}"]
        found.append(
            {
                "encoder": place.encoder,
                "tokenizer": place.tokenizer,
                "kind": one.kind,
                "fields": fields,
                "max_tokens": one.pad_to or given.get("max_tokens") or cut,
                "padded": one.pad_to is not None,
                "length": lengths.get(fields[0]),
                "dtype": one.dtype,
                **({"states": one.states} if one.states != "penultimate" else {}),
            }
        )
    return found


def _about(trained: Trained) -> list[str]:
    """A README's paragraphs on what the pipeline cannot know of this run."""
    recipe = trained.recipe
    seen = normalisation_words(trained.dataset.latent_stats) if trained.draws.makes == "moments" else ""
    words = [f"Recipe {recipe.name}, step {trained.step}. {seen}".rstrip()]
    if recipe.sample is not None:
        words += _about_sampling(recipe.sample.name, recipe.sample.arguments)
        if trained.draws.walks == "denoise" and draws_noise(sampler_of(recipe)):
            words.append(
                "Its steps add noise, which the pipeline draws otherwise: the same `seed` gives another sample."
            )
    if trained.draws.walks == "denoise" and trained.draws.conditions and not trained.draws.drops:
        words.append(
            "It was trained without dropping conditions, so guidance has nothing to start from: leave it at 1."
        )
    for name, number in trained.draws.constants.items():
        words.append(f"The network was told {name} {number} throughout; give the pipeline `{name}_scale={number}`.")
    for latent, frames in frames_of(trained.dataset).items():
        words += _about_frames(latent, frames)
    return words


def _about_sampling(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """In which the recipe's sampler and guidance differ from a pipeline's."""
    words = [f"The recipe draws with {name} and {dict(arguments)}."]
    guidance = guidance_of(arguments.get("guidance", 1.0))
    if guidance.channels is not None:
        words.append(
            f"It guides the first {guidance.channels} channels; the pipeline guides all of them, and so draws otherwise."
        )
    if guidance.interval is not None:
        words.append(
            f"It guides at times from {guidance.interval[0]:g} to {guidance.interval[1]:g}; the pipeline guides at all times, and so draws "
            "otherwise."
        )
    if guidance.rescale:
        words.append(
            f"It rescales what it guides; give the pipeline `guidance_rescale={guidance.rescale:g}` if it takes one."
        )
    if guidance.by:
        words.append(
            f"It is guided by {guidance.by!r}, a weaker version of itself, which the pipeline does not have: it guides away from no "
            "prompt, and so draws otherwise."
        )
    if arguments.get("method", "euler") != "euler":
        words.append(
            f"It takes steps of {arguments['method']}; the scheduler here takes Euler's, and so draws otherwise."
        )
    return words


def _about_frames(latent: int, frames: int) -> list[str]:
    """What lengths of clips the run knows, and which the pipeline decodes as it should."""
    words = [f"It was trained on clips of {frames} frames, which are {latent} latent frames."]
    if latent % 2 == 0 and frames % 2:
        ratio = (frames - 1) // (latent - 1)
        words.append(
            f"diffusers takes an even number of latent frames for a clip without a first frame of its own, and decodes {latent} to "
            f"{ratio * latent} frames, in a way that the autoencoder was not trained in. Draw clips of 1 + {2 * ratio}k frames "
            f"({1 + 2 * ratio}, {1 + 4 * ratio}, ...), or decode with `nexus sample`."
        )
    return words
