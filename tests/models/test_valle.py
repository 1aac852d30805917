"""VALL-E: decoding with a cache, what padding may not change, the objective's two phases, and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Request, UserError
from nexus_scale.engine import distributed
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.main_job import parameters
from nexus_scale.models.audio.valle_ar import ValleAR
from nexus_scale.models.audio.valle_nar import ValleNAR
from nexus_scale.objectives.autoregressive import Autoregressive
from nexus_scale.objectives.codec_language import CodecLanguage, put_before
from nexus_scale.objectives.masked import Masked
from nexus_scale.processes.token_draws import cut, draw
from nexus_scale.rehearsal.costs import costs
from nexus_scale.samplers.autoregressive import Autoregressive as Sampler
from tests.distributed import run_ranks

V, K, P = 16, 4, 12
SIZES: dict[str, Any] = {
    "num_phonemes": P,
    "codebook_size": V,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "dropout": 0.0,
}


def networks(seed: int = 0, **changed: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    nets = {"ar": ValleAR(**SIZES, **changed), "nar": ValleNAR(**SIZES, num_codebooks=K)}
    for net in nets.values():
        net.init_weights()
    torch.nn.init.normal_(nets["ar"].head.weight, std=0.3)  # so that what it says depends on what it sees
    return nets


def a_batch(
    lengths: tuple[int, ...] = (11, 7, 9), texts: tuple[int, ...] = (6, 4, 2), pad: int = 0, seed: int = 1
) -> Batch:
    """Random codes and phonemes; with `pad` so many frames and phonemes of rubbish after the longest."""
    generator = torch.Generator().manual_seed(seed)
    B, T, L = len(lengths), max(lengths), max(texts)
    codes = F.pad(torch.randint(0, V, (B, T, K), generator=generator), (0, 0, 0, pad), value=V - 1)
    phonemes = F.pad(torch.randint(1, P, (B, L), generator=generator), (0, pad), value=P - 1)
    fields = {
        "codes": codes, "codes_mask": torch.arange(T + pad) < torch.tensor(lengths)[:, None],
        "phonemes": phonemes, "phonemes_mask": torch.arange(L + pad) < torch.tensor(texts)[:, None],
    }  # fmt: skip
    return Batch(fields, torch.arange(B), torch.arange(B))


def rng_of(batch: Batch, step: int = 0, phase: str = "nar") -> ProgressRng:
    return ProgressRng(0, step, phase, batch.positions)


# ----------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(("begin", "causal_text"), [(False, False), (True, False), (False, True)])
def test_a_cache_gives_what_the_whole_gives(begin: bool, causal_text: bool) -> None:
    """Token by token, with prompts and texts of different lengths in one batch."""
    ar = networks(begin=begin, causal_text=causal_text)["ar"].double().eval()
    batch = a_batch()
    codes, rows = batch["codes"][..., 0], torch.arange(3)
    cond = CodecLanguage.condition(batch)
    with torch.no_grad():
        whole = ar(codes, cond)
        shown = torch.tensor([3, 5, 0 if begin else 1])
        logits, cache = ar.prefill(codes[:, :5], shown, cond, capacity=6)
        for i in range(6):
            place = shown + i - int(not begin)
            torch.testing.assert_close(logits, whole[rows, place], rtol=1e-9, atol=1e-9)
            logits = ar.extend(codes[rows, shown + i], cache)
        with pytest.raises(ValueError, match="the cache is full"):
            ar.extend(codes[:, 0], cache)


def test_the_mask_is_a_prefix_language_models() -> None:
    """A code moves no logit before it; a phoneme moves those of all codes; a later phoneme moves earlier ones' view, or not."""
    batch = a_batch((8,), (5,))
    cond = CodecLanguage.condition(batch)
    for causal_text in (False, True):
        ar = networks(causal_text=causal_text)["ar"].eval()
        codes = batch["codes"][..., 0]
        before = ar(codes, cond)
        changed = codes.clone()
        changed[0, 4] = (changed[0, 4] + 1) % V
        after = ar(changed, cond)
        assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4], after[:, 4])
        other = cond["phonemes"].clone()
        other[0, 4] = other[0, 4] % (P - 1) + 1
        assert not torch.equal(ar(codes, {**cond, "phonemes": other})[:, 0], before[:, 0])
    mask = networks(causal_text=True)["ar"]._prefix_mask(torch.ones(1, 3, dtype=torch.bool), 2)[0, 0]
    assert mask.tolist() == torch.ones(5, 5).tril().bool().tolist()
    mask = networks()["ar"]._prefix_mask(torch.tensor([[True, True, False]]), 2)[0, 0].int().tolist()
    assert mask == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]


def test_wrong_tokens_and_sizes_are_named() -> None:
    nets, batch = networks(), a_batch()
    cond = CodecLanguage.condition(batch)
    with pytest.raises(ValueError, match=r"phonemes from .* expected 0 \.\. 11"):
        nets["ar"](batch["codes"][..., 0], {**cond, "phonemes": cond["phonemes"] + P})
    with pytest.raises(ValueError, match=r"codes from .* expected 0 \.\. 15"):
        nets["nar"](batch["codes"] + V, 1, cond)
    with pytest.raises(ValueError, match="level 0; expected 1"):
        nets["nar"](batch["codes"], 0, cond)
    with pytest.raises(ValueError, match="an empty prompt"):
        nets["ar"].prefill(batch["codes"][:, :0, 0], torch.zeros(3, dtype=torch.long), cond, 4)
    with pytest.raises(UserError, match="a multiple of both num_heads and 2"):
        ValleAR(hidden_size=30, num_heads=4)
    with pytest.raises(UserError, match="num_codebooks: got 1"):
        ValleNAR(num_codebooks=1)


def test_the_dry_run_counts_both_networks_at_the_recipes_lengths() -> None:
    """Against the sum by hand: 12 D^2 multiplications a token and block, attention, and the heads; two operations each, three forwards."""
    recipe = recipes.load_recipe("valle/paper")
    D, depth, L, T = 1024, 12, recipe.data.tokens["phonemes"], recipe.data.tokens["codes"]
    blocks = depth * (12 * D * D * (L + T) + 2 * (L + T) ** 2 * D)
    staged = (2 * depth + 1) * 2 * D * D  # the NAR's norms, once a forward and not once a token
    by_hand = 2 * blocks + staged + T * D * (1025 + 1024)
    counted = costs(recipe)
    assert counted["flops_per_sample"] / 6 == pytest.approx(by_hand, rel=1e-3)
    assert counted["tokens_per_sample"] == L + T
    assert parameters(recipe) == {"ar": 153_780_226, "nar": 213_605_376}


# ---------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize("prompt", ["prefix", "segment"])
def test_padding_changes_neither_losses_nor_gradients(prompt: Any) -> None:
    """However long the padding and whatever lies in it; nor does the company in the micro-batch."""
    objective = CodecLanguage(num_codebooks=K, codebook_size=V, prompt=prompt)

    def losses(batch: Batch) -> tuple[list[float], list[Tensor]]:
        nets = networks()
        values = []
        for phase in ("ar", "nar"):
            loss = objective.loss(phase, nets, batch, rng_of(batch), 0)
            loss.total.backward()
            values.append(float(loss.total.detach()))
        return values, [p.grad for net in nets.values() for p in net.parameters() if p.grad is not None]

    plain, padded = losses(a_batch()), losses(a_batch(pad=5))
    assert plain[0] == pytest.approx(padded[0], rel=1e-6)
    for a, b in zip(plain[1], padded[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    whole = a_batch()
    one = [
        Batch({n: v[i : i + 1] for n, v in whole.fields.items()}, whole.positions[i : i + 1], whole.samples[i : i + 1])
        for i in range(3)
    ]
    alone = [losses(batch)[0] for batch in one]
    assert [sum(values) / 3 for values in zip(*alone, strict=True)] == pytest.approx(plain[0], rel=1e-5)


def test_the_level_is_one_for_all_ranks_and_changes_from_step_to_step() -> None:
    """What a level's loss does not look at: codes of that codebook and later, outside the prompt."""
    nets, batch = networks(), a_batch()
    seen: list[int] = []

    def nar(codes: Tensor, level: int, cond: Any) -> Tensor:
        seen.append(level)
        logits: Tensor = nets["nar"](codes, level, cond)
        return logits

    objective = CodecLanguage(num_codebooks=K, codebook_size=V)
    for step in range(40):
        other = Batch(batch.fields, batch.positions + 3, batch.samples)  # another rank's part
        for part in (batch, other):
            objective.loss("nar", {"nar": nar}, part, ProgressRng(0, step, "nar", part.positions), step)
    assert seen[::2] == seen[1::2] and set(seen) == {1, 2, 3}

    prompted = objective.prompted(batch, rng_of(batch))
    cond = objective.condition(batch) | {"codes_mask": prompted.real, "prompt": prompted.prompt}
    changed = prompted.codes.clone()
    changed[..., 2:] = torch.where(prompted.prompt[..., None], changed[..., 2:], (changed[..., 2:] + 1) % V)
    assert torch.equal(nets["nar"](prompted.codes, 2, cond), nets["nar"](changed, 2, cond))
    changed[..., 1] = (changed[..., 1] + 1) % V
    assert not torch.equal(nets["nar"](prompted.codes, 2, cond), nets["nar"](changed, 2, cond))


def test_either_half_is_a_case_of_the_objectives_of_tokens() -> None:
    """The first codebook is `autoregressive` of one stream that ends; a level is `masked` with all hidden that is no prompt."""
    nets, batch = networks(begin=True), a_batch()
    codec = CodecLanguage(num_codebooks=K, codebook_size=V)

    def ar(tokens: Tensor, cond: Any) -> Tensor:
        logits: Tensor = nets["ar"](tokens[:, 1:, 0], cond)
        return logits[:, :, None]

    first = Autoregressive(num_codebooks=1, codebook_size=V, ends=True, conditions=("phonemes",))
    found = first.loss("main", {"model": ar}, batch, rng_of(batch), 0)
    torch.testing.assert_close(found.total, codec.loss("ar", nets, batch, rng_of(batch), 0).total)

    def nar(codes: Tensor, level: int, cond: Any) -> Tensor:
        logits: Tensor = nets["nar"](torch.where(codes == V, 0, codes), level, cond)
        return logits

    levels = Masked(num_codebooks=K, codebook_size=V, first_level=1, conditions=("phonemes",))
    prompted = codec.prompted(batch, rng_of(batch))
    shown = levels.hidden(prompted.codes, prompted.real & ~prompted.prompt, prompted.prompt, 2)
    logits = levels._logits({"model": nar}, shown, 2, levels.condition(batch), prompted.real)
    found = levels.token_loss(logits, prompted.codes[..., 2], shown.asked)
    torch.testing.assert_close(found.total, codec._level(nets, batch, prompted, 2).loss.mean())


def test_prompts_are_as_long_as_they_say() -> None:
    batch = a_batch((40, 8, 21), (6, 4, 2))
    lengths = torch.tensor([40, 8, 21])
    prefix = CodecLanguage(num_codebooks=K, codebook_size=V, prompt_frames=12).prompted(batch, rng_of(batch))
    shown = prefix.prompt.sum(1)
    assert bool(((shown >= (lengths // 4).clamp(max=12)) & (shown <= 12) & (shown <= lengths // 2)).all())
    assert torch.equal(prefix.codes, batch["codes"])
    objective = CodecLanguage(num_codebooks=K, codebook_size=V, prompt="segment", prompt_frames=6)
    found = set()
    for step in range(20):
        segment = objective.prompted(batch, rng_of(batch, step))
        assert segment.prompt.sum(1).tolist() == [6, 2, 5]
        assert segment.real.sum(1).tolist() == [46, 10, 26]
        for row, (n, T) in enumerate(zip((6, 2, 5), (40, 8, 21), strict=True)):
            assert torch.equal(segment.codes[row, n : n + T], batch["codes"][row, :T])
            starts = [
                s for s in range(T - n + 1) if torch.equal(batch["codes"][row, s : s + n], segment.codes[row, :n])
            ]
            assert starts
            found.add((row, starts[0]))
    assert len(found) > 20, "segments begin anywhere"


def test_validation_names_all_books_and_what_ignorance_costs() -> None:
    nets, batch = networks(), a_batch()
    torch.nn.init.zeros_(nets["ar"].head.weight)
    torch.nn.init.zeros_(nets["nar"].codes.rows)
    objective = CodecLanguage(num_codebooks=K, codebook_size=V)
    with torch.no_grad():
        values = objective.validate(nets, batch, rng_of(batch))
    assert set(values) == {"loss", "loss_zero", "accuracy", *(f"loss_book{k}" for k in range(K))}
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in values.values())
    torch.testing.assert_close(values["loss"], values["loss_zero"])
    torch.testing.assert_close(values["loss_book0"], torch.full((3,), math.log(V + 1)))


def test_data_that_do_not_fit_are_refused() -> None:
    nets, batch = networks(), a_batch()
    with pytest.raises(ValueError, match="codes have 4 codebooks"):
        CodecLanguage(num_codebooks=8, codebook_size=V).loss("ar", nets, batch, rng_of(batch), 0)
    with pytest.raises(ValueError, match=r"set networks\.ar\.codebook_size"):
        CodecLanguage(num_codebooks=K, codebook_size=V + 1).loss("ar", nets, batch, rng_of(batch), 0)
    with pytest.raises(UserError, match="prompt_frames: got 0"):
        CodecLanguage(prompt_frames=0)


def test_two_sequences_are_put_together_without_a_gap() -> None:
    first, then = torch.tensor([[1, 2, 9], [3, 9, 9]])[..., None], torch.tensor([[4, 5], [6, 9]])[..., None]
    made = put_before(first, torch.tensor([2, 1]), then, torch.tensor([2, 1]))
    assert made.codes[..., 0].tolist() == [[1, 2, 4, 5, 0], [3, 6, 0, 0, 0]]
    assert made.real.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert made.prompt.int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


# ------------------------------------------------------------------------------------------------ sampler


def test_cuts_keep_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert cut(logits, 2, 1.0).isfinite().tolist() == [[True, True, False, False]]
    assert cut(logits, None, 0.5).isfinite().tolist() == [[True, False, False, False]]
    assert cut(logits, None, 0.51).isfinite().tolist() == [[True, True, False, False]]
    assert cut(logits, None, 1e-6).isfinite().tolist() == [[True, False, False, False]]
    assert cut(logits, 3, 0.9).isfinite().tolist() == [[True, True, True, False]]
    assert torch.equal(cut(logits, None, 1.0), logits)


def test_draws_follow_the_distribution_and_never_what_was_cut() -> None:
    probability = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])
    u = torch.arange(1000) / 1000
    tokens = draw(probability.log().expand(1000, -1), u)
    assert torch.bincount(tokens, minlength=6).tolist() == pytest.approx([0, 500, 300, 0, 200, 0], abs=1)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert draw(probability.log().expand(2, -1), edges).tolist() == [1, 4]


def scripted(script: list[list[int]], vocabulary: int = 6) -> Callable[[Tensor | None], Tensor]:
    """Logits that leave no choice."""
    step = iter(script)
    return lambda tokens: F.one_hot(torch.tensor(next(step)), vocabulary) * 100.0


def test_rows_end_by_themselves_and_all_wait_for_the_last() -> None:
    rng = ProgressRng(0, 0, "sample", torch.arange(2))
    made = Sampler(max_tokens=9).sample(scripted([[1, 2], [5, 3], [4, 4], [4, 5]]), end=5, rng=rng)
    assert made.tokens.tolist() == [[1, 0, 0], [2, 3, 4]]
    assert made.lengths.tolist() == [1, 3] and made.ended.tolist() == [True, True]
    cut_short = Sampler(max_tokens=2).sample(scripted([[1, 2], [5, 3]]), end=5, rng=rng)
    assert cut_short.tokens.tolist() == [[1, 0], [2, 3]] and cut_short.ended.tolist() == [True, False]
    held = Sampler(max_tokens=3, min_tokens=3, temperature=0).sample(
        lambda tokens: torch.tensor([[0.0, 1, 0, 0, 0, 9]]), end=5, rng=ProgressRng(0, 0, "sample", torch.arange(1))
    )
    assert held.tokens.tolist() == [[1, 1, 1]]


def test_the_guard_breaks_a_loop() -> None:
    """A token that fills the window gives way to a draw from the whole distribution."""
    logits = torch.log(torch.tensor([[0.6, 0.2, 0.2, 1e-9]]))
    rng = ProgressRng(0, 0, "sample", torch.arange(1))
    looping = Sampler(top_k=1, max_tokens=60).sample(lambda tokens: logits, end=3, rng=rng)
    assert set(looping.tokens[0].tolist()) == {0}
    guarded = Sampler(top_k=1, repetition_window=10, max_tokens=60).sample(lambda tokens: logits, end=3, rng=rng)
    assert {1, 2} <= set(guarded.tokens[0].tolist())


def test_a_rows_tokens_depend_on_no_other_row() -> None:
    def walk(positions: Tensor) -> Tensor:
        rows = torch.randn(8, 30, generator=torch.Generator().manual_seed(3))[positions]
        made = Sampler(top_p=0.9, max_tokens=5).sample(
            lambda tokens: rows, end=29, rng=ProgressRng(0, 0, "sample", positions)
        )
        return made.tokens

    together = walk(torch.arange(8))
    assert torch.equal(walk(torch.tensor([2, 5])), together[[2, 5]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_tokens": 2000}, "min_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"sample\.{words}"):
        Sampler(**arguments)


# ------------------------------------------------------------------------------------------------ speech


def voices(B: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = a_batch((5, 3, 4)[:B], (6, 5, 4)[:B], seed=7)
    cond = {
        **CodecLanguage.condition(batch), "sentence": batch["phonemes"][:, 2:], "sentence_mask": batch["phonemes_mask"][:, 2:],
    }  # fmt: skip
    return cond, {"codes": batch["codes"], "codes_mask": batch["codes_mask"]}


@pytest.mark.parametrize("prompt", ["prefix", "segment"])
@torch.no_grad()
def test_speech_depends_on_its_own_row_alone(prompt: Any) -> None:
    """Each of three sentences comes out as it does alone, and all codebooks are within reach."""
    nets = {name: net.double().eval() for name, net in networks().items()}
    objective = CodecLanguage(num_codebooks=K, codebook_size=V, prompt=prompt)
    told: list[int] = []
    sampler, (cond, given) = Sampler(max_tokens=12), voices()
    request = Request(sampler=sampler, given=given, progress=lambda done, steps: told.append(done))
    together = objective.generate(nets, cond, request, ProgressRng(0, 0, "sample", torch.arange(3)))
    assert together.lengths is not None and together.ended is not None
    assert together.samples.shape[2] == K and int(together.samples.max()) < V and int(together.lengths.min()) >= 1
    assert told == list(range(1, len(told) + 1)) and len(told) <= 12 + K - 1, "of both networks each pass is told"
    for row in range(3):
        own, voice = ({name: value[row : row + 1] for name, value in some.items()} for some in (cond, given))
        rng = ProgressRng(0, 0, "sample", torch.tensor([row]))
        alone = objective.generate(nets, own, Request(sampler=sampler, given=voice), rng)
        assert alone.lengths is not None
        n = int(alone.lengths[0])
        assert int(together.lengths[row]) == n
        assert torch.equal(together.samples[row, :n], alone.samples[0, :n])


def speak_on_a_rank(rank: int, world_size: int) -> list[int]:
    """Rank 1's sentences are over long before rank 0's; the number of calls must agree all the same."""
    calls: list[int] = []

    def logits(tokens: Tensor | None) -> Tensor:
        calls.append(1)
        return F.one_hot(torch.tensor([5 if len(calls) > (9 if rank == 0 else 2) else 1]), 6) * 100.0

    made = Sampler(max_tokens=50).sample(
        logits, end=5, rng=ProgressRng(0, 0, "sample", torch.tensor([rank])),
        finished=lambda done: not distributed.any_rank(not done),
    )  # fmt: skip
    return [len(calls), int(made.lengths[0])]


def test_all_ranks_end_together() -> None:
    assert run_ranks(2, speak_on_a_rank) == [[10, 9], [10, 2]]
