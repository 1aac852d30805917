"""DiT to and from diffusers: to the bit, through folders that diffusers loads, and the same samples in its own pipeline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Guidance, UserError
from nexus_scale.generate.drawing import guidance_of, request_of
from nexus_scale.interop.dit import DIFFUSERS, PIPELINE_CLASSES, scheduler_config, widened
from nexus_scale.interop.folders import write_json
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.objectives.denoising import Denoising

diffusers = pytest.importorskip("diffusers")

ARGS: dict[str, Any] = {
    "latent_channels": 4,
    "latent_size": 8,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_dit(**changes: Any) -> DiT:
    torch.manual_seed(0)
    net = DiT(**(ARGS | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return net.eval()


@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "depth": 3}, {"patch_size": 4, "mlp_norm_eps": 1e-5}])
def test_round_trip_is_exact(changes: dict[str, Any]) -> None:
    state = random_dit(**changes).state_dict()
    config, theirs = DIFFUSERS.to_theirs(state, ARGS | changes)
    args, back = DIFFUSERS.to_ours(json.loads(json.dumps(config)), theirs)
    assert args == {**ARGS, "learn_sigma": True, "mlp_norm_eps": 1e-6, **changes}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_diffusers_loads_the_export_and_computes_the_same(tmp_path: Path) -> None:
    net = random_dit()
    folder = DIFFUSERS.write(tmp_path / "export", net.state_dict(), ARGS)
    theirs, report = diffusers.DiTTransformer2DModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, step, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        y = theirs.eval()(x, step, label).sample
        ours = net(x, (step + 1) / 1000, {"label": label})
    assert (ours - y).abs().max() < 1e-5 * y.abs().max()
    args, state = DIFFUSERS.read(folder)
    assert args["num_classes"] == 10
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_import_takes_a_pipeline_and_half_precision_shards(tmp_path: Path) -> None:
    net = random_dit()
    DIFFUSERS.write(tmp_path / "plain", net.state_dict(), ARGS)
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "plain", torch_dtype=torch.float16)
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="100KB")
    _, state = DIFFUSERS.read(tmp_path / "pipeline")
    assert all(torch.equal(state[name], value.half()) for name, value in net.state_dict().items())


def test_embedders_that_were_trained_apart_are_refused() -> None:
    torch.manual_seed(3)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    with pytest.raises(UserError, match=r"timestep_embedder.linear_1.weight of block 1 differs"):
        DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())


def test_what_is_not_dit_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        DIFFUSERS.read(tmp_path / "nowhere")
    folder = DIFFUSERS.write(tmp_path / "export", random_dit().state_dict(), ARGS)
    config = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ({"out_channels": 5}, "out_channels"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"num_embeds_ada_norm": 11}, "embedding_table.weight has shape"),
        ({"num_layers": 1}, "that the network does not have"),
        ({"num_layers": 3}, "is missing"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            DIFFUSERS.read(folder)
    for changes, words in (({"mlp_ratio": 2.0}, "mlp_ratio"), ({"frequency_shift": 0}, "frequency_shift")):
        with pytest.raises(UserError, match=words):
            DIFFUSERS.to_theirs(random_dit(**changes).state_dict(), ARGS | changes)
    with pytest.raises(UserError, match="does not fit"):
        DIFFUSERS.to_theirs({"nonsense": torch.zeros(1)}, ARGS)


# ------------------------------------------------------------------------------------------- diffusers' pipeline


class Keeper:
    """Stands for the pipeline's autoencoder and keeps the latents that it was to decode."""

    config = SimpleNamespace(scaling_factor=1.0)
    latents: Tensor

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents
        return SimpleNamespace(sample=latents[:, :3])


@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_diffusers_pipeline_draws_the_same(target: str, guidance: float, tmp_path: Path) -> None:
    """DiTPipeline with our export and its scheduler: ten classes, though it knows no class as number 1000 alone."""
    recipe = recipes.load_recipe(
        "dit/tiny_fashion_mnist",
        {"objective": {"target": target, "input": "moments"}, "sample": {"steps": 20, "guidance": guidance}},
        tiny=True,
    )
    assert recipe.sample is not None
    net = random_dit()
    folder = DIFFUSERS.write(tmp_path / "export", *widened(net.state_dict(), ARGS))
    config = scheduler_config(recipe.objective.arguments, recipe.sample.arguments)
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder).eval()
    assert transformer.config.num_embeds_ada_norm == PIPELINE_CLASSES
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    keeper = Keeper()
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=keeper, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    labels = [3, 0, 9]
    pipeline(
        labels, guidance_scale=guidance, num_inference_steps=20, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip

    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    objective = Denoising(**{**recipe.objective.arguments, "conditions": ("label",)})

    class Given(ProgressRng):
        def normal(self, name: str, shape: Any) -> Tensor:
            return noise

    request = dataclasses.replace(request_of(recipe, objective), shape=tuple(noise.shape[1:]))
    with torch.no_grad():
        rng = Given(0, 0, "sample", torch.arange(3))
        ours = objective.generate({"model": net}, {"label": torch.tensor(labels)}, request, rng).samples
    assert float((ours - keeper.latents).abs().max() / (ours - noise).abs().max()) < 1e-4


def test_a_recipe_that_the_pipeline_cannot_walk_has_no_scheduler() -> None:
    with pytest.raises(UserError, match=r"walks DDPM's linear steps.*this recipe has path"):
        scheduler_config({"path": "rectified_flow", "target": "velocity"}, {})
    config = scheduler_config({"path": {"name": "ddpm_linear", "beta_end": 0.01}, "target": "eps"}, {"clip": True})
    assert config["beta_end"] == 0.01 and config["clip_sample"]


# --------------------------------------------------------------------------------------------- a trained run


def test_guidance_as_a_number_or_for_some_channels() -> None:
    assert guidance_of(4) == Guidance(4.0) and guidance_of({"scale": 1.5, "channels": 3}) == Guidance(1.5, 3)
    assert guidance_of({"scale": 4, "interval": [0.2, 0.8]}) == Guidance(4.0, interval=(0.2, 0.8))
    for wrong in ({"scal": 4.0}, "four", {"channels": 0}):
        with pytest.raises(UserError, match=r"scale: 4\.0, channels: 3"):
            guidance_of(wrong)  # type: ignore[arg-type]
    for pair in ([0.8, 0.2], [0.2], 0.5, [-1, 0.5], [0, float("nan")]):
        with pytest.raises(UserError, match=r"interval: got .* expected \[low, high\]"):
            guidance_of({"scale": 4.0, "interval": pair})


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in() -> None:
    """With noise on the way, too."""
    recipe = recipes.load_recipe(
        "dit/tiny_fashion_mnist",
        {"objective": {"input": "moments"}, "sample": {"steps": 6, "variance": "learned", "guidance": 3.0}},
        tiny=True,
    )
    objective = Denoising(**{**recipe.objective.arguments, "conditions": ("label",)})
    net, label = random_dit(), torch.tensor([1, 2, 3, 4])

    def draw(positions: Tensor) -> Tensor:
        rng = ProgressRng(0, 0, "sample", positions)
        request = dataclasses.replace(request_of(recipe, objective), shape=(4, 8, 8))
        with torch.no_grad():
            return objective.generate({"model": net}, {"label": label[positions]}, request, rng).samples

    whole = draw(torch.arange(4))
    assert whole.isfinite().all() and whole.std() > 0.1
    for part in torch.arange(4).split(2):
        torch.testing.assert_close(draw(part), whole[part], rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    assert not torch.equal(draw(torch.arange(4) + 0)[0], draw(torch.tensor([1, 0, 2, 3]))[0])
