"""The certificate itself: what it finds in digests that were tampered with, and what it says of a real run that was killed."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale import certify
from nexus_scale.certify import compared, left_out, legs, page
from nexus_scale.certify.certificate import Leg
from nexus_scale.certify.kills import SAVE_PHASES, Kill, as_faults, plan_kills
from nexus_scale.certify.ledger import Digests, deviations, same_bits, same_samples
from nexus_scale.config import recipe as recipes
from nexus_scale.config.networks import SGD, Adam, AdamW, RMSprop
from nexus_scale.contracts import RunFolder, Shard, UserError
from nexus_scale.engine.checkpoint import CheckpointStore, newest
from nexus_scale.generate.trained import make_draw
from nexus_scale.io import faults
from nexus_scale.kernels.update import MOMENTS, moments_of
from nexus_scale.train import Place, train
from tests.config.test_every_recipe import tensors

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, BATCH, WORKERS = 12, 4, 2
GAN = "wgan/tiny_fashion_mnist"
"""Two networks and optimizers whose moments are not Adam's, several updates of one in a step."""


def row(step: int, rank: int, process: str, at: float, workers: int = WORKERS) -> dict[str, Any]:
    share = BATCH // workers
    places = range(rank * share, (rank + 1) * share)
    return {
        "step": step,
        "draws": step,
        "positions": list(places),
        "samples": [100 * step + place for place in places],
        "losses": {"loss": [float(step * share), float(share)]},
        **{kind: f"{kind} {step} {rank}" for kind in ("masters", "moments", "ema", "optimizer_steps", "rng")},
        "process": process,
        "workers": workers,
        "at": at,
    }


def unbroken() -> Digests:
    return Digests({r: [row(step, r, f"a{r}", step) for step in range(1, STEPS + 1)] for r in range(WORKERS)})


def killed_at_seven() -> Digests:
    """After step 7 the run went back to step 5."""
    ranks = {}
    for r in range(WORKERS):
        first = [row(step, r, f"a{r}", step) for step in range(1, 8)]
        ranks[r] = first + [row(step, r, f"b{r}", 20.0 + step) for step in range(6, STEPS + 1)]
    return Digests(ranks)


def found(reference: Digests, other: Digests) -> tuple[bool, bool]:
    steps = range(1, STEPS + 1)
    bits = same_bits(reference, other, steps, range(WORKERS))
    return bits.equal, same_samples(reference, other, steps, BATCH).equal


def test_an_interrupted_run_that_went_the_same_way_is_equal() -> None:
    twin = killed_at_seven()
    assert found(unbroken(), twin) == (True, True)
    assert {restart.lost_steps for restart in twin.restarts()} == {2}
    assert twin.redone() == 2 * WORKERS
    assert compared.recoveries(twin, [7.5]) == [26.0 - 7.5]
    assert compared.recoveries(twin, [7.5, 7.7]) == [26.0 - 7.7], "a kill before the first new step belongs to the next"


@pytest.mark.parametrize("key", ["draws", "samples", "losses", "masters", "moments", "ema", "optimizer_steps", "rng"])
@pytest.mark.parametrize(
    "place", [7, 5, -1]
)  # the first time of a step that is done again, the second time, the last step
def test_no_row_may_differ_in_anything(key: str, place: int) -> None:
    twin = killed_at_seven()
    twin.ranks[1][place] = {**twin.ranks[1][place], key: "other" if key != "samples" else [1, 2]}
    assert not same_bits(unbroken(), twin, range(1, STEPS + 1), range(WORKERS)).equal


def test_the_ledger_finds_samples_that_are_missing_twice_or_elsewhere() -> None:
    steps = range(1, STEPS + 1)
    missing, twice, swapped = (killed_at_seven() for _ in range(3))
    missing.ranks[1] = [r for r in missing.ranks[1] if r["step"] != 9]
    twice.ranks[1][-1] = {**twice.ranks[1][-1], "positions": [2, 2, 3], "samples": [1202, 1202, 1203]}
    swapped.ranks[0][3] = {**swapped.ranks[0][3], "samples": [401, 400]}
    for broken, words in ((missing, "step 9: positions .* missing"), (twice, "repeated"), (swapped, "other samples")):
        findings = same_samples(unbroken(), broken, steps, BATCH)
        assert findings.differing == 1
        assert re.search(words, findings.wrong[0]), findings.wrong


def test_other_numbers_of_workers_are_held_to_samples_and_loss() -> None:
    one = Digests({0: [row(step, 0, "c", step, workers=1) for step in range(1, STEPS + 1)]})
    steps = range(1, STEPS + 1)
    assert same_samples(unbroken(), one, steps, BATCH).equal
    assert max(deviations(unbroken(), one, list(steps))) == 0.0
    wrong = copy.deepcopy(one)
    wrong.ranks[0][4]["losses"]["loss"][0] *= 1 + 1e-5  # type: ignore[index]
    assert max(deviations(unbroken(), wrong, list(steps))) == pytest.approx(1e-5, rel=1e-3)
    wrong.ranks[0].pop()
    assert deviations(unbroken(), wrong, [STEPS]) == [float("inf")]


def test_only_steps_lost_to_sigterm_alone_are_held_against_it() -> None:
    (restart, *_) = killed_at_seven().restarts()
    kinds = {kind: Kill(kind, "", {}) for kind in ("one", "preemption")}
    assert compared._preempted(restart, [(7.5, kinds["preemption"])])
    assert not compared._preempted(restart, [(7.5, kinds["one"]), (25.0, kinds["preemption"])])
    assert not compared._preempted(restart, [(30.0, kinds["preemption"])]), "struck the next process"


def test_half_a_line_is_no_row_and_steals_none(tmp_path: Path) -> None:
    folder = tmp_path / "digests"
    folder.mkdir()
    whole = json.dumps(row(1, 0, "a", 1.0))
    (folder / "x-rank0.jsonl").write_text("\n" + whole + "\n" + whole[:40] + "\n" + whole + "\n")
    assert [r["step"] for r in Digests.read(tmp_path).ranks[0]] == [1, 1]


# ------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 23, 200])
def test_a_plan_has_all_kinds_is_drawn_from_its_seed_and_can_be_ordered(count: int, tmp_path: Path) -> None:
    made = [plan_kills(count, steps=400, every=5, workers=2, seed=seed, life_s=3.0) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    plan = made[0]
    saves = [kill for kill in plan if kill.kind == "save"]
    assert len(plan) == count and 4 * len(saves) >= count
    ordered = faults.parse(as_faults(plan, tmp_path))
    assert len({fault.once for fault in ordered}) == len(ordered) >= count
    assert {fault.action for fault in ordered} <= {"SIGKILL", "SIGTERM"}
    for fault in ordered:
        if fault.phase in SAVE_PHASES:
            assert fault.step is not None and fault.step % 5 == 0
    if count >= 10:
        assert {kill.kind for kill in plan} == {"one", "any time", "all", "save", "preemption"}
    if count == 200:
        assert {fault.phase for fault in ordered} >= set(SAVE_PHASES)
        assert len(saves) >= 50


def test_a_kill_has_struck_when_its_mark_is_there(tmp_path: Path) -> None:
    (kill,) = plan_kills(1, steps=20, every=5, workers=2, seed=0, life_s=1.0)
    assert kill.struck_at(tmp_path) is None
    (tmp_path / next(iter(kill.faults))).touch()
    assert kill.struck_at(tmp_path) is not None


def test_a_path_that_would_cut_the_orders_in_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comma"):
        as_faults([], tmp_path / "a,b")


# ------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("item", left_out.ITEMS)
def test_what_is_left_out_is_gone_and_the_checkpoint_still_verifies(item: str, tmp_path: Path) -> None:
    endings = ["fp32", *MOMENTS, "buffer"]
    names = [*(f"model/a.{ending}" for ending in endings), "ema/a.ema", "model.optimizer_steps", "objective/pool"]
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="first")
    store.save(
        7, {name: Shard(torch.arange(1.0, 4.0), 0, (3,)) for name in names}, {"progress": {"step": 7, "draws": 9}}
    )
    store.wait()
    store.close()
    assert left_out.items(tmp_path) == list(left_out.ITEMS)
    assert left_out.leave_out(item, tmp_path) == 7
    assert left_out.items(tmp_path) == [each for each in left_out.ITEMS if each != item or item == "draws"]
    after = newest(tmp_path)
    assert after is not None and after.step == 7
    gone = [name for name in names if len(after.tensor(name).unique()) == 1]
    assert gone == [name for name in names if left_out.ITEMS[item](name)]
    assert after.state["progress"] == {"step": 7, "draws": 0 if item == "draws" else 9}


ADA = {"name": "ada", "changes": "bc", "probability": 0.3, "every": 1, "images": 200}
HOLDING: dict[str, tuple[dict[str, Any], list[str]]] = {
    # statistics of batch norms, spectral norms' vectors, ADA's probability
    "gan/tiny_projection_fashion_mnist": ({"objective": {"augment": ADA}}, list(left_out.ITEMS)),
    "cyclegan/tiny_emoji": ({}, ["objective"]),  # pools of translations
}


@pytest.mark.parametrize("name", HOLDING)
def test_a_gan_misses_each_piece_of_its_state(name: str, tmp_path: Path) -> None:
    changed, items = HOLDING[name]

    def trained(folder: str) -> dict[str, torch.Tensor]:
        callbacks = {"checkpoint": {"every": 2}, "metrics": {}, "validate": None, "samples": None, "monitor": None}
        recipe = recipes.load_recipe(name, {**changed, "steps": 4, "callbacks": callbacks}, tiny=True)
        cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")
        train(recipe, cluster, Place(RunFolder(tmp_path / folder), tmp_path, tmp_path), make_draw)
        return tensors(tmp_path / folder, 4)

    whole = trained("whole")
    shutil.rmtree(shutil.copytree(tmp_path / "whole", tmp_path / "half") / "checkpoints" / "step_00000004")
    assert set(items) <= set(left_out.items(tmp_path / "half" / "checkpoints"))
    for item in items:
        shutil.copytree(tmp_path / "half", tmp_path / item)
        assert left_out.leave_out(item, tmp_path / item / "checkpoints") == 2
        after = trained(item)
        assert all(value.isfinite().all() for value in after.values()), item
        differ = {key.partition("/")[0] for key in whole if not torch.equal(whole[key], after[key])}
        assert differ - {"objective"}, (item, differ)


def test_moments_are_those_of_every_optimizer() -> None:
    specs = [AdamW(), Adam(), RMSprop(momentum=0.5), SGD(momentum=0.5)]
    assert set(MOMENTS) == {name for spec in specs for name in moments_of(spec)}


# ------------------------------------------------------------------------------------------------- the page


def certificate(**changes: Any) -> certify.Certificate:
    values: dict[str, Any] = {
        "recipe": "tiny", "passed": True, "equal_bits": True, "same_samples": True, "largest_deviation": 7e-8,
        "lost_steps": 5, "lost_behind_a_save": 0, "lost_to_preemption": 0, "checkpoint_every": 5,
        "recovery_seconds": {"median": 8.0, "worst": 12.0}, "kills": 2, "kills_planned": 2, "kills_inside_a_save": 1,
        "kills_by_kind": {"save": 1, "one": 1}, "steps": 60, "steps_compared": 120, "steps_redone": 4, "workers": [2, 1],
        "left_out": None, "controls": {"ema": True}, "failures": [], "legs": [Leg("twin", [2], 3.0, 60, 0, [])],
        "seed": 0, "seconds": 60.0, "versions": {"versions": {"torch": "2.13"}, "commit": "abc"},
        "deviations": [(1, 0.0), (2, 7e-8), (3, float("inf"))],
        "kill_table": [{"kind": "save", "where": "step 5, save_mid", "struck": True}],
    }  # fmt: skip
    return certify.Certificate(**{**values, **changes})


def test_the_page_says_the_verdict_and_what_failed_and_runs_nothing() -> None:
    good = page.page(certificate())
    assert "Nothing was lost." in good and "<svg" in good and "7.0e-08" in good
    bad = "<script>alert(1)</script>"
    failed = page.page(
        certificate(recipe=bad, passed=False, failures=[bad], legs=[Leg("twin", [2], 3.0, 60, 1, [bad])])
    )
    assert json.loads(json.dumps(certify.as_json(certificate()), allow_nan=False))["deviations"][2] == [3, None]
    assert "Failed: " in failed and "<script" not in failed and failed.count("&lt;script") >= 3


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": [2, 3]}, "does not divide"),
        ({"workers": []}, "--workers"),
        ({"workers": [0]}, "--workers"),
        ({"steps": 7}, "--steps 7"),
        ({"steps": 20, "workers": (2, 1, 2, 1)}, "more than 20 for 4 numbers"),
        ({"name": "mmdit/tiny_openmojy"}, "did you mean"),
    ],
)
def test_mistakes_are_told_before_anything_starts(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    arguments = {"name": "mmdit/tiny_openmoji", "tiny": True, "folder": tmp_path / "new", **options}
    with pytest.raises(UserError, match=words):
        certify.certify(arguments.pop("name"), **arguments)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        certify.certify("mmdit/tiny_openmoji", tiny=True, folder=tmp_path)


@pytest.mark.parametrize(("steps", "counts"), [(60, 3), (60, 1), (20, 3), (26, 5), (60, 11)])
def test_each_change_of_workers_ends_a_start(steps: int, counts: int) -> None:
    """A request to leave that comes within the last steps, or within those of the one before, ends nothing."""
    seen = set()
    for seed in range(200):
        changes = legs.changes_of_workers(seed, steps, counts)
        ends = [*changes, steps]
        assert len(changes) == counts - 1 and ends[0] >= 1
        assert all(later - sooner >= legs.LEAVING_STEPS for sooner, later in itertools.pairwise(ends))
        assert steps - ends[0] <= max(legs.RESCALED_STEPS, counts * legs.LEAVING_STEPS)
        seen.add(tuple(changes))
    assert counts == 1 or len(seen) > 1


# ------------------------------------------------------------------------------------------------- real runs


def certified(root: Path, *options: str, recipe: str = "mmdit/tiny_openmoji") -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "nexus_scale.cli", "certify", recipe, "--tiny", "--json"]
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "NEXUS_RUNS_ROOT": str(root / "runs"), "NEXUS_DATA_ROOT": str(root / "data"),
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--output", str(root / "proof"), *options], cwd=root, env=environment, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    assert "minutes" in done.stderr, "an estimate comes first"
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.ray
def test_ten_kills_and_other_numbers_of_workers_lose_nothing(tmp_path: Path) -> None:
    code, proof = certified(tmp_path, "--kills", "10", "--workers", "2,1,4", "--seed", str(random.randrange(1000)))
    assert proof["failures"] == [] and code == 0, proof
    assert proof["equal_bits"] and proof["same_samples"] and proof["largest_deviation"] <= 1e-6
    assert proof["kills"] >= 8 and proof["kills_inside_a_save"] >= 3
    assert proof["lost_steps"] < 2 * proof["checkpoint_every"] and proof["lost_to_preemption"] == 0
    assert proof["steps_redone"] > 0, "nothing was interrupted"
    samples = [json.loads(line) for path in (tmp_path / "proof" / "reference" / "digests").glob("*.jsonl")
               for line in path.read_text().split("\n") if line]  # fmt: skip
    ids = [sample for r in samples for sample in r["samples"]]
    assert {ids.count(sample) for sample in set(ids)} == {len(ids) // 16}, "each of 16 samples once in each epoch"
    assert (tmp_path / "proof" / "certificate.html").read_text().count("Nothing was lost.") == 1


@pytest.mark.slow
@pytest.mark.ray
def test_each_control_is_found_out_and_a_twin_without_its_moments_fails(tmp_path: Path) -> None:
    code, proof = certified(
        tmp_path, "--kills", "0", "--workers", "2", "--steps", "20", "--leave-out", "moments", "--controls", recipe=GAN
    )
    held = [item for item in left_out.ITEMS if item not in ("buffers", "objective")]
    assert proof["controls"] == dict.fromkeys(held, True), proof
    assert code == 1 and not proof["passed"] and not proof["equal_bits"]
    assert "moments" in proof["legs"][1]["wrong"][0]
    assert not [failure for failure in proof["failures"] if "unnoticed" in failure]
