"""VALL-E's transformers against lifeiteng/vall-e: outputs and gradients with the same weights, and weights both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Request, UserError
from nexus_scale.interop.init_from import InitFrom, opened
from nexus_scale.interop.valle import export_together, from_original, to_original
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.audio.valle_ar import ValleAR
from nexus_scale.models.audio.valle_nar import ValleNAR
from nexus_scale.objectives.codec_language import CodecLanguage
from nexus_scale.samplers.autoregressive import Autoregressive
from tests.golden import valle as golden


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs).norm() / theirs.norm())


def ours(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """The network of a case, its logits where theirs has some, and which are compared."""
    case = golden.CASES[name]
    ar, nar = golden.networks(case.get("begin", False))
    phonemes, real_text, codes, real_codes = golden.inputs(name)
    cond = {"phonemes": phonemes, "phonemes_mask": real_text}
    if "mode" not in case:
        logits = ar.to(dtype)(codes[..., 0], cond)
        return ar, logits, golden.compared(name, logits.shape[1])
    P = golden.prefix_of(name)
    if case["mode"] == 2:  # the last P frames, put before the utterance
        ends = real_codes.sum(1)
        segments = torch.stack([one[end - P : end] for one, end in zip(codes, ends.tolist(), strict=True)])
        codes, real_codes = torch.cat([segments, codes], 1), torch.cat([real_codes[:, :1].expand(-1, P), real_codes], 1)
    prompt = (torch.arange(codes.shape[1]) < P).expand(len(codes), -1)
    logits = nar.to(dtype)(codes, case["level"], {**cond, "codes_mask": real_codes, "prompt": prompt})[:, P:]
    return nar, logits, golden.compared(name, logits.shape[1])


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-7), (torch.float32, 1e-5)])
def test_outputs_and_gradients_are_theirs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The stored numbers are float32's nearest to float64's."""
    stored = np.load(golden.FILE, allow_pickle=False)
    net, logits, real = ours(name, dtype)
    theirs = torch.from_numpy(stored[f"{name}/logits"]).to(dtype)
    assert logits.shape == theirs.shape
    assert relative(logits[real], theirs[real]) < tolerance
    golden.weighted(name, logits, real).backward()
    compared = 0
    for key, p in net.named_parameters():
        grad = torch.from_numpy(stored[f"{name}/grad/{key}"]).to(dtype)
        assert p.grad is not None, key
        if float(grad.norm()) < 1e-6:
            assert float(p.grad.norm()) < 1e-5, key
            continue
        assert relative(p.grad, grad) < tolerance, key
        compared += 1
    assert compared > 25


@pytest.mark.parametrize("name", golden.SPEECH)
def test_what_is_said_is_theirs(name: str) -> None:
    """The whole way, cache against their computing all anew: likeliest codes of the first book, then of the others."""
    theirs = np.load(golden.FILE, allow_pickle=False)[f"{name}/said"]
    ar, nar = golden.networks()
    phonemes, codes = golden.speech(name)
    sentence = torch.cat([phonemes[:, :1], phonemes[:, golden.ENROLLED - 1 :]], dim=1)
    cond = {"phonemes": phonemes, "sentence": sentence, "codes": codes}
    cond |= {
        f"{kind}_mask": torch.ones_like(cond[kind][..., 0] if kind == "codes" else cond[kind]).bool()
        for kind in tuple(cond)
    }
    objective = CodecLanguage(
        num_codebooks=golden.CODEBOOKS,
        codebook_size=golden.SIZES["codebook_size"],
        prompt="segment" if golden.SPEECH[name] == 2 else "prefix",
    )
    sampler = Autoregressive(temperature=0, min_tokens=0, max_tokens=16 * phonemes.shape[1] + 1)  # their limit
    with torch.no_grad():
        request = Request(sampler=sampler, given={name: cond.pop(name) for name in ("codes", "codes_mask")})
        said = objective.generate({"ar": ar, "nar": nar}, cond, request, ProgressRng(0, 0, "sample", torch.arange(1)))
    assert said.samples[0].tolist() == theirs.tolist() and len(theirs) > 10


def test_the_segment_matters() -> None:
    """The comparison above would see another prompt."""
    stored = np.load(golden.FILE, allow_pickle=False)
    theirs = torch.from_numpy(stored["nar_segment/logits"])
    net, logits, real = ours("nar_segment", torch.float32)
    phonemes, real_text, codes, real_codes = golden.inputs("nar_segment")
    alone = net(codes, 3, {"phonemes": phonemes, "phonemes_mask": real_text, "codes_mask": real_codes})
    assert relative(alone[real], theirs[real]) > 0.01 > relative(logits[real], theirs[real])


@pytest.mark.parametrize(("begin", "shared"), [(False, True), (True, False)])
def test_weights_go_both_ways(begin: bool, shared: bool) -> None:
    ar = ValleAR(**golden.SIZES, begin=begin)
    nar = ValleNAR(**golden.SIZES, num_codebooks=3, share_embedding=shared)
    golden.fill(ar, "ar")
    golden.fill(nar, "nar")
    back = from_original(to_original(ar, nar), golden.SIZES["num_heads"])
    for before, after in zip((ar, nar), back, strict=True):
        state = after.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    assert back[0].begin == begin and back[1].codes.shared == shared


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_may_begin_with_a_published_checkpoint(shared: bool, tmp_path: Path) -> None:
    """Each network reads its own part of their one file, in slices."""
    ar = ValleAR(**golden.SIZES)
    nar = ValleNAR(**golden.SIZES, num_codebooks=3, share_embedding=shared)
    golden.fill(ar, "ar")
    golden.fill(nar, "nar")
    export_together({"ar": ar.float(), "nar": nar.float()}, tmp_path)
    spec = InitFrom(format="original", path="model.safetensors")
    for net in (ar, nar):
        with opened(spec, net, tmp_path) as read:
            for name, p in net.named_parameters():
                assert torch.equal(read(name, 0, p.numel()).view(p.shape), p), name
                assert torch.equal(read(name, p.numel() // 3, p.numel()), p.flatten()[p.numel() // 3 :])
    shallow = ValleAR(**{**golden.SIZES, "depth": 1})
    words = r"depth is 2 there and 1 in the recipe; set networks\.<name>\.depth"
    with pytest.raises(UserError, match=words), opened(spec, shallow, tmp_path):
        pass
    words = r"no 'diffusers' layout for ValleAR; there are .*valle_ar \(original\)"
    with pytest.raises(UserError, match=words), opened(InitFrom(format="diffusers", path="."), ar, tmp_path):
        pass


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    state = to_original(*golden.networks())
    with pytest.raises(UserError, match=r"predict_layer\.weight is missing"):
        from_original({k: v for k, v in state.items() if k != "ar_predict_layer.weight"}, 2)
    with pytest.raises(UserError, match="the network does not have, among them text_prenet"):
        from_original(state | {"ar_text_prenet.1.weight": torch.zeros(1)}, 2)
    with pytest.raises(UserError, match="has shape"):
        from_original(state | {"nar_decoder.layers.0.linear1.bias": torch.zeros(3)}, 2)


def test_parameters_of_the_papers_sizes() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in net.parameters()) for net in (ValleAR(), ValleNAR())]
    assert counts == [153_780_226, 213_605_376]
