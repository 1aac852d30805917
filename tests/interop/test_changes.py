"""Low-rank changes to and from PEFT, diffusers and kohya's names: the same outputs, gradients, merged weights and samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_scale.config.recipe import network_class
from nexus_scale.contracts import Network, UserError
from nexus_scale.generate import export
from nexus_scale.generate.trained import Trained
from nexus_scale.interop import changes
from nexus_scale.interop.dit import DIFFUSERS as DIT
from nexus_scale.interop.flux import DIFFUSERS as FLUX
from nexus_scale.interop.folders import write_tensors
from nexus_scale.interop.formats import Format
from nexus_scale.interop.published import family
from nexus_scale.interop.unet_condition import DIFFUSERS as UNET
from nexus_scale.models.adapters.lora import Lora
from tests.interop import test_stable_diffusion as sd
from tests.interop.test_dit_interop import ARGS as DIT_ARGS
from tests.media.test_latent_space import recipe_of, start

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

UNET_ARGS: dict[str, Any] = {
    "latent_channels": 4, "latent_size": 8, "widths": (8, 16), "depth": 1, "transformer_depth": 1, "num_heads": 2, "text_dim": 8,
    "num_groups": 4,
}  # fmt: skip
MADE: dict[str, tuple[Format, dict[str, Any], str, tuple[str, ...] | str]] = {
    "fused": (DIT, DIT_ARGS, "DiTTransformer2DModel", "blocks"),
    "convolutions": (UNET, UNET_ARGS, "UNet2DConditionModel", "all"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(net: torch.nn.Module, deviation: float = 0.2) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * deviation)
    return net.requires_grad_(False).eval()


def adapted(kind: str, **settings: Any) -> tuple[Network, Lora]:
    form, arguments, _, layers = MADE[kind]
    net = random(form.network_of(arguments).to_empty(device="cpu"))
    adapter = Lora(base=partial(form.network_of, arguments), layers=layers, **{"rank": 3, "alpha": 6.0, **settings})
    random(adapter).requires_grad_(True)
    adapter.attach(net)
    return net, adapter


def theirs_of(kind: str, net: Network, folder: Path) -> Any:
    form, arguments, name, _ = MADE[kind]
    form.write(folder, net.state_dict(), arguments)
    return getattr(diffusers, name).from_pretrained(folder, local_files_only=True).eval()


def written(folder: Path, layout: str, form: Format, net: Any, adapter: Lora, name: str = "adapter") -> Path:
    return changes.write_changes(folder, layout, [changes.Changed(form, net, adapter, form.part)], name)


def called(kind: str, net: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ours or theirs on the same inputs."""
    torch.manual_seed(1)
    x, steps = torch.randn(2, 4, 8, 8).to(dtype), torch.tensor([100, 900])
    ours = isinstance(net, Network)
    t = (steps.to(dtype) + 1) / 1000
    if kind == "fused":
        label = torch.tensor([1, 4])
        return net(x, t, {"label": label}) if ours else net(x, steps, label).sample
    text = torch.randn(2, 5, 8).to(dtype)
    return net(x, t, {"text": text}) if ours else net(x, steps, text).sample


def close(ours: Tensor, theirs: Tensor, within: float = 1e-5) -> None:
    assert float((ours - theirs).abs().max()) <= within * float(theirs.abs().max())


@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", MADE)
def test_peft_computes_learns_and_merges_the_same(kind: str, decomposed: bool, tmp_path: Path) -> None:
    net, adapter = adapted(kind, decomposed=decomposed)
    before, plain = called(kind, net), {name: value.clone() for name, value in net.state_dict().items()}
    written(tmp_path / "peft", "peft", MADE[kind][0], net, adapter)
    other = peft.PeftModel.from_pretrained(theirs_of(kind, net, tmp_path / "net"), tmp_path / "peft", is_trainable=True)
    ours, theirs = called(kind, adapter), called(kind, other.base_model.model)
    assert float((ours - before).abs().max()) > 0.05 * float(ours.abs().max()), "the changes change something"
    close(ours, theirs.detach())
    # float64: in float32 both round, in the deepest layers to 3e-4 of the gradient
    wide_net, wide = adapted(kind, decomposed=decomposed)
    wide_net.double()
    wide.double()
    for layer, delta in wide.deltas.items():
        if delta.magnitude is not None:  # the lengths that the file has, in float32
            weights = [one.get_parameter(f"{layer}.weight") for one in (net, wide_net)]
            lengths = adapter.deltas[layer].lengths(weights[0])
            assert lengths is not None
            delta.magnitude.data = lengths.double() / weights[1].flatten(1).norm(dim=1)
    ours64 = called(kind, wide, torch.float64)
    theirs64 = called(kind, other.double().base_model.model, torch.float64)
    close(ours64.detach(), theirs64.detach(), 1e-6)
    ours64.square().mean().backward()
    theirs64.square().mean().backward()
    layout = MADE[kind][0].layout(net)
    scale = {layer: delta.scale for layer, delta in adapter.deltas.items()}
    learnt = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    compared = 0
    for layer, delta in wide.deltas.items():
        (rows, *more) = layout[f"{layer}.weight"]
        if more:
            continue  # one A of ours is several of theirs
        theirs_b = learnt[f"base_model.model.{rows.key.removesuffix('.weight')}.lora_B.default.weight"]
        assert delta.lora_B.grad is not None
        close(delta.lora_B.grad.flatten(1) / scale[layer], theirs_b.flatten(1), 1e-6)
        if (
            delta.magnitude is not None and delta.magnitude.grad is not None
        ):  # ours is a multiple of the weight's lengths
            theirs_m = learnt[
                f"base_model.model.{rows.key.removesuffix('.weight')}.lora_magnitude_vector.default.weight"
            ]
            lengths = wide_net.get_parameter(f"{layer}.weight").flatten(1).norm(dim=1)
            close(delta.magnitude.grad / lengths, theirs_m.flatten(), 1e-6)
        compared += 1
    assert compared > 3
    merged = other.float().merge_and_unload().state_dict()
    adapter.merge()
    _, mine = MADE[kind][0].to_theirs(net.state_dict(), MADE[kind][1])
    for name, value in mine.items():
        close(value, merged[name], 1e-6)
    close(called(kind, net), ours.detach())
    adapter.unmerge()
    for name, value in net.state_dict().items():
        close(value, plain[name], 1e-5)
    close(called(kind, net), before)


def test_the_scale_that_diffusers_writes_into_a_file_counts(tmp_path: Path) -> None:
    net = random(UNET.network_of(UNET_ARGS).to_empty(device="cpu"))
    other = theirs_of("convolutions", net, tmp_path / "net")
    other.add_adapter(peft.LoraConfig(r=3, lora_alpha=12, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    other.save_lora_adapter(tmp_path / "saved")
    arguments = partial(UNET.network_of, UNET_ARGS)
    found = changes.read_changes(tmp_path / "saved", UNET, net)
    assert found
    ours = Lora(base=arguments, layers=tuple(found), rank=3, ranks={layer: len(one.a) for layer, one in found.items()})
    read = changes.fill_from(tmp_path / "saved", UNET, ours)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(read(name, 0, parameter.numel()).view(parameter.shape))
    ours.attach(net)
    close(called("convolutions", ours).detach(), called("convolutions", other).detach())


FLUX_ARGS: dict[str, Any] = {
    "latent_channels": 4,
    "depth_double": 1,
    "depth_single": 1,
    "text_dim": 24,
    "pooled_dim": 20,
}
XL_ARGS: dict[str, Any] = {
    **UNET_ARGS, "widths": (8, 16, 16), "depth": 2, "transformer_depth": (0, 1, 2), "middle_depth": 2, "text_dim": 16, "pooled_dim": 6,
    "size_frequencies": 8, "linear_projection": True,
}  # fmt: skip
ORIGINALS: dict[str, tuple[Format, dict[str, Any], str, set[str]]] = {
    "flux": (
        FLUX, FLUX_ARGS, "FluxPipeline",
        {"lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", "lora_unet_double_blocks_0_txt_mlp_2"},
    ),
    "sdxl": (
        UNET, XL_ARGS, "StableDiffusionXLPipeline",
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj",
            "lora_unet_output_blocks_2_1_proj_in", "lora_unet_output_blocks_8_0_in_layers_2", "lora_unet_input_blocks_3_0_op",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORIGINALS)
def test_kohyas_names_of_original_releases_are_those_that_diffusers_reads(kind: str, tmp_path: Path) -> None:
    form, arguments, pipeline, known = ORIGINALS[kind]
    net = form.network_of(arguments)  # of published widths, which diffusers expects: its shapes alone
    adapter = Lora(base=partial(form.network_of, arguments), layers="blocks" if kind == "flux" else "all", rank=2)
    random(adapter)
    adapter.attach(net)
    file = written(tmp_path, "kohya", form, net, adapter, "mine")
    assert file.name == "mine.safetensors"
    assert known <= {name.partition(".")[0] for name in load_file(file)}
    found = changes.read_changes(tmp_path, form, net)
    assert found.keys() == adapter.deltas.keys()
    for layer, delta in adapter.deltas.items():
        vector = torch.randn(found[layer].a.shape[1])
        ours = delta.lora_B.detach().flatten(1) @ (delta.lora_A.detach().flatten(1) @ vector) * delta.scale
        close(found[layer].b @ (found[layer].a @ vector), ours, 1e-5)
    if kind == "sdxl":
        return  # diffusers reads XL's own number of blocks alone
    theirs = getattr(diffusers, pipeline).lora_state_dict(file)
    plain = load_file(written(tmp_path / "theirs", "lora", form, net, adapter))
    layers = {name.removesuffix(".lora_A.weight") for name in plain if "lora_A" in name}
    assert layers == {name.removesuffix(".lora_A.weight") for name in theirs if "lora_A" in name}
    for layer in layers:
        vector = torch.randn(plain[f"{layer}.lora_A.weight"].shape[1])
        close(
            *(one[f"{layer}.lora_B.weight"] @ (one[f"{layer}.lora_A.weight"] @ vector) for one in (theirs, plain)), 1e-5
        )


@pytest.mark.parametrize("layout", changes.LAYOUTS)
@pytest.mark.parametrize("kind", MADE)
def test_every_layout_is_read_again(kind: str, layout: str, tmp_path: Path) -> None:
    net, adapter = adapted(kind, rank_stabilized=True)
    file = written(tmp_path, layout, MADE[kind][0], net, adapter)
    for where in (file, tmp_path):
        found = changes.read_changes(where, MADE[kind][0], net)
        assert found.keys() == adapter.deltas.keys()
        for layer, delta in adapter.deltas.items():
            close(found[layer].b @ found[layer].a, delta.product().detach().flatten(1), 1e-6)
    again = Lora(base=partial(MADE[kind][0].network_of, MADE[kind][1]), layers=MADE[kind][3], rank=3)
    read = changes.fill_from(file, MADE[kind][0], again)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(read(name, 0, parameter.numel()).view(parameter.shape))
    again.attach(net)
    close(called(kind, again).detach(), called(kind, adapter).detach())


def test_an_adapter_that_peft_made_draws_the_same_here(tmp_path: Path) -> None:
    """With ranks of its own for some layers, and of fused ones for parts alone."""
    net, _ = adapted("fused")
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["to_q", "to_v", "proj"], rank_pattern={"to_v": 4}, alpha_pattern={"to_v": 3}, use_rslora=True,
        init_lora_weights=False,
    )  # fmt: skip
    other = peft.get_peft_model(theirs_of("fused", net, tmp_path / "net"), config)
    other.save_pretrained(tmp_path / "peft")
    found = changes.read_changes(tmp_path / "peft", DIT, net)
    ranks = {layer: len(change.a) for layer, change in found.items()}
    assert ranks["dit_blocks.0.qkv"] == 6 and ranks["dit_blocks.1.mlp.fc1"] == 2
    made = Lora(base=partial(DIT.network_of, DIT_ARGS), layers=tuple(ranks), rank=2, ranks=ranks)
    with pytest.raises(UserError, match=r"qkv has rank 6 there and 2 in the recipe; set rank"):
        changes.fill_from(
            tmp_path / "peft", DIT, Lora(base=partial(DIT.network_of, DIT_ARGS), layers=tuple(ranks), rank=2)
        )
    read = changes.fill_from(tmp_path / "peft", DIT, made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(read(name, 0, parameter.numel()).view(parameter.shape))
    made.attach(net)
    with torch.no_grad():
        close(called("fused", made), called("fused", other.base_model.model))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_nothing.lora_down.weight": (2, 4)}, "nothing.lora_down.weight is no low-rank change of"),
        ({"lora_unet_conv_in.hada_w1_a": (2, 4)}, "hada_w1_a is no low-rank change of"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "has one of its two matrices alone"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (8, 3, 1, 1)}, "ranks 2 and 3"),
    ],
)
def test_what_is_no_such_file_is_said(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", {key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(UserError, match=said):
        changes.read_changes(tmp_path / "one.safetensors", UNET, UNET.network_of(UNET_ARGS))
    with pytest.raises(UserError, match="no such file"):
        changes.read_changes(tmp_path / "nothing", UNET, UNET.network_of(UNET_ARGS))


def test_a_run_learns_draws_and_goes_out_as_a_file_that_its_pipeline_loads(tmp_path: Path) -> None:
    """Stable Diffusion's published folder as the base, an adapter that learns two large steps."""
    pipeline = diffusers.StableDiffusionPipeline(**sd.parts_of(tmp_path, ("clip_plain",)), **sd.UNGUARDED)
    pipeline.save_pretrained(tmp_path / "published")
    first = sd.trained_from(tmp_path, {"name": "denoising", "conditions": ["text"]})
    base = {**network_class(first.recipe.networks["model"])[1], "name": "unet_condition"}
    base = {key: value for key, value in base.items() if value is not None} | {
        "frozen": True, "init_from": {"format": "diffusers", "path": "published"}
    }  # fmt: skip
    recipe = recipe_of(
        "latents", None, (4, 8),
        networks={"base": base, "model": {"adapts": "base", "name": "lora", "rank": 2, "layers": "all"}, "ema": {"average_of": "model"}},
        objective={"path": sd.PATH, "target": "eps", "times": "discrete", "name": "denoising", "conditions": ["text"]},
        sample=sd.DDIM,
        optimizer={"name": "adamw", "lr": 0.3, "schedule": {"name": "constant", "warmup_steps": 0}},
        data=first.recipe.model_dump(mode="json")["data"],
    )  # fmt: skip
    place = start(recipe, tmp_path, "changed")
    trained = Trained(place.run, place)
    noise, told = sd.noise_of(trained), {"negative_prompt": [sd.NEGATIVE] * 2}
    ours, plain = sd.drawn(trained), sd.drawn(first)
    assert float((ours - plain).norm() / plain.norm()) > 0.02, "it has learnt something"
    folder = export.export_run(place, None, tmp_path / "export")
    pipeline.load_lora_weights(folder)
    sd.close(ours, sd.theirs(pipeline, latents=noise, **told), noise)
    pipeline.unload_lora_weights()
    whole = export.export_run(place, "diffusers", tmp_path / "whole")
    sd.close(ours, sd.theirs(diffusers.DiffusionPipeline.from_pretrained(whole), latents=noise, **told), noise)
    form = family("unet_condition").formats["diffusers"]
    found = changes.read_changes(folder, form, trained.nets["model"])
    assert found.keys() == trained.adapters["model"].deltas.keys()
