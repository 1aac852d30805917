"""What of a fine-tuning's recipe changes where text encoders learn: low-rank changes of their layers, or embeddings of new tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.clip_text import TRANSFORMERS
from nexus_scale.interop.encoders import find_text_encoder, open_tokenizer_of
from nexus_scale.interop.pipeline_folders import PipelineFolder


@dataclass(frozen=True)
class Token:
    """A word that the text encoders do not have, and that becomes `vectors` tokens, which begin as the word `begins_as`, or at random."""

    word: str
    vectors: int = 1
    begins_as: str = ""


def with_texts(
    base: PipelineFolder, learnt: Mapping[str, Any] | None, token: Token | None
) -> tuple[PipelineFolder, dict[str, dict[str, Any]], list[str]]:
    """The pipeline whose CLIPs' captions are encoded in the step.

    Args:
        learnt: what an adapter of each is; None: all its weights learn.
        token: in the place of adapters, what alone learns.
    Returns:
        The pipeline, the entries of `networks` of its CLIPs, and the names of those that learn.
    Raises:
        UserError: it has no CLIP.
    """
    encoders, tokens = base.texts, dict(base.tokens)
    conditions, made_of = list(base.objective["conditions"]), dict[str, str]()
    networks: dict[str, dict[str, Any]] = {}
    learning: list[str] = []
    for number, spec in enumerate(encoders, start=1):
        end = "" if number == 1 else f"_{number}"
        fields = [name for name in (f"text{end}", f"pooled{end}") if name in conditions]
        if not fields or find_text_encoder(spec).kind != "clip":
            continue
        name = f"clip{end}"
        conditions[conditions.index(fields[0])] = f"text{end}_ids"
        conditions = [one for one in conditions if one not in fields]
        made_of |= dict.fromkeys(fields, name)
        if f"text{end}" in tokens:
            tokens[f"text{end}_ids"] = tokens.pop(f"text{end}")
        networks |= _networks(name, spec, learnt, token)
        encoders[number - 1] = {
            **{key: value for key, value in spec.items() if key != "states"},
            "ids": True,
            **({} if token is None else {"new_tokens": {token.word: token.vectors}}),
        }
        learning.append(name)
    if not learning:
        raise UserError(
            "its text encoders are none of CLIP's, which alone learn; leave --text-encoders and --token out, or begin with another model"
        )
    trains = [*([] if token else ["model"]), *learning]
    changed = replace(
        base,
        objective={**base.objective, "conditions": conditions, "encoders": made_of, "trains": trains},
        encoders={**base.encoders, "text": encoders if len(encoders) > 1 else encoders[0]},
        tokens=tokens,
    )
    return changed, networks, learning


def _networks(
    name: str, spec: Mapping[str, Any], learnt: Mapping[str, Any] | None, token: Token | None
) -> dict[str, dict[str, Any]]:
    """The entries of one CLIP."""
    folder = Path(str(spec["folder"])).resolve()
    states = {"states": spec["states"]} if "states" in spec else {}
    arguments = {**TRANSFORMERS.model_args(TRANSFORMERS.read_config(folder)), **states}
    from_folder = {"init_from": {"format": "transformers", "path": str(folder)}}
    entry = {"name": "clip_text", **arguments, **from_folder}
    if token is not None:
        began = {} if not token.begins_as else {"begins_as": _number(spec, token.begins_as), **from_folder}
        adapter = {"name": "new_tokens", "count": token.vectors, **began}
        return {f"{name}_base": {**entry, "frozen": True}, name: {"adapts": f"{name}_base", **adapter}}
    if learnt is None:
        return {name: entry}
    return {f"{name}_base": {**entry, "frozen": True}, name: {**learnt, "adapts": f"{name}_base"}}


def _number(spec: Mapping[str, Any], word: str) -> int:
    """The token that a word is."""
    numbers = open_tokenizer_of(find_text_encoder(spec))(word, add_special_tokens=False)["input_ids"]
    if len(numbers) != 1:
        raise UserError(f"--begins-as {word}: is {len(numbers)} tokens; expected a word that is one")
    return int(numbers[0])
