"""F9: over any mix of kills and numbers of workers no sample of an epoch comes twice or is missed.

A ledger says which sample stood at each position of each global batch. Every attempt goes on from the last progress that was
committed, with another number of workers, and must write what the first one wrote.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexus_scale.contracts import Progress
from nexus_scale.data.loader import BadData, Dataset, Loader, Source
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.synthetic import SyntheticDataset
from nexus_scale.io.durable import append_line, atomic_write
from tests.distributed import started

torch.set_num_threads(1)
WORLDS = (1, 2, 3, 4, 8)
BATCH = 48


def draw_of(loaders: list[Loader], batch: int) -> np.ndarray:
    """One global batch from all ranks: the sample at each position."""
    row = np.full(batch, -1)
    for loader in loaders:
        for part in loader.next_batches():
            assert (row[part.positions.numpy()] == -1).all()
            row[part.positions.numpy()] = part.samples.numpy()
    assert (row >= 0).all()
    return row


def ranks(dataset: Any, world_size: int, batch: int, micro: int, draws: int, **settings: Any) -> list[Loader]:
    return [
        Loader(
            dataset, seed=5, global_batch=batch, micro_batch=micro, rank=rank, world_size=world_size,
            progress=Progress(draws=draws), **settings,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def test_a_million_positions_over_kills_and_worlds() -> None:
    samples, batch, every = 100_003, 4800, 10
    draws = -(-1_000_000 // batch)
    dataset = SyntheticDataset(samples, {"x": {"shape": [], "dtype": "bool"}})
    ledger: dict[int, np.ndarray] = {}
    chance, committed, used, kills = random.Random(0), 0, set(), 0
    while committed < draws:
        world_size = chance.choice(WORLDS)
        micro = batch // world_size // chance.choice((1, 2, 4, 25))
        loaders = ranks(dataset, world_size, batch, micro, committed, prefetch=chance.choice((0, 2)))
        used.add(world_size)
        for draw in range(committed, min(draws, committed + chance.randrange(1, 3 * every))):
            row = draw_of(loaders, batch)
            assert np.array_equal(ledger.setdefault(draw, row), row)  # again, after a kill: the same
            if (draw + 1) % every == 0 or draw + 1 == draws:
                committed = draw + 1
        kills += committed < draws
        for loader in loaders:
            loader.close()
    assert used == set(WORLDS) and kills > 10
    seen = np.concatenate([ledger[draw] for draw in range(draws)])
    assert len(seen) >= 1_000_000
    for epoch in range(len(seen) // samples):
        assert np.array_equal(np.sort(seen[epoch * samples : (epoch + 1) * samples]), np.arange(samples))


def attempt(folder: str, world_size: int, until: int | None) -> None:
    """A process of its own: reads on from what was committed, and keeps the ledger, until it is killed; it goes no further than
    `until`."""
    root = Path(folder)
    dataset = Dataset.open([Source([root / "data"])], window=2, bad=BadData(limit=0.1), verify="none")
    committed = root / "committed.json"
    draws = json.loads(committed.read_text()) if committed.exists() else 0
    loaders = ranks(dataset, world_size, BATCH, BATCH // world_size // 2, draws)
    while draws < 40:
        if draws == until:
            time.sleep(600)
        row = draw_of(loaders, BATCH)
        append_line(root / "ledger", json.dumps([draws, world_size, row.tolist()]))
        draws += 1
        if draws % 3 == 0 or draws == 40:
            atomic_write(committed, json.dumps(draws))
        time.sleep(0.02)  # a step
    for loader in loaders:
        loader.close()


def test_processes_that_are_killed_keep_one_ledger(tmp_path: Path) -> None:
    samples = 150
    for first in range(0, samples, 15):
        with ShardWriter(tmp_path / "data" / f"{first:03d}.tar", [Field("x", "x.npy", "float32", (2,))]) as writer:
            for number in range(first, first + 15):
                writer.write(f"{number:03d}", {"x": np.full(2, number, np.float32)})
    finish_folder(tmp_path / "data")
    shard = bytearray((tmp_path / "data" / "060.tar").read_bytes())
    shard[700] ^= 1  # sample 60 is bad: every attempt puts the same others in its place
    (tmp_path / "data" / "060.tar").write_bytes(shard)

    def lines() -> list[list[Any]]:
        path = tmp_path / "ledger"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    for number, world_size in enumerate((2, 1, 4, 3, 8)):
        log, until = tmp_path / "output", 9 * (number + 1) if number < 4 else None
        process = started(attempt, str(tmp_path), world_size, until, log=log)
        begun, before = time.monotonic(), len(lines())
        try:
            while number < 4 and len(lines()) < before + 6 + number and process.is_alive():
                assert time.monotonic() - begun < 120, log.read_text()
                time.sleep(0.005)
        finally:
            if number < 4:
                process.kill()
        process.join(120)
        assert process.exitcode == (-9 if number < 4 else 0), log.read_text()

    ledger: dict[int, list[int]] = {}
    for draw, _, row in lines():
        assert ledger.setdefault(draw, row) == row
    assert sorted(ledger) == list(range(40)) and len(lines()) > 40 and len({row[1] for row in lines()}) == 5
    seen = np.concatenate([ledger[draw] for draw in range(40)])
    dataset = Dataset.open([Source([tmp_path / "data"])], window=2)
    order = np.concatenate([dataset.order(5, BATCH).batch(draw).samples for draw in range(40)])
    for epoch in range(len(seen) // samples):
        part = slice(epoch * samples, (epoch + 1) * samples)
        assert np.array_equal(np.sort(order[part]), np.arange(samples))
        assert np.flatnonzero(seen[part] != order[part]).tolist() == np.flatnonzero(order[part] == 60).tolist()
