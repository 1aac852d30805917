"""What happens every N steps: rows, checkpoints, validation, samples, the watchdog; and that it costs next to nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nexus_scale.callbacks.checkpoint import Checkpoint
from nexus_scale.callbacks.context import post
from nexus_scale.callbacks.metrics import Display, Metrics, Sums, duration
from nexus_scale.callbacks.samples import Sample, Samples
from nexus_scale.callbacks.throughput import Throughput, peak_memory
from nexus_scale.callbacks.validate import Validate
from nexus_scale.callbacks.watchdog import STALLED, StageClock, Watchdog
from nexus_scale.config.registry import find
from nexus_scale.contracts import Batch, Callback, Objective, Phase, Progress, RunFolder, StepInfo, UserError
from nexus_scale.io.rows import RowFile, read_rows
from nexus_scale.kernels.transfer import read_later
from nexus_scale.media.grid import PAD, columns_of, make_grid
from nexus_scale.run.files import read_beats
from nexus_scale.trainer import Readings
from tests.distributed import run_ranks, until

torch.set_num_threads(1)


class OneRank:
    """As much of an engine as callbacks see."""

    def __init__(self) -> None:
        self.nets: dict[str, Any] = {"model": lambda x: x * 0.5}
        self.device = torch.device("cpu")
        self.rank, self.world_size = 0, 1
        self.inside: list[str] = []

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        self.inside.append(name)
        yield

    def shards(self) -> dict[str, Any]:
        return {}


def info(step: int, steps: int = 100, metrics: Mapping[str, Any] | None = None, engine: Any = None) -> StepInfo:
    return StepInfo(
        step, steps, metrics or {"loss": (torch.tensor(float(step)), 1)}, engine or OneRank(), Progress(step=step)
    )


def tell(callbacks: Sequence[Callback], step: StepInfo) -> None:
    """A step whose metrics are read at once, as on a CPU."""
    metrics = {name: (float(total), float(count)) for name, (total, count) in step.metrics.items()}
    for callback in callbacks:
        callback.after_reading(replace(step, metrics=metrics))
    for callback in callbacks:
        callback.after_step(step)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "tiny")


def metrics_of(run: RunFolder, context: dict[str, float], **arguments: Any) -> Metrics:
    return Metrics(run=run, record={}, context=context, **{"progress": False, **arguments})


@pytest.mark.parametrize(
    "name",
    [
        "metrics",
        "throughput",
        "checkpoint",
        "validate",
        "samples",
        "watchdog",
        "guard",
        "preemption",
        "stragglers",
        "goodput",
        "monitor",
        "evaluate",
    ],
)
def test_every_callback_is_found_by_its_name(name: str) -> None:
    assert issubclass(find("callbacks", name), Callback)


# ------------------------------------------------------------------------------------------------- rows


def test_rows_beyond_the_resumed_step_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10, "loss": 3}\n{"step": 20, "loss": 2}\n{"step": 30, "loss": 1}\n{"step": 40, "lo')
    rows = RowFile(path, 20)
    rows.append({"step": 30, "loss": 5})
    rows.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(10, 3), (20, 2), (30, 5)]


def test_a_row_grows_in_place_and_stays_one_row(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "rows.jsonl", 0)
    rows.append({"step": 1, "loss": 1.0})
    rows.append({"step": 2, "loss": 2.0})
    rows.extend({"validation/loss": 0.5})
    rows.append({"step": 3, "loss": float("nan")})
    rows.close()
    assert read_rows(tmp_path / "rows.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "validation/loss": 0.5},
        {"step": 3, "loss": None},
    ]


def test_sums_are_means_over_steps_weighted_by_count_whatever_their_kind() -> None:
    sums = Sums()
    sums.add({"loss": (1.0, 1), "late": (6.0, 3.0), "lr": (0.1, 1)})
    sums.add({"loss": (3.0, 1), "late": (2.0, 1.0), "lr": (0.3, 1)})
    sums.add({"critic": (5.0, 1), "late": (0.0, 0.0)})
    assert sums.means(1) == pytest.approx({"loss": 2.0, "late": 2.0, "lr": 0.2, "critic": 5.0})
    assert sums.means(1) == {}


def test_what_is_read_later_is_what_it_was() -> None:
    live = torch.tensor(1.0)
    values = [live, torch.tensor([2**24 + 1], dtype=torch.int64), torch.tensor(0.1, dtype=torch.float64)]
    read = read_later(values)
    live.fill_(100.0)
    assert read() == [1.0, 2**24 + 1, 0.1]
    assert read_later([])() == []


class Recorder(Callback):
    """Notes what it is told, in order; at the steps `settles`, after a step, it wants all metrics read."""

    def __init__(self, settles: Sequence[int] = ()) -> None:
        self.settles, self.told = settles, []

    def after_step(self, info: StepInfo) -> None:
        if info.step in self.settles:
            info.settle()
        self.told.append(("done", info.step))

    def after_reading(self, info: StepInfo) -> None:
        self.told.append(("read", info.step, info.metrics["loss"]))


@pytest.mark.parametrize("late", [False, True])
def test_metrics_are_read_once_each_and_a_step_later_where_a_device_computes(late: bool) -> None:
    recorder = Recorder(settles=(3,))
    readings = Readings([recorder], late)
    for step in range(1, 6):
        readings.expect(now := replace(info(step), settle=readings.settle))
        recorder.after_step(now)
    readings.settle()
    read = [("read", step, (float(step), 1)) for step in range(1, 6)]
    assert [told for told in recorder.told if told[0] == "read"] == read
    order = [told[:2] for told in recorder.told]
    if late:
        assert order.index(("read", 1)) == order.index(("done", 1)) + 1, "not before the next step is queued"
        assert order.index(("read", 3)) == order.index(("done", 3)) - 1, "at once for one who asks"
        assert readings.waited > 0
    else:
        assert all(order.index(("read", step)) < order.index(("done", step)) for step in range(1, 6))
        assert readings.waited == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("metrics_first", [True, False])
def test_figures_of_other_callbacks_join_the_row_of_their_step(run: RunFolder, metrics_first: bool, late: bool) -> None:
    context: dict[str, float] = {}

    class Measures(Callback):
        def after_step(self, info: StepInfo) -> None:
            if info.step in (10, 15, 20):
                post(context, info.step, {"measured": info.step * 1.0})

    metrics = metrics_of(run, context, every=10)
    callbacks = [metrics, Measures()] if metrics_first else [Measures(), metrics]
    for callback in callbacks:
        callback.before_run(OneRank(), Progress())
    readings = Readings(callbacks, late)
    for step in range(1, 21):
        readings.expect(now := info(step, 20))
        if step == 20:
            readings.settle()
        for callback in callbacks:
            callback.after_step(now)
    for callback in callbacks:
        callback.after_run(OneRank(), Progress(step=20))
        callback.close()
    rows = read_rows(run.metrics)
    assert [(row["step"], row.get("measured"), row.get("loss")) for row in rows] == [
        (10, 10.0, 5.5),
        (15, 15.0, None),
        (20, 20.0, 15.5),
    ]
    assert not context


def test_other_ranks_write_nothing_and_keep_their_board_empty(run: RunFolder) -> None:
    engine, context = OneRank(), {}
    engine.rank = 1
    metrics = metrics_of(run, context, every=1)
    metrics.before_run(engine, Progress())
    tell([metrics], info(1, engine=engine))
    post(context, 1, {"measured": 1.0})
    tell([metrics], info(2, engine=engine))
    metrics.close()
    assert not run.metrics.exists()
    assert not context


def test_time_goes_on_where_the_resumed_row_stopped(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    run.metrics.write_text('{"step": 10, "seconds": 500.0}\n')
    metrics = metrics_of(run, {}, every=10)
    metrics.before_run(OneRank(), Progress(step=10))
    tell([metrics], info(20))
    metrics.close()
    assert 500.0 <= read_rows(run.metrics)[-1]["seconds"] < 560.0


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("tiny", 0, 1000)
    display._said = time.perf_counter() - 100
    for step in range(10, 1000, 10):
        display.say(step, 0.5)
    display.finish()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tiny: step 10/1000, loss 0.5")
    assert "left" in lines[0]


def test_durations_read_well() -> None:
    assert [duration(s) for s in (42.4, 185, 7800, 273600)] == ["42 s", "3 min 05 s", "2 h 10 min", "3 d 4 h"]


# ------------------------------------------------------------------------------------------- throughput


def test_the_clock_gives_every_moment_to_one_stage() -> None:
    before = time.perf_counter()
    clock = StageClock()
    made = time.perf_counter()
    for name in ("data", "forward", "data"):
        clock(name)
        time.sleep(0.01)
    read = time.perf_counter()
    seconds = clock.seconds()
    after = time.perf_counter()
    assert seconds["data"] >= 0.02
    assert seconds["forward"] >= 0.01
    assert read - made - 1e-6 <= sum(seconds.values()) <= after - before + 1e-6


def test_throughput_counts_training_time_alone() -> None:
    clock, context = StageClock(), {}
    throughput = Throughput(
        every=2,
        global_batch=8,
        flops_per_sample=100.0,
        tokens_per_sample=4.0,
        peak_flops=1e6,
        stage=clock,
        context=context,
    )
    throughput.before_run(OneRank(), Progress())
    clock._nanoseconds.update({"data": 100_000_000, "forward": 300_000_000, "validate": 9_000_000_000})
    clock._now = ("callbacks", time.perf_counter_ns())
    throughput.after_step(info(1))
    assert not context
    throughput.after_step(replace(info(2), waited=0.3))
    assert context["step"] == 2
    assert context["host_wait"] == pytest.approx(0.75)
    assert context["samples_per_s"] == pytest.approx(16 / 0.4)
    assert context["tokens_per_s"] == pytest.approx(4 * 16 / 0.4)
    assert context["model_flops_per_s"] == pytest.approx(4000.0)
    assert context["mfu"] == pytest.approx(0.004)
    assert context["data_wait"] == pytest.approx(0.25)
    assert context["time/validate"] == pytest.approx(9.0)
    assert context["memory_peak_bytes"] > 50e6


def test_unknown_costs_are_left_out() -> None:
    context: dict[str, float] = {}
    throughput = Throughput(every=1, global_batch=8, stage=StageClock(), context=context)
    throughput.before_run(OneRank(), Progress())
    throughput.after_step(info(1))
    assert context["samples_per_s"] > 0
    assert not {"tokens_per_s", "model_flops_per_s", "mfu"} & set(context)


# ------------------------------------------------------------------------------- checkpoint and validate


class FakeStore:
    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self.waited = 0

    def save(self, step: int, shards: dict[str, Any], state: dict[str, Any]) -> None:
        self.saved.append((step, shards, state))

    def wait(self) -> None:
        self.waited += 1


class Halving(Objective):
    """An objective whose validation is the distance to half of its field, plus noise that its key decides."""

    def __init__(self) -> None:
        self.noise: list[torch.Tensor] = []

    def phases(self, step: int) -> list[Phase]:
        return [Phase("train", "model")]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"balance": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}

    def validate(self, nets: Any, batch: Batch, rng: Any) -> dict[str, torch.Tensor]:
        self.noise.append(rng.normal("eps", (2,)))
        x = batch["x"]
        return {"loss": (nets["model"](x) - x).square(), "loss_zero": x.square(), "loss_t0": x}


@pytest.mark.parametrize(("at_end", "steps"), [(True, [4, 8, 10]), (False, [4, 8])])
def test_checkpoints_come_when_due_with_the_objectives_state(at_end: bool, steps: list[int]) -> None:
    store, context, stages = FakeStore(), {}, []
    checkpoint = Checkpoint(
        every=4,
        at_end=at_end,
        checkpoints=store,
        state=lambda: {"a": 1},
        objective=Halving(),
        stage=stages.append,
        context=context,
    )
    for step in range(1, 11):
        checkpoint.after_step(info(step, 10))
    checkpoint.after_run(OneRank(), Progress(step=10))
    assert [saved[0] for saved in store.saved] == steps
    assert store.waited == 1
    assert "save" in stages
    assert context["checkpoint_s"] >= 0
    shards = store.saved[0][1]
    assert shards["objective/balance"].shape == (2, 3)
    assert torch.equal(shards["objective/balance"].local, torch.arange(6.0))
    assert shards["objective/count"].shape == ()
    other = OneRank()
    other.rank = 1
    assert checkpoint.shards(other) == {}, "the objective's state would be stored twice"


def validate_of(run: RunFolder, objective: Halving, context: dict[str, float], **arguments: Any) -> Validate:
    def validation(count: int) -> Iterator[Batch]:
        for first in range(0, count, 4):
            numbers = torch.arange(first, min(first + 4, count))
            yield Batch({"x": numbers.float() + 1}, positions=numbers, samples=numbers)

    return Validate(
        every=5,
        samples=6,
        objective=objective,
        validation=validation,
        seed=1,
        run=run,
        stage=StageClock(),
        context=context,
        **arguments,
    )


def test_validation_is_a_mean_over_samples_under_fixed_noise(run: RunFolder) -> None:
    objective, engine, context = Halving(), OneRank(), {}
    validate = validate_of(run, objective, context, averages=("ema",))
    validate.before_run(engine, Progress())
    for step in range(1, 8):
        validate.after_step(info(step, 7, engine=engine))
    validate.close()
    rows = read_rows(run.path / "validation.jsonl")
    assert [row["step"] for row in rows] == [5, 7]
    x = torch.arange(1.0, 7.0)
    assert rows[0]["loss"] == pytest.approx((x / 2).square().mean().item())
    assert rows[0]["ratio"] == pytest.approx(0.25)
    assert rows[0]["loss_t0"] == pytest.approx(3.5)
    assert context["validation/ratio"] == pytest.approx(0.25)
    assert engine.inside == ["ema", "ema"]
    half = len(objective.noise) // 2
    assert all(torch.equal(a, b) for a, b in zip(objective.noise[:half], objective.noise[half:], strict=True))


def test_validation_falls_back_to_trained_weights_and_tells_several_apart(run: RunFolder) -> None:
    engine = OneRank()
    assert validate_of(run, Halving(), {}).weights == ("model",)
    validate = validate_of(run, Halving(), {}, weights=("ema", "model"))
    validate.before_run(engine, Progress())
    validate.after_step(info(5, engine=engine))
    validate.close()
    (row,) = read_rows(run.path / "validation.jsonl")
    assert row["weights"] == "ema"
    assert row["model/loss"] == row["loss"]


class OfTwo(OneRank):
    """A rank whose sums add what others before it had."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[torch.Tensor] = []

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        self.sent.append(value)
        return torch.stack(self.sent).sum(0)


class Spread(Halving):
    def validate(self, nets: Any, batch: Batch, rng: Any) -> dict[str, torch.Tensor]:
        return {**super().validate(nets, batch, rng), "pair": torch.stack([batch["x"], -batch["x"]], dim=1)}

    def figures(self, rows: Any) -> dict[str, torch.Tensor]:
        assert torch.equal(rows["pair"][:, 0], torch.arange(1.0, 7.0)) and rows["pair"].dtype == torch.float64
        return {"spread": rows["pair"].max() - rows["pair"].min()}


def test_figures_of_the_whole_validation_set_see_every_row_in_order(run: RunFolder) -> None:
    """On one rank; and of two, the second of which holds samples before and after the first one's."""
    validate = validate_of(run, Spread(), {}, averages=("ema",))
    found = validate.measure(OfTwo(), "ema")
    assert found["spread"] == 12 and "pair" not in found
    two, x = OfTwo(), torch.arange(1.0, 7.0).double()
    validate._of_all(two, x[[5, 0, 2]].unsqueeze(1), torch.tensor([5, 0, 2]))
    assert torch.equal(validate._of_all(two, x[[1, 3, 4]].unsqueeze(1), torch.tensor([1, 3, 4])), x.unsqueeze(1))


def test_an_empty_validation_set_is_an_error(run: RunFolder) -> None:
    validate = validate_of(run, Halving(), {})
    validate.validation = lambda count: iter(())
    with pytest.raises(UserError, match="has no samples, or no bucket with one sample for each of 1 workers"):
        validate.measure(OneRank(), "model")


# ------------------------------------------------------------------------------------------------ samples


def test_grids_lay_images_out_in_rows() -> None:
    images = [np.full((8, 8, 3), i * 20, np.uint8) for i in range(6)]
    grid = np.asarray(make_grid(images, 3))
    assert grid.shape == (2 * (8 + PAD) + PAD, 3 * (8 + PAD) + PAD, 3)
    for i in range(6):
        y, x = PAD + i // 3 * (8 + PAD), PAD + i % 3 * (8 + PAD)
        assert (grid[y : y + 8, x : x + 8] == i * 20).all()
    assert make_grid(images, 3, captions=["a caption much longer than eight pixels"] * 6).size[1] > grid.shape[0]
    assert [columns_of(n) for n in (1, 6, 24, 7)] == [1, 3, 6, 7]
    with pytest.raises(ValueError, match="float64"):
        make_grid([np.zeros((8, 8, 3))])


def test_samples_come_when_due_under_names_that_captions_cannot_choose(run: RunFolder) -> None:
    drawn = [Sample(caption="../../<b>évil</b>", image=np.full((8, 8, 3), i, np.uint8)) for i in range(9)]
    calls: list[int] = []
    context: dict[str, float] = {}
    samples = Samples(
        every=2,
        count=6,
        draw=lambda engine, count: calls.append(count) or drawn[:count],
        run=run,
        stage=StageClock(),
        context=context,
    )
    samples.before_run(OneRank(), Progress())
    for step in range(1, 6):
        samples.after_step(info(step, 5))
    assert calls == [6, 6, 6], "as many are drawn as are asked for"
    assert sorted(path.name for path in run.samples.iterdir()) == sorted(
        f"step_{step:08d}.{kind}" for step in (2, 4, 5) for kind in ("png", "json")
    )
    described = json.loads((run.samples / "step_00000002.json").read_text())
    assert described["captions"] == ["../../<b>évil</b>"] * 6
    assert (described["columns"], described["width"], described["height"]) == (3, 8, 8)
    assert Image.open(run.samples / "step_00000002.png").size == (3 * (8 + PAD) + PAD, 2 * (8 + PAD) + PAD)
    assert context["step"] == 5


def test_a_rank_that_gets_no_samples_writes_none(run: RunFolder) -> None:
    samples = Samples(every=1, draw=lambda engine, count: None, run=run, stage=StageClock(), context={})
    samples.after_step(info(1))
    Samples(every=1, draw=None, run=run, stage=StageClock(), context={}).after_step(info(1))
    assert not run.samples.exists()


def test_sound_is_written_as_wav(run: RunFolder) -> None:
    tone = np.sin(np.arange(800) / 5).astype(np.float32)
    drawn = [Sample(caption="a tone", audio=tone, sample_rate_hz=8000)]
    Samples(every=1, draw=lambda engine, count: drawn, run=run, stage=StageClock(), context={}).after_step(info(1))
    with wave.open(str(run.samples / "step_00000001_00.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 800)
        read = np.frombuffer(file.readframes(800), "<i2") / 32767
    assert np.abs(read - tone).max() < 1e-4


def test_a_step_drawn_again_with_fewer_samples_leaves_none_of_before(run: RunFolder) -> None:
    sounds = [Sample(caption="a", audio=np.zeros(80, np.float32), sample_rate_hz=8000)] * 3
    for count in (3, 1):
        Samples(
            every=1, count=count, draw=lambda engine, count: sounds[:count], run=run, stage=StageClock(), context={}
        ).after_step(info(1))
    assert sorted(path.name for path in run.samples.iterdir()) == ["step_00000001.json", "step_00000001_00.wav"]


# ----------------------------------------------------------------------------------------------- watchdog


def test_a_stage_past_its_deadline_leaves_all_stacks_once(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    clock = StageClock()
    watchdog = Watchdog(deadlines={"forward": 0.1}, action="report", beat_seconds=0.02, run=run, stage=clock)
    watchdog.before_run(OneRank(), Progress(step=7))
    clock("forward")
    until(lambda: any((run.path / "incidents").glob("*.txt")))
    time.sleep(0.1)  # some more beats, which say no more
    clock("data")
    until(lambda: read_beats(run.path)[0]["stage"] == "data")
    beat = read_beats(run.path)[0]
    watchdog.close()
    (incident,) = (run.path / "incidents").glob("*.txt")
    text = incident.read_text()
    assert text.count("rank 0 has been in stage 'forward'") == 1
    assert "test_a_stage_past_its_deadline" in text, "the stack of the thread that stands still is missing"
    assert (beat["step"], beat["stage"]) == (7, "data")
    assert sum("its deadline is 0.1 s" in record.message for record in caplog.records) == 1


def test_steps_within_the_deadline_are_no_incident(run: RunFolder) -> None:
    clock = StageClock()
    watchdog = Watchdog(deadlines={"forward": 1.0}, action="report", beat_seconds=0.02, run=run, stage=clock)
    watchdog.before_run(OneRank(), Progress())
    for _ in range(6):
        clock("forward")
        time.sleep(0.2)
    watchdog.close()
    assert not (run.path / "incidents").exists()


HANGS = """
import sys, time
from types import SimpleNamespace
from pathlib import Path
from nexus_scale.callbacks.watchdog import StageClock, Watchdog
from nexus_scale.contracts import Progress, RunFolder
clock = StageClock()
dog = Watchdog(deadlines={{"step": {deadline}}}, action="exit", beat_seconds=0.05, run=RunFolder(Path(sys.argv[1])), stage=clock)
dog.before_run(SimpleNamespace(rank=3, world_size=1), Progress())
clock("step")
time.sleep(0.3)  # for the watchdog to see it begin
print("hanging", flush=True)
for _ in range({beats}):  # of its own time: what passes while it is stopped shortens one of them alone
    time.sleep(0.05)
"""


def test_a_hung_process_ends_with_the_documented_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS.format(deadline=0.2, beats=2000), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == STALLED == 75
    assert "rank 3 has been in stage 'step'" in done.stderr
    assert len(list((tmp_path / "incidents").glob("*.txt"))) == 1


def test_a_stopped_process_is_not_blamed_for_standing_still(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS.format(deadline=3.0, beats=6), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0, "4 s of being stopped were counted against a deadline of 3 s"


# --------------------------------------------------------------------------------------------- two ranks


def one_of_two(rank: int, world_size: int, folder: str) -> list[float]:
    """A run of two steps in which rank 0 sees losses of 1 and validates on 1 and 2, rank 1 losses of 3, and 3 and 4."""
    engine, context = OneRank(), {}
    engine.rank, engine.world_size = rank, world_size
    run, clock = RunFolder(Path(folder)), StageClock()

    def validation(count: int) -> Iterator[Batch]:
        numbers = torch.arange(2 * rank, 2 * rank + 2)
        yield Batch({"x": numbers.float() + 1}, positions=numbers, samples=numbers)

    callbacks = [
        Metrics(every=2, progress=False, run=run, record={}, context=context),
        Throughput(every=2, global_batch=4, stage=clock, context=context),
        Validate(every=2, objective=Halving(), validation=validation, seed=0, run=run, stage=clock, context=context),
    ]
    for callback in callbacks:
        callback.before_run(engine, Progress())
    for step in (1, 2):
        tell(callbacks, info(step, 2, {"loss": (torch.tensor(1.0 + 2 * rank), 1)}, engine))
    for callback in callbacks:
        callback.after_run(engine, Progress(step=2))
        callback.close()
    return [float(peak_memory())]


def test_two_ranks_write_one_row_with_the_means_of_both(tmp_path: Path) -> None:
    memory = [value for (value,) in run_ranks(2, one_of_two, str(tmp_path), timeout=300)]
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    (held,) = read_rows(tmp_path / "validation.jsonl")
    assert row["loss"] == pytest.approx(2.0)
    assert held["loss"] == pytest.approx((1 + 4 + 9 + 16) / 4 / 4)
    assert row["validation/loss"] == held["loss"]
    assert row["memory_peak_bytes"] == pytest.approx(sum(memory), rel=0.2)
