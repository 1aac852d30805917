"""Semantic tokens: features of clips, their groups, and the tokens of a folder; remade where they must be and refused where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import cluster_features, precompute_semantic
from nexus_scale.conditioners.semantic import SemanticConditioner, grouped
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, decode, finish_folder, read_samples
from nexus_scale.data.sounds import encode_wav
from nexus_scale.interop.speech_features import open_features

RATE = 16000
MFCC = {"name": "mfcc", "sample_rate_hz": RATE}


def noise(number: int, seconds: float = 0.5) -> torch.Tensor:
    """Low or high noise in turn, five times a second, (T,)."""
    rng = np.random.default_rng(number)
    white = rng.normal(size=int(seconds * RATE)).astype(np.float32)
    low = np.convolve(white, np.ones(16) / 16, "same")
    turns = (np.arange(len(white)) // (RATE // 10)) % 2
    return torch.from_numpy(np.where(turns == 0, 3 * low, white - low).astype(np.float32) * 0.1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for shard in range(2):
        with ShardWriter(tmp_path / f"clips/{shard:05d}.tar", [Field("audio", "wav", "int16", (1, None))]) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                wave = noise(number, 0.4 + 0.05 * number)
                writer.write(f"{number:03d}", {"audio": encode_wav(wave[None].numpy(), RATE)})
    finish_folder(tmp_path / "clips")
    return tmp_path


def cluster(root: Path, **changed: Any) -> Path:
    options = {"input": "clips", "features": {"name": "mfcc"}, "clusters": 4, "output": "units", **changed}
    cluster_features.run(**options, data_root=root, runs_root=root)
    assert cluster_features.done(**options, data_root=root, runs_root=root)
    return root / options["output"]


def tokens(root: Path, **changed: Any) -> dict[str, np.ndarray]:
    options = {"input": "clips", "semantic": "units", "output": "semantic", "workers": 0, **changed}
    made = precompute_semantic.run(**options, data_root=root, runs_root=root)
    return {
        sample.key: decode("semantic.npy", sample.members["semantic.npy"])
        for shard in made.shards
        for sample in read_samples(made.folder / shard.file)
    }


def test_sounds_that_differ_are_different_tokens_whoever_makes_them(root: Path) -> None:
    """As many tokens as it takes to cover a sound, each its place's; the same again; two frames to a token have half as many."""
    cluster(root)
    found = tokens(root)
    heard: tuple[set[int], set[int]] = (set(), set())
    for number in range(8):
        own, wave = found[f"{number:03d}"], noise(number, 0.4 + 0.05 * number)
        assert len(own) == -(-len(wave) // 320) and own.min() >= 0 and own.max() < 4
        for turn, kind in enumerate(heard):  # away from where one becomes the other
            kind |= set(own[np.isin(np.arange(len(own)) % 10, np.array([2, 3]) + 5 * turn)].tolist())
    assert heard[0] and heard[1] and not heard[0] & heard[1]
    made = Manifest.load(root / "semantic")
    assert made.encoder is not None and made.encoder["num_tokens"] == 4 and made.encoder["hop"] == 320
    again = SemanticConditioner.open({"folder": "units"}, root)
    assert again.fingerprint == made.encoder["fingerprint"]
    cluster(root, every=2, output="half")
    assert [len(one) for one in tokens(root, semantic="half", output="slow").values()] == [
        -(-len(one) // 2) for one in found.values()
    ]


def test_a_rerun_makes_what_is_missing_and_other_groups_make_all_again(root: Path) -> None:
    units, found = cluster(root), tokens(root)
    bytes_before = (units / "centres.safetensors").read_bytes()
    second = root / "semantic" / Manifest.load(root / "semantic").shards[1].file
    kept = root / "semantic" / Manifest.load(root / "semantic").shards[0].file
    stamp = kept.stat().st_mtime_ns
    second.unlink()
    assert {key: value.tolist() for key, value in tokens(root).items()} == {
        key: value.tolist() for key, value in found.items()
    }
    assert kept.stat().st_mtime_ns == stamp
    (units / "centres.safetensors").unlink()
    cluster(root)
    assert (units / "centres.safetensors").read_bytes() == bytes_before
    cluster(root, output="other", seed=1, clusters=3)
    assert max(int(one.max()) for one in tokens(root, semantic="other", output="third").values()) == 2
    with pytest.raises(UserError, match="options"):
        cluster(root, seed=2)


def test_groups_are_where_the_features_are() -> None:
    """k-means finds three heaps; the same with the same seed; no more groups than rows."""
    torch.manual_seed(0)
    heaps = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    rows = (heaps[:, None] + 0.1 * torch.randn(3, 50, 2)).flatten(0, 1)
    found = grouped(rows, 3, rounds=20, seed=0)
    assert torch.cdist(heaps, found).amin(1).max() < 0.1
    assert torch.equal(found, grouped(rows, 3, rounds=20, seed=0))
    with pytest.raises(UserError, match="at most as many"):
        grouped(rows[:2], 3, rounds=1, seed=0)


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2-bert"])
def test_an_encoders_states_are_transformers_own(tmp_path: Path, kind: str) -> None:
    """Of the layer that is asked for, for every stretch of the sound."""
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "hubert":
        conv = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        model = hf.HubertModel(hf.HubertConfig(**sizes, **conv))
        reader = hf.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    else:
        model = hf.Wav2Vec2BertModel(hf.Wav2Vec2BertConfig(**sizes, num_adapter_layers=1))
        reader = hf.SeamlessM4TFeatureExtractor()
    model.save_pretrained(tmp_path / "encoder")
    reader.save_pretrained(tmp_path / "encoder")
    features = open_features({"folder": "encoder", "layer": 1}, tmp_path)
    wave = noise(0, 0.33)
    found = features.of(wave)
    assert found.shape == (-(-len(wave) // 320), 16) == (17, features.dim) and features.hop == 320
    with torch.no_grad():
        inputs = reader(wave.numpy(), sampling_rate=RATE, return_tensors="pt")
        theirs = model.eval()(**inputs, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(found[: len(theirs)], theirs)
    assert torch.equal(found[len(theirs) :], found[len(theirs) - 1 : -1])
    assert features.of(noise(0, 0.005)).shape == (1, 16)
    other = open_features({"folder": "encoder", "layer": 2}, tmp_path)
    assert other.fingerprint != features.fingerprint
    with pytest.raises(UserError, match="0 to 2"):
        open_features({"folder": "encoder", "layer": 3}, tmp_path)
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    (tmp_path / "encoder/config.json").write_text(json.dumps({**config, "model_type": "whisper"}))
    with pytest.raises(UserError, match="known: data2vec-audio, hubert"):
        open_features({"folder": "encoder"}, tmp_path)


def test_mistakes_are_refused_by_name(root: Path) -> None:
    for spec, words in (
        ({"name": "mel"}, "no 'mel'"),
        ({**MFCC, "layer": 3}, "has none"),
        ({}, "expected a folder"),
        ({"folder": "nowhere"}, "no config.json"),
    ):
        with pytest.raises(UserError, match=words):
            open_features(spec, root)
    with pytest.raises(UserError, match="cluster_features"):
        tokens(root, semantic="nowhere")
    with pytest.raises(UserError, match="at most as many"):
        cluster(root, clusters=5000)
