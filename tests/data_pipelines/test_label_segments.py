"""What is said in each step of a codec, and how high."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipelines.label_segments import SegmentLabeller
from nexus_scale.interop.pitch import pitch_of, relative_pitch


def test_segments_are_whole_steps_with_their_own_labels() -> None:
    labeller: Any = SegmentLabeller.__new__(SegmentLabeller)
    labeller.hop, labeller.steps = 4, 3
    values = {
        "audio": np.arange(33, dtype=np.float16)[None],  # eight whole steps and one begun
        "phones": np.arange(9, dtype=np.int16),
        "pitch": np.stack([np.arange(9.0), np.ones(9)], axis=-1),
        "label": 2,
    }
    rows = list(labeller.place("clip", values))
    assert [row.key for row in rows] == ["clip-000", "clip-001", "clip-002"]
    assert [row.values["phones"].tolist() for row in rows] == [[0, 1, 2], [3, 4, 5], [5, 6, 7]]
    for row in rows:
        assert row.values["audio"][0, ::4].tolist() == [4 * phone for phone in row.values["phones"]]
        assert row.values["pitch"].shape == (3, 2) and row.values["label"] == 2
    assert not list(labeller.place("short", {**values, "audio": values["audio"][:, :11]}))


def test_pitch_is_relative_to_its_mean_where_there_is_one() -> None:
    found = relative_pitch(np.array([0.0, 100.0, 200.0, 0.0]))
    assert np.allclose(found, [[0, 0], [-np.log(2) / 2, 1], [np.log(2) / 2, 1], [0, 0]])
    assert not relative_pitch(np.zeros(3)).any()


def test_pitch_is_that_of_the_tone() -> None:
    pytest.importorskip("parselmouth")
    time = np.arange(16000) / 16000
    tone = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 6)) * (time < 0.5)
    found = pitch_of(tone, 16000, 200)
    assert found.shape == (80,) and np.allclose(found[5:35], 150, rtol=0.01) and not found[45:].any()
    assert pitch_of(tone[:130], 16000, 200).shape == (1,), "shorter than what Praat looks at"
