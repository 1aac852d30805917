"""Conversion to and from diffusers: to the bit, and through folders that diffusers itself loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.autoencoder_kl import AutoencoderKLFolder
from nexus_scale.interop.mmdit import DIFFUSERS, FUSED
from nexus_scale.models.diffusion.mmdit import MMDiT

diffusers = pytest.importorskip("diffusers")

ARGS: dict[str, Any] = {
    "latent_channels": 4,
    "latent_size": 8,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "text_dim": 24,
    "pooled_dim": 20,
    "qk_norm": "rms_norm",
    "dual_attention_blocks": 1,
    "pos_embed_max_size": 12,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_mmdit(**changes: Any) -> MMDiT:
    torch.manual_seed(0)
    net = MMDiT(**(ARGS | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return net


def cond_and_inputs() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 8), torch.rand(2), {"text": torch.randn(2, 3, 24), "pooled": torch.randn(2, 20)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": None, "dual_attention_blocks": 0, "depth": 3}])
def test_round_trip_is_exact(fused: bool, changes: dict[str, Any]) -> None:
    state = random_mmdit(**changes).state_dict()
    config, theirs = (FUSED if fused else DIFFUSERS).to_theirs(state, ARGS | changes)
    args, back = DIFFUSERS.to_ours(json.loads(json.dumps(config)), theirs)
    assert args == ARGS | {"patch_size": 2} | changes
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_round_trip_from_diffusers_side_fused_or_not() -> None:
    config, _ = DIFFUSERS.to_theirs(random_mmdit().state_dict(), ARGS)
    torch.manual_seed(3)
    theirs = diffusers.SD3Transformer2DModel.from_config(config)
    apart = {name: t.clone() for name, t in theirs.state_dict().items()}
    args, ours = DIFFUSERS.to_ours(dict(theirs.config), apart)
    back = DIFFUSERS.to_theirs(ours, args)[1]
    assert back.keys() == apart.keys()
    assert all(torch.equal(back[name], apart[name]) for name in apart), "the position table too"

    theirs.fuse_qkv_projections()
    both = theirs.state_dict()
    assert "transformer_blocks.0.attn.to_qkv.weight" in both
    _, again = DIFFUSERS.to_ours(dict(theirs.config), both)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    fused = FUSED.to_theirs(ours, args)[1]
    assert all(torch.equal(fused[name], both[name]) for name in fused)

    both = dict(both) | {"transformer_blocks.0.attn.to_qkv.bias": both["transformer_blocks.0.attn.to_qkv.bias"] + 1}
    with pytest.raises(UserError, match="differ"):
        DIFFUSERS.to_ours(dict(theirs.config), both)


def test_diffusers_loads_the_export_and_computes_the_same(tmp_path: Path) -> None:
    net = random_mmdit()
    folder = DIFFUSERS.write(tmp_path / "export", net.state_dict(), ARGS)
    theirs, report = diffusers.SD3Transformer2DModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x, t, cond = cond_and_inputs()
    with torch.no_grad():
        ours = net(x, t, cond)
        y = theirs(x, cond["text"], cond["pooled"], t * 1000.0).sample
    assert (ours - y).abs().max() < 1e-5 * y.abs().max()

    args, state = DIFFUSERS.read(folder)
    assert args == ARGS | {"patch_size": 2}
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_scales_of_the_conditions_go_into_the_exported_weights() -> None:
    scales = {"text_scale": 3.0, "pooled_scale": 20.0}
    net = random_mmdit(**scales)
    config, theirs = DIFFUSERS.to_theirs(net.state_dict(), ARGS | scales)
    args, state = DIFFUSERS.to_ours(config, theirs)
    plain = MMDiT(**args)
    plain.load_state_dict(state)
    x, t, cond = cond_and_inputs()
    with torch.no_grad():
        scaled, folded = net(x, t, cond), plain(x, t, cond)
        unscaled = random_mmdit()(x, t, cond)
    assert (scaled - folded).abs().max() < 1e-5 * scaled.abs().max()
    assert (scaled - unscaled).abs().max() > 1e-2 * scaled.abs().max()


def test_import_takes_a_pipeline_and_sharded_half_precision_weights(tmp_path: Path) -> None:
    net = random_mmdit()
    DIFFUSERS.write(tmp_path / "plain", net.state_dict(), ARGS)
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "plain", torch_dtype=torch.float16)
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="100KB")
    assert (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    _, state = DIFFUSERS.read(tmp_path / "pipeline")
    assert all(torch.equal(state[name], value.half()) for name, value in net.state_dict().items())


def test_folders_that_are_not_sd3_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        DIFFUSERS.read(tmp_path / "nowhere")
    folder = DIFFUSERS.write(tmp_path / "export", random_mmdit().state_dict(), ARGS)
    config = json.loads((folder / "config.json").read_text())

    def rewrite(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))

    for changes, words in (
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"dual_attention_layers": [1]}, "dual_attention_layers"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"out_channels": 8}, "out_channels"),
        ({"joint_attention_dim": 25}, "context_embedder.weight has shape"),
        ({"qk_norm": None}, "that the network does not have"),
        ({"num_layers": 3}, "norm1_context.linear.weight has shape"),
        ({"sample_size": 16}, "pos_embed"),
    ):
        rewrite(**changes)
        with pytest.raises(UserError, match=words):
            DIFFUSERS.read(folder)
    rewrite()
    DIFFUSERS.read(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable safetensors"):
        DIFFUSERS.read(folder)
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors"):
        DIFFUSERS.read(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(UserError, match="not a safetensors file of this folder"):
        DIFFUSERS.read(folder)


def test_what_diffusers_cannot_hold_is_refused() -> None:
    net = random_mmdit(mlp_ratio=2.0)
    with pytest.raises(UserError, match="mlp_ratio"):
        DIFFUSERS.to_theirs(net.state_dict(), ARGS | {"mlp_ratio": 2.0})
    with pytest.raises(UserError, match="does not fit"):
        DIFFUSERS.to_theirs({"nonsense": torch.zeros(1)}, ARGS)


def test_a_missing_tensor_is_named() -> None:
    config, theirs = DIFFUSERS.to_theirs(random_mmdit().state_dict(), ARGS)
    del theirs["transformer_blocks.1.attn.to_k.bias"]
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.attn\.to_k\.bias is missing"):
        DIFFUSERS.to_ours(config, theirs)


@pytest.fixture
def autoencoder(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, latent_channels=3, **blocks)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    return vae.eval()


def test_autoencoder_kl_folder(autoencoder: Any, tmp_path: Path) -> None:
    folder = AutoencoderKLFolder(tmp_path / "pipeline")
    assert (folder.latent_channels, folder.downsampling) == (3, 2)
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    moments = folder.encode(x)
    with torch.no_grad():
        posterior = autoencoder.encode(x).latent_dist
        assert moments.shape == (2, 6, 4, 6)
        assert torch.equal(moments[:, :3], posterior.mean)
        assert torch.equal(moments[:, 3:].clamp(-30, 20), posterior.logvar)
        assert torch.equal(folder.decode(posterior.mean), autoencoder.decode(posterior.mean).sample)
    with pytest.raises(ValueError, match="multiples of 2"):
        folder.encode(x[..., :7])


def test_autoencoder_kl_fingerprint_follows_weights_and_settings(autoencoder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline" / "vae"
    first = AutoencoderKLFolder(folder).fingerprint
    assert len(first) == 32

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0"}))
    assert AutoencoderKLFolder(folder).fingerprint == first
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert AutoencoderKLFolder(folder).fingerprint != first

    with torch.no_grad():
        autoencoder.decoder.conv_out.bias.add_(1e-3)
    autoencoder.save_pretrained(folder)
    assert AutoencoderKLFolder(folder).fingerprint != first


def test_autoencoder_kl_refuses_pickles_and_strangers(autoencoder: Any, tmp_path: Path) -> None:
    autoencoder.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(UserError, match="only safetensors"):
        AutoencoderKLFolder(tmp_path / "pickle")
    stranger = DIFFUSERS.write(tmp_path / "sd3", random_mmdit().state_dict(), ARGS)
    with pytest.raises(UserError, match="expected AutoencoderKL"):
        AutoencoderKLFolder(stranger)
