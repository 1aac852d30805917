"""SoundStorm's network: its blocks are those of a public Conformer; what it is told at a lower rate; padding and company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.kernels.rope import rope_frequencies
from nexus_scale.models.audio.conformer import ConformerBlock
from nexus_scale.models.tokens.masked_conformer import MaskedConformer

SIZES: dict[str, Any] = {
    "num_codebooks": 3,
    "codebook_size": 8,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "dropout": 0.0,
}


class ChannelNorm(nn.LayerNorm):
    """In the place of their batch norm: (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def theirs(hidden: int, heads: int, inner: int, kernel: int) -> nn.Module:
    from transformers import LasrEncoderConfig
    from transformers.models.lasr.modeling_lasr import LasrEncoderBlock

    config = LasrEncoderConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=inner, conv_kernel_size=kernel,
        attention_bias=True, convolution_bias=True, feed_forward_residual_weights=[1.0, 0.5], conv_residual_weights=[1.0, 1.0],
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layer_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "eager"
    block = LasrEncoderBlock(config, 0)
    for name in ("feed_forward1", "self_att", "conv", "feed_forward2", "out"):
        setattr(block, f"norm_{name}", nn.LayerNorm(hidden, 1e-5))
    block.conv.norm = ChannelNorm(hidden, 1e-5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def halves(head_dim: int) -> Tensor:
    """Where a feature of ours stands in theirs, whose positions turn the first half of a head with the second."""
    return torch.stack([torch.arange(head_dim // 2), torch.arange(head_dim // 2) + head_dim // 2], 1).flatten()


def our_names(block: nn.Module, heads: int, hidden: int) -> dict[str, Tensor]:
    """Their weights by our names; also of their gradients."""
    a, c = block.self_attn, block.conv
    order = (torch.arange(heads)[:, None] * (hidden // heads) + halves(hidden // heads)).flatten()
    pairs = {
        "attention_norm": block.norm_self_att, "proj": a.o_proj, "conv.norm": block.norm_conv, "conv.depthwise": c.depthwise_conv,
        "conv.depthwise_norm": c.norm, "norm": block.norm_out,
        **{f"mlp{k}.norm": getattr(block, f"norm_feed_forward{k}") for k in (1, 2)},
        **{f"mlp{k}.fc{n}": getattr(getattr(block, f"feed_forward{k}"), f"linear{n}") for k in (1, 2) for n in (1, 2)},
    }  # fmt: skip
    found = {f"{ours}.{part}": getattr(layer, part) for ours, layer in pairs.items() for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        q, k, v = (getattr(layer, part) for layer in (a.q_proj, a.k_proj, a.v_proj))
        found[f"qkv.{part}"] = (q[order], k[order], v)  # type: ignore[assignment]
    for ours, layer in (("conv.gated", c.pointwise_conv1), ("conv.out", c.pointwise_conv2)):
        found |= {f"{ours}.weight": layer.weight[..., 0], f"{ours}.bias": layer.bias}
    return {name: torch.cat(value) if isinstance(value, tuple) else value for name, value in found.items()}


def asked(block: nn.Module, x: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Their block's answer: its attention wants sums, its convolution a mask. A padded query sees itself, at which nothing looks."""
    pairs = real[:, None, :, None] & real[:, None, None]
    sums = torch.where(pairs | torch.eye(x.shape[1], dtype=torch.bool), 0.0, -1e30)
    attend, convolve = block.self_attn.forward, block.conv.forward
    block.self_attn.forward = lambda hidden_states, attention_mask, **rest: attend(
        hidden_states, attention_mask=sums, **rest
    )
    block.conv.forward = lambda hidden_states, attention_mask: convolve(hidden_states, attention_mask=pairs)
    y: Tensor = block(x, attention_mask=pairs, position_embeddings=(cos[None], sin[None]))
    return y


@pytest.mark.parametrize(("shape", "heads", "inner", "kernel"), [((2, 7, 16), 2, 24, 5), ((3, 5, 12), 3, 12, 3)])
def test_a_block_is_that_of_a_public_conformer(
    shape: tuple[int, int, int], heads: int, inner: int, kernel: int
) -> None:
    """transformers' LasrEncoderBlock with copied weights, padded samples among them: outputs, and gradients of all weights and inputs."""
    torch.manual_seed(0)
    B, T, D = shape
    their = theirs(D, heads, inner, kernel)
    ours = ConformerBlock(D, heads, mlp_ratio=inner / D, kernel_size=kernel, dropout=0.0)
    ours.load_state_dict({name: value.detach().clone() for name, value in our_names(their, heads, D).items()})
    x, lengths = torch.randn(shape), torch.tensor([T, T - 2, T - 1][:B])
    real = torch.arange(T) < lengths[:, None]
    cos, sin = rope_frequencies(torch.arange(T)[:, None], (D // heads,))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [
        ours(inputs[0], real[:, None, None], cos, sin)[real],
        asked(their, inputs[1], real, torch.cat([cos, cos], 1), torch.cat([sin, sin], 1))[real],
    ]
    for y in outputs:
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    gradients = our_names(_Gradients(their), heads, D)
    for name, parameter in ours.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad[real], inputs[1].grad[real], rtol=1e-5, atol=1e-5)


class _Gradients:
    """A module's parts, whose weights are their gradients."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Parameter):
            return value.grad
        return _Gradients(value) if isinstance(value, nn.Module) else value


def a_network(**changed: Any) -> MaskedConformer:
    torch.manual_seed(0)
    net = MaskedConformer(**{**SIZES, "told": {"semantic": 5}, **changed})
    net.init_weights()
    return net.eval()


def test_what_is_told_at_a_lower_rate_stands_for_several_frames() -> None:
    codes, semantic = torch.randint(0, 9, (2, 5, 3)), torch.randint(0, 5, (2, 3))
    net = a_network(repeats={"semantic": 2})
    twice = semantic.repeat_interleave(2, 1)[:, :5]
    found = net(codes, 1, {"semantic": semantic})
    assert found.shape == (2, 5, 8)
    assert torch.equal(found, a_network()(codes, 1, {"semantic": twice}))
    assert torch.equal(found, net(codes, 1, {"semantic": torch.nn.functional.pad(semantic, (0, 4))}))
    assert not torch.equal(found, net(codes, 1, {"semantic": semantic.flip(1)}))
    assert not torch.equal(found, net(codes, 2, {"semantic": semantic}))


def test_padding_and_company_change_nothing() -> None:
    """Nor do frames behind the end reach those before it through a convolution."""
    net, codes, semantic = a_network(), torch.randint(0, 9, (2, 6, 3)), torch.randint(0, 5, (2, 6))
    real = torch.arange(6) < torch.tensor([[4], [6]])
    found = net(codes, 0, {"semantic": semantic, "codes_mask": real})
    codes[0, 4:], semantic[0, 4:] = 8, 0
    torch.testing.assert_close(found[0, :4], net(codes, 0, {"semantic": semantic, "codes_mask": real})[0, :4])
    torch.testing.assert_close(found[0, :4], net(codes[:1, :4], 0, {"semantic": semantic[:1, :4]})[0])


def test_the_papers_sizes_and_what_cannot_be() -> None:
    with torch.device("meta"):
        net = MaskedConformer(told={"semantic": 1024}, repeats={"semantic": 2}, conv_ratio=2.0)
    count = sum(p.numel() for p in net.parameters())
    assert 345e6 < count < 360e6, count  # the paper: 350 M
    codes, _, cond = net.example_inputs(1, 0, "meta", {"codes": 1501})
    assert (
        codes.shape == (1, 1501, 12) and cond["semantic"].shape == (1, 751) and net.tokens(0, {"codes": 1501}) == 1501
    )
    for changed, words in (
        ({"kernel_size": 4}, "odd kernel"),
        ({"hidden_size": 6}, "even width"),
        ({"repeats": {"text": 2}}, "names among told"),
        ({"told": {"semantic": 0}}, "told.semantic"),
    ):
        with pytest.raises(UserError, match=words):
            a_network(**changed)
    with pytest.raises(ValueError, match="semantic from 5"):
        a_network()(torch.zeros(1, 2, 3, dtype=torch.long), 0, {"semantic": torch.full((1, 2), 5)})
