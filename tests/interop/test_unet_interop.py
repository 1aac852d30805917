"""UNet and UNetCondition to and from diffusers: to the bit, through folders that it loads, and the same samples in its DDPMPipeline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import UserError
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.export import export_run
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.init_from import opened
from nexus_scale.interop.schedulers import chain
from nexus_scale.interop.unet import DIFFUSERS
from nexus_scale.interop.unet_condition import DIFFUSERS as CONDITION
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.diffusion.unet import UNet
from nexus_scale.models.diffusion.unet_condition import UNetCondition, guidance_sinusoids
from tests.generate.test_prompts import trained_on_made_up_data

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
        ({"path": {"name": "scaled_linear", "snr_shift": 3.0}, "target": "v"}, {"variance": "small"}),
        ({"path": {"name": "ddpm_linear", "steps": 100}, "target": "v"}, {"variance": "small"}),
    ):
        with pytest.raises(UserError, match=r"[sS]cheduler"):
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


# --------------------------------------------------------------------------------------------- a trained run


class InOrder(ProgressRng):
    """Draws noise from one generator of torch, as pipelines do."""

    def __init__(self, count: int, seed: int):
        super().__init__(0, 0, "sample", torch.arange(count))
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, shape: Any) -> torch.Tensor:
        return torch.randn(len(self.positions), *shape, generator=self.generator)


@pytest.mark.parametrize(
    "sample", [{"variance": "none"}, {"variance": "small"}, {"variance": "learned"}], ids=lambda s: s["variance"]
)  # fmt: skip
def test_diffusers_pipeline_draws_what_a_trained_run_draws(sample: dict[str, Any], tmp_path: Path) -> None:
    """Behind a clipped sample, too. One of its habits is not ours: it adds the larger variance in the last of fewer than 1000 steps."""
    learned = sample["variance"] == "learned"
    changed = {
        "sample": {"steps": 5, **sample},
        "objective": {"variance": "learned" if learned else "fixed"},
        "networks": {"model": {"learn_sigma": learned}},
    }
    place = trained_on_made_up_data(tmp_path, "ddpm/tiny_cifar10", **changed)
    folder = export_run(place)
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipeline(batch_size=3, num_inference_steps=5, generator=generator, output_type="np").images

    trained = Trained(place.run, place)
    request = dataclasses.replace(request_of(trained.recipe, trained.objective), shape=(3, 8, 8))
    with torch.no_grad():
        ours = trained.objective.generate(trained.nets, {}, request, InOrder(3, 5)).samples
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


def test_a_network_that_is_told_classes_is_exported_alone(tmp_path: Path) -> None:
    folder = export_run(trained_on_made_up_data(tmp_path, "ddpm/tiny_fashion_mnist"))
    assert not (folder / "model_index.json").exists()
    assert "told label, and DDPMPipeline tells nothing" in (folder / "README.md").read_text()
    assert diffusers.UNet2DModel.from_pretrained(folder).config.num_class_embeds == 10


def test_students_and_inpainting_begin_with_the_published_network(tmp_path: Path) -> None:
    """What is told a guidance scale, or given more channels, answers as the network that it begins with until it learns."""
    args: dict[str, Any] = {
        "latent_size": 8, "widths": (8, 16), "depth": 1, "transformer_depth": (1, 0), "num_heads": 2, "text_dim": 6, "num_groups": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    teacher = UNetCondition(**args).eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    CONDITION.write(tmp_path / "unet", teacher.state_dict(), args)
    spec = InitFrom(format="diffusers", path=str(tmp_path))
    x, t, cond = (
        torch.randn(2, 4, 8, 8),
        torch.rand(2),
        {"text": torch.randn(2, 3, 6), "guidance": torch.tensor([1.0, 8.0])},
    )
    expected = teacher(x, t, cond)
    for changes in ({"guidance_dim": 8}, {"beside_channels": 5, "dropout": 0.5}):
        student = UNetCondition(**args | changes).eval()
        student.init_weights()
        with opened(spec, student, tmp_path) as read, torch.no_grad():
            for name, p in student.named_parameters():
                if not name.startswith("guide_embed"):  # starts fresh, at zero
                    half = p.numel() // 2
                    p.copy_(torch.cat((read(name, 0, half), read(name, half, p.numel()))).view(p.shape))
        beside = torch.randn(2, student.beside_channels, 8, 8)
        torch.testing.assert_close(student(torch.cat((x, beside), 1), t, cond), expected, rtol=1e-5, atol=1e-5)
    other = UNetCondition(**args | {"guidance_dim": 8, "num_heads": 4})
    with pytest.raises(UserError, match=r"num_heads is \(2, 2\) there"), opened(spec, other, tmp_path):
        pass
