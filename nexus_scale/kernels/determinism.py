"""Kernels whose results repeat to the bit on a GPU: what `cluster.deterministic` sets, and takes back. A CPU needs none of it.

What does not repeat otherwise, and why this is enough:
  - matrix products: cuBLAS chooses its work space by what other streams do, unless CUBLAS_WORKSPACE_CONFIG fixes it before the first
    product (docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html);
  - attention: cuDNN's backward adds with atomics, and torch 2.11 to 2.13 knows no other form of it; FlashAttention's and the
    memory-efficient one take a form that repeats where torch's flag is set (pytorch/pytorch#182551; `check_cudnn_deterministic` in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp keeps cuDNN out);
  - sums over ranks: NVLS adds within the switch, in an order that changes from call to call (NVIDIA/nccl#1497). Rings and trees repeat on
    the same machines; other machines are another order, as another number of workers is;
  - compiled code: Inductor times variants of a kernel and may take another one next time, unless TORCHINDUCTOR_DETERMINISTIC is set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nexus_scale.contracts import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"

ENVIRONMENT = {CUBLAS: ":4096:8", "NCCL_ALGO": "^NVLS", "TORCHINDUCTOR_DETERMINISTIC": "1"}
"""Read by libraries as they start: a worker has them before it touches its GPU."""

_NO_REPEATING_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a process that repeats: those of `ENVIRONMENT`, each as the user's environment has it if it does there.

    Raises:
        UserError: the user's own value is one under which results do not repeat.
    """
    given = os.environ if given is None else given
    found = {name: given.get(name, value) for name, value in ENVIRONMENT.items()}
    if found[CUBLAS] not in (":4096:8", ":16:8"):
        raise UserError(
            f"{CUBLAS}={found[CUBLAS]}: cluster.deterministic needs :4096:8 or :16:8; unset the variable, or set deterministic to false",
            code=4,
        )
    if "NVLS" in found["NCCL_ALGO"].replace("^NVLS", ""):
        raise UserError(
            f"NCCL_ALGO={found['NCCL_ALGO']}: NVLS does not add in one order; cluster.deterministic needs Ring, Tree or ^NVLS: unset the "
            "variable, or set deterministic to false",
            code=4,
        )
    return found


def enabled() -> bool:
    """Whether kernels of this process have to repeat."""
    return torch.are_deterministic_algorithms_enabled()


@contextmanager
def repeating(wanted: bool) -> Iterator[None]:
    """A context whose kernels repeat to the bit, if that is wanted; afterwards torch's flags are as before.

    Raises:
        UserError: an operation has no form that repeats; names it.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    fill: Any = torch.utils.deterministic  # a module with a property, which its stub lacks
    before = enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    variables = environment()
    kept = {name: os.environ.get(name) for name in variables}
    try:
        os.environ.update(variables)
        torch.use_deterministic_algorithms(True, warn_only=False)
        cudnn.deterministic, cudnn.benchmark = True, False
        fill.fill_uninitialized_memory = (
            False  # finds reads of memory that nobody wrote; not needed to repeat, and a pass over it
        )
        yield
    except RuntimeError as error:
        refused = _NO_REPEATING_FORM.search(str(error))
        if refused is None:
            raise
        raise UserError(
            f"cluster.deterministic: {refused[1]} has no form that repeats to the bit on this device; set cluster.deterministic=false, or "
            "choose a network or an objective without it",
            code=4,
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = flags
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
