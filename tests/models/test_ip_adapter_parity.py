"""IP-Adapter against diffusers' with the same file: what the base answers under it, all gradients, both ways of the file."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import read_tensors
from nexus_scale.interop.ip_adapter import DIFFUSERS
from nexus_scale.models.adapters.ip_adapter import IpAdapter
from nexus_scale.models.diffusion.unet_condition import UNetCondition
from tests.models.test_unet_condition_parity import CASES, pair, small, told
from tests.models.test_unet_parity import error

PLUS = {"image_dim": 10, "tokens": 5, "resampler_depth": 4, "resampler_width": 16, "resampler_heads": 2}
KINDS: dict[str, dict[str, Any]] = {"linear": {"image_dim": 10}, "plus": PLUS}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapter(base: Any, whole: Any, kind: str) -> IpAdapter:
    torch.manual_seed(5)
    net = IpAdapter(base=whole, **KINDS[kind]).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    net.attach(base)
    return net


@pytest.mark.parametrize(("case", "kind"), [("sd15", "linear"), ("sdxl", "linear"), ("sd21_odd_sizes", "plus")])
def test_outputs_gradients_and_file_equal_diffusers(case: str, kind: str, tmp_path: Any) -> None:
    config, size = CASES[case]
    theirs, base = pair(config)
    base.requires_grad_(False)
    whole = partial(_like, base)
    ours = adapter(base, whole, kind)
    file = DIFFUSERS.write(tmp_path, ours.state_dict(), {"base": whole, **KINDS[kind]}) / DIFFUSERS.file
    state = read_tensors([file])
    parts = {part: {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(part)}
             for part in ("image_proj", "ip_adapter")}  # fmt: skip
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    cond, given, _ = told(base, size)
    del cond["text_mask"], given["encoder_attention_mask"]
    image = torch.randn(3, 10) if kind == "linear" else torch.randn(3, 6, 10)
    x, step = torch.randn(3, base.latent_channels, *size), torch.tensor([0, 17, 999])
    given["added_cond_kwargs"] = {**given.get("added_cond_kwargs", {}), "image_embeds": [image[:, None]]}
    y_theirs = theirs(x, step, **given).sample
    told_ours = {**cond, "image_prompt": image, "image_prompt_scale": torch.full((3,), 0.7)}
    y_ours = ours(x, (step + 1) / 1000, told_ours)
    assert error(y_ours, base(x, (step + 1) / 1000, cond)) > 1e-2, "it changes what the base answers"
    assert error(y_ours, y_theirs) < 1e-5
    direction = torch.randn(y_theirs.shape)
    (y_theirs * direction).sum().backward()
    (y_ours * direction).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    _, converted = DIFFUSERS.to_theirs(grads, {"base": whole, **KINDS[kind]})
    expected = sorted((grad for grad in _theirs(theirs)), key=lambda one: (one.numel(), float(one.abs().sum())))
    mine = [part for key, value in converted.items() for part in (value.chunk(2) if "to_kv" in key else [value])]
    mine = sorted(mine, key=lambda one: (one.numel(), float(one.abs().sum())))
    largest = max(float(grad.abs().max()) for grad in expected)
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected, strict=True):
        assert error(a.reshape(b.shape), b, floor=2e-3 * largest) < 1e-5

    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for name, value in DIFFUSERS.args_of_shapes(shapes).items():
        assert getattr(ours, name) == value, name


def _like(base: UNetCondition) -> UNetCondition:
    """A network of the same sizes."""
    names = ("latent_channels", "widths", "depth", "transformer_depth", "num_heads", "text_dim", "num_groups", "pooled_dim",
             "size_frequencies", "linear_projection", "middle_depth")  # fmt: skip
    return UNetCondition(**{name: getattr(base, name) for name in names})


def _theirs(net: Any) -> list[Tensor]:
    """Gradients of what an adapter's file has."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    processors = [p for p in net.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0)]
    found = [*net.encoder_hid_proj.parameters(), *(p for processor in processors for p in processor.parameters())]
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in found]


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_its_base_to_the_bit_and_others_see_nothing_of_it(kind: str) -> None:
    base = small().requires_grad_(False)
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net, other = (IpAdapter(base=small, **KINDS[kind]) for _ in range(2))
    for one in (net, other):
        one.init_weights()
        one.attach(base)
    cond = {"text": torch.randn(2, 3, 6), "image_prompt": torch.randn(2, *([7] * (kind == "plus")), 10)}
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    plain, y = base(x, t, cond), net(x, t, cond)
    assert torch.equal(y, plain)
    y.square().sum().backward()
    assert all(reader.kv.weight.grad is not None and reader.kv.weight.grad.any() for reader in net.readers)
    with torch.no_grad():
        for reader in net.readers:
            reader.kv.weight.normal_()
        assert not torch.equal(net(x, t, cond), plain) and torch.equal(other(x, t, cond), plain)
    with pytest.raises(ValueError, match="set image_dim and resampler_depth"):
        net(x, t, {**cond, "image_prompt": torch.zeros(2, 9)})
    with pytest.raises(UserError, match="no attention to a text"):
        IpAdapter(base=partial(small, transformer_depth=0, middle="none"))


def test_the_published_one_has_its_size() -> None:
    with torch.device("meta"):
        net = IpAdapter(base=UNetCondition, image_dim=1024)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(22.3, abs=0.1)
