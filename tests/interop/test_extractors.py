"""Feature extractors by name: from folders and files, refused where something is missing, and the same as what they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.extractors import PUBLISHED, find_clip_texts, find_extractor
from nexus_scale.interop.lpips import find_lpips, open_lpips
from nexus_scale.metrics.features import sha256_of
from nexus_scale.models.vae.lpips import LPIPS, TRUNKS
from tests.golden import pair_metrics as golden
from tests.tiny_encoders import save_tokenizer

torch.set_num_threads(1)
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of transformers with random weights."""
    hf = pytest.importorskip("transformers")
    root: Path = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    text = SMALL | {
        "vocab_size": 14,
        "max_position_embeddings": 10,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "bos_token_id": 2,
    }
    vision = SMALL | {"image_size": 16, "patch_size": 8, "projection_dim": 6}
    text["projection_dim"] = 6
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(root / "clip")
    save_tokenizer(root / "clip", "clip", 10)
    dino = SMALL | {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    hf.Dinov2Model(hf.Dinov2Config(**dino)).save_pretrained(root / "dinov2")
    scale = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    for name, side in (("clip", 16), ("dinov2", 28)):
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        hf.CLIPImageProcessor(**scale, **size).save_pretrained(root / name)
    video = SMALL | {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
    hf.VideoMAEModel(hf.VideoMAEConfig(**video)).save_pretrained(root / "videomae")
    (root / "videomae" / "preprocessor_config.json").write_text(json.dumps(scale))
    sound = {
        "spec_size": 32,
        "num_mel_bins": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "patch_embeds_hidden_size": 4,
    }
    sound |= {"window_size": 4, "hidden_size": 8, "projection_dim": 6, "patch_size": 4, "patch_stride": [4, 4]}
    hf.ClapAudioModelWithProjection(hf.ClapAudioConfig(**sound)).save_pretrained(root / "clap")
    hf.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        hop_length=160,
        max_length_s=1,
        fft_window_size=256,
        frequency_max=4000,
        truncation="rand_trunc",
    ).save_pretrained(root / "clap")
    codec = {"num_filters": 2, "hidden_size": 8, "codebook_size": 8, "codebook_dim": 8, "upsampling_ratios": [4, 2]}
    codec |= {"num_lstm_layers": 1, "sampling_rate": 8000, "target_bandwidths": [6.0], "num_residual_layers": 1}
    hf.EncodecModel(hf.EncodecConfig(**codec)).save_pretrained(root / "codec")
    return root


def test_folders_of_transformers_give_features_of_images_and_texts(folders: Path) -> None:
    import transformers as hf

    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    clip = find_extractor({"name": "clip", "folder": "clip"}, folders)
    found = clip(images)
    assert clip.takes == "images" and found.shape == (3, 6)
    model = hf.CLIPModel.from_pretrained(folders / "clip")
    texts = find_clip_texts({"name": "clip", "folder": "clip"}, folders)(["red heart", "a cat"])
    tokens = hf.AutoTokenizer.from_pretrained(folders / "clip")(
        ["red heart", "a cat"], return_tensors="pt", padding=True
    )
    made = model(pixel_values=torch.zeros(1, 3, 16, 16), input_ids=tokens["input_ids"]).text_embeds.detach()
    torch.testing.assert_close(torch.nn.functional.normalize(texts), made, rtol=1e-4, atol=1e-5)
    dino = find_extractor({"name": "dinov2", "folder": "dinov2"}, folders)
    assert dino(images).shape == (3, 8) and dino.fingerprint != clip.fingerprint
    torch.testing.assert_close(dino(images), dino(images[[1, 0, 2]])[[1, 0, 2]])


def test_videomae_reads_clips_of_its_own_length(folders: Path) -> None:
    import transformers as hf

    clips = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = find_extractor({"name": "videomae", "folder": "videomae"}, folders)
    assert found.takes == "clips" and "4 frames" in found.name
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    pixels = ((clips + 1) * 127.5).round() / 255
    pixels = (pixels.transpose(1, 2) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    states = hf.VideoMAEModel.from_pretrained(folders / "videomae").eval()(pixels).last_hidden_state
    torch.testing.assert_close(found(clips), states.mean(1).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="clips of 4 frames; got 3"):
        found(clips[:, :, :3])


@pytest.mark.parametrize(("name", "rate", "shape"), [("clap", 8000, (2, 6)), ("codec", 8000, (2 * 500, 8))])
def test_sounds_have_features_at_the_networks_own_rate(
    folders: Path, name: str, rate: int, shape: tuple[int, int]
) -> None:
    found = find_extractor({"name": name, "folder": name}, folders)
    waves = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    features = found(waves)
    assert (found.takes, found.sample_rate_hz, features.shape) == ("sounds", rate, shape)
    if name == "clap":
        with pytest.raises(UserError, match="at most 1 s"):
            found(torch.zeros(1, 8001))
    again = found(waves.flip(0)).unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    torch.testing.assert_close(again, features, rtol=1e-4, atol=1e-5)


class Detector(torch.nn.Module):
    """What the I3D of FVD is called like."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean(dim=[2, 3, 4]) / 255 if rescale and resize and return_features else x


def test_a_torchscript_file_runs_only_where_it_is_vouched_for(tmp_path: Path) -> None:
    file = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Detector()).save(str(file))
    spec = {"name": "i3d", "file": file.name}
    with pytest.raises(UserError, match=sha256_of(file)):
        find_extractor(spec, tmp_path)
    found = find_extractor(spec | {"sha256": sha256_of(file)}, tmp_path)
    torch.testing.assert_close(found(torch.ones(2, 3, 4, 5, 5)), torch.ones(2, 3))


@pytest.mark.parametrize("trunk", golden.TRUNKS)
def test_lpips_is_the_packages(trunk: str, tmp_path: Path) -> None:
    state = LPIPS(trunk=trunk).state_dict()
    number = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}[trunk]
    convs = dict.fromkeys(name.rpartition(".")[0] for name in state if name.startswith("stages"))
    names = {
        f"{ours}.{k}": f"features.{n}.{k}" for ours, n in zip(convs, number, strict=True) for k in ("weight", "bias")
    }
    torch.save(golden.weights((names[n], state[n].shape) for n in state if n in names), tmp_path / "trunk.pth")
    torch.save(golden.heads(TRUNKS[trunk].channels), tmp_path / "heads.pth")
    spec = {"trunk": trunk, "trunk_file": "trunk.pth", "heads_file": "heads.pth"}
    net = open_lpips(spec, tmp_path)
    x, y = (one.float() for one in golden.pair(64))
    said = json.loads(golden.FILE.read_text())["lpips"][trunk]
    with torch.no_grad():
        assert net(x, y).tolist() == pytest.approx(said, rel=1e-5)
        assert float(net(x, x).sum()) == 0
    with pytest.raises(ValueError, match="at least"):
        net(x[..., :8, :8], y[..., :8, :8])
    for less, words in (("trunk_file", "published at https"), ("heads_file", "expected the heads|not there")):
        with pytest.raises(UserError, match=words):
            find_lpips(spec | {less: "none.pth"}, tmp_path)
    with pytest.raises(UserError, match="not the weights of LPIPS"):
        open_lpips(spec | {"heads_file": "trunk.pth"}, tmp_path)


def test_what_is_missing_is_named_with_where_it_is_published(folders: Path) -> None:
    refused = [
        ({"name": "vgg"}, "no 'vgg'"),
        ({"name": "clip", "layer": 1, "folder": "clip"}, "unknown key 'layer'"),
        ({"name": "clip"}, "no folder; name a local one"),
        ({"name": "clip", "folder": "dinov2"}, "model_type is 'dinov2'; expected clip"),
        ({"name": "inception", "file": "none.pth"}, "published at"),
        *(
            ({"name": name, "folder": "none"}, PUBLISHED[name].split(" ")[0])
            for name in ("dinov2", "videomae", "clap", "speech")
        ),
    ]
    for spec, words in refused:
        with pytest.raises(UserError, match=words):
            find_extractor(spec, folders)
