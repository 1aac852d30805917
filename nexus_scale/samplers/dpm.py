"""SDE-DPM-Solver++(2M) as CogVideoX draws with it: `dpm_multistep` with eta 1, on the chain's own times, under the name that recipes have.

Source: Lu et al. 2022, "DPM-Solver++", the SDE variant of its multistep solver; the steps are those of CogVideoX's sampler.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nexus_scale.processes.times import Spacing
from nexus_scale.samplers.dpm_multistep import DPMMultistep


class DPM(DPMMultistep):
    """Second order in the log of alpha / sigma, one evaluation a step, fresh noise in each but the last."""

    chain_alone = True
    leaves_end_out = False

    def __init__(self, *, steps: Annotated[int, Field(ge=1, le=100_000)] = 50, spacing: Spacing = "trailing"):
        """
        Args:
            steps: of the sampler, each one evaluation; CogVideoX draws with 50.
            spacing: which of the chain's steps; see `spaced_times`. On a path whose last step is noise alone, `trailing` begins
                there, as training did.
        """
        super().__init__(steps=steps, spacing=spacing, eta=1.0)
