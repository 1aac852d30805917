"""A run's export as a whole pipeline of diffusers: `model_index.json`, every part that is there, and a README that says how to call it.

Parts that are large and of others, text encoders and their tokenizers, are links to where they lie. What a pipeline cannot know of a
run is said in the README: how its latents are normalised, whether its text was padded, and what it was shown as no condition.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.interop.encoders import TextEncoderFolder, tokenizer_class
from nexus_scale.interop.folders import DIFFUSERS_WEIGHTS, write_json, write_tensors
from nexus_scale.interop.formats import State
from nexus_scale.io.durable import atomic_write
from nexus_scale.processes.latents import LatentStats

NULL_FILE = "null_condition.safetensors"
README = "README.md"
MARK = "Written by `nexus export`"


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
        null_of: from the run's unconditional cond of one sample, and the network's arguments, what the pipeline is given in its place,
            by its names: `negative_prompt_embeds` (1, L, D) of real tokens alone, `negative_pooled_prompt_embeds` (1, Dp). None where
            it has its own.
        scheduler: diffusers' scheduler that draws as a run's sampler does, from the recipe's `objective:` and `sample:` and the shape of
            latents; raises a UserError where there is none.
        guidance: how its call names true guidance.
        prepared: weights and arguments as this pipeline wants them.
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


@dataclass
class Parts:
    """What of a pipeline is in a folder, `[library, class]` by name, and what is not, with its reason."""

    present: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no such names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def add_transformer(folder: Path, class_name: str, parts: Parts) -> None:
    """`transformer/`, from the network's own files in `folder`, which stay."""
    for name in ("config.json", DIFFUSERS_WEIGHTS):
        link(folder / name, folder / "transformer" / name)
    parts.present["transformer"] = ["diffusers", class_name]


def _guided(pipeline: Pipeline, null: Mapping[str, Tensor]) -> str:
    """A call with guidance, in Python; `prompt`, `null`, `like` and `options` are in scope."""
    pooled = 'negative_pooled_prompt_embeds=null["negative_pooled_prompt_embeds"], '
    more = pooled if "negative_pooled_prompt_embeds" in null else "max_sequence_length=like.shape[1], "
    kind, field = ("videos", "frames") if pipeline.class_name.startswith("CogVideoX") else ("images", "images")
    return (
        f"{kind} = pipeline(\n    **prompt, {pipeline.guidance}=4.0, negative_prompt_embeds=torch.zeros_like(like), {more}**options,\n"
        f").{field}"
    )


def add_text(folder: Path, pipeline: Pipeline, encoders: Sequence[TextEncoderFolder], parts: Parts) -> None:
    """Links to the text encoders and tokenizers of the recipe, each in the first free place for its class.

    Raises:
        UserError: something else lies where a link would.
    """
    free = list(encoders)
    for slot in pipeline.text:
        found = next((one for one in free if one.class_name == slot.class_name), None)
        if found is None:
            has = ", ".join(one.class_name for one in encoders) or "none"
            reads = ", ".join(each.class_name for each in pipeline.text)
            reason = f"the pipeline's text encoders are {reads}; the run's are {has}"
            parts.missing[slot.encoder] = parts.missing[slot.tokenizer] = reason
            continue
        free.remove(found)
        for name, source in ((slot.encoder, found.folder), (slot.tokenizer, found.tokenizer)):
            _link_folder(source, folder / name)
        parts.present[slot.encoder] = ["transformers", slot.class_name]
        parts.present[slot.tokenizer] = ["transformers", tokenizer_class(found)]


def _link_folder(source: Path, target: Path) -> None:
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        raise UserError(f"{target}: is there, and no link to {source}; move it away, or export into another folder")
    target.symlink_to(source, target_is_directory=True)


def write_pipeline(
    folder: Path,
    pipeline: Pipeline,
    parts: Parts,
    null: Mapping[str, Tensor],
    about: Sequence[str],
    other_text: str | None,
) -> None:
    """`model_index.json`, `null_condition.safetensors` where there is one, and the README.

    Args:
        null: from `Pipeline.null_of`.
        about: paragraphs on this run for the README.
        other_text: why the pipeline's own encoding of prompts is not the run's; None where it is.
    """
    index = {name: parts.present.get(name, [None, None]) for name in sorted({*parts.present, *parts.missing})}
    write_json(
        folder / "model_index.json", {"_class_name": pipeline.class_name, "_diffusers_version": "0.42.1", **index}
    )
    if null:
        write_tensors(folder / NULL_FILE, null)
    readme = folder / README
    if not readme.exists() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        atomic_write(readme, _readme(pipeline, parts, null, about, other_text))


CUT_NULL = '''import torch
from safetensors.torch import load_file

null = load_file(f"{folder}/null_condition.safetensors")

def cut_null_text(transformer, tokens):
    """Lets the transformer see `tokens` tokens where a text is all zeros, however long the prompt beside it is."""
    forward, patches = transformer.forward, getattr(transformer, "patch_embed", None)
    longest, table = getattr(patches, "max_text_seq_length", 0), getattr(patches, "pos_embedding", None)

    def cut(**given):
        text = given["encoder_hidden_states"]
        empty = ~text.flatten(1).any(1)
        if empty.any() and not empty.all():  # the unconditional half of a batch, then the prompts
            halves = [
                {name: value.chunk(2)[i] if torch.is_tensor(value) and value.shape[:1] == text.shape[:1] else value
                 for name, value in given.items()}
                for i in range(2)
            ]
            return (torch.cat([cut(**half)[0] for half in halves]),)
        if empty.all():
            given["encoder_hidden_states"] = text[:, :tokens]
            if given.get("txt_ids") is not None:
                given["txt_ids"] = given["txt_ids"][:tokens]
        if longest:  # CogVideoX: positions of text are zeros, as many as there is text
            patches.max_text_seq_length = given["encoder_hidden_states"].shape[1]
            if table is not None:
                patches.pos_embedding = table[:, longest - patches.max_text_seq_length :]
        return forward(**given)

    transformer.forward = cut

cut_null_text(pipeline.transformer, null["negative_prompt_embeds"].shape[1])
'''


def _readme(
    pipeline: Pipeline, parts: Parts, null: Mapping[str, Tensor], about: Sequence[str], other_text: str | None
) -> str:
    lines = [f"# {pipeline.class_name}", "", f"{MARK}. In the code below `folder` is the path of this folder.", ""]
    lines += ["| part | here |", "|---|---|"]
    lines += [f"| `{name}` | {' '.join(what)} |" for name, what in sorted(parts.present.items())]
    lines += [f"| `{name}` | left out: {why} |" for name, why in sorted(parts.missing.items())]
    nothing = "".join(f", {name}=None" for name in sorted(parts.missing))
    if any(library not in ("diffusers", "transformers") for library, _ in parts.present.values()):
        nothing += ", trust_remote_code=True"  # code that lies in this folder
    lines += [
        "",
        "```python",
        f"from diffusers import {pipeline.class_name}",
        "",
        f"pipeline = {pipeline.class_name}.from_pretrained(folder, local_files_only=True{nothing})",
        "```",
        "",
    ]
    if any(slot.encoder in parts.present for slot in pipeline.text):
        lines += ["Text encoders and tokenizers are links to where they lie; `cp -rL` copies the folder with them.", ""]
    if "vae" in parts.missing:
        lines += [
            'Without `vae` ask for `output_type="latent"`; `nexus sample` decodes with the run\'s own autoencoder.',
            "",
        ]
    for paragraph in about:
        lines += [paragraph, ""]
    if other_text is not None:
        lines += [
            f"{other_text}. That draws something else: give it `prompt_embeds`"
            + (" and `pooled_prompt_embeds`" if "negative_pooled_prompt_embeds" in null else "")
            + " of the run's own encoders, of real tokens alone, one prompt at a time.",
            "",
        ]
    if null:
        tokens = null["negative_prompt_embeds"].shape[1]
        lines += [
            "## Guidance",
            "",
            f"Without a condition this network was shown a text of {tokens} token{'s' if tokens > 1 else ''} of zeros"
            + (", and zeros as pooled text" if "negative_pooled_prompt_embeds" in null else "")
            + f": `{NULL_FILE}`. An empty prompt is none, and a text of zeros as long as the prompt is another one: the pipeline wants "
            "both of one length, so cut the unconditional one on its way into the transformer.",
            "",
            "```python",
            CUT_NULL.rstrip(),
            "```",
            "",
            "Then, with `prompt` a dict of the prompt's embeddings"
            + (" (of `pipeline.encode_prompt`)" if other_text is None else "")
            + " and `options` of the rest, such as `num_inference_steps`:",
            "",
            "```python",
            'like = prompt["prompt_embeds"]',
            _guided(pipeline, null),
            "```",
            "",
        ]
    return "\n".join(lines)


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
