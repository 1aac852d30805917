"""The local engine as it steps on a GPU, shown on a CPU: skipped there, read later, bf16 gradients as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Engine
from nexus_scale.engine import optim
from nexus_scale.kernels import update
from nexus_scale.kernels.update import DeviceUpdate, PlainUpdate, device_clip_factor
from tests.engine_networks import POISONS, batch, build, copies, differing, train
from tests.kernels.test_update import Unread
from tests.triton_on_a_cpu import interpreted


@pytest.fixture(params=["plain", "triton"])
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has engines update as on a GPU."""
    kind: type[DeviceUpdate] = PlainUpdate
    if request.param == "triton":
        pytest.importorskip("triton")
        from nexus_scale.kernels.triton_update import TritonUpdate

        interpreted(monkeypatch)
        kind = TritonUpdate
    monkeypatch.setattr(optim, "make_update", kind)
    monkeypatch.setattr(update, "clip_factor", device_clip_factor)
    return str(request.param)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_is_skipped_on_the_device(on_device: str, poison: str) -> None:
    engine = build("local", precision="bf16")
    train(engine, 0, 2)
    before = copies(engine)
    assert train(engine, 2, 3, poison=poison)[0]["skipped"] == 1.0
    changed = differing(before, copies(engine))
    assert changed and all(name.endswith((".ema", ".buffer")) for name in changed), changed
    assert train(engine, 3, 4)[0]["skipped"] == 0.0
    assert int(engine.shards()["model.optimizer_steps"].local) == 3


@pytest.mark.parametrize(("precision", "accumulation"), [("float32", 1), ("bf16", 1), ("bf16", 2)])
def test_a_device_trains_as_a_cpu_does(
    on_device: str, precision: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build("local", precision=precision, accumulation=accumulation)
    said = train(engine, 0, 6, accumulation)
    monkeypatch.undo()
    reference = build("local", precision=precision, accumulation=accumulation)
    wanted = train(reference, 0, 6, accumulation)
    loose = 0.05 if precision == "bf16" else 1e-4
    for ours, theirs in zip(said, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=loose)
    ours, theirs = copies(engine), copies(reference)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=loose, atol=loose * 0.2)


def test_a_step_reads_nothing_and_takes_gradients_as_they_are(on_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = build("local", precision="bf16")
    learner = engine._learners["model"]
    own, taken = learner.update, []

    def seen(gradients: Sequence[Tensor], **given: Any) -> None:
        taken.extend(gradients)
        own(gradients, **given)

    seen_update: Callable[..., None] = seen
    for name in ("norm", "clip_factor", "takes_bf16", "waits", "moments", "steps"):
        setattr(seen_update, name, getattr(own, name))
    monkeypatch.setattr(learner, "update", seen_update)
    born = backward(engine)
    with Unread():
        said = engine.step("model", 0, last=True)
        engine.update_averages(0)
    assert [gradient.data_ptr() for gradient in taken] == [gradient.data_ptr() for gradient in born]
    assert {gradient.dtype for gradient in taken} == {torch.bfloat16}
    assert all(isinstance(said[name], Tensor) and said[name].dim() == 0 for name in ("grad_norm", "skipped"))
    assert all(weight.grad is None for weight in learner.weights)


def backward(engine: Engine) -> list[Tensor]:
    """The gradients of one batch, as autograd left them."""
    x, y = batch(0)
    with engine.training("model"):
        engine.backward("model", (engine.nets["model"](x, extra=True) - y).square().mean(), last=True)
    return [p.grad for p in engine.nets["model"].module.parameters() if p.grad is not None]
