"""The codec against transformers' EncodecModel: latents, codes, waveforms, gradients, and folders both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.codec import OLD_NAMES, TRANSFORMERS
from nexus_scale.models.audio.codec import Codec

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_filters": 4,
    "hidden_size": 12,
    "codebook_size": 16,
    "num_lstm_layers": 1,
    "target_bandwidths": [0.6, 1.8],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "24khz": SMALL | {"num_lstm_layers": 2},
    # as MusicGen's: two-sided padding, more units, no convolution on the way around
    "32khz": SMALL
    | {
        "sampling_rate": 32000,
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "num_residual_layers": 2,
        "upsampling_ratios": [8, 5, 4, 4],
        "pad_mode": "constant",
        "target_bandwidths": [0.8, 1.6],
    },
    "stereo": SMALL
    | {
        "audio_channels": 2,
        "upsampling_ratios": [3, 2],
        "trim_right_ratio": 0.5,
        "compress": 1,
        "target_bandwidths": [16.0, 48.0],
    },
}
LENGTHS = (1, 319, 320, 2001)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Codec]:
    torch.manual_seed(0)
    theirs = transformers.EncodecModel(transformers.EncodecConfig(**CONFIGS[name])).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() < 3 else 0.7))
        for layer in theirs.quantizer.layers:
            layer.codebook.embed.normal_(std=0.3)
            layer.codebook.embed_avg.normal_()
            layer.codebook.cluster_size.uniform_(1, 5)
    model_args, state = TRANSFORMERS.to_ours(theirs.config.to_dict(), theirs.state_dict())
    ours = Codec(**model_args)
    ours.load_state_dict(state)
    return theirs.to(dtype), ours.to(dtype).eval()


def waves(config: dict[str, Any], samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(2, config.get("audio_channels", 1), samples, generator=generator).to(dtype) * 0.3


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    assert got.shape == expected.shape
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


@pytest.mark.parametrize("samples", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_latents_codes_and_waveforms_equal_transformers(name: str, samples: int) -> None:
    theirs, ours = pair(name)
    x = waves(CONFIGS[name], samples)
    with torch.no_grad():
        z, z_ours = theirs.encoder(x), ours.encoder(x)
        assert z.std() > 0.02 and error(z_ours, z) < 1e-5
        bandwidths = CONFIGS[name]["target_bandwidths"]
        for bandwidth in bandwidths:
            codes = theirs.encode(x, bandwidth=bandwidth).audio_codes  # (1, B, K, T)
            codes_ours = ours.encode(x, codes.shape[2])
            assert torch.equal(codes_ours, codes[0].transpose(1, 2)), bandwidth
            y, y_ours = theirs.decode(codes, [None])[0], ours.decode(codes_ours)
            assert y.std() > 0.02 and error(y_ours, y) < 1e-5
        assert codes.shape[2] == ours.num_codebooks
        assert codes.unique().numel() > 2
        assert torch.equal(ours(x).codes, ours.encode(x))
        assert error(ours(x).x_hat, y[..., :samples]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_transformers(name: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(name, dtype)
    x = waves(CONFIGS[name], 1900, dtype)
    z = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    for coder, given in (("encoder", x), ("decoder", z)):
        results = []
        for net in (theirs, ours):
            net.zero_grad()
            leaf = given.clone().requires_grad_()
            y = getattr(net, coder)(leaf)
            direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            (y * direction).sum().backward()
            assert leaf.grad is not None
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
            results.append((leaf.grad, grads))
        (dx, grads), (dx_ours, grads_ours) = results
        assert error(dx_ours, dx) < 1e-5
        model_args, _ = TRANSFORMERS.to_ours(theirs.config.to_dict(), theirs.state_dict())
        books = {name: buffer for name, buffer in ours.state_dict().items() if name.startswith("quantizer.")}
        named = TRANSFORMERS.to_theirs(grads_ours | books, model_args)[1]
        floor = 1e-2 * max(float(grad.abs().max()) for grad in grads.values())
        for key, grad in grads.items():
            if key.startswith(coder):
                assert error(named[key], grad, floor) < 1e-5, key
                assert grad.abs().max() > 0, key


def test_published_size() -> None:
    with torch.device("meta"):
        net = Codec()
        theirs = transformers.EncodecModel(transformers.EncodecConfig())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters()) == 14_851_810
    assert net.hop == 320 and net.sample_rate_hz / net.hop == 75 and net.num_codebooks == 32
    assert {**TRANSFORMERS.to_ours(theirs.config.to_dict(), theirs.state_dict())[0]} == {
        "sample_rate_hz": 24000,
        "audio_channels": 1,
        "strides": (2, 4, 5, 8),
        "base_channels": 32,
        "latent_channels": 128,
        "kernel_size": 7,
        "last_kernel_size": 7,
        "residual_kernel_size": 3,
        "num_residual": 1,
        "dilation_base": 2,
        "compress": 2,
        "lstm_layers": 2,
        "shortcut": "conv",
        "causal": True,
        "pad_mode": "reflect",
        "trim_right": 1.0,
        "num_codebooks": 32,
        "codebook_size": 1024,
    }, "the defaults are the published model's"


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_a_folder_is_exact(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name)
    model_args, _ = TRANSFORMERS.to_ours(theirs.config.to_dict(), theirs.state_dict())
    folder = TRANSFORMERS.write(tmp_path / "codec", ours.state_dict(), model_args)
    loaded, report = transformers.EncodecModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    again, state = TRANSFORMERS.read(folder)
    assert again == model_args
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.state_dict().items())
    x = waves(CONFIGS[name], 1280)
    with torch.no_grad():
        codes = loaded.encode(x, bandwidth=loaded.config.target_bandwidths[-1]).audio_codes[0].transpose(1, 2)
        assert torch.equal(codes, ours.encode(x)) and codes.shape[2] == ours.num_codebooks
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    assert extractor.sampling_rate == ours.sample_rate_hz


@pytest.mark.parametrize(
    ("rate", "strides", "books", "size"),
    [
        (16000, (2, 4, 5, 8), 8, 256),
        (16000, (2, 4, 5, 8), 5, 1024),
        (24000, (2, 4, 5, 8), 32, 1024),
        (16000, (4, 4), 3, 64),
    ],
)
def test_a_folder_says_how_many_books_there_are(
    rate: int, strides: tuple[int, ...], books: int, size: int, tmp_path: Path
) -> None:
    """transformers counts books by bandwidths, rounding down."""
    args: dict[str, Any] = {
        "sample_rate_hz": rate, "strides": strides, "num_codebooks": books, "codebook_size": size, "base_channels": 2,
        "latent_channels": 2, "lstm_layers": 1,
    }  # fmt: skip
    net = Codec(**args)
    net.init_weights()
    folder = TRANSFORMERS.write(tmp_path, net.state_dict(), args)
    assert TRANSFORMERS.read(folder)[0]["num_codebooks"] == books
    theirs = transformers.EncodecModel.from_pretrained(folder, local_files_only=True)
    assert len(theirs.quantizer.layers) == books
    for bandwidth in theirs.config.target_bandwidths:
        codes = theirs.encode(torch.zeros(1, 1, 640), bandwidth=bandwidth).audio_codes
    assert codes.shape[2] == books


def test_a_folder_with_the_old_names_of_weight_norm_reads(tmp_path: Path) -> None:
    theirs, ours = pair("24khz")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for old, new in OLD_NAMES.items():
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    assert any(key.endswith("weight_g") for key in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _, read = TRANSFORMERS.read(tmp_path)
    assert all(torch.equal(read[key], tensor) for key, tensor in ours.state_dict().items())


def test_what_is_not_encodec_is_refused(tmp_path: Path) -> None:
    theirs, _ours = pair("24khz")
    config, state = json.loads(json.dumps(theirs.config.to_dict())), theirs.state_dict()
    with pytest.raises(UserError, match="norm_type is 'time_group_norm'; Codec has only 'weight_norm'"):
        TRANSFORMERS.to_ours(config | {"norm_type": "time_group_norm"}, state)
    with pytest.raises(UserError, match="codebook_dim is 8"):
        TRANSFORMERS.to_ours(config | {"codebook_dim": 8}, state)
    with pytest.raises(UserError, match="among them extra"):
        TRANSFORMERS.to_ours(config, state | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"layers\.13\.lstm\.\w+ is missing"):
        TRANSFORMERS.to_ours(config, {key: t for key, t in state.items() if "encoder.layers.13" not in key})
    with pytest.raises(UserError, match=r"has shape \(16, 12\); these sizes of the network make it \(32, 12\)"):
        TRANSFORMERS.to_ours(config | {"codebook_size": 32, "target_bandwidths": [2.25]}, state)
    args, _ = TRANSFORMERS.to_ours(config, state)
    with pytest.raises(UserError, match="power of 2"):
        TRANSFORMERS.to_theirs(Codec(**args | {"codebook_size": 12}).state_dict(), args | {"codebook_size": 12})
    with pytest.raises(UserError, match="does not fit its arguments"):
        TRANSFORMERS.to_theirs({"a": torch.zeros(1)}, args)
    with pytest.raises(UserError, match=r"no config\.json there"):
        TRANSFORMERS.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"model_type is 'bert'; expected 'encodec'"):
        TRANSFORMERS.read(tmp_path)
