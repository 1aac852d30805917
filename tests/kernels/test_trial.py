"""Implementations are tried on the shapes of a run: the fastest serves, ranks agree, later starts keep it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels import blocked, choice, flash, trial
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.identity import identify_flash_attn, identify_flash_attn_3, identify_flash_attn_4
from nexus_scale.kernels.trial import Found, found_in, settle, shared
from tests.kernels.test_kernels import SO, plant

CPU = torch.device("cpu")
JOINT, IMAGE = (2, 8, 12, 12, 0), (2, 8, 9, 9, 1)
AROUND = (9, 16)


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Has four implementations of attention and two of modulation, each as slow as `stage["ms"]` says, and one that is wrong."""
    ms = {"sdpa": 3.0, "cudnn": 2.0, "torch_flash": 1.0, "torch_math": 0.5, "triton": 1.0, "torch": 2.0}
    options = {"attention": ["cudnn", "torch_flash", "torch_math", "sdpa"], "modulation": ["torch", "triton"]}
    found: dict[str, Any] = {"ms": ms, "options": options, "wrong": "torch_math", "tried": [], "fails": "", "taken": []}

    def make(kernel: str) -> Any:
        def made(shape: choice.Shape, *_: Any) -> trial.Trial:
            option = choice.chosen_for(kernel, shape[1:] if kernel == "modulation" else shape)

            def run() -> list[Tensor]:
                found["tried"].append((kernel, shape, option))
                if option == found["fails"]:
                    raise RuntimeError("no kernel for this shape\nand a long story")
                run.option = option  # type: ignore[attr-defined]
                return [torch.ones(3) + (option == found["wrong"])]

            return run

        return made

    def median_ms(run: Any, device: torch.device, warm: int) -> float:
        return float(ms[run.option])

    monkeypatch.setattr(choice, "possible", lambda kernel, device: options[kernel])
    monkeypatch.setattr(trial, "MADE", {kernel: make(kernel) for kernel in options})
    monkeypatch.setattr(trial, "median_ms", median_ms)
    monkeypatch.setattr(flash, "take_in", found["taken"].append)
    return found


SEEN = {("attention", JOINT): 3, ("attention", IMAGE): 1, ("modulation", AROUND): 4, ("modulation", (3, 16)): 9}


def settled(known: list[Found] | tuple[()] = (), **given: Any) -> list[Found]:
    settings = {"tries": True, "agree": lambda numbers: numbers, **given}
    return settle(SEEN, list(known), CPU, torch.float32, **settings)


def test_the_fastest_that_is_right_serves_its_shape(stage: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = {(f.kernel, f.shape): f for f in settled()}
    assert found["attention", JOINT].fastest == found["attention", IMAGE].fastest == "torch_flash"
    assert found["attention", JOINT].microseconds == {"sdpa": 3000, "cudnn": 2000, "torch_flash": 1000}
    assert (
        choice.chosen_for("attention", JOINT) == "torch_flash"
        and choice.chosen_for("attention", (1, 1, 1, 1, 0)) == "sdpa"
    )
    assert found["modulation", AROUND].fastest == found["modulation", (3, 16)].fastest == "triton", (
        "tried once, for all"
    )
    assert len({shape for kernel, shape, _ in stage["tried"] if kernel == "modulation"}) == 1
    said = caplog.text
    assert "torch_math is left out: it differs" in said and "2 heads of 8, 12 queries, 12 keys, without a mask" in said
    assert "torch_flash 1.000 ms" in said and "9 tokens of 16" in said


def test_an_implementation_without_a_kernel_for_a_shape_is_left_out(
    stage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage["fails"] = "torch_flash"
    assert settled()[0].fastest == "cudnn" and "no kernel for this shape" in caplog.text
    stage["options"]["attention"] = ["sdpa"]
    stage["tried"].clear()
    assert settled()[0].fastest == "sdpa" and not any(kernel == "attention" for kernel, *_ in stage["tried"]), (
        "nothing to try"
    )


def test_all_ranks_take_the_figures_of_the_one_that_tries(stage: dict[str, Any]) -> None:
    sent: list[list[int]] = []

    def first(numbers: list[int]) -> list[int]:
        sent.append(numbers)
        return numbers

    def second(numbers: list[int]) -> list[int]:
        received = sent.pop(0)
        assert len(numbers) == len(received) and (not any(numbers) or numbers == received)
        return received

    of_first = shared(SEEN, first), settled(agree=first)
    stage["tried"].clear()
    of_second = shared({("attention", JOINT): 1}, lambda n: sent.pop(0)), settled(tries=False, agree=second)
    assert of_first == of_second and of_first[0] == SEEN and not stage["tried"] and not sent


def test_later_starts_keep_what_the_first_found(stage: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    file.write_text(json.dumps([f.row() for f in settled()]))
    stage["ms"].update(cudnn=0.1)
    rows = json.loads(file.read_text())
    stage["tried"].clear()
    assert settled(found_in(rows)) == found_in(rows) and not stage["tried"]
    assert choice.chosen_for("attention", JOINT) == "torch_flash"
    again = settled([f for f in found_in(rows) if f.shape != IMAGE])
    assert {f.shape: f.fastest for f in again if f.kernel == "attention"} == {JOINT: "torch_flash", IMAGE: "cudnn"}, (
        "a new shape"
    )
    assert found_in([{"kernel": "attention", "shape": 3}, {"kernel": "oven"}, {}]) == []
    stage["options"]["attention"].remove("torch_flash")
    with pytest.raises(UserError, match=r"first start chose torch_flash.*cannot run here.*kernels.attention=cudnn"):
        settled(found_in(rows))


def test_what_does_not_repeat_is_not_tried_where_results_must(stage: dict[str, Any]) -> None:
    stage["ms"].update(cudnn=0.1)
    before = settled()
    assert before[0].fastest == "cudnn" and settled(deterministic=True)[0].fastest == "torch_flash"
    assert {f.shape: f.fastest for f in settled(before, deterministic=True) if f.kernel == "attention"} == {
        JOINT: "torch_flash", IMAGE: "torch_flash",
    }  # fmt: skip


def test_shapes_are_seen_on_the_meta_device_alone() -> None:
    def forward(device: str) -> None:
        q, k, v = (torch.zeros(1, 2, length, 8, device=device) for length in (5, 7, 7))
        mask = torch.ones(1, 1, 1, 7, dtype=torch.bool, device=device)
        attention(q, k, v, mask=mask)
        x, c = torch.zeros(1, 3, 16, device=device), torch.zeros(1, 16, device=device)
        x, y = blocked.branch(x, c, c, 1e-6)
        blocked.gated_branch(x, c, y, c, c, 1e-6)

    with choice.plain(), choice.noting() as seen:
        forward("cpu")
        assert not seen
        forward("meta")
    assert set(seen) == {("attention", (2, 8, 5, 7, True)), ("modulation", (3, 16))}
    assert shared(seen, lambda numbers: numbers) == seen


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ("attention", (2, 8, 6, 9, 1)),
        ("attention", (1, 8, 6, 6, 0)),
        ("modulation", (5, 16)),
        ("rope", (4, 2, 8, 1, 1)),
    ],
)
def test_a_trial_is_a_forward_and_a_backward_pass(
    kernel: str, shape: choice.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "TOKENS", 24)
    run = trial.MADE[kernel](shape, CPU, torch.float32, False)
    results = run()
    assert len(results) == {"attention": 4, "modulation": 7, "rope": 6}[kernel] and all(
        r.abs().sum() > 0 for r in results
    )
    assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))
    assert trial.median_ms(run, CPU, repeats=1) > 0


FLASH_3 = {"flash_attn_interface.py": "", "flash_attn_3/__init__.py": "", f"flash_attn_3/_C{SO}": "x"}
FLASH_4 = {"flash_attn/cute/__init__.py": "", "flash_attn/cute/interface.py": ""}


@pytest.mark.parametrize(
    ("name", "owner", "files", "reason"),
    [
        ("flash_attn_3", "flash_attn_3", FLASH_3, ""),
        ("flash_attn_3", "another", FLASH_3, "not installed"),
        ("flash_attn_3", "flash_attn_3", {"flash_attn_interface.py": ""}, "compiled part flash_attn_3/_C is missing"),
        ("flash_attn_3", "flash_attn_3", {"flash_attn_3/__init__.py": ""}, "has no flash_attn_interface.py"),
        ("flash_attn_4", "flash_attn_4", FLASH_4, ""),
        ("flash_attn_4", "flash_attn", FLASH_4, "not installed"),
        ("flash_attn_4", "flash_attn_4", {"flash_attn/cute/__init__.py": ""}, "has no flash_attn/cute/interface.py"),
    ],
)
def test_flash_attention_3_and_4_are_recognised_without_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: str, files: dict[str, str], reason: str
) -> None:
    canary = plant(tmp_path, owner, files, "", record=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    identity = identify_flash_attn_3() if name == "flash_attn_3" else identify_flash_attn_4()
    assert identity.genuine == (not reason) and reason in identity.why
    with pytest.raises(UserError, match="is not available here"):
        choice.choose({"attention": name}, "cpu")
    if name == "flash_attn_4" and not reason:
        assert not identify_flash_attn().found, "their folder alone is no FlashAttention 2"
    assert not canary.exists()


def test_another_module_before_the_genuine_one_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, files in (("real", FLASH_3), ("shadow", {"flash_attn_interface.py": ""})):
        (tmp_path / folder).mkdir()
        plant(tmp_path / folder, "flash_attn_3" if folder == "real" else "shadow", files, "", record=True)
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    assert "finds another one" in identify_flash_attn_3().why


def test_a_run_keeps_its_trials_and_one_from_before_there_were_any_goes_on_without(stage: dict[str, Any]) -> None:
    from nexus_scale.config.recipe import cluster_from
    from nexus_scale.run.choices import try_kernels

    def rehearse() -> None:
        choice.note("attention", JOINT)
        choice.note("modulation", AROUND)

    cuda, choices = torch.device("cuda"), {"precision": "bf16", "kernels": {}, "trials": []}
    cluster = cluster_from({"engine": "replicated"}, "a test")
    tried = try_kernels(choices, cluster, cuda, rehearse)
    assert [(row["kernel"], row["fastest"]) for row in tried["trials"]] == [
        ("attention", "torch_flash"),
        ("modulation", "triton"),
    ]
    stage["tried"].clear()
    assert try_kernels(tried, cluster, cuda, rehearse) == tried and not stage["tried"]
    named = cluster_from({"engine": "replicated", "kernels": {"attention": "cudnn"}}, "a test")
    assert [row["kernel"] for row in try_kernels(tried, named, cuda, rehearse)["trials"]] == ["modulation"]
    assert choice.chosen_for("attention", JOINT) == choice.chosen("attention")
    older = {**tried, "trials": [row for row in tried["trials"] if row["kernel"] == "attention"]}
    assert try_kernels(older, cluster, cuda, rehearse) == older, "a kernel that was not tried when it began"
    old = {"precision": "bf16", "kernels": {}}
    assert try_kernels(old, cluster, cuda, rehearse) == old and try_kernels(choices, cluster, CPU, rehearse) == choices
    assert not stage["tried"]
