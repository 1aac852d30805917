"""The loader against webdataset, on the same tar files: samples per CPU-second of 8 KiB latents with their class.

Ours shuffles (shards, and samples in a window of eight) and checks every byte; webdataset shuffles (shards, and a
buffer of 1,000) and checks nothing. All make batches of 256, of float16 as stored, but the raw reader, which reads only:
the floor, and a low one, since its 8 MiB stay in the processor's cache where a shuffled window goes through memory.
The rounds are interleaved, CPU time is that of the process with all its threads, and files lie in the page cache.
"""

from __future__ import annotations

import functools
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexus_scale.contracts import Progress
from nexus_scale.data.loader import Dataset, Loader, Source
from nexus_scale.data.manifest import Field
from nexus_scale.data.npy import HEADER_BYTES
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.kernels.memory import keep_freed_memory

SHAPE = (4, 32, 32)
BATCH = 256
PER_SHARD = 2000


def _write(folder: Path, samples: int) -> list[Path]:
    """Shards of random latents; their paths."""
    rng = np.random.default_rng(0)
    fields = [Field("latent", "latent.npy", "float16", SHAPE), Field("label", "cls", "int64", ())]
    paths = []
    for first in range(0, samples, PER_SHARD):
        paths.append(folder / f"{first // PER_SHARD:05d}.tar")
        with ShardWriter(paths[-1], fields) as writer:
            for number in range(first, min(first + PER_SHARD, samples)):
                latent = rng.standard_normal(SHAPE, np.float32).astype(np.float16)
                writer.write(f"{number:08d}", {"latent": latent, "label": int(rng.integers(1000))})
    finish_folder(folder)
    return paths


def _raw(paths: list[Path], buffer: mmap.mmap, samples: int) -> int:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return samples


def _ours(loader: Loader) -> int:
    """One epoch, each time in another order, from a loader that continues as in training."""
    batches = loader.dataset.samples // BATCH
    for _ in range(batches):
        (batch,) = loader.next_batches()
        assert batch["latent"].shape == (BATCH, *SHAPE)
        assert batch["latent"].dtype == torch.float16
        assert batch["label"].shape == (BATCH,)
    time.sleep(0.5)  # the thread that reads ahead comes to rest here, not in another contestant's time
    return batches * BATCH


def _webdataset(paths: list[Path], by_hand: bool) -> int:
    import webdataset

    pipeline = webdataset.WebDataset([str(path) for path in paths], shardshuffle=len(paths)).shuffle(1000)
    if by_hand:
        pairs = pipeline.to_tuple("latent.npy", "cls").map(_pair)
        batches: Iterator[Any] = iter(pairs.batched(BATCH, collation_fn=_stack))
    else:
        decoded = pipeline.decode().to_tuple("latent.npy", "cls").batched(BATCH)
        batches = ((torch.from_numpy(latents), torch.as_tensor(labels)) for latents, labels in decoded)
    seen = 0
    for latents, labels in batches:
        assert latents.shape[1:] == SHAPE
        assert latents.dtype == torch.float16
        assert len(labels) == len(latents)
        seen += len(latents)
    return seen


def _pair(row: tuple[bytes, bytes]) -> tuple[np.ndarray, int]:
    return np.frombuffer(row[0], np.float16, offset=HEADER_BYTES).reshape(SHAPE), int(row[1])


def _stack(rows: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.stack([row[0] for row in rows])), torch.tensor([row[1] for row in rows])


def _rate(read: Callable[[], int]) -> float:
    begun = time.process_time()
    samples = read()
    return samples / (time.process_time() - begun)


def run(samples: int = 20_000, rounds: int = 12, peer_samples: int = 4_000) -> dict[str, Any]:
    """The best round of each contestant, with the medians beside it.

    Args:
        peer_samples: how many samples webdataset reads in a round; it is slow, and its rate does not depend on their number.

    Returns:
        `ratio`: our samples per CPU-second over those of webdataset's own decoding pipeline; `cpu_over_raw`: our CPU
        time over that of reading the same bytes; `raw_spread`: how much the floor varied, (max - min) / median.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as all training on a CPU does; it serves all contestants
    try:
        with tempfile.TemporaryDirectory(prefix="nexus-bench-") as name:
            paths = _write(Path(name), samples)
            loader = Loader(
                Dataset.open([Source([name])]),
                seed=0,
                global_batch=BATCH,
                micro_batch=BATCH,
                rank=0,
                world_size=1,
                progress=Progress(),
            )
            # Aligned to a page: 16 bytes behind one, some machines copy at half the speed.
            buffer = mmap.mmap(-1, 8 << 20)
            some = paths[: max(1, peer_samples // PER_SHARD)]
            contestants: dict[str, Callable[[], int]] = {
                "raw": functools.partial(_raw, paths, buffer, samples),
                "ours": functools.partial(_ours, loader),
                "webdataset": functools.partial(_webdataset, some, by_hand=False),
                "webdataset_by_hand": functools.partial(_webdataset, some, by_hand=True),
            }
            for read in contestants.values():
                read()  # imports, page cache
            rates: dict[str, list[float]] = {contestant: [] for contestant in contestants}
            for _ in range(rounds):
                for contestant, read in contestants.items():
                    rates[contestant].append(_rate(read))
            loader.close()
    finally:
        torch.set_num_threads(threads)
    # The best round: other processes only ever add CPU time.
    best = {contestant: max(values) for contestant, values in rates.items()}
    median = {contestant: statistics.median(values) for contestant, values in rates.items()}
    ours = best.pop("ours")
    return {
        "name": "loader",
        "unit": "samples per CPU-second",
        "ratio": ours / best["webdataset"],
        "ratio_by_hand": ours / best["webdataset_by_hand"],
        "cpu_over_raw": best["raw"] / ours,
        "ours": ours,
        "peers": best,
        "median": median,
        "raw_spread": (max(rates["raw"]) - min(rates["raw"])) / median["raw"],
        "samples": samples,
        "rounds": rounds,
    }
