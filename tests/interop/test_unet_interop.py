"""UNet and UNetCondition to and from diffusers: to the bit, through folders that it loads, and the same samples in its DDPMPipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.schedulers import chain
from nexus_scale.interop.unet import DIFFUSERS
from nexus_scale.interop.unet_condition import DIFFUSERS as CONDITION
from nexus_scale.models.diffusion.unet import UNet
from nexus_scale.models.diffusion.unet_condition import UNetCondition, guidance_sinusoids

diffusers = pytest.importorskip("diffusers")

ARGS: dict[str, Any] = {"latent_size": 8, "widths": (8, 16), "depth": 1, "num_groups": 4}
ADM: dict[str, Any] = {
    "num_classes": 3, "learn_sigma": True, "scale_shift": True, "resnet_resample": True, "head_dim": 8, "norm_eps": 1e-5,
}  # fmt: skip


def random_unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(**(ARGS | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return net.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"downsample_padding": 0, "frequency_shift": 1, "sin_first": True, "dropout": 0.1, "attention": (0, 1)},
        {"attention": (), "mid_attention": False, "time_dim": 24},
        ADM,
        {**ADM, "mid_attention_norm": False},
    ],
)
def test_round_trip_is_exact_and_diffusers_computes_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    net = random_unet(**changes)
    folder = DIFFUSERS.write(tmp_path / "export", net.state_dict(), ARGS | changes)
    theirs, report = diffusers.UNet2DModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, step, label = torch.randn(3, 3, 8, 4), torch.tensor([0, 400, 999]), torch.tensor([1, 0, 2])
    with torch.no_grad():
        y = theirs.eval()(x, step, class_labels=label if net.num_classes else None).sample
        ours = net(x, (step + 1) / 1000, {"label": label})
    assert (ours - y).abs().max() < 1e-5 * y.abs().max()
    args, state = DIFFUSERS.read(folder)
    assert all(getattr(UNet(**args), name) == getattr(net, name) for name in args)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_old_names_and_other_spellings_of_one_network_are_read(tmp_path: Path) -> None:
    net = random_unet(attention=(0, 1))
    config, theirs = DIFFUSERS.to_theirs(net.state_dict(), {**ARGS, "attention": (0, 1)})
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        theirs = {key.replace(f".{new}.", f".{name}."): value for key, value in theirs.items()}
    changes = {
        "sample_size": [8, 8],
        "time_embedding_dim": 32,
        "attn_norm_num_groups": 4,
        "mid_block_scale_factor": 1.0,
    }
    args, state = DIFFUSERS.to_ours(json.loads(json.dumps(config | changes)), theirs)
    assert args["latent_size"] == 8
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_what_we_have_not_is_refused() -> None:
    config, _ = DIFFUSERS.to_theirs(random_unet().state_dict(), ARGS)
    for changes, words in (
        ({"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]}, "down_block_types"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, "some by a convolution"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"sample_size": [8, 16]}, "sample_size"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"out_channels": 4}, "out_channels"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
    ):
        with pytest.raises(UserError, match=words):
            DIFFUSERS.model_args(config | changes)
    net = random_unet(mid_attention_norm=False)
    with pytest.raises(UserError, match="mid_attention_norm"):
        DIFFUSERS.to_theirs(net.state_dict(), {**ARGS, "mid_attention_norm": False})
    for recipe, sample in (
        ({"path": "rectified_flow", "target": "velocity"}, {}),
        ({"path": "ddpm_linear", "target": "eps"}, {"name": "dpm"}),
        ({"path": "ddpm_linear", "target": "eps"}, {"variance": "learned"}),
        ({"path": "ddpm_linear", "target": "eps", "variance": "learned"}, {"variance": "small"}),
    ):
        with pytest.raises(UserError, match="DDPMScheduler"):
            chain(recipe, sample)


def test_diffusers_loads_the_unets_of_stable_diffusion_and_computes_the_same(tmp_path: Path) -> None:
    """Of XL's kind, with the guidance scale of LCM; from a pipeline's folder in half precision it comes back as it was."""
    args: dict[str, Any] = {
        "latent_size": 8, "widths": (8, 16), "depth": 1, "transformer_depth": (0, 2), "middle_depth": 2, "num_heads": (1, 2), "text_dim": 6,
        "pooled_dim": 4, "size_frequencies": 8, "guidance_dim": 8, "num_groups": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    net = UNetCondition(**args).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((torch.randn(p.shape) * 0.2).half())
    folder = CONDITION.write(tmp_path / "export", net.state_dict(), args)
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, text, pooled, numbers = torch.randn(2, 4, 8, 6), torch.randn(2, 3, 6), torch.randn(2, 4), torch.rand(2, 6) * 1024
    cond = {"text": text, "pooled": pooled, "guidance": torch.tensor([2.0, 8.0])}
    cond |= {name: numbers[:, 2 * i : 2 * i + 2] for i, name in enumerate(net.sizes)}
    with torch.no_grad():
        y = theirs.eval()(
            x, torch.tensor([0, 999]), text, timestep_cond=guidance_sinusoids(cond["guidance"], 8),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": numbers},
        ).sample  # fmt: skip
        ours = net(x, torch.tensor([0.001, 1.0]), cond)
    assert (ours - y).abs().max() < 1e-5 * y.abs().max()
    theirs.half().save_pretrained(tmp_path / "pipeline" / "unet", max_shard_size="20KB")
    read, state = CONDITION.read(tmp_path / "pipeline")
    again = UNetCondition(**read)
    assert all(getattr(again, name) == getattr(net, name) for name in args)
    assert all(torch.equal(state[name].float(), value) for name, value in net.state_dict().items())
