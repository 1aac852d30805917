"""ValleNAR as its part of a published VALL-E; see valle.py."""

from nexus_scale.interop import valle
from nexus_scale.interop.published import Family

FAMILY = Family({"original": valle.NAR})
