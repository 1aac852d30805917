"""Text without its padding: packed and masked attention agree with each other and with every sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from nexus_scale.contracts import Network
from nexus_scale.engine import compiler
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.kernels import attention as kernel
from nexus_scale.kernels.attention import attention, packed_attention
from nexus_scale.models.diffusion.cogvideox import CogVideoX
from nexus_scale.models.diffusion.flux import Flux
from nexus_scale.models.diffusion.mmdit import MMDiT
from nexus_scale.models.layers.packed import deinterleave, interleave, pack, repeat_rows, text_lengths
from tests.models.test_mmdit_parity import error

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "latent_size": 8,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "text_dim": 24,
    "pooled_dim": 20,
    "pos_embed_max_size": 12,
}
CASES: dict[str, dict[str, Any]] = {
    "sd3": {},
    "qk_norm": {"qk_norm": "rms_norm"},
    "dual": {"qk_norm": "rms_norm", "dual_attention_blocks": 2},
    "dual_in_last_block": {"dual_attention_blocks": 3},
}
LENGTHS = [6, 2, 1, 4]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def networks(**changes: Any) -> tuple[MMDiT, MMDiT]:
    """The same weights, once masked and once packed, in float64."""
    masked, packed = (MMDiT(**TINY, **changes, attention=how).double() for how in ("masked", "packed"))
    with torch.no_grad():
        for p in masked.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    packed.load_state_dict(masked.state_dict())
    return masked, packed


def inputs(size: tuple[int, int] = (8, 12)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask[3] = torch.tensor([True, False, True, True, False, True])  # real tokens need not come first
    n, f64 = len(LENGTHS), torch.float64
    cond = {"text": torch.randn(n, max(LENGTHS), 24, dtype=f64), "pooled": torch.randn(n, 20, dtype=f64)}
    return torch.randn(n, 4, *size, dtype=f64), torch.rand(n), cond | {"text_mask": mask}


def run(net: Network, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the latents, gradients of the parameters."""
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    y = net(leaf, t, cond)
    (y**2).sum().backward()
    assert leaf.grad is not None
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    return y.detach(), leaf.grad, grads


@pytest.mark.parametrize("case", CASES)
def test_packed_masked_and_each_sample_alone_agree(case: str) -> None:
    masked, packed = networks(**CASES[case])
    x, t, cond = inputs()
    y_masked, dx_masked, grads_masked = run(masked, x, t, cond)
    y_packed, dx_packed, grads_packed = run(packed, x, t, cond)
    assert error(y_packed, y_masked) < 1e-12 and error(dx_packed, dx_masked) < 1e-12

    total = {name: torch.zeros_like(p) for name, p in masked.named_parameters()}
    for i in range(len(x)):
        real = cond["text"][i : i + 1, cond["text_mask"][i]]
        alone = {"text": real, "pooled": cond["pooled"][i : i + 1]}
        y, dx, grads = run(masked, x[i : i + 1], t[i : i + 1], alone)
        assert error(y_packed[i : i + 1], y) < 1e-12 and error(dx_packed[i : i + 1], dx) < 1e-12
        for name, grad in grads.items():
            total[name] += grad
    scale = max(float(grad.abs().max()) for grad in total.values())
    for name, grad in total.items():
        for other in (grads_masked[name], grads_packed[name]):
            assert float((grad - other).abs().max()) < 1e-12 * scale, name


def test_packed_runs_no_layer_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = networks()
    rows: list[int] = []
    linear = F.linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return linear(x, *rest)

    monkeypatch.setattr(F, "linear", counted)
    x, t, cond = inputs()
    with torch.no_grad():
        packed(x, t, cond)
    num_img, samples = 4 * 6 * len(x), len(x)
    assert set(rows) == {num_img, sum(LENGTHS), samples}


def test_without_padding_packed_is_the_plain_path_to_the_bit() -> None:
    masked, packed = networks()
    x, t, cond = inputs()
    whole = {"text": cond["text"], "pooled": cond["pooled"]}
    ones = whole | {"text_mask": torch.ones_like(cond["text_mask"])}
    with torch.no_grad():
        assert torch.equal(packed(x, t, whole), masked(x, t, whole))
        assert torch.equal(packed(x, t, ones), masked(x, t, whole))
    assert text_lengths(None, 4) is None and text_lengths(ones["text_mask"], 4) is None


def test_a_sample_without_a_token_is_an_image_alone() -> None:
    _, packed = networks()
    x, t, cond = inputs()
    cond["text_mask"][2] = False
    with torch.no_grad():
        y = packed(x, t, cond)[2]
        none = {"text": cond["text"][2:3, :0], "pooled": cond["pooled"][2:3]}
        assert error(y[None], packed(x[2:3], t[2:3], none)) < 1e-12


COMPILED: dict[str, Callable[[], Network]] = {
    "mmdit": lambda: MMDiT(**TINY | {"depth": 2}, qk_norm="rms_norm", attention="packed"),
    "flux": lambda: Flux(
        latent_channels=4, latent_size=8, hidden_size=32, depth_double=1, depth_single=1, num_heads=2, rope_dims=(4, 6, 6),
        text_dim=24, pooled_dim=20, attention="packed",
    ),
    "cogvideox": lambda: CogVideoX(
        latent_channels=4, latent_frames=3, latent_height=4, latent_width=4, hidden_size=32, depth=2, num_heads=2, text_dim=24,
        time_dim=16, positions="rotary", attention="packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_compute_the_same_in_one_graph_for_all_lengths(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "BACKEND", "eager")  # as in tests/rehearsal/test_warm_up.py
    torch._dynamo.reset()
    counters.clear()
    plain = COMPILED[name]().double()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    network = copy.deepcopy(plain)
    prepare_blocks(network, name, activation_checkpointing=False, compiled=True)
    x, t, cond = inputs((4, 4))
    if name == "cogvideox":
        x = torch.randn(len(x), 4, 3, 4, 4, dtype=torch.float64)
        cond = {"text": cond["text"], "frame_mask": torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]}
    everything = torch.ones(len(x), max(LENGTHS), dtype=torch.bool)
    for number, mask in enumerate((torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None], everything)):
        given = x, t, cond | {"text_mask": mask}
        for one, other in zip(run(network, *given), run(plain, *given), strict=True):
            pairs = [(one, other)] if isinstance(one, Tensor) else [(one[n], other[n]) for n in other]
            assert all(error(a, b) < 1e-12 for a, b in pairs if b.any())
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2, f"batch {number}"


# ----------------------------------------------------------------------------------------- the parts


def test_rows_there_and_back() -> None:
    img, txt, lengths = torch.randn(3, 4, 5), torch.randn(6, 5), (1, 0, 5)
    joint = interleave(img, txt, lengths)
    assert torch.equal(joint[:5], torch.cat((img[0], txt[:1])))
    back = deinterleave(joint, 4, lengths)
    assert torch.equal(back[0], img) and torch.equal(back[1], txt)
    assert torch.equal(repeat_rows(img[:, 0], lengths)[:, 0], img[[0, 2, 2, 2, 2, 2], 0, 0])
    mask = torch.tensor([[True, False], [True, True]])
    text = torch.randn(2, 2, 7)
    assert torch.equal(pack(text, mask)[:, 0], text[[0, 1, 1], [0, 0, 1]])
    assert list(text_lengths(mask, 4) or ()) == [1, 2]


def heads(tokens: int, *, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 2, tokens, 64, dtype=dtype, device=device)


def test_packed_attention_is_attention_of_each_sample() -> None:
    q_lengths, k_lengths = (3, 5, 0), (4, 6, 2)
    q, k, v = heads(8), heads(12), heads(12)
    y = packed_attention(q, k, v, q_lengths=q_lengths, k_lengths=k_lengths, scale=0.3)
    assert torch.allclose(y[:, :, :3], attention(q[:, :, :3], k[:, :, :4], v[:, :, :4], scale=0.3))
    assert torch.allclose(y[:, :, 3:], attention(q[:, :, 3:], k[:, :, 4:10], v[:, :, 4:10], scale=0.3))


def test_lengths_that_do_not_fit_are_refused() -> None:
    q, k = heads(8), heads(12)
    with pytest.raises(ValueError, match="S = 7, 12 and 12"):
        packed_attention(q, k, k, q_lengths=(3, 4), k_lengths=(6, 6))
    with pytest.raises(ValueError, match="a key for every sample"):
        packed_attention(q, k, k, q_lengths=(3, 5), k_lengths=(12, 0))
    with pytest.raises(ValueError, match="a key for every sample"):
        packed_attention(q, k, k, q_lengths=(3, 5), k_lengths=(12,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["_torch_packed", "_flash_packed"])
def test_the_kernel_of_all_samples_equals_a_call_per_sample(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "_flash_packed":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr(kernel, "chosen", lambda _: "flash_attn" if path == "_flash_packed" else "sdpa")
    lengths = (130, 7, 300)
    qkv = [heads(sum(lengths), device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    results = []
    for reference in (False, True):
        given = [x.detach().double().requires_grad_() if reference else x for x in qkv]
        y = packed_attention(*given, q_lengths=lengths, k_lengths=lengths)
        grads = torch.autograd.grad(y.double().square().sum(), given)
        results.append([y.double(), *(g.double() for g in grads)])
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 3e-2
