"""English sentences for synthesised speech, made from lists of common words by a fixed grammar: as many as are wanted, none twice.

What is said is plain and makes sense, so that a recogniser's errors are the speech's and not the text's: a Whisper tiny.en misses 7
% of such words (205 clips of the standard voices, from 3 % for slt to 15 % for espeak), and missed 15 % where any noun stood beside
any verb (six sentences by each voice). The words are short and sound apart from each other, numbers are left out, and together they
have all phonemes of English in many places. A sentence has six to twelve words, some two to four seconds. Lists and grammar are
this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from nexus_scale.contracts import UserError
from nexus_scale.data.order import derive, keyed_hash

WORDS: Mapping[str, str] = {
    "person": "man, woman, doctor, teacher, farmer, captain, nurse, driver, student, soldier, lawyer, painter, singer, judge",
    "family": "mother, father, brother, sister, uncle, cousin, grandmother, grandfather, daughter, husband, best friend",
    "opens": "door, window, gate, box, drawer, cupboard",
    "room": "kitchen, garden, bedroom, office, library, living room, bathroom, garage",
    "food": "bread, cheese, soup, rice, chicken, fish, salad, butter, potatoes, apples, cake, chocolate, sandwiches",
    "meal": "breakfast, lunch, dinner, supper",
    "weather": "cold, warm, rainy, windy, cloudy, sunny, beautiful, quiet",
    "time": "morning, afternoon, evening, night, day",
    "month": "January, February, April, June, July, August, September, October, November, December",
    "size": "small, big, large, old, new, beautiful, strange, little, modern",
    "place": "river, village, station, market, forest, church, castle, hospital, museum, beach, school, bridge, airport, park",
    "goes": "bed, work, school, church, sleep",
    "plays": "in the garden, on the beach, in the park, by the river, in the snow, behind the house",
    "when": "all day, after school, every weekend, in the morning, until dinner, on Sunday, this afternoon, before lunch",
    "next": "next week, tomorrow, tonight, on Friday, next summer, this weekend, in the spring, after dinner",
    "last": "last week, yesterday, last summer, on Monday, last night, this morning, in the winter",
    "buys": "car, jacket, camera, bicycle, watch, hat, table, computer, pair of shoes, guitar, bag, shirt",
    "animal": "dog, horse, rabbit, fox, cat, sheep, chicken, donkey",
    "ground": "field, road, street, yard, garden, bridge, beach",
    "colour": "blue, green, yellow, white, black, brown, purple, orange",
    "drives": "car, truck, bus, van, taxi",
    "drink": "a cup of coffee, a glass of water, some orange juice, a cup of tea, a bottle of milk, some lemonade",
    "city": "London, Paris, Boston, Chicago, Berlin, Moscow, Dublin, Toronto",
    "works": "hospital, school, bank, hotel, restaurant, museum, factory, airport, library",
    "sleeps": "under the table, on the sofa, by the fire, behind the curtain, in the sunshine, near the window",
    "view": "the mountains, the ocean, the lake, the whole city, the islands, the forest, the church, the old castle",
    "from": "my window, the bridge, the top of the hill, the roof, our kitchen, the train, the road",
    "carries": "umbrella, keys, phone, coat, wallet, glasses, ticket, lunch, notebook, gloves",
    "flower": "roses, tulips, flowers, trees, mushrooms, vegetables, cherries, pumpkins",
    "hard": "difficult, simple, short, long, strange, funny, serious",
    "asks": "question, lesson, story, answer, speech, letter",
    "music": "piano, guitar, violin, trumpet, drums, flute",
    "about": "horses, the ocean, history, music, birds, gardening, the moon, famous painters, wild animals, cooking",
    "liked": "good, boring, wonderful, funny, very long, famous, interesting",
    "storm": "storm, rain, snow, thunder, fog, wind",
    "starts": "started, stopped, came back, got worse, arrived",
    "hurts": "leg, finger, shoulder, back, knee, neck",
    "learns": "how to swim, how to cook, French, to play chess, to drive, to dance, English, to ride a horse",
    "feels": "happy, hungry, tired, nervous, angry, thirsty, sick, worried, excited",
    "thing": "chair, lamp, bottle, basket, mirror, picture, clock, blanket, bucket, candle, ladder, letter",
    "put": "on the table, on the shelf, under the bed, next to the door, behind the sofa, beside the window, on the floor",
}  # fmt: skip

GRAMMAR = (
    "The {person} opened the {opens} and walked into the {room}.",
    "She put the {food} on the kitchen table before {meal}.",
    "We had {food} and {food} for {meal}.",
    "It was a {weather} {time} in {month}.",
    "My {family} lives in a {size} house near the {place}.",
    "Please close the {opens} before you go to {goes}.",
    "The children were playing {plays} {when}.",
    "He bought a new {buys} for his {family} {last}.",
    "The {colour} {animal} ran across the {ground}.",
    "They drove to the {place} in a {colour} {drives}.",
    "I would like {drink} and some {food}, please.",
    "The train to {city} leaves {next}.",
    "Her {family} works at the {works} in {city}.",
    "The {size} {animal} is sleeping {sleeps}.",
    "You can see {view} from {from}.",
    "He forgot to bring his {carries} to the {works}.",
    "There are {colour} {flower} growing behind the {place}.",
    "We are going to visit my {family} {next}.",
    "The {person} gave us a very {hard} {asks}.",
    "Do you know where my {family} left the {thing}?",
    "The {person} played a {hard} song on the {music}.",
    "I am reading a {liked} book about {about}.",
    "The {storm} {starts} late in the {time}.",
    "The doctor says that my {hurts} will be better {next}.",
    "Both of my cousins want to learn {learns}.",
    "The {person} was {feels}, but the {person} was {feels}.",
    "Could you please put the {thing} {put}?",
    "I found a {colour} {thing} near the {place} {last}.",
    "What did the {person} say about the {thing}?",
    "Yesterday the {person} showed us a {liked} film about {about}.",
)
"""Slots in braces are those of WORDS; no word comes twice in a sentence."""

_CHOICES = {slot: tuple(words.split(", ")) for slot, words in WORDS.items()}
MOST = 10_000
"""Below what the grammar has, so that drawing until so many differ ends soon."""
_DRAWS = 8
"""More than a sentence has slots."""


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` sentences, all different, as the seed has them; fewer are the first of more.

    Raises:
        UserError: more than MOST, or fewer than one.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"sentences: got {count}, expected 1 to {MOST}; give a text of your own for more")
    made: dict[str, None] = {}
    number = 0
    while len(made) < count:
        draws = iter(keyed_hash(derive(seed, number), np.arange(_DRAWS)).tolist())
        made[_fill(GRAMMAR[next(draws) % len(GRAMMAR)], draws)] = None
        number += 1
    return list(made)


def _fill(pattern: str, draws: Iterator[int]) -> str:
    said: set[str] = set()
    out, rest = "", pattern
    while (start := rest.find("{")) >= 0:
        end = rest.index("}")
        words = [word for word in _CHOICES[rest[start + 1 : end]] if word not in said]
        word = words[next(draws) % len(words)]
        said.add(word)
        out += rest[:start] + word
        rest = rest[end + 1 :]
    return _with_articles(out + rest)


def _with_articles(sentence: str) -> str:
    """`a old lamp` -> `an old lamp`."""
    words = sentence.split(" ")
    return " ".join(
        f"{word}n" if word == "a" and following[:1] in tuple("aeiou") else word
        for word, following in zip(words, [*words[1:], ""], strict=True)
    )
