"""Decays of moving averages are the papers', and recipes say them by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.config.schema import (
    SGD,
    AdamW,
    Average,
    ConsistencyDecay,
    CosineDecay,
    HalfLifeDecay,
    PowerDecay,
    RMSprop,
)
from nexus_scale.contracts import Batch, Callback, Loss, Nets, Network, Objective, Phase, Progress, Rng, StepInfo
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.base import BaseEngine
from nexus_scale.engine.ema import MovingAverage, decay_at, gamma_of
from nexus_scale.processes.sigmas import scales_at
from nexus_scale.trainer import Trainer
from tests.distributed import run_ranks
from tests.engine_networks import OddNetwork, batch, copies, differing, load, save

STEPS = 1000


def decays(decay: object, steps: int = STEPS) -> list[float]:
    average = Average.model_validate({"average_of": "model", "decay": decay})
    return [decay_at(average, step, steps) for step in range(steps)]


def test_the_power_profile_is_edm2s() -> None:
    """Karras et al. 2024: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94; the weight of step t in the average is as t^gamma."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    kept = torch.tensor(decays({"name": "power", "sigma_rel": 0.1}), dtype=torch.float64)
    weights = (1 - kept) * torch.cat(
        [kept[1:].flip(0).cumprod(0).flip(0), torch.ones(1)]
    )  # of each step in the last average
    assert kept[0] == 0 and float(weights.sum()) == pytest.approx(1.0)
    times = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    mean = (weights * times).sum()
    assert float(((weights * (times - mean) ** 2).sum()).sqrt()) == pytest.approx(0.1, rel=2e-3)


def test_a_consistency_targets_decay_rises_with_the_scales() -> None:
    """Song et al. 2023: N(k) from s0 to s1 + 1, mu(k) = exp(s0 ln mu0 / N(k)), so that mu(0) = mu0."""
    decay = ConsistencyDecay(start_decay=0.95, start_scales=2, end_scales=150)
    scales = [scales_at(step / STEPS, 2, 150) for step in range(STEPS + 1)]
    assert scales[0] == 2 and scales[-1] == 151 and scales == sorted(scales)
    assert scales[250] == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    values = decays(decay)
    assert values[0] == pytest.approx(0.95) and values[-1] == pytest.approx(math.exp(2 * math.log(0.95) / 151))


def test_a_cosine_decay_ends_at_one() -> None:
    values = decays(CosineDecay(base=0.99))
    assert values[0] == pytest.approx(0.99) and values[STEPS // 2] == pytest.approx(0.995) and values[-1] > 0.99999


def test_a_half_life_is_edms() -> None:
    """Half of an old value is left after so many steps; the ramp is EDM's by images: 0.5^(batch / min(500000, 0.05 images seen))."""
    values = decays(HalfLifeDecay(steps=500000 / 512), steps=30000)
    assert values[0] == 0.0
    for step in (1, 10, 19531, 29999):
        assert values[step] == pytest.approx(0.5 ** (512 / min(500_000, 0.05 * 512 * step)), rel=1e-12)
    assert math.prod(decays({"name": "half_life", "steps": 40, "ramp": None})[:40]) == pytest.approx(0.5)


def test_a_number_warms_up_unless_it_is_told_not_to() -> None:
    assert decays(0.9)[:3] == pytest.approx([0.1, 2 / 11, 3 / 12]) and decays(0.9)[-1] == 0.9
    assert decay_at(Average(average_of="model", decay=0.9, warmup=False), 0, STEPS) == 0.9


def test_an_average_with_decay_zero_is_the_network_to_the_bit() -> None:
    source = [torch.randn(1000) * 10]
    average = MovingAverage(Average(average_of="model", decay=0.0), source, STEPS)
    source[0].add_(torch.randn(1000))
    average.update(0)
    assert torch.equal(average.values[0], source[0])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_averages_move_with_the_last_update_as_they_would_after_it(precision: str) -> None:
    """Those that nothing computes with before the step ends; the others wait for it."""

    def after(last: bool) -> dict[str, Tensor]:
        spec = AdamW(lr=1e-2)
        averages = {
            name: Average(average_of="model", decay=decay)
            for name, decay in (("ema", 0.9), ("slow", 0.99), ("target", 0.5))
        }
        settings = EngineSettings(engine="local", precision=precision, steps=4, micro_batch=8)
        engine = build_engine({"model": NetSpec(OddNetwork, spec)}, averages, settings, called=("target",))
        for step in range(3):
            x, y = batch(step)
            with engine.training("model"):
                engine.backward("model", (engine.nets["model"](x) - y).square().mean(), last=True)
                before = copies(engine)
                engine.step("model", step, last)
                moved = {name.split("/")[0] for name in differing(before, copies(engine)) if name.endswith(".ema")}
                assert moved == ({"ema", "slow"} if last else set())
            engine.update_averages(step)
        return copies(engine)

    assert differing(after(True), after(False)) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decay": {"name": "pwoer"}}, "one of 'power', 'consistency', 'cosine'"),
        ({"decay": {"name": "power", "sigma_rel": 0.3}}, "less than 0.2886"),
        ({"decay": {"name": "consistency", "end_scales": 1}}, "greater than or equal to 2"),
        ({"decay": PowerDecay(), "warmup": True}, "power defines its own start"),
        ({"decay": 1.0}, "less than 1"),
    ],
)
def test_decays_that_cannot_be_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Average.model_validate({"average_of": "model", **values})


# ------------------------------------------------------------------------------------------------- called, and several at once


class Half(Network):
    """Half of a pair of autoencoders: a network with a buffer that its constructor does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 7), nn.ModuleList([nn.Linear(7, 7)]), nn.Linear(7, 6)
        self.register_buffer("scale", torch.ones(3))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.scale.fill_(0.9)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle[0](torch.tanh(self.first(x))))) * self.scale.mean()

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class Cycle(Objective):
    """One loss teaches two networks that call each other twice, towards what the first one's average makes; a third learns alone."""

    needs, fields = ("there", "back", "critic", "target"), ("x",)

    def phases(self, step: int) -> Sequence[Phase]:
        return (*[Phase("critic", trains="critic")] * 2, Phase("pair", trains=("there", "back")))

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        x = batch["x"]
        if phase == "critic":
            total = (nets["critic"](x + rng.normal("z", (6,))) - nets["target"](x)).square().mean()
            return Loss(total)
        goal = nets["target"].twice(x.requires_grad_())
        assert not goal.requires_grad and not nets["target"].training
        there, back = nets["there"](x), nets["back"](x)
        total = (nets["back"](there) - x).square().mean() + (nets["there"](back) - x).square().mean()
        total = total + (there - goal).square().mean() + 0.1 * nets["critic"](back).square().mean()
        return Loss(total, {"loss": total.detach()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        return {"loss": (nets["there"](batch["x"]) - batch["x"]).square().mean(1)}


ENGINES: dict[str, dict[str, Any]] = {
    "replicated": {"engine": "replicated"},
    "whole": {"engine": "deepspeed"},
    "sharded": {"engine": "deepspeed", "whole_numel": 0},
    "sharded, critic whole": {"engine": "deepspeed", "whole_numel": 0, "whole": ("critic",)},
    "offloaded": {"engine": "deepspeed", "offload": "cpu"},
    "recomputed": {"engine": "deepspeed", "whole_numel": 0, "activation_checkpointing": True},
}
GLOBAL_BATCH, LAST = 8, 20
BF16 = {"precision": "bf16"}
RESUMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("whole", {}), ("sharded", {}), ("replicated", {}), ("sharded", BF16), ("whole", BF16)
)  # fmt: skip


def made(how: str, **more: Any) -> BaseEngine:
    given: dict[str, Any] = {"engine": "local", **ENGINES.get(how, {}), **more}
    whole = given.pop("whole", ())
    optimizers = {
        "there": AdamW(lr=1e-2, weight_decay=0.1),
        "back": SGD(lr=0.05, momentum=0.5, clip_grad_norm=0.5),
        "critic": RMSprop(lr=1e-3, clip_weights=0.3, momentum=0.5),
    }
    specs = {name: NetSpec(Half, optimizer, sharded=name not in whole) for name, optimizer in optimizers.items()}
    averages = {
        "target": Average(average_of="there", decay=ConsistencyDecay(start_decay=0.8)),
        "ema": Average(average_of="there", decay=0.9),
    }
    settings = EngineSettings(steps=LAST, seed=1, **given)
    engine: Any = build_engine(specs, averages, settings, called=Cycle.needs)
    return engine


def run(engine: Any, first: int, last: int, accumulation: int = 1) -> list[float]:
    """Gradient norms of the pair."""
    share, norms = GLOBAL_BATCH // engine.world_size, []
    mine = torch.arange(engine.rank * share, (engine.rank + 1) * share)
    progress = Progress(step=first, draws=3 * first)

    def next_batches() -> list[Batch]:
        x = torch.randn(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(progress.draws))
        progress.draws += 1
        return [Batch({"x": x[part]}, part, part, progress.draws) for part in mine.chunk(accumulation)]

    class Norms(Callback):
        def after_step(self, info: StepInfo) -> None:
            norms.append(float(info.metrics["pair/grad_norm"][0]))
            assert info.metrics["pair/grad_norm_back"][0] < info.metrics["pair/grad_norm"][0]

    Trainer(
        steps=last, seed=5, objective=Cycle(), engine=engine, next_batches=next_batches, callbacks=[Norms()],
        progress=progress, stage=lambda name: None,
    ).run()  # fmt: skip
    return norms


def weights(engine: Any) -> list[float]:
    names = ("there", "back", "critic", "target", "ema")
    return [float(tensor.double().norm()) for name in names for _, tensor in engine.parameters(name)]


def resumed(how: str, root: Path, **more: Any) -> list[str]:
    """What differs after a resume half way."""
    engine = made(how, **more)
    run(engine, 0, 4)
    save(engine, root, 4)
    run(engine, 4, 8)
    other = made(how, **more)
    load(other, root)
    run(other, 4, 8)
    return differing(copies(engine), copies(other))


def callable_worker(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for how in ENGINES:
        accumulation = 2 if how in ("sharded", "replicated") else 1
        engine = made(how, micro_batch=GLOBAL_BATCH // world_size // accumulation, accumulation=accumulation)
        found[how] = [*run(engine, 0, LAST, accumulation), *weights(engine)]
    for how, more in RESUMED:
        name = f"{how} {more}"
        found[name] = resumed(
            how, Path(folder) / name.replace(" ", "_"), micro_batch=GLOBAL_BATCH // world_size, **more
        )
    other = made("sharded", micro_batch=GLOBAL_BATCH // world_size)  # what one process wrote
    load(other, Path(folder) / "alone")
    run(other, 4, 8)
    found["elastic"] = weights(other)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[float]]:
    root = tmp_path_factory.mktemp("averages")
    engine = made("local")
    run(engine, 0, 4)
    save(engine, root / "alone", 4)
    run(engine, 4, 8)
    both = run_ranks(2, callable_worker, str(root))
    assert both[0] == both[1]
    return both[0], weights(engine)


@pytest.fixture(scope="module")
def alone() -> list[float]:
    torch.set_num_threads(1)
    engine = made("local")
    return [*run(engine, 0, LAST), *weights(engine)]


@pytest.mark.parametrize("how", ENGINES)
def test_two_ranks_that_call_an_average_and_teach_a_pair_learn_what_one_learns(
    how: str, ranks: tuple[dict[str, Any], list[float]], alone: list[float]
) -> None:
    assert ranks[0][how] == pytest.approx(alone, rel=1e-5)


def test_they_resume_to_the_bit_and_on_another_number_of_ranks(
    ranks: tuple[dict[str, Any], list[float]], tmp_path: Path
) -> None:
    names = [name for name in ranks[0] if "{" in name]
    assert len(names) == 5 and {name: ranks[0][name] for name in names if ranks[0][name]} == {}
    assert ranks[0]["elastic"] == pytest.approx(ranks[1], rel=1e-5)
    assert resumed("local", tmp_path / "one") == [] and resumed("local", tmp_path / "bf16", precision="bf16") == []


def test_an_average_that_is_called_is_its_network_of_late() -> None:
    for precision in ("float32", "bf16"):
        engine: Any = made("local", precision=precision)
        x = torch.randn(4, 6)
        with engine.weights("there"):
            assert torch.equal(engine.nets["target"](x), engine.nets["there"](x)), "at first they are one"
        run(engine, 0, 3)
        with engine.weights("target"):
            expected = engine.nets["there"](x)
        assert torch.equal(engine.nets["target"](x), expected) and torch.equal(
            engine.nets["target"].twice(x), 2 * expected
        )
        with engine.weights("there"):
            assert not torch.equal(engine.nets["there"](x), expected)
        assert "ema" not in engine.nets, "the objective does not call it"


def test_clipped_weights_stay_in_bounds_and_keep_the_names_of_their_moments() -> None:
    engine = made("local")
    run(engine, 0, 2)
    assert all(float(p.detach().abs().max()) <= 0.3 + 1e-6 for p in engine.modules["critic"].parameters())
    held = {name.split("/")[0] + "." + name.rsplit(".", 1)[1] for name in engine.shards() if "." in name}
    assert {
        "critic.square_avg",
        "critic.momentum_buffer",
        "back.momentum_buffer",
        "there.exp_avg_sq",
        "target.ema",
    } <= held
    assert "back.exp_avg" not in held
    assert [int(engine.shards()[f"{name}.optimizer_steps"].local) for name in ("there", "back", "critic")] == [2, 2, 4]
