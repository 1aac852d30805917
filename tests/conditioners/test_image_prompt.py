"""Pictures as prompts: what a transformers folder makes of them, as its own classes do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_scale.conditioners.image_prompt import IMAGE_PROMPT, ImagePromptConditioner
from nexus_scale.contracts import UserError
from nexus_scale.interop.image_encoders import PREPROCESSOR, find_image_encoder
from nexus_scale.metrics.nearness import nearer
from tests.tiny_encoders import save_image_encoder

transformers = pytest.importorskip("transformers")


def test_embeddings_and_states_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save_image_encoder(tmp_path / "vit")
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((11, 9), (8, 8))]
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    net = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
    pixels = processor([one.permute(1, 2, 0).numpy() for one in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = net(pixels, output_hidden_states=True)
    for states, wanted in ((False, expected.image_embeds), (True, expected.hidden_states[-2])):
        conditioner = ImagePromptConditioner({"folder": "vit", "states": states}, tmp_path)
        made = np.stack([one[IMAGE_PROMPT] for one in conditioner.encode(images)])
        assert conditioner.fields[IMAGE_PROMPT].shape == tuple(wanted.shape[1:]) and made.dtype == np.float16
        assert np.abs(made - wanted.numpy()).max() < 2e-3
        assert conditioner.fingerprint == find_image_encoder({"folder": "vit", "states": states}, tmp_path).fingerprint
    (folder / PREPROCESSOR).unlink()
    with pytest.raises(UserError, match="says how pictures are scaled"):
        find_image_encoder({"folder": "vit"}, tmp_path)
    with pytest.raises(UserError, match="expected package efficientnet"):
        find_image_encoder({"package": "other"})


def test_nearness_is_one_for_itself_and_half_by_chance() -> None:
    prompts = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 5
    assert nearer(prompts, prompts) == 1 and nearer(prompts.roll(1, 0), prompts) == pytest.approx(0.5, abs=0.05)
    assert nearer(torch.zeros(200, 6), prompts) < 0.6
