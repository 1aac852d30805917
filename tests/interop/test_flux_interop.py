"""Flux to and from diffusers and the original release: to the bit, and the same latents from a diffusers pipeline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.flux import DIFFUSERS, ORIGINAL
from nexus_scale.interop.folders import write_json
from nexus_scale.interop.layout import SafetensorsFiles, reader
from nexus_scale.interop.schedulers import flow_match
from nexus_scale.models.diffusion.flux import Flux
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.run.runs import prepare_run
from nexus_scale.samplers.ode import ODE
from nexus_scale.train import Place
from tests.config.test_every_recipe import CALLBACKS, run_once

diffusers = pytest.importorskip("diffusers")

ARGS: dict[str, Any] = {
    "latent_channels": 4,
    "patch_size": 2,
    "hidden_size": 32,
    "depth_double": 2,
    "depth_single": 3,
    "num_heads": 2,
    "rope_dims": (4, 6, 6),
    "text_dim": 24,
    "pooled_dim": 20,
    "guidance_embed": True,
}
# as the release: heads of 128, so that its arguments can be read off the shapes
RELEASED: dict[str, Any] = ARGS | {"hidden_size": 256, "rope_dims": (16, 56, 56), "depth_single": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_flux(**changes: Any) -> Flux:
    torch.manual_seed(0)
    net = Flux(**(ARGS | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return net


def named(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of all keys."""
    return {key.removeprefix(ORIGINAL.prefix): tensor for key, tensor in original.items()}


def with_scheduler(folder: Path, net: Flux, args: dict[str, Any], shift: Any) -> Path:
    config = flow_match({}, {"name": "ode", "shift": shift}, (1, 4, net.latent_size, net.latent_size))
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    return DIFFUSERS.write(folder, net.state_dict(), args)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("changes", [{}, {"guidance_embed": False, "depth_single": 0}])
def test_round_trip_through_diffusers_is_exact(changes: dict[str, Any]) -> None:
    state = random_flux(**changes).state_dict()
    config, theirs = DIFFUSERS.to_theirs(state, ARGS | changes)
    args, back = DIFFUSERS.to_ours(json.loads(json.dumps(config)), theirs)
    assert args == ARGS | changes
    assert_same(back, state)

    model = diffusers.FluxTransformer2DModel.from_config(config)
    own = model.state_dict()
    args, ours = DIFFUSERS.to_ours(dict(model.config), own)
    assert_same(DIFFUSERS.to_theirs(ours, args)[1], own)


def test_diffusers_loads_the_export_and_ours_reads_it_back(tmp_path: Path) -> None:
    net = random_flux()
    shift = {"name": "exponential", "max_shift": 1.2}
    folder = with_scheduler(tmp_path / "export", net, ARGS, shift)
    model, report = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.use_dynamic_shifting and scheduler.config.max_shift == 1.2
    args, state = DIFFUSERS.read(folder)
    assert args == ARGS
    assert_same(state, net.state_dict())

    model.half().save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="100KB")
    assert (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    _, state = DIFFUSERS.read(tmp_path / "pipeline")
    assert_same(state, {name: value.half() for name, value in net.state_dict().items()})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_names_there_and_back_and_as_diffusers_reads_them(prefix: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    net = random_flux(**RELEASED)
    original = {
        f"{prefix}{key.removeprefix(ORIGINAL.prefix)}": tensor
        for key, tensor in ORIGINAL.to_theirs(net.state_dict(), RELEASED)[1].items()
    }
    args, back = ORIGINAL.to_ours(None, original)
    assert args == {key: RELEASED[key] for key in args} and "rope_dims" not in args
    assert_same(back, net.state_dict())
    assert Flux(**args).rope_dims == RELEASED["rope_dims"]

    # diffusers' converter knows the release's width alone: single blocks are left out
    single = {key: value for key, value in original.items() if "single_blocks" in key}
    rest = {key: value.clone() for key, value in original.items() if key not in single}
    width = {
        "linear1.weight": (3072 * 7, 1),
        "linear1.bias": (3072 * 7,),
        "linear2.weight": (1, 1),
        "linear2.bias": (1,),
    }
    stand_ins = {
        key: torch.zeros(next((s for end, s in width.items() if key.endswith(end)), value.shape))
        for key, value in single.items()
    }
    theirs = convert(rest | stand_ins)
    expected = DIFFUSERS.to_theirs(net.state_dict(), RELEASED)[1]
    assert theirs.keys() == expected.keys()
    own = {key for key in expected if not key.startswith("single_transformer_blocks")}
    assert_same({key: theirs[key] for key in own}, {key: expected[key] for key in own})

    save_file(original, tmp_path / "flux.safetensors")
    assert_same(ORIGINAL.read(tmp_path / "flux.safetensors")[1], net.state_dict())
    folder = ORIGINAL.write(tmp_path / "export", net.state_dict(), RELEASED)
    assert_same(load_file(folder / "flux1.safetensors"), ORIGINAL.to_theirs(net.state_dict(), RELEASED)[1])


@pytest.mark.slow
def test_single_blocks_are_as_diffusers_reads_the_release() -> None:
    """At the release's width, the only one that diffusers' converter knows: one double and one single block."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    args = {"depth_double": 1, "depth_single": 1, "text_dim": 8, "pooled_dim": 8, "latent_channels": 1}
    net = Flux(**args)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-1, 1)
    theirs = convert(dict(named(ORIGINAL.to_theirs(net.state_dict(), args)[1])))
    assert_same(theirs, DIFFUSERS.to_theirs(net.state_dict(), args)[1])


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_a_flux_pipeline_draws_the_same_latents(guidance_embed: bool, tmp_path: Path) -> None:
    """diffusers' own FluxPipeline, with its packing, its dynamic shift and its guidance, from the same noise."""
    steps, size = 6, (8, 12)
    args = ARGS | {"guidance_embed": guidance_embed}
    net = random_flux(guidance_embed=guidance_embed)
    shift = {"name": "exponential"} if guidance_embed else 1.0
    folder = with_scheduler(tmp_path / "export", net, args, shift)
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        transformer=diffusers.FluxTransformer2DModel.from_pretrained(folder, local_files_only=True),
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    noise, text, pooled = torch.randn(2, 4, *size), torch.randn(2, 5, 24), torch.randn(2, 20)
    theirs = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        latents=pipeline._pack_latents(noise, 2, 4, *size),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=3.5,
        output_type="latent",
    ).images
    theirs = pipeline._unpack_latents(theirs, size[0] * 8, size[1] * 8, 8)

    objective = Denoising(constants={"guidance": 3.5} if guidance_embed else {})
    sampler = ODE(steps=steps, shift=shift, spacing="trailing")
    with torch.no_grad():
        cond = objective.condition({"text": text, "pooled": pooled})  # type: ignore[arg-type]
        ours = sampler.sample(objective.predictor({"model": net}, cond), noise, path=objective.path)
    assert (ours - noise).std() > 0.1
    # relative to the way from the noise
    assert float((ours - theirs).norm() / (theirs - noise).norm()) < 1e-4


@pytest.mark.parametrize("kind", ["diffusers", "original"])
def test_pieces_are_read_from_files_without_the_whole(kind: str, tmp_path: Path) -> None:
    net = random_flux()
    state = net.state_dict()
    if kind == "diffusers":
        layout, tensors = DIFFUSERS.layout(net), DIFFUSERS.to_theirs(state, ARGS)[1]
    else:
        layout, tensors = ORIGINAL.layout(net), named(ORIGINAL.to_theirs(state, ARGS)[1])
    names = sorted(tensors)
    save_file({n: tensors[n].contiguous() for n in names[::2]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n].contiguous() for n in names[1::2]}, tmp_path / "b.safetensors")
    with SafetensorsFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]) as files:
        read = reader(layout, files, "weights")
        for name, expected in state.items():
            flat = expected.flatten()
            cuts = sorted({0, 1, len(flat) // 3, len(flat) // 2 + 1, len(flat)})
            for start, stop in itertools.pairwise(cuts):
                assert torch.equal(read(name, start, stop), flat[start:stop]), (name, start, stop)
        with pytest.raises(ValueError, match="asked for"):
            read("patch_embed.bias", 0, 33)
    with pytest.raises(UserError, match="is missing"), SafetensorsFiles([tmp_path / "a.safetensors"]) as files:
        reader(layout, files, "weights")
    with pytest.raises(UserError, match="another file"):
        SafetensorsFiles([tmp_path / "a.safetensors", tmp_path / "a.safetensors"])


def test_checkpoints_that_are_not_flux_are_refused(tmp_path: Path) -> None:
    folder = DIFFUSERS.write(tmp_path / "export", random_flux().state_dict(), ARGS)
    config = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ({"patch_size": 2}, "patch_size"),
        ({"in_channels": 18}, "in_channels"),
        ({"out_channels": 8}, "out_channels"),
        ({"joint_attention_dim": 25}, "context_embedder.weight has shape"),
        ({"num_layers": 3}, "is missing"),
        ({"num_single_layers": 2}, "the network does not have"),
        ({"axes_dims_rope": [4, 6, 4]}, "rope_dims"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            DIFFUSERS.read(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable safetensors"):
        DIFFUSERS.read(folder)
    with pytest.raises(UserError, match=r"img_in\.weight is missing"):
        ORIGINAL.to_ours(None, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="heads are 16 wide"):
        ORIGINAL.to_ours(None, ORIGINAL.to_theirs(random_flux().state_dict(), ARGS)[1])
    for name, value in (("patch_size", 1), ("mlp_ratio", 2.0), ("rope_theta", 100.0)):
        net = random_flux(**{name: value})
        with pytest.raises(UserError, match=name):
            DIFFUSERS.to_theirs(net.state_dict(), ARGS | {name: value})
    with pytest.raises(UserError, match="does not fit"):
        DIFFUSERS.to_theirs({"nonsense": torch.zeros(1)}, ARGS)


def test_a_run_is_exported_for_diffusers_and_under_the_original_names(tmp_path: Path) -> None:
    run_once("flux/tiny_openmoji", tmp_path / "run")
    recipe = recipes.load_recipe("flux/tiny_openmoji", {"callbacks": CALLBACKS}, tiny=True)
    cluster = recipes.cluster_from({"workers": 0}, "test")
    prepare_run(RunFolder(tmp_path / "run"), recipe, cluster)
    place = Place(RunFolder(tmp_path / "run"), tmp_path / "data", tmp_path)
    net = Trained(place.run, place).nets["model"]
    folder = evaluate.export_run(place, "diffusers", tmp_path / "export")
    args, state = DIFFUSERS.read(folder)
    assert_same(state, dict(net.state_dict()))
    assert Flux(**args).depth_single == net.depth_single
    assert diffusers.FluxTransformer2DModel.from_pretrained(folder, local_files_only=True).config.num_layers == 1
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert not scheduler.config.use_dynamic_shifting and scheduler.config.shift == 1.0

    folder = evaluate.export_run(place, "original", tmp_path / "original")
    assert_same(ORIGINAL.read(folder / "flux1.safetensors", args)[1], dict(net.state_dict()))
    assert "| flux | `model.diffusion_model.` |" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="--format onnx: flux is exported as diffusers or original"):
        evaluate.export_run(place, "onnx", tmp_path / "x")
