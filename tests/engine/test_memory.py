"""Running out of memory is the user's message, with what to set; anything else stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_scale.config.recipe import Cluster
from nexus_scale.contracts import Progress, UserError
from nexus_scale.engine.memory import explained
from tests.distributed import nexus


def _caused() -> None:
    try:
        raise MemoryError
    except MemoryError as error:
        raise RuntimeError("the loader failed at global batch 7") from error


def _of(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


REFUSED: dict[str, Callable[[], object]] = {
    "torch on a CPU": lambda: torch.empty(10**15),
    "numpy": lambda: np.empty(10**17, np.uint8),
    "in a thread": _caused,
    "C++": _of(RuntimeError("std::bad_alloc")),
    "CUDA": _of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "cuBLAS": _of(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_allocation_names_the_micro_batch_and_what_to_set(name: str) -> None:
    ways = r"micro_batch 12 at once. Set cluster.micro_batch=6, or cluster.micro_batch=auto, or cluster.activation_checkpointing=true"
    told, meets = (
        rf"rank 0 ran out of memory at step 0 \(.* GiB(.|\n)*{ways}",
        explained(Cluster(), lambda: 12, Progress()),
    )
    with pytest.raises(UserError, match=told) as caught, meets:
        REFUSED[name]()
    assert caught.value.code == 4


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("a bug"), UserError("out of memory"), KeyError("out of memory")):
        with pytest.raises(type(error), match=str(error.args[0])) as caught, explained(Cluster(), int, Progress()):
            raise error
        assert caught.value is error


def test_a_run_that_meets_it_ends_with_code_4_and_no_traceback(tmp_path: Path) -> None:
    code, said = nexus(
        tmp_path, "train", "mmdit/tiny_openmoji", "--tiny", "--cluster", "in_process", "cluster.activation_checkpointing=true",
        NEXUS_FAULT="step:1,phase:backward,action:oom",
    )  # fmt: skip
    assert code == 4 and "Traceback" not in said, said
    assert "ran out of memory at step 1" in said and "with --allow-change cluster.micro_batch" in said
    assert "activation_checkpointing" not in said.split("Set ")[-1], "what is on already is no advice"
