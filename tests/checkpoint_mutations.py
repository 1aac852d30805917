"""What can befall a folder of checkpoints: random damage to the newest one, by number, the same every time."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "MANIFEST.json"

Mutation = Callable[[Path, Path, random.Random], None]
"""`mutate(newest, older, random)`: folders of two checkpoints; the newest is damaged, the older one only copied from."""


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def any_file(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(folder.iterdir()))


def truncate(newest: Path, older: Path, dice: random.Random) -> None:
    file = any_file(newest, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))


def flip_a_bit(newest: Path, older: Path, dice: random.Random) -> None:
    file = any_file(newest, dice)
    data = bytearray(file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


def zero_a_block(newest: Path, older: Path, dice: random.Random) -> None:
    file = any_file(newest, dice)
    data = bytearray(file.read_bytes())
    start = dice.randrange(len(data))
    while not any(data[start : start + 64]):
        start = dice.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    file.write_bytes(data)


def delete(newest: Path, older: Path, dice: random.Random) -> None:
    any_file(newest, dice).unlink()


def duplicate(newest: Path, older: Path, dice: random.Random) -> None:
    file = any_file(newest, dice)
    shutil.copy(file, newest / f"{dice.randrange(10**6)}-{file.name}")


def swap_ranks(newest: Path, older: Path, dice: random.Random) -> None:
    one, other = dice.sample(parts(newest), 2)
    aside = newest / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def mix_steps(newest: Path, older: Path, dice: random.Random) -> None:
    for file in dice.sample(parts(older), dice.randint(1, len(parts(older)))):
        shutil.copy(file, newest / file.name)


def old_manifest(newest: Path, older: Path, dice: random.Random) -> None:
    shutil.copy(older / MANIFEST, newest / MANIFEST)


def extra_file(newest: Path, older: Path, dice: random.Random) -> None:
    (newest / f"extra{dice.randrange(10**6)}").write_bytes(dice.randbytes(dice.randrange(64)))


def empty_manifest(newest: Path, older: Path, dice: random.Random) -> None:
    (newest / MANIFEST).write_text(dice.choice(["", " ", "{}", "[]", "null", '{"manifest":{},"xxh3_128":""}']))


def append(newest: Path, older: Path, dice: random.Random) -> None:
    with open(any_file(newest, dice), "ab") as file:
        file.write(dice.randbytes(dice.randint(1, 64)))


def link(newest: Path, older: Path, dice: random.Random) -> None:
    file = any_file(newest, dice)
    target = older / file.name
    file.unlink()
    file.symlink_to(target)


def whole_older_checkpoint(newest: Path, older: Path, dice: random.Random) -> None:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


MUTATIONS: tuple[Mutation, ...] = (
    truncate, flip_a_bit, flip_a_bit, zero_a_block, delete, duplicate, swap_ranks, mix_steps, old_manifest, extra_file,
    empty_manifest, append, link, whole_older_checkpoint,
)  # fmt: skip


def mutate(number: int, newest: Path, older: Path) -> str:
    """Does one to three kinds of damage; their names."""
    dice = random.Random(number)
    done = []
    for mutation in dice.sample(MUTATIONS, dice.choice([1, 1, 1, 2, 3])):
        if "link" in done or len(list(newest.iterdir())) < 4:
            break  # a write through the link would damage the older checkpoint; the others want all files to be there
        mutation(newest, older, dice)
        done.append(mutation.__name__)
    return " + ".join(done)
