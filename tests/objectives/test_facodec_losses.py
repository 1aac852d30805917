"""What FACodec's attributes are asked, against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nexus_scale.contracts import Batch, UserError
from nexus_scale.objectives.facodec import FACodec, phone_errors, pitch_errors


def test_questions_are_scored_as_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, generator=generator)
    phones = torch.tensor([[0, 1, -1, 2, 2], [-1] * 5])
    loss, right = phone_errors(logits, phones)
    nats = -logits[0].double().log_softmax(-1)
    expected = np.mean([float(nats[t, p]) for t, p in enumerate(phones[0].tolist()) if p >= 0])
    assert math.isclose(float(loss[0]), expected, rel_tol=1e-6) and loss[1] == right[1] == 0
    answer, pitch = torch.randn(1, 6, 2, generator=generator), torch.zeros(1, 6, 2)
    pitch[0, 1:5] = torch.tensor([[0.1, 1], [-0.2, 1], [2.5, 1], [-0.4, 1]])
    loss, right = pitch_errors(answer, pitch)
    said, wanted = (x[0, 1:5, 0].double().numpy() for x in (answer, pitch))
    gap = np.abs(said - wanted)
    smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    p = 1 / (1 + np.exp(-answer[0, :, 1].double().numpy()))
    voiced = pitch[0, :, 1].double().numpy()
    binary = -(voiced * np.log(p) + (1 - voiced) * np.log(1 - p)).mean()
    assert math.isclose(float(loss), smooth + binary, rel_tol=1e-5)
    assert math.isclose(float(right), float(np.corrcoef(said, wanted)[0, 1]), rel_tol=1e-4)
    assert pitch_errors(answer, torch.zeros(1, 6, 2))[1] == 0
    in_units = pitch_errors(answer, pitch * torch.tensor([0.1, 1]), 0.1)
    torch.testing.assert_close(torch.stack(in_units), torch.stack([loss, right]))


def test_labels_of_another_hop_are_refused() -> None:
    objective = FACodec()
    batch = Batch({"phones": torch.zeros(1, 7, dtype=torch.int64)}, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(UserError, match=r"field phones: got \(1, 7\) for 5 steps"):
        objective._answers({"phones": torch.zeros(1, 5, 3)}, batch)
