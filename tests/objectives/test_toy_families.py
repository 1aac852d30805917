"""Families that were added by the guide in CONTRIBUTING.md: two workers learn what one learns, a resumed run has the same bits, and each
draws by the method that it declares."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.callbacks.made import SERVICES
from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.contracts import Guidance, RunFolder, UserError
from nexus_scale.engine import distributed, settings
from nexus_scale.engine.checkpoint import newest
from nexus_scale.generate.drawing import guidance_named, request_of
from nexus_scale.generate.export import export_run
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.gan.conv_critic import ConvCritic
from nexus_scale.models.gan.conv_generator import ConvGenerator
from nexus_scale.objectives.adversarial import Adversarial
from nexus_scale.objectives.consistency import Consistency
from nexus_scale.train import Place, make_objective, train
from tests.distributed import run_ranks

STEPS, HALF = 20, 10
IMAGE = {
    "image": {"shape": [3, 8, 8]},
    "source": {"shape": [3, 8, 8]},
    "label": {"shape": [], "dtype": "int64", "high": 3},
}
PLAIN = {"lr": 3e-4, "betas": [0.5, 0.9], "eps": 1e-4, "weight_decay": 0.1}
GENERATOR = {"name": "conv_generator", "image_size": 8, "noise_size": 8, "hidden_size": 8, "depth": 1}
CRITIC = {"name": "conv_critic", "image_size": 8, "hidden_size": 8, "depth": 1}
DENOISER = {
    "name": "dit", "latent_channels": 3, "latent_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2,
    "num_classes": 3, "learn_sigma": False,
}  # fmt: skip
CONSISTENT = {
    "name": "consistency",
    "conditions": ["label"],
    "scales": 4,
    "scales_end": 16,
    "double_every": 8,
    "sigmas": [10.0],
}

AUTOENCODER = {"name": "autoencoder_kl", "image_size": 8, "channels": [4, 8], "depth": 1, "num_groups": 2}
PATCHES = {"name": "patch_discriminator", "image_size": 8, "hidden_size": 4, "depth": 1, "num_groups": 2}

CLIPS = {"num_frames": 5, "image_size": [8, 8]}
SLOW = {**PLAIN, "lr": 1.2e-5}
TRANSLATOR = {"name": "translation_resnet", "image_size": 16, "hidden_size": 4, "depth": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "networks": {
            "model": AUTOENCODER,
            "discriminator": {**PATCHES, "optimizer": PLAIN},
            "perceptual": {"name": "lpips", "channels": [4, 8], "depth": [1, 1], "frozen": True},
        },
        "objective": {"name": "adversarial_elbo", "latent_shape": [4, 4, 4], "discriminator_begins": 6, "mirror": True},
    },
    "tokenizer": {
        "networks": {
            "model": {
                "name": "magvit2",
                **CLIPS,
                "bits": 3,
                "channels": [4, 8, 8],
                "depth": 1,
                "num_groups": 2,
                "temperature": 1.0,
            },
            "discriminator": {"name": "video_discriminator", **CLIPS, "hidden_size": 4, "depth": 2, "optimizer": PLAIN},
        },
        "objective": {"name": "tokenizer", "perceptual_weight": 0.0, "discriminator_begins": 6, "mirror": True},
        "data": {"synthetic": {"samples": 64, "fields": {"video": {"shape": [3, 5, 8, 8]}}}},
    },
    "gan": {
        "networks": {
            "model": {**GENERATOR, "num_classes": 3},
            "critic": {**CRITIC, "num_classes": 3, "optimizer": {"lr": 1e-3, "betas": [0.0, 0.9], "eps": 1e-4}},
            "ema": {"average_of": "model", "decay": 0.9},
        },
        "objective": {
            "name": "adversarial",
            "noise_size": 8,
            "r1_weight": 2.0,
            "conditions": ["label"],
            # The probability moves every three steps, and is in the checkpoint, with the answers since.
            "augment": {
                "name": "ada",
                "changes": "bgcnx",
                "probability": 0.5,
                "target": 0.1,
                "every": 3,
                "images": 1000,
            },
        },
    },
    "wgan": {
        "networks": {
            "model": {**GENERATOR, "optimizer": {"name": "rmsprop", "lr": 3e-4, "eps": 1e-4}},
            "critic": {**CRITIC, "optimizer": {"name": "rmsprop", "lr": 3e-4, "eps": 1e-4, "clip_weights": 0.05}},
        },
        "objective": {"name": "adversarial", "noise_size": 8, "losses": "wasserstein", "critic_steps": 5},
    },
    "pix2pix": {
        "networks": {
            "model": {"name": "translation_unet", "image_size": 8, "hidden_size": 4, "depth": 3, "dropout": 0.0},
            "critic": {**PATCHES, "image_channels": 6, "norm": "affine_instance", "optimizer": PLAIN},
        },
        "objective": {"name": "pix2pix", "mirror": True},
    },
    # Small steps: behind instance norms weights have a direction alone, and two generators that undo each other soon part by chance.
    "cyclegan": {
        "networks": {
            "model": TRANSLATOR,
            "back": {**TRANSLATOR, "optimizer": SLOW},
            "critic": {**PATCHES, "image_size": 16, "norm": "instance", "optimizer": SLOW},
            "source_critic": {**PATCHES, "image_size": 16, "norm": "instance", "optimizer": SLOW},
            "ema": {"average_of": "model", "decay": 0.9},
        },
        "objective": {"name": "cyclegan", "image_shape": [3, 16, 16], "pool_size": 12, "mirror": True},
        "optimizer": SLOW,
        "data": {
            "synthetic": {
                "samples": 64,
                "fields": {"image": {"shape": [3, 16, 16]}, "source": {"shape": [3, 16, 16]}},
            }
        },
    },
    "consistency": {
        "networks": {"model": DENOISER, "target": {"average_of": "model", "decay": 0.9, "warmup": False}},
        "objective": CONSISTENT,
    },
    "distilled": {
        "networks": {
            "model": DENOISER,
            "ema": {"average_of": "model", "decay": 0.9, "warmup": False},
            "teacher": {**DENOISER, "frozen": True, "init_from": {"format": "run", "path": "teacher"}},
        },
        "objective": {
            **CONSISTENT,
            "distils": True,
            "target": "model",
            "growth": "doubling_intervals",
            "times": "log_normal",
            "mirror": True,
        },
    },
    "turbo": {
        "networks": {
            "teacher": {**DENOISER, "frozen": True, "init_from": {"format": "run", "path": "teacher"}},
            "model": {"adapts": "teacher", "name": "lora", "rank": 2, "layers": "all"},
            "critic": {"adapts": "teacher", "name": "projected_critic", "hidden_size": 8, "optimizer": PLAIN},
        },
        "objective": {
            "name": "adversarial_distillation",
            "r1_weight": 1.0,
            "conditions": ["label"],
            "input": "image",
            "mirror": True,
        },
        "sample": {"name": "ode", "steps": 2},
    },
    "importance": {
        "networks": {
            "model": DENOISER,
            "ema": {"average_of": "model", "decay": 0.9},
            "weak": {"average_of": "model", "decay": 0.99, "warmup": False},
        },
        "objective": {
            "name": "denoising",
            "path": "ddpm_cosine",
            "target": "v",
            "times": {"name": "importance", "shares": 4, "warm_up": 2},
            "weight": "min_snr",
            "distance": "pseudo_huber",
            "conditions": ["label"],
            "input": "image",
        },
        "sample": {
            "name": "ancestral",
            "steps": 3,
            "variance": "none",
            "spacing": "trailing",
            "guidance": {"scale": 2.0, "by": "weak", "rescale": 0.5, "interval": [0.1, 1.0]},
        },
    },
    "coupled": {
        "networks": {"model": DENOISER, "ema": {"average_of": "model", "decay": {"name": "half_life", "steps": 8}}},
        "objective": {
            "name": "denoising",
            "path": "conditional_ot",
            "times": "uniform",
            "coupling": {"name": "optimal_transport", "group": 4},
            "conditions": ["label"],
            "input": "image",
        },
        "sample": {"name": "ode", "steps": 3},
    },
}
TEACHER = {
    "networks": {"model": DENOISER, "ema": {"average_of": "model", "decay": 0.9}},
    "objective": {"name": "denoising", "path": "edm", "target": "edm", "times": "log_normal", "conditions": ["label"], "input": "image"},
    "steps": 2,
}  # fmt: skip


def made(name: str, **changed: Any) -> recipes.Recipe:
    values = {
        "name": name, "seed": 1, "steps": STEPS, "global_batch": 8, "optimizer": PLAIN,
        "data": {"synthetic": {"samples": 64, "fields": IMAGE}},
        "callbacks": {
            "checkpoint": {"every": HALF, "keep": 10}, "metrics": {"every": 1},
            "samples": {"every": STEPS, "count": 2}, "validate": {"every": STEPS, "samples": 4},
        },
    }  # fmt: skip
    recipe = recipes.recipe_from({**values, **FAMILIES.get(name, TEACHER), **changed}, name)
    recipes.check(recipe, SERVICES)
    return recipe


def run_once(recipe: recipes.Recipe, root: Path, workers: int) -> None:
    cluster = recipes.cluster_from({"workers": workers, "threads_per_worker": 1, "precision": "float32"}, "test")
    place = Place(RunFolder(root), root / "data", root.parent)
    if distributed.rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        recipes_yaml = recipes.dump(recipe), recipes.dump(cluster)
        for path, values in zip((place.run.recipe, place.run.cluster), recipes_yaml, strict=True):
            write_yaml(path, values)
    distributed.barrier()
    train(recipe, cluster, place, make_draw)


def worker(rank: int, world_size: int, folder: str) -> None:
    """Each family under ZeRO-3: from its start to its end, and again from the middle of it."""
    settings.EngineSettings.stays_whole = lambda self, numel, sharded: not sharded  # type: ignore[method-assign]
    for name in FAMILIES:
        root = Path(folder) / "two" / name
        recipe = made(name, networks=sharded(name))
        run_once(recipe, root, world_size)
        if rank == 0:
            shutil.copytree(root, root.parent / f"{name}_resumed")
            shutil.rmtree(root.parent / f"{name}_resumed" / "checkpoints" / f"step_{STEPS:08d}")
        distributed.barrier()
        run_once(recipe, root.parent / f"{name}_resumed", world_size)


def sharded(name: str) -> dict[str, Any]:
    """Networks of a family, of which a critic with R1 is whole on each worker and all others are sharded."""
    networks = {key: dict(entry) for key, entry in FAMILIES[name]["networks"].items()}
    if name == "gan":
        networks["critic"]["engine"] = "replicated"
    return networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for workers in ("one", "two"):
        run_once(made("teacher"), folder / workers / "teacher", 0)
    for name in FAMILIES:
        run_once(made(name), folder / "one" / name, 0)
    run_ranks(2, worker, str(folder))
    return folder


def tensors(root: Path, step: int = STEPS) -> dict[str, Tensor]:
    checkpoint = newest(RunFolder(root).checkpoints, before=step)
    assert checkpoint is not None and checkpoint.step == step
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


@pytest.mark.parametrize("name", FAMILIES)
def test_two_workers_learn_what_one_learns(name: str, folder: Path) -> None:
    alone, together = tensors(folder / "one" / name), tensors(folder / "two" / name)
    if name == "importance":
        assert alone["objective/samples"].min() > 2, "losses were used"
        for key in ("objective/squares", "objective/weights"):
            torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=1e-6)
    if name == "gan":
        probability = alone["objective/augment_probability"]
        assert 0 < probability != 0.5 and torch.equal(together["objective/augment_probability"], probability)
        assert alone["objective/augment_signs"][1] == 2 * 8, "two steps since it moved"
    assert alone.keys() == together.keys() and not any(key.startswith("teacher/") for key in alone)
    begun = tensors(folder / "one" / name, HALF)
    for key, value in alone.items():
        if key.endswith((".fp32", ".ema")):
            atol = 1e-6 if name == "cyclegan" else 1e-5
            torch.testing.assert_close(together[key], value, rtol=0, atol=atol, msg=key)
    moved = {
        net: max(float((alone[key] - begun[key]).abs().max()) for key in alone if key.startswith(f"{net}/"))
        for net in ("model",)
    }
    assert moved["model"] > 1e-4, "it learnt"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_has_the_same_bits(name: str, folder: Path) -> None:
    whole, resumed = (tensors(folder / "two" / each) for each in (name, f"{name}_resumed"))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_it_draws_by_the_method_that_it_declares(name: str, folder: Path) -> None:
    """The sample callback has drawn while two workers trained; and what is drawn of the run afterwards is a function of the seed."""
    root = folder / "one" / name
    assert [file.name for file in (folder / "two" / name / "samples").glob("*.png")] == [f"step_{STEPS:08d}.png"]
    trained = Trained(RunFolder(root), Place(RunFolder(root), root / "data", root.parent))
    cond = {"label": torch.tensor([0, 1, 2, 1])} if trained.draws.conditions else {}

    def drawn(*positions: int) -> Tensor:
        told = {key: value[list(positions)] for key, value in cond.items()}
        rng = ProgressRng(7, 0, "sample", torch.tensor(positions), torch.device("cpu"))
        with torch.no_grad():
            shape = (3, 5, 8, 8) if "video" in trained.draws.given else (3, 8, 8)
            x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))[list(positions)]
            given = dict.fromkeys(trained.draws.given, x)
            request = replace(request_of(trained.recipe, trained.objective), shape=shape, given=given)
            return trained.objective.generate(trained.nets, told, request, rng).samples

    whole = drawn(0, 1, 2, 3)
    assert whole.shape[:2] == (4, 3) and whole.shape[-2:] == (8, 8) and bool(whole.isfinite().all())
    assert torch.allclose(whole[2:], drawn(2, 3), atol=1e-6) and not torch.allclose(whole[0], whole[1])
    assert "teacher" not in trained.nets, "what taught is not loaded to draw"
    if not trained.draws.walks:
        with pytest.raises(UserError, match=r"guidance 4\.0"):
            trained.guidance(4.0)


@pytest.mark.parametrize("weights", [None, "model", "slow"])
def test_an_average_that_drawing_calls_is_there_after_training(weights: str | None, tmp_path: Path) -> None:
    """The first average draws in its network's place and is itself; asked for others, it is a network of its own."""
    networks = {**FAMILIES["consistency"]["networks"], "slow": {"average_of": "model", "decay": 0.5, "warmup": False}}
    root = tmp_path / "run"
    run_once(made("consistency", networks=networks, steps=2, callbacks={"checkpoint": {"every": 2}}), root, 0)
    trained = Trained(RunFolder(root), Place(RunFolder(root), root / "data", tmp_path), weights)
    stored = tensors(root, 2)
    for name, prefix, kind in (
        ("target", "target", "ema"),
        ("model", weights or "target", "fp32" if weights == "model" else "ema"),
    ):
        for key, value in trained.nets[name].named_parameters():
            assert torch.equal(value, stored[f"{prefix}/{key}.{kind}"])
    assert (trained.nets["target"] is trained.nets["model"]) == (weights is None)
    if weights is None:
        exported = RunFolder(export_run(trained.place, output=tmp_path / "export"))
        nets = Trained(exported, Place(exported, root / "data", tmp_path)).nets
        assert nets["target"] is nets["model"]
        with pytest.raises(UserError, match="was exported without the average 'slow'"):
            nets["slow"]


def test_each_critic_step_of_wgan_has_other_data_and_other_noise_and_bounded_weights(folder: Path) -> None:
    checkpoint = newest(RunFolder(folder / "two" / "wgan").checkpoints)
    assert checkpoint is not None and checkpoint.state["progress"]["draws"] == 5 * STEPS
    critic = [
        checkpoint.tensor(name) for name in checkpoint.names if name.startswith("critic/") and name.endswith(".fp32")
    ]
    assert 0.04 < max(float(value.abs().max()) for value in critic) < 0.050001
    assert (
        int(checkpoint.tensor("critic.optimizer_steps"))
        == 5 * int(checkpoint.tensor("model.optimizer_steps"))
        == 5 * STEPS
    )
    assert {name.rpartition(".")[2] for name in checkpoint.names if "/" in name} == {"fp32", "square_avg"}

    objective = make_objective(made("wgan"), None)
    assert [phase.name for phase in objective.phases(0)] == [*["critic"] * 5, "generator"]
    seen = [
        ProgressRng(1, 0, "critic", torch.arange(4), torch.device("cpu"), occurrence).normal("z", (8,))
        for occurrence in range(5)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(
    ("name", "prompts", "wishes", "option"),
    [
        ("gan", ["1", "2"], {"steps": 3}, "--steps: recipe gan draws at once"),
        ("gan", ["1"], {"guidance": 2.0}, "--guidance: recipe gan draws at once"),
        ("wgan", [], {"guidance": 2.0}, "--guidance: recipe wgan has no conditions"),
        ("wgan", ["1"], {}, "--prompt: recipe wgan has no conditions"),
        ("consistency", ["2"], {"sampler": "ode"}, "--sampler: recipe consistency draws at once"),
        ("consistency", ["2"], {"size": "8x8"}, "--size: recipe consistency draws samples of one size"),
    ],
)
def test_each_is_sampled_and_refuses_by_name_what_it_does_not_take(
    name: str, prompts: list[str], wishes: dict[str, Any], option: str, tmp_path: Path
) -> None:
    run_once(made(name, steps=1, callbacks={"checkpoint": {"every": 1}}), tmp_path / name, 0)
    place = Place(RunFolder(tmp_path / name), tmp_path / "data", tmp_path)
    with pytest.raises(UserError, match=option):
        draw_prompts(place, prompts, output=tmp_path / "none", **wishes)
    assert not (tmp_path / "none").exists()
    given = prompts if make_objective(made(name), None).draws.conditions else []  # type: ignore[union-attr]
    folder = draw_prompts(place, given, per_prompt=2, output=tmp_path / "drawn")
    pictures = [path.read_bytes() for path in folder.glob("00*.png")]
    assert len(pictures) == 2 * max(1, len(given)) == len(set(pictures))


def test_autoguidance_draws_away_from_a_weaker_average(folder: Path, tmp_path: Path) -> None:
    """The recipe's, and what `nexus sample` changes of it; at scale 1 to the bit what is drawn without."""
    root = folder / "one" / "importance"
    trained = Trained(RunFolder(root), Place(RunFolder(root), root / "data", root.parent))
    assert trained.guidance() == Guidance(2.0, interval=(0.1, 1.0), rescale=0.5, by="weak")
    cond = {"label": torch.tensor([0, 1])}

    def latents(**asked: Any) -> Tensor:
        return trained.latents(cond, seed=3, guidance=trained.guidance(asked))

    without = trained.latents(cond, seed=3, guidance=Guidance())
    assert torch.equal(latents(scale=1.0), without)
    by_weak = latents()
    assert not torch.equal(by_weak, without) and not torch.equal(by_weak, latents(by="", interval=None))
    stored = tensors(root)
    for key, value in trained.nets["weak"].named_parameters():
        assert torch.equal(value, stored[f"weak/{key}.ema"])

    given = guidance_named("scale=3,by=weak,interval=[0.2,0.7]")
    drawn = draw_prompts(trained.place, ["1"], output=tmp_path / "drawn", guidance=given)
    assert len(list(drawn.glob("00*.png"))) == 1
    for text, message in (
        ("scale=2,by=weka", "by: 'weka' is neither an average nor a frozen network.*weak"),
        ("scale=2,rescale=1.5", "rescale: got 1.5; expected a share"),
        ("scale=2,blend=3", "blend"),
        ("strong", "expected a number, such as 4.0, or settings"),
        ("2000", "from -1000 to 1000"),
        ("interval=[0.5,0.2]", "low < high"),
    ):
        with pytest.raises(UserError, match=message):
            draw_prompts(trained.place, ["1"], output=tmp_path / "none", guidance=guidance_named(text))
    with pytest.raises(UserError, match="--negative: guidance is by 'weak'"):
        draw_prompts(trained.place, ["1"], output=tmp_path / "none", negative_prompt="2")


# ------------------------------------------------------------------------------------------------- their mathematics


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adversarial(critic_steps=0), r"critic_steps: got 0; expected at least 1"),
        (lambda: Adversarial(gp_weight=-1.0), r"gp_weight: got -1\.0; expected at least 0"),
        (lambda: Adversarial(class_weight=1.0), "told by the condition label"),
        (lambda: Consistency(scales=1), r"objective\.scales: got 1"),
        (lambda: Consistency(sigma_min=90.0), "0 < sigma_min < sigma_max"),
        (lambda: Consistency(sigmas=(100.0,)), r"objective\.sigmas"),
        (lambda: ConvGenerator(image_size=12, depth=3), "multiple of 8"),
        (lambda: ConvCritic(image_size=12, depth=3), "multiple of 8"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
