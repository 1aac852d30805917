"""What k-diffusion 0.1.1's samplers compute with a known denoiser and known noise: `python -m tests.golden.k_diffusion FOLDER`.

FOLDER holds that wheel, unpacked; what its sampling.py imports and the samplers here do not use is stood in for, and nothing of it is
installed. Writes k_diffusion.npz beside this file: by case and number of steps, the denoiser's answer in each step and at last x, which it
begins with sigma_max times noise.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.paths import EDM

FILE = Path(__file__).with_suffix(".npz")
STEPS = (1, 4, 7, 13, 20, 50)
PATH = EDM()
CHURN = {"s_churn": 12.0, "s_tmin": 0.05, "s_tmax": 40.0, "s_noise": 1.007}
SDE = {"order": 3, "method": "heun", "lower_order_final": False}
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "euler": ("euler", CHURN, "sample_euler", CHURN),
    "heun": ("heun", {}, "sample_heun", {}),
    "heun_churn": ("heun", CHURN, "sample_heun", CHURN),
    "midpoint_churn": ("midpoint", CHURN, "sample_dpm_2", CHURN),
    "lms": ("lms", {}, "sample_lms", {}),
    "euler_ancestral": ("euler_ancestral", {"eta": 0.6}, "sample_euler_ancestral", {"eta": 0.6}),
    "2m": ("dpm_multistep", {"lower_order_final": False}, "sample_dpmpp_2m", {}),
    "2m_sde": ("dpm_multistep", {"lower_order_final": False, "eta": 1.0}, "sample_dpmpp_2m_sde", {}),
    "2m_sde_heun": (
        "dpm_multistep",
        {"lower_order_final": False, "eta": 0.5, "method": "heun"},
        "sample_dpmpp_2m_sde",
        {"eta": 0.5, "solver_type": "heun"},
    ),
    "3m_sde": ("dpm_multistep", {**SDE, "eta": 1.0}, "sample_dpmpp_3m_sde", {}),
    "3m_sde_half": ("dpm_multistep", {**SDE, "eta": 0.5}, "sample_dpmpp_3m_sde", {"eta": 0.5}),
}
"""By name: our sampler and its settings, and theirs."""


def denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """An answer that depends on all that it is given; sigma (B,)."""
    level = 1 + sigma[:, None]
    return 0.8 * torch.tanh(x / level) + 0.3 * x.roll(1, -1) / level**2


def x_T() -> Tensor:
    return torch.tensor([[0.6, -1.3, 0.2]], dtype=torch.float64)


def sampler_of(case: str, steps: int) -> Any:
    name, settings, _, _ = CASES[case]
    return registry.find("samplers", name)(steps=steps, **settings)


def steps_of(case: str) -> tuple[int, ...]:
    """Their SDEs cannot take one step."""
    return STEPS[1:] if "_sde" in case else STEPS


def rng() -> ProgressRng:
    return ProgressRng(0, 0, "draw", torch.arange(1), torch.device("cpu"))


def sampling(folder: Path) -> Any:
    """Their module."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(folder / "k_diffusion")]
    stand_ins = {
        "k_diffusion": package,
        "k_diffusion.utils": types.SimpleNamespace(append_dims=lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]),
        "torchdiffeq": types.SimpleNamespace(odeint=None),
        "torchsde": types.SimpleNamespace(),
    }
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    package.utils = stand_ins["k_diffusion.utils"]  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", folder / "k_diffusion" / "sampling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def computed(module: Any, case: str, steps: int) -> np.ndarray:
    """(steps + 1, 3) float64."""
    _, _, function, settings = CASES[case]
    sigmas = torch.tensor([point.sigma for point in sampler_of(case, steps).points(PATH)], dtype=torch.float64)
    rows: list[Tensor] = []
    drawn = iter(range(10**6))

    def noise(*_: Any) -> Tensor:
        return rng().normal(f"noise_{next(drawn)}", (3,)).double()

    own = {} if function in ("sample_lms", "sample_dpmpp_2m") or "s_churn" in settings else {"noise_sampler": noise}
    own = {} if function == "sample_heun" else own
    torch.randn_like, kept = noise, torch.randn_like  # type: ignore[assignment]
    try:
        x = getattr(module, function)(
            denoised,
            x_T() * PATH.t_max,
            sigmas,
            disable=True,
            callback=lambda step: rows.append(step["denoised"]),
            **own,
            **settings,
        )
    finally:
        torch.randn_like = kept
    return torch.cat([*rows, x]).numpy()


if __name__ == "__main__":
    theirs = sampling(Path(sys.argv[1]))
    found = {f"{case}_{steps}": computed(theirs, case, steps) for case in CASES for steps in steps_of(case)}
    np.savez_compressed(FILE, **found)  # type: ignore[arg-type]
