"""Makes canny.npz: edges that OpenCV finds in random pictures. `pip install opencv-python-headless==5.0.0.93`, then run it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def main() -> None:
    draw = np.random.default_rng(0)
    kept: dict[str, np.ndarray] = {}
    for number, (size, low, high) in enumerate((((17, 24), 100, 200), ((9, 5), 50, 51), ((32, 20), 20, 600))):
        coarse = draw.integers(0, 256, (*(side // 3 + 1 for side in size), 3), np.uint8).repeat(3, 0).repeat(3, 1)
        image = np.clip(coarse[: size[0], : size[1]].astype(int) + draw.integers(-20, 20, (*size, 3)), 0, 255)
        image = np.ascontiguousarray(image.astype(np.uint8))
        kept |= {f"image{number}": image, f"edges{number}": cv2.Canny(image, low, high)}
        kept[f"thresholds{number}"] = np.array([low, high])
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **kept)


if __name__ == "__main__":
    main()
