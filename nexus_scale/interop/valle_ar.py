"""ValleAR as its part of a published VALL-E, and a run's two networks as one file; see valle.py."""

from nexus_scale.interop import valle

FORMATS = {"original": valle.AR}
TOGETHER = {"original": valle.export_together}
