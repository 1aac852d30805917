"""Clips from codes: of a text, of a first picture, of a clip's beginning, and within a mask; what is given is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_frames
from nexus_scale.data.stand_ins import BLOCK, BlockTokenizer
from nexus_scale.evaluate.first_frames import FirstFramesSettings, score_first_frames
from nexus_scale.evaluate.scores import RealSamples
from nexus_scale.generate.begun import clip_given
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data
from tests.media.test_latent_space import write_clips


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return trained_on_made_up_data(tmp_path_factory.mktemp("videopoet"), "videopoet/tiny_emoji")


def frames_of(file: Path) -> np.ndarray:
    return np.stack(decode_frames(file.read_bytes(), 100))


def test_what_is_given_is_kept(place: Place, tmp_path: Path) -> None:
    """Made-up clips have two frames of two by two blocks, each of one of 16 greys."""
    trained = Trained(place.run, place)
    assert trained.shape == (8,) and trained.decoded_shape == (3, 2, 2 * BLOCK, 2 * BLOCK)
    plain = draw_prompts(place, ["a cat"], output=tmp_path / "plain", seed=1)
    clip = frames_of(plain / "000_a-cat.webp")
    assert clip.shape == (2, 8, 8, 3)
    picture = tmp_path / "grey.png"
    Image.fromarray(np.full((30, 20, 3), 119, np.uint8)).save(picture)  # the seventh of sixteen greys
    drawn = frames_of(
        draw_prompts(place, ["a cat"], output=tmp_path / "image", seed=1, image=picture) / "000_a-cat.webp"
    )
    assert (np.abs(drawn[0].astype(int) - 119) <= 1).all() and not np.array_equal(drawn, clip)
    begun = draw_prompts(place, ["a dog"], output=tmp_path / "begin", seed=2, begin=plain / "000_a-cat.webp")
    assert np.array_equal(frames_of(begun / "000_a-dog.webp")[0], clip[0])
    mask = tmp_path / "mask.png"
    Image.fromarray(np.uint8(255) * (np.arange(8) < 4).astype(np.uint8)[None].repeat(8, 0)).save(mask)
    given = clip_given(trained, None, plain / "000_a-cat.webp", mask).given
    whole = BlockTokenizer(8, 16).encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1).view(2, 2, 2)
    left = given["masked_video_codes"].view(2, 2, 2)
    assert torch.equal(left[..., 1], whole[..., 1]) and bool((left[..., 0] == 8).all()), "grey under the mask"
    folder = draw_prompts(place, ["a cat"], output=tmp_path / "mask", begin=plain / "000_a-cat.webp", mask=mask)
    assert frames_of(folder / "000_a-cat.webp").shape == clip.shape


def test_a_clip_is_drawn_along_the_outlines_of_another(place: Place, tmp_path: Path) -> None:
    """As codes, either of the clip of outlines or of what is made of a clip; its first frame has a square, the second has none."""
    trained = Trained(place.run, place)
    square = np.zeros((8, 8, 3), np.uint8)
    square[2:6, 2:6] = 255
    frames = [Image.fromarray(square), Image.fromarray(np.zeros_like(square))]
    file = tmp_path / "clip.webp"
    frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    codes = {}
    for how in ("", ":make=true"):
        given = clip_given(trained, None, None, control=[f"{file}{how}"]).given
        codes[how] = given["outline_video_codes"].view(2, 2, 2)
        folder = draw_prompts(place, ["a cat"], output=tmp_path / f"out{how[:2]}", control=[f"{file}{how}"])
        assert frames_of(folder / "000_a-cat.webp").shape == (2, 8, 8, 3)
    assert not torch.equal(codes[""][0], codes[":make=true"][0]) and torch.equal(codes[""][1], codes[":make=true"][1])


def test_clips_are_scored_by_the_first_frames_that_they_were_given(place: Place) -> None:
    write_clips(place.data_root / "held-out", 4, count=5, side=8)  # twice as long as the run's
    found = score_first_frames(place, FirstFramesSettings(clips="held-out", samples=4))
    assert found["changed"] == 0 and found["samples"] == 4 and (place.run.path / "first_frames.png").is_file()
    assert found["first"] == pytest.approx(found["first_rebuilt"])
    assert found["first"] > found["first_others"]
    write_clips(place.data_root / "large", 2, count=2, side=16)
    with pytest.raises(UserError, match="has clips of"):
        score_first_frames(place, FirstFramesSettings(clips="large"))


def test_real_clips_are_as_long_as_those_that_a_run_draws() -> None:
    real = RealSamples(
        torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 4), torch.zeros(2), ["a"] * 2, ["b"] * 2
    )
    assert real.begun((3, 5, 4, 4)).samples[0, 0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert real.begun((3, 17, 4, 4)) is real and real.begun((3, 4, 4)) is real


def test_what_cannot_be_given_is_refused(place: Place, tmp_path: Path) -> None:
    picture, text = tmp_path / "one.png", tmp_path / "text.webp"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    text.write_text("no clip")
    for wishes, words in (
        ({"begin": text}, "--begin .*text.webp: got an image that cannot be read"),
        ({"begin": tmp_path / "none.webp"}, "cannot be read: No such file"),
        ({"begin": picture, "mask": picture}, "--begin .*has 1 frames; it must have 2"),
        ({"control": [str(picture)]}, "--control .*has 1 frames; it must have 2"),
        ({"control": [f"{picture}:scale=0.5"]}, "expected one clip, FILE or FILE:make=true"),
        ({"control": [str(picture)], "image": picture}, "or --control FILE, outlines that it follows"),
        ({"begin": picture, "image": picture}, "expected --image FILE, its first frame, or --begin FILE"),
        ({"image": picture, "mask": picture}, "expected --image FILE, its first frame, or --begin FILE"),
        ({"mask": picture}, "--mask: is of a picture"),
        ({"image": picture, "strength": 0.5}, "--strength: recipe videopoet_tiny_emoji"),
    ):
        with pytest.raises(UserError, match=words):
            draw_prompts(place, ["a cat"], output=tmp_path / "out", **wishes)
