"""What public packages say of known features: `python -m tests.golden.set_metrics`.

Needs torch-fidelity 0.4.0, clean-fid 0.1.35, prdc 0.2 and the one file of frechet_audio_distance 0.3.4; what that imports beside numpy and
scipy is stood in for and not used. Writes set_metrics.json beside this file. They are not installed for the tests since three of them need
a torchvision of the very build of torch.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".json")
PAIRS = {"narrow": (400, 300, 64), "few": (300, 260, 2048), "inception": (2500, 2300, 2048)}
"""Samples of each set and their width: more samples than values, fewer, and Inception's."""
KID = {"subsets": 20, "subset_size": 120}
LOGITS, NEIGHBOURS = (503, 20), (3, 5)


def features(seed: int, count: int, width: int) -> np.ndarray:
    """Values that depend on each other, mostly not negative, of a mean and scale that the seed moves."""
    z = np.random.Generator(np.random.PCG64(seed)).standard_normal((count, width))
    return np.abs(z + 0.6 * np.roll(z, 1, axis=1) + 0.2 * seed) * (1 + 0.1 * seed) * 0.3


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    of_x, of_y, width = PAIRS[name]
    return features(1, of_x, width), features(2, of_y, width)


def logits() -> np.ndarray:
    return 4 * np.random.Generator(np.random.PCG64(9)).standard_normal(LOGITS)


class _Unused(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return object


def _frechet_audio_distance() -> Any:
    package = "frechet_audio_distance"
    for name in ("soundfile", "resampy", "laion_clap", "encodec", f"{package}.models.pann", f"{package}.utils"):
        sys.modules[name] = _Unused(name)
    sys.modules[f"{package}.clap_score"] = types.ModuleType("clap_score")
    from frechet_audio_distance import fad

    return fad.FrechetAudioDistance


def main() -> None:
    import prdc
    import torch
    from cleanfid import fid as clean
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    found: dict[str, Any] = {"fid": {}, "clean": {}}
    for name in PAIRS:
        x, y = pair(name)
        of_x, of_y = (metric_fid.fid_features_to_statistics(torch.from_numpy(one)) for one in (x, y))
        found["fid"][name] = metric_fid.fid_statistics_to_metric(of_x, of_y, False)["frechet_inception_distance"]
        found["clean"][name] = float(np.real(clean.fid_from_feats(x, y)))
        print(name, found["fid"][name], found["clean"][name])
    x, y = pair("narrow")
    both = torch.from_numpy(x), torch.from_numpy(y)
    kid = metric_kid.kid_features_to_metric(
        *both, kid_subsets=KID["subsets"], kid_subset_size=KID["subset_size"], verbose=False
    )
    found["kid"] = list(kid.values())
    found["kid_whole"] = clean.kernel_distance(x[:300], y, num_subsets=1, max_subset_size=300)
    found["isc"] = list(metric_isc.isc_features_to_metric(torch.from_numpy(logits())).values())
    few = pair("few")[0][:, :16], pair("few")[1][:, :16] * 0.9
    for k in NEIGHBOURS:
        made = {name: float(value) for name, value in prdc.compute_prdc(*few, nearest_k=k).items()}
        found[f"prdc_{k}"] = [made[name] for name in ("precision", "recall", "density", "coverage")]
        drawn, real = torch.from_numpy(few[1]), torch.from_numpy(few[0])
        found[f"prc_{k}"] = list(
            metric_prc.prc_features_to_metric(drawn, real, prc_neighborhood=k, verbose=False).values()
        )[:2]
    theirs = _frechet_audio_distance()
    moments = [theirs.calculate_embd_statistics(None, one) for one in (x, y)]
    found["fad"] = float(theirs.calculate_frechet_distance(None, *moments[0], *moments[1]))
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
