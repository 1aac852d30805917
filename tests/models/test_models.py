"""Networks: sizes of the papers, shapes, initialisation, tags, what they refuse, and that they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.config.recipe import Network, configs_root, load_recipe, network_class
from nexus_scale.config.registry import find, names
from nexus_scale.contracts import UserError
from nexus_scale.kernels import blocked, modulation
from nexus_scale.models.diffusion.mmdit import MMDiT
from nexus_scale.models.layers.embeddings import sincos_position_2d, sinusoid
from nexus_scale.models.layers.tags import tag_param, tags_of
from nexus_scale.models.layers.text import compose_text
from nexus_scale.models.vae.vae import VAE

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "latent_size": 8,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "text_dim": 24,
    "pooled_dim": 20,
    "qk_norm": "rms_norm",
    "dual_attention_blocks": 1,
    "pos_embed_max_size": 8,
}
TINY_VAE: dict[str, Any] = {"image_size": 16, "latent_channels": 5, "hidden_size": 16, "depth": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_mmdit(**changes: Any) -> MMDiT:
    net = MMDiT(**(TINY | changes))
    net.init_weights()
    return net


def randomise(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)


def inputs(batch: int = 2, tokens: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    cond = {"text": torch.randn(batch, tokens, 24), "pooled": torch.randn(batch, 20)}
    return torch.randn(batch, 4, 8, 8), torch.rand(batch), cond


# ------------------------------------------------------------------------------------------------ MMDiT


@pytest.mark.parametrize(
    ("arguments", "billions"),
    [
        ({}, 2.03),
        ({"qk_norm": "rms_norm", "dual_attention_blocks": 13, "pos_embed_max_size": 384}, 2.24),
        ({"depth": 38}, 8.06),
        ({"depth": 38, "qk_norm": "rms_norm"}, 8.06),
    ],
)
def test_parameter_counts_are_the_papers(arguments: dict[str, Any], billions: float) -> None:
    with torch.device("meta"):
        net = MMDiT(**arguments)
    assert round(sum(p.numel() for p in net.parameters()) / 1e9, 2) == billions
    x, t, cond = net.example_inputs(2, 77, "meta")
    assert net(x, t, cond).shape == x.shape == (2, 16, 128, 128)


def test_registered_by_file_name() -> None:
    assert find("models", "mmdit") is MMDiT
    assert find("models", "vae") is VAE


def test_starts_as_the_zero_function_with_gradient_at_the_output_only() -> None:
    net = tiny_mmdit()
    x, t, cond = inputs()
    y = net(x, t, cond)
    assert torch.equal(y, torch.zeros_like(x))
    F.mse_loss(y, x).backward()
    assert net.final.linear.weight.grad.abs().max() > 0
    assert net.joint_blocks[0].img_proj.weight.std() > 0


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 2)])
def test_output_shape_is_input_shape_and_all_parameters_learn(size: tuple[int, int]) -> None:
    net = tiny_mmdit()
    randomise(net)
    _, t, cond = inputs()
    x = torch.randn(2, 4, *size)
    y = net(x, t, cond)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in net.named_parameters():
        dead = name == "joint_blocks.1.heads.txt_q_norm"  # the last block's text queries have no effect
        assert (p.grad is None or not p.grad.any()) if dead else p.grad.abs().max() > 0, name


def test_sees_time_text_pooled_and_place() -> None:
    net = tiny_mmdit()
    randomise(net)
    x, t, cond = inputs()
    with torch.no_grad():
        y = net(x, t, cond)
        assert (net(x, t + 0.1, cond) - y).abs().max() > 1e-3
        for name in cond:
            assert (net(x, t, cond | {name: cond[name] + 1}) - y).abs().max() > 1e-3
        moved = net(x.roll(2, dims=-1), t, cond).roll(-2, dims=-1)
        assert (moved - y).abs().max() > 1e-3


def test_keeps_the_dtype_of_the_latents_around_half_precision_weights() -> None:
    net = tiny_mmdit()
    randomise(net)
    x, t, cond = inputs()
    with torch.no_grad():
        full = net(x, t, cond)
        half = net.bfloat16()(x, t, cond)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


def test_leaves_the_meta_device_whole() -> None:
    with torch.device("meta"):
        net = MMDiT(**TINY)
    expected = {name: tags_of(p) for name, p in tiny_mmdit().named_parameters()}
    net = net.to_empty(device="cpu")
    torch.manual_seed(5)
    net.init_weights()
    assert {name: tags_of(p) for name, p in net.named_parameters()} == expected
    torch.manual_seed(5)
    twin = tiny_mmdit()
    torch.manual_seed(5)
    twin.init_weights()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert not list(net.buffers()), "positions are computed, not stored"
    net.load_state_dict(twin.state_dict(), assign=True)
    assert {name: tags_of(p) for name, p in net.named_parameters()} == expected


def tiny_networks(part: str = "trained") -> dict[str, Network]:
    """Each registered network, from the tiny block of the first recipe that trains it, or builds it to train others with it."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(configs_root().glob("*/*.yaml")):
        if path.parent.name not in ("_base", "cluster", "suites"):
            recipe = load_recipe(path.relative_to(configs_root()).with_suffix("").as_posix(), tiny=True)
            for spec in getattr(recipe, part)().values():
                found.setdefault(spec.name, spec)
    return found


NETWORKS = tiny_networks()


def test_every_registered_network_has_a_recipe() -> None:
    networks = {name for name in names("models") if hasattr(find("models", name), "init_weights")}
    built = tiny_networks("built")
    assert set(built) == networks, "give it a recipe with a tiny block"
    assert all(built[name].frozen for name in networks - set(NETWORKS)), "no recipe trains it"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_parameter_is_tagged_and_owned_below_the_top(name: str) -> None:
    cls, arguments = network_class(NETWORKS[name])
    net: nn.Module = cls(**arguments)
    assert not net._parameters, "ZeRO-3 gathers parameters module by module"
    for name, p in net.named_parameters():
        assert hasattr(p, "nexus_decay"), name
        decays, lr_multiplier = tags_of(p)
        assert lr_multiplier == 1.0 and not (decays and p.dim() < 2), (
            name
        )  # tables and codebooks may go without decay, too
        assert decays == (p.dim() > 1) or "embed" in name or not isinstance(net, MMDiT | VAE), name


def test_tags() -> None:
    p = nn.Parameter(torch.zeros(2))
    assert tags_of(p) == (True, 1.0)
    assert tag_param(p, decay=False, lr_multiplier=0.5) is p
    assert tags_of(p) == (False, 0.5)


def test_blocks_are_all_blocks_and_printing_is_an_architecture_sheet() -> None:
    net = tiny_mmdit()
    assert len(net.blocks()) == 2
    assert "hidden_size=32" in repr(net)
    assert "dual_attention=True" in repr(net)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 33}, "multiple of num_heads"),
        ({"hidden_size": 30, "num_heads": 3}, "multiple of 4"),
        ({"patch_size": 3}, "does not divide latent_size"),
        ({"pos_embed_max_size": 3}, "pos_embed_max_size"),
        ({"dual_attention_blocks": 3}, "dual_attention_blocks"),
        ({"depth": 0}, "depth"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MMDiT(**(TINY | changes))


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = tiny_mmdit()
    x, t, cond = inputs()
    for changed, words in (
        ((x[:, :3], t, cond), "3 channels"),
        ((x[..., :7], t, cond), "does not divide latents of 8 x 7"),
        ((x.repeat(1, 1, 3, 1), t, cond), "exceed the position table"),
        ((x, t, cond | {"text": cond["text"][..., :5]}), "set text_dim"),
        ((x, t, cond | {"pooled": cond["pooled"][..., :5]}), "set pooled_dim"),
    ):
        with pytest.raises(ValueError, match=words):
            net(*changed)


def test_learns_to_denoise() -> None:
    """Rectified flow on one constant image per text: the loss falls far below the zero predictor's."""
    net = tiny_mmdit(dual_attention_blocks=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    images, texts, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 24), torch.randn(2, 20)
    losses = []
    for _ in range(100):
        which, eps, t = torch.randint(2, (16,)), torch.randn(16, 4, 8, 8), torch.rand(16)
        x0 = images[which]
        x_t = torch.lerp(x0, eps, t[:, None, None, None])
        loss = F.mse_loss(net(x_t, t, {"text": texts[which], "pooled": pooled[which]}), eps - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses


# ---------------------------------------------------------------------------------- text and embeddings


def test_one_encoder_passes_through() -> None:
    _, _, cond = inputs()
    text, mask, pooled = compose_text(cond, 24)
    assert text is cond["text"]
    assert mask is None
    assert pooled is cond["pooled"]


def test_three_encoders_lie_as_in_sd3() -> None:
    clip_l, clip_g, t5 = torch.randn(2, 4, 6), torch.randn(2, 4, 8), torch.randn(2, 5, 24)
    clip_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    cond = {
        "text": clip_l,
        "text_2": clip_g,
        "text_3": t5,
        "pooled": torch.randn(2, 12),
        "pooled_2": torch.randn(2, 8),
        "text_mask": clip_mask,
        "text_2_mask": clip_mask,
    }
    text, mask, pooled = compose_text(cond, 24)
    assert torch.equal(text[:, :4, :6], clip_l)
    assert torch.equal(text[:, :4, 6:14], clip_g)
    assert not text[:, :4, 14:].any()
    assert torch.equal(text[:, 4:], t5)
    assert mask is not None
    assert torch.equal(mask, torch.cat((clip_mask, torch.ones(2, 5, dtype=torch.bool)), dim=1))
    assert torch.equal(pooled, torch.cat((cond["pooled"], cond["pooled_2"]), dim=-1))
    net = tiny_mmdit()
    randomise(net)
    x, t, _ = inputs()
    with torch.no_grad():
        joined = net(x, t, cond)
        assert torch.equal(joined, net(x, t, {"text": text, "text_mask": mask, "pooled": pooled}))


def test_encoders_that_cannot_be_joined_are_refused() -> None:
    _, _, cond = inputs()
    with pytest.raises(ValueError, match="text_2 4"):
        compose_text(cond | {"text_2": torch.randn(2, 4, 8)}, 64)
    with pytest.raises(ValueError, match="text and text_2: 32 channels"):
        compose_text(cond | {"text_2": torch.randn(2, 3, 8)}, 24)
    with pytest.raises(ValueError, match="text_3: 30 channels"):
        compose_text(cond | {"text_3": torch.randn(2, 3, 30)}, 24)


def test_positions_are_the_centre_crop_of_one_table() -> None:
    device = torch.device("cpu")
    table = sincos_position_2d(6, 6, 16, table_size=6, base_size=4, device=device).view(6, 6, 16)
    crop = sincos_position_2d(2, 3, 16, table_size=6, base_size=4, device=device).view(2, 3, 16)
    assert torch.equal(crop, table[2:4, 1:4])
    # x in the first half, y in the second; place 3 of 6 in units of base 4 is 2
    assert torch.allclose(table[0, 3, 0], torch.tensor(2.0).sin())
    assert torch.allclose(table[3, 0, 8], torch.tensor(2.0).sin())


def test_sinusoid() -> None:
    t = torch.tensor([0.0, 500.0])
    s = sinusoid(t, 8)
    assert torch.equal(s[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert torch.allclose(s[1, [0, 4]], torch.stack((torch.cos(t[1]), torch.sin(t[1]))))


# ------------------------------------------------------------------------- hand-written gradients, on a CPU


def gradients(fn: Any, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients for random directions, of `fn` at `inputs`."""
    leaves = [v.clone().requires_grad_() for v in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs], materialize_grads=True)
    return [y.detach() for y in outputs] + list(grads)


@pytest.mark.parametrize("tokens", [3, 40])
def test_blocked_norm_and_gate_equal_the_kernels(tokens: int) -> None:
    width = 512
    assert (tokens * width >= blocked.WORTH_A_CALL) == (tokens == 40), "both paths"
    x, y = torch.randn(2, 3, tokens, width, dtype=torch.float64)
    shift, scale = torch.randn(2, 3, width, dtype=torch.float64)
    for ours, plain in (
        (lambda a, b, c: blocked.norm_modulate(a, b, c, 1e-6), lambda a, b, c: modulation.norm_modulate(a, b, c, 1e-6)),
        (lambda a, b, c: blocked.gated_add(a, b, y + c.sum()), lambda a, b, c: modulation.gated_add(a, b, y + c.sum())),
    ):
        for got, expected in zip(gradients(ours, x, shift, scale), gradients(plain, x, shift, scale), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_q", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_blocked_heads_equal_the_plain_path(normed: bool, num_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    img, txt = torch.randn(5, 7, 48, dtype=torch.float64), torch.randn(5, 4, 48, dtype=torch.float64)
    weights = list(torch.randn(4, 8, dtype=torch.float64)) if normed else []

    def heads(a: Tensor, b: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        return blocked.join_heads((a, b), w[:2], w[2:], num_q, 2, 1e-6)

    monkeypatch.setattr(blocked, "IN_CACHE", 2 * 7 * 16)  # two samples at a time, and one left over
    ours = gradients(heads, img, txt, *weights)
    monkeypatch.setattr(blocked, "_on_cpu", lambda *_: False)
    plain = gradients(heads, img, txt, *weights)
    assert ours[0].shape == (5, 7 if num_q == 1 else 11, 2, 8)
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------- VAE


def tiny_vae(**changes: Any) -> VAE:
    net = VAE(**(TINY_VAE | changes))
    net.init_weights()
    return net


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_vae_shapes_and_gradients(size: tuple[int, int]) -> None:
    net = tiny_vae()
    assert net.latent_shape == (5, 4, 4)
    randomise(net)
    x = torch.rand(2, 3, *size) * 2 - 1
    h, w = size[0] // 4, size[1] // 4
    x_hat, mean, logvar = net(x, torch.randn(2, 5, h, w))
    assert x_hat.shape == x.shape
    assert mean.shape == logvar.shape == (2, 5, h, w)
    assert torch.equal(net.encode(x), torch.cat((mean, logvar), dim=1))
    (x_hat.square().sum() + logvar.sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_vae_without_noise_decodes_the_mean_and_with_noise_samples_the_posterior() -> None:
    net = tiny_vae()
    nn.init.normal_(net.enc_logvar.weight, std=0.1)
    x, eps = torch.rand(2, 3, 16, 16), torch.randn(2, 5, 4, 4)
    with torch.no_grad():
        x_hat, mean, logvar = net(x, None)
        assert torch.equal(x_hat, net.decode(mean))
        assert torch.allclose(net(x, eps)[0], net.decode(mean + (logvar / 2).exp() * eps), atol=1e-5)


def test_vae_starts_linear_with_a_narrow_posterior() -> None:
    net = tiny_vae()
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(net(x + y)[0], net(x)[0] + net(y)[0], atol=1e-5)
        assert torch.equal(net(x)[2], torch.full((2, 5, 4, 4), -4.0))


def test_vae_learns() -> None:
    net = tiny_vae()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    x = F.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, scale_factor=4.0)
    losses = []
    for _ in range(80):
        x_hat, _, _ = net(x, torch.randn(8, 5, 4, 4))
        loss = F.mse_loss(x_hat, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * float(x.square().mean()), losses[-1]


def test_vae_on_meta_and_what_it_refuses() -> None:
    with torch.device("meta"):
        net = VAE()
    x, eps = net.example_inputs(2, 0, "meta")
    assert net(x, eps)[0].shape == (2, 3, 32, 32)
    assert len(net.blocks()) == 6
    with pytest.raises(UserError, match="patch_size"):
        VAE(image_size=30)
    with pytest.raises(UserError, match="hidden_size"):
        VAE(hidden_size=0)
    with pytest.raises(ValueError, match="multiples of patch_size"):
        tiny_vae().encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(ValueError, match="3 channels"):
        tiny_vae().decode(torch.zeros(1, 3, 4, 4))
