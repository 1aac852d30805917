"""CogVideoX against diffusers' CogVideoXTransformer3DModel with the same weights: outputs, gradients of parameters and inputs.

In float64 and in float32, relative to the largest value of each tensor; a bias's gradient is measured against that of its
layer's matrix if that is larger, since biases of keys have none in exact arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nexus_scale.interop.cogvideox import DIFFUSERS
from nexus_scale.models.diffusion.cogvideox import CogVideoX

diffusers = pytest.importorskip("diffusers")


class Case(NamedTuple):
    config: dict[str, Any]
    latents: tuple[int, int, int]
    text_tokens: int


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 20,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 5,
    }
    return base | changes


ROTARY = {"use_rotary_positional_embeddings": True}

CASES = {
    "sincos": Case(config(), (3, 8, 12), 5),
    "sincos_other_size": Case(config(), (2, 4, 10), 5),
    "sincos_one_frame": Case(config(num_layers=1), (1, 8, 12), 5),
    "sincos_scaled": Case(
        config(temporal_interpolation_scale=2.0, spatial_interpolation_scale=1.0, num_attention_heads=3), (5, 6, 6), 5
    ),
    "rotary": Case(config(**ROTARY), (3, 8, 12), 7),
    "rotary_wide": Case(config(**ROTARY, attention_head_dim=32), (2, 4, 16), 3),
    "rotary_tall": Case(config(**ROTARY, num_layers=3), (4, 16, 6), 1),
    "rotary_one_frame_patch_1": Case(config(**ROTARY, patch_size=1), (1, 5, 7), 4),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pair(case: Case) -> tuple[Any, CogVideoX]:
    """diffusers' model with every parameter random, those that start as zero or one too, and ours with its weights."""
    torch.manual_seed(0)
    theirs = diffusers.CogVideoXTransformer3DModel(**case.config).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = CogVideoX(**model_args).double()
    ours.load_state_dict(state)
    return theirs, ours


def inputs(case: Case, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(batch, case.config["in_channels"], *case.latents, dtype=torch.float64)
    step = torch.randint(0, 1000, (batch,))
    text = torch.randn(batch, case.text_tokens, case.config["text_embed_dim"], dtype=torch.float64)
    return x, step, text


def rotation(case: Case) -> tuple[Tensor, Tensor] | None:
    """As CogVideoXPipeline prepares it for the transformer, which has none of its own."""
    if not case.config.get("use_rotary_positional_embeddings"):
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    p = case.config.get("patch_size", 2)
    frames, height, width = case.latents
    grid = (height // p, width // p)
    crops = get_resize_crop_region_for_grid(grid, case.config["sample_width"] // p, case.config["sample_height"] // p)
    cos, sin = get_3d_rotary_pos_embed(case.config["attention_head_dim"], crops, grid, frames)
    return cos, sin


def run_theirs(case: Case, theirs: Any, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
    y = theirs(x.transpose(1, 2), text, step, image_rotary_emb=rotation(case), return_dict=False)[0]
    return y.transpose(1, 2)


def run_ours(ours: CogVideoX, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
    return ours(x, (step + 1) / 1000, {"text": text})


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value or `floor`."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=floor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    theirs, ours = (net.to(dtype) for net in pair(case))
    x, step, text = inputs(case)
    direction = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))

    results = []
    for run in (lambda *args: run_theirs(case, theirs, *args), lambda *args: run_ours(ours, *args)):
        leaves = [v.to(dtype).clone().requires_grad_() for v in (x, text)]
        y = run(leaves[0], step, leaves[1])
        (y * direction).sum().backward()
        results.append((y.detach(), [leaf.grad for leaf in leaves]))
    (y_theirs, grads_theirs), (y_ours, grads_ours) = results

    assert y_ours.shape == x.shape
    assert y_theirs.std() > 0.1
    assert error(y_ours, y_theirs) < 1e-5
    for got, expected in zip(grads_ours, grads_theirs, strict=True):
        assert expected.abs().max() > 0
        assert error(got, expected) < 1e-5

    # gradients go through the same conversion as weights, so each is held against its counterpart
    model_args, _ = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    _, converted = DIFFUSERS.to_theirs({n: p.grad for n, p in ours.named_parameters()}, model_args)
    theirs_grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert converted.keys() == theirs_grads.keys()
    for n, expected in theirs_grads.items():
        matrix = theirs_grads[n.removesuffix(".bias").removesuffix(".weight") + ".weight"]
        assert matrix.abs().max() > 1e-4, n
        assert error(converted[n], expected, floor=float(matrix.abs().max())) < 1e-5, n


@pytest.mark.parametrize("name", ["sincos", "rotary"])
def test_the_comparison_sees_height_and_width_exchanged(name: str) -> None:
    case = CASES[name]
    theirs, ours = pair(case)
    x, step, text = inputs(case)
    with torch.no_grad():
        turned = run_ours(ours, x.transpose(3, 4), step, text).transpose(3, 4)
        assert error(turned, run_theirs(case, theirs, x, step, text)) > 1e-3


@pytest.mark.parametrize("attention", ["masked", "packed"])
@pytest.mark.parametrize("name", ["sincos", "rotary"])
def test_padding_equals_each_sample_with_what_is_real(name: str, attention: str) -> None:
    """Clips of 3, 1 and 2 frames and texts of several lengths in one batch: outputs and gradients of each alone."""
    case = CASES[name]
    theirs, _ = pair(case)
    model_args, state = DIFFUSERS.to_ours(dict(theirs.config), theirs.state_dict())
    ours = CogVideoX(**model_args, attention=attention).double()
    ours.load_state_dict(state)
    x, step, text = inputs(case, batch=3)
    frames, tokens = [3, 1, 2], [case.text_tokens, 2, 1]
    frame_mask = torch.arange(3) < torch.tensor(frames)[:, None]
    text_mask = torch.arange(case.text_tokens) < torch.tensor(tokens)[:, None]
    t = (step + 1) / 1000

    leaf = x.clone().requires_grad_()
    padded = ours(leaf, t, {"text": text, "text_mask": text_mask, "frame_mask": frame_mask})
    padded.square().sum().backward()
    grads = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    for i, (f, n) in enumerate(zip(frames, tokens, strict=True)):
        one = x[i : i + 1, :, :f].clone().requires_grad_()
        y = ours(one, t[i : i + 1], {"text": text[i : i + 1, :n]})
        y.square().sum().backward()
        assert error(padded[i : i + 1, :, :f], y) < 1e-5
        assert not padded[i, :, f:].any()
        assert error(leaf.grad[i : i + 1, :, :f], one.grad) < 1e-5
        assert not leaf.grad[i, :, f:].any()
    for grad, p in zip(grads, ours.parameters(), strict=True):
        assert error(grad, p.grad, floor=1e-3) < 1e-5
    # the masks are what did it
    with torch.no_grad():
        assert error(ours(x, t, {"text": text})[1:, :, :1], padded[1:, :, :1]) > 1e-4


@pytest.mark.parametrize(
    ("changes", "billions"),
    [
        ({}, 1.69),
        ({"hidden_size": 3072, "depth": 42, "num_heads": 48, "positions": "rotary"}, 5.57),
    ],
    ids=["2b", "5b"],
)
def test_published_sizes(changes: dict[str, Any], billions: float) -> None:
    with torch.device("meta"):
        net = CogVideoX(**changes)
    count = sum(p.numel() for p in net.parameters())
    theirs_config, _ = DIFFUSERS.to_theirs(net.state_dict(), changes)
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel.from_config(theirs_config)
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e9, 2) == billions


def test_image_to_videos_network_and_its_learned_places_are_diffusers() -> None:
    """5B-I2V: twice the channels in, and a table that is stored; and with fewer prompts' tokens than it has."""
    changes = {**ROTARY, "in_channels": 8, "use_learned_positional_embeddings": True}
    case = Case(config(**changes), (3, 8, 12), 5)
    theirs, ours = pair(case)
    assert ours.beside_channels == 4 and ours.positions == "learned"
    state = theirs.state_dict()
    state["patch_embed.pos_embedding"] = torch.randn_like(state["patch_embed.pos_embedding"])
    theirs.load_state_dict(state)
    ours.load_state_dict(DIFFUSERS.to_ours(dict(theirs.config), state)[1])
    given = inputs(case)
    expected = run_theirs(case, theirs, *given)
    assert expected.shape[1] == 4 and error(run_ours(ours, *given), expected) < 1e-10
    config_again, again = DIFFUSERS.to_theirs(ours.state_dict(), DIFFUSERS.model_args(dict(theirs.config)))
    assert config_again["in_channels"] == 8 and torch.equal(
        again["patch_embed.pos_embedding"], state["patch_embed.pos_embedding"]
    )
    with pytest.raises(ValueError, match="the learned table of places is for up to 5, and 72"):
        run_ours(ours, given[0][:, :, :2], *given[1:])
