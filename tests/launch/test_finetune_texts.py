"""`nexus finetune` of text encoders and of a new word: what was learnt draws the same in diffusers' pipelines, by its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.generate import export
from nexus_scale.generate.trained import Trained
from nexus_scale.interop import changes, new_tokens
from nexus_scale.interop.clip_text import TRANSFORMERS
from nexus_scale.interop.folders import read_tensors
from tests.launch import test_finetune as tune

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tuned(kind: str, root: Path, *options: str) -> tuple[Any, Trained]:
    """A pipeline, and a run that has learnt from it for two large steps."""
    pipeline = tune.CASES[kind][0](root)
    pipeline.save_pretrained(root / "published")
    tune.pictures(root / "mine", clips=False)
    off = ["callbacks.goodput=null", "callbacks.samples=null", f"sample.steps={tune.STEPS}"]
    size = ["--resolution", "16"] if kind == "flux" else []
    assert tune.command(root, "--steps", "2", "--rank", "2", *size, *off, *options) == 0
    return pipeline, tune.trained_of(root)


def drawn(trained: Trained, prompts: list[str]) -> Tensor:
    return trained.latents(trained.conditions(prompts), seed=3)


def close(ours: Tensor, theirs: Tensor, noise: Tensor, within: float = 2e-3) -> None:
    assert float((ours - theirs).norm() / (theirs - noise).norm()) < within


@pytest.mark.parametrize(
    "kind", ["sdxl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd", "sd3", "flux"))]
)
def test_text_encoders_learn_and_draw_the_same_in_diffusers(kind: str, tmp_path: Path) -> None:
    pipeline, trained = tuned(kind, tmp_path, "--trigger", "big red", "--text-encoders", "--rate", "0.2")
    noise, options = tune.noise_of(trained), tune.CASES[kind][1]
    before, ours = tune.theirs(kind, pipeline, noise, options), drawn(trained, tune.PROMPTS)
    assert float((ours - before).norm() / before.norm()) > 0.02, "it has learnt something"
    clips = [name for name in trained.adapters if name.startswith("clip")]
    assert len(clips) == {"sd": 1, "flux": 1}.get(kind, 2)
    for layout in ("lora", "kohya"):
        folder = export.export_run(trained.place, layout, tmp_path / layout)
        (file,) = folder.glob("*.safetensors")
        for name in clips:  # each encoder's own changes come back
            adapter = trained.adapters[name]
            part = Path(trained.recipe.adapters()[name].base.init_from.path).name  # type: ignore[union-attr]
            found = changes.read_changes(file, TRANSFORMERS, adapter.base, part)
            assert found.keys() == adapter.deltas.keys()
            for layer, delta in adapter.deltas.items():
                product = delta.product().detach().flatten(1)
                assert float((found[layer].b @ found[layer].a - product).abs().max()) < 1e-6
        if layout == "kohya" and kind != "sd":
            continue  # diffusers reads kohya's names of published depths alone, or of SD 3 none
        pipeline.load_lora_weights(file)
        close(ours, tune.theirs(kind, pipeline, noise, options), noise)
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_new_word_is_learnt_alone_and_draws_the_same_in_diffusers(kind: str, tmp_path: Path) -> None:
    options = ["--token", "<cat>", "--vectors", "2", "--begins-as", "cat", "--rate", "0.3"]
    pipeline, trained = tuned(kind, tmp_path, *options)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if kind == "sdxl" else [pipeline.text_encoder]
    adapters = [adapter for _, adapter in sorted(trained.adapters.items())]
    for adapter, encoder in zip(adapters, encoders, strict=True):
        table = encoder.get_input_embeddings().weight.detach()
        assert adapter.rows.shape == (2, table.shape[1])
        assert float((adapter.rows - table[8]).abs().min()) > 0.1  # from "cat"
    prompts, noise, told = ["a <cat> flag", "big <cat>"], tune.noise_of(trained), tune.CASES[kind][1]
    ours = drawn(trained, prompts)
    folder = export.export_run(trained.place, None, tmp_path / "export")
    if kind == "sdxl":  # as diffusers' own documentation loads such a file
        held = read_tensors([folder / new_tokens.FILE])
        for name, encoder, tokenizer in zip(
            new_tokens.OF_TWO, encoders, [pipeline.tokenizer, pipeline.tokenizer_2], strict=True
        ):
            pipeline.load_textual_inversion(held[name], "<cat>", tokenizer, encoder)
    else:
        pipeline.load_textual_inversion(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompts, num_inference_steps=tune.STEPS, output_type="latent", latents=noise, **told).images
    close(ours, theirs, noise)
    plain = drawn(trained, ["a cat flag", "big cat"])
    assert float((ours - plain).norm() / plain.norm()) > 1e-3
    for file in ("file.bin", "file.pt"):  # published files, of diffusers and of AUTOMATIC1111
        rows = torch.randn(3, 8)
        torch.save({"<x>": rows} if file.endswith("bin") else {"string_to_param": {"*": rows}}, tmp_path / file)
        assert torch.equal(new_tokens.embeddings_in(tmp_path / file, 8), rows)
