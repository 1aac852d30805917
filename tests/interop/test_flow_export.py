"""A flow that was exported draws the same in diffusers, and is drawn from here again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.generate.export import export_run
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.published import family
from nexus_scale.interop.schedulers import of_noise_alone
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data

diffusers = pytest.importorskip("diffusers")


def test_flow_matching_draws_the_same_in_diffusers_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = trained_on_made_up_data(tmp_path, "flow_matching/cifar10")
    trained = Trained(place.run, place)
    ours = trained.latents({}, seed=3, positions=[0, 1])
    noise = ProgressRng(3, 0, "sample", torch.arange(2)).normal("noise", trained.shape)
    folder = export_run(place, output=tmp_path / "export")
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder, local_files_only=True)
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *args, **kwargs: noise)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=2, num_inference_steps=4, output_type="np").images
    seen = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(seen, torch.from_numpy(theirs), atol=1e-5, rtol=0)

    again = Trained(RunFolder(folder), Place(RunFolder(folder), place.data_root, place.runs_root))
    torch.testing.assert_close(again.latents({}, seed=3, positions=[0, 1]), ours, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("sample", "words"),
    [({"name": "ode", "method": "heun"}, "heun"), ({"name": "ode", "spacing": "trailing"}, "trailing"), ({"name": "dpm"}, "dpm")],
)  # fmt: skip
def test_walks_that_its_scheduler_does_not_take_are_named(sample: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        of_noise_alone({"path": "rectified_flow", "target": "velocity"}, sample, (1, 3, 8, 8))


def test_a_network_that_would_be_told_another_step_has_no_scheduler() -> None:
    """It would draw, and a thousandth off all the way."""
    flow, ddpm = {"path": "rectified_flow", "target": "velocity"}, {"path": "ddpm_linear", "target": "eps"}
    for name, objective, sample, counts in (
        ("unet", flow, {"name": "ode"}, False),
        ("unet", ddpm, {"name": "ancestral", "variance": "small"}, True),
        ("unet_condition", ddpm, {"name": "ddim", "spacing": "leading"}, True),
    ):
        of = {told: family(name).pipeline_of({"counts_steps": told}) for told in (False, True)}
        right, wrong = of[counts], of[not counts]
        assert right is not None and right.scheduler is not None and right.scheduler(objective, sample, (1, 3, 8, 8))
        assert wrong is not None and wrong.scheduler is not None
        with pytest.raises(UserError, match=f"counts_steps: {str(counts).lower()}"):
            wrong.scheduler(objective, sample, (1, 3, 8, 8))
