"""CLIP's text encoder beside transformers' own: states, embeddings and gradients, from its folders and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.clip_text import TRANSFORMERS
from tests.tiny_encoders import save_text_encoder

hf = pytest.importorskip("transformers")

IDS = torch.tensor([[2, 4, 6, 3, 0, 0], [2, 9, 12, 5, 13, 3]])


def close(ours: Tensor, theirs: Tensor) -> None:
    gap, largest = (ours - theirs).detach().abs().max(), theirs.detach().abs().max()
    assert float(gap) <= 1e-5 * float(largest) + 1e-12


@pytest.mark.parametrize("kind", ["clip", "clip_plain"])
@pytest.mark.parametrize("states", ["last", "penultimate"])
def test_states_embeddings_and_gradients_are_those_of_transformers(kind: str, states: str, tmp_path: Path) -> None:
    folder = save_text_encoder(tmp_path / "text", kind, seed=1)
    theirs: Any = (
        (hf.CLIPTextModelWithProjection if kind == "clip" else hf.CLIPTextModel).from_pretrained(folder).double()
    )
    arguments, state = TRANSFORMERS.read(folder)
    ours = TRANSFORMERS.network_of({**arguments, "states": states}).to_empty(device="cpu")
    ours.load_state_dict(state)
    ours.double()
    tokens, pooled = ours(IDS)
    wanted = theirs(input_ids=IDS, output_hidden_states=True)
    there = wanted.last_hidden_state if states == "last" else wanted.hidden_states[-2]
    embedding = wanted.text_embeds if kind == "clip" else wanted.pooler_output
    close(tokens, there)
    close(pooled, embedding)
    for out, vector in ((tokens, pooled), (there, embedding)):
        (out.square().sum() + vector.square().sum()).backward()
    found = TRANSFORMERS.theirs_of(ours, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    named = {name.removeprefix("text_model."): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert {name.removeprefix("text_model.") for name in found} == set(named)
    for name, gradient in found.items():
        close(gradient, named[name.removeprefix("text_model.")])
    TRANSFORMERS.write(tmp_path / "again", ours.state_dict(), {**arguments, "states": states})
    again: Any = type(theirs).from_pretrained(tmp_path / "again", dtype=torch.float64)
    close(again(input_ids=IDS).last_hidden_state, wanted.last_hidden_state)


def test_published_sizes_and_what_does_not_fit() -> None:
    """CLIP ViT-L/14's text encoder, and OpenCLIP's bigG of Stable Diffusion XL."""
    count = lambda **sizes: sum(p.numel() for p in TRANSFORMERS.network_of(sizes).parameters())  # noqa: E731
    assert count() == 123_060_480
    large = {"hidden_size": 1280, "depth": 32, "num_heads": 20, "mlp_width": 5120, "activation": "gelu"}
    assert count(**large, projection_dim=1280) == 694_659_840
    with pytest.raises(UserError, match=r"texts have 6 tokens; clip_text.max_tokens is 4"):
        TRANSFORMERS.network_of({"max_tokens": 4, "depth": 2})(IDS.to("meta"))
