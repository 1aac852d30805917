"""Images, video and audio: decoded where they are, shown, written; large images in strips; rates from the manifest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from torch import Tensor

from nexus_scale.config.recipe import Cluster
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.sounds import decode_wav
from nexus_scale.data.stand_ins import ToneCodec
from nexus_scale.engine.hardware import CPU, Hardware, hardware_of
from nexus_scale.interop import autoencoder_kl, decoding_in_strips
from nexus_scale.interop.slices import PLACES, slices
from nexus_scale.media import Medium, check_format
from nexus_scale.media.audio import Audio
from nexus_scale.media.image import Image
from nexus_scale.media.video import Video
from nexus_scale.processes.latents import LatentStats
from tests.tiny_encoders import save_autoencoder_kl

MEDIA: list[tuple[Medium, tuple[int, ...]]] = [
    (Image(), (3, 8, 12)),
    (Video(rate_hz=12.0), (3, 5, 8, 12)),
    (Audio(8000), (1, 400)),
    (Audio(8000, ToneCodec(2, 16)), (6, 2)),
]


@pytest.mark.parametrize(("medium", "shape"), MEDIA, ids=["image", "video", "waveform", "codes"])
def test_every_medium_decodes_shows_and_writes(medium: Medium, shape: tuple[int, ...]) -> None:
    codes = shape[-1] == 2
    generator = torch.Generator().manual_seed(0)
    samples = (
        torch.randint(16, (3, *shape), generator=generator) if codes else torch.randn(3, *shape, generator=generator)
    )
    shown = medium.decode(samples)
    assert len(shown) == 3
    for one in shown:
        assert one.dtype == torch.float32
        assert float(one.abs().max()) <= 1
        picture = medium.picture(one)
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert medium.file(one) == medium.file(one, medium.formats[0])
    assert len({medium.file(shown[0], format) for format in medium.formats}) == len(medium.formats)
    assert medium.file(shown[0], medium.formats[1]) == medium.file(shown[0], medium.formats[1])
    with pytest.raises(UserError, match=f"--format 'tiff': {medium.name} is written as {medium.formats[0]} or"):
        check_format(medium, "tiff")
    assert check_format(medium, None) == medium.formats[0]


def test_what_is_written_is_what_is_scored() -> None:
    """The decoded values are those that a file holds, so an image comes back to the bit, and sound within 16 bits."""
    image = Image()
    (shown,) = image.decode(torch.randn(1, 3, 8, 12))
    for format in image.formats:
        with Pictures.open(io.BytesIO(image.file(shown, format))) as opened:
            pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).float()
        assert torch.equal(pixels / 127.5 - 1, shown)
    audio = Audio(16000)
    (wave,) = audio.decode(torch.randn(1, 2, 300).clamp(-0.99, 0.99))
    heard = decode_wav(audio.file(wave))
    assert heard.sample_rate_hz == 16000
    assert np.abs(heard.wave - wave.numpy()).max() <= 2**-16


def test_a_clip_is_written_at_the_rate_of_its_data() -> None:
    av = pytest.importorskip("av")
    frames = torch.linspace(-1, 1, 6).view(1, 1, 6, 1, 1).expand(1, 3, 6, 16, 17)
    for rate, seconds in ((12.0, 1 / 12), (None, 1 / 8), (29.97, 1 / 29.97)):
        video = Video(rate_hz=rate)
        (clip,) = video.decode(frames)
        with Pictures.open(io.BytesIO(video.file(clip))) as animation:
            assert animation.n_frames == 6  # type: ignore[attr-defined]
            animation.seek(1)
            animation.load()
            assert animation.info["duration"] == round(1000 * seconds)
        with av.open(io.BytesIO(video.file(clip, "mp4"))) as opened:
            stream = opened.streams.video[0]
            assert float(stream.average_rate) == pytest.approx(1 / seconds, rel=1e-3)
            decoded = [frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)]
        assert len(decoded) == 6
        assert decoded[0].shape == (16, 18, 3), "both sides are even"
        grey = [float(frame.mean()) for frame in decoded]
        assert grey == sorted(grey)
        assert grey[0] < 10
        assert grey[-1] > 245


def test_lengths_and_codes_that_go_before() -> None:
    """Only the real part of a sample is decoded; a prompt's codes are decoded before a sentence's and cut off."""
    clips = Video().decode(torch.zeros(2, 3, 5, 4, 4), lengths=[2, 5])
    assert [clip.shape[1] for clip in clips] == [2, 5]
    waves = Audio(8000).decode(torch.zeros(2, 1, 50), lengths=[7, 50])
    assert [wave.shape[1] for wave in waves] == [7, 50]
    codec = ToneCodec(1, 16)
    codes = torch.tensor([[3, 4, -1, -1], [5, 6, 7, 8]])[..., None]
    ended, whole = Audio(8000, codec).decode(codes)
    assert (ended.shape[1], whole.shape[1]) == (2 * codec.hop, 4 * codec.hop)
    (after,) = Audio(8000, codec).decode(codes[1:, 2:], before=[codes[1, :2]])
    assert torch.equal(after, whole[:, 2 * codec.hop :]), "as they follow one another"
    assert not torch.equal(after, Audio(8000, codec).decode(codes[1:, 2:])[0])


def test_latents_are_denormalised_and_decoded_in_slices() -> None:
    seen: list[int] = []

    def decoder(z: Tensor) -> Tensor:
        seen.append(len(z))
        return z[:, :3]

    medium = Image(decoder, LatentStats((0.5,) * 4, (0.25,) * 4))
    shown = medium.decode(torch.zeros(40, 4, 2, 2))
    assert seen == [32, 8]
    assert all(torch.allclose(one, torch.full((3, 2, 2), 0.5), atol=0.5 / 127.5) for one in shown)
    large = torch.zeros(3, 1, PLACES // 128, 128, device="meta")
    assert [len(part) for part in slices(large)] == [1, 1, 1]
    assert [len(part) for part in slices(torch.zeros(5, 1, 8, 8))] == [5]


# -------------------------------------------------------------------------------------------- large images


def test_strips_equal_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-5 in float32, whatever the rows; every norm sees the whole image."""
    pytest.importorskip("diffusers")
    save_autoencoder_kl(tmp_path)
    vae: Any = autoencoder_kl.AutoencoderKLFolder(tmp_path)
    assert decoding_in_strips.fits(vae._vae.decoder)
    with torch.no_grad():
        for parameter in vae._vae.decoder.parameters():
            if parameter.ndim == 1:  # norms and biases begin at one and zero, where mistakes hide
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    z = torch.randn(2, vae.latent_channels, 13, 9, generator=torch.Generator().manual_seed(2))
    whole = vae.decode(z)
    for rows in (3, 8, 64):
        with torch.no_grad():
            strips = decoding_in_strips.decode_in_strips(vae._vae, z, rows)
        assert float((strips - whole).abs().max()) < 1e-5 * float(whole.abs().max()) + 1e-5
    monkeypatch.setattr(autoencoder_kl, "LARGE", 100)
    monkeypatch.setattr(decoding_in_strips, "ROWS", 4)
    assert torch.allclose(vae.decode(z), whole, atol=1e-5)


def test_an_autoencoder_computes_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_autoencoder_kl(tmp_path)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    full, half = (autoencoder_kl.AutoencoderKLFolder(tmp_path, dtype=kind) for kind in (torch.float32, torch.bfloat16))
    assert next(half._vae.parameters()).dtype == torch.bfloat16
    assert half.decode(z).dtype == torch.float32
    assert 0 < float((full.decode(z) - half.decode(z)).abs().max()) < 0.1


def test_hardware_falls_back_to_the_cpu_with_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware_of(Cluster(gpus_per_worker=0), "bf16") == CPU
    assert not caplog.records
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware_of(Cluster(name="big", gpus_per_worker=1, precision="bf16")) == CPU
    assert [record.getMessage() for record in caplog.records] == [
        "cluster big: workers have GPUs, but torch finds none here: computing on the CPU in float32"
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert hardware_of(Cluster(gpus_per_worker=1), "bf16") == Hardware(torch.device("cuda", 0), torch.bfloat16)
    assert hardware_of(Cluster(gpus_per_worker=1, precision="bf16"), "float32").dtype == torch.float32


def test_a_network_in_reduced_precision_takes_and_gives_float32() -> None:
    linear = torch.nn.Linear(4, 4)
    held = Hardware(torch.device("cpu"), torch.bfloat16).hold(linear)
    out = held(torch.ones(2, 4))
    assert out.dtype == torch.float32
    assert linear.weight.dtype == torch.bfloat16
    assert not linear.weight.requires_grad
    assert CPU.hold(linear) is linear


# ---------------------------------------------------------------------------------------------------- rates


def folder_of(path: Path, rates: dict[str, float] | None) -> Manifest:
    with ShardWriter(path / "0.tar", [Field("video", "video.npy", "uint8", (3, 2, 4, 4))]) as writer:
        for number in range(3):
            writer.write(f"{path.name}{number}", {"video": np.full((3, 2, 4, 4), number, np.uint8)})
    return finish_folder(path, rates=rates)


def test_rates_travel_in_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, slow, fast = (
        folder_of(tmp_path / n, r) for n, r in (("a", None), ("b", {"video": 8.0}), ("c", {"video": 24.0}))
    )
    assert "rates" not in (tmp_path / "a/manifest.json").read_text(), "older folders keep their hash"
    assert Manifest.load(tmp_path / "a").hash == old.hash
    assert Manifest.load(tmp_path / "b") == slow
    assert Manifest.load(tmp_path / "c").rates == fast.rates == {"video": 24.0}
    assert Dataset.open([Source([tmp_path / "a"])]).rates == {}
    assert Dataset.open([Source([tmp_path / "c"])]).rates == {"video": 24.0}
    assert not caplog.records
    assert Dataset.open([Source([tmp_path / name]) for name in "bc"]).rates == {"video": 8.0}
    assert "video at different rates ([8.0, 24.0] per second)" in caplog.text
    manifest = tmp_path / "c/manifest.json"
    manifest.write_text(manifest.read_text().replace('"video": 24.0', '"video": -1.0'))
    with pytest.raises(DataError, match=r"rates\.video"):
        Manifest.load(tmp_path / "c")
