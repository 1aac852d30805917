"""How transformers is opened: offline, and without a word on the terminal while it loads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nexus_scale.contracts import UserError


def transformers_library() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; local_files_only says it again
    try:
        import transformers
    except ImportError:
        raise UserError("models in folders of transformers need that package; pip install 'nexus-scale[hf]'") from None
    return transformers


LOUD = ("torchao", "torch.utils._pytree")
"""Loggers that tell of parts for GPUs which are not there, as soon as transformers imports torchao beside its models."""


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    talk = transformers.utils.logging
    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    loud = {one: one.level for one in map(logging.getLogger, LOUD)}
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    for one in loud:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, before in loud.items():
            one.setLevel(before)
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()
