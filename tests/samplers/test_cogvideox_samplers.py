"""CogVideoX's schedule and samplers against diffusers' schedulers, step by step, and the export that diffusers draws from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.cogvideox import DIFFUSERS, scheduler_config
from nexus_scale.interop.folders import write_json
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.diffusion.cogvideox import CogVideoX
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.chains import ScaledLinear
from nexus_scale.processes.gaussian import recover
from nexus_scale.processes.guidance import guide_batched
from nexus_scale.processes.paths import find_path
from nexus_scale.samplers.ancestral import Ancestral
from nexus_scale.samplers.dpm import DPM

diffusers = pytest.importorskip("diffusers")

PATHS = {"2b": ScaledLinear(snr_shift=3.0), "5b": ScaledLinear(snr_shift=1.0)}
ARGS: dict[str, Any] = {
    "latent_channels": 4,
    "latent_frames": 3,
    "latent_height": 4,
    "latent_width": 6,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "text_dim": 24,
    "text_tokens": 5,
    "time_dim": 16,
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral": {"name": "ancestral", "variance": "none", "spacing": "trailing"},
    "dpm": {"name": "dpm"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def objective(path: ScaledLinear) -> dict[str, Any]:
    return {"path": {"name": "scaled_linear", "snr_shift": path.snr_shift}, "target": "v"}


def make_sampler(name: str, steps: int) -> Any:
    return DPM(steps=steps) if name == "dpm" else Ancestral(steps=steps, variance="none", spacing="trailing")


def scheduler(name: str, path: ScaledLinear) -> Any:
    config = scheduler_config(objective(path), SAMPLERS[name])
    return getattr(diffusers, config["_class_name"]).from_config(config)


def rng(count: int) -> ProgressRng:
    return ProgressRng(0, 0, "sample", torch.arange(count), torch.device("cpu"))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_path_is_the_schedule_of_diffusers(path: ScaledLinear) -> None:
    alpha_bar = scheduler("dpm", path).alphas_cumprod
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(path.alpha(t).square(), alpha_bar, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(path.sigma(t).square(), 1 - alpha_bar, rtol=1e-9, atol=1e-15)
    assert path.alpha(torch.tensor(1.0)) == 0, "the last step has no signal"
    assert path.alpha(torch.tensor(0.0)) == 1


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives_of_the_path(path: ScaledLinear) -> None:
    t = torch.tensor([0.0105, 0.2503, 0.7777, 0.9995], dtype=torch.float64)
    step = 1e-7
    for value, slope in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        torch.testing.assert_close((value(t + step) - value(t - step)) / (2 * step), slope(t), rtol=1e-5, atol=1e-6)


def answer(x: Tensor, t: Tensor) -> Tensor:
    """A network's v that depends on all it is given."""
    return torch.sin(3 * x + t.view(-1, 1, 1, 1, 1)) + 0.3 * x.roll(1, dims=2)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_the_scheduler(
    name: str, steps: int, path: ScaledLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_T = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    ours: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return recover(x, answer(x, t), "v", path, t)

    sampler = make_sampler(name, steps)
    sampler.sample(denoise, x_T, path=path, rng=rng(2), callback=lambda i, t, x, x0: ours.append(x.clone()))

    theirs = scheduler(name, path)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == (sampler.times(path)[:-1] * 1000 - 1).round().tolist()
    old, back = None, None
    for i, step in enumerate(theirs.timesteps):
        t = (step + 1).float().expand(2) / 1000
        x = (ours[i - 1] if i else x_T).double()  # each step from where ours began: no error is carried on
        v = answer(x, t)
        if name == "dpm":
            noise = rng(2).normal(f"noise_{i}", x.shape[1:]).double()
            monkeypatch.setattr("diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", lambda *a, **k: noise)  # noqa: B023
            x, old = theirs.step(v, old, step, back, x, return_dict=False)
            back = step
        else:
            x = theirs.step(v, step, x, return_dict=False)[0]
        assert (ours[i] - x).abs().max() < 1e-5 * x.abs().max(), f"step {i}"


def random_net(**changes: Any) -> CogVideoX:
    torch.manual_seed(0)
    net = CogVideoX(**(ARGS | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * (0.1 if p.dim() == 1 else p[0].numel() ** -0.5))
    return net


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_diffusers_pipeline_draws_the_same_latents(
    name: str, positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CogVideoXPipeline on our export, ten steps under guidance, from the same noise."""
    path, steps, scale = PATHS["2b"], 10, 6.0
    net = random_net(positions=positions)
    wanted = scheduler_config(objective(path), SAMPLERS[name])
    folder = DIFFUSERS.write(tmp_path / "transformer", net.state_dict(), net_args(positions))
    write_json(folder / "scheduler" / "scheduler_config.json", wanted)
    (folder / "scheduler").rename(tmp_path / "scheduler")
    transformer, report = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    steps_of = getattr(diffusers, wanted["_class_name"]).from_pretrained(tmp_path / "scheduler")
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    pipeline = diffusers.CogVideoXPipeline(None, None, vae, transformer, steps_of)
    pipeline.set_progress_bar_config(disable=True)

    text = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    x_T = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    given = Denoising(conditions=("text",), **objective(path))
    cond = {"text": text}
    with torch.no_grad():
        denoise = guide_batched(lambda c: given.predictor({"model": net}, c), cond, given.null_condition(cond), scale)
        ours = make_sampler(name, steps).sample(denoise, x_T, path=path, rng=rng(2))

    # a second-order step draws twice and uses the second draw: give it the same twice
    draws = iter([i for i in range(steps) for _ in range(1 if i in (0, steps - 1) else 2)])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
        lambda *_, **__: rng(2).normal(f"noise_{next(draws)}", x_T.shape[1:]).transpose(1, 2),
    )
    theirs = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=x_T.transpose(1, 2),
        output_type="latent",
        max_sequence_length=5,
    ).frames.transpose(1, 2)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def net_args(positions: str) -> dict[str, Any]:
    return ARGS | {"positions": positions}


# ------------------------------------------------------------------------------------------ weights, in and out


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "depth": 3, "patch_size": 1}])
def test_round_trip_is_exact(changes: dict[str, Any]) -> None:
    state = random_net(**changes).state_dict()
    config, theirs = DIFFUSERS.to_theirs(state, ARGS | changes)
    args, back = DIFFUSERS.to_ours(json.loads(json.dumps(config)), theirs)
    assert args.items() >= (ARGS | changes).items()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert set(theirs) == set(diffusers.CogVideoXTransformer3DModel.from_config(config).state_dict())


def test_import_takes_a_pipeline_and_sharded_half_precision_weights(tmp_path: Path) -> None:
    net = random_net()
    DIFFUSERS.write(tmp_path / "plain", net.state_dict(), ARGS)
    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "plain", torch_dtype=torch.float16)
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="50KB")
    assert (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    _, state = DIFFUSERS.read(tmp_path / "pipeline")
    assert all(torch.equal(state[name], value.half()) for name, value in net.state_dict().items())


def test_what_is_not_cogvideox_is_refused(tmp_path: Path) -> None:
    config, theirs = DIFFUSERS.to_theirs(random_net().state_dict(), ARGS)
    with pytest.raises(UserError, match="patch_size_t is 2"):
        DIFFUSERS.to_ours(config | {"patch_size_t": 2}, theirs)
    with pytest.raises(UserError, match="not have, among them extra"):
        DIFFUSERS.to_ours(config, theirs | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"proj_out\.bias is missing"):
        DIFFUSERS.to_ours(config, {name: t for name, t in theirs.items() if name != "proj_out.bias"})
    with pytest.raises(UserError, match="sizes of the network make it"):
        DIFFUSERS.to_ours(config | {"text_embed_dim": 20}, theirs)
    with pytest.raises(UserError, match="mlp_ratio 4"):
        DIFFUSERS.to_theirs(random_net(mlp_ratio=2.0).state_dict(), ARGS | {"mlp_ratio": 2.0})
    with pytest.raises(UserError, match="RectifiedFlow"):
        scheduler_config({"path": "rectified_flow", "target": "velocity"}, {"name": "dpm"})
    with pytest.raises(UserError, match="DDIM"):
        scheduler_config(objective(PATHS["2b"]), {"name": "ode"})
    with pytest.raises(UserError, match="snr_shift"):
        find_path({"name": "scaled_linear", "snr_shift": 0.0})
