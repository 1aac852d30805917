"""What speechmos predicts of known sounds: `python -m tests.golden.opinions`, with speechmos 0.0.1.1.

Librosa, which it imports, is stood in for: it makes the spectra of another network, whose figure is not used. Writes opinions.json beside
this file: speech, background and overall of each sound.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".json")


def waves() -> dict[str, np.ndarray]:
    """Tones that come and go like syllables, (T,) at 16 kHz: `first` of 3 s, `long` of 12 s; and noise of 12 s."""
    made = {}
    drawn = np.random.Generator(np.random.PCG64(0))
    for name, seconds in (("first", 3), ("long", 12)):
        t = np.arange(16000 * seconds) / 16000
        voice = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 12))
        made[name] = 0.15 * voice * np.clip(np.sin(2 * np.pi * 2 * t), 0, 1) ** 2
    made["noise"] = 0.1 * drawn.standard_normal(16000 * 12)
    return {name: wave.clip(-1, 1).astype(np.float32) for name, wave in made.items()}


def main() -> None:
    librosa: Any = types.ModuleType("librosa")
    frames = types.SimpleNamespace(melspectrogram=lambda **_: np.ones((120, 900)))
    librosa.feature, librosa.power_to_db = frames, lambda power, ref: power
    sys.modules["librosa"] = librosa
    from speechmos import dnsmos

    found = {}
    for name, wave in waves().items():
        said = dnsmos.run(wave, 16000)
        found[name] = [float(said[key]) for key in ("sig_mos", "bak_mos", "ovrl_mos")]
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
