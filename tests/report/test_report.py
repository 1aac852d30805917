"""The report of a run: whatever its folder holds, and nothing that data could smuggle in."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_scale.callbacks.samples import Sample, Samples
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.io.stages import DOING, stage
from nexus_scale.report.charts import MOST_POINTS, Line, chart, number, smoothed, stacked, thin, ticks
from nexus_scale.report.page import write_report
from tests.browser import opened

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&$title"


class Page(HTMLParser):
    """Tags, attributes and text as a browser sees them; complains about tags that do not match."""

    VOID = ("meta", "img", "path", "link", "br", "i")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    return run


def fill(run: RunFolder, caption: str = "red heart") -> None:
    rows = [
        {"step": s, "seconds": s / 10, "loss": 100.0 / s, "grad_norm": 1.0, "lr": 1e-3, "samples_per_s": 50.0, "time/forward": 0.5,
         "time/data": 0.25, "memory_peak_bytes": 1e9 + s, "loss_t0": 0.1, "loss_t10": 0.2}
        for s in range(10, 110, 10)
    ]  # fmt: skip
    rows[4]["loss"] = None  # type: ignore[typeddict-item]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"step": s, "loss": 20.0 / s, "loss_zero": 1.0, "ratio": 20.0 / s} for s in (50, 100)]
    (run.path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    run.recipe.write_text(
        f"name: tiny\nglobal_batch: 8\nnetworks: {{model: {{name: mmdit}}}}\nobjective: {{name: denoising}}\n# {caption}\n"
    )
    run.cluster.write_text("name: local_cpu\nworkers: 2\n")
    run.environment.write_text(
        json.dumps({"versions": {"torch": "2.13"}, "kernels": {"attention": {"kernel": "torch", "why": caption}}})
    )
    (run.path / "stages.json").write_text(
        json.dumps([{"name": caption, "seconds": 12}, {"name": "train", "seconds": 88.0}])
    )
    scores: dict[str, Any] = {"group_accuracy": 0.625, "real_accuracy": 0.84, "groups": {caption: 0.5, "flags": None}}
    scores["confusion"] = {"labels": [caption, "flags"], "matrix": [[3, 1], [0, 4]]}
    (run.path / "scores.json").write_text(json.dumps(scores))
    samples = Samples(every=1, draw=None, run=run, stage=StageClock(), context={})
    for step in (50, 100):
        samples.write(step, [Sample(caption=caption, image=np.full((8, 8, 3), i * 9, np.uint8)) for i in range(6)])


def test_the_report_of_a_whole_run_is_one_file_with_all_sections(run: RunFolder) -> None:
    fill(run)
    html = write_report(run).read_text()
    page = Page(html)
    text = " ".join(page.text)
    headings = ("Samples", "Scores", "Learning to draw", "Curves", "Time", "What ran")
    for heading in (
        *headings,
        "Training loss",
        "Validation loss",
        "Gradient norm",
        "Throughput",
        "62.5 %",
        "84.0 %",
        "red heart",
        "2 workers",
    ):
        assert heading in text, heading
    links = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data")
    ]
    links += re.findall(r"url\((.*?)\)", html)
    assert links
    assert all(link is not None and link.startswith("data:") for link in links), "the report would need a network"
    assert "script" not in {tag for tag, _ in page.tags}


def test_results_hold_the_same_figures(run: RunFolder) -> None:
    fill(run)
    write_report(run, given={"peak_memory_bytes": 5_000_000_000})
    results = json.loads(run.results.read_text())
    assert results["group_accuracy"] == 0.625
    assert results["real_accuracy"] == 0.84
    assert results["validation_loss_ratio"] == 0.2
    assert results["wall_seconds"] == 100.0
    assert results["peak_memory_bytes"] == 5_000_000_000
    assert (results["steps"], results["workers"], results["loss"]) == (100, 2, 1.0)
    assert results["stages"] == [{"name": "red heart", "seconds": 12.0}, {"name": "train", "seconds": 88.0}]


def test_nothing_from_data_becomes_markup(run: RunFolder) -> None:
    fill(run, ATTACK)
    page = Page(write_report(run).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert images
    assert all(src is not None and src.startswith("data:image/png") for src in images)
    assert ATTACK in page.text, "the caption itself should be readable"


def test_a_run_without_anything_has_a_report_too(run: RunFolder) -> None:
    page = Page(write_report(run).read_text())
    assert "Nothing has been measured yet." in page.text
    results = json.loads(run.results.read_text())
    assert results["group_accuracy"] is None
    assert results["stages"] == []


def test_a_run_without_scores_has_a_report_without_that_section(run: RunFolder) -> None:
    fill(run)
    (run.path / "scores.json").unlink()
    assert "Scores" not in Page(write_report(run).read_text()).text


def test_a_missing_run_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(RunFolder(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.013, 0.017), (-3.0, 1200.0), (5.0, 5.0), (0.0, 0.0), (1e-9, 3e-9)]
)
def test_ticks_are_few_and_cover_the_curve(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


def test_figures_read_well() -> None:
    values = (0.0, 0.00012, 0.5, 1234.0, 25_600.0, 3.2e6, 5.1e10, -2.5)
    assert [number(v) for v in values] == ["0", "1.2e-4", "0.5", "1234", "25.6k", "3.2M", "51G", "-2.5"]


def test_long_curves_are_thinned_by_their_means() -> None:
    line = thin(Line("loss", range(10_000), [float(i % 2) for i in range(10_000)]))
    assert len(line.xs) <= MOST_POINTS
    assert all(abs(y - 0.5) < 0.03 for y in line.ys), "a swing of the curve was shown by chance"


def test_smoothing_keeps_straight_lines() -> None:
    straight = [2.0 * i for i in range(200)]
    assert smoothed(straight) == pytest.approx(straight)


def test_a_chart_stays_within_its_frame_whatever_the_values() -> None:
    drawn = chart("Loss", [Line("a", [1, 2, 3, 4], [float("inf"), 1.0, float("nan"), 3.0]), Line("b", [], [])])
    points = [float(v) for path in re.findall(r' d="M([^"H]*)"', drawn) for v in re.findall(r"-?[\d.]+", path)]
    assert points
    assert all(0.0 <= value <= 1000.0 for value in points)
    assert chart("Nothing", [Line("a", [1], [float("nan")])]) == ""
    assert "h0.01" in chart("One point", [Line("a", [5], [1.0])])


def test_stacked_shares_add_up() -> None:
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", stacked({"forward": 1.0, "backward": 2.0, "data": 5.0}))]
    assert widths == pytest.approx([12.5, 25.0, 62.5])


def test_effective_time_and_incidents_are_shown_and_nothing_in_them_becomes_markup(run: RunFolder) -> None:
    fill(run)
    folder = run.path / "goodput"
    folder.mkdir()
    account = {
        "begun": 0.0, "at": 100.0, "first": 0, "step": 50, "starting": 10.0, "marks": [], "ended": "done",
        "seconds": {"start": 10.0, "forward": 75.0, "save": 15.0},
    }  # fmt: skip
    (folder / "0.000.json").write_text(json.dumps(account))
    for step in range(105):
        incidents.note(run.path, "nonfinite", f"step {step} was left out", step=step)
    incidents.note(run.path, "stalled", ATTACK, rank=1, step=ATTACK)
    results = json.loads(write_report(run).with_name("results.json").read_text())
    assert results["effective_training_time"] == 0.75
    assert results["time"]["saving"] == 15.0
    assert results["incidents"] == {"nonfinite": 105, "stalled": 1}
    page = Page(run.report.read_text())
    text = " ".join(page.text)
    assert "75.0 % productive of 2 min" in text or "75.0 % productive of 1 min 40 s" in text
    assert "step 104 was left out" in text
    assert "6 older ones are in incidents.jsonl" in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert ATTACK in text


def test_phases_are_told_apart_and_what_was_measured_of_samples_is_shown(run: RunFolder) -> None:
    fill(run)
    rows = [
        {"step": s, "loss": 1.0, "critic/loss": 1.0, "critic/real": 2.0, "critic/fake": -2.0, "critic/lr": 1e-3, "critic/grad_norm": 3.0,
         "generator/loss": 0.5, "generator/grad_norm": 4.0, "validation/loss": 1.0}
        for s in (10, 20)
    ]  # fmt: skip
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = [{"step": s, "frechet": 7.25, "diversity": 0.5, "diversity_real": 0.6, "modes": 24.0} for s in (10, 20)]
    (run.path / "monitor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
    text = " ".join(" ".join(Page(write_report(run).read_text()).text).split())
    order = (
        r"Training loss last.*critic generator Critic: beside the loss .*real fake .*Gradient norm .*critic generator"
    )
    assert re.search(order, text)
    assert "Generator: beside" not in text, "the engine's own figures are not the phase's"
    for words in ("Fréchet distance of samples", "Diversity of samples", "Modes reached", "7.25"):
        assert words in text, words
    results = json.loads(run.results.read_text())
    assert (results["frechet"], results["diversity"]) == (7.25, 0.5)


def test_each_score_says_what_it_measures_and_what_stands_beside_it(run: RunFolder) -> None:
    """A sentence, the better direction, the bounds, real samples and chance; names of groups are whole, also above the matrix."""
    fill(run, "a group with a long name")
    scores = json.loads((run.path / "scores.json").read_text())
    scores |= {
        "frechet": 12.5,
        "frechet_real": 2.5,
        "frechet_noise": 267.0,
        "samples": 252,
        "seconds": 209.0,
        "odd_one": 7,
        "groups": {"a group with a long name": 0.5, "flags": 0.75},
    }
    (run.path / "scores.json").write_text(json.dumps(scores))
    (run.path / "likelihood.json").write_text(json.dumps({"bits": 2.5, "bits_error": 0.01, "draws": 3}))
    text = " ".join(" ".join(Page(write_report(run).read_text()).text).split())
    for words in (
        "62.5 % Samples of the prompted group Share of samples that a classifier", "Higher is better, from 0 % to 100 %.",
        "the same classifier on real samples 84.0 %", "guessing 50.0 %", "Lower is better; 0 is perfect.", "real samples 2.5", "noise 267",
        "samples that were scored 252", "time it took 3 min 29 s", "odd one 7", "2.5 Bits per dimension", "standard error 0.01",
    ):  # fmt: skip
        assert words in text, (words, text)
    assert text.count("a group with a long name") >= 3, "of the bars, of the matrix' row and of its column"


def test_evaluations_are_shown_with_intervals_floors_and_ceilings(run: RunFolder) -> None:
    folder = run.path / "evaluations" / "emoji-00000100"
    folder.mkdir(parents=True)
    figure = {
        "value": 12.5,
        "low": 11.0,
        "high": 14.0,
        "error": 1,
        "samples": 500,
        "real": 400,
        "floor": 2.5,
        "ceiling": 300.0,
    }
    found = {
        "of": {"name": "tiny", "step": 100}, "suite": {"name": ATTACK}, "left_out": {"clip": "no weights"},
        "figures": {"classifier/frechet": {**figure, "better": "lower"}, "new/figure": {"value": 3.0}},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(found))
    (folder.parent / "torn").mkdir()
    (folder.parent / "torn" / "evaluation.json").write_text('{"figures": {')
    page = Page(write_report(run).read_text())
    text = " ".join(" ".join(page.text).split())
    for words in (
        "step 100",
        "12.5 11 to 14 2.5 300 500 / 400 real",
        "Lower is better.",
        "new/figure 3",
        "left out: clip: no weights",
    ):
        assert words in text, (words, text)
    assert "script" not in {tag for tag, _ in page.tags} and ATTACK in text


def test_a_stage_that_is_under_way_is_on_the_page(run: RunFolder) -> None:
    fill(run)
    with stage(run.path, "score") as progress:
        progress(30, 120)
        run_of_now = Path(run.path / DOING)
        end = time.monotonic() + 20
        while json.loads(run_of_now.read_text())["done"] != 30:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert "score: 30 of 120, 25 %" in write_report(run).read_text()
    assert not run_of_now.exists() and "of 120" not in write_report(run).read_text()
    assert [one["name"] for one in json.loads(run.results.read_text())["stages"]] == ["red heart", "train", "score"]


def test_text_is_whole_and_rows_are_full_in_a_browser(run: RunFolder) -> None:
    """On a wide screen and on a phone: nothing is cut, nothing hangs over, and the figures at the top leave no gap."""
    fill(run, "a person who stands in the rain and holds a very long umbrella")
    address = write_report(run).as_uri()
    with opened() as browser:
        for width in (1280, 390):
            page = browser.page(address, width=width, phone=width < 500)
            assert page.overflowing() == [] and page.complaints == []
            tops = page.run(
                "[...document.querySelectorAll('.figures div')].map(d => [d.offsetTop, d.offsetLeft + d.offsetWidth])"
            )
            ends = dict(tops)
            assert max(ends.values()) - min(ends.values()) <= 2, f"a row of figures ends early: {ends}"
            captions = page.run("[...document.querySelectorAll('.tiles p')].map(p => p.innerText)")
            assert captions == ["a person who stands in the rain and holds a very long umbrella"] * 6
