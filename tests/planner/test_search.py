"""Failures by formula and one by one; ceilings; a search over clusters, its table, its plot, its JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nexus_scale.config.recipe import Cluster, load_cluster, load_recipe
from nexus_scale.contracts import UserError
from nexus_scale.dry_run import plan_command
from nexus_scale.planner.ceilings import ceilings_of
from nexus_scale.planner.failures import Faults, daly, simulate, slowdown, young
from nexus_scale.planner.roofline import Layout, step_time
from nexus_scale.planner.search import Left, Row, Search, search_table
from nexus_scale.planner.work import Work

SMALL = {
    "global_batch": 64,
    "steps": 10_000,
    "networks": {"model": {"depth": 2, "hidden_size": 64, "num_heads": 4, "latent_size": 8}},
}


def test_failures_one_by_one_cost_what_the_formula_says() -> None:
    """Daly's expected wall time against simulated runs, within 2 %, and his interval against all others."""
    faults = Faults(mean_s=3600, block_s=20, recover_s=60)
    training = 400 * 3600.0
    for interval in (120.0, daly(faults), 1200.0):
        mean = sum(simulate(training, interval, faults, seed) for seed in range(20)) / 20
        assert mean / training == pytest.approx(slowdown(interval, faults), rel=0.02)
    best = min(range(60, 3600), key=lambda seconds: slowdown(seconds, faults))
    assert daly(faults) == pytest.approx(best, rel=0.01)
    assert young(faults) == pytest.approx(math.sqrt(2 * 20 * 3600)) and young(faults) == pytest.approx(best, rel=0.06)
    assert simulate(100.0, 10.0, Faults(1e12, 1.0, 5.0), seed=0) == 110.0, "no failure: ten saves"
    assert daly(Faults(mean_s=10, block_s=30, recover_s=1)) == 10, "where a save takes longer than machines last"


def test_rates_are_measured_where_a_result_is_committed_and_stated_otherwise(tmp_path: Path) -> None:
    cluster = load_cluster("h100x8")
    stated = ceilings_of(cluster, tmp_path)
    assert stated is not None and {stated.matmul.origin, stated.copy.origin, stated.network.origin} == {"stated"}
    forward, backward = stated.attention_rates(128, 1024)
    assert (forward, backward) == (574e12, 408e12)
    assert stated.attention_rates(72, 1024)[0] == pytest.approx(574e12 * 72 / 96)
    assert 574e12 < stated.attention_rates(128, 1500)[0] < 617e12

    def commit(name: str, date: str, **changed: Any) -> None:
        rates = {"matmul_tflops": 700.0, "copy_gb_per_second": 2800.0}
        rows = [{"head_dim": 64, "tokens": 1024, "forward_tflops": 400.0, "both_tflops": 350.0}]
        result = {"card": "NVIDIA H100 80GB HBM3", "date": date, "ceilings": {**rates, "attention": rows}} | changed
        (tmp_path / name).write_text(json.dumps(result))

    commit("gpu-old.json", "2026-11-20", ceilings={"matmul_tflops": 1.0})
    rows = [
        {"row": "optimizer", "kernel": kernel, "ms": 1.0, "gb_per_second": rate}
        for kernel, rate in (("a", 1400.0), ("b", 2240.0))
    ]
    commit("gpu.json", "2026-11-28", rows=[*rows, {"row": "optimizer", "kernel": "c", "unavailable": "why"}])
    commit("gpu-other.json", "2026-11-29", card="NVIDIA H200")
    commit("gpu-tiny.json", "2026-11-30", tiny=True)
    measured = ceilings_of(cluster, tmp_path)
    assert measured is not None and (measured.matmul.value, measured.matmul.origin) == (700.0, "measured")
    assert "2026-11-28" in measured.copy.source
    share = measured.shares["optimizer"]
    assert (share.value, share.origin) == (pytest.approx(0.8), "measured"), "the fastest kernel's"
    forward, backward = measured.attention_rates(64, 1024)
    assert 3.5 / (1 / forward + 2.5 / backward) == pytest.approx(350e12), "forward and backward together as measured"
    given = ceilings_of(cluster.model_copy(update={"network_gb_per_second": 25.0}), tmp_path)
    assert given is not None and (given.network.value, given.network.origin) == (25.0, "given")
    assert ceilings_of(Cluster(), tmp_path) is None
    with pytest.raises(UserError, match=r"gpu 'H10'.*H100"):
        ceilings_of(cluster.model_copy(update={"gpu": "H10"}), tmp_path)


def test_a_step_is_bound_by_the_device_the_host_or_the_links(tmp_path: Path) -> None:
    ceilings = ceilings_of(load_cluster("h100x8"), tmp_path)
    assert ceilings is not None
    work = Work(1e12, {}, 1e9, 2e9, forward_kernels=100, backward_kernels=200, blocks=10)

    def of(workers: int, micro: int, parameters: int = 10**9, degree: int = 0, times: int = 1, **changed: Any) -> Any:
        nodes = -(-workers // 8)
        layout = Layout(workers, nodes, degree or workers, micro, times, parameters, 2, **changed)
        return step_time({"model": work}, layout, ceilings)

    alone = of(1, 64)
    assert alone.bound == "device" and alone.products == pytest.approx(3 * 64e12 / 735e12) and alone.messages == 0
    assert alone.optimizer == pytest.approx(38e9 / (3e12 * 0.99))
    assert of(1, 64, recomputes=True).recomputed == pytest.approx(64e12 / 735e12 + 64e9 / (3e12 * 0.78))
    tiny = step_time({"model": Work(1e6, {}, 1, 1, 100, 200, 10)}, Layout(1, 1, 1, 1, 1, 1, 2), ceilings)
    assert tiny.bound == "host" and tiny.host == pytest.approx(1e-6 * (55 * 300 + 60 * 20))
    assert of(1, 1, compiled=False).host > of(1, 1).host
    # twice gathered and once reduced, within a node and between nodes
    assert of(8, 64).messages == pytest.approx(3 * (2e9 * 7 / 8 / 360e9 + 11 * 25e-6))
    assert of(64, 64).messages == pytest.approx(3 * (2e9 * 63 / 64 / 360e9 + 11 * 43e-6), rel=0.01)
    far = of(16, 1, parameters=10**11)
    assert far.bound == "links" and far.exposed < far.messages
    # a copy of the states in each node: between nodes only sums of gradients, once a step, an eighth of them for each GPU
    within, once = 2e11 * 7 / 8 / 360e9, 2 * 2.5e10 * 7 / 8 / 40e9
    assert of(64, 1, parameters=10**11, degree=8).messages == pytest.approx(3 * within + once, rel=0.01)
    assert of(64, 1, parameters=10**11, degree=8, times=4).messages == pytest.approx(12 * within + once, rel=0.01)


@pytest.fixture(scope="module")
def search() -> Search:
    recipe = load_recipe("dit/s8_imagenet", SMALL)
    return Search(recipe, load_cluster("h100x8"), price=2.0)


def test_a_search_finds_a_way_for_each_number_of_gpus(search: Search) -> None:
    rows = list(search.rows())
    assert [row.gpus for row in rows] == [1 << n for n in range(15)], "1 to 16,384"
    found = [row for row in rows if isinstance(row, Row)]
    assert [row.gpus for row in found] == [1, 2, 4, 8, 16, 32, 64] and all(row.fit.fits for row in found)
    assert all(isinstance(row, Left) and "does not divide" in row.why for row in rows[7:])
    for row in found:
        assert row.gpus * row.fit.micro_batch * row.accumulation == 64 and row.gpus % row.degree == 0
        assert row.hours == pytest.approx(row.step.seconds * 10_000 / 3600) and row.hours_in_all > row.hours
        assert row.cost == pytest.approx(2.0 * row.gpus * row.hours_in_all)
        others = [search._best(row.gpus, degree) for degree in search._degrees(row.gpus)]
        assert row.hours_in_all == min(other.hours_in_all for other in others if other is not None)
    text = search_table(rows, 2.0)
    assert len({len(line) for line in text.splitlines()[: len(found) + 1]}) == 1, "columns"
    assert "128 GPUs: global batch 64 does not divide among them" in text


def test_a_search_shards_where_one_gpu_does_not_hold_the_states(search: Search) -> None:
    wide = {"depth": 8, "hidden_size": 4096, "num_heads": 32, "latent_size": 8}
    large = load_recipe("dit/s8_imagenet", {**SMALL, "networks": {"model": wide}})
    searching = Search(large, load_cluster("h100x8").model_copy(update={"gpu_memory_gib": 24.0}))
    alone, four = searching.row(1), searching.row(4)
    assert isinstance(alone, Left) and alone.why == "no micro-batch fits"
    assert isinstance(four, Row) and four.degree == 4 and four.built


def test_nexus_plan_prints_a_table_a_plot_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = ["global_batch=8", "steps=100", "networks.model.depth=2", "networks.model.hidden_size=64"]
    changed += ["networks.model.num_heads=4", "networks.model.latent_size=8"]
    command = ["dit/s8_imagenet", *changed, "--cluster", "h100x8"]
    plan_command(command)
    text = capsys.readouterr().out
    assert "messages per step, modelled" in text and "450 GB/s within a node" in text
    assert "time per step, modelled" in text and "in all" in text and "H100: matrix products" in text
    plan_command([*command, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["fits"] is True and made["origin"] == "modelled"
    assert {rate["origin"] for rate in made["rates"].values()} <= {"measured", "stated", "given"}
    assert made["seconds_per_step"] >= made["step"]["optimizer"] and made["memory"]["activations"] > 0
    plan_command([*command, "--search", "--price", "2", "--node-hours", "100", "--output", "plot.png", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in made["rows"]] == [1, 2, 4, 8] and made["node_hours_between_failures"][
        "origin"
    ] == "given"
    assert made["saving"]["blocking"]["origin"] == "measured"
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (1000, 640)
    assert not (tmp_path / "runs").exists(), "nothing is started"
    for wrong, words in (
        ([*command, "--price", "2"], "belong to --search"),
        ([*command, "--search", "--output", str(tmp_path)], "got a folder; name a file"),
        (["dit/s8_imagenet", "--search"], "set cluster.gpu=H100 or H200"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            plan_command(wrong)
        assert refused.value.code == 2
