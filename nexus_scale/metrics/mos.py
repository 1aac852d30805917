"""Mean opinion scores that a network predicts of speech: DNSMOS P.835, with the weights that the package speechmos carries (MIT, 9 MB).

It was trained on noisy speech that people rated from 1 to 5: how natural the voice is, how little the background disturbs, and both. Of
synthetic speech it hears noise and artefacts, and not whether the words are right. The package itself is not imported: it reads sounds by
librosa. The figures are its own.

Source: Reddy et al. 2022, "DNSMOS P.835: A Non-Intrusive Perceptual Objective Speech Quality Metric".
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics.resample import resample

SAMPLE_RATE_HZ = 16000
WINDOW = 144_160
"""Samples that the network hears at a time, 9.01 s; the next window begins a second later."""
CALIBRATION = (
    (-0.08397278, 1.22083953, 0.0052439),
    (-0.13166888, 1.60915514, -0.39604546),
    (-0.06766283, 1.11546468, 0.04602535),
)
"""Polynomials, the highest power first, of speech, background and overall: from the network's outputs to the raters' scale."""
INSTALL = "predicted opinion scores need speechmos and onnxruntime; pip install 'nexus-scale[score-speech]'"


class OpinionScores(NamedTuple):
    """1 (bad) to 5 (excellent): of the voice, of the background, and overall."""

    speech: float
    background: float
    overall: float


class OpinionPredictor:
    """DNSMOS P.835 on the CPU.

    Args:
        file: the network, `sig_bak_ovr.onnx`; that of the installed package unless given.
    Raises:
        UserError: a package or the file is missing; says what to install.
    """

    name = "DNSMOS P.835 (speechmos)"

    def __init__(self, file: Path | None = None):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(INSTALL) from None
        if file is None:
            found = importlib.util.find_spec("speechmos")
            if found is None or found.origin is None:
                raise UserError(INSTALL)
            file = Path(found.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        if not file.is_file():
            raise UserError(f"{file}: not there; expected DNSMOS's network. {INSTALL}", 3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, wave: Tensor, sample_rate_hz: int) -> OpinionScores:
        """The scores of a wave (T,) or (1, T) in [-1, 1], the mean over its windows; a short one is repeated until it fills one.

        Raises:
            ValueError: a wave without samples.
        """
        flat = wave.detach().cpu().float().reshape(-1).clamp(-1, 1)
        heard = resample(flat, sample_rate_hz, SAMPLE_RATE_HZ).clamp(-1, 1).numpy()
        while len(heard) < WINDOW:
            heard = np.append(heard, heard)
        count = int(len(heard) // SAMPLE_RATE_HZ - WINDOW / SAMPLE_RATE_HZ) + 1  # as the package counts them
        windows = [heard[start : start + WINDOW] for start in range(0, count * SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)]
        raw = [self._session.run(None, {"input_1": one[None]})[0][0] for one in windows]
        calibrated = [np.polyval(of, np.array(raw, dtype=np.float64)[:, i]).mean() for i, of in enumerate(CALIBRATION)]
        return OpinionScores(*map(float, calibrated))
