"""What a run's network is conditioned on, made of what a person gives: texts, classes, or both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.conditioners.chroma import CHROMA
from nexus_scale.conditioners.image_prompt import IMAGE_PROMPT
from nexus_scale.conditioners.label import LabelConditioner, class_names
from nexus_scale.conditioners.text import TextConditioner, specs_of
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import SIZES, CondField, Conditioner, UserError
from nexus_scale.data.encoded import as_batch

log = logging.getLogger(__name__)

LABEL = "label"


def pictures_among(names: Sequence[str], dataset: Any) -> list[str]:
    """Those conditions that a person gives as pictures: what is to be followed, (C, H, W) of each sample, and image prompts."""
    return [name for name in names if name == IMAGE_PROMPT or len(dataset.fields.get(name, ())) == 3]


class Conditions:
    """Texts and classes as a run's data have them: the encoders that made them, cut and padded as in training.

    Args:
        names: the objective's conditions. Sizes among them are no one's to give: they follow from what is drawn; a melody is a sound's,
            and pictures are files.
        dataset: the run's training data.
        data_root: where relative folders start.
        num_classes: of its networks; None where none says so.
    """

    def __init__(
        self,
        recipe: Recipe,
        names: Sequence[str],
        dataset: Any,
        data_root: Path,
        num_classes: int | None = None,
        device: str = "cpu",
    ):
        self.recipe, self.dataset, self.data_root, self.device = recipe, dataset, data_root, device
        others = {*SIZES, CHROMA, *pictures_among(names, dataset)}
        self.names, self.num_classes = tuple(name for name in names if name not in others), num_classes

    @property
    def takes_label(self) -> bool:
        return LABEL in self.names

    @property
    def takes_both(self) -> bool:
        """Whether a class is told beside a text."""
        return self.takes_label and len(self.names) > 1

    @property
    def texts(self) -> list[str]:
        """Names of the conditions that a text becomes."""
        return [name for name in self.names if name != LABEL]

    @cached_property
    def label(self) -> LabelConditioner:
        return LabelConditioner(class_names(self.dataset), self.num_classes)

    @cached_property
    def text(self) -> TextConditioner:
        """The recipe's text encoders.

        Raises:
            UserError: the recipe names none, or others than those that the data were made with, or they make other fields.
        """
        spec = self.recipe.data.encoders.get("text")
        if spec is None:
            raise UserError(
                f"recipe {self.recipe.name} names no text encoder (data.encoders.text), so it takes no prompts"
            )
        at_work = (one.conditioner for one in self.dataset.encoded)
        opened = next((one for one in at_work if isinstance(one, TextConditioner)), None)
        if opened is None:
            made = self.dataset.encoders.get("text", {}).get("encoders", [])
            cuts = [one.get("max_tokens") for one in made]
            opened = TextConditioner(specs_of(spec, "data.encoders.text"), self.data_root, self.device, cuts)
            self.dataset.check_encoders({"text": opened.fingerprint})
        if unknown := sorted(set(self.texts) - set(opened.fields)):
            raise UserError(
                f"objective.conditions: {unknown} are not made by data.encoders.text, which give {sorted(opened.fields)}; correct either"
            )
        return opened

    def encode(self, prompts: Sequence[str], labels: Sequence[str | int] | None = None) -> dict[str, Tensor]:
        """The conditions of each prompt, (n, ...), with the masks of sequences; empty where the network has none.

        Args:
            prompts: texts; of a network that is told a class alone, names or numbers of classes.
            labels: classes, one for each prompt, of a network that is told a class and a text.
        Raises:
            UserError: no such class, or labels where they have no meaning or are missing.
        """
        if not self.names and labels is None:
            return {}
        if not self.takes_label:
            if labels is not None:
                raise UserError(f"--label: the network of recipe {self.recipe.name} is told no class; leave it out")
            return self._texts(prompts)
        if not self.takes_both:
            if labels is not None:
                raise UserError(
                    f"--label: the network of recipe {self.recipe.name} is told a class and no text; give the class as the prompt"
                )
            return as_batch(self.label.encode(prompts), self.label.fields)
        if labels is None:
            raise UserError(
                f"--label: missing; the network of recipe {self.recipe.name} is told a class beside the text: give one, such as --label 0"
            )
        return {**as_batch(self.label.encode(labels), self.label.fields), **self._texts(prompts)}

    def negative(self, prompt: str, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The conditions of a negative prompt beside `cond`, one for each of its samples; a class that is told beside the text stays the
        sample's own."""
        made = self._texts([prompt]) if self.takes_both else self.encode([prompt])
        every = {name: value.expand(len(cond[name]), *value.shape[1:]) for name, value in made.items()}
        return {**every, LABEL: cond[LABEL]} if self.takes_both else every

    def _texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self.recipe.data.synthetic is not None:
            made = self.dataset.of_texts(prompts)
            return {name: value for name, value in made.items() if name.removesuffix("_mask") in self.texts}
        sequences = {name: shape[0] for name, shape in self.dataset.fields.items() if len(shape) == 2}
        return encoded(self.text, prompts, self.texts, sequences)


def with_no_text(
    dataset: Any, recipe: Recipe, texts: Sequence[str], data_root: Path, device: torch.device | str
) -> Any:
    """The data, which know the conditions of the empty text where there are `texts` that it stands for."""
    if texts:
        dataset.no_text = Conditions(recipe, texts, dataset, data_root, device=str(device)).encode([""])
    return dataset


def encoded(
    conditioner: Conditioner, values: Sequence[Any], names: Sequence[str], lengths: Mapping[str, int | None]
) -> dict[str, Tensor]:
    """Fields of a batch of values as a loader gives them and a network takes them: (n, ...), fractions in float32.

    Args:
        names: of the fields.
        lengths: of the sequences; None, or a name that is absent: the longest value's. What is longer is cut, which is said.
    """
    fields: dict[str, CondField] = {name: conditioner.fields[name] for name in names}
    for name, (longer, read) in conditioner.cut(values, lengths).items():
        if name in fields:
            log.warning(
                "%d of %d texts are longer than the %d tokens that are read as %s: cut", longer, len(values), read, name
            )
    batch = as_batch(conditioner.encode(values), fields, lengths)
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
