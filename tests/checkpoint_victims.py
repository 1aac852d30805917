"""Two ranks that train and save at every step, to be killed; started from a process that has imported everything, so that a life
costs a fraction of a second."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from nexus_scale.contracts import Engine, Shard
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import Checkpoint, CheckpointStore, newest
from nexus_scale.io import faults
from tests.distributed import forked, free_port
from tests.engine_networks import build, train

WORLD_SIZE = 2
STEPS = 12
PADDING = 1_000_000  # float32 values of each rank, so that a save takes as long as a step


def padding(rank: int, step: int) -> torch.Tensor:
    return torch.arange(PADDING, dtype=torch.float32) * step + rank


def shards_of(engine: Engine, step: int) -> dict[str, Shard]:
    mine = Shard(padding(engine.rank, step), engine.rank * PADDING, (WORLD_SIZE * PADDING,))
    return {**engine.shards(), "padding": mine}


def _victim(rank: int, port: int, run: str, fault: str, attempt: str, settled: bool) -> None:
    """One life of a rank: from wherever the run is to its end, or to its death. `said` holds what rank 0 knew as committed."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo", NEXUS_FAULT=fault,
    )  # fmt: skip
    torch.set_num_threads(1)
    distributed.init("cpu", timeout_s=30)
    folder = Path(run)
    engine = build("replicated", WORLD_SIZE, micro_batch=4)
    step = 0
    faults.arm(rank, lambda: step)
    store = CheckpointStore(folder / "checkpoints", rank=rank, world_size=WORLD_SIZE, attempt=attempt, run=folder)
    checkpoint = newest(folder / "checkpoints", run=folder)
    if checkpoint is not None:
        step = checkpoint.step
        with checkpoint.claimed() as read:
            engine.load_shards(read)
            for of in range(WORLD_SIZE):
                values = read("padding", of * PADDING, (of + 1) * PADDING)
                assert torch.equal(values, padding(of, step)), f"torn: the padding of step {step}, rank {of}"
    while step < STEPS:
        train(engine, step, step + 1)
        before, step = step, step + 1
        store.save(step, shards_of(engine, step), {"step": step})
        if settled:
            store.wait()
        known = step if settled else before  # a save begins when the one before is settled
        if rank == 0:
            with open(folder / "said", "a") as said:
                said.write(f"{known}\n")
    store.wait()
    os._exit(0)  # no wait for threads that a library left behind


@dataclass
class Life:
    """What was found after the ranks of one life were gone."""

    ended: bool
    within_save: bool


def live(run: Path, attempt: int, *, fault: str = "", kill: Callable[[Sequence[BaseProcess]], None] | None = None,
         settled: bool = False) -> Life:  # fmt: skip
    """Starts both ranks and awaits their end; checks what a death left.

    Args:
        fault: NEXUS_FAULT of both ranks.
        kill: called once they run; kills whom it likes.
        settled: whether each save is waited for before the next step.
    """
    context = forked()
    port = free_port()
    ranks = [
        context.Process(target=_victim, args=(rank, port, str(run), fault, f"a{attempt}", settled))
        for rank in range(WORLD_SIZE)
    ]
    for process in ranks:
        process.start()
    if kill is not None:
        kill(ranks)
    deadline = time.monotonic() + 120
    while all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.005)
    within_save = any((run / "checkpoints").glob("step_*.tmp-*")) or any((run / "checkpoints").glob("step_*.pruned-*"))
    for process in ranks:
        process.join(
            0 if kill else 10
        )  # a survivor's collectives break, and it ends by itself; or its supervisor kills it
        process.kill()
        process.join()
    codes = [process.exitcode for process in ranks]
    assert all(code in (0, 1, -signal.SIGKILL) for code in codes), codes
    check(run)
    return Life(codes == [0, 0], within_save)


def check(run: Path) -> Checkpoint | None:
    """Nothing that was known as committed is lost, nothing torn has a checkpoint's name."""
    said = run / "said"
    known = max((int(line) for line in said.read_text().split()), default=0) if said.exists() else 0
    found = newest(run / "checkpoints")
    assert not list((run / "checkpoints").glob("*.corrupt-*")), "a torn checkpoint was committed"
    assert (found.step if found else 0) >= known, f"step {known} was committed, the newest is {found}"
    return found


def bits(run: Path) -> str:
    """A digest of the final checkpoint's tensors."""
    found = check(run)
    assert found is not None
    assert found.step == STEPS
    import xxhash

    digest = xxhash.xxh3_128()
    for name in found.names:
        digest.update(name.encode())
        digest.update(found.tensor(name).view(torch.uint8).numpy())
    return digest.hexdigest()


def finish(run: Path, attempt: int) -> str:
    assert live(run, attempt).ended
    return bits(run)


def strike_after(run: Path, delay_s: float, whom: Sequence[int]) -> Callable[[Sequence[BaseProcess]], None]:
    """SIGKILL, so long after the first save of this life began."""

    def kill(ranks: Sequence[BaseProcess]) -> None:
        said = run / "said"
        before = said.stat().st_size if said.exists() else 0
        while all(process.is_alive() for process in ranks) and (not said.exists() or said.stat().st_size == before):
            time.sleep(0.002)
        time.sleep(delay_s)
        for rank in whom:
            pid = ranks[rank].pid
            if pid is not None and ranks[rank].is_alive():
                os.kill(pid, signal.SIGKILL)

    return kill
