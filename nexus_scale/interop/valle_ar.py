"""ValleAR as its part of a published VALL-E, and a run's two networks as one file; see valle.py."""

from nexus_scale.interop import valle
from nexus_scale.interop.published import Family

FAMILY = Family({"original": valle.AR}, together={"original": valle.export_together})
