"""Codes of clips: those of the tokenizer, of clips as they are, without what masks cover, and as outlines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines import precompute_video_codes
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.manifest import Manifest
from nexus_scale.interop.tokenizers import open_tokenizer
from nexus_scale.processes.followed import Canny
from nexus_scale.processes.masks import clip_mask
from nexus_scale.processes.pixels import to_unit_range
from tests.generate.test_prompts import trained_on_made_up_data
from tests.media.test_latent_space import write_clips


def test_a_job_makes_codes_of_clips_of_what_masks_leave_and_of_outlines(tmp_path: Path) -> None:
    place = trained_on_made_up_data(tmp_path, "magvit2/tiny_clips")
    write_clips(place.data_root / "clips", 5, count=3, side=8, rate_hz=6.0)
    options = {"input": "clips", "output": "codes", "tokenizer": {"run": "magvit2_tiny_clips"}, "masks": True}
    roots = {"data_root": place.data_root, "runs_root": place.runs_root}
    precompute_video_codes.run(**options, outlines=True, workers=0, **roots)
    assert precompute_video_codes.done(**options, outlines=True, **roots)
    made = Manifest.load(place.data_root / "codes")
    names = ["video_codes", "masked_video_codes", "outline_video_codes"]
    assert [(name, made.fields[name].dtype, made.fields[name].shape) for name in names] == [
        (n, "int16", (8,)) for n in names
    ]
    assert made.rates["video_codes"] == 6.0 and made.encoder is not None and made.encoder["frame_codes"] == 4
    tokenizer = open_tokenizer({"run": "magvit2_tiny_clips"}, place.runs_root)
    joined = Dataset.open([Source([place.data_root / "clips", place.data_root / "codes"])], ["video", *names])
    (batch,) = joined.fixed(3, batch=3)
    x = to_unit_range(batch["video"], torch.uint8, "video")
    assert torch.equal(batch["video_codes"].long(), tokenizer.encode(x))
    drawn = torch.stack(
        [torch.stack([Canny()(frame) for frame in clip.unbind(1)], 1) for clip in batch["video"].byte()]
    )
    assert torch.equal(batch["outline_video_codes"].long(), tokenizer.encode(drawn.float() / 127.5 - 1))
    assert not torch.equal(batch["masked_video_codes"], batch["video_codes"])
    torch.testing.assert_close(tokenizer.decode(batch["video_codes"]), tokenizer.network(x).x_hat.detach())
    precompute_video_codes.run(**{**options, "masks": False, "output": "low"}, low=True, workers=0, **roots)
    (low,) = Dataset.open([Source([place.data_root / "low"])], ["low_video_codes"]).fixed(3, batch=3)
    half = torch.nn.functional.avg_pool3d(x, (1, 2, 2))
    assert torch.equal(low["low_video_codes"].long(), tokenizer.network.encode(half).flatten(1))
    precompute_video_codes.run(**{**options, "output": "first"}, frames=1, workers=0, **roots)
    (first,) = Dataset.open([Source([place.data_root / "first"])], ["video_codes"]).fixed(3, batch=3)
    assert torch.equal(first["video_codes"], batch["video_codes"][:, :4])
    with pytest.raises(UserError, match="frames: got 9; the clips of clips have 5"):
        precompute_video_codes.run(**{**options, "output": "other"}, frames=9, workers=0, **roots)
    write_clips(place.data_root / "large", 5, count=1, side=16)
    with pytest.raises(UserError, match="clips of 16 x 16; the tokenizer was trained on 8 x 8"):
        precompute_video_codes.run(**{**options, "input": "large", "output": "other"}, workers=0, **roots)


def test_masks_of_clips_are_within_or_around() -> None:
    masks = torch.stack([clip_mask(16, 24, np.random.default_rng(seed)) for seed in range(200)])
    corners = masks[:, 0, 0, 0] + masks[:, 0, -1, -1]
    around = float((corners == 2).float().mean())
    assert masks.shape == (200, 1, 16, 24) and set(masks.unique().tolist()) == {0.0, 1.0} and 0.1 < around < 0.6
    assert float(masks.flatten(1).amin(1).max()) == 0 and float(masks.flatten(1).amax(1).min()) == 1, "some of each"
