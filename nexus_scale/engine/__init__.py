"""Everything that depends on the number of processes, on precision or on an optimizer.

engine = build_engine({"model": NetSpec(make, AdamW(lr=1e-3))}, {"ema": Average(average_of="model")}, settings)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from nexus_scale.config.schema import Average
from nexus_scale.contracts import Engine, Stage, UserError
from nexus_scale.engine import distributed, eight_bits
from nexus_scale.engine.settings import EngineSettings, NetSpec

__all__ = ["EngineSettings", "NetSpec", "build_engine"]


def build_engine(
    nets: Mapping[str, NetSpec],
    averages: Mapping[str, Average],
    settings: EngineSettings,
    stage: Stage | None = None,
    called: Collection[str] = (),
) -> Engine:
    """The engine that `settings.engine` names. All ranks call it alike, after distributed.init.

    ZeRO-3 on one rank has nothing to shard, and is the local engine, unless it keeps the optimizer's state in host memory.

    Args:
        called: averages that the objective calls; they join the engine's `nets`.

    Raises:
        UserError: an impossible role or setting; names it.
    """
    if settings.engine == "deepspeed" and settings.zero_stage != 3:
        raise UserError(
            f"zero_stage {settings.zero_stage}: the deepspeed engine supports only ZeRO-3, whose shards make up the checkpoints; "
            "set zero_stage to 3, or engine to replicated"
        )
    eight_bits.check(
        {name: spec.bits for name, spec in nets.items()}, distributed.world_size(), settings.engine == "deepspeed"
    )
    alone = settings.engine == "deepspeed" and distributed.world_size() == 1
    if settings.engine in ("local", "replicated") or (alone and settings.nothing_to_shard):
        from nexus_scale.engine.local import LocalEngine

        return cast(Engine, LocalEngine(nets, averages, settings, stage, called))
    if settings.engine == "deepspeed":
        from nexus_scale.engine.deepspeed import DeepSpeedEngine

        return cast(Engine, DeepSpeedEngine(nets, averages, settings, stage, called))
    raise UserError(f"engine {settings.engine!r}: expected deepspeed, replicated or local")
