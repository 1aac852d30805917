"""Published checkpoints as the start of a run: the right values in every rank's part, and no copy of the whole in any rank."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nexus_scale.callbacks.made import SERVICES
from nexus_scale.config import plain_yaml
from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import network_class
from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.checkpoint import newest
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import make_draw
from nexus_scale.interop import flux, mmdit
from nexus_scale.interop.init_from import InitFrom, opened
from nexus_scale.interop.published import family
from nexus_scale.models.adapters.lora import Lora
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.models.diffusion.flux import Flux
from nexus_scale.models.diffusion.mmdit import MMDiT
from nexus_scale.models.vae.vae import VAE
from nexus_scale.planner.memory import memory_per_rank
from nexus_scale.train import Place, check_first_weights, train
from tests.distributed import run_ranks

# 84 M parameters, 321 MiB; no tensor above 18 MiB
FLUX: dict[str, Any] = {
    "latent_channels": 4,
    "hidden_size": 768,
    "depth_double": 3,
    "depth_single": 2,
    "num_heads": 6,
    "text_dim": 64,
    "pooled_dim": 32,
}
SD3: dict[str, Any] = {"depth": 2, "text_dim": 24, "pooled_dim": 16, "pos_embed_max_size": 64, "latent_channels": 4}
MIB = 2**20


def weights(net: torch.nn.Module, seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in net.state_dict().items()}


def write(kind: str, family: str, folder: Path) -> str:
    """A published checkpoint of random weights; returns its path."""
    with torch.device("meta"):
        net = Flux(**FLUX) if family == "flux" else MMDiT(**SD3)
    args, interop = (FLUX, flux) if family == "flux" else (SD3, mmdit)
    if kind == "diffusers":
        return str(interop.DIFFUSERS.write(folder, weights(net), args))
    if kind == "original":
        interop.ORIGINAL.write(folder, weights(net), args)
        return str(next(folder.glob("*.safetensors")))
    save_file(weights(net), folder / "own.safetensors")
    return str(folder / "own.safetensors")


class AnonymousMemory(threading.Thread):
    """The largest private memory of this process while it runs, in bytes; pages of files are not counted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_asked = self.now(), threading.Event()
        self.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while not self._stop_asked.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return max(self.peak, self.now())


def load(rank: int, world_size: int, kind: str, path: str) -> dict[str, Any]:
    engine = build_engine(
        {"model": NetSpec(lambda: Flux(**FLUX), AdamW(lr=1e-4))},
        {"ema": Average(average_of="model", decay=0.9)},
        EngineSettings(engine="deepspeed", micro_batch=1, steps=3, seed=0, whole_numel=0),
    )
    with torch.device("meta"):
        net = Flux(**FLUX)
    before = AnonymousMemory.now()
    memory = AnonymousMemory()
    with opened(InitFrom(format=kind, path=path), net, Path("/")) as read:
        engine.fill("model", read)
    peak = memory.stop() - before

    expected = weights(net)
    same = {
        name: sum(torch.equal(value, expected[p]) for p, value in engine.parameters(name)) for name in ("model", "ema")
    }
    x, t, cond = net.example_inputs(1, 3, "cpu")
    x = x[:, :, :4, :4] + 1
    with engine.weights("model"):
        y = engine.nets["model"](x, t, cond)
    return {"peak": peak, "same": same, "of": len(expected), "y": float(y.double().square().sum())}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["diffusers", "original"])
def test_two_ranks_take_their_parts_and_no_rank_the_whole(kind: str, tmp_path: Path) -> None:
    path = write(kind, "flux", tmp_path)
    with torch.device("meta"):
        net = Flux(**FLUX)
    size = sum(p.numel() for p in net.parameters()) * 4
    largest = max(p.numel() for p in net.parameters()) * 4
    assert size > 300 * MIB and largest < 18 * MIB
    results = run_ranks(2, load, kind, path)
    alone = Flux(**FLUX)
    alone.load_state_dict(weights(net))
    x, t, cond = net.example_inputs(1, 3, "cpu")
    with torch.no_grad():
        expected = float(alone(x[:, :, :4, :4] + 1, t, cond).double().square().sum())
    for result in results:
        assert result["same"] == {"model": result["of"], "ema": result["of"]}
        assert result["y"] == pytest.approx(expected, rel=1e-4)
        # what remains is a few tensors' parts at a time (40 to 85 MiB, as the allocator gives pages back), not half of the checkpoint
        assert result["peak"] < size / 3, f"{result['peak'] / MIB:.0f} MiB of {size / MIB:.0f}"
        print(f"{kind}: peak {result['peak'] / MIB:.1f} MiB above, checkpoint {size / MIB:.0f} MiB")


WIDE: dict[str, Any] = {"depth_double": 1, "depth_single": 2}
"""FLUX.1's own width, 3072, with 3 of its 57 blocks: what a rank needs beside its part does not depend on how many there are."""


def write_sparse(folder: Path) -> Path:
    """A pipeline's network in bf16 whose values are holes in its file: zeros that take no room on a disk."""
    with torch.device("meta"):
        net = Flux(**WIDE)
    header: dict[str, Any] = {}
    end = 0
    shapes = {rows.key: rows.shape for parts in flux.DIFFUSERS.layout(net).values() for rows in parts}
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(flux.DIFFUSERS.config_of(net)))
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(told)) + told)
        file.truncate(8 + len(told) + end)
    return folder


def begin_wide(rank: int, world_size: int, path: str) -> dict[str, float]:
    """The largest memory of a rank that begins a LoRA of the folder, and what the planner says that it holds, in bytes."""
    make = lambda: Lora(base=lambda: Flux(**WIDE), rank=16, layers=("img_qkv", "txt_qkv"))  # noqa: E731
    with torch.device("meta"):
        net, changes = Flux(**WIDE), make()
    count, own = (sum(p.numel() for p in one.parameters()) for one in (net, changes))
    block = max(sum(p.numel() for p in block.parameters()) for block in net.blocks())
    names = [name for name, _ in net.named_parameters()]
    before, memory = AnonymousMemory.now(), AnonymousMemory()
    base = NetSpec(lambda: Flux(**WIDE), frozen=True, given=lambda: names)
    engine = build_engine(
        {"base": base, "model": NetSpec(make, AdamW(lr=1e-4), adapts="base")},
        {},
        EngineSettings(engine="deepspeed", micro_batch=1, steps=3, precision="bf16"),
    )
    with opened(InitFrom(format="diffusers", path=path), net, Path("/")) as read:
        engine.fill("base", read)
    peak = memory.stop() - before
    parts = memory_per_rank(
        own,
        world_size=world_size,
        frozen_parameters=-(-count // world_size),
        whole=own,
        gathered=block if world_size > 1 else 0,
        gradient_bytes=0.0,
    )
    total = sum(float(value.abs().sum()) for name, value in engine.parameters("base") if "proj" in name)
    return {"peak": peak, "planned": sum(parts.values()), "count": count, "sum": total}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lora_begins_with_a_folder_as_wide_as_flux_within_what_is_planned(ranks: int, tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "flux")
    for found in run_ranks(ranks, begin_wide, str(path)):
        print({name: f"{value / MIB:.0f} MiB" for name, value in found.items()})
        assert found["count"] > 5e8 and found["sum"] == 0, "the zeros of the file, not first weights"
        assert found["peak"] <= 1.1 * found["planned"]


@pytest.mark.parametrize("kind", ["diffusers", "original", "safetensors"])
def test_sd3_in_every_format(kind: str, tmp_path: Path) -> None:
    path = write(kind, "sd3", tmp_path)
    with torch.device("meta"):
        net = MMDiT(**SD3)
    with opened(InitFrom(format=kind, path=path), net, Path("/")) as read:  # type: ignore[arg-type]
        for name, expected in weights(net).items():
            assert torch.equal(read(name, 1, expected.numel()), expected.flatten()[1:]), name


def test_a_path_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(write("safetensors", "sd3", tmp_path))
    monkeypatch.setenv("HOME", str(folder.parent))
    with torch.device("meta"):
        net = MMDiT(**SD3)
    with opened(InitFrom(format="safetensors", path=f"~/{folder.name}"), net, tmp_path / "data") as read:
        assert all(read(name, 0, p.numel()).numel() == p.numel() for name, p in net.named_parameters())
    nobody = InitFrom(format="safetensors", path="~nobody1/weights")
    with pytest.raises(UserError, match="the home directory of this user is not known"), opened(nobody, net, tmp_path):
        pass


def test_what_cannot_be_taken_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write("diffusers", "sd3", tmp_path)

    def taken(net: torch.nn.Module, format: str = "diffusers", path: str = path) -> str:
        spec = InitFrom(format=format, path=path)  # type: ignore[arg-type]
        with pytest.raises(UserError) as caught, opened(spec, net, Path("/")):
            pass
        return str(caught.value)

    with torch.device("meta"):
        assert "depth is 2 there and 3 in the recipe" in taken(
            MMDiT(**SD3 | {"depth": 3, "num_heads": 2, "hidden_size": 128})
        )
        assert "latent_size is 128 there and 64" in taken(MMDiT(**SD3 | {"latent_size": 64}))
        assert "expected FluxTransformer2DModel" in taken(Flux(**FLUX))
        assert "no 'original' layout for VAE" in taken(VAE(), "original")
        assert "img_in.weight is missing" in taken(
            Flux(**FLUX), "original", f"{path}/diffusion_pytorch_model.safetensors"
        )
        assert "no safetensors there" in taken(MMDiT(**SD3), "safetensors", str(tmp_path / "nowhere"))
        assert "is missing" in taken(MMDiT(**SD3), "safetensors", path)
        assert "not a readable safetensors" in taken(MMDiT(**SD3), "original", str(tmp_path / "nowhere"))


RECIPES = {
    "dit": ("dit/tiny_fashion_mnist", "DiTTransformer2DModel", {}),
    "unet": ("ddpm/tiny_fashion_mnist", "UNet2DModel", {}),
    "unet_condition": ("stable_diffusion/tiny_openmoji", "UNet2DConditionModel", {}),
    "mmdit": ("mmdit/tiny_openmoji", "SD3Transformer2DModel", {"text_scale": 1.0, "pooled_scale": 1.0}),
    "flux": ("flux/tiny_openmoji", "FluxTransformer2DModel", {}),
    "cogvideox": ("cogvideox/tiny_emoji", "CogVideoXTransformer3DModel", {}),
    "pixart": ("pixart/tiny_openmoji", "PixArtTransformer2DModel", {}),
    "causal_vae3d": ("vae/tiny_clips", "AutoencoderKLCogVideoX", {}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_of_diffusers_is_trained_one_step_and_exported(name: str, tmp_path: Path) -> None:
    """What diffusers has saved comes in, to the bit, and after a step of no size what goes out is the same."""
    diffusers = pytest.importorskip("diffusers")
    recipe_name, class_name, needed = RECIPES[name]
    cls = getattr(diffusers, class_name)
    spec = recipes.load_recipe(recipe_name, {"networks": {"model": needed}}, tiny=True).trained()["model"]
    network, arguments = network_class(spec)
    published = weights(network(**arguments))
    form = family(name).formats["diffusers"]
    cls.from_pretrained(form.write(tmp_path / "own", published, arguments)).save_pretrained(
        tmp_path / "published", max_shard_size="20KB"
    )

    changes: dict[str, Any] = {
        "networks": {"model": {**needed, "init_from": {"format": "diffusers", "path": "published"}}},
        "optimizer": {"lr": 1e-30, "weight_decay": 0.0},
        "steps": 1,
        "callbacks": {"checkpoint": {"every": 1}, "samples": None, "validate": None},
    }
    recipe = recipes.load_recipe(recipe_name, changes, tiny=True)
    recipes.check(recipe, SERVICES)
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")
    place = Place(RunFolder(tmp_path / "run"), tmp_path, tmp_path)
    place.run.path.mkdir()
    for path, part in ((place.run.recipe, recipe), (place.run.cluster, cluster)):
        plain_yaml.write_yaml(path, recipes.dump(part))
    train(recipe, cluster, place, make_draw)
    begun = newest(place.run.checkpoints)
    assert begun is not None and begun.step == 1
    for key, value in published.items():
        assert torch.equal(begun.tensor(f"model/{key}.fp32"), value), key

    exported = cls.from_pretrained(evaluate.export_run(place, "diffusers", tmp_path / "export")).state_dict()
    for key, value in cls.from_pretrained(tmp_path / "published").state_dict().items():
        if "class_embedder" in key:  # widened for diffusers' pipeline, which looks for no class at row 1000
            exported[key], value = exported[key][: len(value) - 1], value[:-1]
        torch.testing.assert_close(exported[key], value, rtol=1e-6, atol=0, msg=key)


def test_embedders_of_blocks_that_were_trained_apart_do_not_become_one(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    arguments = {
        "latent_size": 8,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
        "mlp_norm_eps": 1e-5,
    }
    diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=10,
        out_channels=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    with torch.device("meta"):
        net = DiT(**arguments)  # type: ignore[arg-type]
    spec = InitFrom(format="diffusers", path=str(tmp_path))
    with (
        pytest.raises(UserError, match=r"timestep_embedder.linear_1.weight of block 1 differs"),
        opened(spec, net, Path("/")),
    ):
        pass


def test_a_run_begins_with_published_weights_and_goes_on_with_its_own(tmp_path: Path) -> None:
    unscaled = {"text_scale": 1.0, "pooled_scale": 1.0}
    tiny = recipes.load_recipe("mmdit/tiny_openmoji", {"networks": {"model": unscaled}}, tiny=True)
    cls, arguments = network_class(tiny.trained()["model"])
    published = weights(cls(**arguments))
    mmdit.DIFFUSERS.write(tmp_path / "published", published, arguments)
    changes = {
        "networks": {"model": {**unscaled, "init_from": {"format": "diffusers", "path": "published"}}},
        "optimizer": {"lr": 1e-30, "weight_decay": 0.0},
        "callbacks": {"checkpoint": {"every": 1, "keep": 10}, "samples": None, "validate": None},
    }
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", changes, tiny=True)
    recipes.check(recipe, SERVICES)
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1, "precision": "float32"}, "test")
    place = Place(RunFolder(tmp_path / "run"), tmp_path, tmp_path)
    train(recipe.model_copy(update={"steps": 1}), cluster, place, make_draw)
    begun = newest(place.run.checkpoints)
    assert begun is not None and begun.step == 1
    for name, value in published.items():
        assert torch.equal(begun.tensor(f"model/{name}.fp32"), value), name
        torch.testing.assert_close(begun.tensor(f"ema/{name}.ema"), value, rtol=1e-6, atol=0)
    (tmp_path / "published").rename(tmp_path / "moved")
    train(recipe, cluster, place, make_draw)
    assert newest(place.run.checkpoints).step == recipe.steps  # type: ignore[union-attr]


def test_a_student_begins_as_its_teacher_which_lacks_what_it_is_told_besides(tmp_path: Path) -> None:
    teacher = recipes.load_recipe(
        "lcm/teacher_tiny_fashion_mnist", {"callbacks": {"samples": None, "validate": None}}, tiny=True
    )
    place = Place(RunFolder(tmp_path / "teacher"), tmp_path, tmp_path)
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")
    place.run.path.mkdir()
    for path, part in ((place.run.recipe, teacher), (place.run.cluster, cluster)):
        plain_yaml.write_yaml(path, recipes.dump(part))
    train(teacher, cluster, place, make_draw)
    checkpoint = newest(place.run.checkpoints)
    assert checkpoint is not None
    source = InitFrom(format="run", path="teacher")
    cls, arguments = network_class(recipes.load_recipe("lcm/tiny_fashion_mnist", tiny=True).trained()["model"])
    with torch.device("meta"):
        student, wider = cls(**arguments), cls(**{**arguments, "num_heads": 4})
    with opened(source, student, tmp_path) as read:
        for name, parameter in student.named_parameters():
            if name.startswith("number_embeds."):
                with pytest.raises(KeyError):
                    read(name, 0, parameter.numel())
            else:
                taken = read(name, 0, parameter.numel()).view(parameter.shape)
                assert torch.equal(taken, checkpoint.tensor(f"ema/{name}.ema"))
    with pytest.raises(UserError, match="num_heads is 2 there and 4 in the recipe"), opened(source, wider, tmp_path):
        pass


def test_weights_that_do_not_fit_are_refused_before_a_start(tmp_path: Path) -> None:
    mmdit.DIFFUSERS.write(tmp_path / "published", weights(MMDiT(**SD3)), SD3)

    def with_source(source: dict[str, str]) -> recipes.Recipe:
        changes = {"networks": {"model": {"init_from": source}}}
        return recipes.load_recipe("mmdit/tiny_openmoji", changes, tiny=True)

    for source, words in (
        ({"format": "diffusers", "path": "published"}, "is .* there and .* in the recipe"),
        ({"format": "pickle", "path": "published"}, "networks.model.init_from.format"),
        ({"format": "safetensors", "path": "nothing"}, "no safetensors there"),
    ):
        with pytest.raises(UserError, match=words):
            check_first_weights(with_source(source), Place(RunFolder(tmp_path / "run"), tmp_path, tmp_path))
