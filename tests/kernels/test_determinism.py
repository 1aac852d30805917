"""`cluster.deterministic`: variables, torch's flags, kernels that do not repeat, and operations that have no form that does."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale import main_job, train
from nexus_scale.config.recipe import Cluster, load_recipe
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.kernels import choice, determinism, padding
from nexus_scale.kernels.determinism import ENVIRONMENT, environment, repeating
from tests.rehearsal.test_micro_batch import trained


def flags() -> tuple[Any, ...]:
    fill: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, fill.fill_uninitialized_memory,
        *(os.environ.get(name) for name in ENVIRONMENT),
    )  # fmt: skip


def test_flags_and_variables_hold_within_and_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    before = flags()
    with repeating(False):
        assert flags() == before
    seen = []

    def failing() -> None:
        with repeating(True):
            seen.append((determinism.enabled(), *flags()))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert seen == [(True, True, False, True, False, False, ":4096:8", "Ring", "1")]
    assert flags() == before


def test_what_the_users_environment_says_stays_unless_it_cannot_repeat() -> None:
    assert environment({}) == ENVIRONMENT
    own = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Tree"}
    assert environment(own) == {**ENVIRONMENT, **own}
    for name, value in (("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS,Ring")):
        with pytest.raises(UserError, match=f"{name}={value}: (.|\n)*deterministic") as caught:
            environment({name: value})
        assert caught.value.code == 4


def test_an_operation_without_a_form_that_repeats_is_refused_by_name() -> None:
    told = r"put_ has no form that repeats(.|\n)*cluster.deterministic=false"
    with pytest.raises(UserError, match=told), repeating(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="something else"), repeating(True):
        raise RuntimeError("something else")


def test_a_kernel_that_does_not_repeat_is_left_out_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(path in choice.OPTIONS[kernel] for kernel, path in choice.NOT_REPEATING)
    assert ("attention", "cudnn") in choice.NOT_REPEATING
    made = choice.Choice("torch_fused", "as if it did not repeat")
    monkeypatch.setitem(choice.NOT_REPEATING, ("adam", made.kernel), "its sums are in no order")
    choice.forget()
    try:
        assert choice.choose({}, "cpu")["adam"].kernel == made.kernel
        chosen = choice.choose({}, "cpu", deterministic=True)["adam"]
        assert chosen.kernel == "torch_foreach" and "in no order" in chosen.why
        with pytest.raises(UserError, match="in no order"):
            choice.choose({"adam": made.kernel}, "cpu", deterministic=True)
    finally:
        choice.forget()


def test_a_run_trains_with_it_records_it_and_says_where_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bool] = []
    build = train.build_engine

    def watched(*given: Any) -> Any:
        seen.append(determinism.enabled())
        return build(*given)

    monkeypatch.setattr(train, "build_engine", watched)
    changed = "continues with cluster.deterministic: false, and began with true"
    with caplog.at_level(logging.WARNING):
        for step, wanted in enumerate((True, True, False), 1):
            trained(tmp_path / "run", 0, step, engine="local", deterministic=wanted)
            assert json.loads((tmp_path / "run" / "environment.json").read_text())["deterministic"] is wanted
            assert (changed in caplog.text) is not wanted
    assert seen == [True, True, False] and not determinism.enabled()


def test_workers_have_the_variables_before_they_touch_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(main_job, "launch", lambda *_, environment, **__: given.append(environment))
    place = train.Place(RunFolder(tmp_path / "run"), tmp_path, tmp_path)
    for wanted in (True, False):
        where = Cluster(workers=2, deterministic=wanted)
        main_job._work(main_job.Target(load_recipe("mmdit/tiny_openmoji", tiny=True), where, place))
    assert ENVIRONMENT.items() <= given[0].items() and not ENVIRONMENT.keys() & given[1].keys()


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (0, 3), (1, 0)])
def test_padding_in_pieces_is_torchs(mode: str, before: int, after: int) -> None:
    found = []
    for pad in (padding.in_pieces, lambda x, before, after, mode: torch.nn.functional.pad(x, (before, after), mode)):
        x = torch.arange(30.0, dtype=torch.float64).sin().view(2, 3, 5).requires_grad_()
        y = pad(x, before, after, mode)
        found.append([y, *torch.autograd.grad(y.cos().sum(), x)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
