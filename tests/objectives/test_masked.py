"""Predicting hidden tokens: what is hidden and when, what it costs, and what masked decoding draws of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Guidance, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.tokens.masked_transformer import MaskedTransformer
from nexus_scale.objectives.autoregressive import Autoregressive
from nexus_scale.objectives.masked import Masked
from nexus_scale.processes.token_masks import find_masks, hide, hide_each, level_weights, ranks
from nexus_scale.samplers.autoregressive import Autoregressive as StepByStep
from nexus_scale.samplers.masked import Masked as Sampler
from tests.toy_language import K, Knowing, KnowingMasked, Language, T, V, a_language, batch_of, learnt

LANGUAGE = a_language()
CODES = {"num_codebooks": K, "codebook_size": V}
SIZES: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 4, "dropout": 0.0}
NETS = {"model": KnowingMasked(LANGUAGE)}


def objective(**changed: Any) -> Masked:
    return Masked(**{**CODES, **changed})


def a_network(**changed: Any) -> MaskedTransformer:
    torch.manual_seed(0)
    net = MaskedTransformer(**{**CODES, **SIZES, **changed})
    net.init_weights()
    return net


def rng_of(count: int, step: int = 0, phase: str = "main") -> ProgressRng:
    return ProgressRng(7, step, phase, torch.arange(count))


# ----------------------------------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize(
    "spec", ["cosine", "linear", {"name": "power", "exponent": 2}, {"name": "power", "exponent": 0.5}]
)
def test_all_is_hidden_at_1_and_nothing_at_0(spec: Any) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    share = find_masks(spec).share(t)
    assert float(share[0]) == 0 and float(share[-1]) == pytest.approx(1) and bool((share.diff() > 0).all())
    r = 1 - t  # MaskGIT's
    theirs = {"cosine": torch.cos(math.pi / 2 * r), "linear": 1 - r}
    if isinstance(spec, str):
        torch.testing.assert_close(share, theirs[spec])


def test_as_many_are_hidden_as_there_are_to_be_and_only_those_that_may() -> None:
    u, may = torch.rand(3, 8), torch.arange(8) < torch.tensor([[8], [5], [1]])
    hidden = hide(u, torch.tensor([3, 5, 1]), may)
    assert hidden.sum(1).tolist() == [3, 5, 1] and not bool((hidden & ~may).any())
    assert float(u[0][hidden[0]].max()) < float(u[0][~hidden[0]].min())
    none = hide_each(u, torch.zeros(3), may)
    assert none.sum(1).tolist() == [1, 1, 1] and int(u[0].argmin()) == int(none[0].int().argmax())
    assert torch.equal(hide_each(u, torch.ones(3), may), may)
    assert ranks(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, False, True]])).tolist() == [[1, 2, 0]]


def test_levels_are_trained_as_often_as_in_maskgcts_code() -> None:
    """Its weights, and that they are followed; a level is one for all ranks of a step."""
    assert level_weights("linear", 4).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert level_weights("linear", 4, 1).tolist() == pytest.approx([0, 4 / 9, 3 / 9, 2 / 9])
    cosine = [math.cos(i / 4 * math.pi / 2) for i in range(4)]
    assert level_weights("cosine", 4).tolist() == pytest.approx([one / sum(cosine) for one in cosine])
    assert level_weights("uniform", 3, 1).tolist() == [0, 0.5, 0.5]
    assert level_weights((4, 3, 1), 3).tolist() == [0.5, 0.375, 0.125]
    seen: list[int] = []

    def net(codes: Tensor, level: int, cond: Any) -> Tensor:
        seen.append(level)
        return torch.zeros(*codes.shape[:2], V)

    goal, batch = objective(levels="linear"), batch_of(LANGUAGE.draw(1))
    for step in range(300):
        for positions in (torch.arange(1), torch.arange(5, 6)):
            goal.loss("main", {"model": net}, batch, ProgressRng(0, step, "main", positions), step)
    assert seen[::2] == seen[1::2] and sum(seen) / len(seen) == pytest.approx(1 / 3, abs=0.09)


@pytest.mark.parametrize("hides", ["each", "count"])
def test_a_network_is_shown_the_levels_before_and_the_prompt(hides: Any) -> None:
    """And asked for codes that it is not shown; of padding for none."""
    goal = objective(prompt=0.9, hides=hides)
    lengths = torch.tensor([4, 3, 4, 1, 2, 4])
    batch = batch_of(LANGUAGE.draw(6), lengths)
    codes, real = goal.codes(batch)
    prompts = set()
    for step in range(10):
        for level in range(K):
            shown = goal._drawn(batch, rng_of(6, step), level)
            assert torch.equal(shown.codes[..., :level], codes[..., :level])
            assert torch.equal(shown.codes[..., level] == V, shown.asked) and bool(shown.asked.any(1).all())
            later = shown.codes[..., level + 1 :]
            assert torch.equal(later == V, ~shown.prompt[..., None].expand_as(later))
            assert not bool((shown.asked & (shown.prompt | ~real)).any())
            prompts |= set(shown.prompt.sum(1).tolist())
    assert prompts == {0, 1, 2, 3}
    never = objective(prompt=0.9, prompt_drop=1.0)._drawn(batch, rng_of(6), 0)
    assert not bool(never.prompt.any())


# ----------------------------------------------------------------------------------------------- what it costs


def test_who_knows_the_language_has_its_entropy_as_loss() -> None:
    """In the mean over how much is hidden."""
    found = objective().validate(NETS, batch_of(LANGUAGE.draw(2000)), rng_of(2000))
    error = float(found["loss"].std()) / math.sqrt(2000)
    assert float(found["loss"].mean()) == pytest.approx(LANGUAGE.entropy, abs=4 * error) and error < 0.02
    assert float(found["loss_zero"][0]) == pytest.approx(math.log(V)) and set(found) > {"loss_book0", "loss_book1"}


def test_a_network_learns_the_languages_entropy() -> None:
    """Within 1 % of who knows the language, asked the same of beginnings that it has not seen, of the first stream."""

    class First(Language):
        def draw(self, count: int, seed: int = 0) -> Tensor:
            return super().draw(count, seed)[..., :1]

    def knowing(codes: Tensor, level: int, cond: Any) -> Tensor:
        return KnowingMasked(LANGUAGE)(torch.cat([codes, torch.full_like(codes, V)], dim=2), level, cond)

    first, goal, net = (
        First(*LANGUAGE),
        objective(num_codebooks=1, schedule="linear", hides="count"),
        a_network(num_codebooks=1),
    )
    learnt(goal, net, first, 300, frames=3)
    sentences = batch_of(first.draw(2000, seed=10**6)[:, :3])
    with torch.no_grad():
        found, true = (goal.validate({"model": one}, sentences, rng_of(2000))["loss"].mean() for one in (net, knowing))
    assert float(found / true) == pytest.approx(1, abs=0.01)


def test_padding_and_company_change_nothing() -> None:
    goal, net = objective(), a_network().eval()
    torch.nn.init.normal_(net.heads.rows, std=0.3)
    codes, lengths = LANGUAGE.draw(3), torch.tensor([4, 2, 3])
    real = torch.arange(4) < lengths[:, None]
    with torch.no_grad():
        whole = net(codes, 1, {"codes_mask": real})
        for row, length in enumerate(lengths.tolist()):
            alone = net(codes[row : row + 1, :length], 1, {})
            torch.testing.assert_close(whole[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)
        assert not torch.equal(net(codes, 0, {}), net(codes, 1, {}))
    assert goal.validate({"model": net}, batch_of(codes, lengths), rng_of(3))["loss"].shape == (3,)


# ----------------------------------------------------------------------------------------------- what is drawn


def drawn(goal: Masked, nets: Any, sampler: Sampler, count: int, **asked: Any) -> Tensor:
    request = Request(shape=(T, K), sampler=sampler, **asked)
    with torch.no_grad():
        return goal.generate(nets, {}, request, rng_of(count, phase="draw")).samples


def chi_of(codes: Tensor, places: tuple[int, int]) -> float:
    """Pearson's, of two codes of a sentence against the language; 15 degrees of freedom, 37.7 is the 99.9 % quantile."""
    marginal = LANGUAGE.joint.sum([axis for axis in range(T * K) if axis not in places]).flatten()
    flat = codes.flatten(1)
    counts = torch.bincount(flat[:, places[0]] * V + flat[:, places[1]], minlength=V * V).double()
    return float(((counts - len(codes) * marginal).square() / (len(codes) * marginal)).sum())


@pytest.mark.parametrize("order", ["random", "sequence"])
def test_one_token_a_step_draws_the_language(order: Any) -> None:
    """In any order; and all of a level at once does not, whose codes then know nothing of one another."""
    sampler = Sampler(steps=T, fine_steps=T, schedule="linear", order=order)
    codes = drawn(objective(), NETS, sampler, 600)
    assert max(chi_of(codes, places) for places in ((2, 4), (3, 5), (4, 5))) < 37.7
    if order == "random":
        at_once = drawn(objective(), NETS, Sampler(steps=1, fine_steps=1, fine_temperature=1.0), 600)
        assert chi_of(at_once, (2, 4)) > 60


class SameNumbers:
    """One number for each row and each code that is drawn, whichever sampler draws it."""

    positions = torch.arange(60)

    def uniform(self, name: str, shape: Any = ()) -> Tensor:
        kind, *numbers = name.split("_")
        drawn = int(numbers[0]) * T + int(numbers[1]) if kind == "level" else int(numbers[0]) if numbers else 0
        one = torch.rand(60, generator=torch.Generator().manual_seed(drawn))
        return one.view(60, *[1] * len(shape)).expand(60, *shape)


def test_one_token_a_step_in_sequence_is_autoregressive() -> None:
    """Token by token: the first codebook of all frames, then the second."""
    sampler = Sampler(steps=T, fine_steps=T, schedule="linear", order="sequence")
    masked = objective().generate(NETS, {}, Request(shape=(T, K), sampler=sampler), SameNumbers()).samples  # type: ignore[arg-type]
    goal = Autoregressive(num_codebooks=K, codebook_size=V, pattern="coarse_to_fine")
    nets = {"model": Knowing(LANGUAGE, goal.pattern.places(torch.tensor([T]), T, K)[0])}
    request = Request(sampler=StepByStep(max_tokens=T))
    steps = goal.generate(nets, {}, request, SameNumbers()).samples  # type: ignore[arg-type]
    assert torch.equal(steps, masked) and len(steps.flatten(1).unique(dim=0)) > 40


def test_the_surest_become_known_first_and_nothing_stays_hidden() -> None:
    """As many at each step as the schedule says, at least one, in rows of different lengths."""
    shown: list[Tensor] = []
    confidence = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 0.5])

    def logits(codes: Tensor, level: int) -> Tensor:
        shown.append((codes[..., level] == V).clone())
        return torch.nn.functional.one_hot(torch.full(codes.shape[:2], 2), V) * confidence[:, None]

    hidden = (torch.arange(6) < torch.tensor([[6], [2]]))[..., None]
    sampler = Sampler(steps=4, choice_temperature=0.0, temperature=0.0, schedule="linear")
    made = sampler.sample(logits, torch.ones(2, 6, 1).long(), hidden, mask=V, levels=[0], rng=rng_of(2))
    assert [one.sum(1).tolist() for one in shown] == [[6, 2], [4, 1], [3, 0], [1, 0]]
    assert shown[1][0].tolist() == [True, False, True, False, True, True]
    assert torch.equal(made[..., 0] == 2, hidden[..., 0]) and torch.equal(made[..., 0] == 1, ~hidden[..., 0])
    with pytest.raises(UserError, match="expected 2, one for each level"):
        Sampler(fine_steps=(2,)).steps_of(3)
    assert Sampler(steps=16).steps_of(4) == [16, 1, 1, 1]


def test_what_is_given_comes_back_and_rows_depend_on_themselves() -> None:
    """With a prompt, with levels that are given, under guidance."""
    goal, net = objective(conditions=("label",)), a_network(num_classes=3).eval()
    torch.nn.init.normal_(net.heads.rows, std=0.5)
    codes, cond = LANGUAGE.draw(3), {"label": torch.tensor([0, 1, 2])}
    mask = torch.arange(2) < torch.tensor([[2], [1], [0]])

    def made(rows: list[int], scale: float = 20.0) -> Tensor:
        given = {"codes": codes[rows, :2], "codes_mask": mask[rows]}
        lengths = torch.tensor([4, 3, 4])[rows]
        request = Request(
            shape=(T, K), lengths=lengths, sampler=Sampler(steps=3), guidance=Guidance(scale), given=given
        )
        told = {name: value[rows] for name, value in cond.items()}
        with torch.no_grad():
            return goal.generate({"model": net}, told, request, ProgressRng(7, 0, "draw", torch.tensor(rows))).samples

    whole = made([0, 1, 2])
    assert torch.equal(whole[0, :2], codes[0, :2]) and torch.equal(whole[1, :1], codes[1, :1])
    assert int(whole.max()) < V and not bool(whole[1, 3:].any())
    assert torch.equal(made([1, 2]), whole[1:]) and not torch.equal(made([0, 1, 2], 1.0), whole)

    fine = objective(first_level=1)
    cond_, request = fine.request_like(batch_of(codes), Request(sampler=Sampler(steps=2)))
    with torch.no_grad():
        refined = fine.generate({"model": net}, cond, request, rng_of(3, phase="draw")).samples
    assert cond_ == {} and torch.equal(refined[..., 0], codes[..., 0]) and not torch.equal(refined, codes)
    known = Request(shape=(T, K), sampler=Sampler(steps=2), known=codes[..., :1])
    with torch.no_grad():
        made_of_known = objective().generate({"model": net}, cond, known, rng_of(3, phase="draw")).samples
    assert torch.equal(made_of_known, refined) and objective().draws.levels == K


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: objective(first_level=2), "first_level: got 2; expected 0 to 1"),
        (lambda: objective(prompt=1.0), "prompt: got 1.0; expected a share of at least 0 and below 1"),
        (lambda: objective(levels="odd"), "levels: got 'odd'"),
        (lambda: objective(levels=(1.0,)), "expected uniform, linear, cosine, or 2 weights"),
        (lambda: objective(levels=(0.0, 0.0)), "expected a weight above 0"),
        (lambda: objective(schedule="cosin"), r"objective\.schedule: no 'cosin'; did you mean 'cosine'"),
        (lambda: Sampler(top_p=0.0), r"sample\.top_p: got 0\.0"),
        (lambda: Sampler(top_k=0), r"sample\.top_k: got 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
