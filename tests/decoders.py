"""Decoders of tests for data_pipelines.decoding_process: what they do with a file, the file says."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np


def obedient(file: BinaryIO, name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Dies, hangs, takes memory, raises, or returns its file's bytes."""
    said = file.read().decode()
    if said == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if said == "hang":
        while True:
            pass
    if said == "swell":
        return {}, [np.ones(arguments["bytes"], np.uint8)]
    if said == "raise":
        raise LookupError("of ours")
    if said == "exit":
        os._exit(3)
    return {"name": os.path.basename(name), "process": os.getpid()}, [
        np.frombuffer(said.encode(), np.uint8),
        np.zeros((0, 3)),
    ]


def growth(file: BinaryIO, name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """MiB that a whole video takes beyond its first frames."""
    from data_pipelines.video_decoding import Rules, clips_of

    most = []
    for frames in (4, arguments["frames"]):
        (clip,), _ = clips_of(file, Rules((16, 16), frames, 10.0))
        assert len(clip.frames) == frames
        most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"mib": most[1] - most[0]}, []
