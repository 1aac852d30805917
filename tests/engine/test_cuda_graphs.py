"""`cuda_graphs`: who learns in them, and who is refused. That they learn the same is in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexus_scale.config.recipe import cluster_from
from nexus_scale.contracts import UserError
from nexus_scale.engine import blocks
from tests.engine_networks import build


def asked(monkeypatch: pytest.MonkeyPatch, engine: str, **settings: Any) -> list[Any]:
    """Options of each compilation that an engine asks for, of the network that learns and of its average."""
    seen: list[Any] = []

    def compiled(forward: Any, *, options: Any = None, **_: Any) -> Any:
        seen.append(options)
        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    build(engine, compile=True, cuda_graphs=True, **settings)
    return seen


def test_what_stays_in_its_place_learns_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = {"triton.cudagraphs": True}
    assert graphs in asked(monkeypatch, "local", precision="bf16")
    assert graphs not in asked(monkeypatch, "local"), "float32 sums gradients where they lie"


def test_a_call_without_gradients_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, *, options=None, **_: lambda x: bool(options))
    call = blocks.CompiledForward(torch.sin, graphs=True)
    with torch.no_grad():
        assert call(torch.ones(1)) is False
    assert call(torch.ones(1)) is True


@pytest.mark.parametrize("beside", [{}, {"compile": True, "activation_checkpointing": True}])
def test_what_cannot_be_is_refused(beside: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cuda_graphs: expected compile: true"):
        cluster_from({"cuda_graphs": True, **beside}, "test")
