"""Voicebox's networks against a float64 reference that is written from the paper, and the vocoder's mels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.models.audio.mel_vocoder import MelVocoder
from nexus_scale.models.audio.voicebox import Voicebox
from nexus_scale.models.audio.voicebox_durations import VoiceboxDurations
from nexus_scale.models.layers.distances import distance_bias, slopes

SMALL: dict[str, Any] = {
    "num_phonemes": 11, "phone_size": 6, "hidden_size": 12, "depth": 4, "num_heads": 3, "kernel_size": 5, "conv_groups": 2,
}  # fmt: skip


def reference(state: dict[str, Tensor], features: Tensor, heads: int, groups: int, first: Tensor | None) -> Tensor:
    """The trunk of one sample (L, F) -> (L, D), place by place and head by head, in the precision of what it is given."""
    x = F.linear(features, state["trunk.proj_in.weight"], state["trunk.proj_in.bias"])
    conv = F.conv1d(x.T[None], state["trunk.places.weight"], state["trunk.places.bias"], padding=2, groups=groups)[0].T
    x = x + F.gelu(conv)
    if first is not None:
        x = torch.cat([first[None], x])
    depth, D = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("trunk.skip_blocks.")), x.shape[1]
    inputs = []

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    for number in range(depth):
        name = f"trunk.skip_blocks.{number}"
        if number < depth // 2:
            inputs.append(x)
        else:
            x = F.linear(
                torch.cat([x, inputs.pop()], -1), state[f"{name}.combine.weight"], state[f"{name}.combine.bias"]
            )
        name += ".block"
        q, k, v = F.linear(norm(x, f"{name}.norm1"), state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"]).split(
            D, -1
        )
        mixed = []
        for head in range(heads):
            part = slice(head * D // heads, (head + 1) * D // heads)
            logits = q[:, part] @ k[:, part].T / math.sqrt(D // heads)
            for i in range(len(x)):
                for j in range(len(x)):
                    time = first is not None and 0 in (i, j)
                    logits[i, j] -= 0 if time else abs(i - j) * slopes(heads)[head]
            mixed.append(logits.softmax(-1) @ v[:, part])
        x = x + F.linear(torch.cat(mixed, -1), state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])
        inner = F.relu(F.linear(norm(x, f"{name}.norm2"), state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
        x = x + F.linear(inner, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])
    x = norm(x, "trunk.norm")
    return x if first is None else x[1:]


def test_the_audio_model_is_the_papers() -> None:
    """Outputs and gradients of padded samples, one of which is told nothing."""
    torch.manual_seed(0)
    net = Voicebox(num_mels=4, **SMALL)
    net.init_weights()
    x, context, t = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.tensor([0.3, 0.8])
    phones, lengths = torch.randint(0, 11, (2, 9)), (9, 6)
    real = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    cond = {"phones": phones, "context": context, "frame_mask": real, "drop": torch.tensor([False, True])}
    found = net(x, t, cond)
    weight = torch.randn(2, 4, 9) * real[:, None]
    (found * weight).sum().backward()

    state = {name: value.detach().double().requires_grad_() for name, value in net.state_dict().items()}
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        told = state["phones.rows"][phones[b, :length]] * (b == 0)
        features = torch.cat([x[b, :, :length].T.double(), context[b, :, :length].T.double(), told], -1)
        angles = float(t[b]) * 1000 * 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
        y = reference(state, features, 3, 2, torch.cat([angles.cos(), angles.sin()]))
        y = F.linear(y, state["out.weight"], state["out.bias"]).T
        torch.testing.assert_close(
            found[b, :, :length].double(), y, atol=1e-4, rtol=1e-4
        )  # sines of up to 800 in float32
        total = total + (y * weight[b, :, :length].double()).sum()
    total.backward()
    for name, p in net.named_parameters():
        expected = state[name].grad
        assert p.grad is not None and expected is not None
        torch.testing.assert_close(
            p.grad.double(), expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3, msg=name
        )


def test_the_duration_model_sees_what_is_shown_alone() -> None:
    torch.manual_seed(0)
    net = VoiceboxDurations(**SMALL).double()
    net.init_weights()
    logs, phonemes = torch.rand(1, 8).double(), torch.randint(0, 11, (1, 8))
    hidden = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    cond = {"phonemes": phonemes, "phonemes_mask": torch.arange(8)[None] < 7}
    found = net(logs, hidden, cond)
    state = dict(net.state_dict())
    shown = (~hidden[0, :7]).double()
    features = torch.cat([torch.stack([logs[0, :7] * shown, shown], -1), state["phones.rows"][phonemes[0, :7]]], -1)
    y = F.linear(reference(state, features, 3, 2, None), state["out.weight"], state["out.bias"])[:, 0]
    torch.testing.assert_close(found[0, :7], y, atol=1e-9, rtol=1e-9)
    changed = torch.where(hidden | ~cond["phonemes_mask"], 7.0, logs)
    assert torch.equal(net(changed, hidden, cond)[:, :7], found[:, :7])


def test_paper_sizes_and_slopes() -> None:
    with torch.device("meta"):
        nets = Voicebox(), VoiceboxDurations()
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
    assert 325 < counts[0] < 335 and 27 < counts[1] < 29  # 330 M and 28 M in the paper
    assert (
        slopes(8) == tuple(2.0**-i for i in range(1, 9))
        and slopes(3)[:2] == (2.0**-4, 2.0**-8)
        and len(set(slopes(12))) == 12
    )
    bias = distance_bias(torch.ones(1, 3, dtype=torch.bool), 2, torch.float64, before=1)
    assert (
        bias[0, 0].tolist()
        == (-(2.0**-4) * torch.tensor([[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 0, 1], [0, 2, 1, 0]])).tolist()
    )
    with pytest.raises(UserError, match="even depth"):
        Voicebox(**SMALL | {"depth": 3})


def test_mels_of_a_vocoder_are_those_of_its_settings() -> None:
    """A tone's mel lies where it sounds, normalised; the decoder's weights say nothing of it."""
    settings = {
        "sample_rate_hz": 16000,
        "hop": 128,
        "window": 512,
        "num_mels": 20,
        "hidden_channels": 8,
        "mlp_channels": 8,
        "depth": 1,
    }
    net = MelVocoder(**settings, mel_mean=-1.0, mel_std=2.0)
    wave = torch.sin(torch.arange(3200) * 2 * math.pi * 1000 / 16000)[None, None]
    mels, plain = net.encode(wave), MelVocoder(**settings).encode(wave)
    assert mels.shape == (1, 25, 20) and int(mels[0, 12].argmax()) == round(
        1000 / (2840 / 21) - 1
    )  # 1000 Hz is 1000 mel
    torch.testing.assert_close(mels, (plain + 1) / 2)
    assert net.codes_follow_from == MelVocoder(**settings | {"depth": 3}, mel_mean=-1.0, mel_std=2.0).codes_follow_from
    with pytest.raises(UserError, match="no frequency"):
        MelVocoder(**settings | {"num_mels": 200})
