"""Next-token prediction of one and of several streams: what counts, what padding and a prefix change, and what is drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Guidance, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.tokens.prefix_lm import PrefixLM
from nexus_scale.objectives.autoregressive import Autoregressive
from nexus_scale.samplers.autoregressive import Autoregressive as Sampler
from tests.toy_language import K, Knowing, T, V, a_language, batch_of, learnt

LANGUAGE = a_language()
CODES = {"num_codebooks": K, "codebook_size": V}
SIZES: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 4, "dropout": 0.0}


def objective(**changed: Any) -> Autoregressive:
    return Autoregressive(**{**CODES, **changed})


def a_network(seed: int = 0, **changed: Any) -> PrefixLM:
    torch.manual_seed(seed)
    net = PrefixLM(**{**CODES, **SIZES, **changed})
    net.init_weights()
    torch.nn.init.normal_(net.head.weight, std=0.3)  # so that what it says depends on what it sees
    return net


def rng_of(count: int, step: int = 0, phase: str = "main") -> ProgressRng:
    return ProgressRng(7, step, phase, torch.arange(count))


# ----------------------------------------------------------------------------------------------- the language


def test_the_language_is_what_it_says() -> None:
    joint = LANGUAGE.joint
    assert joint.shape == (V,) * (T * K) and float(joint.sum()) == pytest.approx(1)
    drawn = LANGUAGE.draw(40_000).flatten(1)
    counts = torch.bincount(drawn[:, 2] * V + drawn[:, 5], minlength=V * V).double() / len(drawn)
    others = [axis for axis in range(T * K) if axis not in (2, 5)]
    assert torch.allclose(counts, joint.sum(others).flatten(), atol=0.01)


@pytest.mark.parametrize("pattern", ["delay", "flat", "coarse_to_fine", "parallel"])
def test_who_knows_the_language_has_its_entropy_as_loss_and_draws_it(pattern: str) -> None:
    """But of codes that are predicted side by side, each without the other, where the language ties them together."""
    goal = objective(pattern=pattern)
    places = goal.pattern.places(torch.tensor([T]), T, K)[0]
    nets = {"model": Knowing(LANGUAGE, places)}
    sentences = LANGUAGE.draw(300)
    found = goal.validate(nets, batch_of(sentences), rng_of(300))
    nats = -LANGUAGE.joint[tuple(sentences.flatten(1).T)].log().float() / (T * K)
    assert float(nats.mean()) == pytest.approx(LANGUAGE.entropy, abs=4 * float(nats.std()) / math.sqrt(300))
    if pattern != "parallel":
        torch.testing.assert_close(found["loss"], nats, rtol=1e-5, atol=1e-5)
    else:
        gap = found["loss"] - nats
        assert float(gap.mean()) > 5 * float(gap.std()) / math.sqrt(300)
    assert float(found["loss_zero"][0]) == pytest.approx(math.log(V))
    if pattern == "coarse_to_fine":
        return  # drawn alike, and the slowest
    request = Request(sampler=Sampler(max_tokens=T))
    drawn = goal.generate(nets, {}, request, rng_of(400, phase="draw")).samples
    assert drawn.shape == (400, T, K)
    joint, tied = LANGUAGE.joint, (4, 5)  # the two codes of frame 2
    marginal = joint.sum([axis for axis in range(T * K) if axis not in tied]).flatten()
    flat = drawn.flatten(1)
    counts = torch.bincount(flat[:, 4] * V + flat[:, 5], minlength=V * V).double()
    chi = float(((counts - 400 * marginal).square() / (400 * marginal)).sum())
    assert (chi < 37.7) if pattern != "parallel" else chi > 60, "the 99.9 % quantile of 15 degrees of freedom"


def test_a_network_learns_the_languages_entropy() -> None:
    """Within 1 %, on sentences that it has not seen, against what is true of the same sentences."""
    torch.manual_seed(0)
    net = PrefixLM(**CODES, **SIZES)
    net.init_weights()
    goal, sentences = objective(), LANGUAGE.draw(2000, seed=10**6)
    learnt(goal, net, LANGUAGE, 300)
    nats = -LANGUAGE.joint[tuple(sentences.flatten(1).T)].log() / (T * K)
    with torch.no_grad():
        found = goal.validate({"model": net}, batch_of(sentences), rng_of(2000))
    assert float(found["loss"].mean() / nats.mean()) == pytest.approx(1, abs=0.01)


# ----------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("compiled", [False, True])
def test_step_by_step_is_what_the_whole_is(compiled: bool) -> None:
    """With and without a text and a class, of which one row has less; with a prefix; and with a cache of one shape."""
    net = a_network(num_classes=3, text_dim=6).double().eval()
    net.compiled = compiled
    tokens = torch.randint(0, V + 1, (3, 9, K))
    cond = {
        "label": torch.tensor([0, 2, 1]), "drop": torch.tensor([False, False, True]),
        "text": torch.randn(3, 4, 6).double(), "text_mask": torch.arange(4) < torch.tensor([[4], [2], [1]]),
    }  # fmt: skip
    both = {**cond, "prefix": torch.arange(9).expand(3, -1) < 4}
    with torch.no_grad():
        for told in (cond, both):
            whole = net(tokens, told)
            begun = {**told, "prefix": both["prefix"][:, :4]} if told is both else told
            logits, cache = net.prefill(tokens[:, :4], begun, 5)
            for step in range(3, 8):
                torch.testing.assert_close(logits, whole[:, step], rtol=1e-9, atol=1e-9)
                logits = net.extend(tokens[:, step + 1], cache)
            with pytest.raises(ValueError, match="the cache is full"):
                net.extend(tokens[:, 0], cache)
        assert not torch.equal(net(tokens, cond)[:, 0], net(tokens, both)[:, 0]), "a prefix is seen both ways"
        changed = tokens.clone()
        changed[:, 6] = (changed[:, 6] + 1) % V
        before, after = net(tokens, both), net(changed, both)
        assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_a_cache_of_one_shape_is_compiled_once() -> None:
    net = a_network().eval()
    net.compiled, graphs = True, 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in net.token_blocks:
        block.forward = torch.compile(block.forward, backend=counted, fullgraph=True)  # type: ignore[method-assign]
    tokens = torch.randint(0, V, (2, 9, K))
    with torch.no_grad():
        _, cache = net.prefill(tokens[:, :2], {}, 7)
        net.extend(tokens[:, 2], cache)
        begun = graphs
        for step in range(3, 9):
            net.extend(tokens[:, step], cache)
    assert begun and graphs == begun


# ---------------------------------------------------------------------------------------------- the objective


def test_padding_and_company_change_nothing() -> None:
    """Of a sample of its own length, however long the batch is, and with an end that it must say."""
    codes, lengths = LANGUAGE.draw(3), torch.tensor([4, 2, 3])
    for goal, net, kept in (
        (objective(), a_network(), codes),
        (objective(num_codebooks=1, ends=True), a_network(num_codebooks=1, ends=True), codes[..., :1]),
    ):
        nets = {"model": net}
        together = goal.validate(nets, batch_of(kept, lengths), rng_of(3))["loss"]
        padded = torch.nn.functional.pad(kept, (0, 0, 0, 3), value=V - 1)
        torch.testing.assert_close(goal.validate(nets, batch_of(padded, lengths), rng_of(3))["loss"], together)
        for row, length in enumerate(lengths.tolist()):
            alone = goal.validate(nets, batch_of(kept[row : row + 1, :length]), rng_of(1))["loss"]
            torch.testing.assert_close(alone, together[row : row + 1])
        assert goal.read(batch_of(kept, lengths)).wanted[1].sum() == (3 if goal.ends else 2 * K)


def test_smoothing_and_z_loss_are_torchs_and_palms() -> None:
    batch, nets = batch_of(LANGUAGE.draw(4)), {"model": a_network()}
    read = objective().read(batch)
    logits = nets["model"](read.tokens, {})
    rows, targets = logits[read.wanted], read.targets[read.wanted]
    plain = objective().loss("main", nets, batch, rng_of(4), 0)
    torch.testing.assert_close(plain.total, torch.nn.functional.cross_entropy(rows, targets))
    made = objective(label_smoothing=0.2, z_loss=0.01).loss("main", nets, batch, rng_of(4), 0)
    smoothed = torch.nn.functional.cross_entropy(rows, targets, label_smoothing=0.2)
    torch.testing.assert_close(made.total, smoothed + 0.01 * rows.logsumexp(1).square().mean())
    torch.testing.assert_close(made.metrics["loss"], plain.metrics["loss"])


def test_a_prefix_is_seen_and_does_not_count() -> None:
    goal, batch = objective(prefix=0.9), batch_of(LANGUAGE.draw(6))
    seen: list[Any] = []

    def net(tokens: Tensor, cond: Any) -> Tensor:
        seen.append(cond["prefix"])
        return torch.zeros(*tokens.shape, V)

    goal.loss("main", {"model": net}, batch, rng_of(6), 0)
    assert seen[0].shape == (6, T + 1) and bool(seen[0][:, 0].all()), "the begin is given"
    assert len(set(seen[0].sum(1).tolist())) > 2 and int(seen[0].sum(1).max()) <= T
    read = goal.read(batch, torch.tensor([0, 1, 2, 3, 3, 3]))
    assert read.prefix is not None and read.prefix.sum(1).tolist() == [1, 2, 3, 4, 4, 4], (
        "with delay, codes of it stand behind"
    )
    assert read.wanted.flatten(1).sum(1).tolist() == [K * (T - n) for n in (0, 1, 2, 3, 3, 3)]


@pytest.mark.parametrize("changed", [{}, {"prefix": 0.5}, {"num_codebooks": 1, "ends": True}])
def test_what_is_given_comes_back_and_what_follows_depends_on_its_own_row(changed: dict[str, Any]) -> None:
    """Beginnings of different lengths in one batch, under guidance, with and without prefix and end."""
    goal = objective(conditions=("label",), **changed)
    net = a_network(num_classes=3, **{name: value for name, value in changed.items() if name != "prefix"})
    streams = goal.num_codebooks
    codes, shown = LANGUAGE.draw(3)[..., :streams], torch.tensor([3, 3, 3] if goal.prefix else [3, 1, 2])
    cond = {"label": torch.tensor([0, 1, 2])}
    given = {"codes": codes[:, :3], "codes_mask": torch.arange(3) < shown[:, None]}
    request = Request(sampler=Sampler(max_tokens=4, min_tokens=2), guidance=Guidance(30.0), given=given)

    def drawn(rows: list[int], request: Request = request) -> Any:
        told = {name: value[rows] for name, value in cond.items()}
        own = replace(request, given={name: value[rows] for name, value in request.given.items()})
        rng = ProgressRng(7, 0, "draw", torch.tensor(rows))
        with torch.no_grad():
            return goal.generate({"model": net.eval()}, told, own, rng)

    made = drawn([0, 1, 2])
    assert made.samples.shape == (3, 7, streams) and int(made.samples.max()) < V
    for row, n in enumerate(shown.tolist()):
        assert torch.equal(made.samples[row, :n], codes[row, :n])
    assert torch.equal(drawn([1, 2]).samples, made.samples[1:]), "whatever the others were given"
    if goal.ends:
        assert bool((made.lengths >= torch.max(shown, torch.tensor(2))).all()) and bool(made.ended.any())
    unguided = drawn([0, 1, 2], replace(request, guidance=Guidance()))
    assert not torch.equal(unguided.samples, made.samples)
    with pytest.raises(UserError, match="nothing is left to be drawn"):
        drawn([0], replace(request, given={"codes": codes[:, :3]}, shape=(3,), lengths=torch.tensor([3])))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codebook_size": 0}, "codebook_size: got 0"),
        ({"ends": True}, "2 codebooks; a token ends samples of one stream"),
        ({"prefix": 1.0}, "expected a share in"),
        ({"prefix": 0.5, "pattern": "coarse_to_fine"}, "no prefix has all codes"),
        ({"label_smoothing": 1.0}, "label_smoothing: got 1.0"),
        ({"pattern": {"name": "delay", "delays": [0]}}, "expected 2"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        objective(**arguments)


def test_data_and_networks_that_do_not_fit_are_named() -> None:
    nets, codes = {"model": a_network()}, LANGUAGE.draw(2)
    with pytest.raises(ValueError, match=r"got codes \(2, 4, 1\)"):
        objective().loss("main", nets, batch_of(codes[..., :1]), rng_of(2), 0)
    with pytest.raises(ValueError, match="set its num_codebooks, codebook_size"):
        objective().loss("main", {"model": a_network(ends=True)}, batch_of(codes), rng_of(2), 0)
