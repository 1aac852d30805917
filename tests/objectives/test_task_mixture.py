"""Tasks over one vocabulary: sequences as VideoPoet lays them, each sample's own task in the loss, and drawing by what is given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Guidance, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.tokens.prefix_lm import PrefixLM
from nexus_scale.objectives.task_mixture import TaskMixture
from nexus_scale.processes.token_tasks import Vocabulary
from nexus_scale.samplers.autoregressive import Autoregressive

STREAMS: dict[str, Any] = {
    "video_codes": {"codebook_size": 10, "frame_codes": 2},
    "masked_video_codes": {"like": "video_codes"},
    "codes": {"codebook_size": 4, "num_codebooks": 2},
}
TASKS: dict[str, Any] = {
    "text_to_video": {"told": ("text",), "weight": 3.0},
    "continuation": {"shows": (1, 2)},
    "inpainting": {"told": ("text",), "given": ("masked_video_codes",)},
    "video_to_audio": {"given": ("video_codes",), "makes": "codes"},
}
NONE = 8 + 10 + 2 * 4


def fields(B: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {name: torch.randint(10, (B, 6), generator=draw) for name in ("video_codes", "masked_video_codes")}
    found["codes"] = torch.randint(4, (B, 3, 2), generator=draw)
    found["codes_mask"] = torch.arange(3) < torch.tensor([1, 2, 3, 3, 2, 1])[:B, None]
    return {**found, "text": torch.randn(B, 2, 5, generator=draw), "text_mask": torch.ones(B, 2, dtype=torch.bool)}


def made(**changes: Any) -> tuple[TaskMixture, PrefixLM]:
    torch.manual_seed(0)
    net = PrefixLM(codebook_size=NONE, hidden_size=16, depth=2, num_heads=2, text_dim=5, dropout=0.0)
    net.init_weights()
    return TaskMixture(streams=STREAMS, tasks=TASKS, num_special=8, **changes), net.eval()


def rng_of(rows: list[int]) -> ProgressRng:
    return ProgressRng(0, 0, "main", torch.tensor(rows), torch.device("cpu"))


def test_sequences_are_none_task_what_is_given_and_what_is_made() -> None:
    vocabulary = made()[0].vocabulary
    assert vocabulary.size == NONE and vocabulary.range_of("masked_video_codes") == (8, 18)
    assert [vocabulary.range_of("codes", step) for step in range(3)] == [(18, 22), (22, 26), (18, 22)]
    given = {
        name: (codes[..., None] if codes.ndim == 2 else codes)
        for name, codes in fields(2).items()
        if "text" not in name
    }
    streams = {name: (given[name], torch.ones_like(given[name][..., 0], dtype=torch.bool)) for name in STREAMS}
    streams["codes"] = given["codes"], fields(2)["codes_mask"]
    laid = vocabulary.lay("video_to_audio", streams, torch.tensor([0, 0]))
    video, sound = given["video_codes"][..., 0] + 8, given["codes"] + torch.tensor([18, 22])
    assert laid.tokens[1].tolist() == [NONE, 3, 4, *video[1].tolist(), 6, *sound[1, :2].flatten().tolist(), NONE, NONE]
    assert laid.begin == 10 and laid.known[1].tolist() == [True] * 10 + [False] * 6
    assert laid.made[1].tolist() == [False] * 10 + [True] * 4 + [False] * 2
    assert torch.equal(vocabulary.codes_of("codes", vocabulary.tokens_of("codes", given["codes"])), given["codes"])
    shown = vocabulary.lay("continuation", streams, torch.tensor([1, 2]))
    assert shown.tokens[0].tolist() == [NONE, 1, 4, *video[0].tolist()] and shown.known.sum(1).tolist() == [5, 7]


def test_each_sample_learns_its_own_task_whatever_the_micro_batches() -> None:
    objective, net = made(condition_drop=0.5)
    whole, nats, seen = fields(), [], set()
    for row in range(6):
        rng = rng_of([row])
        u = float(rng.uniform("task"))
        number = sum(u >= up_to for up_to in (3 / 6, 4 / 6, 5 / 6))
        name, seen = list(TASKS)[number], seen | {number}
        one = {key: value[row : row + 1] for key, value in whole.items()}
        streams = objective.streams(one)
        laid = objective.vocabulary.lay(
            name, streams, (rng.uniform("shows") * 2).long() + 1 if number == 1 else torch.tensor([0])
        )
        told = "text" in TASKS[name].get("told", ()) and float(rng.uniform("drop")) >= 0.5
        text = one["text"] * told
        real = torch.tensor([[True, told]])
        cond = {"text": text, "text_mask": real, "prefix": laid.known[:, :-1]}
        logits = net(laid.tokens[:, :-1, None], cond)[:, :, 0].log_softmax(-1)
        chosen = logits.gather(2, laid.tokens[:, 1:, None].clamp(max=NONE - 1))[..., 0]
        nats.append(-chosen[laid.made[:, 1:]].mean())
    assert len(seen) > 1
    expected = torch.stack(nats)
    for rows in ([0, 1], [2, 3, 4, 5]):
        batch = Batch({key: value[rows] for key, value in whole.items()}, torch.tensor(rows), torch.tensor(rows))
        torch.testing.assert_close(
            objective.loss("main", {"model": net}, batch, rng_of(rows), 0).total, expected[rows].mean()
        )
    batch = Batch(whole, torch.arange(6), torch.arange(6))
    found = objective.validate({"model": net}, batch, rng_of(list(range(6))))
    mixed = 0.5 * found["loss_text_to_video"] + sum(found[f"loss_{name}"] for name in list(TASKS)[1:]) / 6
    torch.testing.assert_close(found["loss"], mixed)


def test_tasks_that_alternate_have_steps_of_their_own_by_their_weights() -> None:
    objective, net = made(alternates=True)
    names = [phase.name for step in range(60) for phase in objective.phases(step)]
    shares = {name: names.count(name) / 60 for name in TASKS}
    assert shares == {name: pytest.approx(task.get("weight", 1.0) / 6, abs=1 / 30) for name, task in TASKS.items()}
    batch = Batch(fields(), torch.arange(6), torch.arange(6))
    every = objective.validate({"model": net}, batch, rng_of(list(range(6))))
    for name in ("text_to_video", "inpainting", "video_to_audio"):
        rng = ProgressRng(0, 0, name, torch.arange(6), torch.device("cpu"))
        found = objective.loss(name, {"model": net}, batch, rng, 0).total
        torch.testing.assert_close(found, every[f"loss_{name}"].mean())


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("text_to_video", {}),
        ("continuation", {"video_codes": slice(0, 2)}),
        ("inpainting", {"masked_video_codes": slice(0, 6)}),
    ],
)
def test_what_is_given_decides_the_task_and_cached_steps_equal_whole_sequences(
    task: str, given: dict[str, slice]
) -> None:
    objective, net = made()
    whole = fields(3)
    known = {name: whole[name][:, part] for name, part in given.items()}
    cond = {"text": whole["text"], "text_mask": whole["text_mask"]}
    request = Request(
        shape=(6,), sampler=Autoregressive(temperature=0, max_tokens=6), given=known, guidance=Guidance(2.0)
    )
    codes = objective.generate({"model": net}, cond, request, rng_of([0, 1, 2])).samples
    assert codes.shape == (3, 6) and 0 <= int(codes.min()) <= int(codes.max()) < 10
    shown = 1 if task == "continuation" else 0
    assert torch.equal(codes[:, : 2 * shown], whole["video_codes"][:, : 2 * shown]), "what is shown is kept"
    streams = objective.streams({**known, "video_codes": codes})
    laid = objective.vocabulary.lay(task, streams, torch.full((3,), shown))
    prefix = {"prefix": laid.known[:, :-1]}
    own = cond if "text" in TASKS[task].get("told", ()) else objective.unconditional(cond)
    told, away = (
        net(laid.tokens[:, :-1, None], {**one, **prefix})[:, :, 0] for one in (own, objective.unconditional(cond))
    )
    best = (away + 2 * (told - away))[..., 8:18].argmax(-1)
    assert torch.equal(best[laid.made[:, 1:]], codes[:, 2 * shown :].flatten())


def test_what_no_task_makes_and_what_does_not_fit_is_refused() -> None:
    objective, net = made()
    cond = {"text": fields(1)["text"]}
    request = Request(shape=(6,), sampler=Autoregressive(max_tokens=6), given={"video_codes": torch.zeros(1, 6).long()})
    with pytest.raises(
        UserError, match="got video_codes and 3 frames of codes; the run has tasks text_to_video: given nothing"
    ):
        objective.generate({"model": net}, cond, request, rng_of([0]))
    assert objective.draws.takes == {"sampler", "prompt", "guidance", "negative", "image", "begin", "mask"}
    for streams, tasks, special, words in (
        ({"a": {"like": "b"}}, {"t": {"makes": "a"}}, 4, "streams.a.like: got 'b'"),
        ({"a": {}}, {"t": {"makes": "a"}}, 4, "streams.a.codebook_size: got 0"),
        ({"a": {"codebook_size": 3}}, {"t": {"makes": "b"}}, 4, "tasks.t: no stream 'b'"),
        ({"a": {"codebook_size": 3}}, {"t": {"makes": "a", "shows": (2, 1)}}, 4, "shows: got [2, 1]"),
        ({"a": {"codebook_size": 3}}, {"t": {"makes": "a", "weight": 0.0}}, 4, "all weights are 0"),
        ({"a": {"codebook_size": 3}}, {"t": {"makes": "a"}}, 1, "num_special: got 1"),
        ({}, {}, 4, "got 0 streams and 0 tasks"),
        ({"a": {"codebook_size": 3, "size": 4}}, {"t": {"makes": "a"}}, 4, "size"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            Vocabulary(streams, tasks, special)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=re.escape("tasks.t.told: got ['label']")):
        TaskMixture(streams=STREAMS, tasks={"t": {"told": ("label",)}})
