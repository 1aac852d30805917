"""What torchcfm 1.0.7 computes on known data and noise: `PYTHONPATH=FOLDER:. python tests/golden/torchcfm.py`.

FOLDER holds that package and POT (`pip install --no-deps --target FOLDER torchcfm==1.0.7 POT`). Writes torchcfm.npz beside this file, in
its direction of time (0 is noise): places and velocities of its matchers, and which noise its exact plan gives to each sample.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_suffix(".npz")
SIGMA = 0.05
"""sigma_min of Lipman's path."""


def known() -> dict[str, torch.Tensor]:
    """Data (24, 3, 2, 2), noise of that shape, and times (24,)."""
    generator = np.random.Generator(np.random.PCG64(14))
    draw = {name: generator.standard_normal((24, 3, 2, 2)) for name in ("data", "noise")}
    return {
        **{name: torch.from_numpy(value) for name, value in draw.items()},
        "times": torch.arange(1, 25).double() / 25,
    }


def main() -> None:
    from torchcfm.conditional_flow_matching import (
        ConditionalFlowMatcher,
        TargetConditionalFlowMatcher,
        VariancePreservingConditionalFlowMatcher,
    )
    from torchcfm.optimal_transport import OTPlanSampler

    given, found = known(), {}
    data, noise, t = given["data"], given["noise"], given["times"]
    for name, matcher in (
        ("straight", ConditionalFlowMatcher(0.0)),
        ("lipman", TargetConditionalFlowMatcher(SIGMA)),
        ("trigonometric", VariancePreservingConditionalFlowMatcher(0.0)),
    ):
        x = matcher.sample_xt(noise, data, t, noise)
        found[f"{name}_x"] = x.numpy()
        found[f"{name}_velocity"] = matcher.compute_conditional_flow(noise, data, t, x).numpy()
    found["plan"] = OTPlanSampler(method="exact").get_map(noise, data)
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
