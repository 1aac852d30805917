"""Each kernel against the formula written out by hand, and the choice between paths: impostors are seen and not run."""

from __future__ import annotations

import importlib.machinery
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.kernels import choice
from nexus_scale.kernels import linear as linear_kernel
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.choice import OPTIONS, choose, report
from nexus_scale.kernels.identity import identify_apex, identify_flash_attn
from nexus_scale.kernels.linear import linear
from nexus_scale.kernels.modulation import gated_add, modulate, norm_modulate
from nexus_scale.kernels.norms import layer_norm, rms_norm
from nexus_scale.kernels.rope import apply_rope, rope_frequencies


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    torch.set_num_threads(1)
    choice.forget()
    yield
    choice.forget()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


# ------------------------------------------------------------------------------------------- attention


def attention_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v.double()


@pytest.mark.parametrize("masked", ["none", "keys", "full"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_attention_is_softmax_attention(masked: str, scale: float | None, head_dim: int) -> None:
    q, k, v = randn(2, 3, 5, head_dim), randn(2, 3, 7, head_dim, seed=1), randn(2, 3, 7, head_dim, seed=2)
    mask = None
    if masked != "none":
        rows = 1 if masked == "keys" else 5
        mask = randn(2, 1, rows, 7, seed=3) > 0
        mask[..., 0] = True
    for tensor in (q, k, v):
        tensor.requires_grad_()
    y = attention(q, k, v, mask=mask, scale=scale)
    expected = attention_by_hand(q, k, v, mask, scale or head_dim**-0.5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    weight = randn(*y.shape, seed=4)
    got = torch.autograd.grad((y * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_padded_token_does_not_matter() -> None:
    q, k, v = randn(1, 2, 3, 8), randn(1, 2, 4, 8, seed=1), randn(1, 2, 4, 8, seed=2)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    torch.testing.assert_close(attention(q, k, v, mask=mask), attention(q, k[:, :, :3], v[:, :, :3]))
    with pytest.raises(ValueError, match="expected bool"):
        attention(q, k, v, mask=mask.float())


# ---------------------------------------------------------------------------------------------- linear


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN's path for every size, and the shapes that it was given."""
    seen: list[tuple[int, ...]] = []

    def spied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append((*x.shape, weight.shape[0]))
        return product(x, weight, bias)

    product = linear_kernel._product
    monkeypatch.setattr(linear_kernel, "_product", spied)
    monkeypatch.setattr(linear_kernel, "SMALLEST", 0)
    choose({"linear": "onednn"}, "cpu")
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "batched", "transposed"])
def test_onednns_linear_is_torchs(products: list[tuple[int, ...]], layout: str, bias: bool) -> None:
    x = {"rows": randn(6, 5), "batched": randn(2, 3, 5), "transposed": randn(2, 5, 3).transpose(1, 2)}[layout]
    arguments = [x, randn(4, 5, seed=1), *([randn(4, seed=2)] if bias else [])]
    found = []
    for apply in (linear, torch.nn.functional.linear):
        leaves = [value.clone().requires_grad_() for value in arguments]
        y = apply(*leaves)
        found.append([y, *torch.autograd.grad((y * randn(*y.shape, seed=3)).sum(), leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert len(products) == 3, "forward, dx and dW"
    with torch.no_grad():
        torch.testing.assert_close(linear(*arguments), torch.nn.functional.linear(*arguments), rtol=1e-5, atol=1e-6)


def test_onednn_is_given_no_second_factor_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such ones it has its reference code only, a thousand times slower: the gradient of what is concatenated is one."""
    given: list[torch.Tensor] = []
    pointwise = torch.ops.mkldnn._linear_pointwise

    def spied(x: torch.Tensor, weight: torch.Tensor, *others: object) -> torch.Tensor:
        given.append(weight)
        return pointwise(x, weight, *others)

    monkeypatch.setattr(linear_kernel, "SMALLEST", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spied)
    choose({"linear": "onednn"}, "cpu")
    found = []
    for apply in (linear, torch.nn.functional.linear):
        x, weight = (randn(*shape).requires_grad_() for shape in ((6, 5), (4, 5)))
        y = torch.cat([apply(x, weight), apply(x, weight)], 1)  # (6, 8)
        found.append(torch.autograd.grad((y * randn(6, 8, seed=3)).sum() + apply(x, weight).sum(), (x, weight)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert given and all(w.is_contiguous() or w.t().is_contiguous() for w in given)


def test_a_linear_of_onednn_can_be_differentiated_twice(products: list[tuple[int, ...]]) -> None:
    def penalty(apply: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [randn(6, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()]
        y = apply(*leaves).sigmoid().sum()
        (slope,) = torch.autograd.grad(y, leaves[0], create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), leaves))

    for ours, plain in zip(penalty(linear), penalty(torch.nn.functional.linear), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert products


def test_a_linear_without_gradients_of_its_input_computes_none(products: list[tuple[int, ...]]) -> None:
    weight = randn(4, 5, seed=1).requires_grad_()
    linear(randn(6, 5), weight).sum().backward()
    assert weight.grad is not None and len(products) == 2, "forward and dW"
    bias = randn(4).requires_grad_()
    linear(randn(6, 5), weight.detach(), bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((4,), 6.0))
    assert len(products) == 3, "of a bias alone forward only"


def test_what_onednn_is_not_for_is_torchs(products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(4, 5)
    linear(randn(6, 5).bfloat16(), weight.bfloat16())
    linear(randn(6, 5).double(), weight.double())
    linear(randn(6, 5).to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(randn(6, 5), weight).dtype is torch.bfloat16
    monkeypatch.setattr(linear_kernel, "SMALLEST", 6 * 5 * 4 + 1)
    linear(randn(6, 5), weight)
    assert not products
    linear(randn(7, 5), weight)
    assert products


@pytest.mark.parametrize(("capability", "vendor", "wanted"), [
    ("AVX512", "AuthenticAMD", "onednn"), ("AVX512", "GenuineIntel", "torch"), ("AVX2", "AuthenticAMD", "torch"),
])  # fmt: skip
def test_onednn_serves_where_mkl_is_behind(
    capability: str, vendor: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: f"vendor_id\t: {vendor}")
    assert choose({}, "cpu")["linear"].kernel == wanted
    other = {"onednn": "torch", "torch": "onednn"}[wanted]
    assert choose({"linear": other}, "cpu")["linear"].kernel == other, "a run goes on with what it began with"


# ----------------------------------------------------------------------------------- norms, modulation


def test_norms_are_their_formulas() -> None:
    x, weight, bias, eps = randn(2, 5, 16) * 3 + 1, randn(16, seed=1), randn(16, seed=2), 1e-3
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(layer_norm(x, eps=eps).double(), normed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps).double(), normed * weight + bias, rtol=1e-5, atol=1e-6)
    root = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(rms_norm(x, eps=eps).double(), root, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), root * weight, rtol=1e-5, atol=1e-6)


def test_modulation_is_its_formula() -> None:
    x, y, shift, scale = randn(3, 4, 8), randn(3, 4, 8, seed=1), randn(3, 8, seed=2), randn(3, 8, seed=3)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(gated_add(x, scale, y), x + scale[:, None] * y)
    torch.testing.assert_close(norm_modulate(x, shift, scale, 1e-6), modulate(layer_norm(x), shift, scale))
    for fn in (lambda: norm_modulate(x, shift, scale), lambda: gated_add(x, scale, y)):
        assert fn().shape == x.shape


def test_rope_turns_pairs_and_knows_only_distances() -> None:
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], dim=1)  # (12, 2)
    cos, sin = rope_frequencies(positions, (4, 8))
    assert cos.shape == sin.shape == (12, 6)
    x = randn(2, 3, 12, 12)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    by_hand = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    torch.testing.assert_close(apply_rope(x, cos, sin), by_hand)
    torch.testing.assert_close(apply_rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    # The product of a query and a key is unchanged when both positions move together.
    q, k = randn(1, 1, 1, 12), randn(1, 1, 1, 12, seed=1)

    def product(q_at: list[int], k_at: list[int]) -> torch.Tensor:
        turned = [apply_rope(z, *rope_frequencies(torch.tensor([at]), (4, 8))) for z, at in ((q, q_at), (k, k_at))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product([5, 2], [1, 7]), product([105, 12], [101, 17]), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product([5, 2], [1, 7]), product([5, 2], [1, 8]))
    with pytest.raises(ValueError, match="even"):
        rope_frequencies(positions, (3, 8))


def test_rope_equals_fluxs() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    positions = torch.arange(10)
    cos, sin = rope_frequencies(positions[:, None], (16,))
    theirs = embeddings.get_1d_rotary_pos_embed(
        16, positions, repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
    )
    x = randn(1, 2, 10, 16)
    torch.testing.assert_close(apply_rope(x, cos, sin), embeddings.apply_rotary_emb(x, theirs), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- the choice


def test_the_choice_is_made_once_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nexus_scale")
    first = choose({"attention": "auto"}, "cpu")
    assert choose({}, torch.device("cpu")) == first
    assert sum(record.message.startswith("kernels on cpu") for record in caplog.records) == 1
    assert set(report()) == set(OPTIONS)
    assert all(entry["kernel"] in OPTIONS[name] and entry["why"] for name, entry in report().items())
    assert report()["attention"]["kernel"] == "sdpa" and "CUDA only" in report()["attention"]["why"]


def test_a_path_asked_for_by_name_is_not_replaced() -> None:
    assert choose({"adam": "torch_foreach"}, "cpu")["adam"].kernel == "torch_foreach"
    with pytest.raises(UserError, match=r"cudnn.*is not available"):
        choose({"attention": "cudnn"}, "cpu")
    with pytest.raises(UserError, match="flash_attn"):
        choose({"attention": "flash_atn"}, "cpu")
    with pytest.raises(UserError, match="did you mean 'attention'"):
        choose({"atention": "auto"}, "cpu")


def plant(folder: Path, name: str, files: dict[str, str], metadata: str | None = None, record: bool = False) -> Path:
    """A package whose every file leaves a canary when it is run; returns where the canary would be."""
    canary = folder / "executed"
    for file, text in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or f"open({str(canary)!r}, 'w').close()\n", encoding="utf-8")
    if metadata is not None:
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}", encoding="utf-8"
        )
        if record:
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
    return canary


APEX = {"apex/__init__.py": "", "apex/normalization/__init__.py": "", "apex/normalization/fused_layer_norm.py": ""}
FLASH = {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": ""}
SO = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.mark.parametrize(
    ("name", "files", "metadata", "record", "reason"),
    [
        ("apex", {"apex/__init__.py": ""}, None, False, "no installed distribution"),
        ("apex", {"apex.py": ""}, None, False, "not a package"),
        ("apex", APEX, "Requires-Dist: pyramid>=1.0\n", True, "requires pyramid"),
        ("apex", APEX, "", False, "not among the files"),
        ("apex", {"apex/__init__.py": ""}, "", True, "no apex/normalization/fused_layer_norm.py"),
        ("apex", APEX, "", True, "fused_layer_norm_cuda is missing"),
        ("apex", APEX | {"fused_layer_norm_cuda.py": ""}, "", True, "not a compiled extension"),
        ("flash_attn", FLASH, None, False, "no installed distribution"),
        ("flash_attn", FLASH, "", True, "flash_attn_2_cuda is missing"),
    ],
)
def test_an_impostor_is_recognised_and_never_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    files: dict[str, str],
    metadata: str | None,
    record: bool,
    reason: str,
) -> None:
    canary = plant(tmp_path, name, files, metadata, record)
    monkeypatch.syspath_prepend(str(tmp_path))
    identity = identify_apex() if name == "apex" else identify_flash_attn()
    assert identity.found and not identity.genuine and reason in identity.why
    choose({}, "cpu")
    kernel = "norm" if name == "apex" else "attention"
    assert report()[kernel]["kernel"] in ("torch", "sdpa") and reason in report()[kernel]["why"]
    assert sum(reason in record.message for record in caplog.records if record.levelno == logging.WARNING) == 1
    with pytest.raises(UserError, match="is not available"):
        choose({kernel: name}, "cpu")
    attention(randn(1, 1, 2, 8), randn(1, 1, 2, 8), randn(1, 1, 2, 8))
    layer_norm(randn(2, 8))
    assert not canary.exists() and name not in sys.modules


@pytest.mark.parametrize(
    ("name", "files", "kernel"),
    [
        ("apex", APEX | {f"fused_layer_norm_cuda{SO}": "x"}, "norm"),
        ("flash_attn", FLASH | {f"flash_attn_2_cuda{SO}": "x"}, "attention"),
    ],
)
def test_the_real_one_is_recognised_and_left_alone_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, str], kernel: str
) -> None:
    canary = plant(tmp_path, name, files, "", record=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    identity = identify_apex() if name == "apex" else identify_flash_attn()
    assert identity.genuine, identity.why
    choose({}, "cpu")
    assert "serves CUDA only" in report()[kernel]["why"]
    assert not canary.exists() and name not in sys.modules


@pytest.mark.gpu
def test_gpu_attention_and_norms_equal_the_plain_path() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    choose({}, "cuda")
    q, k, v = (randn(2, 4, 256, 64, seed=i).cuda().bfloat16() for i in range(3))
    mask = torch.ones(2, 1, 1, 256, dtype=torch.bool, device="cuda")
    mask[..., 200:] = False
    for given in (None, mask):
        got = attention(q, k, v, mask=given).double()
        torch.testing.assert_close(got, attention_by_hand(q, k, v, given, 64**-0.5), rtol=2e-2, atol=2e-2)
    x, weight = randn(3, 5, 128).cuda(), randn(128, seed=1).cuda()
    torch.testing.assert_close(
        layer_norm(x, weight, weight), torch.nn.functional.layer_norm(x, (128,), weight, weight, 1e-6)
    )
    torch.testing.assert_close(rms_norm(x, weight), torch.nn.functional.rms_norm(x, (128,), weight, 1e-6))
