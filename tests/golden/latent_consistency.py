"""What diffusers' train_lcm_distill_sd_wds.py computes on known inputs: `python -m tests.golden.latent_consistency FILE`.

FILE is that script (examples/consistency_distillation), of which its functions run and its `main` is followed step by step: it cannot be
imported without what it trains with. Writes latent_consistency.npz beside this file: losses, and gradients of the student's weights.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.consistency import drawn

FILE = Path(__file__).with_suffix(".npz")
SHAPE, TEXT = (5, 4, 3, 2), (5, 6, 7)
SKIP, SCALES, HUBER = 20, (3.0, 15.0), 0.001
CASES = {
    f"{prediction}/{loss}": (prediction, loss) for prediction in ("epsilon", "v_prediction") for loss in ("huber", "l2")
}
TARGETS = {"epsilon": "eps", "v_prediction": "v"}
FUNCTIONS = ("append_dims", "scalings_for_boundary_conditions", "get_predicted_original_sample", "get_predicted_noise",
             "extract_into_tensor", "DDIMSolver", "guidance_scale_embedding")  # fmt: skip


def index() -> Tensor:
    """Which of the 50 times each sample is noised to, counted from the data."""
    return torch.tensor([0, 49, 1, 17, 33])


def shares() -> Tensor:
    """Where each sample's guidance scale lies between the least and the largest."""
    return torch.tensor([0.0, 0.3, 0.999, 0.5, 0.75])


def weights(seed: int) -> Tensor:
    return drawn(seed, (4,))


def network(x: Tensor, t: Tensor, text: Tensor, guidance: Tensor | None, w: Tensor) -> Tensor:
    """A network of four weights; t (B,) is 1 / 1000 at the first step of the chain."""
    rows = lambda value: value.float()[:, None, None, None]  # noqa: E731
    y = w[0] * x + w[1] * torch.tanh(2 * x) * torch.cos(3 * rows(t)) + w[2] * rows(text.mean((1, 2))) * x.roll(1, -1)
    return y if guidance is None else y + w[3] * 0.1 * rows(guidance - 1)


def alphas_cumprod() -> Tensor:
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2, 0)


def functions(file: Path) -> dict[str, Any]:
    """Those functions of the script."""
    nodes = [node for node in ast.parse(file.read_text()).body if getattr(node, "name", None) in FUNCTIONS]
    found: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(ast.Module(nodes, []), str(file), "exec"), found)
    return found


def main() -> None:
    their = functions(Path(sys.argv[1]))
    alpha_bar = alphas_cumprod()
    alphas, sigmas = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    solver = their["DDIMSolver"](alpha_bar.numpy(), timesteps=1000, ddim_timesteps=1000 // SKIP)
    x0, noise, text = drawn(0, SHAPE), drawn(1, SHAPE), drawn(2, TEXT)
    found: dict[str, np.ndarray] = {}
    for name, (prediction, loss_type) in CASES.items():
        student = weights(3).requires_grad_()
        start = solver.ddim_timesteps[index()]
        timesteps = (start - SKIP).clamp(min=0)
        rows = lambda values: [their["append_dims"](value, 4) for value in values]  # noqa: E731
        c_skip_start, c_out_start = rows(their["scalings_for_boundary_conditions"](start))
        c_skip, c_out = rows(their["scalings_for_boundary_conditions"](timesteps))
        x = (
            their["extract_into_tensor"](alphas, start, SHAPE) * x0
            + their["extract_into_tensor"](sigmas, start, SHAPE) * noise
        )
        w = SCALES[0] - 1 + (SCALES[1] - SCALES[0]) * shares()
        told = (prediction, alphas, sigmas)
        y = network(x, (start + 1) / 1000, text, w + 1, student)
        model_pred = c_skip_start * x + c_out_start * their["get_predicted_original_sample"](y, start, x, *told)
        with torch.no_grad():
            answers = [
                network(x, (start + 1) / 1000, each, None, weights(4)) for each in (text, torch.zeros_like(text))
            ]
            data, eps = (
                [their[f"get_predicted_{what}"](answer, start, x, *told) for answer in answers]
                for what in ("original_sample", "noise")
            )
            by = w.reshape(-1, 1, 1, 1)
            pred_x0, pred_noise = (cond + by * (cond - uncond) for cond, uncond in (data, eps))
            x_prev = solver.ddim_step(pred_x0, pred_noise, index())
            y = network(x_prev, (timesteps + 1) / 1000, text, w + 1, weights(5))
            target = c_skip * x_prev + c_out * their["get_predicted_original_sample"](y, timesteps, x_prev, *told)
        if loss_type == "l2":
            loss = F.mse_loss(model_pred, target)
        else:
            loss = torch.mean(torch.sqrt((model_pred - target) ** 2 + HUBER**2) - HUBER)
        loss.backward()
        found[f"{name}/loss"], found[f"{name}/grad"] = loss.detach().numpy(), student.grad.numpy()
    found["embedding"] = their["guidance_scale_embedding"](torch.tensor([2.0, 7.5, 14.0]), 256).numpy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
