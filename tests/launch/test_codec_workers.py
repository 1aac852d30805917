"""A codec and its discriminator under ZeRO-3: two workers learn what one learns, books included, and resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import Batch, Callback, Engine, Progress, Shard, StepInfo
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.checkpoint import CheckpointStore, newest
from nexus_scale.engine.settings import WHOLE_NUMEL
from nexus_scale.models.audio.codec import Codec
from nexus_scale.models.gan.ms_stft_discriminator import MSSTFTDiscriminator
from nexus_scale.objectives.codec import Codec as CodecObjective
from nexus_scale.trainer import Trainer
from tests.distributed import run_ranks

STEPS, SAVED = 6, 3
GLOBAL_BATCH = 4


def engine_of(kind: str, world_size: int, accumulation: int, whole_numel: int = WHOLE_NUMEL) -> Engine:
    # The hinge's gradients of real and coded cancel at the discriminator's biases; with a small eps Adam makes steps of what rounding
    # leaves there.
    optimizer = AdamW(lr=1e-3, betas=(0.5, 0.9), eps=1e-3, clip_grad_norm=None)

    def codec() -> Codec:
        return Codec(
            sample_rate_hz=8000, strides=(2, 4), base_channels=4, latent_channels=6, lstm_layers=1, num_codebooks=3,
            codebook_size=8, codebook_decay=0.8, dead_below=10.0, kmeans_iterations=2,
        )  # fmt: skip

    def discriminator() -> MSSTFTDiscriminator:
        return MSSTFTDiscriminator(base_channels=2, windows=(128, 64))

    nets = {"model": NetSpec(codec, optimizer), "discriminator": NetSpec(discriminator, optimizer)}
    micro = GLOBAL_BATCH // world_size // accumulation
    settings = EngineSettings(
        engine=kind,
        steps=STEPS,
        seed=1,
        micro_batch=micro,
        accumulation=accumulation,
        whole_numel=whole_numel,
    )
    return build_engine(nets, {"ema": Average(average_of="model", decay=0.9)}, settings)


def objective_of() -> CodecObjective:
    return CodecObjective(
        sample_rate_hz=8000, mel_windows=(64, 256), book_choices=(2, 3), discriminator_begins=2, balance_decay=0.9
    )


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def after_step(self, info: StepInfo) -> None:
        sums = {name: torch.tensor([float(total), float(count)]) for name, (total, count) in info.metrics.items()}
        means = {name: info.engine.sum_over_ranks(pair) for name, pair in sums.items()}
        self.rows.append({name: float(pair[0] / pair[1]) for name, pair in means.items()})


def advance(engine: Engine, objective: CodecObjective, progress: Progress, until: int, accumulation: int) -> list[Any]:
    share = GLOBAL_BATCH // engine.world_size
    mine = torch.arange(engine.rank * share, (engine.rank + 1) * share)

    def next_batches() -> list[Batch]:
        draw = progress.draws
        progress.draws += 1
        audio = 0.3 * torch.randn(GLOBAL_BATCH, 1, 256, generator=torch.Generator().manual_seed(draw)).cumsum(-1).sin()
        return [Batch({"audio": audio[part]}, part, part, draw) for part in mine.chunk(accumulation)]

    rows = Rows()
    trainer = Trainer(
        steps=STEPS, seed=5, objective=objective, engine=engine, next_batches=next_batches, callbacks=[rows],
        progress=progress, stage=lambda name: None,
    )  # fmt: skip
    trainer.advance(until)
    return rows.rows


def run(root: Path, kind: str, world_size: int, accumulation: int = 1, whole_numel: int = WHOLE_NUMEL) -> list[Any]:
    """All steps, saved on the way and at the end; then from what was saved, to the same bits."""

    def save(step: int) -> None:
        shards = engine.shards()
        if engine.rank == 0:
            shards |= {f"objective/{k}": Shard(t.clone(), 0, tuple(t.shape)) for k, t in objective.state_dict().items()}
        store = CheckpointStore(root, rank=engine.rank, world_size=engine.world_size, attempt="test")
        store.save(step, shards, {"draws": progress.draws})
        store.wait()

    engine, objective, progress = engine_of(kind, world_size, accumulation, whole_numel), objective_of(), Progress()
    rows = advance(engine, objective, progress, SAVED, accumulation)
    save(SAVED)
    before = newest(root)
    rows += advance(engine, objective, progress, STEPS, accumulation)
    save(STEPS)
    whole = {name: shard.local.clone() for name, shard in engine.shards().items()}

    engine, objective = engine_of(kind, world_size, accumulation, whole_numel), objective_of()
    assert before is not None
    engine.load_shards(before.read)
    objective.load_state_dict({key: before.tensor(f"objective/{key}") for key in objective.state_dict()})
    progress = Progress(SAVED, before.state["draws"])
    resumed_rows = advance(engine, objective, progress, STEPS, accumulation)
    resumed = {name: shard.local for name, shard in engine.shards().items()}
    assert resumed_rows == rows[SAVED:], "a resumed run's figures are the same to the bit"
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    return rows


def worker(rank: int, world_size: int, root: str) -> dict[str, Any]:
    rows = {
        "sharded": run(Path(root) / "sharded", "deepspeed", world_size, whole_numel=0),
        "whole": run(Path(root) / "whole", "deepspeed", world_size),
    }
    return json.loads(json.dumps(rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    root = tmp_path_factory.mktemp("codec")
    torch.set_num_threads(1)
    both = run_ranks(2, worker, str(root))
    assert both[0] == both[1], "figures summed over ranks are the same on both"
    alone = run(root / "alone", "local", 1)
    return root, {"alone": alone, "accumulated": run(root / "accumulated", "local", 1, 2), **both[0]}


@pytest.mark.parametrize("other", ["accumulated", "whole", "sharded"])
def test_two_workers_and_micro_batches_learn_what_one_learns(runs: tuple[Path, dict[str, Any]], other: str) -> None:
    root, rows = runs
    for step, (one, two) in enumerate(zip(rows["alone"], rows[other], strict=True)):
        assert one.keys() == two.keys()
        for name, value in one.items():
            # a gradient's norm is a difference of large sums, and the mean logits are close to zero
            rel, floor = (1e-3, 1e-3) if name.endswith(("grad_norm", "real", "fake")) else (1e-5, 1e-6)
            assert two[name] == pytest.approx(value, rel=rel, abs=floor), (step, name)
    one, two = newest(root / "alone"), newest(root / other)
    assert one is not None and two is not None and one.step == two.step == STEPS and one.names == two.names
    books = [name for name in one.names if "quantizer" in name]
    assert len(books) == 8  # four buffers of the model and of its average
    for name in books:
        torch.testing.assert_close(two.tensor(name), one.tensor(name), rtol=1e-4, atol=1e-5, msg=name)


def test_the_comparison_sees_books_and_both_phases(runs: tuple[Path, dict[str, Any]]) -> None:
    """The first step moves no weight and lets the books begin; the discriminator learns in two of three steps from its first."""
    root, rows = runs
    alone = rows["alone"]
    assert alone[0]["grad_norm"] == 0 and alone[0]["commitment"] == 0 and alone[0]["replaced"] == 1
    assert all(
        row["generator/grad_norm" if step in (2, 3, 5) else "grad_norm"] > 0 for step, row in enumerate(alone) if step
    )
    assert ["discriminator/loss" in row for row in alone] == [False, False, True, True, False, True]
    assert any(0 < row.get("replaced", row.get("generator/replaced", 0)) < 1 for row in alone[1:])
    checkpoint = newest(root / "alone")
    assert checkpoint is not None
    books = checkpoint.tensor("model/quantizer.codebooks.buffer")
    assert books.std() > 0 and books[0].unique(dim=0).shape[0] == 8
    assert checkpoint.tensor("objective/norms").min() > 0
