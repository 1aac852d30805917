"""What SiT's own code computes: `python -m tests.golden.sit FOLDER`, where FOLDER holds its `transport` package (github.com/willisma/SiT).

It imports torchdiffeq, which must be installed. Writes sit.npz beside this file: paths, targets and scores at given times, and samples
of its ODE and SDE under a network that is a formula and noise that is given. Its time runs from noise to data: t there is 1 - t here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".npz")
PATHS = {"Linear": "rectified_flow", "GVP": "gvp", "VP": "vp_linear"}
"""Their names, and ours."""
FORMS = {
    "constant": "constant", "SBDM": "score", "sigma": "sigma", "linear": "linear", "decreasing": "decreasing",
    "inccreasing-decreasing": "increasing_decreasing",
}  # fmt: skip
LASTS = {"Mean": "mean", "Tweedie": "tweedie", "Euler": "euler"}
STEPS, SHAPE = 6, (2, 3, 4, 4)


def drawn(seed: int) -> Tensor:
    """Standard normal numbers of one shape, float64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(SHAPE))


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """The network, in their time: (B, ...), (B,)."""
    t = t.view(-1, 1, 1, 1)
    return 0.3 * x * torch.cos(2 * t) + 0.5 * torch.sin(3 * x) - 0.2 * t


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    from transport import Sampler, create_transport, integrators  # type: ignore[import-not-found]

    torch.set_default_dtype(torch.float64)
    found: dict[str, Tensor] = {}
    t = torch.tensor([0.2, 0.85])
    noise, data = drawn(0), drawn(1)
    for theirs in PATHS:
        transport = create_transport(theirs, "velocity", None, None, None)
        plan = transport.path_sampler
        _, x_t, u_t = plan.plan(t, noise, data)
        found |= {f"{theirs}/x_t": x_t, f"{theirs}/velocity": u_t}
        found[f"{theirs}/score"] = plan.get_score_from_velocity(velocity(x_t, t), x_t, t)
        cases = [("sigma", last, "Euler") for last in LASTS] + [("sigma", "Mean", "Heun")]
        cases += [(form, "Mean", "Euler") for form in FORMS if form not in ("SBDM", "sigma")]
        for form, last, method in cases:
            found[f"{theirs}/{form}/{last}/{method}"] = sampled(integrators, Sampler(transport), form, last, method)
        if theirs != "VP":  # which they end at 1 - 1e-3
            found[f"{theirs}/ode"] = Sampler(transport).sample_ode(sampling_method="euler", num_steps=STEPS + 1)(
                noise, velocity
            )[-1]
    for form in FORMS:
        plan = create_transport("GVP", "velocity", None, None, None).path_sampler
        diffusion = plan.compute_diffusion(noise, t, form=form, norm=torch.tensor(0.7))
        found[f"diffusion/{form}"] = diffusion.expand(2, 1, 1, 1).flatten()
    np.savez_compressed(FILE, **{name: value.numpy() for name, value in found.items()})


def sampled(integrators: Any, sampler: Any, form: str, last: str, method: str) -> Tensor:
    """Their SDE's last sample, with the noise of our names."""
    count = iter(range(2, 2 + STEPS))
    integrators.th.randn = lambda size: drawn(next(count))
    walk = sampler.sample_sde(
        sampling_method=method,
        diffusion_form=form,
        diffusion_norm=torch.tensor(0.7),
        last_step=last,
        last_step_size=0.04,
        num_steps=STEPS,
    )
    sample: Tensor = walk(drawn(0), velocity)[-1]
    return sample


if __name__ == "__main__":
    main(sys.argv[1])
