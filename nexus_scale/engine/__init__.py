"""All that knows there is more than one process, a precision or an optimizer.

engine = build_engine({"model": NetSpec(make, OptimizerSpec(lr=1e-3))}, {"ema": AverageSpec("model", 0.999)},
settings)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from nexus_scale.contracts import Engine, Stage, UserError
from nexus_scale.engine.settings import AverageSpec, EngineSettings, NetSpec, OptimizerSpec, ScheduleSpec

__all__ = ["AverageSpec", "EngineSettings", "NetSpec", "OptimizerSpec", "ScheduleSpec", "build_engine"]


def build_engine(
    nets: Mapping[str, NetSpec],
    averages: Mapping[str, AverageSpec],
    settings: EngineSettings,
    stage: Stage | None = None,
) -> Engine:
    """The engine that `settings.kind` names. All ranks call it alike, after distributed.init.

    Raises:
        UserError: a role or a setting that cannot be; names it.
    """
    if settings.kind in ("local", "replicated"):
        from nexus_scale.engine.local import LocalEngine

        return cast(Engine, LocalEngine(nets, averages, settings, stage))
    if settings.kind == "deepspeed":
        from nexus_scale.engine.deepspeed import DeepSpeedEngine

        return cast(Engine, DeepSpeedEngine(nets, averages, settings, stage))
    raise UserError(f"engine {settings.kind!r}: expected deepspeed, replicated or local")
