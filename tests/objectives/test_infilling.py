"""The flow in a gap, durations and alignments, and what drawing keeps of a recording."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Guidance, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.infilling import Infilling, _common
from nexus_scale.processes.phones import BEGIN, END, TABLE
from nexus_scale.samplers.ode import ODE

A, B_, C = (TABLE.index(letter) for letter in "abc")
SPACE = TABLE.index(" ")
M = 3


def batch_of(codes: Tensor, frames: list[int], text: Tensor, symbols: list[int], durations: Tensor) -> Batch:
    places = torch.arange(len(codes))
    fields = {
        "codes": codes, "codes_mask": torch.arange(codes.shape[1]) < torch.tensor(frames)[:, None], "phonemes": text,
        "phonemes_mask": torch.arange(text.shape[1]) < torch.tensor(symbols)[:, None], "durations": durations,
    }  # fmt: skip
    return Batch(fields, places, places)


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    text = torch.tensor([[BEGIN, A, B_, C, END], [BEGIN, C, END, 0, 0]])
    return batch_of(torch.randn(2, 8, M), [8, 5], text, [5, 3], torch.tensor([[1, 2, 3, 1, 1], [2, 2, 1, 9, 9]]))


def rng_of(count: int = 2) -> ProgressRng:
    return ProgressRng(0, 3, "main", torch.arange(count), torch.device("cpu"))


class Linear:
    """A network whose answers depend on all that it is told."""

    def __init__(self) -> None:
        self.told: list[Cond] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.told.append(cond)
        return 0.5 * x + cond["context"] + t[:, None, None] + 0.1 * cond["phones"][:, None]


def test_the_loss_is_the_papers_in_the_gap_alone(batch: Batch) -> None:
    """Lipman's path from noise at t = 0 to data at t = 1, with sigma_min 1e-5; the gap's frames, a mean for each sample."""
    objective, net = Infilling(condition_drop=0.0), Linear()
    found = objective.loss("main", {"model": net}, batch, rng_of(), 3)
    rng, sigma = rng_of(), 1e-5
    x1, x_0 = batch["codes"].double(), rng.normal("noise", (M, 8)).transpose(1, 2).double()
    t = 1 - rng.uniform("times").double()  # ours runs from data to noise
    gap = objective.gap.draw(rng, "gap", batch["codes_mask"])
    assert torch.equal(net.told[0]["gap"], gap)
    losses = []
    for b, length in enumerate((8, 5)):
        phones = batch["phonemes"][b].repeat_interleave(batch["durations"][b] * batch["phonemes_mask"][b])
        assert net.told[0]["phones"][b, :length].tolist() == phones.tolist()
        w = (1 - (1 - sigma) * t[b]) * x_0[b] + t[b] * x1[b]
        u = x1[b] - (1 - sigma) * x_0[b]
        context = x1[b] * ~gap[b][:, None]
        answer = 0.5 * w + context + (1 - t[b]) + 0.1 * net.told[0]["phones"][b][:, None]
        losses.append((-answer - u).square()[gap[b]].mean())  # the house's velocity leads from data to noise
    assert float(found.total) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_durations_and_alignment_learn_what_the_data_tell(batch: Batch) -> None:
    objective = Infilling()
    hidden = objective.gap_durations.draw(rng_of(), "gap_durations", batch["phonemes_mask"])
    answers = torch.rand(2, 5)

    def durations(known: Tensor, asked: Tensor, cond: Cond) -> Tensor:
        assert torch.equal(asked, hidden)
        return answers

    found = objective.loss("durations", {"durations": durations}, batch, rng_of(), 3)
    logs = batch["durations"].double().log1p()
    expected = [(answers[b].double() - logs[b]).abs()[hidden[b]].mean() for b in range(2)]
    assert float(found.total) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-6)

    sure = torch.zeros(2, 8, len(TABLE))
    phones = torch.tensor([[BEGIN, A, A, B_, B_, B_, C, END], [BEGIN, BEGIN, C, C, END, 0, 0, 0]])
    sure.scatter_(2, phones[..., None], 30.0)
    found = objective.loss("aligner", {"aligner": lambda mels: sure}, batch, rng_of(), 3)
    assert float(found.total) < 1e-6 and found.metrics["accuracy"] == 1
    with pytest.raises(UserError, match="mel_vocoder"):
        objective.loss(
            "main", {}, replace(batch, fields={**batch.fields, "codes": torch.zeros(2, 8, M).long()}), rng_of(), 0
        )


# ------------------------------------------------------------------------------------------------- drawing


def nets_of(lengths: dict[int, int]) -> dict[str, Any]:
    """A duration model that knows how long each symbol is, and an aligner that reads the symbol from the first mel."""

    def durations(known: Tensor, hidden: Tensor, cond: Cond) -> Tensor:
        table = torch.zeros(len(TABLE))
        for symbol, length in lengths.items():
            table[symbol] = length
        return table[cond["phonemes"]].log1p()

    def aligner(mels: Tensor) -> Tensor:
        return -10 * (mels[..., :1] - torch.arange(len(TABLE))).abs()

    return {"model": Linear(), "durations": durations, "aligner": aligner}


def mels_of(*said: tuple[int, int]) -> Tensor:
    symbols = torch.cat([torch.full((frames,), float(symbol)) for symbol, frames in said])
    return torch.stack([symbols, *torch.randn(M - 1, len(symbols), generator=torch.Generator().manual_seed(1))], 1)[
        None
    ]


REQUEST = Request(sampler=ODE(steps=2, method="midpoint"), guidance=Guidance(1.7))  # type: ignore[arg-type]
LENGTHS = {BEGIN: 1, A: 2, B_: 3, C: 4, SPACE: 1, END: 2}


def everything(value: Tensor) -> Tensor:
    return torch.ones(value.shape[:2], dtype=torch.bool)


def test_a_gap_is_drawn_and_the_rest_kept_to_the_bit() -> None:
    mels = mels_of((BEGIN, 1), (A, 3), (C, 2), (END, 1))
    gap = torch.tensor([[0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    text = torch.tensor([[BEGIN, A, C, END]])
    given = {"codes": mels, "codes_mask": everything(mels), "gap": gap}
    nets = nets_of(LENGTHS)
    made = Infilling().generate(
        nets, {"phonemes": text, "phonemes_mask": everything(text)}, replace(REQUEST, given=given), rng_of(1)
    )
    assert torch.equal(made.samples[~gap], mels[~gap]) and not torch.equal(made.samples[gap], mels[gap])
    told = nets["model"].told[0]  # of the guided pair the first is told, the second nothing
    assert told["phones"][0].tolist() == [BEGIN, A, A, A, C, C, END] and told["drop"].tolist() == [False, True]
    assert bool((told["context"][0].T[gap[0]] == 0).all()) and bool((told["context"][1] == 0).all())


def test_a_sentence_is_said_behind_its_voice() -> None:
    """The voice's frames are aligned, the sentence's as long as the duration model says, or as a recording of it is."""
    mels = mels_of((BEGIN, 2), (A, 3), (SPACE, 1))
    voice, sentence = [BEGIN, A], [BEGIN, B_, C, END]
    text = torch.tensor([[*voice, SPACE, *sentence[1:]]])
    cond = {
        "phonemes": text, "phonemes_mask": everything(text), "sentence": torch.tensor([sentence]),
        "sentence_mask": torch.ones(1, 4, dtype=torch.bool),
    }  # fmt: skip
    given = {"codes": mels, "codes_mask": everything(mels)}
    nets = nets_of(LENGTHS)
    made = Infilling().generate(nets, cond, replace(REQUEST, given=given), rng_of(1))
    said = [BEGIN] * 2 + [A] * 3 + [SPACE] + [B_] * 3 + [C] * 4 + [END] * 2
    assert nets["model"].told[0]["phones"][0].tolist() == said
    assert made.lengths is not None and made.lengths.tolist() == [9] and made.samples.shape == (1, 9, M)
    assert torch.equal(nets["model"].told[0]["context"][0, :, :6].T, mels[0])
    like = mels_of((BEGIN, 1), (B_, 1), (C, 2), (END, 1))
    made = Infilling().generate(
        nets, cond, replace(REQUEST, given={**given, "like": like, "like_mask": everything(like)}), rng_of(1)
    )
    assert nets["model"].told[-1]["phones"][0].tolist() == [*said[:6], B_, C, C, END] and made.samples.shape == (
        1,
        4,
        M,
    )


def test_other_words_are_said_anew_and_the_others_kept() -> None:
    """Two recordings of other lengths at once: what is kept equals the recording, wherever it comes to lie."""
    mels = mels_of((BEGIN, 1), (A, 2), (SPACE, 2), (C, 3), (END, 1))
    said, text = (
        torch.tensor([[BEGIN, A, SPACE, C, END]] * 2),
        torch.tensor([[BEGIN, A, SPACE, B_, A, END], [BEGIN, C, SPACE, C, END, 0]]),
    )
    mask = torch.tensor([[1] * 6, [1] * 5 + [0]], dtype=torch.bool)
    given = {
        "codes": mels.expand(2, -1, -1),
        "codes_mask": torch.ones(2, 9, dtype=torch.bool),
        "said": said,
        "said_mask": everything(said),
    }
    made = Infilling().generate(
        nets_of(LENGTHS), {"phonemes": text, "phonemes_mask": mask}, replace(REQUEST, given=given), rng_of()
    )
    assert made.lengths is not None and made.lengths.tolist() == [1 + 2 + 2 + 3 + 2 + 1, 1 + 4 + 2 + 3 + 1]
    assert torch.equal(made.samples[0, :5], mels[0, :5]) and torch.equal(made.samples[0, 10], mels[0, 8])
    assert torch.equal(made.samples[1, :1], mels[0, :1]) and torch.equal(made.samples[1, 5:], mels[0, 3:])
    assert _common(torch.tensor([1, 1]), torch.tensor([1, 1, 1])) == (2, 0)


def test_what_it_decides_itself_is_no_argument() -> None:
    with pytest.raises(UserError, match="gap"):
        Infilling(gap={"least": 0.9, "most": 0.2})
    with pytest.raises(UserError, match="gap"):
        Infilling(gap={"lest": 0.9})
