"""What scores mean: each with its name for readers, one sentence, which direction is better, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from nexus_scale.callbacks.metrics import duration
from nexus_scale.report.charts import number, percent


@dataclass(frozen=True)
class Meaning:
    """How a score is shown.

    Attributes:
        words: one sentence: what it measures.
        better: the better direction; None where neither is.
        show: how its values are written.
        worst, best: the worst and the best possible value, where they are known beforehand; None: unbounded.
        beside: other scores of the same kind by the end of their names, such as `_real`, and what they are of: what a perfect run and a
            useless one would have.
    """

    title: str
    words: str
    better: Literal["higher", "lower"] | None
    show: Callable[[float], str] = number
    worst: float | None = None
    best: float | None = None
    beside: Mapping[str, str] = field(default_factory=dict)

    def direction(self) -> str:
        """`Higher is better, 0.0 % to 100.0 %.`"""
        if self.better is None:
            return ""
        ends = [None if end is None else self.show(end).replace(".0 %", " %") for end in (self.worst, self.best)]
        if all(ends):
            between = f", from {ends[0]} to {ends[1]}"
        else:
            between = f"; {ends[1]} is perfect" if ends[1] else ""
        return f"{self.better.capitalize()} is better{between}."


_FRECHET = {"_real": "real samples", "_noise": "noise", "_grey": "grey"}
_SPOKEN = {"_real": "recordings", "_resynthesis": "recordings through the codec"}
_PLAYED = {**_SPOKEN, "_chance": "captions of other pieces"}
_FOLLOWED = {"_others": "under other pictures", "_base": "without the adapter", "_decoded": "the data, decoded"}
_SHARE: dict[str, Any] = {"better": "higher", "show": percent, "worst": 0.0, "best": 1.0}

MEANINGS: dict[str, Meaning] = {
    "group_accuracy": Meaning(
        "Samples of the prompted group",
        "Share of samples that a classifier, trained on real ones, finds in the group that was asked for.",
        **_SHARE,
        beside={"real_accuracy": "the same classifier on real samples", "chance": "guessing"},
    ),
    "frechet": Meaning(
        "Fréchet distance",
        "Distance between the distributions of drawn and of real samples in the classifier's features; comparable among runs that are "
        "scored by the same file, and not with published FID.",
        "lower",
        best=0.0,
        beside=_FRECHET,
    ),
    "frechet_efficientnet_lite0": Meaning(
        "Fréchet distance, EfficientNet",
        "The same distance in the features of an EfficientNet-Lite0 that was trained on photographs.",
        "lower",
        best=0.0,
        beside=_FRECHET,
    ),
    "wer": Meaning(
        "Words heard wrong",
        "Word error rate: how many words a speech recogniser puts in, leaves out or takes for others, per word of the text.",
        "lower",
        percent,
        best=0.0,
        beside=_SPOKEN,
    ),
    "similarity": Meaning(
        "Likeness to the voice",
        "Cosine between what a speaker encoder hears in a sample and in another recording of the same speaker.",
        "higher",
        best=1.0,
        beside={**_SPOKEN, "_others": "recordings of other speakers"},
    ),
    "key": Meaning(
        "In the key",
        "Share of pieces that are in the key which their caption names.",
        **_SHARE,
        beside=_PLAYED,
    ),
    "tempo": Meaning(
        "At the tempo",
        "Share of pieces that are at the tempo which their caption names.",
        **_SHARE,
        beside=_PLAYED,
    ),
    "instrument": Meaning(
        "By the instrument",
        "Share of pieces that sound most like recordings by the instrument which their caption names.",
        **_SHARE,
        beside=_PLAYED,
    ),
    "overlap": Meaning(
        "Follows the picture",
        "Intersection over union of the marks in the picture that was given and in the sample, marked as the data's were.",
        "higher",
        worst=0.0,
        best=1.0,
        beside=_FOLLOWED,
    ),
    "nearer": Meaning(
        "Nearer to its image prompt",
        "How often a sample is nearer to its own image prompt than to another one, in the features of the run's image encoder; by chance "
        "it is every second time.",
        **_SHARE,
        beside=_FOLLOWED,
    ),
    "nearer_pixels": Meaning(
        "Nearer to its image prompt, in pixels", "The same, by the distance of pixels.", **_SHARE, beside=_FOLLOWED
    ),
    "bits": Meaning(
        "Bits per dimension",
        "Negative log-likelihood of held-out data, in bits for each of their values: what a perfect coder would need with this model.",
        "lower",
        beside={"_error": "standard error"},
    ),
    "kernel": Meaning(
        "Kernel distance",
        "Kernel inception distance: the squared maximum mean discrepancy of drawn and real features; unbiased, so it may fall below zero.",
        "lower",
        best=0.0,
    ),
    "clip_mmd": Meaning(
        "CLIP-MMD", "Maximum mean discrepancy of drawn and real samples in CLIP's features.", "lower", best=0.0
    ),
    "inception_score": Meaning(
        "Inception score",
        "How sure a classifier is of each sample, and how evenly its classes are met; blind to the data.",
        "higher",
        worst=1.0,
    ),
    "precision": Meaning(
        "Precision",
        "Share of drawn samples that lie among the real ones. By itself it is no quality: samples that are all alike may all lie there; "
        "read it with recall.",
        **{**_SHARE, "better": None},
    ),
    "recall": Meaning(
        "Recall",
        "Share of real samples that lie among the drawn ones: variety, and nothing of how good each sample is; read it with precision.",
        **{**_SHARE, "better": None},
    ),
    "density": Meaning(
        "Density",
        "How many real samples' neighbourhoods a drawn sample lies in, over what is expected; as precision, read it with coverage.",
        None,
        worst=0.0,
    ),
    "coverage": Meaning(
        "Coverage", "Share of real samples with a drawn one in their neighbourhood: quality and variety.", **_SHARE
    ),
    "psnr": Meaning("PSNR", "Peak signal-to-noise ratio of rebuilt samples, in decibels.", "higher"),
    "ssim": Meaning("SSIM", "Structural similarity of rebuilt samples and their originals.", "higher", best=1.0),
    "lpips": Meaning(
        "LPIPS", "Distance of rebuilt samples from their originals in a network's features.", "lower", best=0.0
    ),
    "clip_score": Meaning(
        "CLIP score", "Cosine of prompt and sample in CLIP's features, in hundredths.", "higher", best=100.0
    ),
    "group": Meaning(
        "Of the prompted group", "Share of samples that a classifier finds in the group that was asked for.", **_SHARE
    ),
    "count": Meaning(
        "As many as prompted",
        "Share of samples in which a detector counts as many things as their prompt names.",
        **_SHARE,
    ),
    "position": Meaning(
        "Where prompted",
        "Share of samples in which a detector finds a thing on the side of another that their prompt names.",
        **_SHARE,
    ),
    "colour": Meaning(
        "Of the prompted colour", "Share of samples that have the colour which their prompt names.", **_SHARE
    ),
}
"""Scores by name. `real_accuracy` and `chance` stand beside `group_accuracy`, under their own names."""

PLAIN: dict[str, tuple[str, Callable[[float], str]]] = {
    "samples": ("samples that were scored", lambda value: f"{value:,.0f}"),
    "seconds": ("time it took", duration),
    "speaking_seconds": ("of it, time of speaking", duration),
    "spoken_seconds": ("speech that was made", duration),
    "guidance": ("guidance", number),
    "steps": ("steps of the sampler", number),
    "recogniser": ("speech recogniser", str),
    "prompt": ("voice", str),
    "keys": ("captions that name a key", number),
    "tempos": ("captions that name a tempo", number),
    "players": ("captions that name an instrument", number),
    "draws": ("draws of noise for each sample", number),
    "divergence": ("divergence", str),
}
"""What else scores.json says: how it was scored."""


def meaning_of(name: str) -> Meaning | None:
    """The meaning of a score; None if it has none of its own: it stands beside another, or says how it was scored."""
    return MEANINGS.get(name)


def beside_of(name: str, scores: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """What was measured of the same kind, by its key in `scores`: of what, and its value."""
    meaning = MEANINGS[name]
    found = {}
    for end, words in meaning.beside.items():
        key = f"{name}{end}" if end.startswith("_") else end
        if isinstance(value := scores.get(key), int | float):
            found[key] = (words, float(value))
    return found


def explained(name: str, scores: Mapping[str, Any]) -> str:
    """A score as part of a card: its value, its name, what it measures, which direction is better, what stands beside it."""
    meaning = MEANINGS[name]
    beside = {key: f"{words} <b>{meaning.show(value)}</b>" for key, (words, value) in beside_of(name, scores).items()}
    others = "".join(f"<li>{words}</li>" for words in beside.values())
    return (
        f'<div class="score"><p><b>{meaning.show(float(scores[name]))}</b> {escape(meaning.title)}</p>'
        f"<p>{escape(meaning.words)} <em>{escape(meaning.direction())}</em></p>"
        + (f"<ul>{others}</ul>" if others else "")
        + "</div>"
    )
