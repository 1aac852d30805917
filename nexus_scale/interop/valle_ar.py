"""The AR's part of a published VALL-E, and a run's two networks as one; see valle.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop import valle
from nexus_scale.interop.published import Original
from nexus_scale.models.audio.valle_ar import ValleAR
from nexus_scale.models.audio.valle_nar import ValleNAR

ORIGINAL = Original(valle.ar_layout, valle.ar_sizes, "ar_")


def export_original(*given: Any, networks: Mapping[str, Any]) -> Path:
    """Writes both networks of a run; `given` as of all exporters, the folder third.

    Raises:
        UserError: the run has not one of each.
    """
    ar = next((net for net in networks.values() if isinstance(net, ValleAR)), None)
    nar = next((net for net in networks.values() if isinstance(net, ValleNAR)), None)
    if ar is None or nar is None or len(networks) != 2:
        raise UserError(
            f"export: got networks {sorted(networks)}; the published layout holds one valle_ar and one valle_nar"
        )
    return valle.export_original(ar, nar, Path(given[2]))


EXPORTS = {"original": export_original}
