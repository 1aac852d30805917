"""A MusicGen run as one folder for transformers: decoder, text encoder, codec and tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nexus_scale.config import registry
from nexus_scale.interop.encoders import OwnCodec, find_text_encoder
from nexus_scale.interop.musicgen import whole
from nexus_scale.interop.published import Beside, family
from nexus_scale.models.audio.musicgen import MusicGen
from tests.models.test_musicgen import CODEC
from tests.tiny_encoders import save_text_encoder

SIZES = {"codebook_size": 16, "hidden_size": 16, "depth": 1, "num_heads": 2, "text_dim": 12, "dropout": 0.0}


def own_codec() -> OwnCodec:
    from transformers import EncodecConfig, EncodecModel

    theirs = EncodecModel(EncodecConfig(**CODEC))
    form = family("codec").formats["transformers"]
    arguments, state = form.to_ours(theirs.config.to_dict(), theirs.state_dict())
    network = registry.find("models", "codec")(**arguments)
    network.load_state_dict(state)
    return OwnCodec(network, "codec", arguments)


def test_transformers_loads_the_whole_folder_and_draws_with_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MusicgenForConditionalGeneration

    torch.manual_seed(0)
    net, form = MusicGen(**SIZES), family("musicgen").formats["transformers"]
    net.init_weights()
    form.write(tmp_path / "export", net.state_dict(), SIZES)
    found = find_text_encoder({"folder": str(save_text_encoder(tmp_path / "t5", "t5"))})
    assert not whole(tmp_path / "export", Beside([found], own_codec()))
    theirs, report = MusicgenForConditionalGeneration.from_pretrained(
        tmp_path / "export", local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    words = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)(
        ["a big cat"], return_tensors="pt"
    )
    tokens = torch.randint(0, 16, (1, 5, 4))
    with torch.no_grad():
        said = theirs(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], decoder_input_ids=tokens[0].T
        ).logits
        text = theirs.text_encoder(input_ids=words["input_ids"], attention_mask=words["attention_mask"])[0]
        assert torch.allclose(net.eval()(tokens, {"text": text})[0].transpose(0, 1), said, atol=1e-5)
        waves = theirs.generate(input_ids=words["input_ids"], attention_mask=words["attention_mask"], max_new_tokens=7)
    assert waves.shape == (1, 1, 4 * 16)
    arguments, state = form.read(tmp_path / "export")
    assert arguments["text_dim"] == 12 and all(torch.equal(state[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("texts", "why"), [(0, "the run has 0 text encoders"), (1, "the run's codec is none")])
def test_what_has_no_class_there_is_said(tmp_path: Path, texts: int, why: str) -> None:
    assert whole(tmp_path, Beside([None] * texts, None)).startswith(why)
