"""Super-resolution by masked codes: windows part a clip and come back, and a place sees its own window and the low codes under it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.models.tokens.window_transformer import WindowTransformer, joined, split

SIZES: dict[str, Any] = {
    "codebook_size": 9,
    "code_shape": (3, 4, 2),
    "low_shape": (3, 2, 1),
    "hidden_size": 16,
    "num_heads": 2,
}


def made(*windows: tuple[int, int, int], **changes: Any) -> WindowTransformer:
    torch.manual_seed(0)
    net = WindowTransformer(**{**SIZES, "windows": windows, "depth": len(windows), **changes})
    net.init_weights()
    return net.eval()


def test_windows_part_a_clip_and_come_back() -> None:
    x = torch.arange(2 * 3 * 4 * 2).view(2, 3, 4, 2, 1).float()
    for window in ((3, 4, 2), (1, 4, 1), (3, 2, 1), (1, 1, 2)):
        parts = split(x, window)
        assert torch.equal(joined(parts, window, x.shape), x)
    assert split(x, (3, 2, 1))[0, :, 0].tolist() == [0, 2, 8, 10, 16, 18], "three frames, two rows, one column"


def test_a_place_sees_its_windows_and_the_low_codes_under_it() -> None:
    codes, low = torch.randint(9, (1, 24, 1)), torch.randint(9, (1, 6))

    def sees(net: WindowTransformer) -> torch.Tensor:
        """Which places change the answer at place 0, (3, 4, 2)."""
        first = net(codes, 0, {"low_video_codes": low})[0, 0]
        found = []
        for place in range(24):
            other = codes.clone()
            other[0, place] = (other[0, place] + 1) % 9
            found.append(not torch.allclose(net(other, 0, {"low_video_codes": low})[0, 0], first, atol=1e-6))
        return torch.tensor(found).view(3, 4, 2)

    time, rows = torch.zeros(3, 4, 2, dtype=torch.bool), torch.zeros(3, 4, 2, dtype=torch.bool)
    time[:, :2, 0], rows[0, 0] = True, True
    assert torch.equal(sees(made((0, 2, 1))), time) and torch.equal(sees(made((1, 1, 0))), rows)
    assert sees(made((0, 2, 1), (1, 0, 1), (1, 1, 0))).all()

    net, other = made((1, 1, 1)), low.clone()
    other[0, 1] = (other[0, 1] + 1) % 9  # under rows 2 and 3 of the first frame
    moved = (net(codes, 0, {"low_video_codes": low}) - net(codes, 0, {"low_video_codes": other}))[0].abs().amax(
        1
    ) > 1e-6
    assert moved.view(3, 8).tolist() == [[False] * 4 + [True] * 4, [False] * 8, [False] * 8]
    none = net(codes, 0, {"low_video_codes": low, "drop": torch.tensor([True])})
    assert torch.equal(none, net(codes, 0, {"low_video_codes": other, "drop": torch.tensor([True])}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": ((2, 1, 1),)}, "windows: got (2, 1, 1); expected divisors of code_shape (3, 4, 2)"),
        ({"low_shape": (3, 3, 1)}, "low_shape: got (3, 3, 1)"),
        ({"windows": (), "depth": 1}, "windows: got none"),
        ({"num_heads": 3}, "hidden_size: got 16 with num_heads 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        made((1, 1, 1), **changes)
