"""A codec's run as whoever needs codes opens it: from its folder, from its export, or from a folder of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.evaluate.scores import export_run
from nexus_scale.generate.trained import make_draw
from nexus_scale.interop.encoders import OwnCodec, open_codec, open_vae
from nexus_scale.train import Place, train

transformers = pytest.importorskip("transformers")


def trained(root: Path, recipe_name: str) -> Place:
    recipe = recipes.load_recipe(recipe_name, {"callbacks": {"checkpoint": {"every": 3}}}, tiny=True)
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")
    place = Place(RunFolder(root / recipe.name), root / "data", root)
    place.run.path.mkdir(parents=True)
    plain_yaml.write_yaml(place.run.recipe, recipes.dump(recipe))
    plain_yaml.write_yaml(place.run.cluster, recipes.dump(cluster))
    train(recipe, cluster, place, make_draw)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("runs"), "codec/encodec_24khz")


@pytest.fixture(scope="module")
def spectral(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("runs"), "codec/tiny_music")


def opened(place: Place) -> OwnCodec:
    return open_codec({"run": place.run.path.name}, place.runs_root)


@pytest.mark.parametrize(("kind", "rate", "books"), [("place", 24000, 4), ("spectral", 16000, 3)])
def test_a_run_codes_waveforms_each_by_itself(kind: str, rate: int, books: int, request: pytest.FixtureRequest) -> None:
    place: Place = request.getfixturevalue(kind)
    codec = opened(place)
    assert (codec.sample_rate_hz, codec.hop, codec.num_codebooks, codec.codebook_size) == (rate, 8, books, 8)
    assert codec.fingerprint == opened(place).fingerprint and len(codec.fingerprint) == 32
    wave = torch.randn(3, 1, 400, generator=torch.Generator().manual_seed(0)) * 0.2
    lengths = torch.tensor([400, 203, 400])
    codes = codec.encode(wave, lengths)
    assert codes.shape == (3, 50, books) and codes.dtype == torch.int64 and codes.unique().numel() > 2
    for row, length in enumerate(lengths.tolist()):
        alone = codec.encode(wave[row : row + 1, :, :length])
        steps = -(-length // 8)
        assert alone.shape[1] == steps
        assert torch.equal(codes[row, :steps], alone[0]) and not codes[row, steps:].any()
    padded = wave.clone()
    padded[1, :, 203:] = 0.5
    assert torch.equal(codec.encode(padded, lengths), codes), "what lies behind a sound's end changes nothing"
    heard = codec.decode(codes)
    assert heard.shape == (3, 1, 400) and heard.abs().max() <= 1
    assert codec.decode(codes[..., :2]).shape == heard.shape


def test_its_export_is_the_same_codec_to_transformers_and_to_us(place: Place, tmp_path: Path) -> None:
    folder = export_run(place, "transformers", tmp_path / "codec")
    ours, exported = opened(place), open_codec({"folder": "codec"}, place.runs_root, tmp_path)
    theirs = transformers.EncodecModel.from_pretrained(folder, local_files_only=True)
    wave = torch.randn(2, 1, 403, generator=torch.Generator().manual_seed(1)) * 0.2
    codes = ours.encode(wave)
    assert torch.equal(exported.encode(wave), codes)
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"folder": folder}
    exec(example, names)  # our own file, written a moment ago
    assert names["again"].shape[-1] >= names["waves"].shape[-1] == 24000
    with torch.no_grad():
        coded = theirs.encode(wave, bandwidth=theirs.config.target_bandwidths[-1])
        assert torch.equal(coded.audio_codes[0].transpose(1, 2), codes)
        heard = theirs.decode(coded.audio_codes, [None])[0]
    torch.testing.assert_close(ours.decode(codes), heard.clamp(-1, 1), atol=1e-6, rtol=1e-5)


def test_a_codec_that_no_library_has_is_exported_with_its_code(spectral: Place, tmp_path: Path) -> None:
    """Loaded as the folder's README says, it codes and decodes what ours does; and we read it back."""
    folder = export_run(spectral, None, tmp_path / "codec")
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"folder": folder}
    exec(example, names)  # our own file, written a moment ago
    theirs, ours = names["codec"].eval(), opened(spectral)
    assert names["again"].shape == names["waves"].shape == (1, 1, 16000)
    wave = torch.randn(2, 1, 403, generator=torch.Generator().manual_seed(1)) * 0.2
    codes = ours.encode(wave)
    assert torch.equal(open_codec({"folder": "codec"}, spectral.runs_root, tmp_path).encode(wave), codes)
    with torch.no_grad():
        coded = theirs.encode(wave).audio_codes
        assert torch.equal(coded.transpose(1, 2), codes) and codes.unique().numel() > 2
        torch.testing.assert_close(
            theirs.decode(coded).audio_values.clamp(-1, 1), ours.decode(codes), atol=1e-5, rtol=1e-5
        )
        assert theirs(wave).audio_values.shape == wave.shape
    with pytest.raises(UserError, match="--format diffusers: spectral_codec is exported as transformers"):
        export_run(spectral, "diffusers", tmp_path / "none")


def test_what_is_no_codec_is_refused(place: Place, tmp_path: Path) -> None:
    for spec, says in (
        ({"run": "a", "folder": "b"}, "expected either `run` or `folder`"),
        ({"ruin": "a"}, "unknown key 'ruin'; did you mean 'run'"),
        ({"run": "nothing"}, "no run folder there .*train the codec first"),
        ({"folder": "nothing"}, r"no config\.json there"),
    ):
        with pytest.raises(UserError, match=says):
            open_codec(spec, place.runs_root, tmp_path)
    vae = trained(tmp_path, "vae/tiny_openmoji")
    with pytest.raises(UserError, match="a run of vae, which is no codec; name a run of a codec recipe"):
        open_codec({"run": vae.run.path.name}, tmp_path)
    with pytest.raises(UserError, match="a run of codec, ms_stft_discriminator, which is no autoencoder"):
        open_vae({"run": place.run.path.name}, place.runs_root)
    config = transformers.EncodecConfig(
        audio_channels=2, num_filters=2, hidden_size=2, codebook_size=4, num_lstm_layers=1, target_bandwidths=[0.15]
    )
    transformers.EncodecModel(config).save_pretrained(tmp_path / "stereo")
    with pytest.raises(UserError, match="2 channels; speech has one"):
        open_codec({"folder": "stereo"}, place.runs_root, tmp_path)
