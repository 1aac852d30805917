"""Agreement about pairs as the package `krippendorff` 0.9.0 has it, each pair in either order: `python tests/golden/agreement.py`."""

from __future__ import annotations

import json
from pathlib import Path

import krippendorff
import numpy as np

rng = np.random.default_rng(0)
found = []
for chances in ([0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8]):
    for concentration in (0.3, 3.0):
        of_units = rng.dirichlet(concentration * np.array(chances), 20)
        counts = np.stack([rng.multinomial(rng.integers(0, 6), p) for p in of_units])
        both = np.concatenate([counts, counts[:, [1, 0, 2]]])
        seen = both[both.sum(1) > 0]
        alpha = krippendorff.alpha(value_counts=seen, level_of_measurement="nominal")
        found.append({"counts": counts.tolist(), "alpha": float(alpha)})
Path(__file__).with_suffix(".json").write_text(json.dumps(found))
