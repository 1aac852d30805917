"""What ranks import, imported once in the process that they are forked from: four seconds of CPU time less for each of them.

Imports alone: nothing here or below it may start a thread or draw a number.
"""

from __future__ import annotations

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses as it is imported

import deepspeed.ops
import deepspeed.runtime.superoffload.superoffload_stage3  # it imports every kind of stage 3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # and asks whether the optimizer is one of its own
import torch._dynamo.backends.debugging  # optimizers ask for torch._dynamo, and DeepSpeed for all compilers
import torch._inductor.compile_fx  # noqa: F401

import nexus_scale.cli
import nexus_scale.engine.deepspeed
import nexus_scale.engine.local
import nexus_scale.orchestration.worker  # noqa: F401

gc.freeze()  # else the collections of every rank would go through all of this, and copy its pages
