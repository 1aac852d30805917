"""ValleNAR as its part of a published VALL-E; see valle.py."""

from nexus_scale.interop import valle

FORMATS = {"original": valle.NAR}
