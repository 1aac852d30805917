"""Drawing where the hardware is: the command line names a cluster file, and a GPU draws what the CPU draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.engine.hardware import CPU, Hardware
from nexus_scale.generate.trained import Trained
from tests.distributed import nexus
from tests.generate.test_prompts import trained_on_made_up_data


def test_a_cluster_file_with_gpus_falls_back_with_one_line(tmp_path: Path) -> None:
    place = trained_on_made_up_data(tmp_path, "dit/tiny_cifar10")
    write_yaml(tmp_path / "gpus.yaml", {"name": "gpus", "workers": 0, "gpus_per_worker": 1, "precision": "bf16"})
    line = ["sample", str(place.run.path), "--prompt", "3", "--steps", "2", "--seed", "4", "--output"]
    code, said = nexus(tmp_path, *line, str(tmp_path / "own"))
    assert code == 0
    assert "torch finds none" not in said
    code, said = nexus(tmp_path, *line, str(tmp_path / "named"), "--cluster", "gpus.yaml", CUDA_VISIBLE_DEVICES="")
    assert code == 0, said
    assert (
        said.count("cluster gpus: workers have GPUs, but torch finds none here: computing on the CPU in float32") == 1
    )
    names = ["000_3.png", "grid.png"]
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == names
    assert (tmp_path / "own/000_3.png").read_bytes() == (tmp_path / "named/000_3.png").read_bytes(), "the same bits"
    code, said = nexus(tmp_path, *line, str(tmp_path / "x"), "--cluster", "nowhere")
    assert code == 2
    assert "nowhere: no such file" in said


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_gpu_draws_what_the_cpu_draws(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    place = trained_on_made_up_data(tmp_path, "mmdit/tiny_openmoji")
    on_cpu = Trained(place.run, place, hardware=CPU)
    on_gpu = Trained(place.run, place, hardware=Hardware(torch.device("cuda"), dtype))
    drawn = [trained.latents(trained.conditions(["red heart"]), seed=1, steps=2) for trained in (on_cpu, on_gpu)]
    assert drawn[1].device.type == "cuda"
    assert float((drawn[0] - drawn[1].cpu()).abs().max()) < tolerance * float(drawn[0].abs().max())
    (shown,) = on_gpu.medium.decode(drawn[1])
    assert shown.device.type == "cuda"
    assert on_gpu.medium.file(shown)
