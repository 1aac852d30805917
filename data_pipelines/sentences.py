"""English sentences for synthesised speech, made from lists of common words by a fixed grammar: as many as are wanted, none twice.

The words are short, sound apart from each other (no `sea` and `see`, no numbers) and together have all phonemes of English in many
places; a sentence has six to ten of them, some two to four seconds. Lists and grammar are this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from nexus_scale.contracts import UserError
from nexus_scale.data.order import derive, keyed_hash

WORDS: Mapping[str, str] = {
    "a": (
        "old, young, heavy, yellow, quiet, narrow, broken, wooden, golden, empty, clever, gentle, purple, "
        "silver, frozen, dusty, cheap, large, small, warm, bright, thick, smooth, sharp, rough, clean, dark, "
        "strange, proud, busy, round, huge, soft, cold, green, brown"
    ),
    "p": (
        "farmer, sailor, doctor, teacher, driver, painter, baker, singer, lawyer, captain, plumber, soldier, "
        "student, actor, writer, judge, nurse, hunter, pilot, butcher, uncle, grandmother, cousin, brother, "
        "mother, father, stranger, porter, chemist, gardener"
    ),
    "t": (
        "basket, hammer, bottle, ladder, blanket, candle, lamp, book, letter, picture, table, garden, window, "
        "bridge, wagon, kettle, mirror, engine, ribbon, jacket, saddle, pencil, feather, button, curtain, "
        "barrel, shovel, bucket, carpet, violin, magnet, statue, cushion, teapot, helmet, anchor, whistle, "
        "package, cabbage, sandwich, chair, glove, shirt, rope, boat, clock, drum, fish, shelf, cup, stone"
    ),
    "l": (
        "kitchen, airport, village, station, market, forest, river, church, castle, meadow, cellar, office, "
        "studio, valley, stable, library, chapel, workshop, palace, orchard, tunnel, hotel, island, desert, "
        "attic, museum, tower, beach, school, hill"
    ),
    "m": (
        "carried, pushed, dropped, painted, mended, opened, measured, followed, washed, noticed, borrowed, "
        "polished, covered, lifted, pulled, chose, watched, sold, found, hid, showed, fixed, kicked, served, "
        "shook, caught, counted, brought, left"
    ),
    "m2": ("carried, painted, mended, measured, noticed, borrowed, sold, found, hidden, chosen, caught, brought, left"),
    "c": (
        "walked, galloped, hurried, wandered, marched, moved, drove, jumped, ran, climbed, sailed, looked, "
        "vanished, waited, slept"
    ),
    "h": (
        "slowly, quickly, gladly, often, never, always, again, together, quietly, gently, rarely, happily, "
        "calmly, suddenly, soon"
    ),
    "w": "into, behind, beside, above, under, across, near, inside, beyond, through, around",
    "n": (
        "this morning, last summer, after lunch, before supper, every evening, during the storm, in winter, "
        "on Thursday, at midnight, all afternoon, since Monday, in July, by the fire, with great joy, "
        "without a word, for a while"
    ),
    "f": "happy, nervous, angry, hungry, thirsty, curious, patient, careful, jealous, grateful, tired, cheerful",
    "r": "rain, snow, thunder, wind, fog, frost, sunshine, hail, smoke",
    "o": "his, her, their, every, another",
}
"""By slot: a adjective, p person, t thing, l place, m what is done to a thing, m2 the same after `have`, c what is done by oneself, h how,
w where, n when, f feeling, r weather, o whose."""

GRAMMAR = (
    "The {a} {p} {m} the {a} {t}.",
    "The {p} {m} {o} {t} {w} the {l}.",
    "{H} the {p} {c} {w} the {a} {l}.",
    "We {m} the {a} {t} {n}.",
    "My {p} {m} a {t} {w} the {l}.",
    "The {a} {t} fell {w} the {l}.",
    "Who {m} the {t} {w} the {l}?",
    "The {p} and the {p} {c} {w} the {l}.",
    "A {t} and a {t} lay {w} the {l}.",
    "{N}, the {p} {m} a {a} {t}.",
    "Please give the {a} {t} to the {p}.",
    "There was a {a} {t} {w} the {l}.",
    "The {p} was {f}, but the {p} {c} {h}.",
    "When the {r} came, the {p} {m} the {t}.",
    "They {m} our {t}, and we {c} {h}.",
    "Could the {p} have {m2} that {a} {t}?",
    "Both {p}s were {f} {n}.",
    "The {r} {w} the {l} made the {p} {f}.",
)
"""Slots of WORDS; a capital begins a sentence."""

_CHOICES = {slot: tuple(words.split(", ")) for slot, words in WORDS.items()}
MOST = 100_000
"""Far below the number of sentences that the grammar has."""
_DRAWS = 16
"""More than a sentence has slots."""


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` sentences, all different, as the seed has them; fewer are the first of more.

    Raises:
        UserError: more than MOST, or fewer than one.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"sentences: got {count}, expected 1 to {MOST}")
    made: dict[str, None] = {}
    number = 0
    while len(made) < count:
        draws = iter(keyed_hash(derive(seed, number), np.arange(_DRAWS)).tolist())
        made[_fill(GRAMMAR[next(draws) % len(GRAMMAR)], draws)] = None
        number += 1
    return list(made)


def _fill(pattern: str, draws: Iterator[int]) -> str:
    """The pattern with a word in each slot; no word twice in a sentence."""
    said: set[str] = set()
    out, rest = "", pattern
    while (start := rest.find("{")) >= 0:
        end = rest.index("}")
        slot = rest[start + 1 : end]
        words = [word for word in _CHOICES[slot.lower()] if word not in said]
        word = words[next(draws) % len(words)]
        said.add(word)
        out += rest[:start] + (word[0].upper() + word[1:] if slot[0].isupper() else word)
        rest = rest[end + 1 :]
    return _articles(out + rest)


def _articles(sentence: str) -> str:
    """`a old lamp` -> `an old lamp`."""
    words = sentence.split(" ")
    for i, word in enumerate(words[:-1]):
        if word in ("a", "A") and words[i + 1][0] in "aeiou":
            words[i] = word + "n"
    return " ".join(words)
