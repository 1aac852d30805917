"""A run's export as a whole pipeline of diffusers: `model_index.json`, every part that is there, and a README whose code draws.

Parts that are large and of others, text encoders and their tokenizers, are links to where they lie. What diffusers' pipeline of a family
does not know of a run, how it was told of texts and of no text, is in `pipeline.py`, which the folder carries (`carried/pipeline.py`).
"""

from __future__ import annotations

import os
import pprint
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from nexus_scale.contracts import Cond
from nexus_scale.interop.folders import DIFFUSERS_WEIGHTS, write_json
from nexus_scale.interop.formats import Format, State, carry
from nexus_scale.io.durable import atomic_write
from nexus_scale.models.layers.text import compose_text
from nexus_scale.processes.latents import LatentStats

README = "README.md"
MARK = "Written by `nexus export`"
LIBRARIES = ("diffusers", "transformers")
"""Where classes come from that need no code of the folder."""


class TextSlot(NamedTuple):
    """Names of a text encoder and of its tokenizer in a pipeline, and its class in transformers."""

    encoder: str
    tokenizer: str
    class_name: str


class Pipeline(NamedTuple):
    """What diffusers' pipeline of a family is made of.

    Attributes:
        class_name: in diffusers.
        text: its text encoders, in its order.
        trained_on, conditions: the text encoders of a run, in the recipe's order, and its conditions, for which the pipeline's own
            encoding of prompts is the run's.
        shifts: it decodes z = x / scaling_factor + shift_factor; without, it knows no shift.
        null_of: from the run's unconditional cond of one sample, and the network's arguments, the text that it stands for, by the
            pipeline's names: `negative_prompt_embeds` (1, L, D) of real tokens alone. None where the pipeline has its own.
        scheduler: diffusers' scheduler that draws as a run's sampler does, from the recipe's `objective:` and `sample:` and the shape of
            latents; raises a UserError where there is none.
        guidance: how its call names true guidance.
        prepared: weights and arguments as this pipeline wants them.
        part: its name for the network.
        decodes: it draws latents, which an autoencoder of it decodes; without, the network draws pixels.
        conditional: it tells the network something of what is to be drawn.
        settings: what its index says beside its parts; parts that are left out are [null, null].
    """

    class_name: str
    text: tuple[TextSlot, ...] = ()
    trained_on: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    shifts: bool = False
    scheduler: Callable[[Mapping[str, Any], Mapping[str, Any], Sequence[int]], dict[str, Any]] | None = None
    null_of: Callable[[Cond, Mapping[str, Any]], dict[str, Tensor]] | None = None
    guidance: str = "guidance_scale"
    prepared: Callable[[State, Mapping[str, Any]], tuple[State, dict[str, Any]]] | None = None
    part: str = "transformer"
    decodes: bool = True
    conditional: bool = True
    settings: Mapping[str, Any] = MappingProxyType({})


class Tuning(NamedTuple):
    """How a pipeline's published weights learn on, where its folder does not say.

    Attributes:
        pads: of each of its text encoders in the order of `Pipeline.trained_on`, the tokens to which prompts are padded; the network reads
            the padding. 0: the tokenizer's own limit; None: they are not padded.
        cut: tokens after which prompts that are not padded are cut.
        states: see `encoders.find_text_encoder`.
        conditions: of the objective, beside the padding's masks.
        objective, sample: settings of these sections beside what the scheduler says.
        latent_size: height and width of latents, where the network's config does not say.
    """

    pads: tuple[int | None, ...]
    conditions: tuple[str, ...]
    objective: Mapping[str, Any]
    sample: Mapping[str, Any]
    cut: int | None = None
    states: str | None = None
    latent_size: int | None = None


@dataclass
class Parts:
    """What of a pipeline is in a folder, `[library, class]` by name, and what is not, with its reason."""

    present: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def plain(self, pipeline: Pipeline) -> bool:
        """Whether diffusers' own class loads the folder whole."""
        classes = {slot.encoder: slot.class_name for slot in pipeline.text}
        return not self.missing and all(
            library in LIBRARIES and classes.get(name, cls) == cls for name, (library, cls) in self.present.items()
        )


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no such names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def add_network(folder: Path, part: str, class_name: str, parts: Parts) -> None:
    """The folder `part`, from the network's own files in `folder`, which stay."""
    for name in ("config.json", DIFFUSERS_WEIGHTS):
        link(folder / name, folder / part / name)
    parts.present[part] = ["diffusers", class_name]


def write_pipeline(
    folder: Path,
    pipeline: Pipeline,
    parts: Parts,
    trained: Mapping[str, Any] | None,
    about: Sequence[str],
    other_text: str | None,
) -> None:
    """`model_index.json`, `pipeline.py` where the run was told of texts, and the README.

    Args:
        trained: what `pipeline.py` is to know of the run; None where diffusers' own pipeline draws the same.
        about: paragraphs on this run for the README.
        other_text: why the pipeline's own encoding of prompts is not the run's; None where it is.
    """
    index: dict[str, Any] = {
        "_class_name": pipeline.class_name
        if trained is None or parts.plain(pipeline)
        else ["pipeline", "TrainedPipeline"],
        "_diffusers_version": "0.42.1",
        **{name: parts.present.get(name, [None, None]) for name in sorted({*parts.present, *parts.missing})},
        **pipeline.settings,
    }
    if trained is not None:
        told = pprint.pformat(dict(trained), width=116, sort_dicts=False)
        changes = {
            "StableDiffusion3Pipeline as Base": f"{pipeline.class_name} as Base",
            "TRAINED: dict[str, Any] = {}": f"TRAINED: dict[str, Any] = {told}",
        }
        carry("pipeline.py", folder, changes)
    write_json(folder / "model_index.json", index)
    _write_readme(folder, _readme(pipeline, parts, trained, about, other_text))


def _write_readme(folder: Path, text: str) -> None:
    """Writes the README, unless a person's own is there."""
    readme = folder / README
    if not readme.exists() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        atomic_write(readme, text)


def write_alone(folder: Path, form: Format, about: Sequence[str]) -> None:
    """The README of a network's own folder: the code that loads and calls it, and paragraphs on the run."""
    lines = [f"# {form.class_name}", "", f"{MARK}. In the code below `folder` is the path of this folder.", ""]
    loaded = f"{form.class_name}.from_pretrained(folder, local_files_only=True)"
    example = form.example or f"from diffusers import {form.class_name}\n\nnetwork = {loaded}"
    lines += ["```python", example.rstrip(), "```", ""]
    if form.carried:
        lines += [f"`trust_remote_code` lets {' and '.join(form.carried)} of this folder run: read it first.", ""]
    for paragraph in about:
        lines += [paragraph, ""]
    _write_readme(folder, "\n".join(lines))


def write_beside_file(
    folder: Path, networks: Mapping[str, tuple[Format, Mapping[str, Any]]], about: Sequence[str]
) -> None:
    """The README of weights in one file of an original release, which has no config: networks by their registered names, with their formats
    and arguments; and paragraphs on the run."""
    first = next(iter(networks.values()))[0]
    file, whose = first.file, first.named_by
    load = f'weights = load_file(f"{{folder}}/{file}")'
    lines = [f"# {file}", "", f"{MARK}. In the code below `folder` is the path of this folder.", ""]
    lines += ["```python", "from safetensors.torch import load_file", "", load, "```", ""]
    lines += [f"Tensors have the names of {whose} the networks of these sizes:", ""]
    lines += ["| network | names begin with | arguments in nexus-scale |", "|---|---|---|"]
    for name, (form, arguments) in networks.items():
        sizes = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        lines.append(f"| {name} | `{form.prefix}` | `{sizes}` |")
    lines += ["", "A recipe trains on from the file: `init_from: {format: original, path: ...}`.", ""]
    for paragraph in about:
        lines += [paragraph, ""]
    _write_readme(folder, "\n".join(lines))


def _readme(
    pipeline: Pipeline,
    parts: Parts,
    trained: Mapping[str, Any] | None,
    about: Sequence[str],
    other_text: str | None,
) -> str:
    lines = [f"# {pipeline.class_name}", "", f"{MARK}. In the code below `folder` is the path of this folder.", ""]
    lines += ["| part | here |", "|---|---|"]
    lines += [f"| `{name}` | {' '.join(what)} |" for name, what in sorted(parts.present.items())]
    lines += [f"| `{name}` | left out: {why} |" for name, why in sorted(parts.missing.items())]
    lines += ["", *(_drawing(pipeline, parts) if trained is None else _own_drawing(pipeline, parts, trained))]
    if any(slot.encoder in parts.present for slot in pipeline.text):
        lines += ["Text encoders and tokenizers are links to where they lie; `cp -rL` copies the folder with them.", ""]
    if "vae" in parts.missing:
        lines += [
            'Without `vae` ask for `output_type="latent"`; `nexus sample` decodes with the run\'s own autoencoder.',
            "",
        ]
    for paragraph in about:
        lines += [paragraph, ""]
    if trained is not None and "scheduler" in parts.present:
        lines += _without_code(pipeline, parts, trained, other_text)
    return "\n".join(lines)


def _drawing(pipeline: Pipeline, parts: Parts) -> list[str]:
    """A README's code for diffusers' own pipeline, which draws what the run does."""
    options = "".join(f", {name}=None" for name in sorted(parts.missing))
    words = []
    if any(library not in LIBRARIES for library, _ in parts.present.values()):
        options += ", trust_remote_code=True"
        words = ["`trust_remote_code` lets the autoencoder's code in `vae/` run: read it first.", ""]
    load = f"pipeline = {pipeline.class_name}.from_pretrained(folder, local_files_only=True{options})"
    return ["```python", f"from diffusers import {pipeline.class_name}", "", load, "```", "", *words]


LOAD_OWN = """pipeline = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline="pipeline", trust_remote_code=True, local_files_only=True
)"""


def _own_drawing(pipeline: Pipeline, parts: Parts, trained: Mapping[str, Any]) -> list[str]:
    """A README's code for the pipeline that the folder carries."""
    foreign_vae = parts.present.get("vae", LIBRARIES)[0] not in LIBRARIES
    code = "`pipeline.py` of this folder" + (" and `vae/`" if foreign_vae else "")
    lines = [
        *("```python", "from diffusers import DiffusionPipeline", "", LOAD_OWN, "```", ""),
        f"`trust_remote_code` lets {code} run: read it first. It draws what `nexus sample` draws, but for what is said below.",
        "",
    ]
    if trained["texts"] is None:
        lines += [
            "The run's text encoders are not here: give it `prompt_embeds` (1, tokens, channels), real tokens alone.",
            "",
        ]
    else:
        given = ', output_type="latent"' if "vae" in parts.missing else ""
        lines += [
            *("```python", f'drawn = pipeline("a red heart", seed=0{given})', "```", ""),
            "`seed=0` gives prompt `i` the noise of sample `i` of `nexus sample --seed 0`; `generator` or `latents` give another.",
            "",
        ]
    defaults = ", ".join(f"`{name}={value}`" for name, value in trained["defaults"].items())
    zeros = "one token of zeros" if trained["null_tokens"] == 1 else f"{trained['null_tokens']} tokens of zeros"
    nothing = "the empty prompt" if trained.get("null") == "empty" else zeros
    return [
        *lines,
        f"Unless you say otherwise: {defaults}. Guidance is `{pipeline.guidance}`. Without a `negative_prompt` it guides away from "
        f"{nothing}, which was no text in training.",
        "",
    ]


def _without_code(pipeline: Pipeline, parts: Parts, trained: Mapping[str, Any], other_text: str | None) -> list[str]:
    """A README's section on diffusers' own pipeline, which draws something else."""
    if parts.plain(pipeline):
        code = f"plain = {pipeline.class_name}.from_pretrained(folder, local_files_only=True)"
        imports = [pipeline.class_name]
    else:
        part = pipeline.part
        network, scheduler = parts.present[part][1], parts.present["scheduler"][1]
        imports = sorted({network, scheduler, pipeline.class_name})
        others = [name for name in [*parts.present, *parts.missing] if name not in (part, "scheduler")]
        code = "\n".join(
            [
                f"plain = {pipeline.class_name}(",
                f'    {part}={network}.from_pretrained(folder, subfolder="{part}", local_files_only=True),',
                f'    scheduler={scheduler}.from_pretrained(folder, subfolder="scheduler", local_files_only=True),',
                f"    {', '.join(f'{name}=None' for name in sorted(others))},",
                ")",
            ]
        )
    pooled = " and `pooled_prompt_embeds`" if trained["pooled"] else ""
    own = (
        ""
        if other_text is None
        else f" from `prompt_embeds`{pooled} of the run's encoders, real tokens alone ({other_text})"
    )
    return [
        *("## Without the code of this folder", "", "```python", f"from diffusers import {', '.join(imports)}", ""),
        *(code, "```", ""),
        f"Without guidance this draws the same{own}. With guidance it does not: it shows the network an empty prompt, or one of zeros that "
        "is as long as the prompt, and training showed neither.",
        "",
    ]


def normalisation_words(stats: LatentStats | None) -> str:
    """A README's sentence on how latents z become what the network sees."""
    if stats is None:
        return "The network sees the autoencoder's latents as they are."
    return f"The network sees latents normalised as x = {stats}, z what the run's autoencoder encodes."


def null_prompt(text: Tensor, mask: Tensor | None, pooled: Tensor | None) -> dict[str, Tensor]:
    """An unconditional text of one sample as a pipeline is given it: (1, L, D) of its real tokens, and the pooled one."""
    real = text if mask is None else text[mask.bool()].unsqueeze(0)
    named = {"negative_prompt_embeds": real.float()}
    return named if pooled is None else {**named, "negative_pooled_prompt_embeds": pooled.float()}


def composed_null(layout: Format) -> Callable[[Cond, Mapping[str, Any]], dict[str, Tensor]]:
    """`Pipeline.null_of` of a family that composes the texts of several encoders into one, as wide as its network's `text_dim`."""

    def null_of(null: Cond, args: Mapping[str, Any]) -> dict[str, Tensor]:
        return null_prompt(*compose_text(null, layout.network_of(args).text_dim))

    return null_of
