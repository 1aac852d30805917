"""The NAR's part of a published VALL-E; see valle.py."""

from __future__ import annotations

from nexus_scale.interop import valle
from nexus_scale.interop.published import Original

ORIGINAL = Original(valle.nar_layout, valle.nar_sizes, "nar_", valle.nar_computed)
